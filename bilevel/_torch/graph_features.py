"""The special operations that the graph of a user's function has shown, so that only functions that need a mode run in it.

Intercepting every operation from the start would take time, and compiled functions would be compiled again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from enum import Enum
from typing import Any
from weakref import WeakValueDictionary

import torch

__all__ = ["GraphFeature", "has_graph_feature", "nodes", "reaches_another_leaf", "record_graph_features"]


class GraphFeature(Enum):
    """Kinds of nodes, by the beginnings of their names."""

    CONVOLUTION = ("ConvolutionBackward",)
    BATCH_NORM = ("NativeBatchNormBackward",)
    COMPILED = ("CompiledFunction",)
    REWRITTEN = (
        "WeightNormInterface",
        "ScaledDotProduct",
        "SparseCooTensorWithDims",
        "ProdBackward",
        "CumprodBackward",
        "LinalgDetBackward",
    )


def record_graph_features(function: Callable[..., Any], graph: Iterable[Any]) -> bool:
    """Record the special operations among the nodes in ``graph``, that of a result of a user's ``function``; return whether one is new.

    What one method of an object holds counts for them all. A function may hold something only for some of its arguments, another model or
    another branch, and so each graph is looked at.
    """
    names = {node.name() for node in graph}
    new = False
    with suppress(TypeError):  # not everything callable can be referred to weakly
        owner = _owner(function)
        for kind, owners in _seen.items():
            if any(name.startswith(kind.value) for name in names) and owners.get(id(owner)) is not owner:
                owners[id(owner)], new = owner, True
    return new


def nodes(values: torch.Tensor, known: Iterable[torch.Tensor] = ()) -> Iterator[Any]:
    """Yield each node of the graph of ``values`` that is not behind one of the ``known`` tensors."""
    pending = [values.grad_fn]
    met = {tensor.grad_fn for tensor in known if tensor.grad_fn is not None}
    while pending:
        node = pending.pop()
        if node is not None and node not in met:
            met.add(node)
            yield node
            pending.extend(following for following, _ in node.next_functions)


def reaches_another_leaf(output: torch.Tensor, known: Sequence[torch.Tensor]) -> bool:
    """Return whether the graph of ``output`` ends in a tensor that requires grad other than through one of ``known``."""
    found = {getattr(node, "variable", None) for node in list(nodes(output, known))}
    return not found <= {None, *known}


def has_graph_feature(function: Callable[..., Any], kind: GraphFeature) -> bool:
    """Return whether nodes of ``kind`` were seen in ``function``."""
    owner = _owner(function)
    return _seen[kind].get(id(owner)) is owner


def _owner(function: Callable[..., Any]) -> Any:
    # A bound method is made anew each time that it is named: what stays is what it is bound to, if that can be referred to weakly.
    if inspect.ismethod(function) and type(function.__self__).__weakrefoffset__:
        return function.__self__
    return function


# Weakly: a function is let go with what it closes over.
_seen: dict[GraphFeature, WeakValueDictionary[int, Any]] = {kind: WeakValueDictionary() for kind in GraphFeature}
