"""The layer or bilevel problem that is tested, with the arguments of one call, in a form that all tests share.

``check_gradients`` and ``diagnose`` see three things: the user's own functions, the tensors that are differentiated, and the library's answer as a
function of those tensors. Neither this module nor the references use the library's mathematics, but only what a user could call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.func import vmap
from torch.utils import _pytree as pytree

import bilevel

__all__ = ["Subject", "of_call"]


@dataclass(frozen=True, eq=False)
class Subject:
    """A layer or problem with one call's arguments.

    Parameters
    ----------
    where
        The name used in messages.
    layer
        The inner solve.
    problem
        The bilevel problem, or None for a layer.
    init
        Where the search begins; with a leading axis K for a batch.
    leaves
        Every leaf of the inner function's (args, kwargs), in order.
    structure
        Of (args, kwargs).
    dims
        For each leaf, the axis that numbers the K problems, or None.
    count
        K, or None for a single problem.
    moving
        The places, in ``leaves``, of the tensors that are differentiated.
    names
        How a reader would write each of those.
    """

    where: str
    layer: bilevel.Layer
    problem: bilevel.BilevelProblem | None
    init: Any
    leaves: tuple[Any, ...]
    structure: pytree.TreeSpec
    dims: tuple[int | None, ...]
    count: int | None
    moving: tuple[int, ...]
    names: tuple[str, ...]

    @property
    def points(self) -> tuple[torch.Tensor, ...]:
        """The tensors that are differentiated."""
        return tuple(self.leaves[place] for place in self.moving)

    @property
    def function(self) -> Callable[..., Any]:
        """The objective, residual or mapping of one problem: (x, *args, **kwargs) ↦ …."""
        if self.problem is not None:
            return self.problem.inner_objective
        if isinstance(self.layer, bilevel.LeastSquaresLayer):
            return self.layer.objective
        return self.layer.conditions if isinstance(self.layer, bilevel.EquilibriumLayer) else self.layer.function

    @property
    def eps(self) -> float:
        """The coarsest rounding of a floating-point tensor of the call."""
        tensors = [*pytree.tree_leaves(self.init), *self.leaves]
        return max(float(torch.finfo(t.dtype).eps) for t in tensors if _is_tensor(t) and t.is_floating_point())

    def to(self, dtype: torch.dtype) -> Subject:
        """Return the same with every floating-point tensor in ``dtype``, and every complex one in its precision."""

        def convert(leaf: Any) -> Any:
            if _is_tensor(leaf) and leaf.is_complex():
                return leaf.to(dtype.to_complex())
            return leaf.to(dtype) if _is_tensor(leaf) and leaf.is_floating_point() else leaf

        return replace(
            self, init=pytree.tree_map(convert, self.init), leaves=tuple(convert(leaf) for leaf in self.leaves)
        )

    def filled(self, tensors: Sequence[torch.Tensor]) -> list[Any]:
        """Return the leaves with ``tensors`` in the places of the differentiated ones."""
        feed = dict(zip(self.moving, tensors, strict=True))
        return [feed.get(place, leaf) for place, leaf in enumerate(self.leaves)]

    def rebuild(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return (args, kwargs) made of ``leaves``."""
        args, kwargs = pytree.tree_unflatten(list(leaves), self.structure)
        return args, kwargs

    def case(self, number: int, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return one problem's (args, kwargs), cut out of the batch by differentiable operations."""
        filled = self.filled(tensors)
        if self.count is None:
            return self.rebuild(filled)
        return self.rebuild(
            [leaf if dim is None else leaf.select(dim, number) for leaf, dim in zip(filled, self.dims, strict=True)]
        )

    def start(self, number: int) -> Any:
        """Return one problem's start."""
        return self.init if self.count is None else pytree.tree_map(lambda leaf: leaf[number], self.init)

    def solve(self, layer: bilevel.Layer, tensors: Sequence[torch.Tensor]) -> Any:
        """Return the pytree of solutions by ``layer``, this one's or one with other settings."""
        if self.count is None:
            args, kwargs = self.rebuild(self.filled(tensors))
            return layer(self.init, *args, **kwargs)

        def one(init: Any, leaves: list[Any]) -> Any:
            args, kwargs = self.rebuild(leaves)
            return layer(init, *args, **kwargs)

        return vmap(one, in_dims=(0, list(self.dims)))(self.init, self.filled(tensors))

    def outputs(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return what the library makes of the call: the leaves of the solution, or the outer loss alone."""
        if self.problem is None:
            return tuple(pytree.tree_leaves(self.solve(self.layer, tensors)))
        (outer, data), _ = self.rebuild(self.filled(tensors))
        return (bilevel.BilevelProblem.forward(self.problem, outer, data, init=self.init),)

    def solution(self) -> list[torch.Tensor]:
        """Return the leaves of the library's solution, with no graph."""
        if self.problem is None:
            found = self.solve(self.layer, self.points)
        else:
            (outer, data), _ = self.rebuild(self.leaves)
            found = self.problem.solve(outer, data, init=self.init).value
        return [leaf.detach() for leaf in pytree.tree_leaves(found)]


def of_call(
    target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], init: Any = None, in_dims: Any = None
) -> Subject:
    """Return the subject of a call.

    Parameters
    ----------
    target
        A layer or a bilevel problem.
    args, kwargs
        What it is called with.
    init
        Where a problem's search begins; None for its own choice.
    in_dims
        For a layer: axes as in ``torch.func.vmap``, one entry for each of ``args``.

    Raises
    ------
    ArgumentError
        If the target is neither, or the arguments do not fit it.
    """
    if isinstance(target, bilevel.BilevelProblem):
        return _of_problem(target, args, kwargs, init, in_dims)
    if not isinstance(target, bilevel.Layer):
        raise bilevel.ArgumentError(
            f"bilevel.testing: expected a layer or a bilevel problem, got {target!r}; wrap the function with "
            "bilevel.argmin, bilevel.root or bilevel.fixed_point"
        )
    if isinstance(target, bilevel.RectangularLayer):
        raise bilevel.ArgumentError(
            f"{target.where}: expected a layer with an objective, a residual or a mapping, got a rectangular linear system; check "
            "bilevel.least_squares(lambda x, b, *args: matvec(x, *args) - b), which has the same solution"
        )
    if not isinstance(args, (tuple, list)):
        raise bilevel.ArgumentError(
            f"{target.where}: expected args to be a tuple (init, *args), got {type(args).__name__}; write for example "
            "check_gradients(layer, (init, a))"
        )
    if init is not None or not args:
        raise bilevel.ArgumentError(
            f"{target.where}: expected the start as the first of a layer's args and init=None, got {len(args)} args and "
            f"init={'given' if init is not None else 'None'}; pass args=(init, *args)"
        )
    start, *others = args
    start = bilevel.FunctionalModule.of(start, target.where)
    leaves, structure = pytree.tree_flatten((tuple(others), dict(kwargs)))
    dims: list[int | None] = [None] * len(leaves)
    count = None
    if in_dims is not None:
        spread = in_dims if isinstance(in_dims, (tuple, list)) else (in_dims,) * len(args)
        if len(spread) != len(args):
            raise bilevel.ArgumentError(
                f"{target.where}: expected in_dims to be an axis or one for each of the {len(args)} args, got {in_dims!r}; "
                "the first is that of the start"
            )
        dims = [*_spread(tuple(spread[1:]), tuple(others), target.where), *[None] * len(pytree.tree_leaves(kwargs))]
        start, count = _batched_start(start, spread[0], leaves, dims, target.where)
    return _subject(target.where, target, None, start, leaves, structure, dims, count, _names(target, others, kwargs))


def _of_problem(
    problem: bilevel.BilevelProblem, args: Sequence[Any], kwargs: Mapping[str, Any], init: Any, in_dims: Any
) -> Subject:
    where = problem.where
    if kwargs or in_dims is not None:
        raise bilevel.ArgumentError(
            f"{where}: expected no kwargs and in_dims=None for a bilevel problem, got {dict(kwargs)!r} and {in_dims!r}; its "
            "arguments are outer and data, and batch_dims of the problem names the axes"
        )
    try:
        outer, data = problem.objective_arguments(*args)
    except TypeError as error:
        raise bilevel.ArgumentError(
            f"{where}: expected args to be what the problem is called with, got {len(args)} of them ({error}); pass "
            "(outer, data), or the data alone where the problem owns its outer variables"
        ) from error
    leaves, structure = pytree.tree_flatten(((outer, data), {}))
    outer_count = len(pytree.tree_leaves(outer))
    dims: list[int | None] = [None] * len(leaves)
    count = None
    given = problem.initial(outer, data) if init is None else init
    start = pytree.tree_map(_cut, bilevel.FunctionalModule.of(given, where))
    if problem.batch_dims is not None:
        dims = [*[None] * outer_count, *_spread(problem.batch_dims, data, where)]
        start, count = _batched_start(start, 0, leaves, dims, where)
    names = ["outer" + pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(outer)[0]]
    names += [""] * (len(leaves) - outer_count)
    return _subject(where, problem.inner_layer, problem, start, leaves, structure, dims, count, names)


def _subject(
    where: str,
    layer: bilevel.Layer,
    problem: bilevel.BilevelProblem | None,
    start: Any,
    leaves: Sequence[Any],
    structure: pytree.TreeSpec,
    dims: Sequence[int | None],
    count: int | None,
    names: Sequence[str],
) -> Subject:
    chosen = [leaf for place, leaf in enumerate(leaves) if names[place] and _is_tensor(leaf) and leaf.requires_grad]
    for leaf in (*pytree.tree_leaves(start), *chosen):
        if _is_tensor(leaf) and leaf.is_complex():
            raise bilevel.ArgumentError(
                f"{where}: expected a real start, and real tensors to differentiate with respect to, for a check of gradients, got "
                f"{leaf.dtype}; pass torch.view_as_real of it, and call torch.view_as_complex in the function"
            )
    floating = [
        place for place, leaf in enumerate(leaves) if names[place] and _is_tensor(leaf) and leaf.is_floating_point()
    ]
    # As gradcheck does: the tensors that require grad, where some do, and not their neighbours.
    asked = [place for place in floating if leaves[place].requires_grad]
    moving = tuple(floating if problem is not None or not asked else asked)
    if not moving:
        raise bilevel.ArgumentError(
            f"{where}: expected a floating-point tensor to differentiate with respect to, got none; pass hyperparameters as "
            "tensors, and complex ones as torch.view_as_real(...)"
        )
    return Subject(
        where, layer, problem, pytree.tree_map(_cut, start), tuple(_cut(leaf) for leaf in leaves), structure,
        tuple(dims), count, moving, tuple(names[place] for place in moving),
    )  # fmt: skip


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


def _cut(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf


def _spread(dims: Any, tree: Any, where: str) -> list[int | None]:
    """Return one entry of the prefix ``dims`` for each leaf of ``tree``."""
    flat = pytree._broadcast_to_and_flatten(dims, pytree.tree_structure(tree), is_leaf=lambda dim: dim is None)
    if flat is None:
        raise bilevel.ArgumentError(
            f"{where}: expected axes that are a prefix of the arguments' structure, got {dims!r}; give an axis or None for "
            "each part, as in torch.func.vmap's in_dims"
        )
    return list(flat)


def _batched_start(
    start: Any, dim: int | None, leaves: Sequence[Any], dims: Sequence[int | None], where: str
) -> tuple[Any, int]:
    """Return the start with the axis of problems in front, and how many there are."""
    sizes = {leaf.shape[axis] for leaf, axis in zip(leaves, dims, strict=True) if axis is not None}
    if dim is not None:
        sizes |= {leaf.shape[dim] for leaf in pytree.tree_leaves(start)}
    if len(sizes) != 1:
        raise bilevel.ArgumentError(
            f"{where}: expected the axes that number the problems to have one length, got {sorted(sizes)}; check the axes "
            "and the shapes"
        )
    count = int(sizes.pop())
    if dim is None:
        return pytree.tree_map(lambda leaf: leaf.expand(count, *leaf.shape), start), count
    return pytree.tree_map(lambda leaf: leaf.movedim(dim, 0), start), count


def _names(layer: bilevel.Layer, others: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    """Return the name of each leaf of (others, kwargs): by the function's own parameters where they can be told."""
    heads = [f"args[{number}]" for number in range(len(others))]
    try:
        parameters = list(inspect.signature(layer.function).parameters.values())[1:]
    except (TypeError, ValueError):
        parameters = []
    for number, parameter in enumerate(parameters[: len(others)]):
        if parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            break
        heads[number] = parameter.name
    trees = [*zip(heads, others, strict=True), *kwargs.items()]
    return [head + pytree.keystr(path) for head, tree in trees for path, _ in pytree.tree_flatten_with_path(tree)[0]]
