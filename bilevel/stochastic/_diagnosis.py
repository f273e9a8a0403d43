"""What is wrong with a method's variables, objectives and batches: said where something has failed, or before it can."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bilevel._torch.graph_features import nodes
from bilevel._torch.once_differentiable import refuse_once_only
from bilevel.errors import ArgumentError
from bilevel.stochastic._batches import BatchSource, batch_parts
from bilevel.stochastic._variables import Variables

__all__ = ["cause_of_nonfinite", "check_dense", "check_objective", "check_second_derivatives"]

_OTHERS = "or take bilevel.stochastic.F2SA, BOME or PZOBO, which need first derivatives alone"


def cause_of_nonfinite(variables: tuple[Variables, ...], sources: tuple[BatchSource, ...]) -> str | None:
    """Return a sentence about a batch or a variable that is not finite or is empty, with its remedy; None: there is none."""
    for source in sources:
        for leaf in _tensors(source.last):
            if not leaf.numel():
                return (
                    f"{source.where}: the last batch has a tensor of shape {tuple(leaf.shape)}, without examples, whose mean is not a number; "
                    "pass batches of at least one example"
                )
            if leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
                return f"{source.where}: the last batch holds NaN or infinity; leave such examples out, or fill them in"
    for one in variables:
        for name, tensor in zip(one.names, one.tensors, strict=True):
            if not bool(torch.isfinite(tensor).all()):
                named = one.what if name == one.what else f"{one.what} {name}"
                return f"{named} holds NaN or infinity itself; begin from finite numbers, or load a state saved earlier and lower the learning rates"
    return None


def _tensors(batch: Any) -> list[torch.Tensor]:
    leaves = [leaf for _, data in batch_parts(batch) for leaf in pytree.tree_leaves(data)]
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def check_second_derivatives(where: str, loss: torch.Tensor, gradient: Sequence[torch.Tensor] | None = None) -> None:
    """Raise :class:`ArgumentError` if the graph of the inner objective's ``loss``, or its ``gradient``, cannot be differentiated again."""
    if gradient is not None:
        if not any(slope.requires_grad for slope in gradient):
            raise ArgumentError(
                f"{where}: expected the gradient of inner_objective to depend on inner or outer, and no graph leads from it: the objective is "
                "linear, or a custom backward in it leaves torch's operations; write that backward with differentiable operations, "
                + _OTHERS
            )
        return
    refuse_once_only(where, "inner_objective", loss)
    if any(node.name().startswith("CompiledFunction") for node in nodes(loss)):
        raise ArgumentError(
            f"{where}: expected inner_objective to be of operations that can be differentiated twice, and a compiled model in it can be "
            "differentiated once; pass the model as it was before torch.compile, or compile it with backend='eager', "
            + _OTHERS
        )


def check_dense(where: str, slopes: Sequence[torch.Tensor]) -> None:
    """Raise :class:`ArgumentError` if a derivative is a sparse tensor."""
    for slope in slopes:
        if slope.layout is not torch.strided:
            raise ArgumentError(
                f"{where}: expected dense derivatives, got one of layout {slope.layout} and shape {tuple(slope.shape)}; make the embedding "
                "with sparse=False"
            )


def check_objective(where: str, name: str, function: Callable[..., Any]) -> None:
    """Raise :class:`ArgumentError` unless ``function`` can be called with (inner, outer, data)."""
    try:
        inspect.signature(function).bind(None, None, None)
    except TypeError as error:
        raise ArgumentError(
            f"{where}: expected {name} to be a function of (inner, outer, data), and it cannot be called so: {error}; give it these three "
            "arguments, also where it does not need all of them"
        ) from None
    except ValueError:  # a function without a signature
        return
