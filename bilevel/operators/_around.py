"""Operators around another one: damped, or each of its matrices many times over."""

from __future__ import annotations

import torch

from bilevel.operators._base import LinearOperator

__all__ = [
    "DampedOperator",
    "RepeatedOperator",
]


class DampedOperator(LinearOperator):
    """A + γI, for γ a number or one per matrix (batch,).

    Parameters
    ----------
    base
        A, a batch of matrices (batch, n, n).
    damping
        γ: a number, or a tensor (batch,).

    Examples
    --------
    >>> import torch
    >>> from bilevel.operators import DampedOperator, DenseOperator
    >>> DampedOperator(DenseOperator(torch.eye(2)), 0.5) @ torch.ones(1, 2)
    tensor([[1.5000, 1.5000]])
    """

    def __init__(self, base: LinearOperator, damping: float | torch.Tensor) -> None:
        nonnegative = bool(torch.as_tensor(damping >= 0).all())
        super().__init__(
            base.batch, base.size, base.dtype, base.device,
            symmetric=base.symmetric, positive_definite=base.positive_definite and nonnegative,
        )  # fmt: skip
        self.base = base
        self.damping = torch.as_tensor(damping, dtype=base.dtype, device=base.device).reshape(-1, 1)

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        return self.base.matvec(v) + self.damping * v

    def rmatvec(self, v: torch.Tensor) -> torch.Tensor:
        return self.base.rmatvec(v) + self.damping * v

    def matmat(self, vs: torch.Tensor) -> torch.Tensor:
        return self.base.matmat(vs) + self.damping * vs

    def rmatmat(self, vs: torch.Tensor) -> torch.Tensor:
        return self.base.rmatmat(vs) + self.damping * vs

    def dense(self) -> torch.Tensor:
        eye = torch.eye(self.size, dtype=self.dtype, device=self.device)
        return self.base.dense() + self.damping.unsqueeze(-1) * eye


class RepeatedOperator(LinearOperator):
    """Each matrix ``repeats`` times over: many right-hand sides for the matrices of ``base``.

    The batch is repeats · base.batch, with the repeats outermost, so that problem k · base.batch + i
    has matrix i. A factorisation is made once, of :attr:`distinct`.

    Parameters
    ----------
    base
        A batch of matrices (batch, n, n).
    repeats
        The number of right-hand sides for each matrix.

    Examples
    --------
    >>> import torch
    >>> from bilevel.operators import DenseOperator, RepeatedOperator
    >>> RepeatedOperator(DenseOperator(2 * torch.eye(2)), 3).shape
    (3, 2, 2)
    """

    def __init__(self, base: LinearOperator, repeats: int) -> None:
        super().__init__(
            base.batch * repeats, base.size, base.dtype, base.device,
            symmetric=base.symmetric, positive_definite=base.positive_definite,
        )  # fmt: skip
        self._base, self.repeats, self.memo = base, repeats, base.memo

    @property
    def distinct(self) -> LinearOperator:
        return self._base

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        grouped = v.reshape(self.repeats, self._base.batch, self.size)
        return self._base.matmat(grouped).reshape(self.batch, self.size)

    def rmatvec(self, v: torch.Tensor) -> torch.Tensor:
        grouped = v.reshape(self.repeats, self._base.batch, self.size)
        return self._base.rmatmat(grouped).reshape(self.batch, self.size)

    def dense(self) -> torch.Tensor:
        return self._base.dense().repeat(self.repeats, 1, 1)
