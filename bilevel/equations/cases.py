"""The problems of a batch in the user's own terms, for solvers that are functions of the user's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.func import vmap
from torch.utils import _pytree as pytree

from bilevel.equations.problem import Problem

__all__ = ["Case", "cases_of", "whole_case"]


@dataclass(frozen=True)
class Case:
    """One problem in the user's own terms, for solvers that are not batched: ``function(init, *args, **kwargs)``."""

    function: Callable[..., Any]
    init: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def cases_of(problem: Problem, x: torch.Tensor) -> Iterator[Case]:
    """Yield each problem in the user's terms, with its own slice of every tensor and of ``x`` (batch, n)."""
    for number, row in enumerate(x.reshape(-1, problem.size)):
        args, kwargs = problem.system.arguments.rebuild(problem.slices(number))
        yield Case(problem.system.function, problem.system.raveler.unravel(row), args, kwargs)


def whole_case(problem: Problem, x: torch.Tensor) -> Case:
    """Return all problems as one case, in the user's terms, for ``x`` (batch, n).

    The unknown and every dense tensor have one batch axis in front; the function takes and returns such tensors.
    """
    shape, tensors = problem.system.batch_shape, []
    for place, tensor in enumerate(problem.tensors):
        if tensor.layout is torch.strided:  # a sparse tensor cannot be batched: all problems share it
            for axis, level in enumerate(reversed(problem.system.levels)):
                tensor = tensor if level.batched[place] else tensor.unsqueeze(axis)
            rest = tensor.shape[len(shape) :]
            tensor = tensor.expand((*shape, *rest)).reshape(len(x), *rest)
        tensors.append(tensor)
    args, kwargs = problem.system.arguments.rebuild(tensors)
    unknown = vmap(problem.system.raveler.unravel)(x)
    return Case(_batched(problem.system.function), unknown, args, kwargs)


def _batched(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` for arguments whose dense tensors have a batch axis in front."""

    def batched(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = pytree.tree_flatten((args, kwargs))
        dims = tuple(0 if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided else None for leaf in leaves)

        def one(*single: Any) -> Any:
            args, kwargs = pytree.tree_unflatten(single, structure)
            return function(*args, **kwargs)

        return vmap(one, in_dims=dims)(*leaves)

    return batched
