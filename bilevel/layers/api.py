"""Any argmin, root or fixed point as a differentiable layer: what most people import."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

from typing_extensions import Unpack

from bilevel.equations.structured import Structure
from bilevel.equations.system import ArgminSystem, FixedPointSystem, RootSystem, System
from bilevel.errors import ArgumentError
from bilevel.layers.constraint_structure import ConstraintStructure
from bilevel.layers.constraints import Constraints
from bilevel.layers.differentiation import Differentiation
from bilevel.layers.first_call import explain_misuse
from bilevel.layers.layer import Layer
from bilevel.layers.options import ArgminOptions, LayerOptions, refuse_goals
from bilevel.layers.proximal import Proximal
from bilevel.layers.solution import Solution
from bilevel.linear._base import LinearSolverLike
from bilevel.policy import OnFailure
from bilevel.solvers._base import InnerSolverLike
from bilevel.tolerance import Tolerance

__all__ = ["Layer", "Solution", "argmin", "fixed_point", "root"]

Decorator = Callable[[Callable[..., Any]], Layer]


@overload
def argmin(objective: None = None, **options: Unpack[ArgminOptions]) -> Decorator: ...
@overload
def argmin(objective: Callable[..., Any], **options: Unpack[ArgminOptions]) -> Layer: ...
@explain_misuse
def argmin(
    objective: Callable[..., Any] | None = None,
    *,
    solver: InnerSolverLike | None = None,
    linear_solver: LinearSolverLike | None = None,
    tolerance: Tolerance | None = None,
    on_failure: OnFailure = "raise",
    prox: Any = None,
    lower: Any = None,
    upper: Any = None,
    equality: Callable[..., Any] | None = None,
    inequality: Callable[..., Any] | None = None,
    smoothing: float | None = None,
    differentiation: Differentiation | None = None,
    has_aux: bool = False,
    prepare: Callable[..., Any] | None = None,
    warm_start: bool = False,
    static: bool = False,
) -> Layer | Decorator:
    """Turn an objective into the layer x*(θ) = argmin_x G(x, θ), with dx*/dθ = −H⁻¹ ∂_θ∇_x G.

    Parameters
    ----------
    objective
        G: a function of ``(x, *args, **kwargs)`` that returns a scalar tensor and is twice differentiable. A module is also
        such a function; its parameters are differentiated too. None: return a decorator.
    solver
        An inner solver, or a function ``(objective, init, *args, **kwargs)`` -> x. None: chosen from the size.
    linear_solver
        A linear solver for H q = v, or a function (operator, rhs) -> x on tensors (batch, n). None: chosen from the size.
    tolerance
        δ and δ′. None: the accuracy that the dtype allows.
    on_failure
        The policy for failed solves, and for misuse that makes gradients wrong: ``"raise"``, ``"warn"``, ``"nan"`` (NaN for
        the problems concerned) or ``"ignore"``. It applies to the forward solve and to derivatives.
    prox
        A term g of :mod:`bilevel.prox`. The layer minimises G + g, and g need not be smooth. For a pytree x pass a pytree
        of terms, with None for a tensor without one. A function of ``(*args, **kwargs)`` that returns a term allows a
        regularisation strength that depends on θ. The derivative is taken on the manifold of the solution: its zeros,
        active bounds and ties. If a term is just at its threshold, the derivative is refused with ``Status.DEGENERATE``.
    lower, upper
        Bounds on x: a number, a tensor that broadcasts to x, or a pytree like x. None or ±inf means no bound. A function of
        ``(*args, **kwargs)`` that returns one allows a bound that depends on θ.
    equality, inequality
        h and c: functions of ``(x, *args, **kwargs)`` that return a tensor or a pytree of tensors. The layer minimises G
        subject to h = 0, c <= 0 and the bounds. Projected Newton handles bounds alone, an interior-point method the rest;
        ``init`` need not be feasible. ``solve`` returns ``multipliers`` and ``active``, each with fields ``equality``,
        ``inequality``, ``lower`` and ``upper``.
    smoothing
        τ: take the value and the derivative from the central path (λ_i c_i = −τ). There the derivative exists even if a
        constraint is active with multiplier 0. Without ``smoothing`` such a derivative is refused with
        ``Status.DEGENERATE``, which names the constraint.
    differentiation
        How the solution is differentiated: :class:`bilevel.Implicit` by default, or :class:`bilevel.Unrolled`, :class:`bilevel.Truncated`,
        :class:`bilevel.OneStep`, :class:`bilevel.PhantomGradient`.
    has_aux
        Whether ``objective`` returns a pair (value, aux). The layer then returns (x, aux), with aux evaluated at x and differentiable.
    prepare
        A function of ``(*args, **kwargs)`` that returns the arguments for ``objective``: a tuple, or a single one. It is
        called once a call, and is differentiated. For example, it makes a kernel matrix once, and not at every evaluation.
    warm_start
        Whether a call begins at the last solution of this layer. The shapes of that solution have to be those of ``init``.
    static
        Whether you vouch for the functions of this layer: each does the same torch operations in every call with arguments of
        the same shapes and dtypes, and depends on nothing else that changes. The layer then replays functions whose code it
        cannot follow, such as one that calls an object of your own. The documentation's page on replays says what you promise.

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
    The implicit function theorem; with constraints, Fiacco, "Sensitivity analysis for nonlinear programming using penalty methods",
    Mathematical Programming 10, 1976; as a layer, Amos & Kolter, "OptNet", ICML 2017; as a transform, Blondel et al.,
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

    The Lasso: a term that is not smooth, with a strength that is differentiated.

    >>> lasso = bilevel.argmin(
    ...     lambda w, X, y, s: 0.5 * ((X @ w - y) ** 2).sum(), prox=lambda X, y, s: bilevel.prox.L1(s)
    ... )
    >>> s = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    >>> w = lasso(torch.zeros(2, dtype=torch.float64), X, y, s)
    >>> w.detach()
    tensor([0.0000, 0.5000], dtype=torch.float64)
    >>> w.sum().backward()
    >>> s.grad  # −1/2² of the one that is not zero
    tensor(-0.2500, dtype=torch.float64)

    The nearest point of the simplex, which has no negative entries and the sum s:

    >>> nearest = bilevel.argmin(lambda x, a, s: ((x - a) ** 2).sum(), lower=0.0, equality=lambda x, a, s: x.sum() - s)
    >>> a, s = torch.tensor([0.5, 0.9, -2.0], dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    >>> solution = nearest.solve(torch.zeros(3, dtype=torch.float64), a, s)
    >>> solution.value, solution.active.lower.tolist()
    (tensor([0.3000, 0.7000, 0.0000], dtype=torch.float64), [False, False, True])
    >>> torch.func.jacrev(lambda s: nearest(torch.zeros(3, dtype=torch.float64), a, s))(s)
    tensor([0.5000, 0.5000, -0.0000], dtype=torch.float64)
    """
    constraints = Constraints(lower=lower, upper=upper, equality=equality, inequality=inequality, smoothing=smoothing)
    structure = _structure(prox, constraints)
    return _layer(
        ArgminSystem, objective, solver=solver, linear_solver=linear_solver, tolerance=tolerance, on_failure=on_failure, structure=structure,
        differentiation=differentiation, has_aux=has_aux, prepare=prepare, warm_start=warm_start, static=static,
    )  # fmt: skip


@overload
def root(residual: None = None, **options: Unpack[LayerOptions]) -> Decorator: ...
@overload
def root(residual: Callable[..., Any], **options: Unpack[LayerOptions]) -> Layer: ...
@explain_misuse
def root(
    residual: Callable[..., Any] | None = None,
    *,
    solver: InnerSolverLike | None = None,
    linear_solver: LinearSolverLike | None = None,
    tolerance: Tolerance | None = None,
    on_failure: OnFailure = "raise",
    differentiation: Differentiation | None = None,
    has_aux: bool = False,
    prepare: Callable[..., Any] | None = None,
    warm_start: bool = False,
    static: bool = False,
) -> Layer | Decorator:
    """Turn a residual into the layer x*(θ) with R(x*, θ) = 0, and dx*/dθ = −(∂_x R)⁻¹ ∂_θ R.

    Parameters
    ----------
    residual
        R: a function of ``(x, *args, **kwargs)`` that returns the pytree of x, shape for shape.
    solver, linear_solver, tolerance, on_failure, differentiation, has_aux, prepare, warm_start, static
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
    return _layer(
        RootSystem, residual, solver=solver, linear_solver=linear_solver, tolerance=tolerance, on_failure=on_failure,
        differentiation=differentiation, has_aux=has_aux, prepare=prepare, warm_start=warm_start, static=static,
    )  # fmt: skip


@overload
def fixed_point(mapping: None = None, **options: Unpack[LayerOptions]) -> Decorator: ...
@overload
def fixed_point(mapping: Callable[..., Any], **options: Unpack[LayerOptions]) -> Layer: ...
@explain_misuse
def fixed_point(
    mapping: Callable[..., Any] | None = None,
    *,
    solver: InnerSolverLike | None = None,
    linear_solver: LinearSolverLike | None = None,
    tolerance: Tolerance | None = None,
    on_failure: OnFailure = "raise",
    differentiation: Differentiation | None = None,
    has_aux: bool = False,
    prepare: Callable[..., Any] | None = None,
    warm_start: bool = False,
    static: bool = False,
) -> Layer | Decorator:
    """Turn a mapping into the layer x*(θ) with x* = T(x*, θ), and dx*/dθ = (I − ∂_x T)⁻¹ ∂_θ T.

    Parameters
    ----------
    mapping
        T: a function of ``(x, *args, **kwargs)`` that returns the pytree of x, shape for shape.
    solver, linear_solver, tolerance, on_failure, differentiation, has_aux, prepare, warm_start, static
        See :func:`argmin`; the residual is x − T(x). The default solver is safeguarded Anderson acceleration: it converges
        wherever plain iteration does in 10,000 steps. If T is not a contraction near the solution, pass Newton.

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
    >>> [round(number, 6) for number in layer(torch.zeros(2, dtype=torch.float64), a).tolist()]
    [0.450184, 1.187151]
    """
    return _layer(
        FixedPointSystem, mapping, solver=solver, linear_solver=linear_solver, tolerance=tolerance, on_failure=on_failure,
        differentiation=differentiation, has_aux=has_aux, prepare=prepare, warm_start=warm_start, static=static,
    )  # fmt: skip


def _layer(kind: type[System], function: Callable[..., Any] | None, **settings: Any) -> Layer | Decorator:
    refuse_goals(settings["tolerance"])

    def make(function: Callable[..., Any]) -> Layer:
        return Layer(kind, function, **settings)

    return make if function is None else make(function)


def _structure(prox: Any, constraints: Constraints) -> Structure | None:
    """Return what the layer has besides its objective, or None."""
    if prox is not None and constraints.present:
        raise ArgumentError(
            f"argmin: expected prox or constraints, got prox beside {', '.join(constraints.present)}; write both "
            "as one term, bilevel.prox.Custom, or the term as constraints: an L1 norm is s * (p + q).sum() for x = p - q, with lower=0"
        )
    if constraints.present:
        return ConstraintStructure(constraints=constraints)
    if constraints.smoothing is not None:
        raise ArgumentError(
            "argmin: expected lower, upper, equality or inequality with smoothing, which smooths what constraints do to the solution, got "
            "none; leave smoothing out"
        )
    return None if prox is None else Proximal(given=prox)
