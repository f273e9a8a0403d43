"""Normalisation layers written out, because torch's own have wrong third derivatives.

The double backward of ``batch_norm`` and ``layer_norm`` treats the mean and the deviation that the forward pass saved
as constants. ``instance_norm`` uses the first. In torch 2.13 third derivatives are therefore silently wrong, at times
by a factor, in every mode and on plain tensors alike. A second derivative of an argmin needs third derivatives of its
objective. First and second derivatives are right, so solvers keep the fast kernels. Reported as pytorch/pytorch#175754
and #186256.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from bilevel._torch.transforms import differentiating, saving_hooked, uncompiled

__all__ = ["OneImageNorms", "WrittenNorms", "affine", "batch_norm_written", "batch_norms", "standardised"]

Maybe = torch.Tensor | None


def standardised(x: torch.Tensor, axes: Sequence[int], eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x̂ = (x − mean) r over ``axes``, and r = (var + ε)^(−½)."""
    centred = x - x.mean(tuple(axes), keepdim=True)
    r = ((centred * centred).mean(tuple(axes), keepdim=True) + eps).rsqrt()
    return centred * r, r


def _along_channels(x: torch.Tensor, weight: Maybe, bias: Maybe) -> torch.Tensor:
    shape = (1, -1, *[1] * (x.ndim - 2))
    x = x if weight is None else x * weight.reshape(shape)
    return x if bias is None else x + bias.reshape(shape)


def batch_norm_written(x: torch.Tensor, weight: Maybe, bias: Maybe, eps: float) -> torch.Tensor:
    """Return γ x̂ + β, standardised over all axes but 1, of operations that torch differentiates rightly any number of times."""
    return _along_channels(standardised(x, (0, *range(2, x.ndim)), eps)[0], weight, bias)


def _instance_norm(x: torch.Tensor, weight: Maybe, bias: Maybe, eps: float) -> torch.Tensor:
    return _along_channels(standardised(x, range(2, x.ndim), eps)[0], weight, bias)


# In the argument orders and names of torch and of torch.nn.functional. With running statistics for mean and deviation a norm is
# linear, and torch's own is right.


def batch_norms(
    ours: Callable[[torch.Tensor, Maybe, Maybe, float], torch.Tensor], suits: Callable[[torch.Tensor, bool], bool]
) -> dict[Any, Callable[..., torch.Tensor]]:
    """Return replacements of torch's two batch norms: ``ours`` of (x, γ or None, β or None, ε) by batch statistics if it ``suits``.

    ``suits`` receives x and whether running statistics are kept. If it returns False, torch's own norm is used.
    """

    def functional(
        input: torch.Tensor, running_mean: Maybe, running_var: Maybe, weight: Maybe = None, bias: Maybe = None,
        training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
    ) -> torch.Tensor:  # fmt: skip
        if training and suits(input, running_mean is not None or running_var is not None):
            return ours(input, weight, bias, eps)
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)

    def plain(
        input: torch.Tensor, weight: Maybe, bias: Maybe, running_mean: Maybe, running_var: Maybe, training: bool,
        momentum: float, eps: float, cudnn_enabled: bool,
    ) -> torch.Tensor:  # fmt: skip
        return functional(input, running_mean, running_var, weight, bias, training, momentum, eps)

    return {F.batch_norm: functional, torch.batch_norm: plain}


def affine(x: torch.Tensor, weight: Maybe, bias: Maybe) -> tuple[torch.Tensor, torch.Tensor]:
    """Return γ and β (C,) of x (N, C, ...); ones and zeros if there are none."""
    gamma = x.new_ones(x.shape[1]) if weight is None else weight.to(x.dtype)
    return gamma, x.new_zeros(x.shape[1]) if bias is None else bias.to(x.dtype)


def _functional_instance_norm(
    input: torch.Tensor, running_mean: Maybe = None, running_var: Maybe = None, weight: Maybe = None, bias: Maybe = None,
    use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
) -> torch.Tensor:  # fmt: skip
    if use_input_stats:
        return _instance_norm(input, weight, bias, eps)
    return F.instance_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)


def _torch_instance_norm(
    input: torch.Tensor, weight: Maybe, bias: Maybe, running_mean: Maybe, running_var: Maybe, use_input_stats: bool,
    momentum: float, eps: float, cudnn_enabled: bool,
) -> torch.Tensor:  # fmt: skip
    return _functional_instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


def _layer_norm(
    input: torch.Tensor, normalized_shape: Sequence[int], weight: Maybe = None, bias: Maybe = None, eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> torch.Tensor:  # fmt: skip
    x, _ = standardised(input, range(input.ndim - len(normalized_shape), input.ndim), eps)
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


_WRITTEN: dict[Any, Callable[..., torch.Tensor]] = {
    **batch_norms(batch_norm_written, lambda x, running: True),
    F.instance_norm: _functional_instance_norm,
    torch.instance_norm: _torch_instance_norm,
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
}


class WrittenNorms(TorchFunctionMode):
    """A mode in which norms consist of operations that torch differentiates rightly any number of times."""

    @uncompiled
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _WRITTEN.get(func, func)(*args, **(kwargs or {}))


def _one_image(x: torch.Tensor, running: bool) -> bool:
    suits = (
        not running and x.ndim >= 2 and x.shape[0] == 1 and x.numel() >= 2 * x.shape[1]
    )  # of fewer torch has something to say
    # Derivatives that the user's own function takes, and what is computed again for them (checkpoints), are left to torch.
    return suits and x.dtype in (torch.float32, torch.float64) and not differentiating() and not saving_hooked()


_OF_ONE_IMAGE = batch_norms(batch_norm_written, _one_image)


class OneImageNorms(TorchFunctionMode):
    """Inside, batch norms of one image are written out.

    torch 2.13 takes the memory of one image for the other of its two layouts where strides allow for both, as after a convolution of several
    problems. Its first derivatives are wrong then, by any factor.
    """

    @uncompiled
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _OF_ONE_IMAGE.get(func, func)(*args, **(kwargs or {}))
