"""Reverse mode as a transform: ``grad``, ``grad_and_value`` and ``vjp`` of functions of tensors, as in ``torch.func``.

At their first call torch's own three import its compiler and sympy, some 800 modules in a second. They do so to switch
compiled autograd off during a reverse pass. Before the compiler is imported there is nothing to switch off. Everything
else is as in ``torch/_functorch/eager_transforms.py``, on the same bindings.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
from torch._C import _functorch
from torch.autograd.graph import GradientEdge, _engine_run_backward, get_gradient_edge
from torch.utils import _pytree as pytree

from bilevel._torch.transforms import hooks_refused

__all__ = ["Output", "grad", "grad_and_value", "gradient_edges", "reverse_pass", "vjp"]

Output: TypeAlias = torch.Tensor | GradientEdge
"""Where a reverse pass begins: a tensor with a graph, or the place of one in its graph."""


def vjp(function: Callable[..., Any], *primals: torch.Tensor, has_aux: bool = False) -> Any:
    """Return (y, pull) for y = f(primals), or (y, pull, aux) for (y, aux); ``pull`` maps u, like y, to the tuple of (∂f/∂primal)ᵀ u.

    Parameters
    ----------
    function
        f, of tensors; y is a tensor or a tuple of tensors.
    primals
        Floating-point tensors.
    has_aux
        Whether f returns (y, aux), of which y alone is differentiated.
    """
    with _level() as level:
        inside = _inside(primals, level)
        output = function(*inside)
        output, aux = output if has_aux else (output, None)
        found = _outside(output, level)
        aux = _outside(aux, level)
    outputs = pytree.tree_leaves(output)

    def pull(cotangents: Any) -> tuple[torch.Tensor, ...]:
        with _graphs_allowed(), _engine():
            return reverse_pass(outputs, inside, pytree.tree_leaves(cotangents), create_graph=torch.is_grad_enabled())

    return (found, pull, aux) if has_aux else (found, pull)


def grad_and_value(
    function: Callable[..., torch.Tensor], *primals: torch.Tensor
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Return the tuple of ∂f/∂primal, and f(primals), which is of shape ()."""
    with _level() as level:
        inside = _inside(primals, level)
        value = function(*inside)
        with _engine():
            slopes = reverse_pass([value], inside, [torch.ones_like(value)], retain_graph=False, create_graph=True)
        found: Any = _outside((slopes, value), level)
    return found[0], found[1]


def grad(function: Callable[..., torch.Tensor], *primals: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the tuple of ∂f/∂primal of an f of shape ()."""
    return grad_and_value(function, *primals)[0]


@contextmanager
def _level() -> Iterator[int]:
    """Enter a level of reverse mode, and yield its number."""
    with hooks_refused():
        level = _functorch._grad_increment_nesting()
        try:
            with torch.enable_grad():
                yield level
        finally:
            _functorch._grad_decrement_nesting()


def _inside(tensors: Sequence[torch.Tensor], level: int) -> tuple[torch.Tensor, ...]:
    """Return ``tensors`` as leaves of a level.

    A tensor that a rule saved may still have the wrapper of a level that has ended. torch removes one such wrapper, but not two nested ones.
    """
    wrapped = [_functorch._wrap_for_grad(_functorch.unwrap_if_dead(tensor), level) for tensor in tensors]
    before = _functorch.get_inplace_requires_grad_allowed()
    _functorch.set_inplace_requires_grad_allowed(True)
    try:
        return tuple(tensor.requires_grad_() for tensor in wrapped)
    finally:
        _functorch.set_inplace_requires_grad_allowed(before)


def _outside(tree: Any, level: int) -> Any:
    """Return the tensors in ``tree`` without their wrappers of this level, for use outside of it."""
    return pytree.tree_map_only(torch.Tensor, lambda tensor: _functorch._unwrap_for_grad(tensor, level), tree)


def gradient_edges(outputs: Sequence[torch.Tensor]) -> list[Output]:
    """Return the places of ``outputs`` in their graph, from which a reverse pass begins as from themselves: their memory can be freed.

    A tensor without a graph stays as it is.
    """
    return [get_gradient_edge(output) if output.requires_grad else output for output in outputs]


def reverse_pass(
    outputs: Sequence[Output],
    inputs: Sequence[torch.Tensor],
    cotangents: Sequence[torch.Tensor],
    *,
    retain_graph: bool = True,
    create_graph: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Return Σ (∂output/∂input)ᵀ cotangent for each input, zero where no graph leads.

    This is ``torch.autograd.grad`` for cotangents of the outputs' shapes. That function imports sympy in order to compare shapes, which takes a
    third of a second in a process and half of each small pass.
    """
    if not inputs:
        return ()
    pairs = [
        pair
        for pair in zip(outputs, cotangents, strict=True)
        if isinstance(pair[0], GradientEdge) or pair[0].requires_grad
    ]
    found: Sequence[torch.Tensor | None] = [None] * len(inputs)
    if pairs:
        found = _engine_run_backward(
            tuple(output for output, _ in pairs), tuple(cotangent for _, cotangent in pairs), retain_graph, create_graph, tuple(inputs),
            allow_unreachable=True, accumulate_grad=False,
        )  # fmt: skip
    return tuple(
        torch.zeros_like(tensor) if slope is None else slope for slope, tensor in zip(found, inputs, strict=True)
    )


def _engine() -> AbstractContextManager[Any]:
    """Return a context in which reverse passes are run and not compiled."""
    # Half imported, as another thread may have it, it has no such function yet, and is not on either.
    disable = getattr(sys.modules.get("torch._dynamo.compiled_autograd"), "_disable", None)
    return nullcontext() if disable is None else disable()


@contextmanager
def _graphs_allowed() -> Iterator[None]:
    """Leave inference mode, whichever mode of gradients there is."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    enabled = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(enabled):
        yield
