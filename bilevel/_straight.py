"""Which of a user's functions do the same operations at every call, so that one look at them is as good as many.

A function of straight code, without branches, that reaches nothing but its arguments, constants, plain tensors, operations of torch and other
such functions has no state and no choice: what was found in it at one call, with arguments of the same kinds, holds for the next. So it is of a
method, with what its object keeps under the names in its code, and of modules that are straight likewise. Of any other function (one that reaches
a list, a class or an object of another kind) nothing is said.
"""

from __future__ import annotations

import builtins
import dis
import functools
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, Generic, TypeVar
from weakref import ReferenceType

import torch
from torch.utils import _pytree as pytree

from bilevel._straight_modules import Shell, attributes_of, emptied, methods_of, reaches, shell_parts
from bilevel._transforms import is_plain

__all__ = ["Memory", "ordinary", "reached", "tells"]

T = TypeVar("T")

# Loops are no choices; every other jump is one.
_LOOPS = {"FOR_ITER", "JUMP_ABSOLUTE", "JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_BACKWARD_NO_INTERRUPT"}
# Handlers are choices too, and what is imported, written elsewhere or made a class is not looked for.
_NOT_STRAIGHT = {
    "PUSH_EXC_INFO", "IMPORT_NAME", "IMPORT_FROM", "STORE_GLOBAL", "DELETE_GLOBAL", "STORE_ATTR", "DELETE_ATTR", "LOAD_BUILD_CLASS",
}  # fmt: skip
_JUMPS = {dis.opname[code] for code in (*dis.hasjrel, *dis.hasjabs)}
# These types themselves: a class derived from one may have methods and a state.
_CONSTANTS = frozenset(
    {int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.Size}
)
# Containers without methods of a user's own.
_CONTAINERS = frozenset({tuple, list, dict, OrderedDict})
_BUILTINS = frozenset(
    getattr(builtins, name)
    for name in (
        "abs", "bool", "dict", "enumerate", "float", "int", "len", "list", "map", "pow", "range", "reversed", "slice", "sum", "tuple", "zip",
    )
)  # fmt: skip
_MODULES = ("torch", "math", "bilevel")
# What reads a tensor's numbers where torch does not see it, or goes by them.
_READING = frozenset({
    "numpy", "tolist", "item", "data_ptr", "storage", "untyped_storage", "storage_offset", "from_numpy", "frombuffer", "from_dlpack", "to_dlpack",
    "__array__", "__dlpack__", "__array_interface__", "apply_", "map_", "map2_", "tensor_split", "hsplit", "vsplit", "dsplit", "array_split",
    "pack_padded_sequence", "pack_sequence", "ctc_loss", "CTCLoss", "lstm", "gru", "rnn_tanh", "rnn_relu", "nested", "set_", "resize_",
    "resize_as_", "data", "_base", "_version", "load", "initial_seed", "seed", "get_rng_state", "random", "get_num_threads", "is_grad_enabled",
    "is_inference_mode_enabled", "is_autocast_enabled", "distributed", "ops", "jit", "compile", "library", "profiler", "hub", "overrides",
})  # fmt: skip
# Arguments of so many kinds are told apart at once: the last batch of a data set is smaller than the others.
_MOST_KEPT = 16


class Memory(Generic[T]):
    """Remembers what was made of the last few that were looked at, by one caller; a copy of it, or a pickle, has forgotten."""

    def __init__(self) -> None:
        self._kept: list[tuple[tuple[Any, ...], tuple[Any, ...], T]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return Memory, ()

    def find(self, key: tuple[Any, ...], parts: tuple[Any, ...]) -> T | None:
        """Return what was kept with just this: an equal ``key``, and the same objects as ``parts``."""
        for known, objects, made in self._kept:
            if known == key and len(objects) == len(parts) and all(map(_is, objects, parts)):
                return made
        return None

    def keep(self, key: tuple[Any, ...], parts: tuple[Any, ...], made: T) -> None:
        """Remember this, and forget what came long before."""
        # Weakly what may hold much: a function that came as an argument is let go when its caller does so.
        holding = (FunctionType, torch.Tensor, torch.nn.Module)
        weak = (ReferenceType(part) if isinstance(part, holding) else part for part in parts)
        self._kept = [(key, tuple(weak), made), *self._kept[: _MOST_KEPT - 1]]


def _is(kept: Any, part: Any) -> bool:
    return (kept() is part is not None) if isinstance(kept, ReferenceType) else kept is part


def reached(*functions: Any) -> tuple[Any, ...] | None:
    """Return every object that ``functions``, or constants, reach if all are straight, and no gradient is; else None.

    An object stands there once for each place that it is reached from, in an order that the places determine, so that no two of them can
    exchange what they hold without a trace.
    """
    parts: list[Any] = []
    pending: list[Any] = list(functions)
    expanded: set[int] = set()
    while pending:
        item = pending.pop()
        if isinstance(item, MethodType):
            owner, item = item.__self__, item.__func__
            if not isinstance(item, FunctionType):
                return None
            if _uses_first(item.__code__):
                told = _of_object(owner, item)
                if told is None:
                    return None
                parts.append(item)
                pending.extend(told)
                continue
        if type(item) is functools.partial and not vars(item):
            # Made anew for a call it may be another object of the same parts.
            pending.extend((item.func, *item.args, *item.keywords, *item.keywords.values()))
            continue
        if isinstance(item, torch.nn.Module):
            item = Shell(item, empty=False)
        if isinstance(item, Shell):
            shell = shell_parts(item, _attributes)
            if shell is None:
                return None
            parts.extend(shell[0])
            pending.extend(shell[1])
            continue
        if type(item) is tuple:
            # Who keeps the tuple itself would keep what is in it.
            parts.extend((tuple, len(item)))
            pending.extend(item)
            continue
        parts.append(item)
        if isinstance(item, FunctionType) and not _of_torch(item):
            if id(item) in expanded:
                continue
            expanded.add(id(item))
            named = _named(item)
            if named is None:
                return None
            # A function can be given another code, as interactive sessions do that load edited files anew.
            parts.append(item.__code__)
            pending.extend(named)
        elif not _harmless(item):
            return None
    return tuple(parts)


def tells(parts: tuple[Any, ...]) -> bool:
    """Return whether torch sees all that functions which reach just these ``parts`` make of numbers, and they go by nothing else that may change."""
    return not any(isinstance(part, CodeType) and _reads(part) for part in parts)


@lru_cache(maxsize=1024)
def _reads(code: CodeType) -> bool:
    return any(not _READING.isdisjoint(part.co_names) for part in _nested(code))


def _of_object(owner: Any, method: FunctionType) -> list[Any] | None:
    """Return what an object's ``method`` goes by besides arguments: what its class says of it, or what its code names. None if that is unknown."""
    says = getattr(type(owner), "_goes_by", None)
    told = None if says is None else says(owner, method)
    if told is not None:
        return [emptied(item) for item in told]
    if getattr(type(owner), method.__name__, None) is not method or not hasattr(owner, "__dict__"):
        return None
    methods = methods_of(owner, method.__name__, _attributes)
    if methods is None or any(
        reaches(code) for item in methods if isinstance(item, FunctionType) for code in _nested(item.__code__)
    ):
        return None
    return [*methods, *attributes_of(owner, methods, _attributes)]


def _attributes(code: CodeType) -> Iterator[str]:
    return (name for part in _nested(code) for name in part.co_names)


def ordinary(structure: pytree.TreeSpec) -> bool:
    """Return whether a pytree has no nodes but tuples, lists and dicts: others bring methods that are not looked for."""
    if structure.is_leaf():
        return True
    return structure.type in _CONTAINERS and all(ordinary(child) for child in _children(structure))


def _children(structure: pytree.TreeSpec) -> Sequence[pytree.TreeSpec]:
    # torch 2.9 has an attribute in the method's place.
    return structure.children() if hasattr(structure, "children") else structure.children_specs


def _harmless(item: Any) -> bool:
    if isinstance(item, torch.Tensor):
        return type(item) in (torch.Tensor, torch.nn.Parameter) and _is_alone(item)
    if isinstance(item, ModuleType):
        return item.__name__.split(".")[0] in _MODULES
    if isinstance(item, (BuiltinFunctionType, type)):
        return item in _BUILTINS or _of_torch(item) or getattr(math, item.__name__, None) is item
    return type(item) in _CONSTANTS or isinstance(item, FunctionType)


def _is_alone(tensor: torch.Tensor) -> bool:
    """Return whether no other tensor is reached from this one: as its gradient, or what it is a view of."""
    return is_plain(tensor) and not vars(tensor) and tensor.grad is None


def _of_torch(item: Any) -> bool:
    """Return whether a function is one of torch's own, by name too: what it made of a user's function bears another's."""
    home = getattr(item, "__module__", None) or ""
    if isinstance(item, BuiltinFunctionType):
        return getattr(torch, item.__name__, None) is item or getattr(torch.nn.functional, item.__name__, None) is item
    return (
        isinstance(item, FunctionType)
        and home.split(".")[0] in ("torch", "bilevel")
        and item.__globals__.get(item.__name__) is item
    )


def _named(function: FunctionType) -> list[Any] | None:
    """Return what ``function`` names as globals, closes over, has as defaults or was given as attributes.

    None if it is not straight, or a cell is empty.
    """
    names = _globals_of(function.__code__)
    if names is None:
        return None
    found = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *vars(function).values()]
    try:
        found += [cell.cell_contents for cell in function.__closure__ or ()]
    except ValueError:
        return None
    space = function.__globals__
    for name in names:
        if name not in space and not hasattr(builtins, name):
            return None
        found.append(space[name] if name in space else getattr(builtins, name))
    return found


@lru_cache(maxsize=1024)
def _globals_of(code: CodeType) -> tuple[str, ...] | None:
    """Return which globals ``code`` names, with the code inside it; None if any of it is not straight."""
    names: set[str] = set()
    for part in _nested(code):
        for step in dis.get_instructions(part):
            if step.opname in _NOT_STRAIGHT or (step.opname in _JUMPS and step.opname not in _LOOPS):
                return None
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                names.add(step.argval)
    return tuple(sorted(names))


@lru_cache(maxsize=1024)
def _uses_first(code: CodeType) -> bool:
    """Return whether ``code`` makes any use of its first argument, which is a method's object."""
    if not code.co_argcount or code.co_varnames[0] in code.co_cellvars:
        return True
    first = code.co_varnames[0]
    # Later versions of Python load two variables at once.
    return any(
        step.argval == first or (isinstance(step.argval, tuple) and first in step.argval)
        for step in dis.get_instructions(code)
    )


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)
