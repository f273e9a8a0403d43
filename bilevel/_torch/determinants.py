"""Determinants whose second derivatives are right at every matrix.

In a nested transform torch differentiates ``det`` through a singular value decomposition, and a derivative of that divides by differences of
singular values. Where two are equal, as at the identity or at zero, its second derivative is NaN, and beside it digits are lost
(pytorch/pytorch#192521; forward over forward is wrong everywhere, #192540). ``slogdet`` is differentiated by an inverse, and right.

Small determinants are expanded by minors: of multiplications alone, and right at singular matrices too. Larger ones are
± exp(log |det|), whose computed derivative is NaN at a singular matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import combinations
from typing import Any

import torch

__all__ = ["DETERMINANTS"]

# The largest n that is expanded, in n 2ⁿ⁻¹ multiplications.
_MOST_EXPANDED = 6


@lru_cache
def _expansion(n: int, k: int) -> tuple[list[list[int]], list[list[int]]]:
    """Return, for each set of k of n columns, its columns (m, k) and the places (m, k) of the sets of k − 1 without each of these."""
    before = {columns: place for place, columns in enumerate(combinations(range(n), k - 1))}
    sets = list(combinations(range(n), k))
    return [list(s) for s in sets], [[before[s[:j] + s[j + 1 :]] for j in range(k)] for s in sets]


def _expanded(matrix: torch.Tensor) -> torch.Tensor:
    """Return det (..) of matrices (.., n, n): minors of the first k rows from those of the first k − 1, along row k."""
    n = matrix.shape[-1]
    minors = matrix[..., 0, :]  # (.., n)
    for k in range(2, n + 1):
        columns, without = (torch.tensor(places, device=matrix.device) for places in _expansion(n, k))
        signs = torch.tensor([(-1.0) ** (k - 1 + j) for j in range(k)], dtype=matrix.dtype, device=matrix.device)
        minors = (signs * matrix[..., k - 1, :][..., columns] * minors[..., without]).sum(-1)
    return minors[..., 0]


def _det(theirs: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def det(*args: Any, **options: Any) -> torch.Tensor:
        matrix = args[0] if len(args) == 1 and not options else None
        if not isinstance(matrix, torch.Tensor) or matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
            return theirs(*args, **options)
        if not matrix.shape[-1] or not (matrix.is_floating_point() or matrix.is_complex()):
            return theirs(*args, **options)
        if matrix.shape[-1] <= _MOST_EXPANDED:
            return _expanded(matrix)
        sign, size = torch.linalg.slogdet(matrix)
        return sign * size.exp()

    return det


DETERMINANTS: dict[Any, Callable[..., torch.Tensor]] = {
    theirs: _det(theirs) for theirs in (torch.det, torch.linalg.det, torch.Tensor.det)
}
