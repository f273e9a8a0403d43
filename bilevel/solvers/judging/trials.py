"""Intermediate results of solvers, combined problem by problem."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from bilevel.solvers._base import InnerSolution, merge

__all__ = ["Trial", "choose", "merged"]


@dataclass(frozen=True, eq=False)
class Trial:
    """The judged result of one solver."""

    x: torch.Tensor
    status: torch.Tensor
    iterations: torch.Tensor
    residual: torch.Tensor
    norm: torch.Tensor
    threshold: torch.Tensor
    value: torch.Tensor | None
    factor: torch.Tensor | None
    exact: bool = False
    settled: bool = False  # all are known to have converged


def merged(these: torch.Tensor, new: InnerSolution, old: InnerSolution) -> InnerSolution:
    """Return ``new`` for ``these`` problems (batch,), which were resumed, and the status of ``old`` for the others, which did not move."""
    error = slow = None
    if new.error is not None and old.error is not None:
        error = torch.where(these.unsqueeze(-1), new.error, old.error)
    if new.slow is not None and old.slow is not None:
        slow = torch.where(these, new.slow, old.slow)
    return replace(new, status=torch.where(these, new.status, old.status), error=error, slow=slow)


def choose(these: torch.Tensor, one: Trial, other: Trial) -> Trial:
    """Return ``one`` for the problems of ``these`` (batch,) and ``other`` for the rest."""
    mixed = merge(these, one, other)
    value = None if other.value is None else mixed.value
    factor = one.factor if one.exact else None
    return replace(mixed, iterations=other.iterations, value=value, factor=factor, settled=False)
