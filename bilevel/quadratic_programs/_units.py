"""Units of a program in which its entries are near one.

What is zero, active or independent is decided by numbers that are compared with each other, which have to be in comparable units. A program
whose units are all moderate stays as it is.

The units bring the logarithms of all entries as near to zero as they can, in least squares (Curtis and Reid, "On the automatic scaling of
matrices for Gaussian elimination", 1972). So they do not depend on the units in which the program was given, as those do that make the largest
entries one. The square roots of the diagonal of Q count as one more row, for they bound its other entries. The sides of the rows and the bounds
count as one more column: in a program of parts without a common row nothing else tells the units of a part. An entry that is far from all others,
as one of rounding alone is, weighs by its distance and not by the square of it (Huber).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bilevel.quadratic_programs._matrices import Dense, Entries, Pattern
from bilevel.quadratic_programs._rule import Structure

__all__ = ["units_of"]

_MODERATE = 1e3  # largest entries of rows and columns, and units, within this factor of one are left as they are
_SWEEPS = 10
_FAR = 10.0  # binary orders of magnitude beyond which an entry weighs less


def units_of(
    structure: Structure, matrices: Sequence[torch.Tensor], sides: Sequence[torch.Tensor | None] = (None,) * 4
) -> torch.Tensor | None:
    """Return powers of two (B, length) for x, ν, λ, μ_l, μ_u; None if no problem needs any.

    Parameters
    ----------
    structure
        What the values of the matrices stand for.
    matrices
        Q, A and G of a batch with one axis.
    sides
        b, h, lower and upper, where they are known.
    """
    (n, p, m), (Q, A, G), (b, h, *bounds) = structure.sizes.parts[:3], matrices, sides
    root = _diagonal(structure.Q, Q).clamp_min(0).sqrt().unsqueeze(-2)
    largest = [root.squeeze(-2), *_largest_of_both(structure.A, A, p, n), *_largest_of_both(structure.G, G, m, n)]
    if not bool(_far(torch.cat(largest, -1)).any()):
        return None
    places = torch.arange(n, device=Q.device)
    blocks = [_Block(Dense(), root, 1, None), _Block(structure.A, A, p, b), _Block(structure.G, G, m, h)]
    for bound in bounds:
        if bound is not None:
            blocks.append(_Block(Entries(places, places, (n, n)), torch.ones_like(bound), n, bound))
    x = torch.exp2(_columns(blocks, len(Q), n).round())
    rows = [1 / _power_of_two(_largest(pattern, values * pattern.outer(x.new_ones(len(x), count), x), count)) for pattern, values, count in (
        (structure.A, A, p), (structure.G, G, m))]  # fmt: skip
    units = torch.cat([x, *rows, 1 / x, 1 / x], -1)
    return torch.where(_far(units).any(-1, keepdim=True), units, 1.0)


class _Block:
    """Rows of a program: the logarithms of their entries and sides, and what each weighs."""

    def __init__(self, pattern: Pattern, values: torch.Tensor, count: int, side: torch.Tensor | None) -> None:
        self.pattern = pattern
        side = values.new_zeros(len(values), count) if side is None else side
        self.present, self.logs = _logarithms(values)
        self.side_present, self.side_logs = _logarithms(side)
        self.weights, self.side_weights = self.present, self.side_present

    def fit(self, columns: torch.Tensor, *, weigh: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Fit the rows to the logarithms of the ``columns`` (B, n); return what they want of the columns, and its weight (B, n)."""
        ones, pattern = torch.ones_like(columns), self.pattern
        found = pattern.times(self.weights * self.logs, ones) + pattern.times(self.weights, columns)
        weight = pattern.times(self.weights, ones) + self.side_weights
        rows = -(found + self.side_weights * self.side_logs) / _or_one(weight)
        if weigh:
            left = self.logs + torch.log2(pattern.outer(torch.exp2(rows), torch.exp2(columns)))
            self.weights = self.present * _weight(left)
            self.side_weights = self.side_present * _weight(self.side_logs + rows)
        found = pattern.transposed(self.weights * self.logs, torch.ones_like(rows)) + pattern.transposed(
            self.weights, rows
        )
        return -found, pattern.transposed(self.weights, torch.ones_like(rows))


def _columns(blocks: Sequence[_Block], batch: int, n: int) -> torch.Tensor:
    """Return the logarithms (B, n) of the units of the unknowns."""
    columns = blocks[0].logs.new_zeros(batch, n)
    for sweep in range(_SWEEPS):
        found, weights = zip(*(block.fit(columns, weigh=2 * sweep >= _SWEEPS) for block in blocks), strict=True)
        columns = torch.stack(found).sum(0) / _or_one(torch.stack(weights).sum(0))
    return columns


def _logarithms(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return 1 for entries that are neither zero nor infinite, 0 for others, and the logarithms."""
    size = values.abs()
    present = (size > 0) & torch.isfinite(size)
    return present.to(values.dtype), torch.log2(torch.where(present, size, 1.0))


def _weight(left: torch.Tensor) -> torch.Tensor:
    return _FAR / left.abs().clamp_min(_FAR)


def _far(values: torch.Tensor) -> torch.Tensor:
    size = values.abs()
    return ((size > _MODERATE) | ((size < 1 / _MODERATE) & (size > 0))) & torch.isfinite(size)


def _diagonal(pattern: Pattern, values: torch.Tensor) -> torch.Tensor:
    """Return the diagonal (B, n)."""
    if not isinstance(pattern, Entries):
        return values.diagonal(dim1=-2, dim2=-1)
    on = torch.where(pattern.rows == pattern.columns, values, 0.0)
    return pattern.times(on, values.new_ones(len(values), pattern.shape[1]))


def _largest(pattern: Pattern, values: torch.Tensor, count: int, *, of_columns: bool = False) -> torch.Tensor:
    """Return the largest entry of each of ``count`` rows or columns (B, count)."""
    sizes, found = values.abs(), values.new_zeros(len(values), count)
    if not isinstance(pattern, Entries):
        return sizes.amax(-2 if of_columns else -1) if sizes.numel() else found
    places = pattern.columns if of_columns else pattern.rows
    return found.scatter_reduce(-1, places.expand_as(sizes), sizes, "amax")


def _largest_of_both(
    pattern: Pattern, values: torch.Tensor, rows: int, columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return _largest(pattern, values, rows), _largest(pattern, values, columns, of_columns=True)


def _power_of_two(size: torch.Tensor) -> torch.Tensor:
    return torch.exp2(torch.log2(_or_one(size)).round())


def _or_one(size: torch.Tensor) -> torch.Tensor:
    return torch.where((size > 0) & torch.isfinite(size), size, 1.0)
