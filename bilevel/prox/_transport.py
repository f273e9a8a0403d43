"""The projection on the transport polytope by Newton's method on its dual, and how far a plan is from a degenerate one.

The projection of V is X = max(V − α 1ᵀ − 1 βᵀ, 0), with (α, β) the minimiser of ½‖X‖² + αᵀ row + βᵀ column. This function is convex. Its gradient is
piecewise linear, and its Hessian depends on the support of X alone.
"""

from __future__ import annotations

import math

import torch

from bilevel._torch.factorisations import solve

__all__ = ["SUM_ROUNDING", "least_cycle_mean", "support_of", "system_of"]

# By how many units of rounding the sums of the marginals may differ.
SUM_ROUNDING = 1e3
_MAX_STEPS = 200
_ROUNDING = 1e-14
_ROUGH = 1e-3
# What is added to the diagonal of a Hessian of whole numbers.
_SHIFT = 1e-8
_ACCEPTED = 1e-9
# How much larger a matrix is made at once, and how often.
_GROWTH = 10.0
_MOST_STAGES = 20


def system_of(support: torch.Tensor) -> torch.Tensor:
    """Return [[diag(S 1), S], [Sᵀ, diag(Sᵀ 1)]] (..., n + m, n + m) for S (..., n, m): the sums of S ∘ (α 1ᵀ + 1 βᵀ)."""
    top = torch.cat([torch.diag_embed(support.sum(-1)), support], -1)
    bottom = torch.cat([support.mT, torch.diag_embed(support.sum(-2))], -1)
    return torch.cat([top, bottom], -2)


def support_of(v: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the support (..., n, m) of the projection of v, as 0 and 1, v less its potentials, and whether they were found (..., 1, 1)."""
    shape = v.shape
    matrix = v.reshape(-1, *shape[-2:]).double()
    sums, fit = _balanced(row.reshape(len(matrix), -1), column.reshape(len(matrix), -1))
    matrix = matrix - _spread(_start(matrix, sums), shape[-2])
    largest = sums.abs().amax(-1)  # (K,)
    ratio = (matrix.abs().amax((-1, -2)) / largest).clamp(1.0, _GROWTH**_MOST_STAGES).nan_to_num(1.0)
    # A matrix far larger than the masses makes a linear program, at whose corners Newton's method gets lost. Hence it grows to its size,
    # and each projection begins at the one before. What is left of the matrix is of the masses' size where there are any, and so is rounding.
    stages = math.ceil(math.log(float(ratio.amax()), _GROWTH) - 1e-9) if len(ratio) else 0
    growth = ratio ** (1 / max(stages, 1))
    matrix = matrix / ratio[:, None, None]
    for stage in range(stages + 1):
        matrix = matrix * growth[:, None, None] if stage else matrix
        matrix, slope, plan = _projected(matrix, sums, _ROUNDING if stage == stages else _ROUGH)
    met = slope.abs().amax(-1) <= _ACCEPTED * largest
    solved = fit & met
    # The entries of a row without mass go to zero only in the limit.
    mass = (sums > 0).double()
    n = shape[-2]
    support = (plan * mass[:, :n, None] * mass[:, None, n:] > 0).to(v.dtype).reshape(shape)
    return support, matrix.to(v.dtype).reshape(shape), solved.reshape(*shape[:-2], 1, 1)


def _projected(matrix: torch.Tensor, sums: torch.Tensor, tolerance: float) -> tuple[torch.Tensor, ...]:
    """Return the matrices less their potentials, what the sums of the plans lack (K, n + m), and the plans, their positive parts."""
    n, m = matrix.shape[-2:]
    for _ in range(_MAX_STEPS):
        plan = matrix.relu()
        slope = _slope(plan, sums)
        norm, size = slope.abs().amax(-1), plan.amax((-1, -2)) + sums.abs().amax(-1)
        left = (norm > tolerance * size * m).nonzero().squeeze(-1)
        if not len(left):
            break
        direction = _direction((plan[left] > 0).double(), slope[left])
        step = _length(matrix[left], sums[left], direction).unsqueeze(-1) * direction
        matrix = matrix.index_copy(0, left, matrix[left] - _spread(step, n))
    plan = matrix.relu()
    return matrix, _slope(plan, sums), plan


def _slope(plan: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """Return the gradient (K, n + m) of the dual function."""
    return sums - torch.cat([plan.sum(-1), plan.sum(-2)], -1)


def _spread(dual: torch.Tensor, n: int) -> torch.Tensor:
    """Return α 1ᵀ + 1 βᵀ (K, n, m)."""
    return dual[:, :n, None] + dual[:, None, n:]


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


def _direction(support: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """Return Newton's direction; where the dual function is linear along some directions, those by far the most."""
    matrix = system_of(support)
    unit = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return -solve(matrix + _SHIFT * unit, slope.unsqueeze(-1)).squeeze(-1)


def _length(matrix: torch.Tensor, sums: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """Return where the dual function is least (K,) along directions.

    Its slope along one grows, and is linear between the places at which an entry of the plan comes or goes.
    """
    n, m = matrix.shape[-2:]
    entry, rate = matrix.reshape(len(matrix), n * m), _spread(direction, n).reshape(len(matrix), n * m)
    there = (entry > 0).double()
    place = entry / rate
    changes = (place > 0) & torch.isfinite(place)
    place, order = torch.where(changes, place, torch.inf).sort(-1)
    sign = torch.where(changes, torch.where(rate < 0, 1.0, -1.0), 0.0)

    def between(terms: torch.Tensor) -> torch.Tensor:
        """Return the sums (K, nm + 1) of the terms of the entries that are there, after each change."""
        begin = (there * terms).sum(-1, keepdim=True)
        return torch.cat([begin, begin + (sign * terms).gather(-1, order).cumsum(-1)], -1)

    lack = between(rate * entry) - (direction * sums).sum(-1, keepdim=True)
    curvature = between(rate.square())
    place = torch.cat([torch.zeros_like(place[:, :1]), place, torch.full_like(place[:, :1], torch.inf)], -1)
    ends = place[:, 1:] * curvature >= lack
    found = ends.to(torch.int8).argmax(-1, keepdim=True)
    lack, curvature = lack.gather(-1, found), curvature.gather(-1, found)
    low, high = place.gather(-1, found), place.gather(-1, found + 1)
    least = torch.where(curvature > 0, lack / curvature, high).maximum(low).minimum(high)
    return torch.where(ends.any(-1, keepdim=True) & torch.isfinite(least), least, 1.0).squeeze(-1)


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
