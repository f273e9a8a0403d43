"""One call of a quadratic program: its solves, forward and in every derivative, their reports and the policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from bilevel.policy import OnFailure, apply_policy
from bilevel.quadratic_programs._kkt import Factor
from bilevel.quadratic_programs._program import Found
from bilevel.quadratic_programs._proof_later import ProofLater
from bilevel.quadratic_programs._rule import Asked, Structure
from bilevel.quadratic_programs._wording import backward_words, forward_words
from bilevel.recording import ACTIVE
from bilevel.reports import Basis, Pass, SolveReport, Status

__all__ = ["NO_DERIVATIVE", "Backend", "ProgramCall"]

_CONSISTENT = 1e-7  # the relative residual of K d = r up to which a singular system counts as consistent
_MATTERS = 1e-8  # the relative size of a change of d that a weakly active constraint may make
NO_DERIVATIVE = (Status.INFEASIBLE, Status.UNBOUNDED, Status.NOT_FINITE, Status.INDEFINITE)


class Backend(Protocol):
    """A solver, and the factorisation that goes with its matrices."""

    @property
    def name(self) -> str:
        """The name in reports."""

    def solve(self, structure: Structure, tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> Found:
        """Return what was found of each problem of a batch with one axis, in float64."""

    def factor(
        self,
        structure: Structure,
        matrices: Sequence[torch.Tensor],
        damping: torch.Tensor | None,
        active: torch.Tensor,
    ) -> Factor:
        """Return the factorised K."""


@dataclass(eq=False)
class _Kept:
    """A factorisation, and the tensors that it is of."""

    tensors: tuple[torch.Tensor | None, ...]
    factor: Factor

    def fits(self, tensors: Sequence[torch.Tensor | None]) -> bool:
        return all(_same(mine, other) for mine, other in zip(self.tensors, tensors, strict=True))


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    if one.is_inference() or other.is_inference():
        return one is other
    where = one.data_ptr(), one.shape, one.stride(), one._version
    return where == (other.data_ptr(), other.shape, other.stride(), other._version)


class ProgramCall:
    """The solves of one call.

    Parameters
    ----------
    backend
        The solver.
    where
        The name for messages.
    on_failure
        The policy.
    threshold, threshold_prime
        The relative residuals that are small enough, forward and in derivatives. None for the backend's own.
    """

    def __init__(
        self,
        backend: Backend,
        where: str,
        on_failure: OnFailure,
        threshold: float | None,
        threshold_prime: float | None,
    ) -> None:
        self.backend, self.where, self.on_failure = backend, where, on_failure
        self.threshold, self.threshold_prime = threshold, threshold_prime
        self.recordings = tuple(ACTIVE.stack)
        self.report: SolveReport | None = None
        self.certificate: torch.Tensor | None = None
        self.lost: torch.Tensor | None = None  # (B,): problems that have no derivative, if there are any
        self.status: torch.Tensor | None = None
        self.kept: _Kept | None = None

    def solve(self, structure: Structure, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return points (*batch, length) and marks (*batch, m + 2n), as the policy says."""
        dtype, batch = tensors[1].dtype, tensors[1].shape[:-1]
        flat = [t.detach().to(torch.float64).reshape(math.prod(batch), *t.shape[len(batch) :]) for t in tensors]
        found = self.backend.solve(structure, flat, dtype)
        status = found.status
        if self.threshold is not None:
            failed = (status == Status.CONVERGED) & ~(found.residual <= self.threshold)
            status = torch.where(failed, int(Status.NOT_CONVERGED), status)
            found.threshold = torch.full_like(found.threshold, self.threshold)
        self.certificate = found.certificate.reshape(*batch, structure.length).to(dtype)
        self._note_lost(status)
        words = forward_words(structure, found, status)
        report = self._report(Pass.FORWARD, status, found.iterations, found.residual, found.threshold, batch, words)
        point = found.point.to(dtype).reshape(*batch, structure.length)
        provable = not structure.smoothing and structure.dense and bool((status == Status.CONVERGED).any())
        self.report = (
            report.with_proof(ProofLater(self.backend, structure, flat, found, status, point)) if provable else report
        )
        point = apply_policy(self.report, point, self.on_failure, self.recordings)
        marks = (found.active.to(dtype) + 2 * found.weak.to(dtype)).reshape(*batch, found.active.shape[-1])
        if found.factor is not None:
            matrices = tuple(tensors[i].detach() for i in (0, 2, 4))
            self.offered = (matrices, found.factor)
        return point, marks

    def _note_lost(self, status: torch.Tensor) -> None:
        lost = torch.zeros_like(status, dtype=torch.bool)
        for one in NO_DERIVATIVE:
            lost |= status == one
        if self.on_failure == "nan":
            lost |= (status != Status.CONVERGED) & (status != Status.MINIMUM_NORM)
        self.lost, self.status = (lost, status) if bool(lost.any()) else (None, None)

    offered: tuple[tuple[torch.Tensor, ...], Factor] | None = None

    def _factor(
        self,
        structure: Structure,
        matrices: Sequence[torch.Tensor],
        damping: torch.Tensor | None,
        marks: torch.Tensor,
        count: int,
    ) -> Factor:
        """Return the factorised K, that of the forward solve or of the last derivative where the matrices are the same."""
        key = (*matrices, damping, marks)
        if self.kept is not None and self.kept.fits(key):
            return self.kept.factor
        factor: Factor | None = None
        if self.offered is not None and damping is None:
            theirs, offered = self.offered
            if all(_same(mine, other) for mine, other in zip(theirs, matrices, strict=True)):
                factor = offered
        if factor is None:
            flat = [t.detach().to(torch.float64).reshape(count, *t.shape[t.ndim - axes :]) for t, axes in zip(
                matrices, (structure.Q.axes, structure.A.axes, structure.G.axes), strict=True)]  # fmt: skip
            wide = None if damping is None else damping.detach().to(torch.float64).reshape(count, damping.shape[-1])
            factor = self.backend.factor(structure, flat, wide, (marks % 2 > 0).reshape(count, marks.shape[-1]))
        self.kept = _Kept(tuple(None if t is None else t.detach() for t in key), factor)
        return factor

    def solve_kkt(
        self,
        structure: Structure,
        right: torch.Tensor,
        matrices: Sequence[torch.Tensor],
        damping: torch.Tensor | None,
        marks: torch.Tensor,
        asked: Asked,
    ) -> torch.Tensor:
        """Return K⁻¹ r (*repeats, *batch, length), solved for, judged, reported and treated as the policy says."""
        batch = marks.shape[:-1]
        count, length = math.prod(batch), right.shape[-1]
        if not right.numel():
            return torch.zeros_like(right)
        factor = self._factor(structure, matrices, damping, marks, count)
        weak = marks.reshape(count, marks.shape[-1]) >= 2
        flat = right.detach().to(torch.float64).reshape(-1, count, length)
        parts = [self._one(structure, factor, one, weak, asked) for one in flat]
        repeats = right.shape[: right.ndim - 1 - len(batch)]
        axes = (*repeats, *batch)
        d, status, residual, scale, culprit = (torch.stack(part) for part in zip(*parts, strict=True))
        reported = self.recordings or ACTIVE.stack or bool((status != Status.CONVERGED).any())
        d = d.to(right.dtype).reshape(right.shape)
        if reported:
            threshold = torch.full_like(residual, self.threshold_prime or _CONSISTENT) * scale
            words = backward_words(structure, status, culprit)
            report = self._report(
                Pass.BACKWARD, status, torch.ones_like(status), residual, threshold, axes, words, scale
            )  # fmt: skip
            d = apply_policy(report, d, self.on_failure, self.recordings)
        if self.lost is None:
            return d
        lost = self.lost.repeat(status.numel() // len(self.lost)).reshape(axes)
        return torch.where(lost.unsqueeze(-1), torch.full_like(d, float("nan")), d)

    def _one(
        self, structure: Structure, factor: Factor, right: torch.Tensor, weak: torch.Tensor, asked: Asked
    ) -> tuple[torch.Tensor, ...]:
        """Return d, statuses, residuals, norms of r and the row to blame, (B, ...)."""
        d = factor.solve(right)
        left = right - factor.times(d)
        # What is large in the user's units may be rounding in those of the matrix.
        scale, lack = factor.in_units(right).norm(dim=-1), factor.in_units(left)
        residual = lack.norm(dim=-1)
        if bool((residual > 1e-14 * scale).any()):
            refined = d + factor.solve(left)
            again = factor.in_units(right - factor.times(refined))
            better = (again.norm(dim=-1) < residual).unsqueeze(-1)
            d, lack = torch.where(better, refined, d), torch.where(better, again, lack)
            residual = lack.norm(dim=-1)
        status = torch.zeros(len(right), dtype=torch.int64, device=right.device)
        culprit = torch.full_like(status, -1)
        enough = self.threshold_prime or _CONSISTENT
        wrong = ~(residual <= enough * scale)
        singular = factor.singular
        if bool(wrong.any()) or bool(singular.any()):
            outside = lack[:, : structure.sizes.n].norm(dim=-1) > 0.5 * residual
            status = torch.where(singular, int(Status.MINIMUM_NORM), status)
            status = torch.where(wrong, int(Status.STAGNATED), status)
            status = torch.where(
                wrong & singular, torch.where(outside, int(Status.SINGULAR), int(Status.DEGENERATE)), status
            )
            if asked.reverse and asked.constraints:
                status = torch.where(singular & factor.by_inequalities & ~wrong, int(Status.DEGENERATE), status)
            status = torch.where(torch.isfinite(scale), status, int(Status.NOT_FINITE))
        if bool(weak.any()):
            status, culprit = self._weakly_active(structure, factor, d, weak, status, culprit)
        if self.lost is not None and self.status is not None and len(right) % len(self.lost) == 0:
            more = len(right) // len(self.lost)
            status = torch.where(self.lost.repeat(more), self.status.repeat(more), status)
        return d, status, residual, scale, culprit

    def _weakly_active(
        self,
        structure: Structure,
        factor: Factor,
        d: torch.Tensor,
        weak: torch.Tensor,
        status: torch.Tensor,
        culprit: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the statuses, DEGENERATE where a weakly active row would change d if it were taken for the other kind, and that row."""
        change, size = factor.changes(d)
        matters = weak & (change > _MATTERS * size)
        some = matters.any(-1)
        status = torch.where(some, int(Status.DEGENERATE), status)
        return status, torch.where(some, matters.to(torch.int8).argmax(-1), culprit)

    def _report(
        self,
        direction: Pass,
        status: torch.Tensor,
        iterations: torch.Tensor,
        residual: torch.Tensor,
        threshold: torch.Tensor,
        axes: tuple[int, ...],
        words: Any,
        scale: torch.Tensor | None = None,
    ) -> SolveReport:
        unknown = torch.full_like(residual, float("nan"))
        solver = self.backend.name if direction is Pass.FORWARD else "the KKT factorisation"
        given = unknown if scale is None else scale
        status, iterations, residual, threshold = (t.reshape(axes) for t in (status, iterations, residual, threshold))
        return SolveReport(
            direction,
            self.where,
            solver,
            status,
            iterations,
            residual,
            threshold,
            unknown.reshape(axes),
            Basis.RESIDUAL,
            given.reshape(axes),
            words,
        )
