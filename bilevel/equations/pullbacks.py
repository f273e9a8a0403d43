"""Pullbacks through ∂_θ R, to the arguments θ of a call and to the tensors from which the caller computed them.

If the solution is not unique, a derivative with respect to θ exists only if these vanish for some vectors
(:mod:`bilevel.linear._free_directions`). They may vanish for the tensors behind θ, and not for θ. For example, a target that is
normalised outside the layer has a fixed sum, which the layer does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from bilevel._torch.reverse import reverse_pass
from bilevel._torch.transforms import layers

__all__ = ["Pullback", "is_final", "pullbacks_of"]

Pullback: TypeAlias = Callable[[torch.Tensor], Sequence[tuple[torch.Tensor, torch.Tensor]]]
"""v (batch, n) ↦ pairs (θ, (∂_θ R)ᵀ v), one for each tensor that is looked at."""


def pullbacks_of(
    pullback: Callable[[torch.Tensor], list[torch.Tensor | None]],
    tensors: Sequence[torch.Tensor],
    needs_grad: Sequence[bool],
) -> tuple[Pullback, ...]:
    """Return v ↦ [(θ, (∂_θ R)ᵀ v), ...], and the same for the leaves of the graph that θ was computed in."""
    chosen = [t for t, want in zip(tensors, needs_grad, strict=True) if want]

    def to_arguments(v: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        slopes = (slope for slope, want in zip(pullback(v), needs_grad, strict=True) if want)
        return [(t, slope) for t, slope in zip(chosen, slopes, strict=True) if slope is not None]

    def to_leaves(v: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        # The caller's own graph, in the middle of a backward pass: what lies below has not run yet.
        pairs, ends = to_arguments(v), _leaves_of(chosen)
        slopes = reverse_pass([t for t, _ in pairs], ends, [slope for _, slope in pairs])
        return list(zip(ends, slopes, strict=True))

    return (to_arguments,) if all(is_final(t) for t in chosen) else (to_arguments, to_leaves)


def is_final(tensor: torch.Tensor) -> bool:
    """Return whether no level that differentiates ``tensor`` has computed it from another tensor.

    A complex argument counts as pairs of real numbers.
    """
    for layer in layers(tensor):
        node = layer.grad_fn
        if node is not None and node.name().startswith("ViewAsReal"):
            node = node.next_functions[0][0]
        if node is not None and not hasattr(node, "variable"):
            return False
    return True


def _leaves_of(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the leaves that require grad of the graph that ``tensors`` were computed in."""
    found = {id(t): t for t in tensors if t.is_leaf and t.requires_grad}
    nodes: list[Any] = [t.grad_fn for t in tensors if t.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        leaf = getattr(node, "variable", None)  # of the node that accumulates a leaf's gradient
        if leaf is not None:
            found[id(leaf)] = leaf
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
    return list(found.values())
