"""Linear operators, and their combinations by ``T``, ``+`` and ``*``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from typing import Any

import torch

from bilevel.errors import ShapeError

__all__ = [
    "LinearOperator",
    "ScaledOperator",
    "SumOperator",
    "TransposedOperator",
]


class LinearOperator(ABC):
    """A batch of square matrices known by their products.

    Parameters
    ----------
    batch
        Number of matrices.
    size
        Order n of each.
    dtype, device
        The dtype and the device of the vectors.
    symmetric
        Whether each matrix equals its transpose.
    positive_definite
        Whether each matrix is *known* to be positive definite (False: not known).
    expect_definite
        Whether a matrix that is not positive definite is a failure. The Hessian at a minimum is positive definite; the
        Hessian at a saddle is not.
    materialize
        Returns the matrices (batch, n, n), faster than products with the unit vectors; None if there is no such way.

    Examples
    --------
    >>> import torch
    >>> from bilevel.operators import LinearOperator
    >>> class Doubling(LinearOperator):
    ...     def matvec(self, v):
    ...         return 2 * v
    ...     def rmatvec(self, v):
    ...         return 2 * v
    >>> Doubling(1, 2, torch.float32, torch.device("cpu"), symmetric=True) @ torch.ones(1, 2)
    tensor([[2., 2.]])
    """

    def __init__(
        self,
        batch: int,
        size: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        symmetric: bool = False,
        positive_definite: bool = False,
        expect_definite: bool = False,
        materialize: Callable[[], torch.Tensor] | None = None,
    ) -> None:
        self.batch = batch
        self.size = size
        self.dtype = dtype
        self.device = device
        self.symmetric = symmetric
        self.positive_definite = positive_definite
        self.expect_definite = expect_definite
        self.materialize = materialize
        # The number of right-hand sides in a row that share each distinct matrix (see RepeatedOperator).
        self.repeats = 1
        # What a solver wants to keep with the distinct matrices, such as a factorisation.
        self.memo: dict[Hashable, Any] = {}

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(batch, n, n)``."""
        return (self.batch, self.size, self.size)

    @abstractmethod
    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        """Return A v for ``v`` of shape (batch, n)."""

    @abstractmethod
    def rmatvec(self, v: torch.Tensor) -> torch.Tensor:
        """Return Aᵀ v for ``v`` of shape (batch, n)."""

    def matmat(self, vs: torch.Tensor) -> torch.Tensor:
        """Return A v for each of the k vectors in ``vs`` (k, batch, n)."""
        return torch.stack([self.matvec(v) for v in vs]) if len(vs) else torch.empty_like(vs)

    def rmatmat(self, vs: torch.Tensor) -> torch.Tensor:
        """Return Aᵀ v for each of the k vectors in ``vs`` (k, batch, n)."""
        return torch.stack([self.rmatvec(v) for v in vs]) if len(vs) else torch.empty_like(vs)

    @cached_property
    def _dense(self) -> torch.Tensor:
        if self.materialize is not None:
            try:
                return self.materialize()
            except RuntimeError:  # something in the function cannot be transformed; products always can be made
                self.materialize = None
        n = self.size
        units = torch.eye(n, dtype=self.dtype, device=self.device).unsqueeze(1).expand(n, self.batch, n)
        # A row of a symmetric matrix is its column, and rows are what a reverse pass gives.
        if self.symmetric:
            matrix = self.matmat(units).movedim(0, -2)
            return 0.5 * (matrix + matrix.mT)
        return self.rmatmat(units).movedim(0, -2)  # (batch, n, n)

    def dense(self) -> torch.Tensor:
        """Return the matrices as one tensor (batch, n, n). It costs n products, and is kept."""
        return self._dense

    @property
    def T(self) -> LinearOperator:
        """The transpose."""
        return self if self.symmetric else TransposedOperator(self)

    @property
    def distinct(self) -> LinearOperator:
        """The operator with each matrix once."""
        return self

    def __matmul__(self, v: torch.Tensor) -> torch.Tensor:
        if v.shape != (self.batch, self.size):
            raise ShapeError(
                f"LinearOperator: expected a vector of shape {(self.batch, self.size)}, got {tuple(v.shape)}; "
                "give one vector for each matrix of the batch"
            )
        return self.matvec(v)

    def __add__(self, other: LinearOperator) -> LinearOperator:
        return SumOperator((self, other))

    def __mul__(self, factor: float) -> LinearOperator:
        return ScaledOperator(self, factor)

    __rmul__ = __mul__

    def __repr__(self) -> str:
        flags = ", symmetric" if self.symmetric else ""
        flags += ", positive definite" if self.positive_definite else ""
        return f"{type(self).__name__}(shape={self.shape}, dtype={self.dtype}{flags})"


class TransposedOperator(LinearOperator):
    """Aᵀ.

    Parameters
    ----------
    base
        A, a batch of matrices (batch, n, n).

    Examples
    --------
    >>> import torch
    >>> from bilevel.operators import DenseOperator, TransposedOperator
    >>> TransposedOperator(DenseOperator(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))) @ torch.ones(1, 2)
    tensor([[1., 3.]])
    """

    def __init__(self, base: LinearOperator) -> None:
        super().__init__(base.batch, base.size, base.dtype, base.device)
        self.base = base

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        return self.base.rmatvec(v)

    def rmatvec(self, v: torch.Tensor) -> torch.Tensor:
        return self.base.matvec(v)

    def matmat(self, vs: torch.Tensor) -> torch.Tensor:
        return self.base.rmatmat(vs)

    def rmatmat(self, vs: torch.Tensor) -> torch.Tensor:
        return self.base.matmat(vs)

    def dense(self) -> torch.Tensor:
        return self.base.dense().mT

    @property
    def T(self) -> LinearOperator:
        return self.base


class ScaledOperator(LinearOperator):
    """c A, for a number c.

    Parameters
    ----------
    base
        A, a batch of matrices (batch, n, n).
    factor
        c.

    Examples
    --------
    >>> import torch
    >>> from bilevel.operators import DenseOperator, ScaledOperator
    >>> ScaledOperator(DenseOperator(torch.eye(2)), 2.0) @ torch.ones(1, 2)
    tensor([[2., 2.]])
    """

    def __init__(self, base: LinearOperator, factor: float) -> None:
        super().__init__(
            base.batch, base.size, base.dtype, base.device,
            symmetric=base.symmetric, positive_definite=base.positive_definite and factor > 0,
        )  # fmt: skip
        self.base, self.factor = base, factor

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        return self.factor * self.base.matvec(v)

    def rmatvec(self, v: torch.Tensor) -> torch.Tensor:
        return self.factor * self.base.rmatvec(v)

    def matmat(self, vs: torch.Tensor) -> torch.Tensor:
        return self.factor * self.base.matmat(vs)

    def rmatmat(self, vs: torch.Tensor) -> torch.Tensor:
        return self.factor * self.base.rmatmat(vs)

    def dense(self) -> torch.Tensor:
        return self.factor * self.base.dense()


class SumOperator(LinearOperator):
    """A + B + …, all of one shape.

    Parameters
    ----------
    terms
        Batches of matrices, all (batch, n, n) and of one dtype.

    Raises
    ------
    ShapeError
        If the shapes or the dtypes differ.

    Examples
    --------
    >>> import torch
    >>> from bilevel.operators import DenseOperator, SumOperator
    >>> SumOperator([DenseOperator(torch.eye(2)), DenseOperator(torch.eye(2))]) @ torch.ones(1, 2)
    tensor([[2., 2.]])
    """

    def __init__(self, terms: Sequence[LinearOperator]) -> None:
        first = terms[0]
        for term in terms[1:]:
            if term.shape != first.shape or term.dtype != first.dtype:
                raise ShapeError(
                    f"SumOperator: expected operators of one shape and dtype, got {first!r} and {term!r}; "
                    "only like batches of matrices can be added"
                )
        super().__init__(
            first.batch, first.size, first.dtype, first.device,
            symmetric=all(term.symmetric for term in terms),
            positive_definite=all(term.positive_definite for term in terms),
        )  # fmt: skip
        self.terms = tuple(terms)

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        return torch.stack([term.matvec(v) for term in self.terms]).sum(0)

    def rmatvec(self, v: torch.Tensor) -> torch.Tensor:
        return torch.stack([term.rmatvec(v) for term in self.terms]).sum(0)

    def matmat(self, vs: torch.Tensor) -> torch.Tensor:
        return torch.stack([term.matmat(vs) for term in self.terms]).sum(0)

    def rmatmat(self, vs: torch.Tensor) -> torch.Tensor:
        return torch.stack([term.rmatmat(vs) for term in self.terms]).sum(0)

    def dense(self) -> torch.Tensor:
        return torch.stack([term.dense() for term in self.terms]).sum(0)
