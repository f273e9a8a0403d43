"""Messages for common first calls, such as ``argmin(f, x0)`` and ``linear_solve(A, b)``: they show the right call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from bilevel.errors import ArgumentError
from bilevel.linear._base import LinearSolver
from bilevel.solvers._base import InnerSolver
from bilevel.tolerance import Tolerance

__all__ = ["explain_misuse"]

F = TypeVar("F", bound=Callable[..., Any])

_FIRST = {
    "argmin": "objective",
    "root": "residual",
    "fixed_point": "mapping",
    "linear_solve": "matvec",
    "least_squares": "residual",
}
_STARTS = ("init", "x0", "x", "start", "rhs", "b", "args")


def explain_misuse(factory: F) -> F:
    """Return ``factory``, one of :mod:`bilevel.layers`, with a message for a call that confuses making a layer with calling it."""
    name = factory.__name__
    function = _FIRST[name]

    @functools.wraps(factory)
    def called(*given: Any, **settings: Any) -> Any:
        problem = _mistake(name, function, given, settings)
        if problem is not None:
            raise ArgumentError(f"{name}: {problem}")
        return factory(*given, **settings)

    return called  # type: ignore[return-value]  # functools.wraps keeps the signature, which a checker cannot see


def _mistake(name: str, function: str, given: tuple[Any, ...], settings: dict[str, Any]) -> str | None:
    """Return the mistake and the right call, or None."""
    first = given[0] if given else settings.get(function)
    if name == "linear_solve" and (_is_matrix(first)):
        return f"expected {function} to be the function x -> A x, got the matrix itself, {_described(first)}; write {_with_matrix(first)}"
    for value in given:
        setting = _setting(value)
        if setting is not None:
            at = "@" if value is first else ""
            inside = "" if value is first else f"{function}, "
            return (
                f"expected {function} and nothing else by position, got {type(value).__name__}; pass it by name: write "
                f"{at}bilevel.{name}({inside}{setting}={type(value).__name__}(...))"
            )
    starts = [key for key in settings if key in _STARTS]
    if len(given) > 1 or starts:
        what = "rhs" if name == "linear_solve" else "init"
        got = f"{starts[0]}=" if starts else f"{len(given)} values, {', '.join(map(_described, given))}"
        return (
            f"expected {function} alone, a function of (x, *args), got {got}; it makes a layer, which is then called: write "
            f"bilevel.{name}({function})({what}, *args)"
        )
    return None


def _setting(value: Any) -> str | None:
    """Return the name of the only setting that ``value`` can be meant for, or None."""
    kinds = {"solver": InnerSolver, "linear_solver": LinearSolver, "tolerance": Tolerance}
    return next((name for name, kind in kinds.items() if isinstance(value, kind)), None)


def _is_matrix(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (hasattr(value, "__array__") and hasattr(value, "shape"))


def _with_matrix(matrix: Any) -> str:
    A = "A" if isinstance(matrix, torch.Tensor) else "torch.as_tensor(A)"
    layer = "bilevel.linear_solve(lambda x, A: A @ x)"
    return f"{layer}(b, {A})" if len(matrix.shape) < 3 else f"torch.func.vmap({layer})(b, {A})"


def _described(value: Any) -> str:
    shape = getattr(value, "shape", None)
    if shape is not None and _is_matrix(value):
        return f"a {type(value).__name__} of shape {tuple(shape)}"
    return getattr(value, "__name__", f"a {type(value).__name__}")
