"""Further solves of a linear system: a minimum-norm solution of a singular one, or a smaller residual for an error bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

from bilevel.linear._null_space import find_null_space, without_null_part
from bilevel.linear._solution import LinearSolution
from bilevel.operators import LinearOperator
from bilevel.reports import Status

__all__ = ["exceeds", "minimum_norm", "solve_again", "solve_closer"]

Solve: TypeAlias = Callable[[LinearOperator, torch.Tensor, torch.Tensor], LinearSolution]
"""(operator, rhs, threshold) ↦ the result of a linear solver."""

_LEAST_EXAMINATION = 50


def minimum_norm(
    operator: LinearOperator,
    rhs: torch.Tensor,
    threshold: torch.Tensor,
    solution: LinearSolution,
    residual: torch.Tensor,
    status: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return x, its residual and its status, with minimum-norm solutions for converged problems whose matrices are found to be singular."""
    x, converged = solution.x, status == Status.CONVERGED
    if not bool(converged.any()) or not operator.size:
        return x, residual, status
    taken = int(solution.iterations.amax()) or operator.size  # unknown for a user's function
    most = 2 * taken + _LEAST_EXAMINATION
    free = converged & find_null_space(operator, most).singular.repeat(operator.repeats)
    if not bool(free.any()):
        return x, residual, status
    moved, changed = without_null_part(operator, x, free, most)
    status = torch.where(free, int(Status.MINIMUM_NORM), status)
    if not bool(changed.any()):
        return x, residual, status
    left = rhs - operator.matvec(moved)
    norm, before = left.norm(dim=-1), residual.norm(dim=-1)
    # An unfinished projection is used only if it solves the system to the tolerance.
    good = changed & (norm <= torch.maximum(threshold, 2 * before))
    status = torch.where(changed & ~good, int(Status.STAGNATED), status)
    good = good.unsqueeze(-1)
    return torch.where(good, moved, x), torch.where(good, left, residual), status


def solve_again(
    solve: Solve,
    operator: LinearOperator,
    rhs: torch.Tensor,
    threshold: torch.Tensor,
    these: torch.Tensor,
    found: LinearSolution,
) -> LinearSolution:
    """Solve ``these`` singular systems (batch,) again to a looser threshold: with the old one, the iterate has moved far along null vectors."""
    again = solve(operator, torch.where(these.unsqueeze(-1), rhs, 0.0), threshold)
    status = torch.where(again.status == Status.CONVERGED, int(Status.MINIMUM_NORM), again.status)
    return LinearSolution(
        torch.where(these.unsqueeze(-1), again.x, found.x),
        found.iterations + torch.where(these, again.iterations, 0),
        torch.where(these, status, found.status),
    )


def exceeds(bound: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    """Return where ``bound`` exceeds ``error`` by more than rounding, (batch,) bool."""
    return bound > error * (1 + 16 * torch.finfo(bound.dtype).eps)


def solve_closer(
    solve: Solve,
    operator: LinearOperator,
    rhs: torch.Tensor,
    threshold: torch.Tensor,
    rounded: torch.Tensor,
    mu: float,
    these: torch.Tensor,
    x: torch.Tensor,
    bound: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x (batch, n) and bounds (batch,) of ``these`` problems, with residuals so small that their bounds are below δ′ despite rounding."""
    stricter = threshold - 2 * rounded
    within = these & (stricter > 0)
    if not bool(within.any()):
        return x, bound
    again = solve(operator, torch.where(within.unsqueeze(-1), rhs, 0.0), stricter.clamp_min(0.0)).x
    fresh = ((rhs - operator.matvec(again)).norm(dim=-1) + rounded) / mu
    lower = within & (fresh < bound)
    return torch.where(lower.unsqueeze(-1), again, x), torch.where(lower, fresh, bound)
