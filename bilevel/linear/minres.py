"""MINRES for symmetric matrices, definite or not, batched with a mask for each problem."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel.errors import ArgumentError
from bilevel.linear._base import LinearSolver
from bilevel.linear._lsmr import Kept
from bilevel.linear._preconditioner import begin
from bilevel.linear._solution import LinearSolution
from bilevel.operators import LinearOperator
from bilevel.reports import Status
from bilevel.setting_checks import check_steps

__all__ = ["MINRES"]

_MOST_RUNS = 6


@dataclass(frozen=True)
class MINRES(LinearSolver):
    """MINRES for a symmetric A: positive definite, indefinite or singular. A step costs one product.

    ‖b − A x‖ decreases at each step. If there are many solutions, it finds the minimum-norm one. Lanczos vectors are
    kept orthogonal to all former ones, at the memory of one vector a step, up to 256 MiB. A problem ends on its *true*
    residual. If the recursive residual was wrong, it restarts from the true one. MINRES does not distinguish a minimum
    from a saddle; :class:`bilevel.CG` does.

    Parameters
    ----------
    max_steps
        The largest number of steps; None: enough for rounding to end the iteration. A number is a budget: spending it
        without a tolerance is a success.

    Raises
    ------
    ArgumentError
        If the setting is out of its range; on use, for a matrix that is not known to be symmetric.

    References
    ----------
    Paige & Saunders, "Solution of sparse indefinite systems of linear equations", SIAM J. Numer. Anal. 12, 1975; on singular systems, Choi, Paige
    & Saunders, "MINRES-QLP", SIAM J. Sci. Comput. 33, 2011, section 1.

    Examples
    --------
    >>> import torch
    >>> from bilevel.operators import DenseOperator
    >>> A = DenseOperator(torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64), symmetric=True)
    >>> MINRES()(A, torch.tensor([[3.0, 3.0]], dtype=torch.float64))
    tensor([[1., 1.]], dtype=torch.float64)
    """

    max_steps: int | None = None

    def __post_init__(self) -> None:
        check_steps("MINRES", "max_steps", self.max_steps, optional=True)

    def solve(
        self, operator: LinearOperator, rhs: torch.Tensor, threshold: torch.Tensor, start: torch.Tensor | None = None
    ) -> LinearSolution:
        if not operator.symmetric:
            raise ArgumentError(
                "MINRES: expected a symmetric matrix, got one that is not declared symmetric; pass symmetric=True if it is, or take GMRES() or LSMR()"
            )
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
            update, used, size = _run(operator, r, 0.5 * threshold, active, torch.where(active, limit - steps, 0))
            steps = steps + used
            moved = x + update
            residual = rhs - operator.matvec(moved)
            fresh = residual.norm(dim=-1)
            better = active & (fresh < norm)
            x = torch.where(better.unsqueeze(-1), moved, x)
            r = torch.where(better.unsqueeze(-1), residual, r)
            idle = active & ~(fresh <= 0.5 * norm) & (steps < limit)
            # A residual that A maps to zero is the part of b outside of the range.
            bent = active & (fresh > eps**0.5 * rhs.norm(dim=-1))
            outside = bent & (operator.matvec(r).norm(dim=-1) <= eps**0.5 * size * norm) if bool(bent.any()) else bent
            broken = active & ~torch.isfinite(fresh)
            norm = torch.where(better, fresh, norm)
            status = torch.where(idle, int(Status.STAGNATED), status)
            status = torch.where(outside, int(Status.MINIMUM_NORM), status)
            status = torch.where(broken, int(Status.NOT_FINITE), status)
            status = torch.where(active & (norm <= threshold), int(Status.CONVERGED), status)
        spent = (status == Status.RUNNING) & (steps >= limit)
        status = torch.where(status == Status.RUNNING, int(Status.STAGNATED), status)
        status = torch.where(spent, int(Status.MAX_STEPS), status)
        return LinearSolution(x, steps, status, r)


def _run(
    operator: LinearOperator, r: torch.Tensor, goal: torch.Tensor, active: torch.Tensor, limit: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the update (batch, n) that minimises ‖r − A x‖ over the Krylov space, the steps, and an estimate of ‖A‖."""
    tiny, eps = torch.finfo(r.dtype).tiny, torch.finfo(r.dtype).eps
    beta = torch.where(active, r.norm(dim=-1), 0.0)
    v, before = r / torch.where(beta > tiny, beta, torch.inf).unsqueeze(-1), torch.zeros_like(r)
    kept = Kept(v)
    x, w, w_before = torch.zeros_like(r), torch.zeros_like(r), torch.zeros_like(r)
    phi_bar, beta = beta, torch.zeros_like(beta)
    floor = torch.maximum(goal, 0.01 * eps * phi_bar)
    active = active & (phi_bar > floor)
    delta_bar = epsilon = sine = size = torch.zeros_like(beta)
    cosine = -torch.ones_like(beta)
    used = torch.zeros_like(limit)
    for _ in range(int(limit.max()) if len(r) else 0):
        active = active & (used < limit)
        if not bool(active.any()):
            break
        used = used + active
        product = operator.matvec(v)
        alpha = torch.linalg.vecdot(v, product)
        size = torch.maximum(size, torch.where(active, product.norm(dim=-1), 0.0))
        fresh = kept.orthogonal(product - alpha.unsqueeze(-1) * v - beta.unsqueeze(-1) * before)
        beta = fresh.norm(dim=-1)
        ended = beta <= 8 * eps * size  # the Krylov space is exhausted
        beta = torch.where(ended, 0.0, beta)
        before, v = v, fresh / torch.where(beta > 0, beta, torch.inf).unsqueeze(-1)
        kept.add(v)
        delta = cosine * delta_bar + sine * alpha
        gamma_bar = sine * delta_bar - cosine * alpha
        epsilon, last = sine * beta, epsilon
        delta_bar = -cosine * beta
        gamma = torch.hypot(gamma_bar, beta)
        flat = gamma <= 8 * eps * size  # A is singular on the space: this direction adds nothing
        safe = torch.where(flat, torch.inf, gamma)
        cosine, sine = torch.where(flat, 0.0, gamma_bar / safe), torch.where(flat, 1.0, beta / safe)
        w, w_before = (before - last.unsqueeze(-1) * w_before - delta.unsqueeze(-1) * w) / safe.unsqueeze(-1), w
        moved = x + (cosine * phi_bar).unsqueeze(-1) * w
        sound = active & torch.isfinite(moved).all(dim=-1)
        x = torch.where(sound.unsqueeze(-1), moved, x)
        phi_bar = torch.where(active, sine * phi_bar, phi_bar)
        active = sound & (phi_bar.abs() > floor) & ~ended & ~flat
    return x, used, size
