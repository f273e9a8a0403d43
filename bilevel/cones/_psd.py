"""The cone of positive semidefinite matrices, as the vectors of their upper triangles."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from bilevel.cones._cone import Cone, Nonnegative
from bilevel.errors import ShapeError
from bilevel.prox._base import detached
from bilevel.prox._spectral import abs_change, eigh, symmetric
from bilevel.prox.psd import PSDCone
from bilevel.setting_checks import check_steps

__all__ = ["PSDTriangle"]


@dataclass(frozen=True)
class PSDTriangle(Cone):
    """The vectors of positive semidefinite matrices S (k, k): the upper triangle, column by column, entries off the diagonal times √2.

    With that factor the scalar product of two vectors is that of the matrices. :meth:`vector` and :meth:`matrix` translate.

    Parameters
    ----------
    side
        k. The cone takes k (k + 1) / 2 rows.

    Raises
    ------
    ArgumentError
        If the side is not an integer of at least 1.

    References
    ----------
    Malick and Sendov, "Clarke generalized Jacobian of the projection onto the cone of positive semidefinite matrices", 2006.

    Examples
    --------
    >>> import torch
    >>> from bilevel import cones
    >>> cone = cones.PSDTriangle(2)
    >>> vector = cone.vector(torch.tensor([[1.0, 3.0], [3.0, -7.0]]))
    >>> vector
    tensor([ 1.0000,  4.2426, -7.0000])
    >>> cone.matrix(cone.project(vector))
    tensor([[1.8000, 0.6000],
            [0.6000, 0.2000]])
    """

    side: int

    def __post_init__(self) -> None:
        check_steps("cones.PSDTriangle", "side", self.side)

    @property
    def rows(self) -> int:
        return self.side * (self.side + 1) // 2

    def vector(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return the vector (..., k (k + 1) / 2) of symmetric matrices (..., k, k), of which the symmetric part counts.

        Raises
        ------
        ShapeError
            If the matrices are of another size.
        """
        if matrix.shape[-2:] != (self.side, self.side):
            raise ShapeError(
                f"cones.PSDTriangle: expected a matrix of shape (..., {self.side}, {self.side}), got {tuple(matrix.shape)}; pass square ones"
            )
        lines, columns, _ = _places(self.side)
        entries = symmetric(matrix)[..., torch.from_numpy(lines), torch.from_numpy(columns)]
        return entries * torch.from_numpy(np.where(lines == columns, 1.0, 2**0.5)).to(entries)

    def matrix(self, vector: torch.Tensor) -> torch.Tensor:
        """Return the symmetric matrices (..., k, k) of vectors (..., k (k + 1) / 2).

        Raises
        ------
        ShapeError
            If the vectors are of another length.
        """
        if vector.ndim == 0 or vector.shape[-1] != self.rows:
            raise ShapeError(
                f"cones.PSDTriangle: expected a vector of shape (..., {self.rows}), got {tuple(vector.shape)}; pass the upper triangle"
            )
        *_, index = _places(self.side)
        spread = vector[..., torch.from_numpy(index)].unflatten(-1, (self.side, self.side))
        return spread * torch.from_numpy(np.where(np.eye(self.side), 1.0, 0.5**0.5)).to(spread)

    def project(self, v: torch.Tensor) -> torch.Tensor:
        return self.vector(PSDCone().prox(self.matrix(v)))

    def edges(self, v: torch.Tensor) -> torch.Tensor:
        return eigh(self.matrix(v))[0]

    def smoothed(self, v: torch.Tensor, smoothing: float) -> torch.Tensor:
        matrix = self.matrix(v)
        values, vectors = eigh(matrix)
        root = (vectors * (values.square() + 4 * smoothing).sqrt().unsqueeze(-2)) @ vectors.mT
        change = abs_change(matrix, values, vectors, 4 * smoothing)
        return self.vector(0.5 * (detached(matrix) + root) + 0.5 * (matrix - detached(matrix) + change))

    def copies(self) -> tuple[Cone, int]:
        return (Nonnegative(1) if self.side == 1 else self), 1

    def of_clarabel(self, clarabel: Any) -> Any:
        return clarabel.PSDTriangleConeT(self.side)


@lru_cache(maxsize=64)
def _places(side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the rows and columns of the entries of a vector, and for each entry of the matrix, row by row, its place in the vector."""
    columns, lines = np.tril_indices(side)
    small, large = np.minimum(*np.indices((side, side))), np.maximum(*np.indices((side, side)))
    return lines, columns, (large * (large + 1) // 2 + small).reshape(-1)
