"""Whether a tensor's memory is the caller's alone, so that a sum may be written into it.

A fresh tensor of some megabytes costs several times what writing into an old one does: the system hands out its pages one by one. A gradient
that autograd returns is mostly a fresh tensor, or a transpose of one. But it can be a cotangent handed on, a view, or a tensor that a custom
backward has saved. Counts tell: of the Python object, of the tensor, of its storage, and of the tensor of which it is a view.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["owned"]


def owned(tensors: Sequence[torch.Tensor]) -> list[bool]:
    """Return for each tensor whether the given list alone refers to it and to its memory, and it can be written in place.

    Parameters
    ----------
    tensors
        A list or tuple that holds the only reference to each tensor that is to be owned.
    """
    least = _least()
    return [
        counts in least
        and not tensor.requires_grad
        and (tensor.is_contiguous() or (tensor.ndim == 2 and tensor.mT.is_contiguous()))
        for tensor, counts in zip(tensors, _counts(tensors) if least else [()] * len(tensors), strict=True)
    ]


def _counts(tensors: Sequence[Any]) -> list[tuple[int, ...]]:
    return [(sys.getrefcount(t), *_of_memory(t)) for t in tensors]


def _of_memory(tensor: Any) -> tuple[int, ...]:
    storage: int = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    base = tensor._base
    if base is None:
        return tensor._use_count(), storage
    return tensor._use_count(), storage, sys.getrefcount(base), base._use_count()


@functools.cache
def _least() -> tuple[tuple[int, ...], ...]:
    """Return the counts of a fresh tensor and of a fresh tensor's transpose in a list; nothing where this torch does not count."""
    try:
        with torch.no_grad():
            return tuple(_counts([torch.zeros(1, 1).neg(), torch.zeros(1, 1).neg().t()]))
    except (AttributeError, TypeError, RuntimeError):
        return ()
