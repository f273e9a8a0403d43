"""LSMR: least squares and minimum-norm solutions by products with A and Aᵀ."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel.linear._base import LinearSolver
from bilevel.linear._lsmr import lsmr
from bilevel.linear._preconditioner import begin
from bilevel.linear._solution import LinearSolution
from bilevel.operators import LinearOperator
from bilevel.operators._rectangular import rectangular_of
from bilevel.reports import Status
from bilevel.setting_checks import check_steps

__all__ = ["LSMR"]

_MOST_RUNS = 6


@dataclass(frozen=True)
class LSMR(LinearSolver):
    """LSMR for any A, square or rectangular. A step costs two products.

    It is mathematically MINRES on the normal equations, without their loss of digits. If there are many solutions, it
    finds the minimum-norm one. Right vectors are kept orthogonal to all former ones, at the memory of one vector a
    step, up to 256 MiB. A problem ends on its *true* residual. If the recursive residual was wrong, it restarts from
    the true one.

    Parameters
    ----------
    max_steps
        The largest number of steps; None: enough for rounding to end the iteration. A number is a budget: spending it
        without a tolerance is a success.

    Raises
    ------
    ArgumentError
        If the setting is out of its range.

    References
    ----------
    Fong & Saunders, "LSMR: an iterative algorithm for sparse least-squares problems", SIAM J. Sci. Comput. 33, 2011.

    Examples
    --------
    >>> import torch
    >>> from bilevel.operators import DenseOperator
    >>> A = DenseOperator(torch.tensor([[4.0, 1.0], [-1.0, 3.0]]))
    >>> LSMR()(A, torch.tensor([[5.0, 2.0]])).round(decimals=4)
    tensor([[1., 1.]])
    """

    max_steps: int | None = None

    def __post_init__(self) -> None:
        check_steps("LSMR", "max_steps", self.max_steps, optional=True)

    def solve(
        self, operator: LinearOperator, rhs: torch.Tensor, threshold: torch.Tensor, start: torch.Tensor | None = None
    ) -> LinearSolution:
        A = rectangular_of(operator)
        limit = self.max_steps if self.max_steps is not None else min(max(4 * operator.size, 100), 20_000)
        x, r = begin(operator, rhs, start)
        norm, eps = r.norm(dim=-1), torch.finfo(rhs.dtype).eps
        running = torch.full(norm.shape, int(Status.RUNNING), dtype=torch.int64, device=rhs.device)
        status = torch.where(norm <= threshold, int(Status.CONVERGED), running)
        status = torch.where(torch.isfinite(norm), status, int(Status.NOT_FINITE))
        steps = torch.zeros_like(status)
        for _ in range(_MOST_RUNS):
            active = (status == Status.RUNNING) & (steps < limit)
            if not bool(active.any()):
                break
            right = torch.where(active.unsqueeze(-1), r, 0.0)
            left = torch.where(active, limit - steps, 0)
            singular = torch.zeros_like(active)
            if A is None:
                normal = operator.rmatvec(right)
                run = lsmr(operator.matvec, operator.rmatvec, normal, 0 * norm, left, right, 0.5 * threshold)
            else:
                repeated = _Repeated(A.matvec, A.rmatvec, operator.repeats)
                run = lsmr(
                    repeated.matvec, repeated.rmatvec, right, 0.5 * torch.where(active, threshold, torch.inf), left
                )
            steps = steps + torch.where(active, run.steps, 0)
            moved = x + run.x
            residual = rhs - operator.matvec(moved)
            fresh = residual.norm(dim=-1)
            if A is None:
                # Aᵀ maps the remainder to zero: b is not in the range, or the remainder is rounding.
                pulled = operator.rmatvec(residual).norm(dim=-1)
                singular = active & (fresh > eps**0.5 * rhs.norm(dim=-1)) & (pulled <= eps**0.75 * normal.norm(dim=-1))
            better = active & (fresh < norm)
            x = torch.where(better.unsqueeze(-1), moved, x)
            r = torch.where(better.unsqueeze(-1), residual, r)
            idle = active & ~(fresh <= 0.5 * norm) & (steps < limit)
            broken = active & ~torch.isfinite(fresh)
            norm = torch.where(better, fresh, norm)
            status = torch.where(idle, int(Status.STAGNATED), status)
            status = torch.where(singular, int(Status.MINIMUM_NORM), status)
            status = torch.where(broken, int(Status.NOT_FINITE), status)
            status = torch.where(active & (norm <= threshold), int(Status.CONVERGED), status)
        spent = (status == Status.RUNNING) & (steps >= limit)
        status = torch.where(status == Status.RUNNING, int(Status.STAGNATED), status)
        status = torch.where(spent, int(Status.MAX_STEPS), status)
        return LinearSolution(x, 2 * steps, status, r)


@dataclass(frozen=True)
class _Repeated:
    """Products with A for right-hand sides that share A."""

    forward: object
    backward: object
    repeats: int

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        return self._each(self.forward, v)

    def rmatvec(self, u: torch.Tensor) -> torch.Tensor:
        return self._each(self.backward, u)

    def _each(self, product: object, vectors: torch.Tensor) -> torch.Tensor:
        assert callable(product)
        if self.repeats == 1:
            found: torch.Tensor = product(vectors)
            return found
        parts = vectors.reshape(self.repeats, -1, vectors.shape[-1])
        return torch.cat([product(part) for part in parts])
