"""The shared state of recursive estimates: the last point, the last estimate, and when a large batch is due."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bilevel.errors import ArgumentError
from bilevel.setting_checks import check_steps
from bilevel.stochastic._batches import BatchSource

__all__ = ["Periodic"]

Reference = Callable[[], tuple[Any, Any]]


class Periodic:
    """When a recursive estimate begins anew, and on which batches.

    Parameters
    ----------
    period
        Steps from one beginning to the next.
    reference
        A function that returns the (inner, outer) batches of a beginning, such as the whole data sets. None: the batches given to
        ``step`` are used, which the caller makes large where ``wants_large_batch`` says so.
    where
        For messages.
    """

    def __init__(self, period: int, reference: Reference | None, where: str) -> None:
        check_steps(where, "period", period)
        if reference is not None and not callable(reference):
            raise ArgumentError(
                f"{where}: expected reference to be a function that returns (inner_batch, outer_batch), got {reference!r}; pass "
                "`lambda: (inner_data, outer_data)`"
            )
        self.period, self._reference = period, reference

    def begins(self, steps: int) -> bool:
        """Return whether the step after ``steps`` steps is a beginning."""
        return steps % self.period == 0

    def batches(self, inner: BatchSource, outer: BatchSource) -> tuple[Any, Any]:
        """Return the batches of a beginning."""
        return (inner.draw(), outer.draw()) if self._reference is None else self._reference()
