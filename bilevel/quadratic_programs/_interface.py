"""What ``quadratic_program`` and ``cone_program`` share: one signature for the call and ``solve``, and checks of settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from bilevel.errors import ArgumentError
from bilevel.setting_checks import check_number
from bilevel.tolerance import Tolerance

__all__ = ["ProgramFunction", "checked_settings", "with_arguments_of"]

P = ParamSpec("P")
T = TypeVar("T")


class ProgramFunction:
    """A function of the package that has a method ``solve``: the only instance of its class."""

    __name__: str

    def __repr__(self) -> str:
        return f"<bilevel.{self.__name__}>"

    def __reduce__(self) -> str:
        return self.__name__


def with_arguments_of(other: Callable[P, Any]) -> Callable[[Callable[..., T]], Callable[P, T]]:
    """Give a function that passes all its arguments on to ``other`` the signature of ``other``, but for what it returns."""

    def signed(function: Callable[..., T]) -> Callable[P, T]:
        returned = inspect.signature(function).return_annotation
        function.__signature__ = inspect.signature(other).replace(return_annotation=returned)  # type: ignore[attr-defined]
        return function

    return signed


def checked_settings(name: str, tolerance: Tolerance | None, smoothing: float | None) -> tuple[Tolerance, float]:
    """Return the tolerance and the smoothing of a call of the function ``name``, or raise :class:`ArgumentError`."""
    if smoothing is not None:
        check_number(name, "smoothing", smoothing)
    if tolerance is not None and not isinstance(tolerance, Tolerance):
        raise ArgumentError(
            f"`{name}`: expected tolerance to be a bilevel.Tolerance, got {tolerance!r}; wrap it in one"
        )
    return Tolerance() if tolerance is None else tolerance, 0.0 if smoothing is None else float(smoothing)
