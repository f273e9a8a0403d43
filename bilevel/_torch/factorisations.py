"""Factorisations of batches of matrices. Where one fails, its result is NaN, and the others are computed.

torch raises for a whole batch where LAPACK fails on one matrix, and fails on every matrix that is not finite. Here the
failed matrix alone gets NaN. A comparison with NaN is false, so no bound and no step follows from it. All of this package calls eigh, eigvalsh, svd,
svdvals, pinv, solve and the spectral norm from here, and not from torch.linalg. QR, and the factorisations whose names end in _ex, raise nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

__all__ = ["LinAlgError", "eigh", "eigvalsh", "inverse", "norms", "pinv", "solve", "svd", "svdvals"]

LinAlgError: type[Exception] = torch.linalg.LinAlgError  # type: ignore[attr-defined]  # not in the stubs


def eigh(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the eigenvalues (K, n), ascending, and eigenvectors (K, n, n) of symmetric matrices (K, n, n)."""
    values, vectors = _each(lambda a: tuple(torch.linalg.eigh(a)), matrix)
    return values, vectors


def eigvalsh(matrix: torch.Tensor) -> torch.Tensor:
    """Return the eigenvalues (K, n), ascending, of symmetric matrices (K, n, n)."""
    return _each(lambda a: (torch.linalg.eigvalsh(a),), matrix)[0]


def inverse(matrix: torch.Tensor) -> torch.Tensor:
    """Return A⁻¹ (.., n, n) of matrices (.., n, n); NaN where A is singular.

    For use in differentiated functions: torch 2.13 differentiates ``solve`` wrongly in ``vmap(jacfwd)`` and ``vmap(hessian)``,
    without a message (pytorch/pytorch#192540).
    """
    made, failed = torch.linalg.inv_ex(matrix)
    return torch.where((failed != 0)[..., None, None], torch.full_like(made, float("nan")), made)


def norms(matrix: torch.Tensor) -> torch.Tensor:
    """Return the spectral norms (K,) of matrices (K, a, b), zero where they are empty."""
    if 0 in matrix.shape[-2:]:
        return matrix.new_zeros(matrix.shape[:-2])
    return _each(lambda a: (torch.linalg.matrix_norm(a, 2),), matrix)[0]


def pinv(matrix: torch.Tensor, *, rtol: float | torch.Tensor, hermitian: bool = False) -> torch.Tensor:
    """Return the pseudo-inverses (K, b, a) of matrices (K, a, b), singular values below ``rtol`` (K,) times the largest left out."""
    least = torch.as_tensor(rtol, dtype=matrix.dtype, device=matrix.device).expand(matrix.shape[:-2])
    return _each(lambda a, r: (torch.linalg.pinv(a, rtol=r, hermitian=hermitian),), matrix, least)[0]


def solve(matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return A⁻¹ B (K, n, m) for matrices (K, n, n) and right-hand sides (K, n, m); NaN where A is singular."""
    made, failed = torch.linalg.solve_ex(matrix, right)
    return torch.where((failed != 0)[..., None, None], torch.full_like(made, float("nan")), made)


def svd(matrix: torch.Tensor, *, full_matrices: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return U (K, n, n), the singular values (K, k), descending, and Vᵀ (K, m, m) of matrices (K, n, m), k = min(n, m).

    Without ``full_matrices``, U is (K, n, k) and Vᵀ is (K, k, m).
    """
    left, values, right = _each(lambda a: tuple(torch.linalg.svd(a, full_matrices=full_matrices)), matrix)
    return left, values, right


def svdvals(matrix: torch.Tensor) -> torch.Tensor:
    """Return the singular values (K, n), descending, of matrices (K, n, n)."""
    return _each(lambda a: (torch.linalg.svdvals(a),), matrix)[0]


def _each(
    function: Callable[..., Sequence[torch.Tensor]], matrix: torch.Tensor, *more: torch.Tensor
) -> list[torch.Tensor]:
    """Return ``function`` of the matrices and of ``more`` (..), each result NaN where a matrix (.., a, b) is not finite or LAPACK fails on it."""
    finite = torch.isfinite(matrix).all(-1).all(-1)  # (..,)
    unit = torch.eye(*matrix.shape[-2:], dtype=matrix.dtype, device=matrix.device)
    safe = torch.where(finite[..., None, None], matrix, unit)
    failed = ~finite
    try:
        made = list(function(safe, *more))
    except LinAlgError:
        made, failed = _one_by_one(function, safe, failed, unit, more)
    if not bool(failed.any()):
        return made
    return [torch.where(_like(failed, part), torch.full_like(part, float("nan")), part) for part in made]


def _one_by_one(
    function: Callable[..., Sequence[torch.Tensor]],
    matrix: torch.Tensor,
    failed: torch.Tensor,
    unit: torch.Tensor,
    more: Sequence[torch.Tensor],
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return the results for each matrix by itself, and where they could not be had."""
    shape, found = matrix.shape[:-2], []
    failed = failed.reshape(-1).clone()
    rows = (matrix.reshape(-1, *matrix.shape[-2:]), *(other.reshape(-1) for other in more))
    for number, (one, *others) in enumerate(zip(*rows, strict=True)):
        try:
            found.append(function(one, *others))
        except LinAlgError:
            found.append(function(unit, *others))
            failed[number] = True
    made = [torch.stack(parts) for parts in zip(*found, strict=True)]
    return [part.reshape(*shape, *part.shape[1:]) for part in made], failed.reshape(shape)


def _like(flags: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    return flags.reshape(*flags.shape, *[1] * (part.ndim - flags.ndim))
