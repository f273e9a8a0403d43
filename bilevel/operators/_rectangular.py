"""Rectangular matrices A behind the normal equations AᵀA x = d, for solvers that work with A itself.

The layer of a rectangular system differentiates x = A⁺ b as the solution of symmetric systems. Their operators are AᵀA, and keep A in their
memo: a solver that finds it there needs no product AᵀA, whose condition number is the square of A's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from bilevel.operators._base import LinearOperator

__all__ = ["Rectangular", "rectangular_of"]


@dataclass(frozen=True, eq=False)
class Rectangular:
    """A batch of matrices A (batch, m, n) known by their products.

    Parameters
    ----------
    batch, rows, columns
        The number of matrices, m and n.
    matvec, rmatvec
        v (batch, n) ↦ A v (batch, m), and u (batch, m) ↦ Aᵀ u (batch, n).
    dense
        Makes the matrices.
    memo
        What a solver wants to keep with them.
    """

    batch: int
    rows: int
    columns: int
    matvec: Callable[[torch.Tensor], torch.Tensor]
    rmatvec: Callable[[torch.Tensor], torch.Tensor]
    dense: Callable[[], torch.Tensor]
    memo: dict[Any, Any] = field(default_factory=dict)

    def keep_with(self, operator: LinearOperator) -> None:
        """Keep this A with ``operator``, AᵀA."""
        operator.distinct.memo[Rectangular] = self


def rectangular_of(operator: LinearOperator) -> Rectangular | None:
    """Return the A whose AᵀA ``operator`` is, if that is known."""
    found = operator.distinct.memo.get(Rectangular)
    return found if isinstance(found, Rectangular) else None
