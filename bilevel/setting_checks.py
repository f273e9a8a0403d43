"""Checks of settings, made when a solver is constructed."""

from __future__ import annotations

import math
from typing import Any, NoReturn

from bilevel.errors import ArgumentError

__all__ = ["FrozenOptions", "check_number", "check_steps"]


class FrozenOptions(dict[str, Any]):
    """A read-only dict of options for another library; unlike a mapping proxy it can be pickled."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("settings cannot be changed once made; make another with the options wanted")

    __setitem__ = __delitem__ = update = setdefault = pop = popitem = clear = __ior__ = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenOptions, (dict(self),)


def check_steps(where: str, name: str, steps: int | None, *, least: int = 1, optional: bool = False) -> None:
    """Raise :class:`ArgumentError` unless ``steps`` is an integer of at least ``least`` (or None if ``optional``)."""
    if steps is None and optional:
        return
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < least:
        also = ", or leave it out" if optional else ""
        raise ArgumentError(
            f"{where}: expected {name} to be an integer of at least {least}, got {steps!r}; write for example {name}={max(least, 10)}{also}"
        )


def check_number(
    where: str, name: str, number: float, *, above: float = 0.0, below: float = math.inf, closed: bool = False
) -> None:
    """Raise :class:`ArgumentError` unless ``above`` < ``number`` < ``below`` (≤ on the left if ``closed``)."""
    fits = not isinstance(number, bool) and isinstance(number, (int, float)) and math.isfinite(number)
    if not (fits and (above < number or (closed and number == above)) and number < below):
        left = "[" if closed else "("
        example = 1.0 if above < 1 < below else 0.5 * (above + below) if math.isfinite(below) else 2.0 * above
        raise ArgumentError(
            f"{where}: expected {name} to be a number in {left}{above}, {below}), got {number!r}; write for example {name}={example:g}"
        )
