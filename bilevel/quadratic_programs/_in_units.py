"""A solver and its factorisation, for programs in units in which their entries are near one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bilevel.quadratic_programs._call import Backend
from bilevel.quadratic_programs._kkt import Factor
from bilevel.quadratic_programs._program import Found
from bilevel.quadratic_programs._rule import Structure
from bilevel.quadratic_programs._units import units_of

__all__ = ["InUnits"]


@dataclass(frozen=True)
class InUnits:
    """The backend ``inner``, which sees programs in units in which their entries are near one."""

    inner: Backend

    @property
    def name(self) -> str:
        """The name in reports."""
        return self.inner.name

    def solve(self, structure: Structure, tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> Found:
        """Return what was found of each problem of a batch with one axis, in float64."""
        Q, q, A, b, G, h, lower, upper = tensors
        units = units_of(structure, (Q, A, G), (b, h, lower, upper))
        if units is None:
            return self.inner.solve(structure, tensors, dtype)
        x, of_A, of_G, of_bounds, _ = structure.sizes.split(units)
        Q, A, G = _matrices(structure, (Q, A, G), units)
        given = (Q, x * q, A, of_A * b, G, of_G * h, of_bounds * lower, of_bounds * upper)
        found = self.inner.solve(structure, given, dtype)
        found.point, found.certificate = units * found.point, units * found.certificate
        if found.factor is not None:
            found.factor = _FactorInUnits(found.factor, units, found.active)
        return found

    def factor(
        self,
        structure: Structure,
        matrices: Sequence[torch.Tensor],
        damping: torch.Tensor | None,
        active: torch.Tensor,
    ) -> Factor:
        """Return the factorised K."""
        units = units_of(structure, matrices)
        if units is None:
            return self.inner.factor(structure, matrices, damping, active)
        if damping is not None:
            damping = damping * units[:, -damping.shape[-1] :] ** 2
        inner = self.inner.factor(structure, _matrices(structure, matrices, units), damping, active)
        return _FactorInUnits(inner, units, active)


class _FactorInUnits:
    """K of a program, by the factors of K of the program in other units: z = ``units`` · z̃."""

    def __init__(self, inner: Factor, units: torch.Tensor, active: torch.Tensor) -> None:
        self.inner, self.units = inner, units
        self.singular, self.by_inequalities = inner.singular, inner.by_inequalities
        # The row of an inequality that is not active is λ = 0.
        head, weights = units.split([units.shape[-1] - active.shape[-1], active.shape[-1]], -1)
        self.rows = torch.cat([head, torch.where(active, weights, 1 / weights)], -1)

    def solve(self, right: torch.Tensor) -> torch.Tensor:
        """Return K⁻¹ r (B, length)."""
        return self.units * self.inner.solve(self.rows * right)

    def times(self, d: torch.Tensor) -> torch.Tensor:
        """Return K d (B, length)."""
        return self.inner.times(d / self.units) / self.rows

    def in_units(self, right: torch.Tensor) -> torch.Tensor:
        """Return r (B, length) in units in which the largest entries of the rows of K are near one."""
        return self.inner.in_units(self.rows * right)

    def changes(self, d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return by how much d would be another if an inequality (B, m + 2n) were of the other kind, and the size of d (B, 1)."""
        return self.inner.changes(d / self.units)


def _matrices(structure: Structure, matrices: Sequence[torch.Tensor], units: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return Q, A and G in other units."""
    x, of_A, of_G, _, _ = structure.sizes.split(units)
    patterns = ((structure.Q, x), (structure.A, of_A), (structure.G, of_G))
    return tuple(values * pattern.outer(rows, x) for values, (pattern, rows) in zip(matrices, patterns, strict=True))
