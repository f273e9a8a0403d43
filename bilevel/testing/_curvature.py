"""The extreme eigenvalues of a Hessian, or singular values of a Jacobian: formed where small, by Lanczos where large."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from bilevel.testing.diagnosis import Curvature

__all__ = ["of_matrix", "of_products", "singular_below"]

_LANCZOS_STEPS = 60


def singular_below(size: int, eps: float) -> float:
    """Return the share of the largest value below which the smallest cannot be told from zero."""
    return 100 * size * eps


def of_matrix(matrix: torch.Tensor, *, symmetric: bool) -> Curvature:
    """Return the curvature of a finite matrix (n, n); ``symmetric`` says whether it should be."""
    norm = float(matrix.norm())
    asymmetry = float((matrix - matrix.mT).norm()) / norm if norm else 0.0
    if symmetric:
        values = torch.linalg.eigvalsh(0.5 * (matrix + matrix.mT))
        smallest, largest = float(values[0]), float(values[-1])
        spread = torch.linalg.svdvals(matrix)
    else:
        spread = torch.linalg.svdvals(matrix)
        smallest, largest = float(spread[-1]), float(spread[0])
    least, most = float(spread[-1]), float(spread[0])
    return Curvature(smallest, largest, most / least if least else math.inf, _scaled(matrix), asymmetry, True)


def _scaled(matrix: torch.Tensor) -> float | None:
    """Return the condition number of D^(−1/2) J D^(−1/2), D the diagonal's size; None if an entry of it is zero."""
    diagonal = matrix.diagonal().abs()
    if not bool((diagonal > 0).all()):
        return None
    root = diagonal.sqrt()
    values = torch.linalg.svdvals(matrix / root / root.unsqueeze(-1))
    return float(values[0] / values[-1]) if float(values[-1]) else math.inf


def of_products(
    product: Callable[[torch.Tensor], torch.Tensor],
    transposed: Callable[[torch.Tensor], torch.Tensor],
    like: torch.Tensor,
    *,
    symmetric: bool,
) -> Curvature:
    """Return the curvature of a matrix (n, n) known by its products, from a Lanczos process with a random start.

    Ritz values lie within the spectrum: the largest is at least, the smallest at most what is returned (Golub & Van
    Loan, "Matrix Computations", chapter 10). Every vector is orthogonalised against all before it, twice.
    """
    generator = torch.Generator().manual_seed(0)
    start, probe = (torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like) for _ in range(2))
    skew = float((probe @ product(start) - start @ product(probe)).abs())
    # For random u and v the mean of (uᵀ(J − Jᵀ)v)² is ‖J − Jᵀ‖², and that of ‖Jv‖² is ‖J‖².
    asymmetry = skew / max(float(product(start).norm()), 1e-300)
    apply = product if symmetric else lambda v: transposed(product(v))
    basis = [start / start.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    for _ in range(min(_LANCZOS_STEPS, len(like))):
        w = apply(basis[-1])
        diagonal.append(float(w @ basis[-1]))
        matrix = torch.stack(basis)
        for _ in range(2):
            w = w - matrix.mT @ (matrix @ w)
        size = float(w.norm())
        if not size > 1e-12 * max(abs(value) for value in diagonal):
            break
        beside.append(size)
        basis.append(w / size)
    between = torch.tensor(beside[: len(diagonal) - 1], dtype=torch.float64)
    small = torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + torch.diag(between, 1) + torch.diag(between, -1)
    ritz = torch.linalg.eigvalsh(small)
    smallest, largest = float(ritz[0]), float(ritz[-1])
    if not symmetric:
        smallest, largest = math.sqrt(max(smallest, 0.0)), math.sqrt(max(largest, 0.0))
    # Of an indefinite matrix the eigenvalue nearest to zero is inside the spectrum, where Lanczos does not look.
    condition = largest / smallest if smallest > 0 else math.inf
    return Curvature(smallest, largest, condition, None, asymmetry, False)
