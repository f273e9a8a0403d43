"""What a function does, noted operation by operation, and done again without the function.

A derivative under ``vmap`` is some hundred small operations, and on small problems most of its time goes into finding out which: through Python,
the transforms' layers and the autograd engine. Where a function can do but one thing (:mod:`bilevel._straight`), that is known after one run.
What is noted lies below all transforms: operations of torch on plain tensors, those of the derivatives among them. Doing them again gives the
same numbers, bit for bit.

A run that could have gone another way for other numbers is not kept: one in which a number was read from a tensor, random numbers were drawn,
a shape followed from values, an argument was changed, or a tensor came from nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Begun", "Program", "note"]

Tensors: TypeAlias = tuple[torch.Tensor, ...]
Written: TypeAlias = Callable[..., Tensors]

# Operations that look at numbers to decide what to do, or of which shape to be, as torch marks them.
_OPEN = {torch.Tag.nondeterministic_seeded, torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
# These read numbers without a mark.
_READING = ("_local_scalar_dense", "_pack_padded_sequence", "is_nonzero")
_INLINE = (int, float, bool, str, type(None))
_WHOLE = (torch.int64, torch.int32)


@dataclass(frozen=True)
class _Slot:
    """The place of a tensor on a tape."""

    number: int


@dataclass(frozen=True, eq=False)
class _Step:
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


@dataclass(frozen=True, eq=False)
class _Tape:
    """The operations of one run in order, with the slots of the function's arguments and results, and small tensors made of its code alone."""

    steps: tuple[_Step, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    constants: dict[int, torch.Tensor] = field(repr=False)

    def after(self, slots: Iterable[int]) -> set[int]:
        """Return the slots that depend on ``slots``, these among them."""
        found = set(slots)
        for step in self.steps:
            if not found.isdisjoint(step.reads):
                found.update(step.makes)
        return found

    def needed(self, outputs: Iterable[int], given: Iterable[int], here: Callable[[_Step], bool]) -> list[_Step]:
        """Return the steps that make ``outputs`` where the slots ``given`` are there.

        Of those that make nothing but may raise, as one that checks a factorisation does, those are among them of which ``here`` is true; and
        all are, once some step works in place.
        """
        if any(step.writes for step in self.steps):
            return list(self.steps)
        there = set(given)
        wanted, kept = set(outputs) - there, []
        for step in reversed(self.steps):
            if not wanted.isdisjoint(step.makes) or (not step.makes and here(step)):
                kept.append(step)
                wanted.update(number for number in step.reads if number not in there)
        return kept[::-1]


@dataclass(frozen=True, eq=False)
class Begun:
    """A program that has been run as far as its first arguments go.

    Parameters
    ----------
    outputs
        The results that depend on these alone; None for the others.
    """

    program: Program
    outputs: tuple[torch.Tensor | None, ...]
    between: Tensors = field(repr=False)

    def finish(self, which: tuple[int, ...], *late: torch.Tensor) -> Tensors:
        """Return the results at the places ``which`` for the ``late`` arguments, as often as one likes."""
        return self.program.rest(which)(*late, *self.between)


class Program:
    """A tape as a function, which may be run in two parts: what its first arguments determine, once, and the rest as often as one likes.

    Parameters
    ----------
    tape
        What was noted.
    late
        How many arguments, the last, belong to the second part.
    """

    def __init__(self, tape: _Tape, late: int = 0) -> None:
        early = len(tape.inputs) - late
        self._tape, self._late = tape, tape.inputs[early:]
        self._hanging = tape.after(self._late)
        self._first = [number for number in tape.outputs if number not in self._hanging]
        read = {n for step in tape.steps if not self._hanging.isdisjoint(step.makes) for n in step.reads}
        between = {*read, *self._first} - self._hanging - set(tape.constants) if late else set()
        self._between = tuple(sorted(between))
        steps = tape.needed((*self._first, *self._between), tape.inputs[:early], lambda step: not self._hangs(step))
        self._begin = _written(steps, tape.inputs[:early], (*self._first, *self._between), tape.constants)
        self._rests: dict[tuple[int, ...], Written] = {}

    def __call__(self, *inputs: torch.Tensor) -> Tensors:
        """Return all results, of a program in one part."""
        return self._begin(*inputs)

    def begin(self, *early: torch.Tensor) -> Begun:
        """Run the first part."""
        made = self._begin(*early)
        known = iter(made)
        outputs = tuple(None if number in self._hanging else next(known) for number in self._tape.outputs)
        return Begun(self, outputs, made[len(self._first) :])

    def rest(self, which: tuple[int, ...]) -> Written:
        """Return the second part for the results at the places ``which``."""
        if which not in self._rests:
            outputs = [self._tape.outputs[place] for place in which]
            steps = self._tape.needed(outputs, self._between, self._hangs)
            given = (*self._late, *self._between)
            self._rests[which] = _written(steps, given, outputs, self._tape.constants)
        return self._rests[which]

    def _hangs(self, step: _Step) -> bool:
        return not self._hanging.isdisjoint(step.reads)


def note(
    function: Callable[..., Sequence[torch.Tensor]],
    inputs: Sequence[torch.Tensor],
    captured: Sequence[torch.Tensor] = (),
    late: Sequence[torch.Tensor] = (),
) -> tuple[Tensors, Program | None]:
    """Return what ``function`` makes of ``(*inputs, *late)``, and its program; None where it could do otherwise another time.

    Parameters
    ----------
    function
        Tensors ↦ tensors.
    inputs, late
        Its arguments, cut from any graph; ``late`` are those of the program's second part.
    captured
        What else it reaches. A program is a function of ``(*inputs, *captured, *late)``.
    """
    # Arguments that share memory today may be apart tomorrow; what is captured is the same object every time.
    inputs, late = _apart(inputs, captured), _apart(late, ())
    notes = _Notes((*inputs, *captured, *late))
    with notes:
        outputs = tuple(function(*inputs, *late))
    tape = notes.tape(outputs)
    return outputs, None if tape is None else _program(tape, len(late))


def _program(tape: _Tape, late: int) -> Program | None:
    # Of what is changed in place it is not known which part needs it before, and which after.
    return None if late and any(step.writes for step in tape.steps) else Program(tape, late)


def _apart(tensors: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> Tensors:
    """Return ``tensors``, of which those that share memory with another or with ``others`` are copies in the same layout."""
    met, found = {_memory(other) for other in others}, []
    for tensor in tensors:
        if _memory(tensor) in met:
            size = 1 + sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
            room = tensor.new_empty(size if tensor.numel() else 0)
            tensor = room.as_strided(tensor.shape, tensor.stride()).copy_(tensor)
        met.add(_memory(tensor))
        found.append(tensor)
    return tuple(found)


class _Notes(TorchDispatchMode):
    """Inside, each operation is noted.

    A tensor is known by its memory and layout, not as an object: the engine and the transforms make other objects of the same numbers. What gives
    nothing but another name to a tensor is so no step at all.
    """

    def __init__(self, inputs: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._slots: dict[Any, _Slot] = {}
        # Weakly, which lets the numbers go, but keeps another tensor from being taken for this one by its address.
        self._memories: dict[int, StorageWeakRef] = {}
        self._steps: list[_Step] = []
        self._constants: dict[int, torch.Tensor] = {}
        self._given = {_memory(t) for t in inputs}
        self._open = len(self._given) < len(inputs)  # two captured ones, in one memory
        self._inputs = tuple(self._place(t).number for t in inputs)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._open = self._open or _is_open(func, args)
        if self._open:
            return func(*args, **kwargs)
        noted = pytree.tree_map_only(torch.Tensor, self._slot, (args, kwargs))
        if func._schema.is_mutable:
            self._open = any(_memory(t) in self._given for t in _changed(func, args, kwargs))
        made = func(*args, **kwargs)
        fresh = any(
            _geometry(leaf) not in self._slots for leaf in pytree.tree_leaves(made) if isinstance(leaf, torch.Tensor)
        )
        results = pytree.tree_map_only(torch.Tensor, self._place, made)
        makes = _numbers(results)
        if fresh or not makes or func._schema.is_mutable:
            self._steps.append(_Step(func, noted[0], noted[1], results, _numbers(noted), makes))
        return made

    def tape(self, outputs: Sequence[torch.Tensor]) -> _Tape | None:
        """Return what was noted, for a function that returned ``outputs``."""
        found = tuple(self._slot(t).number for t in outputs)
        return None if self._open else _Tape(tuple(self._steps), self._inputs, found, self._constants)

    def _place(self, tensor: torch.Tensor) -> _Slot:
        """Return where ``tensor``, which is there now, stands."""
        if tensor.layout is not torch.strided or tensor.is_neg() or tensor.is_conj():
            self._open = True
            return _Slot(-1)
        self._memories.setdefault(_memory(tensor), StorageWeakRef(tensor.untyped_storage()))
        return self._slots.setdefault(_geometry(tensor), _Slot(len(self._slots)))

    def _slot(self, tensor: torch.Tensor) -> _Slot:
        """Return where ``tensor``, which is read, stands."""
        if tensor.layout is torch.strided and _geometry(tensor) in self._slots:
            return self._slots[_geometry(tensor)]
        # torch makes tensors of the code's own numbers without an operation. More than one number is not of the code's.
        self._open = self._open or tensor.numel() != 1 or tensor.device.type != "cpu" or tensor.requires_grad
        slot = self._place(tensor)
        self._constants[slot.number] = tensor
        self._given.add(_memory(tensor))
        return slot


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _geometry(tensor: torch.Tensor) -> tuple[Any, ...]:
    return _memory(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _is_open(func: Any, args: tuple[Any, ...]) -> bool:
    """Return whether an operation may do otherwise another time, or is one of which nothing is known."""
    if func.namespace != "aten" or func._opname in _READING:
        return True
    if func is torch.ops.aten.index.Tensor:
        # The shape follows from the values of a mask alone.
        return any(index is not None and index.dtype not in _WHOLE for index in args[1])
    return not _OPEN.isdisjoint(func.tags)


def _changed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    """Yield the arguments that an operation in place writes to."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor))


def _numbers(tree: Any) -> tuple[int, ...]:
    return tuple(leaf.number for leaf in pytree.tree_leaves(tree) if isinstance(leaf, _Slot))


def _written(
    steps: Sequence[_Step], inputs: Sequence[int], outputs: Sequence[int], constants: dict[int, torch.Tensor]
) -> Written:
    """Return a function of ``steps``, written as one would by hand: each result is let go after its last use."""
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
    return f"t{results.number}" if isinstance(results, _Slot) else "_"


def _term(value: Any, space: dict[str, Any]) -> str:
    """Return ``value`` as it is written in a call."""
    if isinstance(value, _Slot):
        return f"t{value.number}"
    if isinstance(value, (list, tuple)):
        inner = " ".join(f"{_term(item, space)}," for item in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    if type(value) in _INLINE and repr(value) not in ("inf", "-inf", "nan"):
        return repr(value)
    space[name := f"k{len(space)}"] = value
    return name
