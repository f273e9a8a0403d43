"""The switch for replays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["allowed", "replaying"]

_allowed: ContextVar[bool] = ContextVar("bilevel.replaying", default=True)
# Whether evaluations may be replayed here.
allowed = _allowed.get


@contextmanager
def replaying(enabled: bool) -> Iterator[None]:
    """Allow replays inside the ``with`` block (the default), or evaluate every function by itself at each step.

    A branch-free function that depends on its arguments alone runs as usual in a layer's first calls. Its tensor operations are then recorded, and
    later steps repeat them without the Python code. The numbers are the same. Switch replays off to measure what they save, or to find
    a side effect of your function.

    Parameters
    ----------
    enabled
        Whether replays are allowed in calls of layers and problems that are made in the block, in this thread.

    Yields
    ------
    None

    Examples
    --------
    >>> import torch, bilevel
    >>> layer = bilevel.argmin(lambda x, a: ((x - a) ** 2).sum() + (x**4).sum())
    >>> init, a = torch.zeros(2), torch.tensor([1.0, 2.0])
    >>> with bilevel.replaying(False):
    ...     layer(init, a)
    tensor([0.5898, 0.8351])
    """
    token = _allowed.set(enabled)
    try:
        yield
    finally:
        _allowed.reset(token)
