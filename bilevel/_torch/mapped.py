"""Whether ``vmap`` maps a tensor."""

from __future__ import annotations

import torch
from torch._C import _functorch

__all__ = ["is_mapped"]


def is_mapped(tensor: torch.Tensor) -> bool:
    """Return whether a ``vmap`` maps ``tensor``."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return False
