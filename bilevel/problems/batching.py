"""Which axes of a bilevel problem's data number inner problems, and its objectives as a flat batch of that many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.func import vmap
from torch.utils import _pytree as pytree

from bilevel._torch.transforms import autocast_to
from bilevel.equations.problem import Problem
from bilevel.equations.structured import Structure
from bilevel.equations.system import ArgminSystem, System
from bilevel.errors import ArgumentError, ShapeError
from bilevel.pytree import Raveler, flatten_arguments

__all__ = ["BatchSpec"]


@dataclass(frozen=True, eq=False)
class BatchSpec:
    """The ``batch_dims`` of a problem. It maps a function of one inner problem over all inner problems in the data.

    Parameters
    ----------
    dims
        None for one inner problem, else a prefix of data's structure in the manner of ``torch.func.vmap``'s ``in_dims``.
    where
        The problem's name, for messages.
    """

    dims: Any
    where: str

    def count(self, data: Any) -> int | None:
        """Return K, the number of problems in ``data``; None for a single one."""
        if self.dims is None:
            return None
        numbering = [
            (leaf, dim)
            for leaf, dim in zip(pytree.tree_leaves(data), self._of_leaves(data), strict=True)
            if dim is not None
        ]
        for leaf, dim in numbering:
            if not (isinstance(dim, int) and isinstance(leaf, torch.Tensor) and -leaf.ndim <= dim < leaf.ndim):
                got = f"shape {tuple(leaf.shape)}" if isinstance(leaf, torch.Tensor) else type(leaf).__name__
                raise ShapeError(
                    f"{self.where}: expected batch_dims to name an axis of each tensor of data that numbers problems, "
                    f"got {dim!r} for one of {got}; give an axis that it has, or None where all problems share it"
                )
        sizes = {leaf.shape[dim] for leaf, dim in numbering}
        if len(sizes) != 1:
            raise ShapeError(
                f"{self.where}: expected the axes that batch_dims={self.dims!r} names to have one length, the "
                f"number of problems, got {sorted(sizes)}; check batch_dims and the shapes in data"
            )
        return int(sizes.pop())

    def checked_count(self, data: Any) -> int | None:
        """Return :meth:`count`; raise where ``data`` hold no problem at all: there is no mean of no losses."""
        count = self.count(data)
        if count == 0:
            raise ShapeError(
                f"{self.where}: expected at least one problem along the axes that batch_dims={self.dims!r} names, got axes of length 0; "
                "skip an empty batch"
            )
        return count

    def check_start(self, start: Any, count: int) -> None:
        """Raise unless every tensor of ``start`` has a leading axis of ``count``."""
        for leaf in pytree.tree_leaves(start):
            if isinstance(leaf, torch.Tensor) and (not leaf.ndim or len(leaf) != count):
                raise ShapeError(
                    f"{self.where}: expected init to have a leading axis of {count}, one start for each problem that "
                    f"batch_dims finds in data, got a leaf of shape {tuple(leaf.shape)}; expand it, for example with "
                    f"init.expand({count}, *init.shape)"
                )

    def each(self, function: Callable[..., Any], randomness: str = "error") -> Callable[..., Any]:
        """Return ``function`` of one problem's (inner, outer, data) as one of all of them, which share ``outer``."""
        return function if self.dims is None else vmap(function, in_dims=(0, None, self.dims), randomness=randomness)

    def ravel(self, inner: Any) -> torch.Tensor:
        """Return ``inner`` as one vector for each problem, (K, n), with K = 1 for a single one."""
        raveler = self._raveler(inner)
        return raveler.ravel(inner)[None] if self.dims is None else vmap(raveler.ravel)(inner)

    def unravel(self, raveler: Raveler, flat: torch.Tensor) -> Any:
        """Return ``flat`` (K, n) in the structure of the inner variables, that of one problem's ``raveler``."""
        return raveler.unravel(flat[0]) if self.dims is None else vmap(raveler.unravel)(flat)

    def problems(
        self,
        lower: Callable[..., torch.Tensor],
        upper: Callable[..., torch.Tensor],
        inner: Any,
        outer: Any,
        data: Any,
        structure: Structure | None = None,
    ) -> tuple[Problem, Problem, torch.Tensor]:
        """Return two objectives of (inner, outer, data) as batches of flat problems, and ``inner`` (K, n).

        The problems' tensors are those of ``outer``, then data's. With a ``structure``, the first is the problem of the local model at
        ``inner``, a solution.
        """
        raveler = self._raveler(inner)
        x = raveler.ravel(inner)[None] if self.dims is None else vmap(raveler.ravel)(inner)
        tensors, arguments = flatten_arguments((outer, data), {})
        autocast = autocast_to(raveler.device)
        system: System = ArgminSystem(self.where, lower, raveler, arguments, autocast=autocast)
        other: System = ArgminSystem(self.where, upper, raveler, arguments, autocast=autocast)

        moved = first = tensors
        if self.dims is not None:
            # One dimension for each leaf of data, as vmap itself reads a prefix of in_dims.
            dims = [*[None] * len(pytree.tree_leaves(outer)), *self._of_leaves(data)]
            of_tensors = [dim for dim, flag in zip(dims, arguments.is_tensor, strict=True) if flag]
            moved = [t if dim is None else t.movedim(dim, 0) for t, dim in zip(tensors, of_tensors, strict=True)]
            if len(x):
                first = [t if dim is None else t[0] for t, dim in zip(moved, of_tensors, strict=True)]
        if structure is not None:
            start = torch.zeros(raveler.size, dtype=raveler.dtype, device=raveler.device)
            system = structure.attach(system, start, first)[0].in_x()
        if self.dims is not None:
            batched = tuple(dim is not None for dim in of_tensors)
            system, other = system.lift(len(x), batched), other.lift(len(x), batched)
        problem = Problem.of(system, moved)
        return problem, Problem(other, problem.tensors), x

    def _raveler(self, inner: Any) -> Raveler:
        # Of no problems at all there is no first one.
        one = inner if self.dims is None else pytree.tree_map(_first, inner)
        return Raveler.of(one, self.where)

    def _of_leaves(self, data: Any) -> list[int | None]:
        """Return an axis or None for each leaf of ``data``: ``dims`` spread over the pytree, as ``vmap`` spreads ``in_dims``."""
        structure = pytree.tree_structure(data)
        flat = pytree._broadcast_to_and_flatten(self.dims, structure, is_leaf=lambda dim: dim is None)
        if flat is None:
            raise ArgumentError(
                f"{self.where}: expected batch_dims to be a prefix of data's structure, got batch_dims={self.dims!r} for {structure}; "
                "give an axis or None for each part of data, as in torch.func.vmap's in_dims"
            )
        return flat


def _first(leaf: torch.Tensor) -> torch.Tensor:
    return leaf[0] if len(leaf) else leaf.new_empty(leaf.shape[1:])
