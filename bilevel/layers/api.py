"""Any argmin, root, fixed point or linear system as a differentiable layer: what most people import."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, overload

import torch

from bilevel.equations.structured import Structure
from bilevel.equations.system import ArgminSystem, FixedPointSystem, RootSystem, System
from bilevel.errors import ArgumentError
from bilevel.layers.first_call import explain_misuse
from bilevel.layers.layer import Layer, Solution
from bilevel.layers.linear_layer import LinearLayer
from bilevel.layers.proximal import Proximal
from bilevel.linear._base import LinearSolverLike
from bilevel.policy import OnFailure
from bilevel.solvers._base import InnerSolverLike
from bilevel.tolerance import Tolerance

__all__ = ["Layer", "LinearLayer", "Solution", "argmin", "fixed_point", "linear_solve", "root"]

Decorator = Callable[[Callable[..., Any]], Layer]


@overload
def argmin(
    objective: None = None,
    *,
    solver: InnerSolverLike | None = None,
    linear_solver: LinearSolverLike | None = None,
    tolerance: Tolerance | None = None,
    on_failure: OnFailure = "raise",
    prox: Any = None,
) -> Decorator: ...
@overload
def argmin(
    objective: Callable[..., torch.Tensor],
    *,
    solver: InnerSolverLike | None = None,
    linear_solver: LinearSolverLike | None = None,
    tolerance: Tolerance | None = None,
    on_failure: OnFailure = "raise",
    prox: Any = None,
) -> Layer: ...
@explain_misuse
def argmin(
    objective: Callable[..., torch.Tensor] | None = None,
    *,
    solver: InnerSolverLike | None = None,
    linear_solver: LinearSolverLike | None = None,
    tolerance: Tolerance | None = None,
    on_failure: OnFailure = "raise",
    prox: Any = None,
) -> Layer | Decorator:
    """Turn an objective into the layer x*(θ) = argmin_x G(x, θ), with dx*/dθ = −H⁻¹ ∂_θ∇_x G.

    Parameters
    ----------
    objective
        G: a function of ``(x, *args, **kwargs)`` that returns a scalar tensor, twice differentiable. Left out, a decorator is
        returned.
    solver
        An inner solver, or a function ``(objective, init, *args, **kwargs)`` -> x. By default chosen from the size.
    linear_solver
        A linear solver for H q = v, or a function (operator, rhs) -> x on tensors (batch, n). By default chosen from
        the size.
    tolerance
        δ and δ′; by default what the dtype allows.
    on_failure
        What to do about a solve that failed and about misuse that makes gradients wrong: ``"raise"``, ``"warn"``,
        ``"nan"`` (NaN for the problems concerned) or ``"ignore"``; forward and backward.

    Returns
    -------
    Layer
        A function of ``(init, *args, **kwargs)``, with ``.solve`` that also returns a report. ``torch.func.vmap`` of it
        solves a batch at once.

    Raises
    ------
    ArgumentError
        If a setting cannot be used.

    References
    ----------
    The implicit function theorem; as a layer, Amos & Kolter, "OptNet", ICML 2017; as a transform, Blondel et al.,
    "Efficient and Modular Implicit Differentiation", NeurIPS 2022.

    Examples
    --------
    >>> import torch, bilevel
    >>> @bilevel.argmin
    ... def ridge(w, X, y, strength):
    ...     return ((X @ w - y) ** 2).sum() + strength * (w**2).sum()
    >>> X = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    >>> y = torch.tensor([1.0, 2.0], dtype=torch.float64)
    >>> strength = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    >>> w = ridge(torch.zeros(2, dtype=torch.float64), X, y, strength)
    >>> w.detach()
    tensor([0.5000, 0.8000], dtype=torch.float64)
    >>> w.sum().backward()
    >>> strength.grad  # −1/(1+1)² − 4/(4+1)²
    tensor(-0.4100, dtype=torch.float64)
    """
    structure = None if prox is None else Proximal(given=prox)
    return _layer(ArgminSystem, objective, solver, linear_solver, tolerance, on_failure, structure)


@overload
def root(
    residual: None = None,
    *,
    solver: InnerSolverLike | None = None,
    linear_solver: LinearSolverLike | None = None,
    tolerance: Tolerance | None = None,
    on_failure: OnFailure = "raise",
) -> Decorator: ...
@overload
def root(
    residual: Callable[..., Any],
    *,
    solver: InnerSolverLike | None = None,
    linear_solver: LinearSolverLike | None = None,
    tolerance: Tolerance | None = None,
    on_failure: OnFailure = "raise",
) -> Layer: ...
@explain_misuse
def root(
    residual: Callable[..., Any] | None = None,
    *,
    solver: InnerSolverLike | None = None,
    linear_solver: LinearSolverLike | None = None,
    tolerance: Tolerance | None = None,
    on_failure: OnFailure = "raise",
) -> Layer | Decorator:
    """Turn a residual into the layer x*(θ) with R(x*, θ) = 0, and dx*/dθ = −(∂_x R)⁻¹ ∂_θ R.

    Parameters
    ----------
    residual
        R: a function of ``(x, *args, **kwargs)`` that returns the pytree of x, shape for shape.
    solver, linear_solver, tolerance, on_failure
        See :func:`argmin`. The Jacobian need not be symmetric: Exact, GMRES and BiCGStab fit, CG does not.

    Returns
    -------
    Layer
        A function of ``(init, *args, **kwargs)``.

    Raises
    ------
    ArgumentError
        If a setting cannot be used.

    Examples
    --------
    >>> import torch, bilevel
    >>> cube_root = bilevel.root(lambda x, a: x**3 - a)
    >>> a = torch.tensor(8.0, dtype=torch.float64, requires_grad=True)
    >>> x = cube_root(torch.tensor(1.5, dtype=torch.float64), a)
    >>> x.backward()
    >>> round(x.item(), 6), round(a.grad.item(), 6)  # 1 / (3 x²)
    (2.0, 0.083333)
    """
    return _layer(RootSystem, residual, solver, linear_solver, tolerance, on_failure)


@overload
def fixed_point(
    mapping: None = None,
    *,
    solver: InnerSolverLike | None = None,
    linear_solver: LinearSolverLike | None = None,
    tolerance: Tolerance | None = None,
    on_failure: OnFailure = "raise",
) -> Decorator: ...
@overload
def fixed_point(
    mapping: Callable[..., Any],
    *,
    solver: InnerSolverLike | None = None,
    linear_solver: LinearSolverLike | None = None,
    tolerance: Tolerance | None = None,
    on_failure: OnFailure = "raise",
) -> Layer: ...
@explain_misuse
def fixed_point(
    mapping: Callable[..., Any] | None = None,
    *,
    solver: InnerSolverLike | None = None,
    linear_solver: LinearSolverLike | None = None,
    tolerance: Tolerance | None = None,
    on_failure: OnFailure = "raise",
) -> Layer | Decorator:
    """Turn a mapping into the layer x*(θ) with x* = T(x*, θ), and dx*/dθ = (I − ∂_x T)⁻¹ ∂_θ T.

    Parameters
    ----------
    mapping
        T: a function of ``(x, *args, **kwargs)`` that returns the pytree of x, shape for shape.
    solver, linear_solver, tolerance, on_failure
        See :func:`argmin`; the residual is x − T(x). By default safeguarded Anderson acceleration: it converges
        wherever plain iteration does in 10,000 steps. Where T is no contraction near the solution, take Newton.

    Returns
    -------
    Layer
        A function of ``(init, *args, **kwargs)``.

    Raises
    ------
    ArgumentError
        If a setting cannot be used.

    References
    ----------
    As a layer: Bai, Kolter, Koltun, "Deep Equilibrium Models", NeurIPS 2019.

    Examples
    --------
    >>> import torch, bilevel
    >>> layer = bilevel.fixed_point(lambda x, a: 0.5 * torch.cos(x) + a)
    >>> a = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    >>> x = layer(torch.zeros(2, dtype=torch.float64), a)
    >>> bool(torch.allclose(x, 0.5 * torch.cos(x) + a, atol=1e-10))
    True
    """
    return _layer(FixedPointSystem, mapping, solver, linear_solver, tolerance, on_failure)


@overload
def linear_solve(
    matvec: None = None,
    *,
    symmetric: bool = False,
    linear_solver: LinearSolverLike | None = None,
    tolerance: Tolerance | None = None,
    on_failure: OnFailure = "raise",
) -> Callable[[Callable[..., Any]], LinearLayer]: ...
@overload
def linear_solve(
    matvec: Callable[..., Any],
    *,
    symmetric: bool = False,
    linear_solver: LinearSolverLike | None = None,
    tolerance: Tolerance | None = None,
    on_failure: OnFailure = "raise",
) -> LinearLayer: ...
@explain_misuse
def linear_solve(
    matvec: Callable[..., Any] | None = None,
    *,
    symmetric: bool = False,
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
        Whether A = Aᵀ, or A = Aᴴ of complex vectors: then Cholesky and conjugate gradients can be used. A matrix that is symmetric and not positive
        definite can be solved by Exact, GMRES and BiCGStab.
    linear_solver
        A linear solver, or a function (operator, rhs) -> x on tensors (batch, n). By default chosen from size and symmetry:
        a factorisation if small, else conjugate gradients, or GMRES where not symmetric.
    tolerance
        δ of the solution and δ′ of the adjoints; with ``strong_convexity`` the least singular value of A. By default what the
        dtype allows.
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
    """
    _refuse_goals(tolerance)
    make = functools.partial(
        LinearLayer, symmetric=symmetric, linear_solver=linear_solver, tolerance=tolerance, on_failure=on_failure
    )
    return make if matvec is None else make(matvec)


def _layer(
    kind: type[System],
    function: Callable[..., Any] | None,
    solver: InnerSolverLike | None,
    linear_solver: LinearSolverLike | None,
    tolerance: Tolerance | None,
    on_failure: OnFailure,
    structure: Structure | None = None,
) -> Layer | Decorator:
    _refuse_goals(tolerance)
    make = functools.partial(
        Layer,
        kind,
        solver=solver,
        linear_solver=linear_solver,
        tolerance=tolerance,
        on_failure=on_failure,
        structure=structure,
    )
    return make if function is None else make(function)


def _refuse_goals(tolerance: Tolerance | None) -> None:
    if tolerance is not None and getattr(tolerance, "has_goal", False):
        raise ArgumentError(
            f"a layer: expected Tolerance(delta=..., delta_prime=...), got {tolerance!r}; a layer has no outer loss whose gradient "
            "that could speak of: write a bilevel.BilevelProblem"
        )
