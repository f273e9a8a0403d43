"""The projection on the transport polytope by Newton's method on its dual, and how far a plan is from a degenerate one.

The projection of V is X = max(V − α 1ᵀ − 1 βᵀ, 0), with (α, β) the minimiser of ½‖X‖² + αᵀ row + βᵀ column. This function is convex. Its gradient is
piecewise linear, and its Hessian depends on the support of X alone.
"""

from __future__ import annotations

import torch

from bilevel._torch.factorisations import solve

__all__ = ["SUM_ROUNDING", "least_cycle_mean", "support_of", "system_of"]

# By how many units of rounding the sums of the marginals may differ.
SUM_ROUNDING = 1e3
_MAX_STEPS = 200
_MAX_HALVINGS = 30
_ARMIJO = 1e-4
_ROUNDING = 1e-14
_ACCEPTED = 1e-9
_MET = 1e-4


def system_of(support: torch.Tensor) -> torch.Tensor:
    """Return [[diag(S 1), S], [Sᵀ, diag(Sᵀ 1)]] (..., n + m, n + m) for S (..., n, m): the sums of S ∘ (α 1ᵀ + 1 βᵀ)."""
    top = torch.cat([torch.diag_embed(support.sum(-1)), support], -1)
    bottom = torch.cat([support.mT, torch.diag_embed(support.sum(-2))], -1)
    return torch.cat([top, bottom], -2)


def support_of(v: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the support (..., n, m) of the projection of v, as 0 and 1, and whether it was found (..., 1, 1)."""
    shape = v.shape
    matrix = v.reshape(-1, *shape[-2:]).double()
    sums, fit = _balanced(row.reshape(len(matrix), -1), column.reshape(len(matrix), -1))
    size = matrix.abs().amax((-1, -2)) + sums.abs().amax(-1)  # (K,)
    dual = _start(matrix, sums)
    value, slope, plan = _dual_value(matrix, sums, dual)
    for _ in range(_MAX_STEPS):
        norm = slope.abs().amax(-1)
        active = norm > _ROUNDING * size * shape[-1]
        if not bool(active.any()):
            break
        left = active.nonzero().squeeze(-1)
        direction = _direction((plan[left] > 0).double(), slope[left], norm[left] / size[left])
        new, moved = _searched(matrix[left], sums[left], dual[left], value[left], slope[left], direction)
        dual = dual.index_copy(0, left, new)
        value, slope, plan = _dual_value(matrix, sums, dual)
        if not bool(moved.any()):
            break
    # With entries of v far larger than the masses, a small gradient relative to v is no proof: the sums have to be met too.
    met = slope.abs().amax(-1) <= torch.minimum(_ACCEPTED * size, _MET * sums.abs().amax(-1))
    solved = fit & met
    # The entries of a row without mass go to zero only in the limit.
    mass = (sums > 0).double()
    n = shape[-2]
    support = (plan * mass[:, :n, None] * mass[:, None, n:] > 0).to(v.dtype).reshape(shape)
    return support, solved.reshape(*shape[:-2], 1, 1)


def _balanced(row: torch.Tensor, column: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the marginals (K, n + m), in double precision and with one sum, and whether their sums agreed up to rounding (K,)."""
    row_sum, column_sum = row.double().sum(-1), column.double().sum(-1)
    fit = (row_sum - column_sum).abs() <= SUM_ROUNDING * torch.finfo(row.dtype).eps * row_sum
    return torch.cat([row.double(), column.double() * (row_sum / column_sum).unsqueeze(-1)], -1), fit


def _start(matrix: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """Return the potentials of the projection on the matrices with these sums, without the sign constraint."""
    n, m = matrix.shape[-2:]
    rows = (matrix.sum(-1) - sums[:, :n]) / m
    columns = (matrix.sum(-2) - sums[:, n:]) / n
    return torch.cat([rows, columns - columns.mean(-1, keepdim=True)], -1)


def _dual_value(
    matrix: torch.Tensor, sums: torch.Tensor, dual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the dual function (K,), its gradient (K, n + m) and the plan (K, n, m)."""
    n = matrix.shape[-2]
    plan = (matrix - dual[:, :n, None] - dual[:, None, n:]).relu()
    value = 0.5 * plan.square().sum((-1, -2)) + (dual * sums).sum(-1)
    return value, sums - torch.cat([plan.sum(-1), plan.sum(-2)], -1), plan


def _direction(support: torch.Tensor, slope: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Return Newton's direction, with a multiple of the identity for the directions in which the dual is flat."""
    matrix = system_of(support)
    shift = (0.1 * shift).clamp(1e-12, 1e-2)
    unit = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return -solve(matrix + shift[:, None, None] * unit, slope.unsqueeze(-1)).squeeze(-1)


def _searched(
    matrix: torch.Tensor,
    sums: torch.Tensor,
    dual: torch.Tensor,
    value: torch.Tensor,
    slope: torch.Tensor,
    direction: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the potentials after a step that is halved until the dual function, or its gradient, decreases; and which moved."""
    promised, norm = (slope * direction).sum(-1), slope.square().sum(-1)
    length = torch.ones_like(value)
    moved = torch.zeros_like(value, dtype=torch.bool)
    best = dual
    for _ in range(_MAX_HALVINGS):
        trial = dual + length.unsqueeze(-1) * direction
        there, gradient, _ = _dual_value(matrix, sums, trial)
        # Near the solution rounding hides the decrease of the function; the gradient still shows it.
        good = (there <= value + _ARMIJO * length * promised) | (gradient.square().sum(-1) < 0.5 * norm)
        good = good & ~moved & (promised < 0)
        best = torch.where(good.unsqueeze(-1), trial, best)
        moved = moved | good
        if bool((moved | (promised >= 0)).all()):
            break
        length = torch.where(moved, length, 0.5 * length)
    return best, moved


def least_cycle_mean(costs: torch.Tensor, support: torch.Tensor) -> tuple[torch.Tensor]:
    """Return the least mean of the reduced costs around a cycle (..., 1), each arc being an entry off the support.

    A plan is optimal where potentials make all reduced costs off the support non-negative and those on the support zero. The largest value that
    all costs off the support can be made to have is this mean (Karp 1978). Entries on the support connect rows and columns at no cost.
    """
    n = costs.shape[-2]
    linked = support @ support.mT  # (..., n, n): rows that share a column
    linked = linked + torch.eye(n, dtype=costs.dtype, device=costs.device)
    for _ in range(max(n - 1, 1).bit_length()):
        linked = ((linked @ linked) > 0).to(costs.dtype)
    infinite = torch.full_like(costs, float("inf"))
    arcs = torch.where(support > 0, infinite, costs)
    # From row i by an entry (i, j) off the support to a row k that column j is connected with.
    ends = (support.mT @ linked) > 0  # (..., m, n)
    arcs = torch.where(ends.unsqueeze(-3), arcs.unsqueeze(-1), float("inf")).amin(-2)  # (..., n, n)
    arcs = torch.where((linked > 0).unsqueeze(-1), arcs.unsqueeze(-3), float("inf")).amin(-2)  # from any connected row
    walks = [torch.zeros_like(arcs[..., 0])]
    for _ in range(n):
        walks.append((walks[-1].unsqueeze(-1) + arcs).amin(-2))
    last = walks[-1]
    means = torch.stack([(last - walk) / (n - k) for k, walk in enumerate(walks[:-1])], -1)  # (..., n, n)
    means = torch.where(torch.isfinite(last).unsqueeze(-1), means, float("inf"))
    means = torch.where(means.isnan(), -float("inf"), means).amax(-1)
    return (means.amin(-1, keepdim=True),)
