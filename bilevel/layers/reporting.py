"""The report of a solve, in the shape of the batch that the caller sees."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from bilevel.linear._solution import LinearOutcome
from bilevel.reports import Pass, Proof, SolveReport, StatusMessages
from bilevel.solvers._outcome import InnerOutcome

__all__ = ["report_of"]


def report_of(
    direction: Pass,
    where: str,
    solver: str,
    outcome: InnerOutcome | LinearOutcome,
    axes: tuple[int, ...],
    words: StatusMessages,
) -> SolveReport:
    """Return the report of ``outcome``, a solve in ``direction``, with its tensors in the shape ``axes``."""
    status, iterations, norm = outcome.status, outcome.iterations, outcome.residual_norm
    threshold, bound = outcome.threshold, outcome.error_bound
    scale = outcome.scale if isinstance(outcome, LinearOutcome) else torch.full(status.shape, float("nan"))
    if status.shape != axes:
        status, iterations, norm = status.reshape(axes), iterations.reshape(axes), norm.reshape(axes)
        threshold, bound, scale = threshold.reshape(axes), bound.reshape(axes), scale.reshape(axes)
    report = SolveReport(
        direction, where, solver, status, iterations, norm, threshold, bound, outcome.basis, scale, words
    )
    if not isinstance(outcome, InnerOutcome) or outcome.prove is None:
        return report
    return report.with_proof(partial(_shaped_proof, outcome.prove, axes))


def _shaped_proof(prove: Callable[[], Proof], axes: tuple[int, ...]) -> Proof:
    proof = prove()
    entries = (None if e is None else e.reshape(*axes, e.shape[-1]) for e in (proof.proven_zero, proof.proven_nonzero))
    return Proof(proof.error_bound.reshape(axes), proof.basis, *entries)
