"""Whether estimated errors are small enough, and whether rounding is the limit or hides that x has diverged."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel.equations.problem import Problem
from bilevel.reports import Status
from bilevel.solvers._base import Goal, is_one_of, length
from bilevel.solvers.judging.error import ErrorEstimate, irregular_signs, residual_rounding
from bilevel.tolerance import Target

__all__ = ["Weighed", "blind_status", "only_sizes_matter", "weigh"]

# x has diverged if it is this many times larger than the initial guess, and the equations no longer determine it.
_FAR = 1e3
# A line search may end at this multiple of the rounding of one residual.
_SOLVER_ROUNDING = 30.0
# A search may be endless if the next Newton step is more than this share of x.
_ENDLESS = 1e-3
# How large a part of an unknown that has run away the Newton step has to be that is left.
_GONE = 0.1


def runaway_status(x: torch.Tensor, init: torch.Tensor) -> torch.Tensor:
    """Return DIVERGED where x is far from the initial guess, else STAGNATED, as statuses (batch,)."""
    far = x.abs().amax(dim=-1) > _FAR * init.abs().amax(dim=-1).clamp_min(1.0)
    codes = torch.full(far.shape, int(Status.STAGNATED), dtype=torch.int64, device=x.device)
    return torch.where(far, torch.full_like(codes, Status.DIVERGED), codes)


def blind_status(problem: Problem, x: torch.Tensor, residual: torch.Tensor, init: torch.Tensor) -> torch.Tensor:
    """Return DIVERGED where x went from where R can be seen to where rounding hides it, as it does ever after; else as :func:`runaway_status`."""
    path = x - init
    size = length(residual)
    swallowed = ~_is_solved(problem, init + path / 4, size) & _is_solved(problem, x + 2 * path, size)
    return torch.where(swallowed, int(Status.DIVERGED), runaway_status(x, init))


def _is_solved(problem: Problem, point: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Return where R at ``point`` (batch, n) is at rounding level, or not much larger than ``allowed`` (batch,), (batch,) bool."""
    there = problem.residual(point)
    noise = residual_rounding(problem, point, there)
    if problem.is_fixed_point:  # x − T(x) is rounded as x is
        noise = torch.maximum(noise, torch.finfo(point.dtype).eps * point.abs())
    size = length(there)
    return torch.isfinite(size) & (size <= 30 * length(noise) + 2 * allowed)


def only_sizes_matter(found: ErrorEstimate, x: torch.Tensor, target: Target) -> bool:
    """Return whether only the sizes of the errors matter: no matrix is singular, and rounding hides nothing."""
    if bool((found.singular | found.indefinite | ~found.solved).any()):
        return False
    if found.rounding is None:
        return True
    size = torch.maximum(x.abs(), found.size)
    least = target.blind_rtol * target.atol / target.rtol
    return float(torch.sub(found.rounding.abs(), size, alpha=target.blind_rtol).amax()) <= least


@dataclass(frozen=True, eq=False)
class Weighed:
    """The comparison of errors with the allowed ones: which are small enough, their ratio, and what rounding and other faults explain."""

    good: torch.Tensor
    ratio: torch.Tensor
    rounded: torch.Tensor
    noise: torch.Tensor
    far_off: torch.Tensor
    status: torch.Tensor


def weigh(
    problem: Problem,
    x: torch.Tensor,
    residual: torch.Tensor,
    found: ErrorEstimate,
    allowed: torch.Tensor,
    target: Target,
    goal: Goal,
    noticed: torch.Tensor,
    open_: torch.Tensor,
) -> Weighed:
    """Compare the estimated errors with the ``allowed`` ones (batch, n), for the problems ``open_`` (batch,)."""
    # If the Jacobian is not finite, there is no estimate. The residual decides, and the derivative reports the fault.
    unknown = torch.isnan(found.error).any(dim=-1)
    error = torch.where((unknown & (length(residual) <= goal.threshold)).unsqueeze(-1), 0.0, found.error.abs())
    within = (error <= allowed).all(dim=-1) & (found.solved | unknown)
    ratio = torch.nan_to_num(error / allowed, nan=torch.inf).amax(dim=-1)
    # If rounding is the limit, an unknown is measured in the units that the equations give it.
    size = torch.maximum(x.abs(), found.size) + target.atol / target.rtol
    coarse = target.coarse_rtol * size
    rounded = settled = torch.zeros_like(within)
    noise = torch.zeros_like(residual)
    if bool((open_ & ~within).any()):
        noise = residual_rounding(problem, x, residual)
        # A solver without progress is at its rounding level, which may exceed that of one residual.
        ended = is_one_of(noticed, (Status.STAGNATED, Status.LINE_SEARCH_FAILED)).unsqueeze(-1)
        floor = torch.where(ended, _SOLVER_ROUNDING * noise, noise)
        rounded = (residual.abs() <= floor).all(dim=-1)
        # Such a solver compares norms. It may stop before unknowns in small units reach their own rounding level.
        settled = ended.squeeze(-1) & (length(residual) <= length(noise))
        settled = settled & (error <= target.coarse_rtol * x.abs() + target.atol).all(dim=-1)
        if found.rounding is None:
            # If R is rounding, so is the solution by a Krylov method, and a null direction makes its error arbitrary.
            # No more is known.
            rounded = rounded | (length(residual) <= 0.1 * length(noise))
            settled = settled | (rounded & (runaway_status(x, goal.starting_point) != Status.DIVERGED))
    good = within | settled | (rounded & (error <= coarse).all(dim=-1))
    status = torch.full(within.shape, int(Status.RUNNING), dtype=torch.int64, device=x.device)
    start = goal.starting_point
    if found.rounding is not None:
        blind = good & ~unknown & ~(found.rounding.abs() <= target.blind_rtol * size).all(dim=-1)
        if bool(blind.any()):
            status = torch.where(blind, blind_status(problem, x, residual, start), status)
    singular = good & found.singular
    if bool(singular.any()):
        status = torch.where(singular & _hidden(problem, x, residual, found, goal), int(Status.DIVERGED), status)
    # If the residual vanishes and the next step remains large, the solution is at infinity.
    vanished = (norm := length(residual)) <= torch.finfo(x.dtype).eps * goal.scale
    # If an unknown is near enough to zero, its error may be larger than the unknown.
    far_off = (norm > 0) & ((error > _ENDLESS * x.abs()) & (error > allowed)).any(dim=-1) & ~good
    endless = vanished & far_off & (noticed != Status.CONVERGED)
    if bool(endless.any()):
        # Each equation is compared with its own first residual, because units may differ.
        first = problem.residual(start).abs().nan_to_num(posinf=torch.finfo(x.dtype).max)
        endless = endless & (residual.abs() <= torch.finfo(x.dtype).eps * first).all(dim=-1)
        status = torch.where(endless, torch.full_like(status, Status.DIVERGED), status)
    # Little more than rounding is left of R, and the solution is as far away as x has come.
    gone = ((x.abs() > _FAR * start.abs().clamp_min(1.0)) & (error > _GONE * x.abs())).any(dim=-1) & ~good
    little = (norm <= torch.finfo(x.dtype).eps ** 0.75 * goal.scale) & (noticed != Status.CONVERGED)
    gone = gone & (rounded | little)
    status = torch.where(gone, torch.full_like(status, Status.DIVERGED), status)
    status = torch.where(found.indefinite & (good | rounded), torch.full_like(status, Status.INDEFINITE), status)
    return Weighed(good & (status == Status.RUNNING), ratio, rounded, length(noise), far_off, status)


def _hidden(
    problem: Problem, x: torch.Tensor, residual: torch.Tensor, found: ErrorEstimate, goal: Goal
) -> torch.Tensor:
    """Return where the Jacobian is singular only because x is far away, (batch,) bool.

    If the solution is not unique, x with another part in the null space is a solution too. If a search has diverged, as for
    x = x + 1/(1 + x²), that point is no solution, and all points beyond x seem to be, because rounding hides the residual.
    The other part is as small as the initial guess, and of norm 1 at most. It is not zero: the equations may hold there by
    symmetry, or not be defined.
    """
    ordinary = goal.starting_point.norm(dim=-1).clamp_max(1.0) / x.norm(dim=-1)
    share = torch.nan_to_num(ordinary, nan=0.0).clamp_max(1.0).unsqueeze(-1)
    near, beyond = x - found.null_part + share * found.null_part, x + 2 * found.null_part
    # Nearer to the start R has to be small by its own measure: that of x may be the rounding of a large x. What is subtracted was rounded too.
    size = length(residual)
    moved = 8 * torch.finfo(x.dtype).eps * irregular_signs(x) * found.null_part
    allowed = torch.minimum(size, goal.threshold) + length(problem.linearize(x).operator.matvec(moved))
    return ~_is_solved(problem, near, allowed) & _is_solved(problem, beyond, size)
