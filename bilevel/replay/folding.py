"""Steps of a tape whose results are the same in every run: made once, and kept as constants.

A derivative begins with a tensor of ones, and its first operations spread these over a sum or a mean. Their results depend on shapes alone. In small
problems they are a sixth of all operations.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.utils import _pytree as pytree

from bilevel.replay.tape import Slot, Step, Tape

__all__ = ["fold"]

# These take a tensor for its shape, dtype and device, and do not read its numbers.
_SHAPED = ("ones_like", "zeros_like", "full_like", "new_ones", "new_zeros", "new_full")
# The numbers of these are not determined.
_UNDETERMINED = ("empty", "empty_strided")
# Larger results are made anew in every run, so that a program holds little memory.
_MOST_NUMBERS = 4096


def fold(tape: Tape) -> Tape:
    """Return the tape without the steps that no input reaches. Their results are among the constants of the tape returned.

    What shares memory with an output is made anew: an output belongs to the caller. So is what reads a constant of ``tape`` itself: its numbers may
    change.
    """
    if tape.in_place:
        return tape
    outward = {tape.layouts[number].memory for number in tape.outputs}
    made: dict[int, torch.Tensor] = {}
    steps = []
    with torch.inference_mode(False), torch.no_grad():
        for step in tape.steps:
            if _is_fixed(step, tape, made) and tape.layouts[step.makes[0]].memory not in outward:
                made[step.makes[0]] = _result(step, tape, made)
            else:
                steps.append(step)
    return replace(tape, steps=tuple(steps), constants={**tape.constants, **made})


def _is_fixed(step: Step, tape: Tape, made: dict[int, torch.Tensor]) -> bool:
    if not isinstance(step.results, Slot) or step.operation._opname in _UNDETERMINED:
        return False
    if tape.layouts[step.makes[0]].shape.numel() > _MOST_NUMBERS:
        return False
    return step.operation._opname in _SHAPED or all(number in made for number in step.reads)


def _result(step: Step, tape: Tape, made: dict[int, torch.Tensor]) -> torch.Tensor:
    def given(slot: Slot) -> torch.Tensor:
        if slot.number in made:
            return made[slot.number]
        _, _, shape, stride, dtype, device = tape.layouts[slot.number]
        return torch.empty_strided(shape, stride, dtype=dtype, device=device)

    args, kwargs = pytree.tree_map_only(Slot, given, (step.args, step.kwargs))
    found: torch.Tensor = step.operation(*args, **kwargs)
    return found
