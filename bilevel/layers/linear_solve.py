"""Any linear system as a differentiable layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, overload

from typing_extensions import Unpack

from bilevel.errors import ArgumentError
from bilevel.layers.first_call import explain_misuse
from bilevel.layers.linear_layer import LinearLayer
from bilevel.layers.options import LinearOptions, refuse_goals
from bilevel.layers.rectangular import RectangularLayer
from bilevel.linear._base import LinearSolverLike
from bilevel.policy import OnFailure
from bilevel.tolerance import Tolerance

__all__ = ["linear_solve"]


@overload
def linear_solve(
    matvec: None = None, **options: Unpack[LinearOptions]
) -> Callable[[Callable[..., Any]], LinearLayer]: ...
@overload
def linear_solve(matvec: Callable[..., Any], **options: Unpack[LinearOptions]) -> LinearLayer: ...
@explain_misuse
def linear_solve(
    matvec: Callable[..., Any] | None = None,
    *,
    symmetric: bool = False,
    unknown: Any = None,
    linear_solver: LinearSolverLike | None = None,
    tolerance: Tolerance | None = None,
    on_failure: OnFailure = "raise",
) -> LinearLayer | Callable[[Callable[..., Any]], LinearLayer]:
    """Turn a linear map into the layer x(b, θ) with A(θ) x = b, and dx = A⁻¹ (db − dA x).

    Parameters
    ----------
    matvec
        x ↦ A(θ) x: a function of ``(x, *args, **kwargs)``, linear in x, that returns the pytree of x, shape for shape.
    symmetric
        Whether A = Aᵀ, or A = Aᴴ for complex vectors. Cholesky and conjugate gradients need it. A symmetric matrix that is
        not positive definite can be solved by Exact, GMRES and BiCGStab.
    unknown
        For a rectangular A: a tensor or pytree with the shapes and dtypes of x (its numbers are not used), or a function of
        ``(*args, **kwargs)`` that returns one. The solution is x = A⁺ b: the minimiser of ‖A x − b‖ of minimum norm.
        ``matvec`` returns the pytree of b. The derivative is that of Golub & Pereyra. It exists where no argument changes
        the rank of A, and is refused elsewhere.
    linear_solver
        A linear solver, or a function (operator, rhs) -> x on tensors (batch, n). None, for a rectangular A: QR if small,
        else LSMR. None, for a square A: a factorisation if small, else conjugate gradients if symmetric, else GMRES. A
        solver that does not support rectangular matrices solves AᵀA x = Aᵀ b.
    tolerance
        δ of the solution and δ′ of the adjoints. ``strong_convexity`` is the least singular value of A. None: the accuracy
        that the dtype allows.
    on_failure
        See :func:`argmin`.

    Returns
    -------
    LinearLayer
        A function of ``(rhs, *args, **kwargs)``, differentiable with respect to both, with ``.solve`` that also returns a
        report.

    Raises
    ------
    ArgumentError
        If a setting cannot be used.

    References
    ----------
    The derivative of an inverse; as a transform, ``jax.lax.custom_linear_solve``.

    Examples
    --------
    >>> import torch, bilevel
    >>> @bilevel.linear_solve(symmetric=True)
    ... def smooth(x, strength):  # (I + s DᵀD) x, D the differences of neighbours
    ...     d = torch.diff(x)
    ...     return x + strength * (torch.nn.functional.pad(d, (1, 0)) - torch.nn.functional.pad(d, (0, 1)))
    >>> strength = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    >>> x = smooth(torch.tensor([0.0, 3.0, 0.0], dtype=torch.float64), strength)
    >>> x.detach()
    tensor([0.7500, 1.5000, 0.7500], dtype=torch.float64)
    >>> x[1].backward()
    >>> strength.grad  # x₁ = 3 (1 + s) / (1 + 3 s), of slope −6 / (1 + 3 s)²
    tensor(-0.3750, dtype=torch.float64)

    A straight line through three points, and what each of them does to its slope:

    >>> line = bilevel.linear_solve(lambda p, t: p[0] + p[1] * t, unknown=torch.zeros(2, dtype=torch.float64))
    >>> t = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    >>> y = torch.tensor([1.0, 3.0, 6.0], dtype=torch.float64, requires_grad=True)
    >>> p = line(y, t)
    >>> p.detach()
    tensor([0.8333, 2.5000], dtype=torch.float64)
    >>> p[1].backward()
    >>> y.grad.round(decimals=6) + 0
    tensor([-0.5000,  0.0000,  0.5000], dtype=torch.float64)
    """
    refuse_goals(tolerance)
    if unknown is not None:
        if symmetric:
            raise ArgumentError(
                "linear_solve: expected symmetric=True or unknown=, got both; leave symmetric=True out for a rectangular matrix"
            )
        rectangular = functools.partial(
            RectangularLayer, unknown=unknown, linear_solver=linear_solver, tolerance=tolerance, on_failure=on_failure
        )
        return rectangular if matvec is None else rectangular(matvec)
    make = functools.partial(
        LinearLayer, symmetric=symmetric, linear_solver=linear_solver, tolerance=tolerance, on_failure=on_failure
    )
    return make if matvec is None else make(matvec)
