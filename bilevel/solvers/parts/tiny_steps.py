"""Notice a search that goes on by steps a millionth as long as its model asks for: values and gradients of the objective contradict each other.

An objective that calls an inexact solver jumps wherever that solver takes one step more or less. Between two jumps it descends, and a
line search finds a step that ends before the next one. Every such step lowers the objective, so that no test of decrease ends the search.
Where the inexact solver does not leave its initial guess at all, values do not follow what its derivative says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bilevel.equations.problem import Problem
from bilevel.reports import Status

__all__ = ["TinySteps"]

_TINY = 1e-5
"""A step is tiny below this share of the model's."""

_MOST = 6
"""Successive tiny steps that end a search where no jump is seen. A step from where the model is useless, as far out on an exponential, is one."""

_FREE = 1
"""Steps of a solve that are not looked at."""

_BEYOND = 10.0
"""Line searches shorten a step by this factor at most: the jump that stopped one lies between a step and this multiple of it."""

_OFF = 0.5
"""Along a tiny step a smooth objective changes by its slope times the length, up to a share far below this one."""

_HALVINGS, _LEFT = 30, 1e-3
"""A continuous function keeps less than this share of its change over an interval that was halved so often."""


@dataclass(eq=False)
class TinySteps:
    """Counts successive tiny steps of each problem, during one solve, and looks for a contradiction at the first. Few searches take any.

    Parameters
    ----------
    problem
        A batch of objectives.
    """

    problem: Problem
    _made: int = 0
    _count: torch.Tensor | None = None
    _looked: bool = False

    def end(
        self,
        share: Callable[[], torch.Tensor],
        last: torch.Tensor,
        x: torch.Tensor,
        gradient: torch.Tensor,
        active: torch.Tensor,
        verdict: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Return ``verdict`` (batch,) or None, with ``LINE_SEARCH_FAILED`` for problems that make no headway.

        Parameters
        ----------
        share
            Returns the length of each step (batch,), as a share of what the model asked for.
        last, x, gradient
            (batch, n), before and after the step, and ∇G before it.
        active
            (batch,) bool.
        verdict
            Of the step itself.
        """
        self._made += 1
        if self._made <= _FREE:
            return verdict
        tiny = active & (share() < _TINY)
        if not bool(tiny.any()):
            self._count = None
            return verdict
        before = torch.zeros_like(tiny, dtype=torch.int64) if self._count is None else self._count
        self._count = torch.where(tiny, before + 1, 0)
        stuck = self._count >= _MOST
        if not self._looked:
            self._looked = True
            step = torch.where(tiny.unsqueeze(-1), x - last, 0.0)
            stuck = stuck | self._contradicts(last, step, gradient) | self._jumps(last + step, last + _BEYOND * step)
        if not bool(stuck.any()):
            return verdict
        if verdict is None:
            verdict = torch.full_like(self._count, int(Status.RUNNING))
        return torch.where(stuck & (verdict == Status.RUNNING), int(Status.LINE_SEARCH_FAILED), verdict)

    def _contradicts(self, last: torch.Tensor, step: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Return where the objective does not change by its slope along ``step`` nor along a tenth of it, (batch,) bool."""
        value, slope = self.problem.value(last), (gradient * step).sum(dim=-1)
        wrong = slope.abs() > 1e4 * torch.finfo(last.dtype).eps * value.abs()
        for share in (1.0, 0.1):
            change = self.problem.value(last + share * step) - value
            wrong = wrong & ((change - share * slope).abs() > _OFF * (share * slope).abs())
        return wrong

    def _jumps(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """Return where the objective jumps between ``low`` and ``high``, (batch,) bool: the larger change of two halves, again and again."""
        below, above = self.problem.value(low), self.problem.value(high)
        change, size = (above - below).abs(), torch.maximum(above.abs(), below.abs())
        for _ in range(_HALVINGS):
            middle = 0.5 * (low + high)
            there = self.problem.value(middle)
            upper = (above - there).abs() >= (there - below).abs()
            low, below = torch.where(upper.unsqueeze(-1), middle, low), torch.where(upper, there, below)
            high, above = torch.where(upper.unsqueeze(-1), high, middle), torch.where(upper, above, there)
        left = (above - below).abs()
        return (left > _LEFT * change) & (left > 1e3 * torch.finfo(low.dtype).eps * size)
