"""Newton's method: dense where the matrices are small, by products alone where they are large."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.linalg import vector_norm

from bilevel._torch.factorisations import eigh, eigvalsh, pinv, svdvals
from bilevel.equations.problem import Problem
from bilevel.linear._base import LinearSolverLike, as_linear_solver
from bilevel.linear.gmres import GMRES
from bilevel.operators import DenseOperator, LinearOperator
from bilevel.reports import Status
from bilevel.setting_checks import check_steps
from bilevel.solvers._base import Goal, InnerSolution, InnerSolver, iterate, merge
from bilevel.solvers._degenerate import SLOW
from bilevel.solvers._error import irregular_signs, meets_negative_curvature
from bilevel.solvers._truncated_cg import truncated_cg

__all__ = ["Newton"]

_MAX_STEPS = 250
_DENSE_NUMBERS = 2**25
_ARMIJO = 1e-4
_MOST_TRIALS = 40
# How far the objective may be off the quadratic model, and how small a step is, for the Hessian before it to hold after it.
_MODEL_ERROR, _SMALL_STEP = 0.1, 0.01
# Up to this size the Jacobians of a batch of roots are kept for a look at what is left.
_KEPT_NUMBERS = 2**20
# How much shorter a full step of Newton's makes the next one, for the Jacobian before it to hold after it.
_SHRINKS = 0.05
# How often a step is shortened where the decrease that it promises is below the rounding of the objective.
_TRIALS_IN_ROUNDING = 4
# The slope of ½(‖R‖ / ‖R(x)‖)² along a part of Newton's direction that is worth a second search; along the whole it is −1.
_WORTH_TRYING = -0.1
_LEAST_FORCING, _MOST_FORCING = 0.1, 0.5


@dataclass(frozen=True)
class Newton(InnerSolver):
    """Step along the solution of ∂R(x) d = −R(x), shortened until the objective, or ‖R‖, decreases enough.

    *Small problems* (n ≤ ``dense_limit``): the matrices of the batch are materialised and factorised
    together, by Cholesky for an argmin and LU for a root or a fixed point. A Hessian that is not positive
    definite is replaced by the one with the absolute values of its eigenvalues, which leads away from
    saddles.

    *Large problems*: an argmin is solved Hessian-free, by conjugate gradients that stop early or at negative
    curvature; a root or a fixed point by GMRES. The linear systems are solved only as accurately as the
    progress of the outer iteration deserves.

    A quadratic, or a linear system, takes one step. A stationary point whose Hessian has a negative eigenvalue beyond
    rounding is reported as ``Status.INDEFINITE``. For large problems the products that were made decide this. A flat
    valley, as of least squares with redundant variables, is a solution.

    Each step costs one gradient, and one more for each shortening. It also costs n products (small), or as many as the
    linear solver makes (large). Memory is batch · n² numbers (small) or some vectors (large), and does not depend on the
    number of steps.

    Parameters
    ----------
    max_steps
        The largest number of steps; None: 250, and spending them all is a failure. A number is a budget: spending it
        without a tolerance is a success.
    dense_limit
        The largest n for which matrices are materialised (if those of the batch also take fewer than 2²⁵
        numbers).
    linear_solver
        For the directions, in place of the choice above: an instance such as ``bilevel.CG()``, or a function
        (operator, rhs) ↦ x.
    linear_steps
        The most products for each step of a large argmin.

    Raises
    ------
    ArgumentError
        If a setting is out of its range.

    References
    ----------
    Nocedal & Wright, "Numerical Optimization", 2006, chapters 3 and 7; Martens, "Deep learning via
    Hessian-free optimization", ICML 2010; Dauphin et al., "Identifying and attacking the saddle point
    problem", NeurIPS 2014 (absolute eigenvalues); Eisenstat & Walker, "Choosing the forcing terms in an
    inexact Newton method", 1996.

    Examples
    --------
    >>> import torch, bilevel
    >>> layer = bilevel.argmin(lambda x, a: ((x - a) ** 4).sum() + (x**2).sum(), solver=Newton())
    >>> layer(torch.zeros(2, dtype=torch.float64), torch.tensor([1.0, 3.0], dtype=torch.float64))
    tensor([0.4102, 2.0000], dtype=torch.float64)
    """

    max_steps: int | None = None
    dense_limit: int = 512
    linear_solver: LinearSolverLike | None = None
    linear_steps: int = 250

    def __post_init__(self) -> None:
        check_steps("Newton", "max_steps", self.max_steps, optional=True)
        check_steps("Newton", "dense_limit", self.dense_limit, least=0)
        check_steps("Newton", "linear_steps", self.linear_steps)
        if self.linear_solver is not None:
            as_linear_solver(self.linear_solver)

    def solve(self, problem: Problem, init: torch.Tensor, goal: Goal) -> InnerSolution:
        dense = self.linear_solver is None and problem.size <= self.dense_limit
        dense = dense and problem.batch * problem.size**2 <= _DENSE_NUMBERS
        linearize = problem.linearize_dense if dense else problem.linearize
        first = linearize(init)
        goal.measure(first)
        threshold = goal.threshold
        start = _State(
            x=init,
            residual=first.residual.detach(),
            merit=torch.full_like(threshold, 0.5) if first.value is None else first.value,
            magnitude=torch.zeros_like(threshold),
            last_norm=torch.full_like(threshold, float("inf")),
            definite=torch.ones_like(threshold, dtype=torch.bool),
        )

        def step(state: _State, active: torch.Tensor) -> tuple[_State, torch.Tensor | None]:
            operator = (first if state is start else linearize(state.x)).operator
            if dense:
                direction = (_dense_descent if problem.minimizes else _dense_root)(operator, state, active)
            else:
                direction = self._inexact(problem, operator, state, threshold, active)
            found, verdict = _search(problem, operator, state, direction, threshold, active)
            if dense and verdict is not None and not problem.minimizes:
                return _again(problem, operator, state, direction, threshold, active, found, verdict)
            return found, verdict

        solution, state = iterate(start, step, goal, self.max_steps or _MAX_STEPS, descends=True)
        if not problem.minimizes:
            return replace(solution, error=_root_error_left(problem, state)) if dense else solution
        definite = dense and state.factor is not None and bool(state.definite.all())
        if definite:
            error = _error_left(state, lone=problem.is_lone)
            slow = _is_slow(state, error)
            solution = replace(solution, value=state.merit, factor=state.factor, error=error, slow=slow)
        else:
            solution = replace(solution, value=state.merit)
        # Where the last step was made with a positive definite Hessian, that is evidence enough for a
        # minimum.
        if definite and bool((solution.iterations > 0).all()):
            return solution
        doubtful = solution.status == Status.CONVERGED
        if dense:
            doubtful = doubtful & ((solution.iterations == 0) | ~state.definite)
        if not bool(doubtful.any()):
            return solution
        operator = (first if state is start else linearize(state.x)).operator
        saddle = (
            _has_negative_eigenvalue(operator, doubtful)
            if dense
            else meets_negative_curvature(problem, state.x, doubtful)
        )
        indefinite = torch.full_like(solution.status, Status.INDEFINITE)
        return replace(solution, status=torch.where(doubtful & saddle, indefinite, solution.status))

    def _inexact(
        self,
        problem: Problem,
        operator: LinearOperator,
        state: _State,
        threshold: torch.Tensor,
        active: torch.Tensor,
    ) -> _Direction:
        """Solve for the direction as accurately as Eisenstat & Walker's choice 2, (‖R_k‖ / ‖R_{k−1}‖)²."""
        norm = state.residual.norm(dim=-1)
        progress = torch.clamp((norm / state.last_norm) ** 2, max=_LEAST_FORCING)
        # No more accuracy than the goal has use for, so that the last step is not solved for nothing.
        forcing = torch.maximum(progress, torch.clamp(0.3 * threshold / norm, max=_MOST_FORCING))
        if self.linear_solver is None and problem.minimizes:
            d, definite = truncated_cg(operator, state.residual, forcing, self.linear_steps, active)
        else:
            solver = as_linear_solver(self.linear_solver or GMRES())
            usable = (active & (norm > 0)).unsqueeze(-1)
            rhs = torch.where(usable, -state.residual / norm.unsqueeze(-1), torch.zeros_like(state.residual))
            found = solver.solve(operator, rhs, forcing)
            d, definite = found.x * norm.unsqueeze(-1), found.status != Status.INDEFINITE
        if not problem.minimizes:
            return _Direction(d, -torch.ones_like(norm), definite)
        return _descending(d, state.residual, definite)


@dataclass(frozen=True, eq=False)
class _State:
    """An iterate.

    Parameters
    ----------
    x, residual
        (batch, n).
    merit
        The objective; ½ for equations, whose merit is relative to the residual before the step.
    magnitude
        The largest |merit| met, which its rounding is measured by.
    last_norm
        ‖R‖ before the last step.
    definite
        Whether the Hessian of the last step was positive definite.
    factor
        Its Cholesky factor (batch, n, n), of a small argmin; the LU factors of a small root's Jacobian.
    last_x, last_merit, slope, t
        Of the last step, of a small problem: where it began, the merit and its slope there, and how far along the direction it went.
    jacobian, pivots
        Of the last step, of a small root: the matrices, and the order of pivots of its LU factors, which ``factor`` is then.
    """

    x: torch.Tensor
    residual: torch.Tensor
    merit: torch.Tensor
    magnitude: torch.Tensor
    last_norm: torch.Tensor
    definite: torch.Tensor
    factor: torch.Tensor | None = None
    last_x: torch.Tensor | None = None
    last_merit: torch.Tensor | None = None
    slope: torch.Tensor | None = None
    t: torch.Tensor | None = None
    jacobian: torch.Tensor | None = None
    pivots: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class _Direction:
    """d (batch, n), the slope (batch,) of the merit along it, whether ∂R was definite, or regular, and its factor."""

    d: torch.Tensor
    slope: torch.Tensor
    definite: torch.Tensor
    factor: torch.Tensor | None = None
    pivots: torch.Tensor | None = None


def _descending(
    d: torch.Tensor, gradient: torch.Tensor, definite: torch.Tensor, factor: torch.Tensor | None = None
) -> _Direction:
    slope = (gradient * d).sum(dim=-1)
    down = slope < 0  # not where it is NaN
    if not bool(down.all()):
        d = torch.where(down.unsqueeze(-1), d, -gradient)
        slope = torch.where(down, slope, -(gradient * gradient).sum(dim=-1))
        definite = definite & down
    return _Direction(d, slope, definite, factor)


def _dense_descent(operator: LinearOperator, state: _State, active: torch.Tensor) -> _Direction:
    hessian, gradient = operator.dense(), state.residual
    factor, info = torch.linalg.cholesky_ex(hessian)
    d = -torch.cholesky_solve(gradient.unsqueeze(-1), factor).squeeze(-1)
    definite = info == 0
    if not bool(definite.all()) and bool((bad := active & ~definite).any()):
        size = torch.clamp(state.x[bad].norm(dim=-1), min=1.0)
        d = d.index_put((bad,), _absolute_newton(hessian[bad], gradient[bad], size))
    return _descending(d, gradient, definite, factor)


def _absolute_newton(hessian: torch.Tensor, gradient: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """Return −|H|⁻¹ g: absolute eigenvalues, taken once the variables are scaled to unit diagonal."""
    n = hessian.shape[-1]
    diagonal = hessian.diagonal(dim1=-2, dim2=-1).abs()
    eps = torch.finfo(hessian.dtype).eps
    # However small a diagonal entry is: it may be that of an unknown in large units.
    scale = torch.where(diagonal > 0, diagonal, diagonal.amax(dim=-1, keepdim=True)).sqrt()
    scale = torch.where((scale > 0) & torch.isfinite(scale), scale, torch.ones_like(scale))
    # What cannot be decomposed leaves NaN, in whose place comes the slope.
    eigenvalues, vectors = eigh(hessian / (scale.unsqueeze(-1) * scale.unsqueeze(-2)))
    sizes = eigenvalues.abs()
    floor = 1e3 * n * eps * sizes.amax(dim=-1)
    # No curvature at all, as of a linear objective: a step as long as x is.
    floor = torch.where(floor > 0, floor, gradient.norm(dim=-1) / size)
    along = torch.einsum("bji,bj->bi", vectors, gradient / scale) / torch.maximum(sizes, floor.unsqueeze(-1))
    return -torch.einsum("bij,bj->bi", vectors, along) / scale


def _dense_root(operator: LinearOperator, state: _State, active: torch.Tensor) -> _Direction:
    jacobian, residual = operator.dense(), state.residual
    lu, pivots, info = torch.linalg.lu_factor_ex(jacobian)
    d = -torch.linalg.lu_solve(lu, pivots, residual.unsqueeze(-1)).squeeze(-1)
    slope = -torch.ones_like(state.last_norm)
    bad = active & ((info != 0) | ~torch.isfinite(d).all(dim=-1))
    if bool(bad.any()):
        matrix, b = jacobian[bad], residual[bad]
        step = _truncated_direction(matrix, b)
        step = torch.where(torch.isfinite(step).all(dim=-1, keepdim=True), step, _unit_step(matrix, b, state.x[bad]))
        change = _slope_along(step, matrix, b)
        change = torch.where(torch.isfinite(change), change, -torch.ones_like(change))
        d, slope = d.index_put((bad,), step), slope.index_put((bad,), change)
    return _Direction(d, slope, ~bad, lu, pivots if lu.numel() <= _KEPT_NUMBERS else None)


def _truncated_direction(matrix: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return −J⁺b, with the pseudo-inverse that leaves out the singular values which may be rounding."""
    least = 1e3 * matrix.shape[-1] * torch.finfo(matrix.dtype).eps
    return -torch.einsum("bij,bj->bi", pinv(matrix, rtol=least), b)


def _slope_along(step: torch.Tensor, matrix: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the slope (batch,) of ½(‖R‖ / ‖b‖)² along ``step``, from R = b; NaN where the squares overflow."""
    return (b * torch.einsum("bij,bj->bi", matrix, step)).sum(dim=-1) / (b * b).sum(dim=-1)


def _unit_step(matrix: torch.Tensor, b: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return a step as long as x along Newton's direction −J⁻¹b, for J so small that the direction itself overflows; −b where there is none."""
    size = matrix.abs().amax(dim=(-2, -1), keepdim=True)
    largest = b.abs().amax(dim=-1, keepdim=True)
    step = _truncated_direction((matrix / size).nan_to_num(0.0, 0.0, 0.0), b / largest)
    step = step * (x.norm(dim=-1, keepdim=True).clamp_min(1.0) / step.norm(dim=-1, keepdim=True))
    return torch.where(torch.isfinite(step).all(dim=-1, keepdim=True), step, -b)


def _search(
    problem: Problem,
    operator: LinearOperator,
    state: _State,
    direction: _Direction,
    threshold: torch.Tensor,
    active: torch.Tensor,
) -> tuple[_State, torch.Tensor | None]:
    """Try the full step, then shorter ones, each problem by itself, until the merit has decreased enough.

    The merit φ is the objective, or ½(‖R‖ / ‖R(x)‖)² for equations, whose slope along Newton's direction is
    −1. Where the objective's differences drown in its rounding, a step that shortens the gradient is accepted
    (in the spirit of Hager & Zhang's approximate Wolfe condition), so that convergence is quadratic to the
    end.
    """
    norm = vector_norm(state.residual, dim=-1)
    eps = torch.finfo(norm.dtype).eps
    merit, slope = state.merit, direction.slope
    magnitude = torch.maximum(state.magnitude, merit.abs())
    pending, t = active, torch.ones_like(norm)
    verdict: torch.Tensor | None = None
    # What quadratic convergence promises of this step. The first may be all that a quadratic needs.
    last = bool(((norm**3 <= 10 * threshold * state.last_norm**2) | ~active).all())
    for trial in range(_MOST_TRIALS):
        x = torch.where(active.unsqueeze(-1), state.x + t.unsqueeze(-1) * direction.d, state.x)
        if problem.minimizes:
            found, residual = problem.value_and_residual(x, last=last and trial == 0)
            reached = vector_norm(residual, dim=-1)
            small = reached <= threshold
            if bool(small.any()):
                if bool((small & (found > merit)).any()):
                    small = small & ~_overshoots(found, merit, slope, magnitude)
                if bool(small.all()):
                    break
            held = found <= merit + _ARMIJO * t * slope - 4 * eps * merit.abs()
            if not bool(held.all()):
                # Sums of many terms round by more than their last place: there gradients tell what values cannot.
                level = (found - merit <= eps**0.5 * magnitude) & pending & ~held
                if bool(level.any()):
                    steady = found <= merit + 64 * eps * magnitude
                    shorter = steady & (reached < norm)
                    held = held | (level & _comes_closer(direction, residual, state, x, shorter, steady))
        else:
            residual = problem.residual(x)
            reached = vector_norm(residual, dim=-1)
            small = reached <= threshold
            found = 0.5 * (reached / norm) ** 2
            held = found <= merit + _ARMIJO * t * slope - 4 * eps * merit
        pending = pending & ~(held | small)
        if not bool(pending.any()):
            break
        if trial == 0:
            tiny = direction.d.norm(dim=-1) <= 64 * eps * state.x.norm(dim=-1)
            if problem.minimizes:
                tiny = tiny | (-slope <= 64 * eps * magnitude)
        # A decrease within rounding is not worth many trials.
        if trial == _TRIALS_IN_ROUNDING and not bool((pending & ~tiny).any()):
            verdict = _verdict(operator, direction, pending, tiny)
            break
        shorter = _shorter(t, merit, found, slope)
        if not problem.minimizes:
            # Where R overflows nothing is known but that the step was too long: come back to one as long as x is.
            beyond = ~torch.isfinite(reached)
            within = state.x.norm(dim=-1).clamp_min(1.0) / direction.d.norm(dim=-1)
            shorter = torch.where(beyond, torch.minimum(shorter, within), shorter)
        t = torch.where(pending, shorter, t)
    else:
        verdict = _verdict(operator, direction, pending, tiny)
    if not problem.minimizes:
        found = merit
    jacobian = operator.dense() if direction.pivots is not None else None
    return _State(
        x, residual, found, magnitude, norm, direction.definite, direction.factor, state.x, merit, slope, t,
        jacobian, direction.pivots,
    ), verdict  # fmt: skip


def _again(
    problem: Problem,
    operator: LinearOperator,
    state: _State,
    direction: _Direction,
    threshold: torch.Tensor,
    active: torch.Tensor,
    found: _State,
    verdict: torch.Tensor,
) -> tuple[_State, torch.Tensor]:
    """Search anew where Newton's direction led nowhere, along the part of it that rounding leaves.

    Where some unknowns make residuals 1/eps times as large as others do, as exponentials far from the solution, rounding of the first is the
    direction of the others.
    """
    failed = active & ((verdict == Status.LINE_SEARCH_FAILED) | (verdict == Status.SINGULAR))
    if not bool(failed.any()):
        return found, verdict
    matrix, b = operator.dense()[failed], state.residual[failed]
    unit = _units(state.x[failed].abs()).unsqueeze(-2)
    scaled = matrix * unit
    finite = torch.isfinite(scaled).all(dim=-1).all(dim=-1)
    step = unit.squeeze(-2) * _truncated_direction(torch.where(finite[:, None, None], scaled, 0.0), b)
    change = _slope_along(step, matrix, b)
    other = ((step - direction.d[failed]).abs() > 1e-3 * step.abs()).any(dim=-1)  # not where nothing was left out
    usable = torch.isfinite(step).all(dim=-1) & (change < _WORTH_TRYING) & other
    rows = failed.index_put((failed,), usable)
    if not bool(rows.any()):
        return found, verdict
    retried = replace(
        direction,
        d=direction.d.index_put((rows,), step[usable]),
        slope=direction.slope.index_put((rows,), change[usable]),
        definite=direction.definite & ~rows,
    )
    second, ended = _search(problem, operator, state, retried, threshold, rows)
    moved = rows if ended is None else rows & (ended == Status.RUNNING)
    verdict = torch.where(moved, torch.full_like(verdict, Status.RUNNING), verdict)
    return merge(moved, second, found), verdict


def _error_left(state: _State, *, lone: bool) -> torch.Tensor:
    """Return H⁻¹ R (batch, n) by the factors of the last step's Hessian: NaN where these may say nothing of x."""
    assert state.factor is not None
    # With the rows of the factor scaled to unit length, its least pivot bounds how near to singular the matrix is.
    pivots = (state.factor.diagonal(dim1=-2, dim2=-1) / vector_norm(state.factor, dim=-1)).amin(dim=-1)
    least = 1e3 * torch.finfo(pivots.dtype).eps * state.x.shape[-1]
    error = torch.cholesky_solve(state.residual.unsqueeze(-1), state.factor).squeeze(-1)
    modelled = _modelled(state, lone=lone)
    if lone and float(pivots) ** 2 > least and bool(modelled):
        return error
    known = modelled & state.definite & (pivots**2 > least)
    return torch.where(known.unsqueeze(-1), error, torch.full_like(error, torch.nan))


def _root_error_left(problem: Problem, state: _State) -> torch.Tensor | None:
    """Return J⁻¹ R (batch, n) by the last step's factors, or None where these may say nothing of x for some problem.

    Newton's steps d shrink quadratically where the Jacobian hardly changes: J⁻¹ R after a full step is ½ J⁻¹J′[d, d], so that J⁻¹ changed by about
    2 |J⁻¹R| / |d| (the simplified Newton correction of Deuflhard, "Newton methods for nonlinear problems", 2004). What rounding of x
    makes of R must not matter either; x − T(x) is rounded as x is, however small J.
    """
    if state.factor is None or state.pivots is None or state.jacobian is None or state.last_x is None:
        return None
    eps, x = torch.finfo(state.x.dtype).eps, state.x
    noise = eps * (state.jacobian.abs() @ x.abs().unsqueeze(-1))
    if problem.is_fixed_point:
        noise = noise + eps * x.abs().unsqueeze(-1)
    right = torch.cat([state.residual.unsqueeze(-1), irregular_signs(x).unsqueeze(-1) * noise], dim=-1)
    error, rounding = torch.linalg.lu_solve(state.factor, state.pivots, right).unbind(dim=-1)
    size = x.abs()
    known = (error.abs() <= _SHRINKS * (x - state.last_x).abs() + 4 * eps * size) & (rounding.abs() <= eps**0.5 * size)
    return error if bool(known.all() & state.definite.all()) else None


def _modelled(state: _State, *, lone: bool) -> torch.Tensor | bool:
    """Return where the last step shows that the Hessian before it holds after it, (batch,) bool or a bool.

    The objective fell as t gᵀd + ½ t² dᵀHd says, with dᵀHd = −gᵀd, or the step was small.
    """
    last, slope, t = state.last_merit, state.slope, state.t
    assert state.last_x is not None and last is not None and slope is not None and t is not None
    numbers: list[Any] = [state.merit, last, slope, t, state.magnitude]
    if lone:
        numbers = [float(number) for number in numbers]
    kept = _fell_as_promised(torch.finfo(t.dtype).eps, *numbers)
    if kept is True or (kept is not False and bool(kept.all())):
        return kept
    return kept | ((state.x - state.last_x).abs() <= _SMALL_STEP * state.x.abs()).all(dim=-1)


def _fell_as_promised(eps: float, found: Any, last: Any, slope: Any, t: Any, magnitude: Any) -> Any:
    """Return whether the objective fell from ``last`` to ``found`` as the model says, of numbers or of tensors (batch,)."""
    promised = slope * (t - 0.5 * t * t)
    size, noise = abs(promised), 1e3 * eps
    seen = (size > noise * magnitude) & (size > noise * abs(found))
    return seen & (abs(found - last - promised) <= _MODEL_ERROR * size)


def _is_slow(state: _State, error: torch.Tensor) -> torch.Tensor:
    """Return where the step that is left is no small part of the last one, and no rounding, (batch,) bool."""
    assert state.last_x is not None
    left = vector_norm(error, dim=-1)
    more = left > 8 * torch.finfo(left.dtype).eps * vector_norm(state.x, dim=-1)
    return more & (left > SLOW * vector_norm(state.x - state.last_x, dim=-1)) if bool(more.any()) else more


def _comes_closer(
    direction: _Direction,
    residual: torch.Tensor,
    state: _State,
    x: torch.Tensor,
    shorter: torch.Tensor,
    steady: torch.Tensor,
) -> torch.Tensor:
    """Return where the Newton step that is left is shorter than the one before, relative to each unknown, (batch,) bool.

    It has to be half as long, and the gradients have to say that the objective fell, where values are not ``steady`` to their last places.
    A norm of gradients would compare unknowns of different units. Without factors there is only that, ``shorter``.
    (Deuflhard, "Newton methods for nonlinear problems", 2004: the natural monotonicity test.)
    """
    if direction.factor is None:
        return shorter
    left = torch.cholesky_solve(residual.unsqueeze(-1), direction.factor).squeeze(-1)
    size = torch.maximum(state.x.abs(), x.abs()) + torch.finfo(x.dtype).tiny
    ratio = (left.abs() / size).amax(dim=-1) / (direction.d.abs() / size).amax(dim=-1)
    falls = ((state.residual + residual) * (x - state.x)).sum(dim=-1) < 0  # by the trapezoidal rule
    return torch.where(direction.definite, (ratio < 0.5) & falls | steady & (ratio < 1) | shorter, shorter)


def _overshoots(found: torch.Tensor, merit: torch.Tensor, slope: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """Return where an objective has risen, and not by rounding, over a step that promised to lower it: no NaN has.

    Beyond the minimum lie plateaus, of sigmoids and robust losses, on which every gradient vanishes.
    """
    least = torch.finfo(merit.dtype).eps ** 0.5 * torch.maximum(magnitude, found.abs())
    return (found - merit > least) & (-slope > least)


def _shorter(t: torch.Tensor, merit: torch.Tensor, found: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """Return the minimiser of the parabola through what is known, between a tenth and a half of ``t``."""
    parabola = -slope * t * t / (2 * (found - merit - slope * t))
    return torch.where(torch.isfinite(parabola), torch.clamp(parabola, min=0.1 * t, max=0.5 * t), 0.25 * t)


def _verdict(operator: LinearOperator, direction: _Direction, failed: torch.Tensor, tiny: torch.Tensor) -> torch.Tensor:
    verdict = torch.full(failed.shape, int(Status.RUNNING), dtype=torch.int64, device=failed.device)
    verdict = torch.where(failed, torch.full_like(verdict, Status.LINE_SEARCH_FAILED), verdict)
    verdict = torch.where(failed & tiny, torch.full_like(verdict, Status.STAGNATED), verdict)
    if not operator.symmetric:
        none = (direction.d == 0).all(dim=-1)  # of a Krylov method, that the Jacobian makes nothing of the residual
        verdict = torch.where(failed & none, torch.full_like(verdict, Status.SINGULAR), verdict)
    if isinstance(operator, DenseOperator) and not operator.symmetric:
        matrix = operator.dense()
        # Whether it is singular does not depend on the units.
        matrix = matrix / _units(matrix.abs().amax(dim=-2, keepdim=True))
        matrix = matrix / _units(matrix.abs().amax(dim=-1, keepdim=True))
        values = svdvals(matrix)
        singular = values[..., -1] <= matrix.shape[-1] * torch.finfo(matrix.dtype).eps * values[..., 0]
        verdict = torch.where(failed & singular, torch.full_like(verdict, Status.SINGULAR), verdict)
    return verdict


def _units(size: torch.Tensor) -> torch.Tensor:
    """Return ``size`` as units to divide by: one where it is zero or not finite."""
    return torch.where((size > 0) & torch.isfinite(size), size, torch.ones_like(size))


def _has_negative_eigenvalue(operator: LinearOperator, doubtful: torch.Tensor) -> torch.Tensor:
    hessian = operator.dense()
    negative: torch.Tensor = torch.linalg.cholesky_ex(hessian)[1] != 0
    rows = negative & doubtful
    if bool(rows.any()):
        eigenvalues = eigvalsh(hessian[rows])
        rounding = 100 * hessian.shape[-1] * torch.finfo(hessian.dtype).eps * eigenvalues.abs().amax(dim=-1)
        negative = negative.index_put((rows,), eigenvalues[..., 0] < -rounding)
    return negative
