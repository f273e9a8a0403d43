"""The results of a caller's last checks, found again by equal keys and the same objects."""

from __future__ import annotations

from types import FunctionType
from typing import Any, Generic, TypeVar
from weakref import ReferenceType

import torch

__all__ = ["InspectionCache"]

T = TypeVar("T")

# Arguments of so many kinds are told apart at once: the last batch of a data set is smaller than the others.
_MOST_KEPT = 16


class InspectionCache(Generic[T]):
    """The results of the last few checks of one caller. A copy or a pickle of it is empty."""

    def __init__(self) -> None:
        self._kept: list[tuple[tuple[Any, ...], tuple[Any, ...], T]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return InspectionCache, ()

    def find(self, key: tuple[Any, ...], parts: tuple[Any, ...]) -> T | None:
        """Return the result for an equal ``key`` and the same objects ``parts``."""
        for known, objects, made in self._kept:
            if known == key and len(objects) == len(parts) and all(map(_is, objects, parts)):
                return made
        return None

    def keep(self, key: tuple[Any, ...], parts: tuple[Any, ...], made: T) -> None:
        """Keep the result, and drop the oldest."""
        # Weakly what may hold much: a function that came as an argument is let go when its caller does so.
        holding = (FunctionType, torch.Tensor, torch.nn.Module)
        weak = (ReferenceType(part) if isinstance(part, holding) else part for part in parts)
        self._kept = [(key, tuple(weak), made), *self._kept[: _MOST_KEPT - 1]]


def _is(kept: Any, part: Any) -> bool:
    return (kept() is part is not None) if isinstance(kept, ReferenceType) else kept is part
