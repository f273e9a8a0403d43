"""The switch for replays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["allowed", "replaying"]

_allowed: ContextVar[bool] = ContextVar("bilevel.replaying", default=True)


def allowed() -> bool:
    """Return whether evaluations may be replayed here."""
    return _allowed.get()


@contextmanager
def replaying(enabled: bool) -> Iterator[None]:
    """Allow replays inside the ``with`` block, which is the default, or evaluate every function by itself at each step.

    An objective, residual or mapping of straight code, which does the same operations at every call, is evaluated by itself in a layer's first calls;
    then these operations are noted, and done again without it. The numbers are the same. Switch it off to see what it saves, or to look for what a
    function of yours does that it should not do twice.

    Parameters
    ----------
    enabled
        Whether to allow it in calls of layers and problems that are made in the block, in this thread.

    Examples
    --------
    >>> import torch, bilevel
    >>> layer = bilevel.argmin(lambda x, a: ((x - a) ** 2).sum() + (x**4).sum())
    >>> start, a = torch.zeros(2), torch.tensor([1.0, 2.0])
    >>> quick = [layer(start, a) for _ in range(5)][-1]
    >>> with bilevel.replaying(False):
    ...     torch.equal(layer(start, a), quick)
    True
    """
    token = _allowed.set(enabled)
    try:
        yield
    finally:
        _allowed.reset(token)
