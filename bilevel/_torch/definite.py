"""Proven lower bounds of the eigenvalues of symmetric matrices."""

from __future__ import annotations

import torch

from bilevel._torch.factorisations import eigvalsh

__all__ = ["least_eigenvalue"]


def least_eigenvalue(matrix: torch.Tensor, error: torch.Tensor | float = 0.0) -> torch.Tensor:
    """Return proven lower bounds (K,) of the eigenvalues of symmetric A (K, n, n); −inf where the proof fails.

    The candidate m is the least computed eigenvalue, less some roundings. If the Cholesky factorisation of A − (m + c) I runs to its end in floating
    point, A − m I is positive semidefinite, for a c that bounds its rounding: c = γ tr(A − m I) with γ = (n + 1) eps / (1 − (n + 1) eps).

    Parameters
    ----------
    matrix
        (K, n, n), exactly symmetric.
    error
        (K,): a bound of the spectral norm of the errors of the entries. 0 for exact ones.

    References
    ----------
    S. M. Rump, "Verification of positive definiteness", BIT Numerical Mathematics 46, 2006, Theorem 2.3.
    """
    n, eps = matrix.shape[-1], torch.finfo(matrix.dtype).eps
    if not n:
        return matrix.new_full(matrix.shape[:-2], torch.inf)
    values = eigvalsh(matrix)
    least, largest = values[..., 0], values.abs().amax(-1)
    gamma = (n + 1) * eps / (1 - (n + 1) * eps)
    # The trace of A − m I is at most n (|m| + ‖A‖). The shifted diagonal is rounded, too.
    slack = 2 * gamma * n * (least.abs() + largest) + 4 * eps * largest + torch.finfo(matrix.dtype).tiny
    bound = least - 2 * slack
    shifted = matrix.clone()
    shifted.diagonal(dim1=-2, dim2=-1).sub_((bound + slack).unsqueeze(-1))
    failed = torch.linalg.cholesky_ex(shifted)[1] != 0
    bound = torch.where(failed | ~torch.isfinite(bound), -torch.inf, bound)
    return (bound - error) - 2 * eps * (bound.abs() + error)
