"""Scales of a KKT matrix [[Q, Eᵀ], [E, 0]]: those of the unknowns, of the rows of E, and one of Q against E.

Ruiz's scaling of the whole matrix makes its largest entries one and may leave Q tiny beside E, as if Q were zero. Nothing
in the program fixes the unit of the objective. So Q and E are scaled apart (Ruiz, "A scaling algorithm to equilibrate both rows and columns
norms in matrices", 2001), and a factor of Q makes its largest entry one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

__all__ = ["balance", "sparse_balance"]

_ROUNDS = 3


def balance(Q: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return the scales (B, n + k) of symmetric matrices of Q (B, n, n) and ``rows`` (B, k, n)."""
    Q, rows = Q.abs(), rows.abs()
    columns, lengths = torch.ones_like(Q[..., 0]), torch.ones_like(rows[..., 0])
    if not columns.shape[-1]:
        return torch.cat([columns, lengths], -1)
    for _ in range(_ROUNDS):
        curvature = (Q * columns.unsqueeze(-1) * columns.unsqueeze(-2)).amax(-1)
        height = (curvature / _or_one(curvature.amax(-1, keepdim=True))).sqrt()
        if rows.shape[-2]:
            scaled = rows * columns.unsqueeze(-2)
            lengths = 1 / _or_one(scaled.amax(-1))
            height = torch.maximum(height, (scaled * lengths.unsqueeze(-1)).amax(-2))
        columns = columns / _or_one(height)
    if rows.shape[-2]:
        lengths = 1 / _or_one((rows * columns.unsqueeze(-2)).amax(-1))
    largest = _or_one((Q * columns.unsqueeze(-1) * columns.unsqueeze(-2)).flatten(-2).amax(-1, keepdim=True))
    return torch.cat([columns / largest.sqrt(), lengths * largest.sqrt()], -1)


def sparse_balance(Q: Any, rows: Any) -> np.ndarray:
    """Return the scales (n + k,) of scipy's sparse matrices Q (n, n) and ``rows`` (k, n)."""
    Q, rows = abs(Q).tocsr(), abs(rows).tocsr()
    columns, lengths = np.ones(rows.shape[1]), np.ones(rows.shape[0])
    if not len(columns):
        return lengths
    for _ in range(_ROUNDS):
        curvature = _largest(Q.multiply(columns), 1) * columns
        height = np.sqrt(curvature / _or_one_of(curvature.max()))
        if len(lengths):
            scaled = rows.multiply(columns).tocsr()
            lengths = 1 / _or_one_of(_largest(scaled, 1))
            height = np.maximum(height, _largest(scaled.multiply(lengths[:, None]), 0))
        columns = columns / _or_one_of(height)
    if len(lengths):
        lengths = 1 / _or_one_of(_largest(rows.multiply(columns), 1))
    root = np.sqrt(_or_one_of((_largest(Q.multiply(columns), 1) * columns).max()))
    return np.concatenate([columns / root, lengths * root])


def _largest(matrix: Any, axis: int) -> np.ndarray:
    return np.asarray(matrix.tocsr().max(axis=axis).toarray()).ravel()


def _or_one(size: torch.Tensor) -> torch.Tensor:
    return torch.where((size > 0) & torch.isfinite(size), size, 1.0)


def _or_one_of(size: Any) -> Any:
    return np.where(size > 0, size, 1.0)
