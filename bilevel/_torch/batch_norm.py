"""Batch norm by batch statistics for gradients alone, quicker than torch's own on the CPU.

There torch finds mean and variance by a scalar loop, which takes ten times as long as to read the tensor, and under vmap γ and β have passes of
their own. Here the statistics are reductions, and a vmapped axis is one of channels, so that torch's kernels apply γ and β on the way,
forward and backward::

    y = γ x̂ + β,  x̂ = (x − m) r,  r = (var + ε)^(−½)                      m and var of each channel
    x̄ = γ r (ȳ − mean ȳ − x̂ mean ȳ x̂),  γ̄ = Σ ȳ x̂,  β̄ = Σ ȳ

A backward that is itself differentiated goes through the norm written out, which is right in every order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from bilevel._torch.norms import affine, batch_norm_written, batch_norms
from bilevel._torch.reverse import reverse_pass
from bilevel._torch.transforms import batch_axis_first, differentiating, saving_hooked, signed, uncompiled

__all__ = ["FastNorms"]

Maybe = torch.Tensor | None
# The fewest numbers of one problem for which this is used: its passes then take longer than its calls. Of one problem and not of the batch,
# so that its rounding is the same whichever problems stand beside it.
_MANY = 2**13


@signed
class _BatchNorm(torch.autograd.Function):
    """y of x (N, C, ...), with m and r (C,) beside it."""

    @staticmethod
    def forward(
        x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        axes = (0, *range(2, x.ndim))
        mean = x.mean(axes, keepdim=True)
        centred = x - mean
        var = (centred * centred).mean(axes)
        mean = mean.reshape(-1)
        y = torch.batch_norm(x, gamma, beta, mean, var, False, 0.0, eps, False)
        return y, mean, (var + eps).rsqrt()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        x, gamma, beta, ctx.eps = inputs
        _, mean, r = output
        ctx.mark_non_differentiable(mean, r)
        ctx.save_for_backward(x, gamma, beta, mean, r)

    @staticmethod
    def backward(ctx: Any, y_bar: torch.Tensor, *_: Any) -> tuple[Maybe, Maybe, Maybe, None]:
        x, gamma, beta, mean, r = ctx.saved_tensors
        needs_grad = list(ctx.needs_input_grad[:3])
        if not torch.is_grad_enabled():
            found = torch.ops.aten.native_batch_norm_backward(
                y_bar, x, gamma, None, None, mean, r, True, ctx.eps, needs_grad
            )
            x_bar, gamma_bar, beta_bar = (g if want else None for g, want in zip(found, needs_grad, strict=True))
            return x_bar, gamma_bar, beta_bar, None
        y = batch_norm_written(x, gamma, beta, ctx.eps)
        some = [t for t, want in zip((x, gamma, beta), needs_grad, strict=True) if want]
        slopes = iter(reverse_pass([y], some, [y_bar], create_graph=True))
        x_bar, gamma_bar, beta_bar = (next(slopes) if want else None for want in needs_grad)
        return x_bar, gamma_bar, beta_bar, None

    @staticmethod
    def vmap(
        info: Any, dims: tuple[Any, ...], x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, eps: float
    ) -> Any:
        size = info.batch_size
        moved = x.unsqueeze(1).expand(-1, size, *x.shape[1:]) if dims[0] is None else x.movedim(dims[0], 1)
        gamma, beta = (
            batch_axis_first(t, dim, size).flatten(0, 1) for t, dim in zip((gamma, beta), dims[1:3], strict=True)
        )
        y, mean, r = _BatchNorm.apply(moved.flatten(1, 2), gamma, beta, eps)
        return (y.unflatten(1, (size, -1)), mean.unflatten(0, (size, -1)), r.unflatten(0, (size, -1))), (1, 0, 0)


def _batch_norm(x: torch.Tensor, weight: Maybe, bias: Maybe, eps: float) -> torch.Tensor:
    if x.shape[0] == 1:
        # torch 2.13 takes the memory of one image for the other of its two layouts where strides allow for both, as after a convolution
        # of several problems: its gradients are wrong then, by any factor.
        return batch_norm_written(x, weight, bias, eps)
    y: torch.Tensor = _BatchNorm.apply(x, *affine(x, weight, bias), eps)[0]
    return y


def _left_to_us(x: torch.Tensor) -> bool:
    # Derivatives that the user's own function takes, and what is computed again for them (checkpoints), are left to torch.
    return x.dtype in (torch.float32, torch.float64) and not differentiating() and not saving_hooked()


def _suits(x: torch.Tensor, running: bool) -> bool:
    if running or x.ndim < 2 or x.numel() < 2 * x.shape[1]:  # of too few numbers torch has something to say
        return False
    return _left_to_us(x) and (x.shape[0] == 1 or (x.device.type == "cpu" and x.numel() >= _MANY))


_QUICK = batch_norms(_batch_norm, _suits)


class FastNorms(TorchFunctionMode):
    """Inside, batch norms by batch statistics are the above."""

    @uncompiled
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _QUICK.get(func, func)(*args, **(kwargs or {}))
