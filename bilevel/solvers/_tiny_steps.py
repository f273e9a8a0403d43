"""Notice a search that goes on by steps a millionth as long as its model asks for: the objective jumps, and no step crosses the jump.

An objective that calls an inexact solver jumps wherever that solver takes one step more or less. Between two jumps it descends, and a
line search finds a step that ends before the next one. Every such step lowers the objective, so that no test of decrease ends the search.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bilevel.reports import Status

__all__ = ["TinySteps"]

_TINY = 1e-5
"""A step is tiny below this share of the model's."""

_MOST = 6
"""Successive tiny steps that end a search. A step from where the model is useless, as far out on an exponential, is one."""


@dataclass(eq=False)
class TinySteps:
    """Counts successive tiny steps of each problem, during one solve. The first steps cost nothing: few searches take more."""

    _made: int = 0
    _count: torch.Tensor | None = None

    def end(
        self, share: Callable[[], torch.Tensor], active: torch.Tensor, verdict: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Return ``verdict`` (batch,) or None, with ``LINE_SEARCH_FAILED`` for problems that make no headway.

        Parameters
        ----------
        share
            Returns the length of each step (batch,), as a share of what the model asked for.
        active
            (batch,) bool.
        verdict
            Of the step itself.
        """
        self._made += 1
        if self._made <= _MOST:
            return verdict
        tiny = active & (share() < _TINY)
        if not bool(tiny.any()):
            self._count = None
            return verdict
        before = torch.zeros_like(tiny, dtype=torch.int64) if self._count is None else self._count
        self._count = torch.where(tiny, before + 1, 0)
        stuck = self._count >= _MOST
        if not bool(stuck.any()):
            return verdict
        if verdict is None:
            verdict = torch.full_like(self._count, int(Status.RUNNING))
        return torch.where(stuck & (verdict == Status.RUNNING), int(Status.LINE_SEARCH_FAILED), verdict)
