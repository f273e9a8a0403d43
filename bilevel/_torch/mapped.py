"""A tensor as each of the transforms that surround it sees it, and whether one of them is ``vmap``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch._C import _functorch

__all__ = ["is_mapped", "layers"]


def layers(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the tensor as each transform sees it, from the innermost outwards."""
    yield tensor
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
        yield tensor


def is_mapped(tensor: torch.Tensor) -> bool:
    """Return whether a ``vmap`` maps ``tensor``."""
    return any(map(_functorch.is_batchedtensor, layers(tensor)))
