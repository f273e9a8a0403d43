"""Arithmetic on lists of tensors: one list holds a variable, its gradient, or any vector of its shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch

__all__ = ["Tensors", "add", "clone", "dot", "norm", "scale", "subtract", "zeros_like"]

Tensors: TypeAlias = list[torch.Tensor]


def add(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor], factor: float | torch.Tensor = 1.0) -> Tensors:
    """Return left + factor · right."""
    return [a + factor * b for a, b in zip(left, right, strict=True)]


def subtract(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> Tensors:
    """Return left − right."""
    return [a - b for a, b in zip(left, right, strict=True)]


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
