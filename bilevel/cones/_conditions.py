"""The conditions of optimality of a cone program as equations, and its numbers for one problem.

minimise ½ xᵀPx + qᵀx subject to A x + s = b, s ∈ K. With v = s − y, y the multipliers, s = Π(v) and y = Π(v) − v lie in K and in its dual cone,
and sᵀy = 0: the conditions are the equations in z = (x, v)::

    R(z) = ( P x + q + Aᵀ(Π(v) − v),  A x + Π(v) − b )

R is smooth near a solution where Π is smooth at v, which is strict complementarity: the usual rule of :mod:`bilevel.implicit` gives the
derivatives. With Π_τ in place of Π, s ∘ y = τ e: a point of the central path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bilevel.cones._product import Product
from bilevel.quadratic_programs._matrices import Entries, Pattern

__all__ = ["Conditions", "Numbers"]


@dataclass(frozen=True, eq=False)
class Conditions:
    """R as a function of (z, P, q, A, b), of one problem or of as many as the tensors' leading axes say.

    Parameters
    ----------
    product
        K.
    unknowns
        n.
    of_P, of_A
        What the values of the matrices stand for.
    """

    product: Product
    unknowns: int
    of_P: Pattern
    of_A: Pattern

    @property
    def sparse(self) -> bool:
        """Whether the matrices are given by their entries."""
        return isinstance(self.of_A, Entries)

    def __call__(
        self, z: torch.Tensor, P: torch.Tensor, q: torch.Tensor, A: torch.Tensor, b: torch.Tensor
    ) -> torch.Tensor:
        x, v = z[..., : self.unknowns], z[..., self.unknowns :]
        s = self.product.project(v)
        top = self.of_P.times(P, x) + q + self.of_A.transposed(A, s - v)
        return torch.cat([top, self.of_A.times(A, x) + s - b], -1)

    def numbers(self, tensors: Sequence[torch.Tensor]) -> Numbers:
        """Return one problem in numpy and scipy."""
        P, q, A, b = tensors
        return Numbers(_csc(self.of_P, P, (len(q), len(q))), q.numpy(), _csc(self.of_A, A, (len(b), len(q))), b.numpy())


def _csc(pattern: Pattern, values: torch.Tensor, shape: tuple[int, int]) -> Any:
    import scipy.sparse as sp

    if isinstance(pattern, Entries):
        return sp.coo_matrix((values.numpy(), (pattern.rows.numpy(), pattern.columns.numpy())), shape=shape).tocsc()
    return sp.csc_matrix(values.numpy().reshape(shape))


@dataclass(frozen=True, eq=False)
class Numbers:
    """P, q, A, b of one problem: CSC matrices and arrays."""

    P: Any
    q: np.ndarray
    A: Any
    b: np.ndarray

    @property
    def finite(self) -> bool:
        """Whether there is no NaN and no infinity."""
        return all(bool(np.isfinite(part).all()) for part in (self.P.data, self.q, self.A.data, self.b))

    def scales(self, x: np.ndarray, s: np.ndarray, y: np.ndarray) -> tuple[float, float]:
        """Return the sizes of the numbers that the equations for y, and those for s, add up."""
        dual = max(np.abs(self.q).max(), (abs(self.P) @ np.abs(x)).max(), (abs(self.A).T @ np.abs(y)).max())
        rows = [np.abs(self.b), abs(self.A) @ np.abs(x), np.abs(s)]
        return float(dual), max(float(part.max(initial=0.0)) for part in rows)
