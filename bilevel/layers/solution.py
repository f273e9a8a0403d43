"""A layer's result with its report, a pytree node."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch.utils import _pytree as pytree

from bilevel.reports import SolveReport

__all__ = ["Solution"]

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Solution(Generic[T]):
    """A layer's result with its report.

    It is a pytree node. Its children are :attr:`value` and, with constraints, :attr:`multipliers` and :attr:`active`.
    ``torch.func.vmap(layer.solve)`` returns one, with a report of the whole batch.

    Parameters
    ----------
    value
        x, the same pytree as init, differentiable as ``layer(...)`` is.
    report
        What the forward solve did, per problem.
    multipliers
        A pytree of tensors, differentiable like x. None if there are no constraints.
    active
        The active set: a pytree of bool tensors. None if there are no constraints.
    aux
        With ``has_aux``, the second output of the function at the solution, differentiable.

    Examples
    --------
    >>> import torch, bilevel
    >>> layer = bilevel.argmin(lambda x, a: ((x - a) ** 2).sum())
    >>> solution = layer.solve(torch.zeros(2), torch.tensor([1.0, 3.0]))
    >>> solution.value, solution.report.status.name, int(solution.report.iterations)
    (tensor([1.0000, 3.0000]), 'CONVERGED', 1)
    """

    value: T
    report: SolveReport
    multipliers: Any = None
    active: Any = None
    aux: Any = None


def _children(solution: Solution[Any]) -> tuple[list[Any], tuple[SolveReport, tuple[str, ...]]]:
    names = tuple(name for name in ("multipliers", "active", "aux") if getattr(solution, name) is not None)
    return [solution.value, *(getattr(solution, name) for name in names)], (solution.report, names)


def _of_children(children: Iterable[Any], context: Any) -> Solution[Any]:
    (report, names), (value, *more) = context, children
    return Solution(value, report, **dict(zip(names, more, strict=True)))


pytree.register_pytree_node(
    Solution,
    _children,
    _of_children,
    serialized_type_name="bilevel.Solution",
)
