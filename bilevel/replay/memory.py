"""Results that are written over tensors which are no longer read.

A graph keeps every result. A program does not have to: a chain of operations on a large tensor can stay in one piece of memory. Fresh memory is
slow, because the system clears each page of it. On 128 ridge problems of 100 × 20 numbers a quarter of the time went there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from bilevel.replay.tape import Slot, Step, Tape

__all__ = ["reuse_memory"]


def reuse_memory(tape: Tape, steps: Sequence[Step], given: Iterable[int], outputs: Iterable[int]) -> list[Step]:
    """Return ``steps``, in which elementwise operations write over an argument that is not read again.

    The numbers are the same, bit for bit. What the steps are ``given``, what they return and constants are never written over, nor what shares
    memory with one of these.
    """
    if tape.in_place:
        return list(steps)
    memory = {number: layout.memory for number, layout in tape.layouts.items()}
    kept = {memory[number] for number in (*given, *outputs, *tape.constants)}
    last = {memory[number]: place for place, step in enumerate(steps) for number in step.reads}
    changed = []
    for place, step in enumerate(steps):
        # When a memory is written over, nothing reads it any more, nor a view of it. So the result can count as one in a memory of its own.
        for written in _in_place_forms(step):
            over = written.args[0].number
            shared = any(memory[number] == memory[over] for number in step.reads if number != over)
            fits = tape.layouts[over][2:] == tape.layouts[step.makes[0]][2:]
            if fits and not shared and memory[over] not in kept and last[memory[over]] == place:
                changed.append(written)
                break
        else:
            changed.append(step)
    return changed


def _in_place_forms(step: Step) -> list[Step]:
    """Return the forms of an elementwise operation that write over its first argument, or over its second if the order does not matter."""
    operation = step.operation
    packet = getattr(torch.ops.aten, f"{operation._opname}_", None)
    over = getattr(packet, operation._overloadname, None)
    if over is None or torch.Tag.pointwise not in operation.tags or not isinstance(step.results, Slot):
        return []
    orders: list[tuple[Any, ...]] = [step.args]
    if operation is torch.ops.aten.mul.Tensor:
        orders.append((step.args[1], step.args[0]))
    return [replace(step, operation=over, args=args) for args in orders if args and isinstance(args[0], Slot)]
