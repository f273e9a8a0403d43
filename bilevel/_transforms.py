"""What torch.func transforms surround a call, and which tensors are being differentiated in them.

The only place that touches torch's private bindings. torch has no public way to ask whether a tensor is
differentiated by a transform outside the innermost one, which is what a silent zero gradient depends on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import ParamSpec, TypeVar

import torch
from torch._C import _functorch
from torch._C._dynamo import eval_frame
from torch.autograd import forward_ad

__all__ = ["carries_gradient", "eager", "forward_levels", "transforms_active"]


def transforms_active() -> bool:
    """Return whether a torch.func transform surrounds this call."""
    return _functorch.peek_interpreter_stack() is not None


def _layers(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the tensor as each transform sees it, from the innermost outwards."""
    yield tensor
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
        yield tensor


def carries_gradient(tensor: torch.Tensor) -> bool:
    """Return whether any level, ordinary autograd included, differentiates ``tensor`` in either mode."""
    for layer in _layers(tensor):
        if _functorch.is_batchedtensor(layer):
            continue
        if layer.requires_grad or (layer.is_floating_point() and forward_ad.unpack_dual(layer).tangent is not None):
            return True
    return False


def forward_levels(tensors: Iterable[torch.Tensor]) -> int:
    """Return in how many nested forward-mode transforms these tensors take part."""
    stack = _functorch.get_interpreter_stack() or []
    forward = {item.level() for item in stack if item.key() == _functorch.TransformType.Jvp}
    if len(forward) < 2:
        return len(forward)
    taking_part = set()
    for tensor in tensors:
        for layer in _layers(tensor):
            if _functorch.is_gradtrackingtensor(layer):
                taking_part.add(_functorch.maybe_get_level(layer))
    return len(forward & taking_part)


P = ParamSpec("P")
T = TypeVar("T")


def eager(function: Callable[P, T]) -> Callable[P, T]:
    """Keep ``torch.compile`` out of ``function`` and all that it calls.

    Compiled code can drop a custom Function's jvp (pytorch/pytorch#192985) or backward (#193279). A compiled
    caller breaks its graph here instead and goes on behind. ``torch.compiler.disable`` does the same and imports
    torch's compiler to do it, which costs every program a second; these are the two bindings that it rests on.
    """

    @functools.wraps(function)
    def boundary(*args: P.args, **kwargs: P.kwargs) -> T:
        outer = eval_frame.set_eval_frame(None)
        try:
            return function(*args, **kwargs)
        finally:
            eval_frame.set_eval_frame(outer)

    eval_frame.skip_code(boundary.__code__)
    boundary._torchdynamo_disable = True  # type: ignore[attr-defined]  # what torch.compiler.disable sets
    boundary._torchdynamo_disable_recursive = True  # type: ignore[attr-defined]
    boundary._torchdynamo_disable_msg = "bilevel solves outside compiled code"  # type: ignore[attr-defined]
    return boundary
