"""Proofs that combine few constraints. An interior method finds the multipliers of many, although a contradiction may need two."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["fewest"]

_MOST_NUMBERS = 10**6
_LEFT = 1e-9  # the share of the terms that a proof may leave of its equations


def fewest(columns: Any, values: np.ndarray) -> np.ndarray | None:
    """Return weights w ≥ 0 (k,), most of them zero, with ``columns`` (n, k) w = 0 and ``values`` (k,)ᵀ w = −1; None if none are found.

    A basic solution has at most n + 1 weights that are not zero.
    """
    from scipy.optimize import nnls  # a message may take its time

    if columns.shape[0] * columns.shape[1] > _MOST_NUMBERS:
        return None
    dense = columns.toarray() if hasattr(columns, "toarray") else np.asarray(columns)
    size = np.maximum(np.abs(dense).max(axis=0, initial=0.0), np.abs(values))
    size = np.where(size > 0, size, 1.0)
    worth = values / size
    largest = np.abs(worth).max(initial=0.0)
    if not largest > 0 or not np.isfinite(dense).all():
        return None
    matrix = np.vstack([dense / size, worth / largest])
    right = np.zeros(len(matrix))
    right[-1] = -1.0
    try:
        found, _ = nnls(matrix, right)
    except RuntimeError:  # too many iterations
        return None
    terms = np.abs(matrix) @ found
    if not (np.abs(matrix @ found - right) <= _LEFT * np.maximum(terms.max(), 1.0)).all():
        return None
    weights = np.asarray(found / size)
    return weights / -float(values @ weights)
