"""Operators given outright: as matrices, or as functions of a vector."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bilevel.errors import ShapeError
from bilevel.operators._base import LinearOperator

__all__ = [
    "DenseOperator",
    "FunctionOperator",
]


class DenseOperator(LinearOperator):
    """Matrices given as a tensor (batch, n, n), or (n, n) for a batch of one.

    Parameters
    ----------
    matrix
        (batch, n, n), or (n, n) for a batch of one; floating-point.
    symmetric, positive_definite, expect_definite
        See :class:`LinearOperator`.

    Raises
    ------
    ShapeError
        If the matrices are not square.

    Examples
    --------
    >>> import torch
    >>> operator = DenseOperator(torch.tensor([[2.0, 0.0], [0.0, 4.0]]), symmetric=True)
    >>> operator @ torch.tensor([[1.0, 1.0]])
    tensor([[2., 4.]])
    """

    def __init__(
        self,
        matrix: torch.Tensor,
        *,
        symmetric: bool = False,
        positive_definite: bool = False,
        expect_definite: bool = False,
    ) -> None:
        matrix = matrix.unsqueeze(0) if matrix.ndim == 2 else matrix
        if matrix.ndim != 3 or matrix.shape[-1] != matrix.shape[-2]:
            raise ShapeError(
                f"DenseOperator: expected square matrices (batch, n, n) or (n, n), got {tuple(matrix.shape)}; "
                "reshape them"
            )
        super().__init__(
            matrix.shape[0], matrix.shape[1], matrix.dtype, matrix.device,
            symmetric=symmetric, positive_definite=positive_definite, expect_definite=expect_definite,
        )  # fmt: skip
        self.matrix = matrix

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        return torch.matmul(self.matrix, v.unsqueeze(-1)).squeeze(-1)  # half the time of an einsum at small orders

    def rmatvec(self, v: torch.Tensor) -> torch.Tensor:
        return torch.matmul(self.matrix.mT, v.unsqueeze(-1)).squeeze(-1)

    def matmat(self, vs: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bij,kbj->kbi", self.matrix, vs)

    def rmatmat(self, vs: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bji,kbj->kbi", self.matrix, vs)

    def dense(self) -> torch.Tensor:
        return self.matrix


class FunctionOperator(LinearOperator):
    """Products given as functions of ``v`` (batch, n).

    Parameters
    ----------
    matvec
        v ↦ A v, from (batch, n) to (batch, n).
    like
        A tensor (batch, n) with the shape, dtype and device of the vectors.
    rmatvec
        v ↦ Aᵀ v, from (batch, n) to (batch, n). It may be left out when ``symmetric``.
    symmetric, positive_definite, expect_definite
        See :class:`LinearOperator`.
    materialize
        Returns the dense matrices (batch, n, n), in the dtype of ``like``, where that is cheaper than products with unit vectors.

    Examples
    --------
    >>> import torch
    >>> from bilevel.operators import FunctionOperator
    >>> FunctionOperator(lambda v: 3 * v, torch.zeros(1, 2), symmetric=True) @ torch.ones(1, 2)
    tensor([[3., 3.]])
    """

    def __init__(
        self,
        matvec: Callable[[torch.Tensor], torch.Tensor],
        like: torch.Tensor,
        rmatvec: Callable[[torch.Tensor], torch.Tensor] | None = None,
        *,
        symmetric: bool = False,
        positive_definite: bool = False,
        expect_definite: bool = False,
        materialize: Callable[[], torch.Tensor] | None = None,
    ) -> None:
        super().__init__(
            like.shape[0], like.shape[1], like.dtype, like.device, symmetric=symmetric, positive_definite=positive_definite,
            expect_definite=expect_definite, materialize=materialize,
        )  # fmt: skip
        self._matvec = matvec
        self._rmatvec = matvec if symmetric else rmatvec

    @property
    def transposes(self) -> bool:
        """Whether products with the transpose can be made."""
        return self._rmatvec is not None

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        return self._matvec(v)

    def rmatvec(self, v: torch.Tensor) -> torch.Tensor:
        if self._rmatvec is None:
            raise ShapeError(
                "FunctionOperator: a product with the transpose is needed, and none was given; pass rmatvec=, or "
                "symmetric=True if the matrix is"
            )
        return self._rmatvec(v)

    def dense(self) -> torch.Tensor:
        if self._rmatvec is None:
            n = self.size
            units = torch.eye(n, dtype=self.dtype, device=self.device).unsqueeze(1).expand(n, self.batch, n)
            return self.matmat(units).movedim(0, -1)
        return super().dense()
