"""Arithmetic on lists of tensors: one list holds a variable, its gradient, or any vector of its shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch

from bilevel._torch.ownership import owned

__all__ = ["Tensors", "add", "add_into", "clone", "dot", "norm", "scale", "subtract", "subtract_from", "zeros_like"]

Tensors: TypeAlias = list[torch.Tensor]


def add(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor], factor: float | torch.Tensor = 1.0) -> Tensors:
    """Return left + factor · right."""
    return [_sum(a, b, factor) for a, b in zip(left, right, strict=True)]


def add_into(left: Tensors, right: Sequence[torch.Tensor], factor: float | torch.Tensor = 1.0) -> Tensors:
    """Return left + factor · right, in the memory of ``left`` where nothing else refers to it: ``left`` is given up, and empty after."""
    free = [mine and a.dtype == b.dtype for mine, a, b in zip(owned(left), left, right, strict=True)]
    total = [_sum(a, b, factor, into=mine) for mine, a, b in zip(free, left, right, strict=True)]
    left.clear()  # whoever still holds the list holds no memory, and none of it keeps the sum from being written into
    return total


def _sum(a: torch.Tensor, b: torch.Tensor, factor: float | torch.Tensor, *, into: bool = False) -> torch.Tensor:
    """Return a + factor · b, in the memory of ``a`` if ``into``."""
    if isinstance(factor, torch.Tensor):
        return a.addcmul_(b, factor.to(b.dtype)) if into else a + factor * b
    return a.add_(b, alpha=factor) if into else torch.add(a, b, alpha=factor)


def subtract_from(left: Tensors, right: Sequence[torch.Tensor]) -> Tensors:
    """Return left − right, in the memory of ``left`` where nothing else refers to it: ``left`` is given up, and empty after."""
    return add_into(left, right, -1.0)


def subtract(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> Tensors:
    """Return left − right."""
    return add(left, right, -1.0)


def scale(tensors: Sequence[torch.Tensor], factor: float | torch.Tensor) -> Tensors:
    """Return factor · tensors."""
    return [factor * tensor for tensor in tensors]


def clone(tensors: Sequence[torch.Tensor]) -> Tensors:
    """Return copies without a graph."""
    return [tensor.detach().clone() for tensor in tensors]


def zeros_like(tensors: Sequence[torch.Tensor]) -> Tensors:
    """Return zeros of the same shapes."""
    return [torch.zeros_like(tensor) for tensor in tensors]


def dot(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return ⟨left, right⟩, of shape ()."""
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()


def norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the Euclidean norm of all tensors together, of shape ()."""
    norms = [torch.linalg.vector_norm(tensor) for tensor in tensors]
    return torch.linalg.vector_norm(torch.stack([one.to(norms[0].dtype) for one in norms]))
