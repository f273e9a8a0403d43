"""A tape: the operations of one run, and the places of their arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

__all__ = ["Layout", "Slot", "Step", "Tape", "slots_in"]


@dataclass(frozen=True)
class Slot:
    """The place of a tensor on a tape."""

    number: int


@dataclass(frozen=True, eq=False)
class Step:
    """One operation: its arguments and results, with slots for tensors."""

    operation: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: Any
    reads: tuple[int, ...]
    makes: tuple[int, ...]

    @property
    def writes(self) -> bool:
        """Whether it changes one of its arguments."""
        return bool(self.operation._schema.is_mutable)


class Layout(NamedTuple):
    """Where a tensor lies: a number for its memory, and its place there."""

    memory: int
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, eq=False)
class Tape:
    """The operations of one run in order.

    Parameters
    ----------
    steps
        The operations. Each comes after those whose results it reads.
    inputs, outputs
        The slots of the function's arguments and results.
    constants
        Small tensors that the function's code makes without its arguments, by slot.
    layouts
        Where the tensor of each slot lay.
    """

    steps: tuple[Step, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    constants: dict[int, torch.Tensor] = field(repr=False)
    layouts: dict[int, Layout] = field(repr=False)

    @property
    def in_place(self) -> bool:
        """Whether some operation changes what another has made."""
        return any(step.writes for step in self.steps)

    def after(self, slots: Iterable[int]) -> set[int]:
        """Return the slots that depend on ``slots``, these among them."""
        found = set(slots)
        for step in self.steps:
            if not found.isdisjoint(step.reads):
                found.update(step.makes)
        return found

    def needed(self, outputs: Iterable[int], given: Iterable[int], here: Callable[[Step], bool]) -> list[Step]:
        """Return the steps that compute ``outputs`` from the slots ``given``.

        A step without results may still raise, for example one that checks a factorisation. It is among them if ``here`` is true of it. If any
        step works in place, all steps are returned.
        """
        if self.in_place:
            return list(self.steps)
        there = set(given)
        needed, kept = set(outputs) - there, []
        for step in reversed(self.steps):
            if not needed.isdisjoint(step.makes) or (not step.makes and here(step)):
                kept.append(step)
                needed.update(number for number in step.reads if number not in there)
        return kept[::-1]


def slots_in(tree: Any) -> tuple[int, ...]:
    """Return the numbers of the slots in an operation's arguments or results."""
    return tuple(leaf.number for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Slot))
