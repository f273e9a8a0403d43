"""Kinds of tensors that need a word of their own: nested ones, and those that ``vmap`` maps."""

from __future__ import annotations

import torch
from torch._C import _functorch

from bilevel.errors import DtypeError

__all__ = ["is_mapped", "refuse_nested"]


def is_mapped(tensor: torch.Tensor) -> bool:
    """Return whether a ``vmap`` maps ``tensor``."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return False


def refuse_nested(tensor: torch.Tensor, where: str, name: str) -> None:
    """Raise :class:`DtypeError` for a nested tensor, called ``name`` in the message."""
    if tensor.is_nested:
        raise DtypeError(
            f"{where}: expected a dense tensor at {name}, got a nested one; pass a list of tensors, list(x.unbind()), or pad it with "
            "torch.nested.to_padded_tensor(x, 0.0)"
        )
