"""A user's solver that takes a whole batch of problems in one call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bilevel.equations.cases import whole_case
from bilevel.equations.problem import Problem
from bilevel.errors import ArgumentError, ShapeError
from bilevel.solvers._base import CallableSolver

__all__ = ["BatchedSolver"]


@dataclass(frozen=True)
class BatchedSolver(CallableSolver):
    """Call a user's function once for the whole batch. A plain function is called for each problem.

    Usable as a decorator. Several levels of ``vmap`` are one batch axis; a call without ``vmap`` is a batch of one.

    Parameters
    ----------
    function
        Called as ``function(objective, init, *args, **kwargs)``; returns x. Its ``init`` and every dense tensor of its
        arguments have the shape (batch, ...), also those that all problems share. Sparse tensors and other values come as
        they are. ``objective`` (a residual or mapping for the other layers) takes such arguments, and returns (batch,) or
        (batch, ...). The answer has the pytree of ``init``, with leaves (batch, ...). With constraints it may be
        (x, multipliers), batched alike.

    Raises
    ------
    ArgumentError
        If ``function`` is not callable.
    ShapeError
        In a call, if the answer has no batch axis of the right size.

    Examples
    --------
    >>> import bilevel, torch
    >>> @bilevel.BatchedSolver
    ... def halve(objective, init, a):  # a: (batch, 2)
    ...     return a / 2
    >>> nearest = bilevel.argmin(lambda x, a: ((x - a) ** 2 + x**2).sum(), solver=halve)
    >>> torch.func.vmap(nearest)(torch.zeros(3, 2), torch.ones(3, 2)).sum()
    tensor(3.)
    """

    def __post_init__(self) -> None:
        if not callable(self.function) or isinstance(self.function, type):
            raise ArgumentError(
                f"BatchedSolver: expected a function (objective, init, *args, **kwargs) -> x, got {self.function!r}; decorate the function itself"
            )

    def answers(self, problem: Problem, init: torch.Tensor) -> Iterator[Any]:
        """Yield each problem's part of the function's result."""
        count = len(init)
        if not count:
            return
        case = whole_case(problem, init)
        with torch.enable_grad():  # a user's solver may call backward
            found = self.function(case.function, case.init, *case.args, **case.kwargs)
        unlike = pytree.tree_structure(found) != problem.system.raveler.structure
        if unlike and isinstance(found, tuple) and len(found) == 2 and not isinstance(found[1], dict):
            given = {name: getattr(found[1], name, None) for name in ("equality", "inequality")}
            found = (found[0], given)
        leaves, structure = pytree.tree_flatten(found)
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor) and (not leaf.dim() or len(leaf) != count):
                raise ShapeError(
                    f"{problem.where}: expected solver {self.name} to return tensors with a batch axis of {count} in front, got the shape "
                    f"{tuple(leaf.shape)}; return all answers, or pass the function without BatchedSolver to have it called for each problem"
                )
        for number in range(count):
            rows = [leaf[number] if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            yield pytree.tree_unflatten(rows, structure)
