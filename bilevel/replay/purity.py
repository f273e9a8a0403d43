"""Which user functions do the same operations at every call, so that one check of them is enough.

Such a function has no branches. It reaches only its arguments, constants, plain tensors, listed torch operations
(:mod:`bilevel.replay.pure_names`), and other such functions. It therefore has no state and no choice: a check at one
call holds for every call with arguments of the same kinds. The same holds for a method, given the attributes that it
reads from its object, and for modules (:mod:`bilevel.replay.pure_modules`). Any other function counts as unknown: only
what is known to be harmless is accepted.
"""

from __future__ import annotations

import builtins
import functools
from collections import OrderedDict
from collections.abc import Sequence
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from bilevel._torch.transforms import is_plain
from bilevel._torch.tree_spec import children
from bilevel.replay.pure_modules import Bound, StatelessModule, emptied, kept_under, shell_parts
from bilevel.replay.pure_names import AS_IMPORTED, ATTRIBUTES, KNOWN, MODULES, OPERATORS_AS_IMPORTED, operators_of
from bilevel.replay.reading import Reading, read, uses_first

__all__ = ["Reach", "has_plain_structure", "reach", "reachable_objects"]

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


class Reach(NamedTuple):
    """The objects that functions reach, and whether the user vouches for one of the functions."""

    parts: tuple[Any, ...]
    vouched: bool


def reach(functions: Sequence[Any], *, static: bool) -> Reach | str:
    """Return the reach of ``functions``.

    A sentence says why if the code of one cannot be followed, and the user does not vouch for it (``static``).
    """
    found, vouched = [], False
    for function in functions:
        parts = follow(function)
        if isinstance(parts, str):
            if not static:
                return parts
            parts, vouched = _identity(function), True
        found.append(parts)
    return Reach(tuple(part for parts in found for part in parts), vouched)


def _identity(function: Any) -> tuple[Any, ...]:
    # A bound method is another object each time that its owner is asked for it.
    return (function.__func__, function.__self__) if isinstance(function, MethodType) else (function,)


def reachable_objects(*functions: Any) -> tuple[Any, ...] | None:
    """Return every object that ``functions`` or constants reach; None if one is not branch-free or needs a gradient."""
    found = follow(*functions)
    return None if isinstance(found, str) else found


def follow(*functions: Any) -> tuple[Any, ...] | str:
    """Return every object that ``functions`` or constants reach, or a sentence that says why that is unknown.

    An object appears once for each place from which it is reached, with the name there, in an order that the places
    determine. Two objects therefore cannot exchange their contents unnoticed.
    """
    if not operators_are_torch_s():
        return "an operator of torch.Tensor was replaced"
    parts: list[Any] = []
    pending: list[Any] = list(functions)
    expanded: set[tuple[int, int]] = set()
    readers: list[Bound] = []
    while pending:
        item = pending.pop()
        if isinstance(item, MethodType):
            item = Bound(item.__func__, item.__self__)
        elif isinstance(item, FunctionType) and not is_known(item):
            item = Bound(item, None)
        followed: tuple[list[Any], list[Any]] | str
        if type(item) is Bound:
            readers.append(item)
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
            followed = ([item], []) if _harmless(item) else describe(item, readers)
        if isinstance(followed, str):
            return followed
        parts.extend(followed[0])
        pending.extend(followed[1])
    return tuple(parts)


def _of_function(bound: Bound, expanded: set[tuple[int, int]]) -> tuple[list[Any], list[Any]] | str:
    """Return the objects that identify a function or method, and the objects that it reaches; a sentence if it is not branch-free."""
    function, owner = bound.function, bound.owner
    if not isinstance(function, FunctionType):
        return f"`{getattr(function, '__name__', function)}` is not written in Python"
    if owner is not None:
        if not uses_first(function.__code__):
            owner = None
        elif (told := _class_says(owner, function)) is not None:
            return [function], told
    # A function can be given another code, as interactive sessions do that load edited files anew.
    objects = [function, function.__code__]
    if (id(function), id(owner)) in expanded:
        return objects, []
    expanded.add((id(function), id(owner)))
    reading = read(function.__code__, owner is not None)
    if isinstance(reading, str):
        return reading
    named = _named(function, reading)
    if isinstance(named, str):
        return named
    own = [] if owner is None else kept_under(bound, reading.own, _CONSTANTS)
    return own if isinstance(own, str) else (objects, [*named, *own])


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
    return all(has_plain_structure(child) for child in children(structure))


def _harmless(item: Any) -> bool:
    if isinstance(item, torch.Tensor):
        return type(item) in (torch.Tensor, torch.nn.Parameter) and _is_alone(item)
    return type(item) in _CONSTANTS or is_known(item) or _BUILTINS.get(id(item)) is item is not None


def is_known(item: Any) -> bool:
    """Return whether ``item`` is an operation on the list."""
    return KNOWN.get(id(item)) is item


def operators_are_torch_s() -> bool:
    """Return whether the operators of tensors are those that torch came with."""
    try:
        found = operators_of(torch.Tensor)
    except AttributeError:  # one was deleted
        return False
    # Every call of a layer asks this: tuples compare their items by identity first.
    return found == OPERATORS_AS_IMPORTED


def _not_of_tensors(names: Sequence[str]) -> str | None:
    """Return the first of the attributes ``names`` that is not on the list, or no longer what it was; None if all are."""
    for name in names:
        if not (name in ATTRIBUTES and (name not in AS_IMPORTED or getattr(torch.Tensor, name) is AS_IMPORTED[name])):
            return name
    return None


def _is_alone(tensor: torch.Tensor) -> bool:
    """Return whether no other tensor is reached from this one, as its gradient or its base."""
    return is_plain(tensor) and not vars(tensor) and tensor.grad is None


def _named(function: FunctionType, reading: Reading) -> list[Any] | str:
    """Return the globals, closure variables, defaults and attributes of ``function``.

    A sentence says why if an attribute is not known to be harmless, a cell is empty, or a module is used for more than what is in it.
    """
    inside = function.__name__
    found = [*(function.__defaults__ or ())]
    for extra in (function.__kwdefaults__ or {}, vars(function)):
        found += [item for pair in extra.items() for item in pair]
    try:
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
    except ValueError:
        return f"a variable around `{inside}` has no value yet"
    # Modules are followed to what is taken from them.
    found += [value for value in cells if not isinstance(value, ModuleType)]
    closed, space = dict(zip(function.__code__.co_freevars, cells, strict=True)), function.__globals__
    for free, name, attributes in reading.named:
        if name in closed if free else name in space:
            value = closed[name] if free else space[name]
        elif not free and hasattr(builtins, name):
            value = getattr(builtins, name)
        else:
            return f"`{name}` in `{inside}` is not defined"
        place = 0
        while isinstance(value, ModuleType):
            ours = value.__name__ == "bilevel"
            if place == len(attributes) or not (ours or value in MODULES) or not hasattr(value, attributes[place]):
                return f"`{'.'.join((name, *attributes[: place + 1]))}` in `{inside}` is not on the list of known operations"
            value, place = getattr(value, attributes[place]), place + 1
        if (other := _not_of_tensors(attributes[place:])) is not None:
            return f"`.{other}` in `{inside}` is not on the list of known operations"
        found.append(value)
    other = _not_of_tensors(reading.attributes)
    return found if other is None else f"`.{other}` in `{inside}` is not on the list of known operations"


def describe(item: Any, readers: Sequence[Bound]) -> str:
    """Return a sentence that names ``item``, which one of the functions ``readers`` reaches and which cannot be followed."""
    names = (name for bound in reversed(readers) if (name := _name_of(item, bound)) is not None)
    kind = type(item)
    if isinstance(item, torch.Tensor):
        what = "a tensor that requires grad, has a graph, a gradient or attributes, or is of a class of its own"
    elif isinstance(item, type):
        what = f"the class {item.__name__}"
    elif callable(item) and hasattr(item, "__name__"):
        what = f"{item.__name__}, an operation that is not on the list"
    else:
        what = f"{'an' if kind.__name__[0] in 'aeiou' else 'a'} {kind.__name__}, which may change between calls"
    return f"{next(names, 'an object that the function reaches')} is {what}"


def _name_of(item: Any, bound: Bound) -> str | None:
    """Return where a function or method has ``item``, or None."""
    function = bound.function
    if not isinstance(function, FunctionType):
        return None
    code, inside = function.__code__, function.__name__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        if cell.cell_contents is item:
            return f"`{name}` in `{inside}`"
    own = getattr(bound.owner, "__dict__", {})
    for name in code.co_names:
        if own.get(name) is item:
            return f"`{code.co_varnames[0]}.{name}` in `{inside}`"
        if function.__globals__.get(name) is item:
            return f"`{name}` in `{inside}`"
    return None
