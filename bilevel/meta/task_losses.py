"""The loss of a task, and those of its examples: a user's function, checked for what would make no gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.func import vmap
from torch.utils import _pytree as pytree

import bilevel

__all__ = ["example_losses", "task_loss"]

Loss = Callable[[Any, Any], torch.Tensor]


def task_loss(where: str, loss: Loss, prediction: Any, target: Any) -> torch.Tensor:
    """Return the loss () of one task.

    Raises
    ------
    bilevel.ArgumentError, bilevel.ShapeError
        If a class is out of range, or the loss is no floating-point scalar.
    """
    try:
        value = loss(prediction, target)
    except (IndexError, RuntimeError) as error:
        if "out of bounds" not in str(error):
            raise
        raise bilevel.ArgumentError(
            f"{where}: expected targets that loss can take, and it says: {' '.join(str(error).split())}; number the classes of each task "
            "from 0, and let the model have an output for each"
        ) from error
    if not isinstance(value, torch.Tensor) or value.ndim or not value.is_floating_point():
        got = (
            f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        )
        raise bilevel.ShapeError(
            f"{where}: expected loss(prediction, target) to be a floating-point scalar, got {got}; return the mean of differentiable losses, "
            "as torch.nn.functional.cross_entropy does"
        )
    return value


def example_losses(where: str, loss: Loss, prediction: Any, target: Any) -> torch.Tensor:
    """Return the loss of each example as that of a task of one, (examples,)."""

    def alone(prediction: Any, target: Any) -> torch.Tensor:
        return task_loss(where, loss, *pytree.tree_map(lambda leaf: leaf[None], (prediction, target)))

    return vmap(alone)(prediction, target)
