"""BiCGStab for matrices without symmetry, with a memory that does not grow with the steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel.linear._base import LinearSolver
from bilevel.linear._preconditioner import Preconditioner, begin, check_preconditioner
from bilevel.linear._solution import LinearSolution
from bilevel.operators import LinearOperator
from bilevel.reports import Status
from bilevel.setting_checks import check_steps

__all__ = ["BiCGStab"]

_MOST_RESTARTS = 10


@dataclass(frozen=True)
class BiCGStab(LinearSolver):
    """Stabilised bi-conjugate gradients: any regular A, two products for each step and seven vectors of memory.

    If the recurrence would divide by zero, it restarts from the true residual with a new shadow vector. After ten
    restarts it ends as a breakdown. Problems end on their true residual. A singular A is treated as by :class:`GMRES`.

    Parameters
    ----------
    max_steps
        The largest number of steps; None: several times n products. A number is a budget: spending it without a
        tolerance is a success.
    preconditioner
        r ↦ M⁻¹r on tensors (batch, n), applied on the right.

    Raises
    ------
    ArgumentError
        If a setting is out of its range.

    References
    ----------
    van der Vorst, "Bi-CGSTAB: a fast and smoothly converging variant of Bi-CG", 1992.

    Examples
    --------
    >>> import torch
    >>> from bilevel.operators import DenseOperator
    >>> A = DenseOperator(torch.tensor([[2.0, 1.0], [0.0, 4.0]]))
    >>> BiCGStab()(A, torch.tensor([[4.0, 8.0]])).round(decimals=4)
    tensor([[1., 2.]])
    """

    max_steps: int | None = None
    preconditioner: Preconditioner | None = None

    def __post_init__(self) -> None:
        check_steps("BiCGStab", "max_steps", self.max_steps, optional=True)
        check_preconditioner("BiCGStab", self.preconditioner)

    def solve(
        self, operator: LinearOperator, rhs: torch.Tensor, threshold: torch.Tensor, start: torch.Tensor | None = None
    ) -> LinearSolution:
        limit = self.max_steps if self.max_steps is not None else min(max(10 * operator.size, 100), 20_000)
        eps = torch.finfo(rhs.dtype).eps
        precondition = self.preconditioner if self.preconditioner is not None else _same
        x, r = begin(operator, rhs, start)
        norm = r.norm(dim=-1)
        goal = torch.maximum(threshold, 0.1 * eps * rhs.norm(dim=-1))
        status = torch.full(norm.shape, int(Status.RUNNING), dtype=torch.int64, device=rhs.device)
        status = torch.where(norm <= threshold, int(Status.CONVERGED), status)
        iterations, restarts = torch.zeros_like(status), torch.zeros_like(status)
        best, least = x, norm
        shadow, p, v = r, torch.zeros_like(r), torch.zeros_like(r)
        rho = alpha = omega = torch.ones_like(norm)
        for _ in range(limit):
            active = status == Status.RUNNING
            if not bool(active.any()):
                break
            fresh = (shadow * r).sum(dim=-1)
            beta = (fresh / rho) * (alpha / omega)
            p = _masked(active, r + beta.unsqueeze(-1) * (p - omega.unsqueeze(-1) * v))
            y = precondition(p)
            v = _masked(active, operator.matvec(y))
            slope = (shadow * v).sum(dim=-1)
            alpha = fresh / slope
            s = r - alpha.unsqueeze(-1) * v
            z = precondition(s)
            t = operator.matvec(z)
            square = (t * t).sum(dim=-1)
            omega = torch.where(square > 0, (t * s).sum(dim=-1) / square, torch.zeros_like(square))
            moved = x + alpha.unsqueeze(-1) * y + omega.unsqueeze(-1) * z
            after = s - omega.unsqueeze(-1) * t
            sound = active & torch.isfinite(moved).all(dim=-1) & torch.isfinite(after).all(dim=-1)
            x, r = torch.where(sound.unsqueeze(-1), moved, x), torch.where(sound.unsqueeze(-1), after, r)
            rho = fresh
            norm = r.norm(dim=-1)
            iterations = iterations + active
            scale = shadow.norm(dim=-1) * norm
            degenerate = active & (~sound | (omega == 0) | (fresh.abs() <= eps**2 * scale) | (slope == 0))
            event = active & ((norm <= goal) | degenerate)
            if not bool(event.any()):
                continue
            true = rhs - operator.matvec(x)
            actual = true.norm(dim=-1)
            improved = event & (actual < least)
            stuck = event & ~improved & (restarts > 0)
            best = torch.where(improved.unsqueeze(-1), x, best)
            least = torch.where(improved, actual, least)
            status = torch.where(event & (actual <= threshold), int(Status.CONVERGED), status)
            over = event & (status == Status.RUNNING) & (stuck | (restarts >= _MOST_RESTARTS))
            status = torch.where(over, torch.where(degenerate, int(Status.BREAKDOWN), int(Status.STAGNATED)), status)
            again = event & (status == Status.RUNNING)
            restarts = restarts + again
            # Restart from the best point, with another shadow vector.
            turn = again.unsqueeze(-1)
            x = torch.where(turn, best, x)
            r = torch.where(turn, rhs - operator.matvec(x), r)
            shadow = torch.where(turn, r + 0.1 * r.norm(dim=-1, keepdim=True) * r.sign().roll(1, -1), shadow)
            p, v = torch.where(turn, torch.zeros_like(p), p), torch.where(turn, torch.zeros_like(v), v)
            rho, alpha, omega = (torch.where(again, torch.ones_like(norm), old) for old in (rho, alpha, omega))
        ended = status == Status.RUNNING
        if bool(ended.any()):
            actual = (rhs - operator.matvec(x)).norm(dim=-1)
            best = torch.where((ended & (actual < least)).unsqueeze(-1), x, best)
        x = torch.where((status == Status.CONVERGED).unsqueeze(-1), x, best)
        status = torch.where(ended, int(Status.MAX_STEPS), status)
        return LinearSolution(x, iterations, status)


def _same(r: torch.Tensor) -> torch.Tensor:
    return r


def _masked(active: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.where(active.unsqueeze(-1), v, torch.zeros_like(v))
