"""Batched eigenvalue and singular value decompositions that do not raise: a problem without one gets NaN."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # imported there, and not listed

__all__ = ["LinAlgError", "eigh", "eigvalsh", "svd", "svdvals"]

_Tensors = tuple[torch.Tensor, ...]


def eigh(matrix: torch.Tensor) -> _Tensors:
    """Return eigenvalues (batch, n) and eigenvectors (batch, n, n) of symmetric matrices."""
    return _each(lambda m: tuple(torch.linalg.eigh(m)), matrix)


def eigvalsh(matrix: torch.Tensor) -> torch.Tensor:
    """Return the eigenvalues (batch, n) of symmetric matrices, in ascending order."""
    return _each(lambda m: (torch.linalg.eigvalsh(m),), matrix)[0]


def svd(matrix: torch.Tensor) -> _Tensors:
    """Return U (batch, n, n), the singular values (batch, n) and Vᵀ (batch, n, n)."""
    return _each(lambda m: tuple(torch.linalg.svd(m)), matrix)


def svdvals(matrix: torch.Tensor) -> torch.Tensor:
    """Return the singular values (batch, n), in descending order."""
    return _each(lambda m: (torch.linalg.svdvals(m),), matrix)[0]


def _each(function: Callable[[torch.Tensor], _Tensors], matrix: torch.Tensor) -> _Tensors:
    """Return ``function(matrix)``; where that raises, problem by problem, with NaN for those that LAPACK gives up on."""
    try:
        return function(matrix)
    except LinAlgError:
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        rows: list[_Tensors] = []
        for one in matrix:
            try:
                rows.append(function(one))
            except LinAlgError:
                rows.append(tuple(torch.full_like(part, float("nan")) for part in function(eye)))
        return tuple(torch.stack(parts) for parts in zip(*rows, strict=True))
