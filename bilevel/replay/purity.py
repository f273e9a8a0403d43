"""Which user functions do the same operations at every call, so that one check of them is enough.

Such a function has no branches. It reaches only its arguments, constants, plain tensors, listed torch operations
(:mod:`bilevel.replay.pure_names`), and other such functions. It therefore has no state and no choice: a check at one
call holds for every call with arguments of the same kinds. The same holds for a method, given the attributes that it
reads from its object, and for modules (:mod:`bilevel.replay.pure_modules`). Any other function counts as unknown: only
what is known to be harmless is accepted.
"""

from __future__ import annotations

import builtins
import dis
import functools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, Generic, NamedTuple, TypeVar
from weakref import ReferenceType

import torch
from torch.utils import _pytree as pytree

from bilevel._torch.transforms import is_plain
from bilevel.replay.opcodes import is_known_step
from bilevel.replay.pure_modules import Bound, StatelessModule, emptied, kept_under, shell_parts
from bilevel.replay.pure_names import MODULES, is_known, of_tensors, operators_are_torch_s

__all__ = ["InspectionCache", "Reach", "has_plain_structure", "reach", "reachable_objects"]

T = TypeVar("T")

_ATTRIBUTE = {"LOAD_ATTR", "LOAD_METHOD"}
# These types themselves: a class derived from one may have methods and a state.
_CONSTANTS: frozenset[type] = frozenset(
    {int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.Size}
)
# Containers without methods of a user's own, with keys without any.
_CONTAINERS = frozenset({tuple, list, dict, OrderedDict})
_KEYS = frozenset({str, int})
_BUILTINS = {
    id(item): item
    for item in (
        abs, bool, dict, enumerate, float, int, len, list, map, pow, range, reversed, slice, sum, tuple, zip,
    )
}  # fmt: skip
# Arguments of so many kinds are told apart at once: the last batch of a data set is smaller than the others.
_MOST_KEPT = 16


class InspectionCache(Generic[T]):
    """The results of the last few checks of one caller. A copy or a pickle of it is empty."""

    def __init__(self) -> None:
        self._kept: list[tuple[tuple[Any, ...], tuple[Any, ...], T]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return InspectionCache, ()

    def find(self, key: tuple[Any, ...], parts: tuple[Any, ...]) -> T | None:
        """Return the result for an equal ``key`` and the same objects ``parts``."""
        for known, objects, made in self._kept:
            if known == key and len(objects) == len(parts) and all(map(_is, objects, parts)):
                return made
        return None

    def keep(self, key: tuple[Any, ...], parts: tuple[Any, ...], made: T) -> None:
        """Keep the result, and drop the oldest."""
        # Weakly what may hold much: a function that came as an argument is let go when its caller does so.
        holding = (FunctionType, torch.Tensor, torch.nn.Module)
        weak = (ReferenceType(part) if isinstance(part, holding) else part for part in parts)
        self._kept = [(key, tuple(weak), made), *self._kept[: _MOST_KEPT - 1]]


def _is(kept: Any, part: Any) -> bool:
    return (kept() is part is not None) if isinstance(kept, ReferenceType) else kept is part


class _Reading(NamedTuple):
    """What is in a function's code, the code inside it included.

    Parameters
    ----------
    named
        For each global and variable of a function around it: whether it is one of the latter, its name, and the attributes taken from it.
    attributes
        Those taken from anything else.
    own
        Those taken from the first argument of a method, which does nothing else with it.
    """

    named: tuple[tuple[bool, str, tuple[str, ...]], ...]
    attributes: tuple[str, ...]
    own: tuple[str, ...]


class Reach(NamedTuple):
    """The objects that functions reach, and whether the user vouches for one of the functions."""

    parts: tuple[Any, ...]
    vouched: bool


def reach(functions: Sequence[Any], *, static: bool) -> Reach | None:
    """Return the reach of ``functions``; None if the code of one cannot be followed, and the user does not vouch for it (``static``)."""
    found, vouched = [], False
    for function in functions:
        parts = reachable_objects(function)
        if parts is None:
            if not static:
                return None
            parts, vouched = _identity(function), True
        found.append(parts)
    return Reach(tuple(part for parts in found for part in parts), vouched)


def _identity(function: Any) -> tuple[Any, ...]:
    # A bound method is another object each time that its owner is asked for it.
    return (function.__func__, function.__self__) if isinstance(function, MethodType) else (function,)


def reachable_objects(*functions: Any) -> tuple[Any, ...] | None:
    """Return every object that ``functions`` or constants reach; None if one is not branch-free or needs a gradient.

    An object appears once for each place from which it is reached, with the name there, in an order that the places
    determine. Two objects therefore cannot exchange their contents unnoticed.
    """
    if not operators_are_torch_s():
        return None
    parts: list[Any] = []
    pending: list[Any] = list(functions)
    expanded: set[tuple[int, int]] = set()
    while pending:
        item = pending.pop()
        if isinstance(item, MethodType):
            item = Bound(item.__func__, item.__self__)
        elif isinstance(item, FunctionType) and not is_known(item):
            item = Bound(item, None)
        if type(item) is Bound:
            followed = _of_function(item, expanded)
        elif type(item) is functools.partial and not vars(item):
            # Made anew for a call it may be another object of the same parts.
            followed = (
                [functools.partial, len(item.args), *item.keywords],
                [item.func, *item.args, *item.keywords.values()],
            )
        elif isinstance(item, torch.nn.Module):
            followed = shell_parts(StatelessModule(item, empty=False))
        elif type(item) is StatelessModule:
            followed = shell_parts(item)
        elif type(item) is tuple:
            # Who keeps the tuple itself would keep what is in it.
            followed = [tuple, len(item)], list(item)
        else:
            followed = ([item], []) if _harmless(item) else None
        if followed is None:
            return None
        parts.extend(followed[0])
        pending.extend(followed[1])
    return tuple(parts)


def _of_function(bound: Bound, expanded: set[tuple[int, int]]) -> tuple[list[Any], list[Any]] | None:
    """Return the objects that identify a function or method, and the objects that it reaches; None if it is not branch-free."""
    function, owner = bound.function, bound.owner
    if not isinstance(function, FunctionType):
        return None
    if owner is not None:
        if not _uses_first(function.__code__):
            owner = None
        elif (told := _class_says(owner, function)) is not None:
            return [function], told
    # A function can be given another code, as interactive sessions do that load edited files anew.
    objects = [function, function.__code__]
    if (id(function), id(owner)) in expanded:
        return objects, []
    expanded.add((id(function), id(owner)))
    reading = _read(function.__code__, owner is not None)
    named = None if reading is None else _named(function, reading)
    if reading is None or named is None:
        return None
    own = [] if owner is None else kept_under(bound, reading.own, _CONSTANTS)
    return None if own is None else (objects, [*named, *own])


def _class_says(owner: Any, method: FunctionType) -> list[Any] | None:
    """Return the objects on which a ``method`` depends besides its arguments, as its class declares them; None without a declaration."""
    says = getattr(type(owner), "_goes_by", None)
    told = None if says is None else says(owner, method)
    return None if told is None else [emptied(item) for item in told]


def has_plain_structure(structure: pytree.TreeSpec) -> bool:
    """Return whether a pytree has only tuples, lists and dicts as nodes. Other nodes and keys may have methods."""
    if structure.is_leaf():
        return True
    if structure.type not in _CONTAINERS or not all(type(key) in _KEYS for key in structure.context or ()):
        return False
    return all(has_plain_structure(child) for child in _children(structure))


def _children(structure: pytree.TreeSpec) -> Sequence[pytree.TreeSpec]:
    # torch 2.9 has an attribute in the method's place.
    return structure.children() if hasattr(structure, "children") else structure.children_specs


def _harmless(item: Any) -> bool:
    if isinstance(item, torch.Tensor):
        return type(item) in (torch.Tensor, torch.nn.Parameter) and _is_alone(item)
    return type(item) in _CONSTANTS or is_known(item) or _BUILTINS.get(id(item)) is item is not None


def _is_alone(tensor: torch.Tensor) -> bool:
    """Return whether no other tensor is reached from this one, as its gradient or its base."""
    return is_plain(tensor) and not vars(tensor) and tensor.grad is None


def _named(function: FunctionType, reading: _Reading) -> list[Any] | None:
    """Return the globals, closure variables, defaults and attributes of ``function``.

    None if an attribute is not known to be harmless, a cell is empty, or a module is used for more than what is in it.
    """
    found = [*(function.__defaults__ or ())]
    for extra in (function.__kwdefaults__ or {}, vars(function)):
        found += [item for pair in extra.items() for item in pair]
    try:
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
    except ValueError:
        return None
    # Modules are followed to what is taken from them.
    found += [value for value in cells if not isinstance(value, ModuleType)]
    closed, space = dict(zip(function.__code__.co_freevars, cells, strict=True)), function.__globals__
    for free, name, attributes in reading.named:
        if name in closed if free else name in space:
            value = closed[name] if free else space[name]
        elif not free and hasattr(builtins, name):
            value = getattr(builtins, name)
        else:
            return None
        place = 0
        while isinstance(value, ModuleType):
            ours = value.__name__ == "bilevel"
            if place == len(attributes) or not (ours or value in MODULES) or not hasattr(value, attributes[place]):
                return None
            value, place = getattr(value, attributes[place]), place + 1
        if not of_tensors(attributes[place:]):
            return None
        found.append(value)
    return found if of_tensors(reading.attributes) else None


@lru_cache(maxsize=1024)
def _read(code: CodeType, method: bool) -> _Reading | None:
    """Return the names in ``code``; None if it is not branch-free. ``method``: its first argument is an object to be followed."""
    parts = list(_nested(code))
    local = {name for part in parts for name in part.co_cellvars}
    first = code.co_varnames[0] if method else None
    if not local.isdisjoint(code.co_freevars) or first in code.co_cellvars:
        return None
    named, attributes, own = set(), set(), set()
    for part in parts:
        steps = [step for step in dis.get_instructions(part) if step.opname not in ("CACHE", "EXTENDED_ARG")]
        place = 0
        while place < len(steps):
            step = steps[place]
            place += 1
            if not is_known_step(step):
                return None
            if step.opname in ("STORE_DEREF", "DELETE_DEREF") and step.argval in part.co_freevars:
                return None
            follows = place
            while follows < len(steps) and steps[follows].opname in _ATTRIBUTE:
                follows += 1
            taken = tuple(after.argval for after in steps[place:follows])
            free = step.opname == "LOAD_DEREF"
            if part is code and first is not None and _touches(step, first):
                if not taken or not _only_loads(step, first):
                    return None
                own.add(taken[0])
                place += 1
            elif step.opname == "LOAD_GLOBAL" or (free and step.argval not in local):
                named.add((free, step.argval, taken))
                place = follows
            elif step.opname in _ATTRIBUTE:
                attributes.add(step.argval)
    return _Reading(tuple(sorted(named)), tuple(sorted(attributes)), tuple(sorted(own)))


def _touches(step: dis.Instruction, variable: str) -> bool:
    """Return whether a step reads or writes a local variable."""
    # Later versions of Python load two variables at once.
    variables = step.argval if isinstance(step.argval, tuple) else (step.argval,)
    return "FAST" in step.opname and variable in variables


def _only_loads(step: dis.Instruction, variable: str) -> bool:
    """Return whether a step that touches ``variable`` leaves it on top of the stack, and does nothing else with it."""
    variables = step.argval if isinstance(step.argval, tuple) else (step.argval,)
    loads = step.opname.startswith("LOAD_FAST") or step.opname == "STORE_FAST_LOAD_FAST"
    return loads and "CLEAR" not in step.opname and variable == variables[-1] and variable not in variables[:-1]


@lru_cache(maxsize=1024)
def _uses_first(code: CodeType) -> bool:
    """Return whether ``code`` makes any use of its first argument, which is a method's object."""
    if not code.co_argcount or code.co_varnames[0] in code.co_cellvars:
        return True
    return any(_touches(step, code.co_varnames[0]) for step in dis.get_instructions(code))


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)
