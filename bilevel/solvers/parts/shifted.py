"""Cholesky factors of M + δI for each matrix of a batch, with the smallest tried δ ≥ 0 that makes it positive definite."""

from __future__ import annotations

import torch

__all__ = ["grown", "shifted_cholesky", "try_cholesky"]

# δ: the first one tried, its growth factor, and the share of the last δ with which the next step begins.
_FIRST, _FACTOR, _MEMORY = 1e-4, 8.0, 1 / 3
_MOST = 40
# A pivot below this share of its diagonal entry counts as rounding.
_LEAST_PIVOT = 1e-13


def try_cholesky(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return Cholesky factors (K, n, n), and where the matrix is not positive definite to working precision (K,)."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    small = (pivots**2 <= _LEAST_PIVOT * matrix.diagonal(dim1=-2, dim2=-1).abs()).any(-1)
    return factor, (info != 0) | small | ~torch.isfinite(factor).all(-1).all(-1)


def grown(shift: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Return the δ to try after ``shift`` (K,). ``last`` is the δ of the step before."""
    first = torch.where(last == 0, torch.full_like(last, _FIRST), (_MEMORY * last).clamp_min(1e-12))
    return torch.where(shift == 0, first, _FACTOR * shift)


def shifted_cholesky(matrix: torch.Tensor, last: torch.Tensor, unit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors (K, n, n) and δ (K,) in ``unit`` (K,). ``last`` is the δ of the step before. If no δ works, the factor is the identity."""
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    matrix = matrix.nan_to_num(0.0, 0.0, 0.0)
    shift = torch.zeros_like(last)
    factor, failed = try_cholesky(matrix)
    for _ in range(_MOST):
        if not bool(failed.any()):
            break
        shift = torch.where(failed, grown(shift, last), shift)
        again, still = try_cholesky(matrix + (shift * unit)[:, None, None] * eye)
        factor = torch.where(failed[:, None, None], again, factor)
        failed = failed & still
    return torch.where(failed[:, None, None], eye, factor), shift
