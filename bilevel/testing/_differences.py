"""The derivative by finite differences of solutions: the only reference that autograd cannot mislead."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bilevel.testing.references import Adjoint, Reference

__all__ = ["Differences", "differences"]

_MOST_CHORD_STEPS = 60
# A tensor of up to this many entries is differenced entry by entry, a larger one in as many random directions.
_MOST_DIRECTIONS = 12


@dataclass(frozen=True, eq=False)
class Differences:
    """Directional derivatives of one tensor by central differences.

    Parameters
    ----------
    directions
        (m, *shape).
    derivatives
        (m,), extrapolated from two steps.
    errors
        (m,), how far they may be off: the change by extrapolation, rounding, and what is left of the solves.
    step
        The largest step, for the table.
    """

    directions: torch.Tensor
    derivatives: torch.Tensor
    errors: torch.Tensor
    step: float


def differences(
    reference: Reference,
    place: int,
    rows: Sequence[torch.Tensor],
    adjoints: Sequence[Adjoint],
    generator: torch.Generator,
    step: float | None,
    terms: float,
) -> Differences:
    """Return derivatives of c along directions of one tensor, from solutions at four displaced θ for each.

    Central differences with steps h and h/2, extrapolated: the error is O(h⁴), and the change by extrapolation says how
    large it may be. The displaced problems are solved by a chord iteration with the matrix at the solution. ``terms`` is
    Σ |dc/dθ · θ|: c cannot be had closer than by rounding its arguments, however small it is itself.
    """
    point = reference.points[place]
    directions = _directions(point, generator)
    relative = reference.eps**0.2 if step is None else step
    factors = [torch.linalg.lu_factor_ex(adjoint.matrix)[:2] for adjoint in adjoints]
    derivatives, errors = [], []
    for direction in directions:
        pairs = []
        for h in (relative, relative / 2):
            ahead, left = _displaced(reference, place, h * direction, rows, factors)
            behind, right = _displaced(reference, place, -h * direction, rows, factors)
            noise = 8 * reference.eps * (max(abs(ahead), abs(behind)) + terms) + _unsolved(left, right, adjoints)
            pairs.append(((ahead - behind) / (2 * h), noise / h))
        (coarse, _), (fine, noise) = pairs
        extrapolated = (4 * fine - coarse) / 3
        derivatives.append(extrapolated)
        errors.append(abs(extrapolated - fine) + 3 * noise)
    made = torch.tensor([derivatives, errors], dtype=reference.dtype, device=point.device)
    return Differences(directions, made[0], made[1], relative)


def _displaced(
    reference: Reference, place: int, change: torch.Tensor, rows: Sequence[torch.Tensor], factors: Sequence[Any]
) -> tuple[float, list[float]]:
    """Return c at the solution for a displaced tensor, and the last step of each problem's iteration."""
    tensors = [point + change if at == place else point for at, point in enumerate(reference.points)]
    ends, last = [], []
    for number, row in enumerate(rows):
        x, size = row.detach(), math.inf
        for _ in range(_MOST_CHORD_STEPS):
            residual = reference.residual(number, x, tensors).detach()
            move = torch.linalg.lu_solve(*factors[number], residual.unsqueeze(-1)).squeeze(-1)
            reached = float(move.norm())
            if not reached < size:  # no more progress, or NaN
                break
            x, size = x - move, reached
        ends.append(x)
        last.append(size if x.numel() else 0.0)
    with torch.no_grad():
        return float(reference.scalar(ends, tensors)), last


def _unsolved(left: Sequence[float], right: Sequence[float], adjoints: Sequence[Adjoint]) -> float:
    return sum(float(adjoint.rhs.norm()) * max(a, b) for a, b, adjoint in zip(left, right, adjoints, strict=True))


def _directions(point: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return directions (m, *shape) for a tensor: each entry by itself, or random signs for many, as large as they are."""
    size = point.numel()
    largest = point.abs().max() if size else point.new_ones(())
    largest = largest if float(largest) > 0 else torch.ones_like(largest)
    scale = torch.clamp(point.abs(), min=1e-3 * float(largest)).reshape(-1)
    if size <= _MOST_DIRECTIONS:
        chosen = torch.diag(scale)
    else:
        signs = torch.randint(0, 2, (_MOST_DIRECTIONS, size), generator=generator).to(scale) * 2 - 1
        chosen = signs * scale
    return chosen.reshape(len(chosen), *point.shape)
