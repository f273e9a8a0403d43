"""Stationary points that are not minima: saddles, kinks, and points near which the objective falls."""

from __future__ import annotations

import torch

from bilevel.equations.problem import Problem
from bilevel.reports import Status
from bilevel.solvers._base import InnerSolution, is_one_of
from bilevel.solvers.judging.degenerate import falls_beside, is_slow, slow_directions
from bilevel.solvers.judging.error import ErrorEstimate, estimate_error, has_kink, is_dense, meets_negative_curvature

__all__ = ["MAYBE_KINKED", "doubtful_directions", "name_kinks", "name_slow", "name_stationary", "name_still"]

MAYBE_KINKED = (Status.MAX_STEPS, Status.STAGNATED, Status.LINE_SEARCH_FAILED)


def name_slow(problem: Problem, solution: InnerSolution, status: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Return ``status`` (batch,) with INDEFINITE for problems that converged slowly to a point near which the objective falls."""
    if solution.slow is None or solution.error is None or solution.residual is None:
        return status
    slow = solution.slow & (status == Status.CONVERGED)
    if not bool(slow.any()):
        return status
    directions = slow_directions(solution.x, solution.error, slow)
    saddle = slow & falls_beside(problem, solution.x, solution.residual, directions[0], start, directions)
    return torch.where(saddle, torch.full_like(status, Status.INDEFINITE), status)


def name_still(problem: Problem, solution: InnerSolution, status: torch.Tensor, still: torch.Tensor) -> torch.Tensor:
    """Return ``status`` (batch,) with INDEFINITE for problems ``still`` at their initial guess if that is stationary but not a minimum."""
    assert solution.residual is not None
    x, residual = solution.x, solution.residual
    found = estimate_error(problem, x, residual, still)
    directions = [torch.where(still.unsqueeze(-1), vector, 0.0) for vector in found.null]
    saddle = still & found.indefinite
    if directions:
        saddle = saddle | (still & falls_beside(problem, x, residual, torch.zeros_like(x), x, directions))
    return torch.where(saddle, torch.full_like(status, Status.INDEFINITE), status)


def doubtful_directions(
    problem: Problem, x: torch.Tensor, residual: torch.Tensor, found: ErrorEstimate, these: torch.Tensor
) -> list[torch.Tensor]:
    """Return directions (batch, n) in which the objective of ``these`` problems may fall: those of a singular Hessian, and of slow convergence."""
    if not problem.minimizes or not bool(these.any()):
        return []
    rows = these.unsqueeze(-1)
    doubtful = [torch.where(rows, vector, 0.0) for vector in found.null]
    error = torch.where(rows, found.error, 0.0).nan_to_num(0.0, 0.0, 0.0)
    if bool((error != 0).any()) and bool((slow := is_slow(problem, x, residual, error)).any()):
        doubtful += slow_directions(x, error, slow)
    return doubtful


def name_stationary(
    problem: Problem, solution: InnerSolution, status: torch.Tensor, start: torch.Tensor, meant: torch.Tensor
) -> torch.Tensor:
    """Return ``status`` (batch,) with names for a stationary initial guess that is not a minimum, and for a search that ended at a kink."""
    assert solution.residual is not None
    x = solution.x
    converged = meant & (status == Status.CONVERGED)
    # An unknown whose slope is exactly zero at the initial guess stays there while the others move.
    unmoved = converged & ((x == start) & (solution.residual == 0)).any(dim=-1)
    still = unmoved | (converged & (x == start).all(dim=-1))
    if bool(still.any()) and not is_dense(problem):
        curved = still & meets_negative_curvature(problem, x, still)
        status = torch.where(curved, torch.full_like(status, Status.INDEFINITE), status)
    return name_kinks(problem, solution, status, unmoved, meant & is_one_of(status, MAYBE_KINKED))


def name_kinks(
    problem: Problem, solution: InnerSolution, status: torch.Tensor, unmoved: torch.Tensor, failed: torch.Tensor
) -> torch.Tensor:
    """Return ``status`` (batch,) with KINK for problems with a kink, among those that ``failed`` or have ``unmoved`` unknowns."""
    assert solution.residual is not None
    # By convention torch's slope at a kink is exactly zero, for example that of |x| at 0.
    doubtful = failed | unmoved
    if bool(doubtful.any()):
        kinked = doubtful & has_kink(problem, solution.x, solution.residual)
        status = torch.where(kinked, torch.full_like(status, Status.KINK), status)
    return status
