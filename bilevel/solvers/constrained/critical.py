"""Points that meet the first-order conditions and are no minima: saddles, and constraints with multiplier zero that let the objective fall.

A direction is critical if it keeps the strictly active constraints to first order and does not enter those that are active with multiplier zero.
Where the Lagrangian curves down along one, the point is no minimum. Where the curvature is zero, as for -x³ at a bound 0, second derivatives do
not decide, and the objective is evaluated along the direction.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

from bilevel._torch.factorisations import eigh, pinv

__all__ = ["Evaluate", "critical_directions", "lowered"]

#: x (K, n) ↦ the feasible point near x (K, n), f there (K,), and its rounding (K,).
Evaluate = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

# Curvatures below this share of the largest count as zero. The second one takes the place of zero where it would be divided by.
_FLAT, _INVERTIBLE = 1e-9, 1e-5
# All sets of this many weakly active constraints are looked at; of more, the single ones, the pairs, and all together.
_MOST_WEAK, _MOST_DIRECTIONS = 6, 16
# The first and the last distance of a walk, in shares of the size of x, and the growth of its steps.
_NEAR, _FAR, _GROWTH = 1e-6, 0.5, 4.0


def critical_directions(hessian: torch.Tensor, strict: torch.Tensor, weak: torch.Tensor) -> list[torch.Tensor]:
    """Return critical directions (n,) along which the curvature is negative or zero, the most negative ones first.

    Up to six weakly active constraints all such sets are covered; beyond, the search is incomplete, as it has to be in polynomial time.

    Parameters
    ----------
    hessian
        ∇² of the Lagrangian (n, n).
    strict, weak
        The gradients (r, n) and (w, n) of the strictly and the weakly active constraints: strict · d = 0, weak · d <= 0.
    """
    size = hessian.abs().amax(-1)
    most = size.amax()
    unit = torch.where(size > 1e-14 * most, size, most if most > 0 else torch.ones_like(most)).rsqrt()
    hessian = unit.unsqueeze(-1) * hessian * unit
    rows = torch.cat([strict, weak]) * unit
    norms = rows.norm(dim=-1, keepdim=True)
    rows = rows / torch.where(norms > 0, norms, torch.ones_like(norms))
    values, vectors = eigh(rows.mT @ rows)
    tangent = vectors[:, values <= 1e-12]
    values, vectors = eigh(tangent.mT @ hessian @ tangent)
    vectors = tangent @ vectors
    flat = values <= _FLAT
    found = [(float(v), sign * d) for v, d in zip(values[flat], vectors[:, flat].mT, strict=True) for sign in (1, -1)]
    if len(weak):
        inwards = -pinv(rows, rtol=1e-6)[:, len(strict) :]
        # Beside a step inwards, the free directions take the step that lowers the curvature most.
        inverse = vectors / values.clamp_min(_INVERTIBLE) @ vectors.mT
        inwards = inwards - inverse @ (hessian @ inwards)
        inwards = inwards / inwards.norm(dim=0).clamp_min(1e-300)
        found += _combined(inwards.mT @ hessian @ inwards, inwards)
    found.sort(key=lambda pair: pair[0])
    return [unit * direction for _, direction in found[:_MOST_DIRECTIONS]]


def _combined(curvature: torch.Tensor, inwards: torch.Tensor) -> list[tuple[float, torch.Tensor]]:
    """Return the combinations of ``inwards`` (n, w) with positive weights and a curvature that is not positive, with it.

    A symmetric matrix is copositive if and only if none of its principal submatrices has a positive eigenvector with a negative eigenvalue
    (Kaplan 2000).
    """
    count = len(curvature)
    sizes = range(1, count + 1) if count <= _MOST_WEAK else sorted({1, 2, count})
    found = []
    for places in itertools.chain.from_iterable(itertools.combinations(range(count), size) for size in sizes):
        chosen = list(places)
        block = curvature[chosen][:, chosen]
        weights = [torch.ones_like(block[0])]
        if len(chosen) > 1:
            least = eigh(block)[1][:, 0]
            weights.append(least * least.sum().sign())
        for w in weights:
            bent = float(w @ block @ w / (w @ w))
            if bent <= _FLAT and bool((w > 0).all()):
                found.append((bent, inwards[:, chosen] @ w))
    return found


def lowered(
    evaluate: Evaluate, x: torch.Tensor, directions: Sequence[Sequence[torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Walk from ``x`` (K, n) along the directions of each problem, until f falls: return the lowest points, and where f fell (K,).

    Steps grow. A walk ends where f rises beyond rounding before it has fallen: what is behind a rise is another basin.
    """
    _, value, _ = evaluate(x)
    fell = torch.zeros_like(value, dtype=torch.bool)
    size = 1 + x.abs().amax(-1)
    for number in range(max((len(some) for some in directions), default=0)):
        rows = [some[number] if number < len(some) else torch.zeros_like(x[0]) for some in directions]
        direction = torch.where(fell.unsqueeze(-1), 0.0, torch.stack(rows))
        length = direction.abs().amax(-1)
        direction = (size / torch.where(length > 0, length, 1.0)).unsqueeze(-1) * direction
        x, value, fell = _walk(evaluate, x, value, direction, length > 0, fell)
    return x, fell


def _walk(
    evaluate: Evaluate,
    x: torch.Tensor,
    value: torch.Tensor,
    direction: torch.Tensor,
    going: torch.Tensor,
    fell: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the points, values and flags of :func:`lowered` after a walk of the problems that are ``going`` (K,)."""
    origin, first, step = x, value, _NEAR
    while bool(going.any()) and step <= _FAR:
        point, new, noise = evaluate(origin + step * direction)
        lower = going & (new < value - torch.where(fell, 0.0, noise))
        x = torch.where(lower.unsqueeze(-1), point, x)
        value = torch.where(lower, new, value)
        fell = fell | lower
        going = going & torch.where(fell, lower, new <= first + noise)  # not where it is NaN
        step = _GROWTH * step
    return x, value, fell
