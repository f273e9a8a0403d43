"""Rows of A and G in units in which their largest entries are near one. Neither a solver nor a rank can tell a tiny row from none."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bilevel._torch.empty_batches import EmptyBatch
from bilevel.quadratic_programs._kkt import Sizes
from bilevel.quadratic_programs._matrices import Entries, Pattern

__all__ = ["row_scales", "scaled_rows"]

# Rows whose largest entries are all within this factor of one stay as they are.
_MODERATE = 1e6
_A, _b, _G, _h = 2, 3, 4, 5  # places among the tensors of a program


def row_scales(
    sizes: Sizes, patterns: Sequence[Pattern], tensors: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return powers of two for the rows of A (..., p) and of G (..., m); None if no row needs one."""
    if not sizes.p + sizes.m or EmptyBatch.around(tensors) is not None:
        return None
    with torch.no_grad():
        largest = torch.cat(
            [
                _largest(patterns[1], tensors[_A].detach(), sizes.p),
                _largest(patterns[2], tensors[_G].detach(), sizes.m),
            ],
            -1,
        )
        far = ((largest > _MODERATE) | ((largest < 1 / _MODERATE) & (largest > 0))) & torch.isfinite(largest)
        try:
            if not bool(far.any()):
                return None
        except RuntimeError:  # under vmap nobody knows: the factors may all be one
            pass
        factors = torch.exp2(-torch.log2(torch.where(far, largest, 1.0)).round())
        return factors[..., : sizes.p], factors[..., sizes.p :]


def scaled_rows(
    scales: tuple[torch.Tensor, torch.Tensor], patterns: Sequence[Pattern], tensors: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """Return the tensors of the program with its rows multiplied by ``scales``."""
    made = list(tensors)
    for matrix, side, pattern, factors in ((_A, _b, patterns[1], scales[0]), (_G, _h, patterns[2], scales[1])):
        made[matrix] = tensors[matrix] * (
            factors[..., pattern.rows] if isinstance(pattern, Entries) else factors.unsqueeze(-1)
        )
        made[side] = tensors[side] * factors
    return tuple(made)


def _largest(pattern: Pattern, values: torch.Tensor, count: int) -> torch.Tensor:
    """Return the largest entry of each row (..., count)."""
    if not isinstance(pattern, Entries):
        return values.abs().amax(-1)
    found = values.new_zeros(*values.shape[:-1], count)
    return found.scatter_reduce(-1, pattern.rows.expand_as(values), values.abs(), "amax")
