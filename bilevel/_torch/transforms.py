"""The torch.func transforms around a call, and the tensors that they differentiate.

This is the only module that uses torch's private bindings. torch has no public way to ask whether an outer transform
differentiates a tensor. A silent zero gradient depends on that.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from torch._C import _functorch
from torch._C._dynamo import eval_frame
from torch.autograd import forward_ad

from bilevel._torch.mapped import layers
from bilevel.errors import TransformError

__all__ = [
    "autocast_to",
    "autocasting",
    "batch_axis_first",
    "carries_gradient",
    "differentiating",
    "eager",
    "forward_levels",
    "grads_batched",
    "hooks_refused",
    "innermost",
    "is_differentiated_again",
    "is_plain",
    "isolated",
    "layers",
    "outside_autocast",
    "runs_plainly",
    "saving_hooked",
    "signed",
    "tangents_batched",
    "transforms_active",
    "uncompiled",
    "unhooked",
    "without_gradient",
    "without_tangent",
]


_HOOKS_REFUSED = (
    "bilevel: expected a function without saved-tensor hooks of its own, such as those of torch.utils.checkpoint, and it opens some, which PyTorch "
    "cannot differentiate by transforms; leave them out of the function, and put the checkpoint around the call of the layer"
)


# The innermost torch.func transform around this call, or None. torch's own function: every call of a layer asks it several times.
transforms_active: Callable[[], object] = _functorch.peek_interpreter_stack


def batch_axis_first(tensor: torch.Tensor, dim: int | None, size: int | None = None) -> torch.Tensor:
    """Return ``tensor`` with its vmapped axis first; an unbatched one is expanded if ``size`` is given."""
    if dim is not None:
        return tensor.movedim(dim, 0)
    return tensor if size is None else tensor.unsqueeze(0).expand(size, *tensor.shape)


def _hooks() -> tuple[Any, Any] | None:
    """Return the innermost pair of saved-tensor hooks around this call."""
    # A function of torch's own without a public name; where it should be missing, nothing is known of hooks.
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return None if top is None else top(False)


def saving_hooked() -> bool:
    """Return whether the caller's hooks, such as those of a checkpoint, see every tensor that a graph saves here."""
    return _hooks() is not None


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@contextlib.contextmanager
def unhooked() -> Iterator[None]:
    """Hide tensors saved by our own graphs from the caller's hooks. A checkpoint would count and recompute them."""
    with contextlib.ExitStack() as stack:
        hooks = _hooks()
        if hooks is not None and hooks[0] is not _as_it_is:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is))
        yield


@contextlib.contextmanager
def hooks_refused() -> Iterator[None]:
    """Hide what is saved from the caller's hooks, and refuse hooks that are opened inside, such as those of a checkpoint.

    A transform wraps the tensors that are saved in it, and no hook is made for that. torch refuses hooks, also those around a caller. Ours hide
    those, for our graphs are not the caller's. Hooks that a function opens inside would make a second derivative zero, or unpack outside of a
    batch what was saved inside.

    Raises
    ------
    TransformError
        If hooks are opened inside, in place of torch's RuntimeError.
    """
    control: Any = torch._C._autograd
    with unhooked():
        before = control._saved_tensors_hooks_get_disabled_error_message()
        control._saved_tensors_hooks_disable(_HOOKS_REFUSED, False)  # False: those that there are stay
        try:
            yield
        except RuntimeError as error:
            if str(error) != _HOOKS_REFUSED or isinstance(error, TransformError):
                raise
            raise TransformError(_HOOKS_REFUSED) from error
        finally:
            if before is None:
                control._saved_tensors_hooks_enable()
            else:
                control._saved_tensors_hooks_disable(before, False)


def autocast_to(device: torch.device) -> torch.dtype | None:
    """Return the dtype that autocast casts to on ``device`` around this call, or None."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def autocasting(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which autocast on ``device`` casts to ``dtype``, or is off where that is None."""
    if dtype == autocast_to(device):
        return contextlib.nullcontext()
    # No cache: a cast kept from under no_grad would come back without its graph.
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=False)


def differentiating() -> bool:
    """Return whether a transform that differentiates (grad, jvp or a dual level, not vmap alone) surrounds this call."""
    if forward_ad._current_level >= 0:
        return True
    stack = _functorch.get_interpreter_stack() or []
    return any(item.key() in (_functorch.TransformType.Grad, _functorch.TransformType.Jvp) for item in stack)


def innermost(tensor: torch.Tensor) -> torch.Tensor:
    """Return the plain tensor that transforms have wrapped."""
    *_, plain = layers(tensor)
    return plain


def without_gradient(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` cut from what differentiates it, in either mode."""
    # detach alone keeps the tangent of a dual number.
    with forward_ad._set_fwd_grad_enabled(False):
        return tensor.detach()


def without_tangent(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` without its tangent, in the graph that it is in: a rule's jvp is handed tensors that still have theirs."""
    if tensor.layout is not torch.strided:
        return tensor
    with forward_ad._set_fwd_grad_enabled(True):
        return forward_ad.unpack_dual(tensor).primal


def carries_gradient(tensor: torch.Tensor) -> bool:
    """Return whether any level, ordinary autograd included, differentiates ``tensor`` in either mode."""
    return any(_is_differentiated(layer) for layer in layers(tensor) if not _functorch.is_batchedtensor(layer))


def _is_differentiated(layer: torch.Tensor) -> bool:
    if layer.requires_grad:
        return True
    # torch has no tangents of sparse tensors, nor of whole numbers, nor outside of a dual level.
    dual = forward_ad._current_level >= 0 and layer.layout is torch.strided
    dual = dual and (layer.is_floating_point() or layer.is_complex())
    return dual and forward_ad.unpack_dual(layer).tangent is not None


def is_differentiated_again(tensors: Iterable[torch.Tensor]) -> bool:
    """Return whether a derivative of a rule that saved ``tensors`` may follow the derivative that is being taken now."""
    if not transforms_active():
        return torch.is_grad_enabled()
    # One level is the transform that takes this derivative.
    return any(
        sum(layer.requires_grad for layer in layers(t) if not _functorch.is_batchedtensor(layer)) > 1 for t in tensors
    )


def is_plain(tensor: torch.Tensor) -> bool:
    """Return whether ``tensor`` belongs to no transform, and nothing differentiates it."""
    return not _functorch.is_functorch_wrapped_tensor(tensor) and not carries_gradient(tensor)


def runs_plainly(tensors: Iterable[torch.Tensor]) -> bool:
    """Return whether nothing around this call wants to see the function itself run, or sees tensors otherwise than they are."""
    return not (
        transforms_active()
        or saving_hooked()
        or sys.gettrace() is not None  # a debugger steps through it
        or torch.is_anomaly_enabled()
        or torch._C._len_torch_function_stack()
        or torch._C._len_torch_dispatch_stack()
        or any(
            t.layout is not torch.strided or type(t) not in (torch.Tensor, torch.nn.Parameter) or not is_plain(t)
            for t in tensors
        )
    )


def forward_levels(tensors: Iterable[torch.Tensor]) -> int:
    """Return in how many nested forward-mode transforms these tensors take part."""
    stack = _functorch.get_interpreter_stack() or []
    forward = {item.level() for item in stack if item.key() == _functorch.TransformType.Jvp}
    if len(forward) < 2:
        return len(forward)
    taking_part = set()
    for tensor in tensors:
        for layer in layers(tensor):
            if _functorch.is_gradtrackingtensor(layer):
                taking_part.add(_functorch.maybe_get_level(layer))
    return len(forward & taking_part)


P = ParamSpec("P")
T = TypeVar("T")


_WHY_EAGER = "bilevel solves outside compiled code: leave out fullgraph=True"


def uncompiled(function: Callable[P, T]) -> Callable[P, T]:
    """Keep ``torch.compile`` from starting in ``function``, or in what ``function`` calls.

    Where the compiler gives a frame up, it starts again in each frame below: in ours too, where it may fail. What it meets on its way
    through a user's function, it still compiles with that function.
    """
    if hasattr(eval_frame, "set_code_exec_strategy"):
        skip = eval_frame._FrameAction.SKIP
        code = function.__code__
        eval_frame.set_code_exec_strategy(code, eval_frame._FrameExecStrategy(skip, skip))
    return function


def eager(function: Callable[P, T]) -> Callable[P, T]:
    """Keep ``torch.compile`` out of ``function`` and all that it calls.

    Compiled code can drop a custom Function's jvp (pytorch/pytorch#192985) or backward (#193279). A compiled
    caller breaks its graph here instead and goes on behind. This is ``torch.compiler.disable``, applied only
    once the compiler is there, because applying it imports the compiler, which costs every program a second.
    """
    disabled: list[Callable[P, T]] = []

    @functools.wraps(function)
    def boundary(*args: P.args, **kwargs: P.kwargs) -> T:
        _refuse_tracing()
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function, reason=_WHY_EAGER))
        return disabled[0](*args, **kwargs)

    # The compiler must not look inside the boundary either: not from its caller (the mark that it leaves itself) and
    # not when the frame starts (told to torch by the code object, where this version has a binding for that).
    boundary._torchdynamo_disable = True  # type: ignore[attr-defined]
    boundary._torchdynamo_disable_msg = _WHY_EAGER  # type: ignore[attr-defined]
    return uncompiled(boundary)


def _refuse_tracing() -> None:
    """Raise inside a tracer that records operations alone: what a solver does depends on values."""
    tracer = sys.modules.get("torch.fx.experimental.proxy_tensor")
    if torch._C._get_tracing_state() is not None or (tracer is not None and tracer.get_proxy_mode() is not None):
        raise TransformError(
            "bilevel: expected values around a solve, got a tracer, such as that of torch.func.linearize, torch.export or "
            "torch.jit.trace, which records operations without values; differentiate by torch.func.jvp(f, (x,), (v,)), under vmap for "
            "many v, and leave the solve out of the traced code"
        )


def outside_autocast(function: Callable[P, T]) -> Callable[P, T]:
    """Turn autocast off in ``function``: what a solver computes is meant in the dtype of its vectors.

    Only a user's own function runs under the autocast that surrounds a call (:meth:`bilevel.equations.system.System.call`).
    """

    @functools.wraps(function)
    def plain(*args: P.args, **kwargs: P.kwargs) -> T:
        for arg in args:
            if isinstance(arg, torch.Tensor):
                if not torch.is_autocast_enabled(arg.device.type):
                    break
                with autocasting(arg.device, None):
                    return function(*args, **kwargs)
        return function(*args, **kwargs)

    return plain


def isolated(function: Callable[P, T]) -> Callable[P, T]:
    """Run ``function`` outside autocast and outside inference mode, in which no graph can be built, and hide its graphs from the caller's hooks.

    A solver's graphs are not the caller's. A checkpoint around a layer would otherwise repeat the whole solve for each of
    its steps.
    """

    @outside_autocast
    @functools.wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> T:
        inference = torch.is_inference_mode_enabled()
        if not inference and not saving_hooked():
            return function(*args, **kwargs)
        with contextlib.ExitStack() as stack:
            stack.enter_context(unhooked())
            if inference:
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())
            return function(*args, **kwargs)

    return alone


def signed(function: type[T]) -> type[T]:
    """Keep the signature of a custom Function's forward with it: torch works it out at each call, a tenth of that call's cost."""
    forward: Any = function.forward  # type: ignore[attr-defined]
    forward.__signature__ = inspect.signature(forward)
    return function


Backward = Callable[[Any, torch.Tensor], tuple[Any, ...]]
Jvp = Callable[..., torch.Tensor]


def _older_level() -> int:
    """Return the level of torch's older vmap that is running, for tensors to be taken out of it and put back."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return level


def grads_batched(backward: Backward) -> Backward:
    """Let a custom Function's backward take part in ``autograd.grad(is_grads_batched=True)``.

    That option, ``autograd.functional.jacobian(vectorize=True)`` and gradcheck's batched checks run on torch's
    older vmap, which calls no ``vmap`` staticmethod. The cotangent is taken out of it and mapped by the present one.
    """

    @functools.wraps(backward)
    def mapped(ctx: Any, cotangent: torch.Tensor) -> tuple[Any, ...]:
        if not _functorch.is_legacy_batchedtensor(cotangent):
            return backward(ctx, cotangent)
        level = _older_level()
        plain = torch._remove_batch_dim(cotangent, level, 1, 0)
        some: list[int] = []

        def gradients(one: torch.Tensor) -> tuple[torch.Tensor, ...]:
            found = backward(ctx, one)
            some[:] = [index for index, tensor in enumerate(found) if tensor is not None]
            return tuple(found[index] for index in some)

        stacked = torch.func.vmap(gradients)(plain)
        result: list[Any] = [None] * (max(some, default=-1) + 1)
        for index, tensor in zip(some, stacked, strict=True):
            result[index] = torch._add_batch_dim(tensor, 0, level)
        return (*result, *[None] * (len(ctx.needs_input_grad) - len(result)))

    return mapped


def tangents_batched(jvp: Jvp) -> Jvp:
    """Let a custom Function's jvp take part in ``autograd.functional.jacobian(strategy="forward-mode")``, likewise."""

    @functools.wraps(jvp)
    def mapped(ctx: Any, *tangents: torch.Tensor | None) -> torch.Tensor:
        some = [i for i, t in enumerate(tangents) if t is not None and _functorch.is_legacy_batchedtensor(t)]
        if not some:
            return jvp(ctx, *tangents)
        level = _older_level()
        batched = (tangents[index] for index in some)
        plain = [torch._remove_batch_dim(tensor, level, 1, 0) for tensor in batched if tensor is not None]

        def pushed(*ones: torch.Tensor) -> torch.Tensor:
            every = list(tangents)
            for index, tensor in zip(some, ones, strict=True):
                every[index] = tensor
            return jvp(ctx, *every)

        return torch._add_batch_dim(torch.func.vmap(pushed)(*plain), 0, level)

    return mapped
