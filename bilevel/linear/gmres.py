"""GMRES for matrices without symmetry, batched with a mask for each problem."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel.linear._base import LinearSolver
from bilevel.linear._preconditioner import Preconditioner, begin, check_preconditioner
from bilevel.linear._solution import LinearSolution
from bilevel.operators import LinearOperator
from bilevel.reports import Status
from bilevel.setting_checks import check_steps

__all__ = ["GMRES"]

_BASIS_BYTES = 2**29
_LONGEST_CYCLE = 500
_FIRST_ROOM = 24
# Orthogonalise again if less than this share of a vector is left.
_CANCELLED = 0.1


@dataclass(frozen=True)
class GMRES(LinearSolver):
    """Generalised minimal residuals: any regular A, one product for each step.

    Each step adds a vector to an orthonormal basis of the Krylov space, and orthogonalises it again where digits were lost.
    The residual norm follows from the left null vector of the Hessenberg matrix, at one inner product a step. The
    least-squares problem is solved once a cycle. A cycle ends with the true residual.

    If A is singular and b is in its range, the solution found from zero lies in the range of A. For a symmetric A it has
    the smallest norm. For another A, a layer that examines A removes the part in the null space.

    Parameters
    ----------
    max_steps
        The largest number of steps over all cycles; None: enough for n steps twice. A number is a budget.
    restart
        Steps in a cycle; it costs the memory of as many vectors. By default n, but at most 500 steps and 512 MiB. A
        restart can stagnate although a longer cycle would converge.
    preconditioner
        r ↦ M⁻¹r on tensors (batch, n), applied on the right, so that the residual is the true one.

    Raises
    ------
    ArgumentError
        If a setting is out of its range.

    References
    ----------
    Saad & Schultz 1986; the residual norm without rotations: Ayachour, "A fast implementation for GMRES method", 2003.

    Examples
    --------
    >>> import torch
    >>> from bilevel.operators import DenseOperator
    >>> A = DenseOperator(torch.tensor([[2.0, 1.0], [0.0, 4.0]]))
    >>> GMRES()(A, torch.tensor([[4.0, 8.0]]))
    tensor([[1., 2.]])
    """

    max_steps: int | None = None
    restart: int | None = None
    preconditioner: Preconditioner | None = None

    def __post_init__(self) -> None:
        check_steps("GMRES", "max_steps", self.max_steps, optional=True)
        check_steps("GMRES", "restart", self.restart, optional=True)
        check_preconditioner("GMRES", self.preconditioner)

    def solve(
        self, operator: LinearOperator, rhs: torch.Tensor, threshold: torch.Tensor, start: torch.Tensor | None = None
    ) -> LinearSolution:
        batch, n = rhs.shape
        limit = self.max_steps if self.max_steps is not None else min(2 * n + 20, 20_000)
        # m vectors and their Hessenberg matrix: m (n + m) numbers for each problem.
        numbers = _BASIS_BYTES / max(1, batch * rhs.element_size())
        room = max(2, int((n**2 + 4 * numbers) ** 0.5 - n) // 2 - 1)
        cycle = min(self.restart or _LONGEST_CYCLE, n, room)
        eps = torch.finfo(rhs.dtype).eps
        floor = 0.1 * eps * rhs.norm(dim=-1)

        x, r = begin(operator, rhs, start)
        norm = r.norm(dim=-1)
        running = torch.full(norm.shape, int(Status.RUNNING), dtype=torch.int64, device=rhs.device)
        status = torch.where(norm <= threshold, torch.zeros_like(running), running)
        iterations = torch.zeros_like(status)
        while True:
            # Each problem has its own budget: an early restart does not count the long cycle of other problems.
            left = torch.where(status == Status.RUNNING, limit - iterations, 0)
            active = left > 0
            steps = min(cycle, int(left.max())) if len(left) else 0
            if not steps:
                break
            goal = torch.maximum(threshold, floor)
            update, used, deficient = self._cycle(operator, r, goal, left, steps)
            iterations = iterations + used
            moved = x + update
            residual = rhs - operator.matvec(moved)
            fresh = residual.norm(dim=-1)
            better = active & (fresh < norm)
            x = torch.where(better.unsqueeze(-1), moved, x)
            r = torch.where(better.unsqueeze(-1), residual, r)
            broken = active & ~torch.isfinite(fresh)
            # The Krylov space is exhausted, or A maps a part of it to zero, or a whole cycle gained almost nothing; and
            # the residual is not small.
            still = torch.where(better, fresh, norm)
            exhausted = deficient & (still > 1e-3 * norm)
            idle = (used >= cycle) & (still > 0.999 * norm) | (used < left.clamp_max(steps)) & (still > 0.5 * norm)
            # For an ill-conditioned system the rest is rounding. For a singular one it is a part of b.
            singular = exhausted & (still > eps**0.25 * rhs.norm(dim=-1))
            verdict = torch.where(singular, int(Status.SINGULAR), int(Status.STAGNATED))
            status = torch.where(active & (exhausted | idle), verdict, status)
            status = torch.where(broken, int(Status.NOT_FINITE), status)
            norm = still
            status = torch.where(active & (norm <= threshold), int(Status.CONVERGED), status)
        status = torch.where(status == Status.RUNNING, int(Status.MAX_STEPS), status)
        return LinearSolution(x, iterations, status, r)

    def _cycle(
        self, operator: LinearOperator, r: torch.Tensor, goal: torch.Tensor, left: torch.Tensor, steps: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the update (batch, n), the steps of each problem, and where A is singular on the Krylov space.

        ``left`` (batch,): the largest number of steps of each problem; zero for problems that do not take part.
        """
        batch, n = r.shape
        active = left > 0
        eps = torch.finfo(r.dtype).eps
        beta = r.norm(dim=-1)
        # Memory grows as needed: to fill memory that a short solve never uses would cost more than the solve.
        room = min(steps, _FIRST_ROOM)
        V, H = r.new_empty(batch, room + 1, n), r.new_zeros(batch, room + 1, room)
        null = r.new_zeros(batch, steps + 1)
        null[:, 0] = 1.0
        V[:, 0] = torch.where(active.unsqueeze(-1), r / beta.clamp_min(torch.finfo(r.dtype).tiny).unsqueeze(-1), 0.0)
        weight = torch.ones_like(beta)
        used = torch.zeros(batch, dtype=torch.int64, device=r.device)
        happy = torch.zeros_like(active)
        width = 0
        for j in range(steps):
            if j == room:
                more = min(room, steps - room)
                V = torch.cat([V, V.new_empty(batch, more, n)], dim=1)
                H = torch.nn.functional.pad(H, (0, more, 0, more))
                room += more
            v = V[:, j]
            w = operator.matvec(v if self.preconditioner is None else self.preconditioner(v))
            size = w.norm(dim=-1)
            basis = V[:, : j + 1]
            column = w.unsqueeze(-1)
            h = basis @ column
            column = torch.baddbmm(column, basis.mT, h, alpha=-1)
            after = column.squeeze(-1).norm(dim=-1)
            lost = active & ~(after > _CANCELLED * size)
            if bool(lost.any()):
                # The remainder is small, and has few correct digits: orthogonalise again. Other problems do not change,
                # so that no problem depends on another.
                again = torch.where(lost[:, None, None], basis @ column, 0.0)
                column = torch.baddbmm(column, basis.mT, again, alpha=-1)
                h = h + again
                after = column.squeeze(-1).norm(dim=-1)
            h, w = h.squeeze(-1), column.squeeze(-1)
            spent = active & (after <= 4 * eps * size)
            after = torch.where(spent, torch.zeros_like(after), after)
            # A finished problem gets a column whose unknown is zero.
            H[:, : j + 1, j] = torch.where(active.unsqueeze(-1), h, 0.0)
            H[:, j + 1, j] = torch.where(active, after, 1.0)
            inverse = torch.where(active & ~spent, 1 / after, torch.zeros_like(after))
            torch.mul(w, inverse.unsqueeze(-1), out=V[:, j + 1])
            entry = -(null[:, : j + 1] * h).sum(dim=-1) * inverse
            null[:, j + 1] = entry
            weight = weight + torch.where(active, entry**2, 0.0)
            used = used + active
            width = j + 1
            happy = happy | spent
            active = active & ~spent & (beta > goal * weight.sqrt()) & torch.isfinite(weight) & (used < left)
            if not bool(active.any()):
                break
        H, V = H[:, : width + 1, :width], V[:, :width]
        # An exhausted space ends in a row of zeros, and lstsq by factorisation needs full rank.
        Q, R = torch.linalg.qr(H)
        first = Q[:, 0, :] * beta.unsqueeze(-1)
        pivots = R.diagonal(dim1=-2, dim2=-1)
        flat = pivots.abs() <= 16 * eps * R.abs().amax(dim=(-2, -1)).unsqueeze(-1)
        safe = R + torch.diag_embed(torch.where(flat, 1 - pivots, 0.0))
        y = torch.linalg.solve_triangular(safe, torch.where(flat, 0.0, first).unsqueeze(-1), upper=True)
        update = (V.mT @ y).squeeze(-1)
        if self.preconditioner is not None:
            update = self.preconditioner(update)
        return torch.where((used > 0).unsqueeze(-1), update, 0.0), used, happy | flat.any(dim=-1)
