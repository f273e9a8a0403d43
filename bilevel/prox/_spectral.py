"""Functions of a matrix B by its eigenvalues or singular values, with derivatives that are finite where these are equal.

torch's derivatives of ``eigh`` and ``svd`` divide by differences such as λ_i − λ_j. Here only a constant is decomposed: B₀, which is B without
its graph. The function solves an equation in powers of D = B − B₀, from which its derivatives come: D is zero, but carries the graph. The
solution divides only by sums |λ_i| + |λ_j|.
"""

from __future__ import annotations

import torch

from bilevel._torch import factorisations
from bilevel.prox._base import detached
from bilevel.prox._batched import batched

__all__ = ["ORDER", "abs_change", "eigh", "rank_mask", "sqrt_trace_change", "svd", "symmetric"]

# Derivatives up to this order are exact: each step of the iterations below adds one.
ORDER = 5


def eigh(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the eigenvalues (..., n), ascending, and eigenvectors (..., n, n), as constants, of symmetric matrices."""
    values, vectors = batched(factorisations.eigh, matrix)
    return values, vectors


def svd(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return U (..., n, k), σ (..., k), descending, and V (..., m, k), as constants, of matrices (..., n, m), k = min(n, m)."""
    left, values, right = batched(lambda a: factorisations.svd(a, full_matrices=False), matrix)
    return left, values, right.mT


def symmetric(matrix: torch.Tensor) -> torch.Tensor:
    """Return (A + Aᵀ)/2."""
    return 0.5 * (matrix + matrix.mT)


def rank_mask(values: torch.Tensor, size: int) -> torch.Tensor:
    """Return which singular values or eigenvalues (..., k) are above the rounding of the largest, of matrices up to ``size``."""
    largest = values.abs().amax(-1, keepdim=True)
    return values > 8 * size * torch.finfo(values.dtype).eps * largest


def _inverse_of_sums(sizes: torch.Tensor) -> torch.Tensor:
    """Return 1/(s_i + s_j) (..., n, n), 0 where both are 0."""
    sums = sizes.unsqueeze(-1) + sizes.unsqueeze(-2)
    return torch.where(sums > 0, 1 / torch.where(sums > 0, sums, 1.0), 0.0)


def abs_change(matrix: torch.Tensor, values: torch.Tensor, vectors: torch.Tensor, shift: float = 0.0) -> torch.Tensor:
    """Return |B| − |B₀|, which is zero with the derivatives of |B|, for B = ``matrix`` (..., n, n) symmetric, and the decomposition of B₀.

    T = |B| − |B₀| solves S T + T S + T² = B₀ D + D B₀ + D² with S = |B₀|. In the basis of B₀ the left side is (|λ_i| + |λ_j|) T_ij + (T²)_ij.
    With a ``shift`` c it is the change of √(B² + c I), which solves the same equation with that S.
    """
    change = vectors.mT @ (matrix - detached(matrix)) @ vectors
    inverse = _inverse_of_sums((values.square() + shift).sqrt() if shift else values.abs())
    right = (values.unsqueeze(-1) + values.unsqueeze(-2)) * change + change @ change
    found = inverse * right
    for _ in range(ORDER - 1):
        found = inverse * (right - found @ found)
    return vectors @ found @ vectors.mT


def sqrt_trace_change(matrix: torch.Tensor, roots: torch.Tensor) -> torch.Tensor:
    """Return tr √A − tr √A₀ (...), which is zero with the derivatives of tr √A, for A = ``matrix`` and A₀ = diag(``roots``²).

    T = √A − √A₀ solves (s_i + s_j) T_ij + (T²)_ij = D_ij.
    """
    change = matrix - detached(matrix)
    inverse = _inverse_of_sums(roots)
    found = inverse * change
    for _ in range(ORDER - 1):
        found = inverse * (change - found @ found)
    return found.diagonal(dim1=-2, dim2=-1).sum(-1)
