"""The same numbers, bit for bit, in fewer operations and fewer passes over memory.

Formulas of derivatives are written for any power and any factor. What is left of them in a given function raises to the powers one and zero,
multiplies by one, and computes the same twice. And a graph has to keep each result, where a program may write the next one over it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bilevel.replay.tape import Layout, Slot, Step, Tape, slots_in

__all__ = ["reuse_buffers", "simplify"]

_aten = torch.ops.aten
_POWER = _aten.pow.Tensor_Scalar
_BY_NUMBER = _aten.mul.Scalar
_BY_TENSOR = _aten.mul.Tensor
_ADD = _aten.add.Tensor
_VIEWS = frozenset({
    _aten.view.default, _aten.expand.default, _aten.permute.default, _aten.transpose.int, _aten.unsqueeze.default, _aten.squeeze.dim,
    _aten.squeeze.default, _aten.clone.default, _aten._unsafe_view.default,
})  # fmt: skip
# Each of these makes an entry of entries at the same place, and has a form that writes it where the first of them was.
_IN_PLACE = {
    operation: getattr(getattr(_aten, f"{operation._opname}_"), operation._overloadname)
    for operation in (
        _BY_TENSOR, _BY_NUMBER, _ADD, _aten.sub.Tensor, _aten.div.Tensor, _aten.div.Scalar, _aten.neg.default, _aten.relu.default,
        _aten.exp.default, _aten.tanh.default, _aten.sigmoid.default, _aten.addcmul.default,
    )
}  # fmt: skip
_FLOATING = (torch.float32, torch.float64)


def simplify(tape: Tape) -> Tape:
    """Return a tape of the same function in fewer steps; the same one where something is changed in place."""
    return tape if tape.in_place else _Simplifier(tape).tape()


class _Simplifier:
    """One walk along a tape: which slots hold what another holds, or nothing but ones."""

    def __init__(self, tape: Tape) -> None:
        self._tape = tape
        self._instead: dict[int, int] = {}
        self._ones: set[int] = set()
        self._made: dict[Any, Step] = {}
        self._outward = {self._layout(number).memory for number in tape.outputs}
        self._moved: dict[int, int] = {}

    def tape(self) -> Tape:
        """Return the shorter one."""
        kept = []
        for old in self._tape.steps:
            step = self._redirected(old)
            if not self._is_idle(step):
                kept.append(step)
        outputs = tuple(self._instead.get(number, number) for number in self._tape.outputs)
        layouts = {n: layout._replace(memory=self._room(layout.memory)) for n, layout in self._tape.layouts.items()}
        return replace(self._tape, steps=tuple(kept), outputs=outputs, layouts=layouts)

    def _redirected(self, step: Step) -> Step:
        """Return ``step`` reading from where things stand now."""
        if self._instead.keys().isdisjoint(step.reads):
            return step

        def moved(slot: Slot) -> Slot:
            return Slot(self._instead.get(slot.number, slot.number))

        args, kwargs = pytree.tree_map_only(Slot, moved, (step.args, step.kwargs))
        return replace(step, args=args, kwargs=kwargs, reads=slots_in((args, kwargs)))

    def _is_idle(self, step: Step) -> bool:
        """Return whether what ``step`` makes stands elsewhere already."""
        if not isinstance(step.results, Slot) or not step.reads:
            return False
        made = step.results.number
        same = self._same_as(step)
        if same is not None and self._may_stand_for(same, made):
            self._put(made, same)
            return True
        key = (step.operation, _frozen(step.args), _frozen(step.kwargs))
        before = self._made.setdefault(key, step)
        if before is not step and self._is_inward(made):
            self._put(made, slots_in(before.results)[0])
            return True
        return False

    def _put(self, made: int, same: int) -> None:
        self._instead[made] = same
        # What is viewed in it is viewed in the other's memory from now on.
        old, new = self._room(self._layout(made).memory), self._room(self._layout(same).memory)
        if old != new:
            self._moved[old] = new

    def _room(self, memory: int) -> int:
        while memory in self._moved:
            memory = self._moved[memory]
        return memory

    def _is_inward(self, made: int) -> bool:
        """Return whether a slot may be left out: an output is a tensor of its own, and so is one that is a view of the slot."""
        return self._layout(made).memory not in self._outward

    def _same_as(self, step: Step) -> int | None:
        """Return the argument that ``step`` leaves as it is, if it does."""
        made, args = step.makes[0], step.args
        first = args[0].number if isinstance(args[0], Slot) else -1
        if step.operation is _POWER:
            if args[1] == 0 and self._layout(made).dtype in _FLOATING:
                self._ones.add(made)  # also of what is not a number
            return first if args[1] == 1 else None
        if step.operation is _BY_NUMBER:
            if args[1] == 1 and first in self._ones:
                self._ones.add(made)
            return first if args[1] == 1 else None
        if step.operation in _VIEWS and first in self._ones:
            self._ones.add(made)
        if step.operation is _BY_TENSOR and isinstance(args[0], Slot) and isinstance(args[1], Slot):
            left, right = args[0].number, args[1].number
            return left if right in self._ones else right if left in self._ones else None
        return None

    def _may_stand_for(self, same: int, made: int) -> bool:
        # One that views of it are taken of lies as it would.
        return self._is_inward(made) and self._layout(same).same_layout(self._layout(made))

    def _layout(self, number: int) -> Layout:
        return self._tape.layouts[number]


def _frozen(value: Any) -> Any:
    """Return arguments as something to look up by; numbers of two types differ."""
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *map(_frozen, value))
    if isinstance(value, dict):
        return tuple((name, _frozen(item)) for name, item in value.items())
    return (type(value).__name__, repr(value))


def reuse_buffers(tape: Tape, steps: Sequence[Step], given: Iterable[int], outputs: Iterable[int]) -> list[Step]:
    """Return ``steps`` with operations that write over an argument of which nothing is read any more.

    Parameters
    ----------
    tape
        What they are of.
    steps
        Those of one program.
    given, outputs
        The slots that it gets and returns.
    """
    if tape.in_place:
        return list(steps)
    memory = {number: layout.memory for number, layout in tape.layouts.items()}
    kept = {memory[number] for number in (*given, *outputs, *tape.constants)}
    last: dict[int, int] = {}
    changed = []
    for place, step in enumerate(steps):
        for number in step.reads:
            last[memory[number]] = place
    for place, old in enumerate(steps):
        step = old
        for arguments in _orders(step):
            over = arguments[0].number if isinstance(arguments[0], Slot) else None
            if over is None or memory[over] in kept or last.get(memory[over], -1) != place:
                continue
            made = step.makes[0]
            others = [number for number in step.reads if number != over]
            if any(memory[number] == memory[over] for number in others):
                continue
            if not tape.layouts[over].same_layout(tape.layouts[made]) or not _is_solid(tape.layouts[over]):
                continue
            step = replace(step, operation=_IN_PLACE[step.operation], args=arguments)
            if memory[made] in kept:
                kept.add(memory[over])
            # What is in the new slot lies in the old memory from now on, with all that is viewed in it.
            freed, room = memory[over], memory[made]
            last[room] = max(last.get(room, -1), place)
            memory = {number: room if at == freed else at for number, at in memory.items()}
            break
        changed.append(step)
    return changed


def _orders(step: Step) -> list[tuple[Any, ...]]:
    """Return the arguments of an operation that can be done in place, in the orders that give the same."""
    if step.operation not in _IN_PLACE or not isinstance(step.results, Slot):
        return []
    either = step.operation is _BY_TENSOR or (step.operation is _ADD and not step.kwargs and len(step.args) == 2)
    both = either and all(isinstance(arg, Slot) for arg in step.args)
    return [step.args, (step.args[1], step.args[0])] if both else [step.args]


def _is_solid(layout: Layout) -> bool:
    """Return whether no two entries share a place, nor are there places between them: what elementwise results are like."""
    if layout.dtype not in _FLOATING:
        return False
    expected = 1
    for stride, length in sorted((s, n) for s, n in zip(layout.stride, layout.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= length
    return True
