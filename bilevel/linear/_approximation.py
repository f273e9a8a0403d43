"""Approximate inverses that a few products make: solvers with a bias, and preconditioners without one."""

from __future__ import annotations

from abc import abstractmethod
from typing import Protocol

import torch

from bilevel.errors import ArgumentError
from bilevel.linear._base import LinearSolver
from bilevel.linear._preconditioner import Preconditioner
from bilevel.linear._solution import LinearSolution
from bilevel.operators import LinearOperator
from bilevel.reports import Status

__all__ = ["Approximation", "Factor", "as_preconditioner"]


class Factor(Protocol):
    """M⁻¹ of a batch of matrices. It keeps no reference to the operator, and so to no graph."""

    def solve(self, r: torch.Tensor) -> torch.Tensor:
        """Return M⁻¹ r for ``r`` (repeats, batch, n)."""

    def state(self) -> list[torch.Tensor | None]:
        """Return the tensors that :meth:`Approximation.restored` makes this factor of."""


class Approximation(LinearSolver):
    """A symmetric matrix M near H that is easy to invert. ``factor`` makes it from products with H."""

    @property
    def has_budget(self) -> bool:
        return True  # the number of products is chosen, and the bias with it

    @abstractmethod
    def factor(self, base: LinearOperator) -> Factor:
        """Return M⁻¹ for the distinct matrices of ``base``, symmetric."""

    @abstractmethod
    def products(self, size: int) -> int:
        """Return how many products the factor of matrices of order ``size`` costs."""

    @abstractmethod
    def restored(self, state: list[torch.Tensor | None]) -> Factor:
        """Return the factor with this ``state``."""

    def solve(
        self, operator: LinearOperator, rhs: torch.Tensor, threshold: torch.Tensor, start: torch.Tensor | None = None
    ) -> LinearSolution:
        x = self.preconditioner(operator)(rhs)
        steps = torch.full((len(rhs),), self.products(operator.size), dtype=torch.int64, device=rhs.device)
        return LinearSolution(x, steps, torch.full_like(steps, Status.MAX_STEPS))

    def preconditioner(self, operator: LinearOperator) -> Preconditioner:
        """Return r ↦ M⁻¹ r on tensors (batch, n). The operator keeps the factor."""
        base = operator.distinct
        factor = base.memo.get(self)
        if factor is None:
            factor = base.memo[self] = self.checked_factor(base)
        return as_preconditioner(factor, operator)

    def checked_factor(self, base: LinearOperator) -> Factor:
        """Return :meth:`factor`, or raise :class:`ArgumentError` for a matrix that is not known to be symmetric."""
        if not base.symmetric:
            raise ArgumentError(
                f"{self.name}: expected a symmetric matrix, got one that is not declared symmetric; pass symmetric=True if it is, or take GMRES()"
            )
        return self.factor(base)


def as_preconditioner(factor: Factor, operator: LinearOperator) -> Preconditioner:
    """Return r ↦ M⁻¹ r on tensors (batch, n), with the distinct matrices repeated as ``operator`` repeats them."""
    shape = (operator.repeats, operator.distinct.batch, operator.size)
    return lambda r: factor.solve(r.reshape(shape)).reshape(r.shape)
