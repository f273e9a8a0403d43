"""Least squares as a differentiable layer: ``bilevel.least_squares``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from typing_extensions import Unpack

from bilevel.equations.least_squares import GaussNewtonSystem, LeastSquaresSystem, Loss, residual_vector
from bilevel.equations.problem import Problem
from bilevel.equations.system import System
from bilevel.errors import ArgumentError
from bilevel.layers.api import Decorator, argmin
from bilevel.layers.call import SolveCall
from bilevel.layers.differentiation import BySteps, Differentiation
from bilevel.layers.first_call import explain_misuse
from bilevel.layers.layer import Layer
from bilevel.layers.options import SolverOptions
from bilevel.layers.settings import SolveSettings
from bilevel.linear._base import LinearSolverLike
from bilevel.policy import OnFailure
from bilevel.pytree import Raveler
from bilevel.reports import Status
from bilevel.robust import Cauchy, Huber, RobustLoss, SoftL1
from bilevel.solvers._base import InnerSolverLike
from bilevel.solvers.gauss_newton import GaussNewton
from bilevel.solvers.levenberg_marquardt import LevenbergMarquardt
from bilevel.tolerance import Tolerance

__all__ = ["FullHessian", "GaussNewtonHessian", "LeastSquaresLayer", "check_hessian", "least_squares"]


@dataclass(frozen=True)
class FullHessian:
    """Differentiate with JᵀJ + Σ r_i ∇²r_i: the derivative of the solution.

    Examples
    --------
    >>> import torch, bilevel
    >>> layer = bilevel.least_squares(lambda x, a: (x**2 - a, x - 1.0), hessian=bilevel.FullHessian())
    >>> a = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    >>> layer(torch.tensor(1.0, dtype=torch.float64), a).backward()
    >>> round(a.grad.item(), 3)
    0.333
    """


@dataclass(frozen=True)
class GaussNewtonHessian:
    """Differentiate with JᵀJ in place of the Hessian: a biased derivative.

    The derivative is exact where the residuals vanish or are affine in x. Elsewhere its relative error is about the size of
    (JᵀJ)⁻¹ Σ r_i ∇²r_i. For example, the derivative of argmin (a − x)⁴ with respect to a is 1, and this choice gives 1.5. Second
    derivatives omit more terms of the same size. Use it where the full Hessian is not positive definite at the solution, or costs too
    much. With a robust loss c the matrix is Jᵀ c″(r) J.

    Examples
    --------
    >>> import torch, bilevel
    >>> layer = bilevel.least_squares(lambda x, a: (x**2 - a, x - 1.0), hessian=bilevel.GaussNewtonHessian())
    >>> a = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    >>> layer(torch.tensor(1.0, dtype=torch.float64), a).backward()
    >>> round(a.grad.item(), 3)  # the full Hessian gives another number
    0.323
    """


HessianChoice = FullHessian | GaussNewtonHessian


class LeastSquaresOptions(SolverOptions, total=False):
    """Options of ``least_squares``."""

    solver: InnerSolverLike | None
    loss: Loss | None
    hessian: HessianChoice | None
    lower: Any
    upper: Any
    differentiation: Differentiation | None


@overload
def least_squares(residual: None = None, **options: Unpack[LeastSquaresOptions]) -> Decorator: ...
@overload
def least_squares(residual: Callable[..., Any], **options: Unpack[LeastSquaresOptions]) -> Layer: ...
@explain_misuse
def least_squares(
    residual: Callable[..., Any] | None = None,
    *,
    solver: InnerSolverLike | None = None,
    loss: Loss | None = None,
    hessian: HessianChoice | None = None,
    lower: Any = None,
    upper: Any = None,
    linear_solver: LinearSolverLike | None = None,
    tolerance: Tolerance | None = None,
    on_failure: OnFailure = "raise",
    differentiation: Differentiation | None = None,
) -> Layer | Decorator:
    """Turn residuals into the layer x*(θ) = argmin_x ½‖r(x, θ)‖², with dx*/dθ = −H⁻¹ ∂_θ(Jᵀr) and H = JᵀJ + Σ r_i ∇²r_i.

    Parameters
    ----------
    residual
        r: a function of ``(x, *args, **kwargs)`` that returns a tensor of any shape, or a pytree of tensors. Their squares
        are summed. None: return a decorator.
    solver
        An inner solver, or a function ``(residual, init, *args, **kwargs)`` -> x. None:
        :class:`bilevel.LevenbergMarquardt`; if it fails, Newton's method on ½‖r‖², then L-BFGS.
    loss
        A robust loss c of each residual, such as ``bilevel.robust.Huber(1.0)``: Σ c(r_i) replaces ½‖r‖². A function of
        ``(*args, **kwargs)`` may return one, so that its scale is differentiated.
    hessian
        The matrix of the derivatives: :class:`bilevel.FullHessian` by default. :class:`bilevel.GaussNewtonHessian` gives a
        biased derivative.
    lower, upper
        Bounds on x, as in :func:`bilevel.argmin`, whose solvers and layer are then used.
    linear_solver, tolerance, on_failure
        See :func:`bilevel.argmin`.
    differentiation
        See :func:`bilevel.argmin`. Steps that are differentiated are Newton's, with the full Hessian, or those of
        ``solver=bilevel.GradientDescent(...)``.

    Returns
    -------
    Layer
        A function of ``(init, *args, **kwargs)``. Where H is singular at the solution, one whose part in the null space is that of ``init`` is
        returned: of minimum norm for a linear residual and ``init`` zero. Its derivative is reported as ``Status.MINIMUM_NORM``.

    Raises
    ------
    ArgumentError
        If a setting cannot be used.

    References
    ----------
    Nocedal & Wright, "Numerical Optimization", 2006, chapter 10; for the derivative :func:`bilevel.argmin`.

    Examples
    --------
    >>> import torch, bilevel
    >>> @bilevel.least_squares
    ... def decay(p, t, y):
    ...     return p[0] * torch.exp(-p[1] * t) - y
    >>> t = torch.linspace(0, 3, 7, dtype=torch.float64)
    >>> y = (2 * torch.exp(-0.8 * t)).requires_grad_()
    >>> p = decay(torch.ones(2, dtype=torch.float64), t, y)
    >>> p.detach()
    tensor([2.0000, 0.8000], dtype=torch.float64)
    >>> p[1].backward()
    >>> y.grad[:3]  # what each measurement does to the rate
    tensor([ 0.3361, -0.0599, -0.2313], dtype=torch.float64)
    """
    if lower is not None or upper is not None:
        _check(loss, hessian, tolerance)
        bounded = functools.partial(
            _bounded, loss=loss, hessian=hessian, solver=solver, lower=lower, upper=upper, linear_solver=linear_solver,
            tolerance=tolerance, on_failure=on_failure, differentiation=differentiation,
        )  # fmt: skip
        return bounded if residual is None else bounded(residual)
    make = functools.partial(
        LeastSquaresLayer, solver=solver, loss=loss, hessian=hessian, linear_solver=linear_solver, tolerance=tolerance, on_failure=on_failure,
        differentiation=differentiation,
    )  # fmt: skip
    return make if residual is None else make(residual)


_NOT_UNIQUE = (
    Status.SINGULAR.meaning,
    "the solution is not unique, and its derivative depends on a free direction: for a residual A x - b call "
    "bilevel.linear_solve(lambda x, A: A @ x, unknown=init)(b, A), whose solution of minimum norm has its whole derivative; else pin one "
    "unknown, append 1e-3 * (x - x0) with a fixed x0 to the residual, or make the loss invariant along that direction",
)


class LeastSquaresLayer(Layer):
    """A differentiable least-squares solve: a function of ``(init, *args, **kwargs)``. Made by :func:`least_squares`.

    Attributes
    ----------
    loss, hessian
        See :func:`least_squares`.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        solver: InnerSolverLike | None,
        loss: Loss | None,
        hessian: HessianChoice | None,
        linear_solver: LinearSolverLike | None,
        tolerance: Tolerance | None,
        on_failure: OnFailure,
        differentiation: Differentiation | None = None,
    ) -> None:
        _check(loss, hessian, tolerance)
        self.loss = loss
        self.hessian = FullHessian() if hessian is None else hessian
        kind = GaussNewtonSystem if isinstance(hessian, GaussNewtonHessian) else LeastSquaresSystem
        super().__init__(
            kind,
            function,
            solver=solver,
            linear_solver=linear_solver,
            tolerance=tolerance,
            on_failure=on_failure,
            differentiation=differentiation,
        )
        self.backward_messages = {Status.SINGULAR: _NOT_UNIQUE}
        if not _is_fixed(loss):
            # Whoever decides whether evaluations may be replayed has to see the loss as well.
            self.written = lambda: _both(function, loss)

    def _by_steps(
        self, way: BySteps, call: SolveCall, system: System, flat: torch.Tensor, tensors: list[torch.Tensor]
    ) -> torch.Tensor:
        if isinstance(system, GaussNewtonSystem):
            raise ArgumentError(
                f"{self.where}: expected hessian=bilevel.FullHessian() with differentiation={way}, as the Gauss-Newton matrix belongs to the "
                "implicit derivative, got GaussNewtonHessian(); leave hessian or differentiation out"
            )
        return super()._by_steps(way, call, system, flat, tensors)

    def objective(self, x: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return ½‖r(x, θ)‖² (), or Σ c(r_i) with a robust loss: what the layer minimises."""
        return _objective(self.function, self.loss, x, args, kwargs)

    def _system(
        self, raveler: Raveler, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[System, list[torch.Tensor]]:
        system, tensors = super()._system(raveler, args, kwargs)
        assert isinstance(system, LeastSquaresSystem)
        return replace(system, loss=self.loss), tensors

    def _call(self, settings: SolveSettings, system: System, watched: bool) -> SolveCall:
        call = super()._call(settings, system, watched)
        if not isinstance(system, GaussNewtonSystem):
            return call
        return _GaussNewtonCall(settings, self.inspector, call.written, system.where, watched, call.dtype)


class _GaussNewtonCall(SolveCall):
    """A call that solves with the Hessian and differentiates with the Gauss–Newton matrix."""

    def solve(self, problem: Problem, init: torch.Tensor) -> torch.Tensor:
        assert isinstance(problem.system, GaussNewtonSystem)
        # What the solve leaves behind is of the other matrix.
        x = super().solve(replace(problem, system=problem.system.full(), linearization_slot=None), init)
        self.factor = None
        return x


def check_hessian(where: str, hessian: Any) -> None:
    """Raise :class:`ArgumentError` unless ``hessian`` is a choice of the matrix, or None."""
    if hessian is not None and not isinstance(hessian, (FullHessian, GaussNewtonHessian)):
        raise ArgumentError(
            f"{where}: expected hessian to be bilevel.FullHessian() or bilevel.GaussNewtonHessian(), got {hessian!r}; pass one of them"
        )


def _check(loss: Any, hessian: Any, tolerance: Tolerance | None) -> None:
    if tolerance is not None and getattr(tolerance, "has_goal", False):
        raise ArgumentError(
            f"least_squares: expected Tolerance(delta=..., delta_prime=...), got {tolerance!r}; a layer has no outer loss: write a "
            "bilevel.BilevelProblem"
        )
    if loss is not None and (isinstance(loss, type) or not (isinstance(loss, RobustLoss) or callable(loss))):
        raise ArgumentError(
            f"least_squares: expected loss to be a bilevel.robust.RobustLoss or a function of the arguments, got {loss!r}; for example "
            "bilevel.robust.Huber(1.0)"
        )
    check_hessian("least_squares", hessian)


def _is_fixed(loss: Loss | None) -> bool:
    """Return whether nothing that ``loss`` computes can change between calls."""
    if isinstance(loss, Huber):
        return not isinstance(loss.delta, torch.Tensor)
    return loss is None or (isinstance(loss, (Cauchy, SoftL1)) and not isinstance(loss.scale, torch.Tensor))


def _both(function: Callable[..., Any], loss: Any) -> Callable[..., Any]:
    def both() -> tuple[Any, Any]:
        return function, loss

    return both


def _objective(
    residual: Callable[..., Any], loss: Loss | None, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.Tensor:
    residuals = residual_vector(residual(x, *args, **kwargs), "least_squares")
    chosen = loss if loss is None or isinstance(loss, RobustLoss) else loss(*args, **kwargs)
    return 0.5 * (residuals * residuals).sum() if chosen is None else chosen.cost(residuals).sum()


def _bounded(
    residual: Callable[..., Any], *, loss: Loss | None, hessian: HessianChoice | None, **settings: Any
) -> Layer:
    """Return the layer of a least-squares problem with bounds: that of the objective, whose residuals its solvers do not know."""
    if isinstance(hessian, GaussNewtonHessian):
        raise ArgumentError(
            "least_squares: expected FullHessian() with bounds, got GaussNewtonHessian(); leave hessian out"
        )
    if isinstance(settings["solver"], (LevenbergMarquardt, GaussNewton)):
        raise ArgumentError(
            f"least_squares: expected a solver that knows bounds, got {settings['solver']!r}; leave solver out, or pass "
            "bilevel.ProjectedNewton()"
        )

    @functools.wraps(residual)
    def objective(x: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return _objective(residual, loss, x, args, kwargs)

    layer = argmin(objective, **settings)
    layer.where = f"`least_squares` layer `{getattr(residual, '__name__', type(residual).__name__)}`"
    return layer
