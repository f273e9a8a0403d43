"""The judge of inner solvers. It measures the errors of their results, resumes them if errors are too large, and decides the status.

By default, a problem has converged when the estimated error of every unknown is at most rtol·|x| + atol, or as small as
the rounding of the residual allows. The estimate is the next Newton step J⁻¹R (:mod:`bilevel.solvers.judging.error`). It
depends neither on the initial guess nor on the units of the objective. With δ asked, the residual decides: ‖R‖ ≤ μ δ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from bilevel.equations.problem import Problem
from bilevel.reports import Basis, Status, StatusMessages
from bilevel.solvers._base import Goal, InnerSolution, InnerSolver, all_finite, is_one_of, length
from bilevel.solvers.judging.degenerate import falls_beside, slow_directions
from bilevel.solvers.judging.error import (
    ErrorEstimate,
    estimate_error,
    is_dense,
    residual_rounding,
    rounding,
)
from bilevel.solvers.judging.outcome import InnerOutcome, nothing_to_solve
from bilevel.solvers.judging.stationary import (
    MAYBE_KINKED,
    doubtful_directions,
    name_kinks,
    name_slow,
    name_stationary,
    name_still,
)
from bilevel.solvers.judging.successors import Lowest, Successor, beside
from bilevel.solvers.judging.trials import Trial, choose, merged
from bilevel.solvers.judging.weighing import blind_status, only_sizes_matter, weigh
from bilevel.tolerance import Target

__all__ = ["solve_inner"]

# The factor by which a bound may exceed δ, for the rounding of the comparison.
_BOUND_ROUNDING = 1 + 1e-5
# The largest number of times that a solver is resumed.
_MOST_ROUNDS = 12
# Two searches found the same point if their results differ by at most this share of x.
_SAME_POINT = 1e-3
# The statuses after which another solver is tried.
_WORTH_ANOTHER = (
    Status.MAX_STEPS,
    Status.STAGNATED,
    Status.DIVERGED,
    Status.NOT_FINITE,
    Status.LINE_SEARCH_FAILED,
    Status.NOT_CONVERGED,
    Status.SINGULAR,
)


def solve_inner(
    solver: InnerSolver, problem: Problem, init: torch.Tensor, target: Target, others: Sequence[Successor] = ()
) -> InnerOutcome:
    """Solve from ``init`` (batch, n) and judge the result. ``others`` take over, in turn, the problems that failed."""
    basis = Basis.RESIDUAL if target.strong_convexity is None else Basis.CERTIFIED
    if problem.size == 0 or problem.batch == 0:
        return nothing_to_solve(init, basis, solver.name)
    goal = Goal(problem, init, target)
    trial = _attempt(solver, problem, goal)
    names, steps = [solver.name], trial.iterations
    if others and not trial.settled:
        trial, names, steps = _taken_over(problem, goal, trial, names, others)
    status = trial.status
    # A NaN added to an objective does not appear in its gradient.
    value = trial.value
    if value is not None and not (math.isfinite(float(value)) if problem.is_lone else bool(all_finite(value))):
        status = torch.where(torch.isfinite(value), status, torch.full_like(status, Status.NOT_FINITE))
    bound = torch.full_like(trial.norm, float("nan"))
    words: StatusMessages = {}
    if target.strong_convexity is not None:
        trial, bound = _bounded(solver, problem, goal, trial, status)
        if target.asked and not target.rtol:
            # A δ below the rounding error cannot be promised.
            contradicted = (status == Status.CONVERGED) & (bound > target.error * _BOUND_ROUNDING)
            status = torch.where(contradicted, torch.full_like(status, Status.STAGNATED), status)
            words = _words_of_rounding(status, bound)
    return InnerOutcome(
        trial.x, status, steps, trial.norm, trial.threshold, bound, basis, trial.residual,
        trial.factor, trial.exact, ", then ".join(names), words=words,
    )  # fmt: skip


def _taken_over(
    problem: Problem, goal: Goal, trial: Trial, names: list[str], others: Sequence[Successor]
) -> tuple[Trial, list[str], torch.Tensor]:
    """Let ``others`` take over, in turn, the problems at which the solver of ``trial`` failed.

    Returns the trial, the names of the solvers that took part in it, and the steps of all (batch,).
    """
    init, tried, steps, latest = goal.init, list(names), trial.iterations, trial.x
    lowest = Lowest.of(problem, trial) if any(other.onward for other in others) else None
    for other in others:
        # Another search may avoid the saddle or kink at which this one ended. If the search began there, nothing else
        # is tried.
        left = is_one_of(trial.status, (Status.INDEFINITE, Status.KINK)) & (trial.x != init).any(dim=-1)
        worth = left | is_one_of(trial.status, _WORTH_ANOTHER)
        failed = worth & torch.isfinite(goal.scale if goal.target.relative else trial.norm)
        begun = init if other.afresh else latest
        if other.onward and lowest is not None:
            begun, failed = lowest.onward(problem, failed & (lowest.x != init).all(dim=-1))
        if not bool(failed.any()):
            break
        begun = beside(begun) if other.beside else begun
        # Solved problems do not move: their threshold is infinite.
        start = torch.where(failed.unsqueeze(-1), begun, trial.x)
        threshold = torch.where(failed, goal.threshold, torch.full_like(goal.threshold, torch.inf))
        second = _attempt(other.solver, problem, replace(goal, init=start, given=threshold, origin=init), failed)
        # A kink is a result too: it says why the search failed.
        latest, won = second.x, failed & is_one_of(second.status, (Status.CONVERGED, Status.KINK))
        # What comes to the same saddle, and does not see that it is one, has not left it.
        size = torch.maximum(trial.x.abs(), (trial.x - init).abs())
        same = ((second.x - trial.x).abs() <= _SAME_POINT * size).all(dim=-1)
        stayed = won & same & (trial.status == Status.INDEFINITE)
        if bool(stayed.any()):
            won = won & ~(stayed & ~_fell_from(problem, trial, second, init))
        tried.append(other.solver.name)
        steps = steps + torch.where(failed, second.iterations, torch.zeros_like(steps))
        lowest = None if lowest is None else lowest.updated(problem, second, failed)
        if bool(won.any()):
            trial, names = choose(won, second, trial), list(tried)
    return trial, names, steps


def _fell_from(problem: Problem, saddle: Trial, other: Trial, init: torch.Tensor) -> torch.Tensor:
    """Return where the objective is clearly lower than at the saddle, (batch,) bool: from a far start, two points look like one."""
    if saddle.value is None or other.value is None:
        return torch.zeros_like(saddle.norm, dtype=torch.bool)
    fallen = (problem.value(init) - saddle.value).clamp_min(0.0)
    return saddle.value - other.value > _SAME_POINT * fallen


def _words_of_rounding(status: torch.Tensor, bound: torch.Tensor) -> StatusMessages:
    """Return the message for a δ that was not reached. It names the largest error bound (batch,), and twice that as a δ that works."""
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
    solver: InnerSolver, problem: Problem, goal: Goal, trial: Trial, status: torch.Tensor
) -> tuple[Trial, torch.Tensor]:
    """Return the bounds (‖R‖ + rounding)/μ (batch,), and their trial. Problems are resumed if only rounding raises the bound above δ."""
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
    return choose(lower, further, trial), torch.where(lower, fresh, bound)


def _attempt(solver: InnerSolver, problem: Problem, goal: Goal, meant: torch.Tensor | None = None) -> Trial:
    """Run ``solver`` and resume it until the problems ``meant`` (batch,) have converged or make no progress."""
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
        further = solver.resumed(int(steps.max()))
        if further is None or count == _MOST_ROUNDS - 1:
            spent = further is None and solver.has_budget and not goal.target.asked
            short = torch.where(
                verdict.endless & (not solver.is_confined),
                int(Status.DIVERGED),
                int(Status.BUDGET_SPENT if spent else Status.STAGNATED),
            )
            kept = solution.status == Status.INDEFINITE
            verdict = verdict.ended(torch.where(kept, int(Status.INDEFINITE), short))
            break
        following = replace(goal, init=solution.x, given=verdict.next_threshold, origin=goal.starting_point)
        resumed = _with_residual(problem, further.solve(problem, solution.x, following))
        steps = steps + torch.where(verdict.again, resumed.iterations, torch.zeros_like(steps))
        solution = merged(verdict.again, resumed, solution)
    return replace(verdict.trial, iterations=steps)


def _with_residual(problem: Problem, solution: InnerSolution) -> InnerSolution:
    if solution.residual is not None:
        return solution
    if problem.minimizes:
        value, residual = problem.value_and_residual(solution.x)
        return replace(solution, value=value, residual=residual)
    return replace(solution, residual=problem.residual(solution.x))


def _by_residual(solver: InnerSolver, problem: Problem, solution: InnerSolution, goal: Goal) -> Trial:
    """Judge by ‖R‖ ≤ μ δ, or accept a spent budget if no accuracy is asked."""
    assert solution.residual is not None
    target, noticed, threshold = goal.target, solution.status, goal.threshold
    norm = length(solution.residual)
    status = noticed
    reached = norm <= threshold
    if not bool(((noticed == Status.CONVERGED) & reached).all()):
        # With no accuracy asked, two gradients to find the rounding error are not worth their cost.
        spent_as_meant = (noticed == Status.MAX_STEPS) & target.silent
        if not target.asked and not bool((reached | spent_as_meant).all()):
            reached = reached | (norm <= length(residual_rounding(problem, solution.x, solution.residual)))
        final = is_one_of(noticed, (Status.INDEFINITE, Status.NOT_FINITE))
        believed = (noticed == Status.CONVERGED) & ~reached
        status = torch.where(believed, torch.full_like(status, Status.STAGNATED), status)
        if not target.asked and solver.has_budget:
            status = torch.where(noticed == Status.MAX_STEPS, torch.full_like(status, Status.BUDGET_SPENT), status)
        if target.silent:
            spent = is_one_of(noticed, (Status.MAX_STEPS, Status.NOT_CONVERGED))
            status = torch.where(spent, torch.full_like(status, Status.BUDGET_SPENT), status)
        status = torch.where(reached & ~final, torch.full_like(status, Status.CONVERGED), status)
        status = torch.where(torch.isfinite(norm), status, torch.full_like(status, Status.NOT_FINITE))
    if target.asked:
        # If the last place of x is larger than δ, x cannot have the error δ, for any residual.
        largest = solution.x.abs().amax(dim=-1)
        blind = (status == Status.CONVERGED) & (torch.finfo(norm.dtype).eps * largest > target.error)
        if bool(blind.any()):
            status = torch.where(blind, blind_status(problem, solution.x, solution.residual, goal.init), status)
        if problem.minimizes:
            still = (status == Status.CONVERGED) & (solution.x == goal.init).all(dim=-1)
            status = name_kinks(problem, solution, status, still, is_one_of(status, MAYBE_KINKED))
            status = name_slow(problem, solution, status, goal.starting_point)
            if bool(still.any()) and is_dense(problem):
                status = name_still(problem, solution, status, still)
    return Trial(
        solution.x, status, solution.iterations, solution.residual, norm, threshold, solution.value, solution.factor
    )


def _at_once(
    problem: Problem, solution: InnerSolution, goal: Goal, steps: torch.Tensor
) -> tuple[Trial | None, ErrorEstimate | None]:
    """Return the result of :func:`_by_error` if all problems have clearly converged, after ``steps``, else None; and the estimates made for it.

    Most calls end here, and small problems are sensitive to every operation.
    """
    x, residual, target = solution.x, solution.residual, goal.target
    assert residual is not None
    # An unknown that did not move may be stationary only by convention.
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
    # A NaN fails this test.
    if not float(torch.sub(error.abs(), x.abs(), alpha=target.rtol).amax()) <= target.atol:
        return None, found
    if found is not None and (
        not only_sizes_matter(found, x, target) or doubtful_directions(problem, x, residual, found, meant)
    ):
        return None, found
    factor, exact = (solution.factor, False) if found is None or found.factor is None else (found.factor, True)
    threshold = torch.maximum(goal.threshold, norm)
    return Trial(
        x, solution.status, steps, residual, norm, threshold, solution.value, factor, exact, settled=True
    ), found


@dataclass(frozen=True, eq=False)
class _Verdict:
    """A judged trial, the problems to resume (batch,), the residual norms that they have to reach, and which searches may be endless."""

    trial: Trial
    again: torch.Tensor
    next_threshold: torch.Tensor
    endless: torch.Tensor

    def ended(self, status: torch.Tensor) -> _Verdict:
        """Return the verdict with ``status`` (batch,) for the problems that should be resumed and cannot be."""
        return replace(self, trial=replace(self.trial, status=torch.where(self.again, status, self.trial.status)))


def _by_error(
    solver: InnerSolver,
    problem: Problem,
    solution: InnerSolution,
    goal: Goal,
    meant: torch.Tensor,
    found: ErrorEstimate | None = None,
) -> _Verdict:
    """Judge by the error of each unknown. ``found``: the estimates of the whole batch, if they are known."""
    assert solution.residual is not None
    x, residual, noticed, target = solution.x, solution.residual, solution.status, goal.target
    norm, threshold = length(residual), goal.threshold
    finite = torch.isfinite(norm)
    spent = (noticed == Status.MAX_STEPS) & (norm > threshold) & (solver.has_budget and not target.asked)
    open_ = meant & finite & ~spent & (noticed != Status.NOT_FINITE)
    saddle = open_ & (noticed == Status.INDEFINITE)
    allowed = target.rtol * x.abs() + target.atol  # (batch, n)
    error, factor, exact = solution.error, solution.factor, False
    status = torch.where(finite, noticed, torch.full_like(noticed, Status.NOT_FINITE))
    status = torch.where(spent, torch.full_like(status, Status.BUDGET_SPENT), status)
    again = torch.zeros_like(open_)
    good = open_ & (error.abs() <= allowed).all(dim=-1) if error is not None else again  # a NaN is none
    ratio = noise = torch.zeros_like(norm)
    endless = again
    left = torch.zeros_like(x) if error is None else error.nan_to_num(0.0, 0.0, 0.0)
    doubtful: list[torch.Tensor] = []  # directions along which the point may not be a minimum
    if solution.slow is not None and error is not None and bool((good & solution.slow).any()):
        doubtful += slow_directions(x, error, good & solution.slow)
    if not bool((good | ~open_).all()):
        if found is None:
            found = estimate_error(problem, x, residual, open_ & ~good)
        judged = weigh(problem, x, residual, found, allowed, target, goal, noticed, open_ & ~good)
        if found.factor is not None:
            factor, exact = found.factor, True
        fine = good | (open_ & judged.good)
        left = torch.where((fine & ~good).unsqueeze(-1), found.error, left)
        doubtful += doubtful_directions(problem, x, residual, found, fine & ~good)
        # A saddle that is far away may be no stationary point: the first goal is that of a far start.
        believed = (noticed == Status.CONVERGED) | (saddle & judged.far_off)
        failed = torch.where(believed | (noticed == Status.MAX_STEPS) & judged.rounded, int(Status.STAGNATED), noticed)
        named = (judged.status != Status.RUNNING) & ((judged.status != Status.STAGNATED) | (noticed != Status.DIVERGED))
        failed = torch.where(named, judged.status, failed)
        status = torch.where(open_ & ~fine, failed, status)
        again = believed & open_ & ~fine & ~judged.rounded & (judged.status == Status.RUNNING)
        good, ratio, noise, endless = fine, judged.ratio, judged.noise, judged.far_off
    status = torch.where(good, torch.full_like(status, Status.CONVERGED), status)
    status = torch.where(saddle & ~again, torch.full_like(status, Status.INDEFINITE), status)
    if problem.minimizes:
        status = name_stationary(problem, solution, status, goal.starting_point, meant)
        if doubtful:
            saddle = good & falls_beside(problem, x, residual, left, goal.starting_point, doubtful)
            status = torch.where(saddle, torch.full_like(status, Status.INDEFINITE), status)
        good = good & (status == Status.CONVERGED)
    strict = torch.where(
        ratio > 0, norm / ratio, torch.zeros_like(norm)
    )  # the largest residual norm that is small enough
    asked = torch.where(good, torch.maximum(threshold, norm), torch.minimum(threshold, strict))
    asked = torch.where(open_, asked, threshold)
    # The threshold is as strict as the first one, so that the accuracy does not depend on the initial guess, and at
    # most half of the current norm. Below the rounding of the largest unknowns, only small ones are still inaccurate:
    # the threshold then asks for no more than what is missing.
    closer = torch.maximum(norm * (target.relative / target.rtol) / ratio.clamp_min(1.0), 0.25 * noise)
    closer = torch.where(norm <= noise, norm / (1.5 * ratio.clamp_min(1.0)), closer)
    closer = torch.minimum(0.5 * norm, closer)
    following = torch.where(again, closer, torch.full_like(norm, torch.inf))
    trial = Trial(x, status, solution.iterations, residual, norm, asked, solution.value, factor, exact)
    return _Verdict(trial, again, following, endless)
