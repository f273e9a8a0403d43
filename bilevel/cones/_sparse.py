"""The Jacobian of the conditions of sparse cone programs, factorised by SuperLU for the polish and for every derivative."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bilevel.cones._conditions import Numbers
from bilevel.linear._base import LinearSolver
from bilevel.linear._solution import LinearSolution
from bilevel.linear.exact import Exact
from bilevel.operators import LinearOperator, TransposedOperator
from bilevel.reports import Status

__all__ = ["FactorisedJacobians", "SparseJacobian"]

_REFINEMENTS = 4
_DENSE_ORDER = 2048  # up to which a singular matrix is factorised as a dense one


class SparseJacobian:
    """The factorised J of one problem.

    Parameters
    ----------
    numbers
        P and A.
    blocks
        The blocks (count, d, d) of the Jacobian D of the projection, and the rows (count, d) of each.
    """

    def __init__(self, numbers: Numbers, blocks: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        import scipy.sparse as sp
        from scipy.sparse.linalg import splu

        m = len(numbers.b)
        entries = [np.zeros((3, 0))]
        for block, rows in blocks:
            columns = rows.unsqueeze(-2).expand(block.shape)
            entries.append(torch.stack([block, rows.unsqueeze(-1).expand(block.shape), columns]).reshape(3, -1).numpy())
        values, rows, columns = np.concatenate(entries, 1)
        D = sp.coo_matrix((values, (rows.astype(int), columns.astype(int))), shape=(m, m)).tocsc()
        self.J = sp.bmat([[numbers.P, numbers.A.T @ (D - sp.eye(m))], [numbers.A, D]], format="csc")
        self.J.eliminate_zeros()
        self.lu: Any = None
        try:
            self.lu = splu(self.J)
        except RuntimeError:  # exactly singular
            return

    def solve(self, right: np.ndarray, trans: str = "N") -> np.ndarray:
        """Return J⁻¹ r, or J⁻ᵀ r with ``trans="T"``; NaN where J is singular."""
        if self.lu is None or not np.isfinite(right).all():
            return np.full_like(right, np.nan)
        matrix = self.J if trans == "N" else self.J.T
        best = d = self.lu.solve(right, trans=trans)
        smallest = float("inf")
        for _ in range(_REFINEMENTS):
            left = right - matrix @ d
            size = float(np.linalg.norm(left))
            if not size < 0.5 * smallest:
                break
            best, smallest = d, size
            d = d + self.lu.solve(left, trans=trans)
        return np.asarray(best)


@dataclass(frozen=True, eq=False)
class FactorisedJacobians(LinearSolver):
    """Solve with the factors of the forward pass.

    Parameters
    ----------
    jacobians
        The factorised J of each problem.
    """

    jacobians: tuple[SparseJacobian, ...]

    @property
    def name(self) -> str:
        return "Exact"

    def serves(self, operator: LinearOperator) -> bool:
        """Return whether the matrices of ``operator`` are as many, and of the same size."""
        base = operator.distinct
        return base.batch == len(self.jacobians) and all(one.J.shape[0] == base.size for one in self.jacobians)

    def solve(
        self, operator: LinearOperator, rhs: torch.Tensor, threshold: torch.Tensor, start: torch.Tensor | None = None
    ) -> LinearSolution:
        base = operator.distinct
        trans = "T" if isinstance(base, TransposedOperator) else "N"
        rows = rhs.reshape(operator.repeats, base.batch, base.size).numpy()
        each = [[one.solve(row, trans) for one, row in zip(self.jacobians, some, strict=True)] for some in rows]
        x = torch.from_numpy(np.array(each)).reshape(rhs.shape)
        steps = torch.full(rhs.shape[:1], base.size)
        # A large multiple of the right-hand side is the sign of a singular matrix, which the null space of a dense one tells more about.
        if base.size <= _DENSE_ORDER and not bool((x.norm(dim=-1) <= 1e11 * rhs.norm(dim=-1)).all()):
            return Exact().solve(operator, rhs, threshold, start)
        lost = ~torch.isfinite(x).all(-1)
        status = torch.where(lost, int(Status.SINGULAR), int(Status.CONVERGED))
        return LinearSolution(x.nan_to_num(0.0, 0.0, 0.0), steps, status)
