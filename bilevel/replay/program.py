"""A tape as a Python function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from bilevel.replay.folding import fold
from bilevel.replay.memory import reuse_memory
from bilevel.replay.tape import Slot, Step, Tape

__all__ = ["Program", "StartedProgram", "Tensors"]

Tensors: TypeAlias = tuple[torch.Tensor, ...]
Written: TypeAlias = Callable[..., Tensors]

_INLINE = (int, float, bool, str, type(None))


@dataclass(frozen=True, eq=False)
class StartedProgram:
    """A program whose first part has run.

    Parameters
    ----------
    outputs
        The results that depend on these alone; None for the others.
    """

    program: Program
    outputs: tuple[torch.Tensor | None, ...]
    between: Tensors = field(repr=False)
    versions: list[int] = field(repr=False)

    def finish(self, which: tuple[int, ...], *late: torch.Tensor) -> Tensors:
        """Return the results at the places ``which`` for the ``late`` arguments, any number of times."""
        written, read = self.program.rest(which)
        now = _versions(self.between)
        if now != self.versions and any(now[place] != self.versions[place] for place in read):
            # as a graph says of what it has saved
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a tensor "
                "that the function reaches was changed between the forward pass and the backward pass; change it after the backward pass"
            )
        return written(*late, *self.between)


class Program:
    """A tape as a function in two parts: the part that does not depend on the deferred inputs runs once, the rest any number of times.

    Parameters
    ----------
    tape
        The recorded operations.
    late
        The number of deferred inputs, which come last.
    """

    def __init__(self, tape: Tape, late: int = 0) -> None:
        # The tensors on the tape that no operation made.
        self.constants: Tensors = tuple(tape.constants.values())
        tape = fold(tape)
        early = len(tape.inputs) - late
        self._tape, self._late = tape, tape.inputs[early:]
        self._hanging = tape.after(self._late)
        self._first = [number for number in tape.outputs if number not in self._hanging]
        read = {n for step in tape.steps if not self._hanging.isdisjoint(step.makes) for n in step.reads}
        between = {*read, *self._first} - self._hanging - set(tape.constants) if late else set()
        self._between = tuple(sorted(between))
        outputs = (*self._first, *self._between)
        # Of a program in one part, this returns all results.
        self.run = self._part(tape.inputs[:early], outputs, lambda step: not self._hangs(step))
        self._rests: dict[tuple[int, ...], tuple[Written, tuple[int, ...]]] = {}

    def begin(self, *early: torch.Tensor) -> StartedProgram:
        """Run the first part."""
        made = self.run(*early)
        known = iter(made)
        outputs = tuple([None if number in self._hanging else next(known) for number in self._tape.outputs])
        between = made[len(self._first) :]
        return StartedProgram(self, outputs, between, _versions(between))

    def rest(self, which: tuple[int, ...]) -> tuple[Written, tuple[int, ...]]:
        """Return the second part for the results at the places ``which``, and which of the tensors between the parts it reads."""
        if which not in self._rests:
            outputs = [self._tape.outputs[place] for place in which]
            written = self._part((*self._late, *self._between), outputs, self._hangs)
            needed = self._tape.needed(outputs, self._between, self._hangs)
            read = {number for step in needed for number in step.reads}.union(outputs)
            places = tuple(place for place, number in enumerate(self._between) if number in read)
            self._rests[which] = written, places
        return self._rests[which]

    def shares_constants(self, other: Program) -> bool:
        """Return whether a constant here is in the memory of one there."""
        return not _memories(self.constants).isdisjoint(_memories(other.constants))

    def finds_what_lasts(self, other: Program) -> bool:
        """Return whether the constants with axes are in the same memory here and there. A run finds such tensors, and does not make them."""
        ours, theirs = ([t for t in program.constants if t.ndim] for program in (self, other))
        return _memories(ours) == _memories(theirs)

    def _part(self, given: Sequence[int], outputs: Sequence[int], here: Callable[[Step], bool]) -> Written:
        steps = self._tape.needed(outputs, given, here)
        steps = reuse_memory(self._tape, steps, given, outputs)
        return _written(steps, given, outputs, self._tape.constants)

    def _hangs(self, step: Step) -> bool:
        return not self._hanging.isdisjoint(step.reads)


def _memories(tensors: Iterable[torch.Tensor]) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors}


def _versions(tensors: Tensors) -> list[int]:
    """Return the number of in-place changes of each tensor. Those born in inference mode do not count them."""
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:
        return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]


def _written(
    steps: Sequence[Step], inputs: Sequence[int], outputs: Sequence[int], constants: dict[int, torch.Tensor]
) -> Written:
    """Return a Python function of ``steps``. Each result is released after its last use."""
    last = {number: place for place, step in enumerate(steps) for number in (*step.reads, *step.makes)}
    space: dict[str, Any] = {f"t{number}": constant for number, constant in constants.items()}
    lines = [f"def program({', '.join(f't{number}' for number in inputs)}):"]
    for place, step in enumerate(steps):
        # The operation itself, without the layer of Python around it, where this version of torch has one.
        space[f"f{place}"] = getattr(step.operation, "_op", step.operation)
        args = [_term(arg, space) for arg in step.args]
        args += [f"{name}={_term(value, space)}" for name, value in step.kwargs.items()]
        lines.append(f"    {_target(step.results)} = f{place}({', '.join(args)})")
        done = sorted({n for n in (*step.reads, *step.makes) if last[n] == place}.difference(outputs, constants))
        lines += [f"    {' = '.join(f't{number}' for number in done)} = None"] if done else []
    # What was given is not given back as the same object, which its owner may mark as one to differentiate.
    own = {*inputs, *constants}
    lines.append(f"    return ({' '.join(f't{n}.detach(),' if n in own else f't{n},' for n in outputs)})")
    exec("\n".join(lines), space)  # of numbers and names made here
    program: Written = space["program"]
    return program


def _target(results: Any) -> str:
    """Return ``results`` as they are written to the left of an assignment."""
    if isinstance(results, (list, tuple)):
        return f"({' '.join(f'{_target(item)},' for item in results)})"
    return f"t{results.number}" if isinstance(results, Slot) else "_"


def _term(value: Any, space: dict[str, Any]) -> str:
    """Return ``value`` as it is written in a call."""
    if isinstance(value, Slot):
        return f"t{value.number}"
    if isinstance(value, (list, tuple)):
        inner = " ".join(f"{_term(item, space)}," for item in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    if type(value) in _INLINE and repr(value) not in ("inf", "-inf", "nan"):
        return repr(value)
    space[name := f"k{len(space)}"] = value
    return name
