"""Operations that torch differentiates only once, found in a recorded graph, and refused in a derivative that is differentiated again.

torch gives no error there: it treats the first derivative as a constant, on purpose (pytorch/pytorch#90224).
The list of torch's own operations was found
by comparing second derivatives with those of dense tensors. Operations that :mod:`bilevel._torch.double_backward`
rewrites do not occur here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from bilevel._torch.graph_features import nodes
from bilevel._torch.transforms import layers
from bilevel.errors import ArgumentError

__all__ = ["once_only", "refuse_once_only"]

# What the mark of a custom Function makes of any backward.
_MARK = getattr(once_differentiable(lambda ctx: None), "__code__", None)
# Nodes whose backward records no graph.
_NODES = {"SparseCooTensorWithDimsAndTensorsBackward0": "torch.sparse_coo_tensor"}


def once_only(node: Any) -> str | None:
    """Return the name of the operation of ``node`` if torch differentiates it only once."""
    kind: Any = getattr(node, "_forward_cls", None)
    if kind is None:
        return _NODES.get(node.name())
    while kind is not None:
        backward = getattr(kind, "backward", None)
        if getattr(backward, "__code__", "") is _MARK:
            return str(kind.__name__)
        # A transform makes a class of its own, whose backward closes over the user's.
        closed = inspect.getclosurevars(backward).nonlocals if inspect.isfunction(backward) else {}
        kind = closed.get("autograd_function")
    return None


def refuse_once_only(
    where: str, noun: str, values: torch.Tensor, known: Iterable[torch.Tensor] = (), *, innermost_only: bool = False
) -> None:
    """Raise if a graph of ``values`` holds an operation that torch differentiates only once.

    Parameters
    ----------
    where, noun
        The layer's name, and what the user's function is.
    values
        What it returned.
    known
        What it was given: what lies behind in the graph is not its own.
    innermost_only
        Whether to look at the graph of the innermost transform alone.
    """
    behind = [layer for tensor in known for layer in layers(tensor)]
    for layer in layers(values):
        for node in nodes(layer, behind):
            name = once_only(node)
            if name is not None:
                raise ArgumentError(_refusal(where, noun, name, custom=node.name() not in _NODES))
        if innermost_only:
            return


def _refusal(where: str, noun: str, name: str, *, custom: bool) -> str:
    if custom:
        return (
            f"{where}: expected {noun} to be of operations that can be differentiated twice, and {name} in it is marked once_differentiable, "
            "so that torch would take its slope for a constant; remove the mark, and write its backward with differentiable operations"
            + (", or state the equations of the minimum as bilevel.root" if noun == "objective" else "")
        )
    return (
        f"{where}: expected {noun} to be of operations that can be differentiated twice, and a {name} is on the way, whose slope torch would "
        "take for a constant; make the sparse tensor of its values inside the function, by torch.sparse_coo_tensor, or take a dense one"
    )
