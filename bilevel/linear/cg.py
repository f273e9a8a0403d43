"""Conjugate gradients for symmetric positive definite matrices, batched with a mask for each problem."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel._checks import check_steps
from bilevel.linear._base import LinearSolution, LinearSolver, Preconditioner, begin, check_preconditioner
from bilevel.operators import LinearOperator
from bilevel.reports import Status

__all__ = ["CG"]

_BASIS_BYTES = 2**28
_MOST_REPLACEMENTS = 8


@dataclass(frozen=True)
class CG(LinearSolver):
    """Conjugate gradients: A symmetric positive definite, one product for each step.

    Differs from the textbook where that goes wrong. A problem ends on its *true* residual, recomputed when the
    recursive one says so, and goes on from the true one where they part. Negative curvature, pᵀAp < 0, proves that A is
    not positive definite: the problem ends there as indefinite, at its last iterate. In dtypes below float64, and in
    float64 once the two residuals have parted, residuals are kept orthogonal to all former ones, without which 20 steps
    on 20,000 unknowns in float32 lose a third of the answer.

    Parameters
    ----------
    max_steps
        The most steps; by default enough for rounding to end it. A number is a budget: with no tolerance asked,
        spending it is no failure.
    preconditioner
        r ↦ M⁻¹r on tensors (batch, n), symmetric positive definite.
    reorthogonalize
        Keep residuals orthogonal: memory of one vector a step, up to 256 MiB, beyond which the latest are kept. By default where
        the dtype or the residuals call for it.

    Raises
    ------
    ArgumentError
        If a setting is out of its range.

    References
    ----------
    Hestenes & Stiefel, "Methods of conjugate gradients for solving linear systems", 1952; residual replacement: van der
    Vorst & Ye 2000; reorthogonalisation: Simon, "The Lanczos algorithm with partial reorthogonalization", 1984.

    Examples
    --------
    >>> import torch
    >>> from bilevel.operators import DenseOperator
    >>> A = DenseOperator(torch.tensor([[4.0, 1.0], [1.0, 3.0]]), symmetric=True)
    >>> CG()(A, torch.tensor([[1.0, 2.0]]))
    tensor([[0.0909, 0.6364]])
    """

    max_steps: int | None = None
    preconditioner: Preconditioner | None = None
    reorthogonalize: bool | None = None

    def __post_init__(self) -> None:
        check_steps("CG", "max_steps", self.max_steps, optional=True)
        check_preconditioner("CG", self.preconditioner)

    def solve(
        self, operator: LinearOperator, rhs: torch.Tensor, threshold: torch.Tensor, start: torch.Tensor | None = None
    ) -> LinearSolution:
        limit = self.max_steps if self.max_steps is not None else min(max(10 * operator.size, 100), 20_000)
        eps = torch.finfo(rhs.dtype).eps
        precondition = self.preconditioner
        keep = self.reorthogonalize if self.reorthogonalize is not None else eps > 1e-12
        basis = _Basis(rhs, limit) if keep else None

        x, r = begin(operator, rhs, start)
        norm = r.norm(dim=-1)
        # Below this the recursive residual says nothing any more, whatever was asked.
        goal = torch.maximum(threshold, 0.1 * eps * rhs.norm(dim=-1)) ** 2
        tiny = operator.size * eps
        zero = torch.zeros_like(norm)
        running = torch.full(norm.shape, int(Status.RUNNING), dtype=torch.int64, device=rhs.device)
        status = torch.where(norm <= threshold, int(Status.CONVERGED), running)
        iterations = torch.zeros_like(status)
        active = status == Status.RUNNING
        largest, confirmed, replacements = zero, norm, 0  # confirmed: the true residual norm when last known
        true: torch.Tensor | None = None
        z = r if precondition is None else precondition(r)
        p, rz = z, torch.linalg.vecdot(r, z)
        # The fewest operations that keep the problems apart: a step has one product and, on the CPU, one look at a flag.
        for step in range(limit if bool(active.any()) else 0):
            if basis is not None:
                basis.add(r, z, rz)
            Ap = operator.matvec(p)
            curvature = torch.linalg.vecdot(p, Ap)
            quotient = curvature / torch.linalg.vecdot(p, p)
            largest = torch.maximum(largest, quotient)
            curved = active & (quotient > tiny * largest)
            alpha = torch.where(curved, rz / curvature, zero).unsqueeze(-1)
            x, true = torch.addcmul(x, alpha, p), None
            r = torch.addcmul(r, alpha, Ap, value=-1)
            if basis is not None:
                r = basis.remove_from(r)
            z = r if precondition is None else precondition(r)
            fresh = torch.linalg.vecdot(r, z)
            square = fresh if precondition is None else torch.linalg.vecdot(r, r)
            event = active & ~(curved & (square > goal))
            beta = torch.where(active, fresh / rz, zero)  # what has ended stands still, at finite numbers
            if bool(event.any()):
                iterations = torch.where(event, step + 1, iterations)
                # pᵀAp < 0 proves that A is not positive definite. So does pᵀAp = 0 with Ap ≠ 0: for a semi-definite
                # matrix ‖Ap‖² ≤ ‖A‖ pᵀAp, and only Ap = 0 is left, which makes it singular.
                flat = event & ~curved & torch.isfinite(quotient)
                bend = Ap.norm(dim=-1) / p.norm(dim=-1)
                bent = (quotient < -tiny * largest) | (bend > tiny**0.5 * torch.maximum(largest, bend))
                verdict = torch.where(bent, int(Status.INDEFINITE), int(Status.SINGULAR))
                status = torch.where(flat, verdict, status)
                true = rhs - operator.matvec(x)
                actual = true.norm(dim=-1)
                done = event & ~flat & (actual <= threshold)
                broken = event & ~flat & ~torch.isfinite(actual + square)
                # The residuals have parted: go on from the true one while that still gains a digit each time.
                parted = event & ~(flat | done | broken)
                stuck = parted & ((actual > 0.1 * confirmed) | (replacements >= _MOST_REPLACEMENTS))
                status = torch.where(done, int(Status.CONVERGED), status)
                status = torch.where(stuck, int(Status.STAGNATED), status)
                status = torch.where(broken, int(Status.NOT_FINITE), status)
                active = status == Status.RUNNING
                if not bool(active.any()):
                    break
                again = parted & ~stuck
                if bool(again.any()):
                    replacements += 1
                    confirmed = torch.where(again, actual, confirmed)
                    r = torch.where(again.unsqueeze(-1), true, r)
                    if self.reorthogonalize is not False:
                        basis = _Basis(rhs, limit - step)
                    z = r if precondition is None else precondition(r)
                    fresh = torch.linalg.vecdot(r, z)
                    beta = torch.where(again, zero, fresh / rz)
                beta = torch.where(active, beta, zero)
            p = torch.addcmul(z, beta.unsqueeze(-1), p)
            rz = fresh
        iterations = torch.where(status == Status.RUNNING, limit, iterations)
        status = torch.where(status == Status.RUNNING, int(Status.MAX_STEPS), status)
        return LinearSolution(x, iterations, status, true)


class _Basis:
    """The former residuals of a run, by which the present one is kept orthogonal; the latest where memory is short."""

    def __init__(self, like: torch.Tensor, most: int) -> None:
        room = _BASIS_BYTES // max(1, 2 * like.numel() * like.element_size())
        self.room = max(2, min(most, int(room)))
        self.count = 0
        self._r: torch.Tensor | None = None
        self._z: torch.Tensor | None = None

    def add(self, r: torch.Tensor, z: torch.Tensor, rz: torch.Tensor) -> None:
        if self._r is None or (self.count >= self._r.shape[1] and self._r.shape[1] < self.room):
            self._grow(r)
        assert self._r is not None and self._z is not None
        # A finished problem has rz = 0, or is no longer looked at.
        scale = torch.where(rz > 0, rz, torch.ones_like(rz)).rsqrt().unsqueeze(-1)
        at = self.count % self._r.shape[1]
        self._r[:, at] = torch.where(torch.isfinite(scale), r * scale, torch.zeros_like(r))
        self._z[:, at] = torch.where(torch.isfinite(scale), z * scale, torch.zeros_like(z))
        self.count += 1

    def remove_from(self, r: torch.Tensor) -> torch.Tensor:
        assert self._r is not None and self._z is not None
        used = min(self.count, self._r.shape[1])
        left, right = self._r[:, :used], self._z[:, :used]
        column = r.unsqueeze(-1)
        for _ in range(2):  # twice is enough (Kahan, Parlett)
            column = column - left.mT @ (right @ column)
        return column.squeeze(-1)

    def _grow(self, like: torch.Tensor) -> None:
        old_r, old_z = self._r, self._z
        width = min(self.room, 16 if old_r is None else 2 * old_r.shape[1])
        self._r = like.new_zeros(like.shape[0], width, like.shape[1])
        self._z = torch.zeros_like(self._r)
        if old_r is not None and old_z is not None:
            self._r[:, : old_r.shape[1]] = old_r
            self._z[:, : old_z.shape[1]] = old_z
