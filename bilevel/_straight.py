"""Which of a user's functions do the same operations at every call, so that one look at them is as good as many.

A function of straight code, without branches, that reaches nothing but its arguments, constants, plain tensors, operations of torch and other
such functions has no state and no choice: what was found in it at one call, with arguments of the same kinds, holds for the next. So it is of a
method that makes no use of its object. Of any other function (one that reaches a module, a list or a class) nothing is said.
"""

from __future__ import annotations

import builtins
import dis
import math
from collections import OrderedDict
from collections.abc import Iterator
from functools import lru_cache
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any
from weakref import ReferenceType

import torch
from torch.utils import _pytree as pytree

from bilevel._transforms import is_plain

__all__ = ["Memory", "ordinary", "reached"]

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


class Memory:
    """Remembers the last of what was looked at, by one caller; a copy of it, or a pickle, has forgotten."""

    def __init__(self) -> None:
        self._last: tuple[tuple[Any, ...], tuple[Any, ...]] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Memory, ()

    def has(self, key: tuple[Any, ...], parts: tuple[Any, ...]) -> bool:
        """Return whether just this is the last that was remembered: an equal ``key``, and the same objects as ``parts``."""
        if self._last is None:
            return False
        known, objects = self._last
        return known == key and len(objects) == len(parts) and all(map(_is, objects, parts))

    def keep(self, key: tuple[Any, ...], parts: tuple[Any, ...]) -> None:
        """Remember this, and nothing before."""
        # Weakly what may hold much: a function that came as an argument is let go when its caller does so.
        weak = (ReferenceType(part) if isinstance(part, (FunctionType, torch.Tensor)) else part for part in parts)
        self._last = key, tuple(weak)


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
            item = item.__func__
            if not isinstance(item, FunctionType) or _uses_first(item.__code__):
                return None
        parts.append(item)
        if type(item) is tuple:
            pending.extend(item)
        elif isinstance(item, FunctionType) and not _of_torch(item):
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


def ordinary(structure: pytree.TreeSpec) -> bool:
    """Return whether a pytree has no nodes but tuples, lists and dicts: others bring methods that are not looked for."""
    if structure.is_leaf():
        return True
    return structure.type in _CONTAINERS and all(ordinary(child) for child in structure.children())


def _harmless(item: Any) -> bool:
    if isinstance(item, torch.Tensor):
        return type(item) is torch.Tensor and is_plain(item) and not vars(item)
    if isinstance(item, ModuleType):
        return item.__name__.split(".")[0] in _MODULES
    if isinstance(item, (BuiltinFunctionType, type)):
        return item in _BUILTINS or _of_torch(item) or getattr(math, item.__name__, None) is item
    return type(item) in _CONSTANTS or isinstance(item, FunctionType)


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
