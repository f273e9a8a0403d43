"""Pieces of an interior-point step: starts, scales, distances to the bounds and step lengths; every tensor has a leading batch axis."""

from __future__ import annotations

import math

import torch

from bilevel.solvers.constrained.program import Program

__all__ = [
    "complementarity",
    "finite_gaps",
    "gaps",
    "largest",
    "least_squares",
    "longest_step",
    "pick",
    "pull",
    "pushed",
    "weights",
]

# How far an initial guess is moved inside the bounds, relative to its size and to the width of the bounds.
_PUSH = 1e-2
# Gradients above the first size are scaled down to it. Gradients below the second are scaled up to one.
_LARGEST_GRADIENT, _LEAST_GRADIENT = 100.0, 1e-2


def pushed(program: Program, x: torch.Tensor, push: float = _PUSH) -> torch.Tensor:
    """Return ``x`` moved into the interior of the bounds (Wächter & Biegler, section 3.6)."""
    width = program.upper - program.lower
    low = torch.minimum(push * program.lower.abs().clamp_min(1.0), push * width)
    high = torch.minimum(push * program.upper.abs().clamp_min(1.0), push * width)
    inner_low = torch.where(torch.isfinite(program.lower), program.lower + low, program.lower)
    inner_high = torch.where(torch.isfinite(program.upper), program.upper - high, program.upper)
    moved = torch.minimum(torch.maximum(x, inner_low), inner_high)
    # An initial guess outside of a box says nothing about the position of the solution in the box.
    outside = ((x < program.lower) | (x > program.upper)) & torch.isfinite(width)
    moved = torch.where(outside, 0.5 * (program.lower + program.upper), moved)
    return torch.where(program.lower >= program.upper, program.inside(x), moved)


def weights(program: Program, x: torch.Tensor) -> torch.Tensor:
    """Return the factors of the parts, (K, 1 + p + m), with which gradients have a moderate size at ``x``."""
    _, rows = program.jacobian(x)
    largest = rows.abs().amax(-1)  # (K, 1 + p + m)
    flat = torch.zeros_like(largest)
    flat[:, 0] = 1.0
    curvature = program.hessian(x, flat).abs().amax(-1).amax(-1)
    weights = (_LARGEST_GRADIENT / largest).clamp_max(1.0)
    size = torch.maximum(largest[:, 0], curvature)
    small = (size > 0) & (size < _LEAST_GRADIENT)
    weights[:, 0] = torch.where(small, (1 / size).clamp_max(1e30), weights[:, 0])
    return weights.nan_to_num(1.0, 1.0, 1.0)


def gaps(program: Program, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the distances to the lower and upper bounds, (K, n) each; one for a fixed unknown, which has no barrier."""
    one = torch.ones_like(x)
    none = program.lower >= program.upper
    return torch.where(none, one, x - program.lower), torch.where(none, one, program.upper - x)


def finite_gaps(program: Program) -> tuple[torch.Tensor, torch.Tensor]:
    """Return, as numbers 0 and 1, where there is a barrier for the lower and the upper bound."""
    free = program.lower < program.upper
    like = program.lower
    return (torch.isfinite(program.lower) & free).to(like), (torch.isfinite(program.upper) & free).to(like)


def complementarity(
    lower: torch.Tensor, upper: torch.Tensor, low: torch.Tensor, high: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the products of the bounds' multipliers and distances, (K, n) each; zero where there is no bound."""
    return (
        torch.where(torch.isfinite(low), lower * low, torch.zeros_like(low)),
        torch.where(torch.isfinite(high), upper * high, torch.zeros_like(high)),
    )


def pull(rows: torch.Tensor, multipliers: torch.Tensor) -> torch.Tensor:
    """Return Jᵀ λ (K, n)."""
    return (rows.mT @ multipliers.unsqueeze(-1)).squeeze(-1)


def largest(numbers: torch.Tensor) -> torch.Tensor:
    """Return the largest absolute value (K,), zero of none."""
    return numbers.abs().amax(-1) if numbers.shape[-1] else numbers.new_zeros(len(numbers))


def longest_step(numbers: torch.Tensor, step: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Return the longest step (K,) ≤ 1 that leaves at least the share 1 − ``keep`` of the ``numbers`` > 0."""
    if not numbers.shape[-1]:
        return step.new_ones(len(step))
    ratio = torch.where(step < 0, -keep * numbers / step.clamp_max(-1e-300), torch.full_like(step, math.inf))
    return ratio.amin(-1).clamp_max(1.0)


def least_squares(rows: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """Return ν (K, p) that makes slope + Jᵀν small."""
    p = rows.shape[1]
    if not p:
        return slope.new_zeros(len(slope), 0)
    gram = rows @ rows.mT
    ridge = 1e-10 * gram.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(1e-12)
    eye = torch.eye(p, dtype=rows.dtype, device=rows.device)
    factor, _ = torch.linalg.cholesky_ex(gram + ridge[:, None, None] * eye)
    return -torch.cholesky_solve(rows @ slope.unsqueeze(-1), factor).squeeze(-1).nan_to_num(0.0, 0.0, 0.0)


def pick(these: torch.Tensor, new: tuple[torch.Tensor, ...], old: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Return ``new`` for ``these`` problems (K,) and ``old`` for the rest."""
    mask = these.unsqueeze(-1)
    return tuple(torch.where(mask, a, b) for a, b in zip(new, old, strict=True))
