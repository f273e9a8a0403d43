"""The options that layers take by name: their types, to which the overloads of the factories refer, and a check of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypedDict

from bilevel.errors import ArgumentError
from bilevel.layers.differentiation import Differentiation
from bilevel.linear._base import LinearSolverLike
from bilevel.policy import OnFailure
from bilevel.solvers._base import InnerSolverLike
from bilevel.tolerance import Tolerance

__all__ = ["ArgminOptions", "LayerOptions", "LinearOptions", "SolverOptions", "refuse_goals"]


class SolverOptions(TypedDict, total=False):
    """Options of every layer."""

    linear_solver: LinearSolverLike | None
    tolerance: Tolerance | None
    on_failure: OnFailure


class LayerOptions(SolverOptions, total=False):
    """Options of ``root`` and ``fixed_point``."""

    solver: InnerSolverLike | None
    differentiation: Differentiation | None
    has_aux: bool
    prepare: Callable[..., Any] | None
    warm_start: bool
    static: bool


class ArgminOptions(LayerOptions, total=False):
    """Options of ``argmin``."""

    prox: Any
    lower: Any
    upper: Any
    equality: Callable[..., Any] | None
    inequality: Callable[..., Any] | None
    smoothing: float | None


class LinearOptions(SolverOptions, total=False):
    """Options of ``linear_solve``."""

    symmetric: bool
    unknown: Any


def refuse_goals(tolerance: Tolerance | None) -> None:
    """Raise if ``tolerance`` is a goal for a hypergradient, of which a layer knows nothing."""
    if tolerance is not None and getattr(tolerance, "has_goal", False):
        raise ArgumentError(
            f"a layer: expected Tolerance(delta=..., delta_prime=...), got {tolerance!r}; a layer has no outer loss, "
            "whose gradient this is about; write a bilevel.BilevelProblem"
        )
