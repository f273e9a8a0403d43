"""The notes of a run, from which its tape is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from bilevel.replay.program import Program, Tensors
from bilevel.replay.tape import Layout, Slot, Step, Tape, slots_in

__all__ = ["Note", "note"]

# Operations that look at numbers to decide what to do, or of which shape to be, as torch marks them.
_OPEN = {torch.Tag.nondeterministic_seeded, torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
# These read numbers without a mark.
_READING = ("_local_scalar_dense", "_pack_padded_sequence", "is_nonzero")
_aten = torch.ops.aten
_VIEWS = {
    _aten.squeeze_.default: _aten.squeeze.default,
    _aten.squeeze_.dim: _aten.squeeze.dim,
    _aten.squeeze_.dims: _aten.squeeze.dims,
    _aten.unsqueeze_.default: _aten.unsqueeze.default,
    _aten.transpose_.default: _aten.transpose.int,
    _aten.t_.default: _aten.t.default,
    _aten.detach_.default: _aten.detach.default,
}
_WHOLE = (torch.int64, torch.int32)
_PRINTING = (torch.Tensor.__repr__, torch.Tensor.__format__)


class Note(NamedTuple):
    """The result of a recording: what the function returned, its program, and the reason if there is no program."""

    outputs: Tensors
    program: Program | None
    reason: str


def note(
    function: Callable[..., Sequence[torch.Tensor]],
    inputs: Sequence[torch.Tensor],
    captured: Sequence[torch.Tensor] = (),
    late: Sequence[torch.Tensor] = (),
    *,
    found: bool = False,
) -> Note:
    """Return what ``function`` makes of ``(*inputs, *late)``, and its program; None if it may do something else another time.

    Parameters
    ----------
    function
        Tensors ↦ tensors.
    inputs, late
        Its arguments, cut from any graph; ``late`` are those of the program's second part.
    captured
        What else it reaches. A program is a function of ``(*inputs, *captured, *late)``.
    found
        Whether tensors of unknown origin may be constants of the program.
    """
    # Arguments that share memory today may be apart tomorrow; what is captured is the same object every time.
    inputs, late = _apart(inputs, captured), _apart(late, ())
    notes = _Recorder((*inputs, *captured, *late), found=found)
    with notes, _Printed() as printed:
        outputs = tuple(function(*inputs, *late))
    tape = notes.tape(outputs)
    reason = tape if isinstance(tape, str) else "a tensor was printed" if printed.any else ""
    if isinstance(tape, Tape) and late and tape.in_place:
        # Which part needs the tensor before the change, and which after, is unknown.
        reason = "a tensor was changed in place"
    program = Program(tape, len(late)) if isinstance(tape, Tape) and not reason else None
    return Note(outputs, program, reason)


def _apart(tensors: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> Tensors:
    """Return ``tensors``, of which those that share memory with another or with ``others`` are copies in the same layout."""
    met, found = {_memory(other) for other in others}, []
    for tensor in tensors:
        if _memory(tensor) in met:
            size = 1 + sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
            span = tensor.as_strided((size if tensor.numel() else 0,), (1,))
            tensor = span.clone().as_strided(tensor.shape, tensor.stride(), 0)
        met.add(_memory(tensor))
        found.append(tensor)
    return tuple(found)


class _Printed(TorchFunctionMode):
    """Inside, it is seen when a tensor is made a string, for which torch reads its numbers past all other modes."""

    def __init__(self) -> None:
        super().__init__()
        self.any = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.any = self.any or func in _PRINTING
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    """A mode that records each operation.

    A tensor is known by its memory and layout, not as an object: the engine and the transforms make other objects of the same numbers. An
    operation that only gives another name to a tensor is therefore not a step.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would import its compiler to keep out of here; the boundary around a call (:func:`bilevel._torch.transforms.eager`) does so already.
        return False

    def __init__(self, inputs: Sequence[torch.Tensor], *, found: bool = False) -> None:
        super().__init__()
        self._found = found
        self._slots: dict[Layout, Slot] = {}
        # Weakly, which lets the numbers go, but keeps another tensor from being taken for this one by its address.
        self._memories: dict[int, StorageWeakRef] = {}
        self._steps: list[Step] = []
        self._constants: dict[int, torch.Tensor] = {}
        self._given = {_memory(t) for t in inputs}
        # Why the run cannot be recorded, or "".
        self._stopped = "two captured tensors share memory" if len(self._given) < len(inputs) else ""
        self._inputs = tuple(self._place(t).number for t in inputs)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # On tensors without numbers torch works out shapes alone.
        shapes_alone = any(isinstance(arg, torch.Tensor) and arg.device.type == "meta" for arg in args)
        if not shapes_alone and _is_open(func, args):
            self._stop(f"{func} reads numbers, draws some, takes a shape from them, or is not torch's own")
        if self._stopped or shapes_alone:
            return func(*args, **kwargs)
        noted = pytree.tree_map_only(torch.Tensor, self._slot, (args, kwargs))
        # What changes the shape of a tensor's name alone is a view under another name.
        operation = _VIEWS.get(func, func)
        if operation._schema.is_mutable and any(_memory(t) in self._given for t in _changed(func, args, kwargs)):
            self._stop(f"{func} changes an argument, or a tensor that the function reaches, in place")
        made = func(*args, **kwargs)
        leaves = pytree.tree_leaves(made)
        found = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        # An answer by yes or no is about numbers, or about which memory they are in.
        if any(isinstance(leaf, bool) for leaf in leaves):
            self._stop(f"{func} answers yes or no")
        if any(t.layout is not torch.strided for t in found):
            self._stop(f"{func} makes a sparse tensor")
        if self._stopped:
            return made
        fresh = any(_layout(t) not in self._slots for t in found)
        results = pytree.tree_map_only(torch.Tensor, self._place, made)
        makes = slots_in(results)
        if fresh or not makes or operation._schema.is_mutable:
            self._steps.append(Step(operation, noted[0], noted[1], results, slots_in(noted), makes))
        return made

    def _stop(self, reason: str) -> None:
        self._stopped = self._stopped or reason

    def tape(self, outputs: Sequence[torch.Tensor]) -> Tape | str:
        """Return what was noted, for a function that returned ``outputs``, or why the run cannot be recorded."""
        found = () if self._stopped else tuple(self._slot(t).number for t in outputs)
        if self._stopped:
            return self._stopped
        layouts = {slot.number: layout for layout, slot in self._slots.items()}
        return Tape(tuple(self._steps), self._inputs, found, self._constants, layouts)

    def _place(self, tensor: torch.Tensor) -> Slot:
        """Return where ``tensor``, which is there now, stands."""
        if tensor.layout is not torch.strided or tensor.is_neg() or tensor.is_conj():
            self._stop("a tensor is sparse, or a conjugate or negative view")
            return Slot(-1)
        self._memories.setdefault(_memory(tensor), StorageWeakRef(tensor.untyped_storage()))
        return self._slots.setdefault(_layout(tensor), Slot(len(self._slots)))

    def _slot(self, tensor: torch.Tensor) -> Slot:
        """Return where ``tensor``, which is read, stands."""
        if tensor.layout is not torch.strided:
            self._stop("a tensor is sparse")
            return Slot(-1)
        if _layout(tensor) in self._slots:
            return self._slots[_layout(tensor)]
        # torch makes tensors of the code's own numbers without an operation, and these have no axes.
        known = self._found or (tensor.ndim == 0 and tensor.device.type == "cpu")
        if not known or tensor.requires_grad:
            self._stop(f"a tensor of shape {tuple(tensor.shape)} is neither an argument nor made by a torch operation")
        slot = self._place(tensor)
        self._constants[slot.number] = tensor
        self._given.add(_memory(tensor))
        return slot


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _layout(tensor: torch.Tensor) -> Layout:
    offset, stride = int(tensor.storage_offset()), tensor.stride()
    return Layout(_memory(tensor), offset, tensor.shape, stride, tensor.dtype, tensor.device)


def _is_open(func: Any, args: tuple[Any, ...]) -> bool:
    """Return whether an operation may do otherwise another time, or is one of which nothing is known."""
    if func.namespace != "aten" or func._opname in _READING:
        return True
    if torch.Tag.inplace_view in func.tags:
        return func not in _VIEWS
    if func is _aten.index.Tensor:
        # The shape follows from the values of a mask alone.
        return any(index is not None and index.dtype not in _WHOLE for index in args[1])
    return not _OPEN.isdisjoint(func.tags)


def _changed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    """Yield the arguments that an operation in place writes to."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor))
