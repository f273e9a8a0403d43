"""Checks of settings, made when a solver is constructed, and of tensors that no layer takes."""

from __future__ import annotations

import math
from typing import Any, NoReturn

from bilevel.errors import ArgumentError, DtypeError

__all__ = ["FrozenOptions", "check_number", "check_seed", "check_steps", "refuse_nested"]


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


def check_seed(where: str, seed: int) -> None:
    """Raise :class:`ArgumentError` unless ``seed`` is an integer that a ``torch.Generator`` takes."""
    fits = isinstance(seed, int) and not isinstance(seed, bool)
    if not fits or not -(2**63) <= seed < 2**64:
        raise ArgumentError(f"{where}: expected seed to be an integer of at most 64 bits, got {seed!r}; pass one")


def check_number(
    where: str,
    name: str,
    number: float,
    *,
    above: float = 0.0,
    below: float = math.inf,
    closed: bool = False,
    at_most: bool = False,
) -> None:
    """Raise :class:`ArgumentError` unless ``above`` < ``number`` < ``below`` (≤ on the left if ``closed``, on the right if ``at_most``)."""
    fits = not isinstance(number, bool) and isinstance(number, (int, float)) and math.isfinite(number)
    inside = (
        fits and (above < number or (closed and number == above)) and (number < below or (at_most and number == below))
    )
    if not inside:
        left, right = "[" if closed else "(", "]" if at_most else ")"
        example = 1.0 if above < 1 < below else 0.5 * (above + below) if math.isfinite(below) else 2.0 * above
        raise ArgumentError(
            f"{where}: expected {name} to be a number in {left}{above}, {below}{right}, got {number!r}; write for example {name}={example:g}"
        )


def refuse_nested(tensor: Any, where: str, name: str) -> None:
    """Raise :class:`DtypeError` for a nested tensor, called ``name`` in the message."""
    if tensor.is_nested:
        raise DtypeError(
            f"{where}: expected a dense tensor at {name}, got a nested one; pass a list of tensors, list(x.unbind()), or pad it with "
            "torch.nested.to_padded_tensor(x, 0.0)"
        )
