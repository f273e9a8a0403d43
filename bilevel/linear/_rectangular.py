"""Normal equations of rectangular matrices with right-hand sides outside of their range."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bilevel.linear._base import LinearSolver
from bilevel.linear._lsmr import lsmr
from bilevel.linear._solution import LinearSolution
from bilevel.operators import FunctionOperator, LinearOperator, RepeatedOperator
from bilevel.operators._rectangular import Rectangular, rectangular_of
from bilevel.reports import Status

__all__ = ["OnTheRange"]


@dataclass(frozen=True)
class OnTheRange(LinearSolver):
    """(AᵀA)⁺ d by another solver. The part of d outside the range of Aᵀ is left out, and does not count as residual.

    Derivatives of a solution of minimum norm have such right-hand sides.

    Parameters
    ----------
    solver
        The solver to use.
    squared
        Whether the operator is (AᵀA)². It then takes two solves.
    """

    solver: LinearSolver
    squared: bool = False

    @property
    def has_budget(self) -> bool:
        return self.solver.has_budget

    @property
    def name(self) -> str:
        return self.solver.name

    @property
    def knows_null_space(self) -> bool:
        return True

    def solve(
        self, operator: LinearOperator, rhs: torch.Tensor, threshold: torch.Tensor, start: torch.Tensor | None = None
    ) -> LinearSolution:
        if self.squared:
            return self._twice(operator, rhs, threshold)
        return self._once(operator, rhs, threshold, start)

    def _twice(self, operator: LinearOperator, rhs: torch.Tensor, threshold: torch.Tensor) -> LinearSolution:
        A = rectangular_of(operator)
        assert A is not None
        base = operator.distinct
        normal: LinearOperator = FunctionOperator(
            lambda v: A.rmatvec(A.matvec(v)), torch.empty(base.batch, base.size, dtype=base.dtype, device=base.device), symmetric=True
        )  # fmt: skip
        normal.memo = base.memo.setdefault(OnTheRange, {Rectangular: A})
        normal = RepeatedOperator(normal, operator.repeats) if operator.repeats > 1 else normal
        half = self._once(normal, rhs, threshold, None)
        size = half.x.norm(dim=-1)
        share = threshold / torch.where(rhs.norm(dim=-1) > 0, rhs.norm(dim=-1), 1.0)
        found = self._once(normal, half.x, share * size, None)
        failed = (half.status != Status.CONVERGED) & (half.status != Status.MINIMUM_NORM)
        status = torch.where(failed, half.status, found.status)
        # b − N N w = (b − N h) + N (h − N w).
        residual = _residual(normal, rhs, half) + normal.matvec(_residual(normal, half.x, found))
        return LinearSolution(found.x, half.iterations + found.iterations, status, residual)

    def _once(
        self, operator: LinearOperator, rhs: torch.Tensor, threshold: torch.Tensor, start: torch.Tensor | None
    ) -> LinearSolution:
        found = self.solver.solve(operator, rhs, threshold, start)
        residual = _residual(operator, rhs, found)
        A, short = rectangular_of(operator), ~(residual.norm(dim=-1) <= threshold)
        if A is None or not bool(short.any()):
            return found
        k = operator.repeats

        def repeated(product: Callable[[torch.Tensor], torch.Tensor], vectors: torch.Tensor) -> torch.Tensor:
            parts = vectors.reshape(k, -1, vectors.shape[-1])
            return torch.cat([product(part) for part in parts])

        # The part inside the range is Aᵀ s for the minimiser s of ‖Aᵀ s − d‖.
        threshold = torch.where(short, 0.0, torch.inf).to(rhs)
        steps = 4 * min(A.rows, A.columns) + 20
        run = lsmr(
            lambda u: repeated(A.rmatvec, u),
            lambda v: repeated(A.matvec, v),
            repeated(A.matvec, torch.where(short.unsqueeze(-1), rhs, 0.0)),
            threshold,
            steps,
        )
        inside = torch.where(short.unsqueeze(-1), run.image, rhs)
        again = self.solver.solve(operator, torch.where(short.unsqueeze(-1), inside, 0.0), threshold)
        x = torch.where(short.unsqueeze(-1), again.x, found.x)
        return LinearSolution(
            x,
            found.iterations + torch.where(short, again.iterations, 0),
            torch.where(short, again.status, found.status),
            inside - operator.matvec(x),
        )


def _residual(operator: LinearOperator, rhs: torch.Tensor, found: LinearSolution) -> torch.Tensor:
    return rhs - operator.matvec(found.x) if found.residual is None else found.residual
