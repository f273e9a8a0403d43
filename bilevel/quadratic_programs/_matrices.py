"""The matrices of a program, dense or as the entries of a sparse one: their products, and the transposes of those.

The differentiation rule (:mod:`bilevel.quadratic_programs._rule`) sees a matrix as a tensor of values, (..., m, n) or (..., entries), and
goes by these products alone. All are torch operations, which autograd and ``vmap`` see through.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

__all__ = ["Dense", "Entries", "Pattern"]


class Pattern(Protocol):
    """The positions of the stored values of a matrix M (m, n)."""

    @property
    def axes(self) -> int:
        """The number of axes of the values of one matrix."""

    def times(self, values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return M x (..., m)."""

    def transposed(self, values: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return Mᵀ y (..., n)."""

    def outer(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return y xᵀ at the places of the values."""


@dataclass(frozen=True)
class Dense:
    """All entries, (..., m, n)."""

    axes = 2

    def times(self, values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (values @ x.unsqueeze(-1)).squeeze(-1)

    def transposed(self, values: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (y.unsqueeze(-2) @ values).squeeze(-2)

    def outer(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return y.unsqueeze(-1) * x.unsqueeze(-2)


@dataclass(frozen=True, eq=False)
class Entries:
    """The entries (..., k) at ``rows`` and ``columns``, (k,) each; those at one place are summed."""

    rows: torch.Tensor
    columns: torch.Tensor
    shape: tuple[int, int]
    axes = 1

    def times(self, values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self._summed(values * x[..., self.columns], self.rows, self.shape[0])

    def transposed(self, values: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self._summed(values * y[..., self.rows], self.columns, self.shape[1])

    def outer(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return y[..., self.rows] * x[..., self.columns]

    @staticmethod
    def _summed(products: torch.Tensor, places: torch.Tensor, size: int) -> torch.Tensor:
        return products.new_zeros(*products.shape[:-1], size).index_add(-1, places, products)
