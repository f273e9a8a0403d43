"""The line search of Newton's method, and a second search along the part of a direction that is not rounding."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.linalg import vector_norm

from bilevel._torch.factorisations import svdvals
from bilevel.equations.problem import Problem
from bilevel.operators import DenseOperator, LinearOperator
from bilevel.reports import Status
from bilevel.solvers._base import length, merge
from bilevel.solvers.parts.line_minimum import LinePoint, line_minimum
from bilevel.solvers.parts.newton_directions import slope_along, truncated_direction
from bilevel.solvers.parts.newton_state import Direction, NewtonState

__all__ = ["search", "search_again"]

_ARMIJO = 1e-4
_MOST_TRIALS = 40
# How often a step is shortened where the decrease that it promises is below the rounding of the objective.
_TRIALS_IN_ROUNDING = 4
# The slope of ½(‖R‖ / ‖R(x)‖)² along a part of Newton's direction that is worth a second search; along the whole it is −1.
_WORTH_TRYING = -0.1


def search(
    problem: Problem,
    operator: LinearOperator,
    state: NewtonState,
    direction: Direction,
    threshold: torch.Tensor,
    active: torch.Tensor,
) -> tuple[NewtonState, torch.Tensor | None]:
    """Try the full step, then shorter ones, until the merit has decreased enough. Each problem has its own step length.

    The merit φ is the objective, or ½(‖R‖ / ‖R(x)‖)² for equations, whose slope along Newton's direction is
    −1. If rounding hides differences of the objective, a step that shortens the gradient is accepted (similar to Hager
    & Zhang's approximate Wolfe condition). Convergence is then quadratic to the end.
    """
    norm = length(state.residual)
    eps = torch.finfo(norm.dtype).eps
    merit, slope = state.merit, direction.slope
    magnitude = torch.maximum(state.magnitude, merit.abs())
    pending, t = active, torch.ones_like(norm)
    verdict: torch.Tensor | None = None
    # With quadratic convergence this step is the last one. For a quadratic the first step is.
    last = bool(((norm**3 <= 10 * threshold * state.last_norm**2) | ~active).all())
    for trial in range(_MOST_TRIALS):
        x = torch.where(active.unsqueeze(-1), state.x + t.unsqueeze(-1) * direction.d, state.x)
        if problem.minimizes:
            found, residual = problem.value_and_residual(x, last=last and trial == 0)
            reached = vector_norm(residual, dim=-1)
            small = reached <= threshold
            if bool(small.any()):
                if bool((small & ~(found <= merit)).any()):
                    small = small & ~_overshoots(found, merit, slope, magnitude)
                if bool(small.all()):
                    break
            held = found <= merit + _ARMIJO * t * slope - 4 * eps * merit.abs()
            if not bool(held.all()):
                # Sums of many terms have rounding errors above their last place. Gradients then decide.
                level = (found - merit <= eps**0.5 * magnitude) & pending & ~held
                if bool(level.any()):
                    steady = found <= merit + 64 * eps * magnitude
                    shorter = steady & (reached < norm)
                    held = held | (level & _comes_closer(direction, residual, state, x, shorter, steady))
        else:
            residual = problem.residual(x)
            reached = length(residual)
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
        # If the predicted decrease is below rounding, few trials are made.
        if trial == _TRIALS_IN_ROUNDING and not bool((pending & ~tiny).any()):
            verdict = _verdict(operator, direction, pending, tiny)
            break
        shorter = _shorter(t, merit, found, slope)
        if not problem.minimizes:
            # If R overflows, the step was too long: return to one as long as x.
            beyond = ~torch.isfinite(reached)
            within = state.x.norm(dim=-1).clamp_min(1.0) / direction.d.norm(dim=-1)
            shorter = torch.where(beyond, torch.minimum(shorter, within), shorter)
        t = torch.where(pending, shorter, t)
    else:
        verdict = _verdict(operator, direction, pending, tiny)
    if problem.minimizes:
        point = _within(problem, state, direction, LinePoint(x, found, residual, t), active & ~pending)
        x, found, residual, t = point.x, point.value, point.residual, point.t
    else:
        found = merit
    jacobian = operator.dense() if direction.pivots is not None else None
    return NewtonState(
        x, residual, found, magnitude, norm, direction.definite, direction.factor, state.x, merit, slope, t,
        jacobian, direction.pivots,
    ), verdict  # fmt: skip


def _within(
    problem: Problem, state: NewtonState, direction: Direction, point: LinePoint, held: torch.Tensor
) -> LinePoint:
    """Return the minima along the direction, where a shortened step that was ``held`` (batch,) ends beyond one; else ``point``."""
    beyond = held & (point.t < 1) & ((point.residual * direction.d).sum(dim=-1) > 0)
    # A decrease that rounding hides says nothing of a bend.
    least = torch.finfo(point.t.dtype).eps ** 0.75 * state.merit.abs()
    bent = beyond & (-point.t * direction.slope > least)
    if not bool(bent.any()):
        return point
    return line_minimum(problem, state.x, direction.d, direction.slope, point, bent)


def search_again(
    problem: Problem,
    operator: LinearOperator,
    state: NewtonState,
    direction: Direction,
    threshold: torch.Tensor,
    active: torch.Tensor,
    found: NewtonState,
    verdict: torch.Tensor,
) -> tuple[NewtonState, torch.Tensor]:
    """Search again where Newton's direction failed, along the part of it that is not rounding.

    If some unknowns cause residuals 1/eps times as large as others, for example by exponentials far from the solution,
    rounding in the former determines the direction of the latter.
    """
    failed = active & ((verdict == Status.LINE_SEARCH_FAILED) | (verdict == Status.SINGULAR))
    if not bool(failed.any()):
        return found, verdict
    matrix, b = operator.dense()[failed], state.residual[failed]
    unit = _units(state.x[failed].abs()).unsqueeze(-2)
    scaled = matrix * unit
    finite = torch.isfinite(scaled).all(dim=-1).all(dim=-1)
    step = unit.squeeze(-2) * truncated_direction(torch.where(finite[:, None, None], scaled, 0.0), b)
    change = slope_along(step, matrix, b)
    other = ((step - direction.d[failed]).abs() > 1e-3 * step.abs()).any(dim=-1)  # false where nothing was left out
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
    second, ended = search(problem, operator, state, retried, threshold, rows)
    moved = rows if ended is None else rows & (ended == Status.RUNNING)
    verdict = torch.where(moved, torch.full_like(verdict, Status.RUNNING), verdict)
    return merge(moved, second, found), verdict


def _comes_closer(
    direction: Direction,
    residual: torch.Tensor,
    state: NewtonState,
    x: torch.Tensor,
    shorter: torch.Tensor,
    steady: torch.Tensor,
) -> torch.Tensor:
    """Return where the next Newton step is shorter than the last one, relative to each unknown, (batch,) bool.

    It has to be half as long, and the gradients have to say that the objective fell, where values are not ``steady`` to their last places.
    A norm of gradients would compare unknowns of different units. Without factors there is only that, ``shorter``. A step from where the
    Hessian is not positive definite has to end where the objective still falls along it.
    (Deuflhard, "Newton methods for nonlinear problems", 2004: the natural monotonicity test.)
    """
    if direction.factor is None:
        return shorter
    # Where the curvature is negative, gradients grow on the way down.
    still_down = steady & ~direction.definite & ((residual * direction.d).sum(dim=-1) < 0)
    left = torch.cholesky_solve(residual.unsqueeze(-1), direction.factor).squeeze(-1)
    size = torch.maximum(state.x.abs(), x.abs()) + torch.finfo(x.dtype).tiny
    ratio = (left.abs() / size).amax(dim=-1) / (direction.d.abs() / size).amax(dim=-1)
    falls = ((state.residual + residual) * (x - state.x)).sum(dim=-1) < 0  # by the trapezoidal rule
    return torch.where(direction.definite, (ratio < 0.5) & falls | steady & (ratio < 1) | shorter, shorter | still_down)


def _overshoots(found: torch.Tensor, merit: torch.Tensor, slope: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """Return where an objective has risen, and not by rounding, over a step that promised to lower it, or has left its domain.

    Sigmoids and robust losses have plateaus beyond the minimum, on which gradients vanish. Beyond the domain of a
    logarithm its gradient goes on.
    """
    least = torch.finfo(merit.dtype).eps ** 0.5 * torch.maximum(magnitude, found.abs())
    outside = ~torch.isfinite(found) & torch.isfinite(merit)
    return ((found - merit > least) & (-slope > least)) | outside


def _shorter(t: torch.Tensor, merit: torch.Tensor, found: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """Return the minimiser of the interpolating parabola, between a tenth and a half of ``t``."""
    parabola = -slope * t * t / (2 * (found - merit - slope * t))
    return torch.where(torch.isfinite(parabola), torch.clamp(parabola, min=0.1 * t, max=0.5 * t), 0.25 * t)


def _verdict(operator: LinearOperator, direction: Direction, failed: torch.Tensor, tiny: torch.Tensor) -> torch.Tensor:
    verdict = torch.full(failed.shape, int(Status.RUNNING), dtype=torch.int64, device=failed.device)
    verdict = torch.where(failed, torch.full_like(verdict, Status.LINE_SEARCH_FAILED), verdict)
    verdict = torch.where(failed & tiny, torch.full_like(verdict, Status.STAGNATED), verdict)
    if not operator.symmetric:
        none = (direction.d == 0).all(dim=-1)  # a Krylov method returns zero if the Jacobian maps the residual to zero
        verdict = torch.where(failed & none, torch.full_like(verdict, Status.SINGULAR), verdict)
    if isinstance(operator, DenseOperator) and not operator.symmetric:
        matrix = operator.dense()
        # The units must not decide whether it is singular.
        matrix = matrix / _units(matrix.abs().amax(dim=-2, keepdim=True))
        matrix = matrix / _units(matrix.abs().amax(dim=-1, keepdim=True))
        values = svdvals(matrix)
        singular = values[..., -1] <= matrix.shape[-1] * torch.finfo(matrix.dtype).eps * values[..., 0]
        verdict = torch.where(failed & singular, torch.full_like(verdict, Status.SINGULAR), verdict)
    return verdict


def _units(size: torch.Tensor) -> torch.Tensor:
    """Return ``size`` as units to divide by: one where it is zero or not finite."""
    return torch.where((size > 0) & torch.isfinite(size), size, torch.ones_like(size))
