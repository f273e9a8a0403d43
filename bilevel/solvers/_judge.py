"""The one judge of inner solvers: it measures the error of what they return, lets them go on where it is too large, and decides the status.

With nothing chosen, a problem has converged when the estimated error of every unknown is at most rtol·|x| + atol, or as small as the rounding
of the residual allows. The estimate is the Newton step J⁻¹R that is left (:mod:`bilevel.solvers._error`), so that neither a far start nor
the units of the objective count. With δ asked, the residual decides: ‖R‖ ≤ μ δ.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from bilevel.equations.problem import Problem
from bilevel.reports import Basis, Status, StatusMessages
from bilevel.solvers._base import Goal, InnerSolution, InnerSolver, all_finite, length
from bilevel.solvers._degenerate import falls_beside, is_slow, slow_directions
from bilevel.solvers._error import (
    ErrorEstimate,
    estimate_error,
    has_kink,
    irregular_signs,
    is_dense,
    meets_negative_curvature,
    residual_rounding,
    rounding,
)
from bilevel.tolerance import Target

__all__ = ["InnerOutcome", "Successor", "solve_inner"]

# How much a bound may exceed δ by the rounding of the comparison.
_BOUND_ROUNDING = 1 + 1e-5
# How often a solver that stopped too early is told to go on.
_MOST_ROUNDS = 12
# An x this many times the size of the start, at which the equations say nothing any more, has run away.
_FAR = 1e3
# The rounding of one residual, in which a line search that compares sums of them may end.
_SOLVER_ROUNDING = 30.0
# How large a part of x the Newton step that is left has to be for the search to be endless.
_ENDLESS = 1e-3
# How near, in parts of x, two searches end that found the same point.
_SAME_POINT = 1e-3
# What another solver is tried after.
_WORTH_ANOTHER = (
    Status.MAX_STEPS,
    Status.STAGNATED,
    Status.DIVERGED,
    Status.NOT_FINITE,
    Status.LINE_SEARCH_FAILED,
    Status.NOT_CONVERGED,
    Status.SINGULAR,
)
_MAYBE_KINKED = (Status.MAX_STEPS, Status.STAGNATED, Status.LINE_SEARCH_FAILED)


@dataclass(frozen=True)
class Successor:
    """A solver that takes over where another failed: from the start if ``afresh``, else from where the last one ended.

    ``beside`` moves that by a thousandth, out of a place where the Jacobian happens to be singular.
    """

    solver: InnerSolver
    afresh: bool
    beside: bool = False


@dataclass(frozen=True, eq=False)
class InnerOutcome:
    """A judged inner solve; every tensor per problem, and the names of the solvers that took part.

    ``factor`` holds Cholesky factors of Hessians near x, ``exact`` says that they are those at x. ``degenerate`` (batch,) bool says where the
    derivative at x does not exist or is one-sided, ``words`` what there is to say of the statuses of this solve. ``linear_solver`` is one for
    derivatives, made of what the solve has factorised.
    """

    x: torch.Tensor
    status: torch.Tensor
    iterations: torch.Tensor
    residual_norm: torch.Tensor
    threshold: torch.Tensor
    error_bound: torch.Tensor
    basis: Basis
    residual: torch.Tensor
    factor: torch.Tensor | None = None
    exact: bool = False
    solver: str = ""
    degenerate: torch.Tensor | None = None
    words: StatusMessages = field(default_factory=dict)
    linear_solver: Any = None


def solve_inner(
    solver: InnerSolver, problem: Problem, init: torch.Tensor, target: Target, others: Sequence[Successor] = ()
) -> InnerOutcome:
    """Solve from ``init`` (batch, n) and judge the answer; ``others`` take over, in turn, the problems that failed."""
    if problem.size == 0 or problem.batch == 0:
        zeros = init.new_zeros(problem.batch)
        codes = torch.zeros(problem.batch, dtype=torch.int64, device=init.device)
        return InnerOutcome(
            init, codes, codes, zeros, zeros, zeros, _basis(target), torch.zeros_like(init), solver=solver.name
        )
    goal = Goal(problem, init, target)
    trial = _attempt(solver, problem, goal)
    names, latest, steps = [solver.name], trial.x, trial.iterations
    tried, basis = list(names), _basis(target)
    for other in () if trial.settled else others:
        # Another search may not go to the saddle or kink that this one went to. One that it began at stays one.
        left = _is_one_of(trial.status, (Status.INDEFINITE, Status.KINK)) & (trial.x != init).any(dim=-1)
        failed = (left | _is_one_of(trial.status, _WORTH_ANOTHER)) & torch.isfinite(
            goal.scale if target.relative else trial.norm
        )
        if not bool(failed.any()):
            break
        # What has been solved stays where it is: no residual is too large for it.
        begun = init if other.afresh else latest
        begun = begun + 1e-3 * (1 + begun.abs()) * irregular_signs(begun) if other.beside else begun
        start = torch.where(failed.unsqueeze(-1), begun, trial.x)
        threshold = torch.where(failed, goal.threshold, torch.full_like(goal.threshold, torch.inf))
        second = _attempt(other.solver, problem, replace(goal, init=start, given=threshold, origin=init), failed)
        # A kink is an answer too: it says why the search failed.
        latest, won = second.x, failed & _is_one_of(second.status, (Status.CONVERGED, Status.KINK))
        # What comes to the same saddle, and does not see that it is one, has not left it.
        size = torch.maximum(trial.x.abs(), (trial.x - init).abs())
        same = ((second.x - trial.x).abs() <= _SAME_POINT * size).all(dim=-1)
        won = won & ~(same & (trial.status == Status.INDEFINITE))
        tried.append(other.solver.name)
        steps = steps + torch.where(failed, second.iterations, torch.zeros_like(steps))
        if bool(won.any()):
            trial, names = _choose(won, second, trial), list(tried)
    status = trial.status
    # A NaN that is added to an objective does not show in its gradient.
    value = trial.value
    if value is not None and not (math.isfinite(float(value)) if problem.is_lone else bool(all_finite(value))):
        status = torch.where(torch.isfinite(value), status, torch.full_like(status, Status.NOT_FINITE))
    bound = torch.full_like(trial.norm, float("nan"))
    words: StatusMessages = {}
    if target.strong_convexity is not None:
        trial, bound = _bounded(solver, problem, goal, trial, status)
        if target.asked and not target.rtol:
            # Below what rounding hides there is no promise of δ.
            contradicted = (status == Status.CONVERGED) & (bound > target.error * _BOUND_ROUNDING)
            status = torch.where(contradicted, torch.full_like(status, Status.STAGNATED), status)
            words = _words_of_rounding(status, bound)
    return InnerOutcome(
        trial.x, status, steps, trial.norm, trial.threshold, bound, basis, trial.residual,
        trial.factor, trial.exact, ", then ".join(names), words=words,
    )  # fmt: skip


def _words_of_rounding(status: torch.Tensor, bound: torch.Tensor) -> StatusMessages:
    """Return what to say where δ was not reached, by the largest error bound (batch,) of these problems: twice that can be had."""
    short = (status == Status.STAGNATED) & torch.isfinite(bound)
    if not bool(short.any()):
        return {}
    largest = float(bound[short].max())
    meaning = f"cannot prove the error asked for: residual and its rounding bound the error by {largest:.1e}"
    remedy = (
        f"ask for {2 * largest:.1e} (delta= of bilevel.Tolerance), use float64, rescale the problem or regularise it"
    )
    return {Status.STAGNATED: (meaning, remedy)}


def _bounded(
    solver: InnerSolver, problem: Problem, goal: Goal, trial: _Trial, status: torch.Tensor
) -> tuple[_Trial, torch.Tensor]:
    """Return the bounds (‖R‖ + rounding)/μ (batch,), and the trial that they are of: one that goes on where rounding alone lifts them above δ."""
    target = goal.target
    mu = target.strong_convexity
    assert mu is not None
    rounded = rounding(problem, trial.x, trial.residual)
    bound = (trial.norm + rounded) / mu
    stricter = goal.threshold - 2 * rounded
    short = (status == Status.CONVERGED) & (bound > target.error * _BOUND_ROUNDING) & (stricter > 0)
    if not target.asked or target.rtol or not bool(short.any()):
        return trial, bound
    begun = torch.where(short, stricter, torch.full_like(stricter, torch.inf))
    further = _attempt(solver, problem, replace(goal, init=trial.x, given=begun, origin=goal.init), short)
    fresh = (further.norm + rounding(problem, further.x, further.residual)) / mu
    lower = short & (fresh < bound)
    if not bool(lower.any()):
        return trial, bound
    return _choose(lower, further, trial), torch.where(lower, fresh, bound)


@dataclass(frozen=True, eq=False)
class _Trial:
    """What one solver made of the problems, once judged."""

    x: torch.Tensor
    status: torch.Tensor
    iterations: torch.Tensor
    residual: torch.Tensor
    norm: torch.Tensor
    threshold: torch.Tensor
    value: torch.Tensor | None
    factor: torch.Tensor | None
    exact: bool = False
    settled: bool = False  # whether all are known to have converged


def _attempt(solver: InnerSolver, problem: Problem, goal: Goal, meant: torch.Tensor | None = None) -> _Trial:
    """Run ``solver``, again and again, until the problems that are ``meant`` (batch,) have converged or it gets no further."""
    solution = _with_residual(problem, solver.solve(problem, goal.init, goal))
    if not goal.target.rtol:
        return _by_residual(solver, problem, solution, goal)
    every = meant is None
    steps = solution.iterations
    for count in range(_MOST_ROUNDS):
        known, found = _at_once(problem, solution, goal, steps) if every else (None, None)
        if known is not None:
            return known
        meant = torch.ones_like(solution.status, dtype=torch.bool) if meant is None else meant
        verdict = _by_error(solver, problem, solution, goal, meant, found)
        if not bool(verdict.again.any()):
            break
        further = _resumed(solver, int(steps.max()))
        if further is None or count == _MOST_ROUNDS - 1:
            spent = further is None and solver.has_budget and not goal.target.asked
            short = torch.where(
                verdict.endless & (not solver.is_confined),
                int(Status.DIVERGED),
                int(Status.BUDGET_SPENT if spent else Status.STAGNATED),
            )
            verdict = verdict.ended(short)
            break
        following = replace(goal, init=solution.x, given=verdict.next_threshold, origin=goal.starting_point)
        resumed = _with_residual(problem, further.solve(problem, solution.x, following))
        steps = steps + torch.where(verdict.again, resumed.iterations, torch.zeros_like(steps))
        solution = _merged(verdict.again, resumed, solution)
    return replace(verdict.trial, iterations=steps)


def _with_residual(problem: Problem, solution: InnerSolution) -> InnerSolution:
    if solution.residual is not None:
        return solution
    if problem.minimizes:
        value, residual = problem.value_and_residual(solution.x)
        return replace(solution, value=value, residual=residual)
    return replace(solution, residual=problem.residual(solution.x))


def _merged(these: torch.Tensor, new: InnerSolution, old: InnerSolution) -> InnerSolution:
    """Return ``new`` for the problems that went on, ``these`` (batch,), and the status of ``old`` for the others, which did not move."""
    error = slow = None
    if new.error is not None and old.error is not None:
        error = torch.where(these.unsqueeze(-1), new.error, old.error)
    if new.slow is not None and old.slow is not None:
        slow = torch.where(these, new.slow, old.slow)
    return replace(new, status=torch.where(these, new.status, old.status), error=error, slow=slow)


def _resumed(solver: InnerSolver, taken: int) -> InnerSolver | None:
    """Return the solver with the steps that are left of its budget, or None if there are none."""
    budget: int | None = getattr(solver, "max_steps", None)
    if budget is None:
        return solver
    if budget <= taken:
        return None
    further = copy.copy(solver)
    object.__setattr__(further, "max_steps", budget - taken)
    return further


def _by_residual(solver: InnerSolver, problem: Problem, solution: InnerSolution, goal: Goal) -> _Trial:
    """Judge by ‖R‖ ≤ μ δ, or by nothing where a budget alone was meant."""
    assert solution.residual is not None
    target, noticed, threshold = goal.target, solution.status, goal.threshold
    norm = length(solution.residual)
    status = noticed
    reached = norm <= threshold
    if not bool(((noticed == Status.CONVERGED) & reached).all()):
        # Whether a budget that alone was meant ended within rounding is not worth two gradients.
        spent_as_meant = (noticed == Status.MAX_STEPS) & target.silent
        if not target.asked and not bool((reached | spent_as_meant).all()):
            reached = reached | (norm <= length(residual_rounding(problem, solution.x, solution.residual)))
        final = _is_one_of(noticed, (Status.INDEFINITE, Status.NOT_FINITE))
        believed = (noticed == Status.CONVERGED) & ~reached
        status = torch.where(believed, torch.full_like(status, Status.STAGNATED), status)
        if not target.asked and solver.has_budget:
            status = torch.where(noticed == Status.MAX_STEPS, torch.full_like(status, Status.BUDGET_SPENT), status)
        if target.silent:
            spent = _is_one_of(noticed, (Status.MAX_STEPS, Status.NOT_CONVERGED))
            status = torch.where(spent, torch.full_like(status, Status.BUDGET_SPENT), status)
        status = torch.where(reached & ~final, torch.full_like(status, Status.CONVERGED), status)
        status = torch.where(torch.isfinite(norm), status, torch.full_like(status, Status.NOT_FINITE))
    if target.asked:
        # An x whose own last place is larger than δ cannot be known to δ, however small the residual.
        largest = solution.x.abs().amax(dim=-1)
        blind = (status == Status.CONVERGED) & (torch.finfo(norm.dtype).eps * largest > target.error)
        if bool(blind.any()):
            status = torch.where(blind, _runaway(solution.x, goal.init), status)
        if problem.minimizes:
            still = (status == Status.CONVERGED) & (solution.x == goal.init).all(dim=-1)
            status = _name_kinks(problem, solution, status, still, _is_one_of(status, _MAYBE_KINKED))
            status = _name_slow(problem, solution, status, goal.starting_point)
            if bool(still.any()) and is_dense(problem):
                status = _name_still(problem, solution, status, still)
    return _Trial(
        solution.x, status, solution.iterations, solution.residual, norm, threshold, solution.value, solution.factor
    )


def _name_slow(problem: Problem, solution: InnerSolution, status: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Return ``status`` (batch,) with INDEFINITE for those that converged slowly to a point beside which the objective falls."""
    if solution.slow is None or solution.error is None or solution.residual is None:
        return status
    slow = solution.slow & (status == Status.CONVERGED)
    if not bool(slow.any()):
        return status
    directions = slow_directions(solution.x, solution.error, slow)
    saddle = slow & falls_beside(problem, solution.x, solution.residual, directions[0], start, directions)
    return torch.where(saddle, torch.full_like(status, Status.INDEFINITE), status)


def _name_still(problem: Problem, solution: InnerSolution, status: torch.Tensor, still: torch.Tensor) -> torch.Tensor:
    """Return ``status`` (batch,) with INDEFINITE for starts, of those ``still`` there, that are stationary and no minimum."""
    assert solution.residual is not None
    x, residual = solution.x, solution.residual
    found = estimate_error(problem, x, residual, still)
    directions = [torch.where(still.unsqueeze(-1), vector, 0.0) for vector in found.null]
    saddle = still & found.indefinite
    if directions:
        saddle = saddle | (still & falls_beside(problem, x, residual, torch.zeros_like(x), x, directions))
    return torch.where(saddle, torch.full_like(status, Status.INDEFINITE), status)


def _runaway(x: torch.Tensor, init: torch.Tensor) -> torch.Tensor:
    """Return DIVERGED where x has run away from the start, else STAGNATED, as statuses (batch,)."""
    far = x.abs().amax(dim=-1) > _FAR * init.abs().amax(dim=-1).clamp_min(1.0)
    codes = torch.full(far.shape, int(Status.STAGNATED), dtype=torch.int64, device=x.device)
    return torch.where(far, torch.full_like(codes, Status.DIVERGED), codes)


def _at_once(
    problem: Problem, solution: InnerSolution, goal: Goal, steps: torch.Tensor
) -> tuple[_Trial | None, ErrorEstimate | None]:
    """Return what :func:`_by_error` would, where all have plainly converged, after ``steps``, else None; and the estimates that were made.

    This is how most calls end, and small problems feel each operation.
    """
    x, residual, target = solution.x, solution.residual, goal.target
    assert residual is not None
    # An unknown that stayed at the start may be stationary by convention only.
    if bool(solution.status.any()):  # Status.CONVERGED is 0
        return None, None
    if problem.minimizes and not bool((x != goal.starting_point).all()):
        return None, None
    norm, error, found = length(residual), solution.error, None
    if error is not None and solution.slow is not None and bool(solution.slow.any()):
        return None, None
    if error is None:
        if not bool(all_finite(norm)):
            return None, None
        meant = torch.ones_like(solution.status, dtype=torch.bool)
        found = estimate_error(problem, x, residual, meant)
        error = found.error
    # A NaN is not within.
    if not float(torch.sub(error.abs(), x.abs(), alpha=target.rtol).amax()) <= target.atol:
        return None, found
    if found is not None and (not _is_plain(found, x, target) or _doubtful(problem, x, residual, found, meant)):
        return None, found
    factor, exact = (solution.factor, False) if found is None or found.factor is None else (found.factor, True)
    threshold = torch.maximum(goal.threshold, norm)
    return _Trial(
        x, solution.status, steps, residual, norm, threshold, solution.value, factor, exact, settled=True
    ), found


def _is_plain(found: ErrorEstimate, x: torch.Tensor, target: Target) -> bool:
    """Return whether nothing but the size of the errors is left to judge: no matrix is singular, and rounding hides nothing."""
    if bool((found.singular | found.indefinite | ~found.solved).any()):
        return False
    if found.rounding is None:
        return True
    size = torch.maximum(x.abs(), found.size)
    least = target.blind_rtol * target.atol / target.rtol
    return float(torch.sub(found.rounding.abs(), size, alpha=target.blind_rtol).amax()) <= least


@dataclass(frozen=True, eq=False)
class _Verdict:
    """A judged trial, which problems are to go on (batch,), the residual norms that they are to reach, and which may be endless."""

    trial: _Trial
    again: torch.Tensor
    next_threshold: torch.Tensor
    endless: torch.Tensor

    def ended(self, status: torch.Tensor) -> _Verdict:
        """Return the verdict with ``status`` (batch,) for the problems that were to go on and cannot."""
        return replace(self, trial=replace(self.trial, status=torch.where(self.again, status, self.trial.status)))


def _by_error(
    solver: InnerSolver,
    problem: Problem,
    solution: InnerSolution,
    goal: Goal,
    meant: torch.Tensor,
    found: ErrorEstimate | None = None,
) -> _Verdict:
    """Judge by the error of each unknown; ``found`` estimates those of the whole batch."""
    assert solution.residual is not None
    x, residual, noticed, target = solution.x, solution.residual, solution.status, goal.target
    norm, threshold = length(residual), goal.threshold
    finite = torch.isfinite(norm)
    spent = (noticed == Status.MAX_STEPS) & (norm > threshold) & (solver.has_budget and not target.asked)
    open_ = meant & finite & ~spent & ~_is_one_of(noticed, (Status.INDEFINITE, Status.NOT_FINITE))
    allowed = target.rtol * x.abs() + target.atol  # (batch, n)
    error, factor, exact = solution.error, solution.factor, False
    status = torch.where(finite, noticed, torch.full_like(noticed, Status.NOT_FINITE))
    status = torch.where(spent, torch.full_like(status, Status.BUDGET_SPENT), status)
    again = torch.zeros_like(open_)
    good = open_ & (error.abs() <= allowed).all(dim=-1) if error is not None else again  # a NaN is none
    ratio = noise = torch.zeros_like(norm)
    endless = again
    left = torch.zeros_like(x) if error is None else error.nan_to_num(0.0, 0.0, 0.0)
    doubtful: list[torch.Tensor] = []  # directions along which a minimum may be none
    if solution.slow is not None and error is not None and bool((good & solution.slow).any()):
        doubtful += slow_directions(x, error, good & solution.slow)
    if not bool((good | ~open_).all()):
        if found is None:
            found = estimate_error(problem, x, residual, open_ & ~good)
        judged = _weigh(problem, x, residual, found, allowed, target, goal, noticed, open_ & ~good)
        if found.factor is not None:
            factor, exact = found.factor, True
        fine = good | (open_ & judged.good)
        left = torch.where((fine & ~good).unsqueeze(-1), found.error, left)
        doubtful += _doubtful(problem, x, residual, found, fine & ~good)
        believed = noticed == Status.CONVERGED
        failed = torch.where(believed | (noticed == Status.MAX_STEPS) & judged.rounded, int(Status.STAGNATED), noticed)
        failed = torch.where(judged.status != Status.RUNNING, judged.status, failed)
        status = torch.where(open_ & ~fine, failed, status)
        again = believed & open_ & ~fine & ~judged.rounded & (judged.status == Status.RUNNING)
        good, ratio, noise, endless = fine, judged.ratio, judged.noise, judged.far_off
    status = torch.where(good, torch.full_like(status, Status.CONVERGED), status)
    if problem.minimizes:
        status = _name_stationary(problem, solution, status, goal.starting_point, meant)
        if doubtful:
            saddle = good & falls_beside(problem, x, residual, left, goal.starting_point, doubtful)
            status = torch.where(saddle, torch.full_like(status, Status.INDEFINITE), status)
        good = good & (status == Status.CONVERGED)
    strict = torch.where(ratio > 0, norm / ratio, torch.zeros_like(norm))  # the norm of a residual that would do
    asked = torch.where(good, torch.maximum(threshold, norm), torch.minimum(threshold, strict))
    asked = torch.where(open_, asked, threshold)
    # Aim as far as the first goal does, so that the accuracy does not depend on the start; and never at less than a halving.
    # What lies below the rounding of the largest unknowns is that of small ones: there no more than what is missing is asked for.
    closer = torch.maximum(norm * (target.relative / target.rtol) / ratio.clamp_min(1.0), 0.25 * noise)
    closer = torch.where(norm <= noise, norm / (1.5 * ratio.clamp_min(1.0)), closer)
    closer = torch.minimum(0.5 * norm, closer)
    following = torch.where(again, closer, torch.full_like(norm, torch.inf))
    trial = _Trial(x, status, solution.iterations, residual, norm, asked, solution.value, factor, exact)
    return _Verdict(trial, again, following, endless)


def _doubtful(
    problem: Problem, x: torch.Tensor, residual: torch.Tensor, found: ErrorEstimate, these: torch.Tensor
) -> list[torch.Tensor]:
    """Return directions (batch, n) in which an argmin may fall, of ``these`` problems: those of a singular Hessian, and of slow convergence."""
    if not problem.minimizes or not bool(these.any()):
        return []
    rows = these.unsqueeze(-1)
    doubtful = [torch.where(rows, vector, 0.0) for vector in found.null]
    error = torch.where(rows, found.error, 0.0).nan_to_num(0.0, 0.0, 0.0)
    if bool((error != 0).any()) and bool((slow := is_slow(problem, x, residual, error)).any()):
        doubtful += slow_directions(x, error, slow)
    return doubtful


@dataclass(frozen=True, eq=False)
class _Weighed:
    """Which errors are small enough, the largest as a multiple of what is allowed, which residuals are at rounding, its norm, and what is amiss."""

    good: torch.Tensor
    ratio: torch.Tensor
    rounded: torch.Tensor
    noise: torch.Tensor
    far_off: torch.Tensor
    status: torch.Tensor


def _weigh(
    problem: Problem,
    x: torch.Tensor,
    residual: torch.Tensor,
    found: ErrorEstimate,
    allowed: torch.Tensor,
    target: Target,
    goal: Goal,
    noticed: torch.Tensor,
    open_: torch.Tensor,
) -> _Weighed:
    # Where the Jacobian is not finite, there is no estimate: the residual has to do, and the derivative will say so.
    unknown = torch.isnan(found.error).any(dim=-1)
    error = torch.where((unknown & (length(residual) <= goal.threshold)).unsqueeze(-1), 0.0, found.error.abs())
    within = (error <= allowed).all(dim=-1) & (found.solved | unknown)
    ratio = torch.nan_to_num(error / allowed, nan=torch.inf).amax(dim=-1)
    # Where rounding is the limit, an unknown is measured in the units that the equations give it.
    size = torch.maximum(x.abs(), found.size) + target.atol / target.rtol
    coarse = target.coarse_rtol * size
    rounded = settled = torch.zeros_like(within)
    noise = torch.zeros_like(residual)
    if bool((open_ & ~within).any()):
        noise = residual_rounding(problem, x, residual)
        # A solver that gets no further is at its rounding, which may be more than that of one residual.
        ended = _is_one_of(noticed, (Status.STAGNATED, Status.LINE_SEARCH_FAILED)).unsqueeze(-1)
        floor = torch.where(ended, _SOLVER_ROUNDING * noise, noise)
        rounded = (residual.abs() <= floor).all(dim=-1)
        # It compares norms: of unknowns in small units it may get no further though their own rounding is not reached.
        settled = ended.squeeze(-1) & (length(residual) <= length(noise))
        settled = settled & (error <= target.coarse_rtol * x.abs() + target.atol).all(dim=-1)
        if found.rounding is None:
            # A Krylov method solves for rounding what rounding made, and a null direction makes any error of that: no more can be said.
            rounded = rounded | (length(residual) <= 0.1 * length(noise))
            settled = settled | (rounded & (_runaway(x, goal.starting_point) != Status.DIVERGED))
    good = within | settled | (rounded & (error <= coarse).all(dim=-1))
    status = torch.full(within.shape, int(Status.RUNNING), dtype=torch.int64, device=x.device)
    start = goal.starting_point
    if found.rounding is not None:
        blind = good & ~unknown & ~(found.rounding.abs() <= target.blind_rtol * size).all(dim=-1)
        status = torch.where(blind, _runaway(x, start), status)
    singular = good & found.singular
    if bool(singular.any()):
        status = torch.where(singular & _hidden(problem, x, residual, found), int(Status.DIVERGED), status)
    # The equations hold ever better, and the solution is as far away as ever: it lies at infinity.
    vanished = (norm := length(residual)) <= torch.finfo(x.dtype).eps * goal.scale
    # Of an unknown that is as near to zero as asked, the error may be larger than the unknown.
    far_off = (norm > 0) & ((error > _ENDLESS * x.abs()) & (error > allowed)).any(dim=-1) & ~good
    endless = vanished & far_off & (noticed != Status.CONVERGED)
    if bool(endless.any()):
        # Each equation by itself: the first residual of an unknown in large units may exceed all that one in small units ever has.
        first = problem.residual(start).abs().nan_to_num(posinf=torch.finfo(x.dtype).max)
        endless = endless & (residual.abs() <= torch.finfo(x.dtype).eps * first).all(dim=-1)
        status = torch.where(endless, torch.full_like(status, Status.DIVERGED), status)
    status = torch.where(found.indefinite & (good | rounded), torch.full_like(status, Status.INDEFINITE), status)
    return _Weighed(good & (status == Status.RUNNING), ratio, rounded, length(noise), far_off, status)


def _hidden(problem: Problem, x: torch.Tensor, residual: torch.Tensor, found: ErrorEstimate) -> torch.Tensor:
    """Return where a singular Jacobian only tells how far x has gone, (batch,) bool.

    Where the solution is not unique, x solves the equations without its part in the null space as well. A search that ran away, as that of
    x = x + 1/(1 + x²) does, has left equations behind that are not solved, and finds them solved from where it is on, since rounding hides them.
    """

    def solved(point: torch.Tensor) -> torch.Tensor:
        there = problem.residual(point)
        noise = residual_rounding(problem, point, there)
        size = length(there)
        return torch.isfinite(size) & (size <= 30 * length(noise) + 2 * length(residual))

    return ~solved(x - found.null_part) & solved(x + 2 * found.null_part)


def _name_stationary(
    problem: Problem, solution: InnerSolution, status: torch.Tensor, start: torch.Tensor, meant: torch.Tensor
) -> torch.Tensor:
    """Name a start that is stationary but no minimum, and a search that ended at a kink."""
    assert solution.residual is not None
    x = solution.x
    converged = meant & (status == Status.CONVERGED)
    # An unknown whose slope is exactly zero at the start stays there while the others move.
    unmoved = converged & ((x == start) & (solution.residual == 0)).any(dim=-1)
    still = unmoved | (converged & (x == start).all(dim=-1))
    if bool(still.any()) and not is_dense(problem):
        curved = still & meets_negative_curvature(problem, x, still)
        status = torch.where(curved, torch.full_like(status, Status.INDEFINITE), status)
    return _name_kinks(problem, solution, status, unmoved, meant & _is_one_of(status, _MAYBE_KINKED))


def _name_kinks(
    problem: Problem, solution: InnerSolution, status: torch.Tensor, unmoved: torch.Tensor, failed: torch.Tensor
) -> torch.Tensor:
    """Return ``status`` (batch,) with the kinks named of those with unknowns that did not move from the start, ``unmoved``, or ``failed``."""
    assert solution.residual is not None
    # By convention torch's slope at a kink is zero, as that of |x| at 0: such a zero is exact.
    doubtful = failed | unmoved
    if bool(doubtful.any()):
        kinked = doubtful & has_kink(problem, solution.x, solution.residual)
        status = torch.where(kinked, torch.full_like(status, Status.KINK), status)
    return status


def _choose(these: torch.Tensor, one: _Trial, other: _Trial) -> _Trial:
    """Return ``one`` for the problems of ``these`` (batch,) and ``other`` for the rest."""

    def mixed(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.where(these.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    value = None if one.value is None or other.value is None else mixed(one.value, other.value)
    return _Trial(
        mixed(one.x, other.x),
        mixed(one.status, other.status),
        other.iterations,
        mixed(one.residual, other.residual),
        mixed(one.norm, other.norm),
        mixed(one.threshold, other.threshold),
        value,
        one.factor if one.exact else None,
        one.exact,
    )


def _is_one_of(codes: torch.Tensor, statuses: Sequence[Status]) -> torch.Tensor:
    found = torch.zeros_like(codes, dtype=torch.bool)
    for status in statuses:
        found = found | (codes == status)
    return found


def _basis(target: Target) -> Basis:
    return Basis.RESIDUAL if target.strong_convexity is None else Basis.CERTIFIED
