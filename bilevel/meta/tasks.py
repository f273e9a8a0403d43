"""A batch of few-shot tasks: support and query examples with a leading task axis, ragged ones padded with weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.func import vmap
from torch.utils import _pytree as pytree

import bilevel

__all__ = ["Tasks", "as_support", "as_tasks", "by_parts", "pad_tasks"]

# The largest number of input numbers for one set of kernels on the CPU. A convolutional network makes about a hundred times as many.
_NUMBERS_AT_ONCE = 2**16


class Tasks(NamedTuple):
    """A batch of T tasks. Every tensor is (T, examples, ...); inputs and targets may be pytrees of tensors.

    Parameters
    ----------
    support_x, support_y
        What a task is adapted on. A tuple of inputs is passed to the model as ``model(*inputs)``, a dict as
        ``model(**inputs)``.
    query_x, query_y
        What the adapted parameters are judged on.
    support_weight, query_weight
        (T, examples) float, 1 for an example and 0 for padding, or None where no task is padded.

    Examples
    --------
    >>> import torch
    >>> from bilevel.meta import Tasks
    >>> tasks = Tasks(torch.zeros(4, 10, 1), torch.zeros(4, 10, 1), torch.zeros(4, 5, 1), torch.zeros(4, 5, 1))
    >>> tasks.query_x.shape
    torch.Size([4, 5, 1])
    """

    support_x: Any
    support_y: Any
    query_x: Any
    query_y: Any
    support_weight: torch.Tensor | None = None
    query_weight: torch.Tensor | None = None


def pad_tasks(tasks: Sequence[Sequence[Any]]) -> Tasks:
    """Return tasks with different numbers of examples as one batch, padded with zeros of weight zero.

    Parameters
    ----------
    tasks
        Of each task (support_x, support_y, query_x, query_y), tensors or pytrees of them (examples, ...).

    Returns
    -------
    Tasks
        With weights. The losses of padded tasks are weighted means over their examples.

    Raises
    ------
    bilevel.ShapeError
        If there is no task, a task has no example, or inputs and targets differ in number.

    Examples
    --------
    >>> import torch
    >>> one, three = (torch.ones(1, 2), torch.ones(1)), (torch.ones(3, 2), torch.ones(3))
    >>> tasks = pad_tasks([(*one, *one), (*three, *one)])
    >>> tasks.support_x.shape, tasks.support_weight.tolist()
    (torch.Size([2, 3, 2]), [[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    """
    if not tasks:
        raise bilevel.ShapeError("pad_tasks: expected at least one task, got none; pass a list of tasks")
    for number, task in enumerate(tasks):
        if len(task) != 4:
            raise bilevel.ShapeError(
                f"pad_tasks: expected task {number} to be (support_x, support_y, query_x, query_y), got {len(task)} "
                "items; pass four"
            )
    support = [_examples(task[:2], number, "support") for number, task in enumerate(tasks)]
    query = [_examples(task[2:], number, "query") for number, task in enumerate(tasks)]
    columns = [_pad([task[place] for task in tasks]) for place in range(4)]
    like = next(leaf for leaf in pytree.tree_leaves(columns[0]) if isinstance(leaf, torch.Tensor))
    return Tasks(columns[0], columns[1], columns[2], columns[3], _weights(support, like), _weights(query, like))


def _examples(pair: Sequence[Any], number: int, part: str) -> int:
    sizes = {len(leaf) for leaf in pytree.tree_leaves(pair)}
    if len(sizes) != 1 or 0 in sizes:
        raise bilevel.ShapeError(
            f"pad_tasks: expected the {part} inputs and targets of task {number} to have one number of examples, at least "
            f"one, got {sorted(sizes)}; every tensor's first axis numbers the examples"
        )
    return sizes.pop()


def _pad(column: list[Any]) -> Any:
    return pytree.tree_map(lambda *leaves: torch.nn.utils.rnn.pad_sequence(list(leaves), batch_first=True), *column)


def _weights(counts: list[int], like: torch.Tensor) -> torch.Tensor:
    dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
    return pad_like([torch.ones(count, dtype=dtype, device=like.device) for count in counts])


def pad_like(rows: list[torch.Tensor]) -> torch.Tensor:
    """Return rows of different lengths as one tensor (T, longest), with zeros behind."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def as_tasks(batch: Any, where: str) -> Tasks:
    """Return ``batch``, a :class:`Tasks`, a sequence of four to six parts or a mapping of their names, as Tasks.

    Raises
    ------
    bilevel.ShapeError
        If parts are missing, or their first two axes, tasks and examples, do not agree.
    """
    batch = pytree.tree_map_only(torch.Tensor, _usable, batch)
    if isinstance(batch, Mapping):
        unknown = set(batch) - set(Tasks._fields)
        missing = set(Tasks._fields[:4]) - set(batch)
        if unknown or missing:
            raise bilevel.ShapeError(
                f"{where}: expected a batch with the keys {', '.join(Tasks._fields[:4])}, and weights if there is padding, got "
                f"{sorted(map(str, batch))}; rename them"
            )
        tasks = Tasks(**batch)
    elif isinstance(batch, (tuple, list)) and 4 <= len(batch) <= 6:
        tasks = Tasks(*batch)
    else:
        got = f"{len(batch)} items" if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise bilevel.ShapeError(
            f"{where}: expected a batch of tasks (support_x, support_y, query_x, query_y), each with a leading task axis, got "
            f"{got}; pass the four, or pad_tasks([...]) of single tasks"
        )
    count = _check(where, "support", tasks.support_x, tasks.support_y, tasks.support_weight)
    queried = _check(where, "query", tasks.query_x, tasks.query_y, tasks.query_weight)
    if count != queried:
        raise bilevel.ShapeError(
            f"{where}: expected as many tasks in the query as in the support, got {queried} and {count}; the leading axis "
            "of every tensor numbers the tasks"
        )
    return tasks


def _usable(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor``, or a copy of one that was made in inference mode: no graph can use that."""
    return tensor.clone() if tensor.is_inference() else tensor


def as_support(support: Any, where: str) -> tuple[Any, Any, torch.Tensor | None]:
    """Return (x, y, weight) of ``support``: a tuple (x, y) or (x, y, weight), or a whole batch of tasks. Without weights the last is None."""
    if isinstance(support, (Tasks, Mapping)) or (isinstance(support, (tuple, list)) and len(support) >= 4):
        tasks = as_tasks(support, where)
        return tasks.support_x, tasks.support_y, tasks.support_weight
    if not isinstance(support, (tuple, list)) or len(support) < 2:
        raise bilevel.ShapeError(
            f"{where}: expected the support as (support_x, support_y), each with a leading task axis, got "
            f"{type(support).__name__}; pass both, or a whole batch of tasks"
        )
    x, y, weight = support[0], support[1], support[2] if len(support) == 3 else None
    _check(where, "support", x, y, weight)
    return x, y, weight


def _check(where: str, part: str, x: Any, y: Any, weight: torch.Tensor | None) -> int:
    """Raise unless all of a part have one number of tasks and one of examples; return the number of tasks."""
    leaves = pytree.tree_leaves((x, y) if weight is None else (x, y, weight))
    shapes = [tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else type(leaf).__name__ for leaf in leaves]
    fits = all(isinstance(leaf, torch.Tensor) and leaf.ndim >= 2 for leaf in leaves) and len(leaves) >= 2
    if not fits or len({shape[:2] for shape in shapes}) != 1 or 0 in shapes[0][:2]:
        raise bilevel.ShapeError(
            f"{where}: expected the {part}'s inputs and targets to be tensors (tasks, examples, ...) with one number of tasks "
            f"and one of examples, none of them 0, got {', '.join(map(str, shapes))}; put a task axis in front, "
            "tensor[None] for a single task, and see pad_tasks for ragged tasks"
        )
    return int(leaves[0].shape[0])


def by_parts(judge: Callable[..., Any], adapted: Any, query: tuple[Any, ...]) -> Any:
    """Return ``judge`` of every task, in parts whose data fit into the processor's cache."""
    leaves, structure = pytree.tree_flatten((adapted, query))
    count, numbers = len(leaves[0]), sum(leaf.numel() for leaf in pytree.tree_leaves(query))
    together = count if leaves[0].device.type != "cpu" else max(1, _NUMBERS_AT_ONCE * count // max(1, numbers))
    if together >= count:
        return vmap(judge)(adapted, query)
    alone = together == 1
    # Split once: the gradient of each separate slice would be a tensor of the whole size, and all of them would be added.
    cuts = zip(*(leaf.unbind() if alone else leaf.split(together) for leaf in leaves), strict=True)
    parts = [pytree.tree_unflatten(list(cut), structure) for cut in cuts]
    made = [judge(*part) if alone else vmap(judge)(*part) for part in parts]
    join = torch.stack if alone else torch.cat
    return pytree.tree_map(lambda *leaves: join(leaves), *made)
