"""Saved states with one thing wrong: what a person's edit, or a damaged disk, makes of them."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["damaged", "edited", "same"]


def places(state: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every entry in a tree of dicts, lists and tuples."""
    if path:
        yield path
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def at(state: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        state = state[key]
    return state


def put(state: Any, path: tuple[Any, ...], value: Any, *, drop: bool = False) -> Any:
    """Return ``state`` with another value at ``path``, or without that entry."""
    key, *rest = path
    if isinstance(state, tuple):
        return tuple(put(list(state), path, value, drop=drop))
    state = copy.copy(state)
    if rest:
        state[key] = put(state[key], tuple(rest), value, drop=drop)
    elif drop:
        del state[key]
    else:
        state[key] = value
    return state


def edited(state: dict[str, Any], seed: int) -> dict[str, Any]:
    """Return a copy of ``state`` with one entry missing, of another type, not finite, or of another value."""
    chance = random.Random(seed)
    changed = state
    while same(changed, state):
        changed = _edited(state, chance)
    return changed


def _edited(state: dict[str, Any], chance: random.Random) -> Any:
    while True:
        path = chance.choice(list(places(state)))
        value = at(state, path)
        how = chance.choice(("drop", "type", "number", "add"))
        if how == "drop":
            return put(state, path, None, drop=True)
        if how == "type":
            return put(state, path, chance.choice([None, "text", -1, 1.5, [], {}, (1, 2), torch.zeros(2)]))
        if how == "add" and isinstance(value, dict):
            return put(state, path, {**value, "another": 1.0})
        if how == "number" and isinstance(value, torch.Tensor) and value.numel():
            changed = value.clone().reshape(-1)
            by = chance.choice([float("nan"), float("inf"), 0.5]) if value.is_floating_point() else 1
            changed[chance.randrange(value.numel())] += by
            return put(state, path, changed.reshape(value.shape))
        if how == "number" and isinstance(value, (int, float)):
            return put(state, path, chance.choice([value + 1, float("nan"), float("inf"), -value - 1]))


def damaged(content: bytes, seed: int) -> bytes:
    """Return ``content`` with a byte flipped, cut short, or with bytes put in."""
    chance = random.Random(seed)
    where = chance.randrange(len(content))
    how = chance.choice(("flip", "flip", "flip", "cut", "insert"))
    if how == "cut":
        return content[:where]
    if how == "insert":
        return content[:where] + bytes(chance.randrange(256) for _ in range(3)) + content[where:]
    return content[:where] + bytes([content[where] ^ (1 << chance.randrange(8))]) + content[where + 1 :]


def same(one: Any, other: Any) -> bool:
    """Return whether two states are the same tree of the same numbers, NaN included."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and (one == other or (one != one and other != other))
