"""A ``vmap`` over a batch of no problems.

torch fails there in operations of two numbers, of which one is batched. Functions of the user's are therefore not called with such tensors. They are
called with ones in the shapes of one problem, as only structures and shapes are asked for, and the answer is made of zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bilevel._torch.transforms import innermost, transforms_active, without_gradient

__all__ = ["EmptyBatch", "apply_rule"]


class EmptyBatch:
    """The empty batch that surrounds a call with these ``tensors``."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = tuple(tensors)

    @staticmethod
    def around(tensors: Sequence[torch.Tensor]) -> EmptyBatch | None:
        """Return the empty batch if a ``vmap`` over no problems surrounds this call, else None."""
        return EmptyBatch(tensors) if _maps_nothing(tensors) else None

    def ones(self) -> list[torch.Tensor]:
        """Return the tensors with ones, of the shape of one problem, in place of those of the batch."""
        return [
            torch.ones(tensor.shape, dtype=tensor.dtype, device=tensor.device) if _maps_nothing((tensor,)) else tensor
            for tensor in self._tensors
        ]

    def without_problems(self, made: Any) -> Any:
        """Return ``made``, a pytree of one problem, for the batch: in the same shapes and dtypes, with derivatives of zero."""
        zero = self._zero()

        def emptied(leaf: torch.Tensor) -> torch.Tensor:
            flat = torch.zeros(max(1, leaf.numel()), device=leaf.device) + zero
            return flat[: leaf.numel()].reshape(leaf.shape).to(leaf.dtype)

        return pytree.tree_map_only(torch.Tensor, emptied, made)

    def with_zero_derivatives(self, made: torch.Tensor) -> torch.Tensor:
        """Return ``made`` (n,) as a function of the tensors whose derivatives are zero."""
        return made + self._zero().to(made.dtype)

    def _zero(self) -> torch.Tensor:
        """Return 0 (1,) as a function of the tensors."""
        # No operation of two numbers, nor a reshape to -1.
        zero = torch.zeros(1)
        for tensor in self._tensors:
            if tensor.is_floating_point() and tensor.layout is torch.strided:
                zero = zero.to(tensor.device, tensor.dtype) + 0.0 * tensor.reshape(tensor.numel()).sum(0, keepdim=True)
        return zero


def apply_rule(rule: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """Return ``rule(*tensors)`` (n,) of a rule of differentiation; for an empty batch, with derivatives of zero."""
    empty = EmptyBatch.around(tensors)
    if empty is None:
        return rule(*tensors)
    return empty.with_zero_derivatives(rule(*map(without_gradient, tensors)))


def _maps_nothing(tensors: Iterable[torch.Tensor]) -> bool:
    """Return whether one of ``tensors`` has entries, and none in memory."""
    return transforms_active() and any(tensor.numel() and not innermost(tensor).numel() for tensor in tensors)
