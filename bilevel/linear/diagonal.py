"""Diagonal matrices: one product gives all entries."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel.linear._base import LinearSolver
from bilevel.linear._solution import LinearSolution
from bilevel.operators import LinearOperator
from bilevel.reports import Status

__all__ = ["Diagonal"]


@dataclass(frozen=True)
class Diagonal(LinearSolver):
    """Solve x = b / (A 1) with two products, for a diagonal matrix A of any size.

    The Jacobian of independent scalar equations is diagonal. If the matrix is not diagonal, a residual remains and is reported, as for any solver.

    References
    ----------
    The row sums of a diagonal matrix are its entries; no published method.

    Examples
    --------
    >>> import torch
    >>> from bilevel.operators import DenseOperator
    >>> A = DenseOperator(torch.tensor([[2.0, 0.0], [0.0, 4.0]]))
    >>> Diagonal()(A, torch.tensor([[1.0, 1.0]]))
    tensor([[0.5000, 0.2500]])
    """

    @property
    def knows_null_space(self) -> bool:
        return True

    def solve(
        self, operator: LinearOperator, rhs: torch.Tensor, threshold: torch.Tensor, start: torch.Tensor | None = None
    ) -> LinearSolution:
        diagonal = operator.matvec(torch.ones_like(rhs))
        zero = diagonal == 0
        x = torch.where(zero, 0.0, rhs / torch.where(zero, 1.0, diagonal))
        status = torch.where(zero.any(dim=-1), int(Status.MINIMUM_NORM), int(Status.CONVERGED))
        return LinearSolution(x, torch.full_like(status, 2), status)
