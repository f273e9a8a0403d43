"""What the graph of a user's function was seen to hold, so that only functions with a use for a mode run in one.

To look at every operation from the start would take its time, and make compiled functions compile again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from typing import Any
from weakref import WeakValueDictionary

import torch

__all__ = ["Held", "learn", "seen"]


class Held(Enum):
    """Kinds of nodes, by how their names begin."""

    CONVOLUTION = ("ConvolutionBackward",)
    BATCH_NORM = ("NativeBatchNormBackward",)
    COMPILED = ("CompiledFunction",)
    ONCE_ONLY = ("WeightNormInterface", "ScaledDotProduct")


def learn(function: Callable[..., Any], values: torch.Tensor) -> None:
    """Remember what the graph of ``values``, which ``function`` returned, holds; the first time tells."""
    if _looked.get(id(function)) is function:
        return
    pending, met, names = [values.grad_fn], set(), set()
    while pending:
        node = pending.pop()
        if node is None or node in met:
            continue
        met.add(node)
        names.add(node.name())
        pending.extend(following for following, _ in node.next_functions)
    with suppress(TypeError):  # not everything callable can be referred to weakly
        _looked[id(function)] = function
        for kind, functions in _seen.items():
            if any(name.startswith(kind.value) for name in names):
                functions[id(function)] = function


def seen(function: Callable[..., Any], kind: Held) -> bool:
    """Return whether nodes of ``kind`` were seen in ``function``."""
    return _seen[kind].get(id(function)) is function


# Weakly: a function is let go with what it closes over.
_looked: WeakValueDictionary[int, Any] = WeakValueDictionary()
_seen: dict[Held, WeakValueDictionary[int, Any]] = {kind: WeakValueDictionary() for kind in Held}
