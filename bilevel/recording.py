"""Collecting the reports of the solves inside a ``with`` block."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from bilevel.reports import Pass, SolveReport

__all__ = ["ACTIVE", "Recording", "record"]


class Recording(list[SolveReport]):
    """The reports collected by :func:`record`, in the order in which the solves ended."""

    @property
    def forward(self) -> list[SolveReport]:
        """The reports of inner solves."""
        return [report for report in self if report.direction is Pass.FORWARD]

    @property
    def backward(self) -> list[SolveReport]:
        """The reports of linear solves."""
        return [report for report in self if report.direction is Pass.BACKWARD]


class _Active(threading.local):
    def __init__(self) -> None:
        self.stack: list[Recording] = []


# The recordings open in this thread. A layer keeps them from its forward pass, because a backward pass may run in a thread of autograd's.
ACTIVE = _Active()


@contextlib.contextmanager
def record() -> Iterator[Recording]:
    """Collect the reports of every forward and backward solve inside the ``with`` block.

    A backward pass that runs after the block, of a layer called inside it, is collected too.

    Yields
    ------
    Recording
        A list of :class:`SolveReport`, with the views ``forward`` and ``backward``.

    Examples
    --------
    >>> import torch, bilevel
    >>> layer = bilevel.argmin(lambda x, a: ((x - a) ** 2).sum())
    >>> with bilevel.record() as reports:
    ...     x = layer(torch.zeros(2), torch.ones(2, requires_grad=True))
    ...     x.sum().backward()
    >>> [(report.direction.value, report.iterations.item()) for report in reports]
    [('forward', 1), ('backward', 2)]
    """
    recording = Recording()
    ACTIVE.stack.append(recording)
    try:
        yield recording
    finally:
        ACTIVE.stack[:] = [other for other in ACTIVE.stack if other is not recording]
