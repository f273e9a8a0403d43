"""Convolutions and batch norms whose second derivatives are quick, for the many products with one Hessian.

torch differentiates a convolution's backward through transposed convolutions of odd shapes, and a batch norm's through some forty passes over the
activations. A product with the Hessian of a convolutional network spends most of its time there. Here both are written as functions that
are linear, or nearly so, in what a product puts in: a convolution, its gradients and their derivatives are three maps made of one another, and
of a batch norm the derivative of the gradient is found on paper::

    y  = γ x̂ + β,  x̂ = (x − m) r,  r = (var + ε)^(−½)                    m, var and all means below: of each channel
    x̄  = γ r (ȳ − a − b x̂)                 with a = mean ȳ, b = mean ȳ x̂
    and, for u, p, s in the places of x̄, γ̄, β̄, with c = mean u x̂, D = mean u ȳ − a mean u − b c:
    ȳ' = γ r (u − mean u) + (p − γ r c) x̂ + s
    γ' = N r D
    x' = r (ξ − mean ξ − (mean ξ x̂ + γ r D) x̂)      with ξ = (p − γ r c) ȳ − γ r b u

Used on the CPU where a Hessian is linearised for products. Gradients alone keep torch's fused kernels, which are quicker there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from bilevel._torch.graph_features import GraphFeature, has_graph_feature
from bilevel._torch.norms import affine, batch_norms, standardised
from bilevel._torch.transforms import batch_axis_first, saving_hooked, signed, transforms_active, uncompiled

__all__ = ["FastHVP"]

Maybe = torch.Tensor | None


class _Geometry(NamedTuple):
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def _applied(function: Any, *inputs: Any) -> Any:
    """Return what ``function`` makes of ``inputs``, without an apply where no graph is recorded: in each product, that is."""
    recorded = torch.is_grad_enabled() or transforms_active()
    return function.apply(*inputs) if recorded else function.forward(*inputs)


def _grouped(x: torch.Tensor, size: int) -> torch.Tensor:
    """Return activations (size, N, C, ...) as (N, size · C, ...)."""
    return x.transpose(0, 1).reshape(x.shape[1], size * x.shape[2], *x.shape[3:])


def _ungrouped(x: torch.Tensor, size: int) -> torch.Tensor:
    return x.reshape(x.shape[0], size, -1, *x.shape[2:])  # the vmapped axis is 1


@signed
class _Convolution(torch.autograd.Function):
    """x ∗ w of x (N, C, ...) and w (O, C / groups, ...)."""

    @staticmethod
    def forward(x: torch.Tensor, w: torch.Tensor, how: _Geometry) -> torch.Tensor:
        made: torch.Tensor = torch.ops.aten.convolution(
            x, w, None, how.stride, how.padding, how.dilation, False, [0] * len(how.stride), how.groups
        )
        return made

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, w, ctx.how = inputs
        ctx.save_for_backward(x, w)

    @staticmethod
    def backward(ctx: Any, y_bar: torch.Tensor) -> tuple[Maybe, Maybe, None]:
        x, w = ctx.saved_tensors
        to_x, to_w = ctx.needs_input_grad[:2]
        return (
            _applied(_ToInput, y_bar, w, tuple(x.shape), ctx.how) if to_x else None,
            _applied(_ToWeight, y_bar, x, tuple(w.shape), ctx.how) if to_w else None,
            None,
        )

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], x: torch.Tensor, w: torch.Tensor, how: _Geometry) -> Any:
        size = info.batch_size
        if dims[1] is None:
            x = x.movedim(dims[0], 0)
            y = _Convolution.apply(x.flatten(0, 1), w, how)
            return y.unflatten(0, (size, -1)), 0
        x, w = batch_axis_first(x, dims[0], size), batch_axis_first(w, dims[1], size)
        y = _Convolution.apply(_grouped(x, size), w.flatten(0, 1), how._replace(groups=size * how.groups))
        return _ungrouped(y, size), 1


@signed
class _ToInput(torch.autograd.Function):
    """x̄ of a convolution with weights w, from ȳ."""

    @staticmethod
    def forward(y_bar: torch.Tensor, w: torch.Tensor, shape: tuple[int, ...], how: _Geometry) -> torch.Tensor:
        return _backward(y_bar, y_bar.new_empty(shape), w, how, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        y_bar, w, _, ctx.how = inputs
        ctx.save_for_backward(y_bar, w)

    @staticmethod
    def backward(ctx: Any, u: torch.Tensor) -> tuple[Maybe, Maybe, None, None]:
        y_bar, w = ctx.saved_tensors
        to_y, to_w = ctx.needs_input_grad[:2]
        return (
            _applied(_Convolution, u, w, ctx.how) if to_y else None,
            _applied(_ToWeight, y_bar, u, tuple(w.shape), ctx.how) if to_w else None,
            None,
            None,
        )

    @staticmethod
    def vmap(
        info: Any, dims: tuple[Any, ...], y_bar: torch.Tensor, w: torch.Tensor, shape: tuple[int, ...], how: _Geometry
    ) -> Any:
        size = info.batch_size
        if dims[1] is None:
            y_bar = y_bar.movedim(dims[0], 0)
            x_bar = _ToInput.apply(y_bar.flatten(0, 1), w, (size * shape[0], *shape[1:]), how)
            return x_bar.unflatten(0, (size, -1)), 0
        y_bar, w = batch_axis_first(y_bar, dims[0], size), batch_axis_first(w, dims[1], size)
        shape = (shape[0], size * shape[1], *shape[2:])
        x_bar = _ToInput.apply(_grouped(y_bar, size), w.flatten(0, 1), shape, how._replace(groups=size * how.groups))
        return _ungrouped(x_bar, size), 1


@signed
class _ToWeight(torch.autograd.Function):
    """w̄ of a convolution of x, from ȳ."""

    @staticmethod
    def forward(y_bar: torch.Tensor, x: torch.Tensor, shape: tuple[int, ...], how: _Geometry) -> torch.Tensor:
        return _backward(y_bar, x, x.new_empty(shape), how, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        y_bar, x, _, ctx.how = inputs
        ctx.save_for_backward(y_bar, x)

    @staticmethod
    def backward(ctx: Any, v: torch.Tensor) -> tuple[Maybe, Maybe, None, None]:
        y_bar, x = ctx.saved_tensors
        to_y, to_x = ctx.needs_input_grad[:2]
        return (
            _applied(_Convolution, x, v, ctx.how) if to_y else None,
            _applied(_ToInput, y_bar, v, tuple(x.shape), ctx.how) if to_x else None,
            None,
            None,
        )

    @staticmethod
    def vmap(
        info: Any, dims: tuple[Any, ...], y_bar: torch.Tensor, x: torch.Tensor, shape: tuple[int, ...], how: _Geometry
    ) -> Any:
        size = info.batch_size
        y_bar, x = batch_axis_first(y_bar, dims[0], size), batch_axis_first(x, dims[1], size)
        shape = (size * shape[0], *shape[1:])
        w_bar = _ToWeight.apply(_grouped(y_bar, size), _grouped(x, size), shape, how._replace(groups=size * how.groups))
        return w_bar.unflatten(0, (size, -1)), 0


def _backward(y_bar: torch.Tensor, x: torch.Tensor, w: torch.Tensor, how: _Geometry, which: int) -> torch.Tensor:
    made: Any = torch.ops.aten.convolution_backward(
        y_bar, x, w, None, how.stride, how.padding, how.dilation, False, [0] * len(how.stride), how.groups,
        [which == 0, which == 1, False],
    )  # fmt: skip
    result: torch.Tensor = made[which]
    return result


@signed
class _BatchNorm(torch.autograd.Function):
    """y, with x̂ and r beside it, for γ and β of the shape of r."""

    @staticmethod
    def forward(
        x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, axes: tuple[int, ...], eps: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hat, r = standardised(x, axes, eps)
        return torch.addcmul(beta, hat, gamma), hat, r

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        x, gamma, _, ctx.axes, ctx.eps = inputs
        _, hat, r = output
        ctx.mark_non_differentiable(hat, r)
        ctx.save_for_backward(x, gamma, hat, r)

    @staticmethod
    def backward(ctx: Any, y_bar: torch.Tensor, *_: Any) -> tuple[Any, ...]:
        x, gamma, hat, r = ctx.saved_tensors
        return (*_applied(_BatchNormBackward, y_bar, x, gamma, hat, r, ctx.axes, ctx.eps), None, None)

    @staticmethod
    def vmap(
        info: Any, dims: tuple[Any, ...], x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor,
        axes: tuple[int, ...], eps: float,
    ) -> Any:  # fmt: skip
        moved = [batch_axis_first(t, dim, info.batch_size) for t, dim in zip((x, gamma, beta), dims, strict=False)]
        return _BatchNorm.apply(*moved, tuple(axis + 1 for axis in axes), eps), (0, 0, 0)


@signed
class _BatchNormBackward(torch.autograd.Function):
    """(x̄, γ̄, β̄) from ȳ. It is x, of which x̂ and r are functions, that derivatives are with respect to."""

    @staticmethod
    def forward(
        y_bar: torch.Tensor, x: torch.Tensor, gamma: torch.Tensor, hat: torch.Tensor, r: torch.Tensor,
        axes: tuple[int, ...], eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        a, b = y_bar.sum(axes, keepdim=True), (y_bar * hat).sum(axes, keepdim=True)
        scale, count = gamma * r, hat.numel() // r.numel()
        return torch.addcmul(torch.addcmul(-scale * a / count, y_bar, scale), hat, -scale * b / count), b, a

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        y_bar, x, gamma, hat, r, ctx.axes, ctx.eps = inputs
        ctx.save_for_backward(y_bar, x, gamma, hat, r, output[2], output[1])

    @staticmethod
    def backward(ctx: Any, u: torch.Tensor, p: torch.Tensor, s: torch.Tensor) -> tuple[Any, ...]:
        y_bar, x, gamma, hat, r, a, b = ctx.saved_tensors
        axes, count = ctx.axes, hat.numel() // r.numel()
        if torch.is_grad_enabled():
            # What was saved is constant, and would make a third derivative wrong without a word, as torch's own is.
            hat, r = standardised(x, axes, ctx.eps)
            a, b = y_bar.sum(axes, keepdim=True), (y_bar * hat).sum(axes, keepdim=True)
        a, b, scale = a / count, b / count, gamma * r
        mean_u, c, mean_uy = (t.mean(axes, keepdim=True) for t in (u, u * hat, u * y_bar))
        D = mean_uy - a * mean_u - b * c
        by_y, by_u = p - scale * c, -scale * b  # ξ = by_y ȳ + by_u u
        y_two = torch.addcmul(torch.addcmul(s - scale * mean_u, u, scale), hat, by_y)
        shift, slope = by_y * a + by_u * mean_u, by_y * b + by_u * c + scale * D
        x_two = torch.addcmul(torch.addcmul(-r * shift, y_bar, r * by_y), u, r * by_u)
        x_two = torch.addcmul(x_two, hat, -r * slope)
        return y_two, x_two, count * r * D, None, None, None, None

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], *inputs: Any) -> Any:
        *tensors, axes, eps = inputs
        moved = [batch_axis_first(t, dim, info.batch_size) for t, dim in zip(tensors, dims, strict=False)]
        return _BatchNormBackward.apply(*moved, tuple(axis + 1 for axis in axes), eps), (0, 0, 0)


def _convolve(dims: int, theirs: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def convolve(
        input: torch.Tensor, weight: torch.Tensor, bias: Maybe = None, stride: Any = 1, padding: Any = 0,
        dilation: Any = 1, groups: int = 1,
    ) -> torch.Tensor:  # fmt: skip
        numeric = not isinstance(padding, str)
        if not numeric or input.ndim != dims + 2 or not _suits(input, weight) or input.dtype != weight.dtype:
            return theirs(input, weight, bias, stride, padding, dilation, groups)
        how = _Geometry(_each(stride, dims), _each(padding, dims), _each(dilation, dims), groups)
        y: torch.Tensor = _Convolution.apply(input, weight, how)
        return y if bias is None else y + bias.reshape(-1, *[1] * dims)

    return convolve


def _each(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    each = (value,) if isinstance(value, int) else tuple(value)
    return each * dims if len(each) == 1 else each


def _suits(*tensors: torch.Tensor) -> bool:
    return all(t.device.type == "cpu" and t.numel() and t.dtype in (torch.float32, torch.float64) for t in tensors)


def _batch_norm(x: torch.Tensor, weight: Maybe, bias: Maybe, eps: float) -> torch.Tensor:
    shape = (1, -1, *[1] * (x.ndim - 2))
    gamma, beta = affine(x, weight, bias)
    y: torch.Tensor = _BatchNorm.apply(x, gamma.reshape(shape), beta.reshape(shape), (0, *range(2, x.ndim)), eps)[0]
    return y


def _batch_norm_suits(x: torch.Tensor, running: bool) -> bool:
    return not running and x.ndim >= 2 and _suits(x) and x[:, 0].numel() >= 2


def _needs_torch() -> bool:
    """Whether tangents are pushed forward, for which there are no rules here, or what is saved is computed again outside (checkpoints)."""
    return forward_ad._current_level >= 0 or saving_hooked()


_QUICK: dict[Any, Callable[..., torch.Tensor]] = {
    torch.conv1d: _convolve(1, torch.conv1d),
    torch.conv2d: _convolve(2, torch.conv2d),
    torch.conv3d: _convolve(3, torch.conv3d),
    **batch_norms(_batch_norm, _batch_norm_suits),
}


class FastHVP(TorchFunctionMode):
    """Inside, convolutions and batch norms by batch statistics are differentiated twice by the rules above."""

    @uncompiled
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        quick = _QUICK.get(func)
        return (func if quick is None or _needs_torch() else quick)(*args, **(kwargs or {}))

    @staticmethod
    def around(function: Callable[..., Any]) -> AbstractContextManager[Any]:
        """Return the mode for a user's ``function`` that was seen to have a use for it, or a context that does nothing."""
        useful = has_graph_feature(function, GraphFeature.CONVOLUTION) or has_graph_feature(
            function, GraphFeature.BATCH_NORM
        )
        return FastHVP() if useful else nullcontext()

    @staticmethod
    def normalises(function: Callable[..., Any]) -> bool:
        """Return whether a batch norm was seen in ``function``, and nothing that is compiled, for which a mode means to compile again."""
        return has_graph_feature(function, GraphFeature.BATCH_NORM) and not has_graph_feature(
            function, GraphFeature.COMPILED
        )
