"""Reading of a function's code: the names in it, and its branches."""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType
from typing import NamedTuple

from bilevel.replay.opcodes import has_list, is_known_step

__all__ = ["Reading", "read", "uses_first"]

_ATTRIBUTE = {"LOAD_ATTR", "LOAD_METHOD"}


class Reading(NamedTuple):
    """The names in a function's code, and in the code inside it.

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


@lru_cache(maxsize=1024)
def read(code: CodeType, method: bool) -> Reading | str:
    """Return the names in ``code``; a sentence that says why if it is not branch-free. ``method``: its first argument is an object to be followed."""
    parts = list(_nested(code))
    local = {name for part in parts for name in part.co_cellvars}
    first = code.co_varnames[0] if method else None
    if not local.isdisjoint(code.co_freevars) or first in code.co_cellvars:
        return f"a function inside `{code.co_name}` uses its variables in a way that cannot be followed"
    named, attributes, own = set(), set(), set()
    for part in parts:
        steps = [step for step in dis.get_instructions(part) if step.opname not in ("CACHE", "EXTENDED_ARG")]
        place = 0
        while place < len(steps):
            step = steps[place]
            place += 1
            if not is_known_step(step):
                return _unknown_step(part, step)
            if step.opname in ("STORE_DEREF", "DELETE_DEREF") and step.argval in part.co_freevars:
                return f"`{part.co_name}` assigns `{step.argval}`, a variable of the function around it"
            follows = place
            while follows < len(steps) and steps[follows].opname in _ATTRIBUTE:
                follows += 1
            taken = tuple(after.argval for after in steps[place:follows])
            free = step.opname == "LOAD_DEREF"
            if part is code and first is not None and _touches(step, first):
                if not taken or not _only_loads(step, first):
                    return f"`{code.co_name}` uses `{first}` for more than reading its attributes"
                own.add(taken[0])
                place += 1
            elif step.opname == "LOAD_GLOBAL" or (free and step.argval not in local):
                named.add((free, step.argval, taken))
                place = follows
            elif step.opname in _ATTRIBUTE:
                attributes.add(step.argval)
    return Reading(tuple(sorted(named)), tuple(sorted(attributes)), tuple(sorted(own)))


def _unknown_step(part: CodeType, step: dis.Instruction) -> str:
    """Say in which line of ``part`` an instruction is that is not on the list."""
    if not has_list():
        return f"no list of known instructions is written for Python {sys.version_info[0]}.{sys.version_info[1]}"
    lines = [line for offset, line in dis.findlinestarts(part) if offset <= step.offset and line is not None]
    at = f" in line {lines[-1]}" if lines else ""
    if "JUMP" in step.opname:
        return f"`{part.co_name}` branches{at}"
    return f"`{part.co_name}` has an instruction{at} that is not on the list, {step.opname}"


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
def uses_first(code: CodeType) -> bool:
    """Return whether ``code`` makes any use of its first argument, which is a method's object."""
    if not code.co_argcount or code.co_varnames[0] in code.co_cellvars:
        return True
    return any(_touches(step, code.co_varnames[0]) for step in dis.get_instructions(code))


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)
