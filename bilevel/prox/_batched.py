"""Functions without a derivative, such as an eigendecomposition, that ``vmap`` calls once for the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bilevel._torch.transforms import batch_axis_first, outside_autocast, signed, without_gradient

__all__ = ["batched"]

Function = Callable[..., tuple[torch.Tensor, ...]]


@outside_autocast
def batched(function: Function, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return ``function(*tensors)``, of which no derivative is taken.

    ``function`` maps plain tensors to a tuple of tensors. It takes any number of leading batch axes, the same for all tensors,
    and returns them. Under ``vmap`` it is called once, with one more batch axis.
    """
    return _Batched.apply(function, *(without_gradient(tensor) for tensor in tensors))


@signed
class _Batched(torch.autograd.Function):
    @staticmethod
    def forward(function: Function, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)
        ctx.inputs, ctx.outputs = len(inputs), len(output)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[None, ...]:
        return (None,) * ctx.inputs

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor) -> tuple[None, ...]:
        return (None,) * ctx.outputs

    @staticmethod
    def vmap(
        info: Any, dims: tuple[int | None, ...], function: Function, *tensors: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...]]:
        stacked = (
            batch_axis_first(tensor, dim, info.batch_size) for tensor, dim in zip(tensors, dims[1:], strict=True)
        )
        made = _Batched.apply(function, *stacked)
        return made, (0,) * len(made)
