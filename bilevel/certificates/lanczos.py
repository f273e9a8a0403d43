"""Extreme eigenvalues of matrices too large to form, from products alone, with a stated probability of being wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bilevel._torch.factorisations import eigvalsh
from bilevel.certificates._inner_point import InnerPoint
from bilevel.operators import LinearOperator
from bilevel.setting_checks import check_number, check_steps

__all__ = ["Spectrum", "lanczos_spectrum"]

_BASIS_NUMBERS = 2**25


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Bounds of the eigenvalues of each matrix of a batch. They hold except with a stated probability.

    Parameters
    ----------
    least, largest
        (batch,): the lower and the upper bound of the eigenvalues.
    steps
        The number of products.
    failure_probability
        The probability, over the random start, that one of the two bounds of one matrix is wrong.

    Examples
    --------
    >>> import torch
    >>> from bilevel.certificates import lanczos_spectrum
    >>> from bilevel.operators import DenseOperator
    >>> spectrum = lanczos_spectrum(DenseOperator(torch.diag(torch.tensor([1.0, 4.0])), symmetric=True))
    >>> round(spectrum.largest.item(), 1), spectrum.steps, spectrum.failure_probability
    (4.0, 2, 1e-06)
    """

    least: torch.Tensor
    largest: torch.Tensor
    steps: int
    failure_probability: float


def lanczos_spectrum(
    operator: LinearOperator, *, failure_probability: float = 1e-6, max_steps: int = 300, seed: int = 0
) -> Spectrum:
    r"""Bound the spectrum of symmetric matrices by Lanczos runs with random starts.

    After k steps from a start drawn uniformly from the sphere, the extreme Ritz values θ₁ ≥ … ≥ θ_k of a matrix of order n obey

    .. math:: P\left( λ_1 - θ_1 > ε (λ_1 - λ_n) \right) \le 1.648 \sqrt n\, e^{-\sqrt ε (2k - 1)}

    and likewise at the other end, the matrix being turned over. With ε so that both hold but for ``failure_probability``,
    λ_n ≥ θ_k − ε (θ₁ − θ_k)/(1 − 2ε). A useful lower bound of a small λ_n takes about √(λ₁/λ_n) ln(1.6√n/probability)/2 steps; the run ends
    when the bound is two thirds of the Ritz value, or at ``max_steps``.

    Parameters
    ----------
    operator
        Symmetric matrices (batch, n, n).
    failure_probability
        In (0, 1), for each matrix.
    max_steps
        The most steps, one product each. As many vectors are kept, in float64, for the basis has to stay orthogonal.
    seed
        Of the start.

    Returns
    -------
    Spectrum
        With ``least`` possibly negative, where nothing better is known.

    Raises
    ------
    ArgumentError
        If the probability or the steps are out of range.

    References
    ----------
    Kuczyński & Woźniakowski, "Estimating the largest eigenvalue by the power and Lanczos algorithms with a random start", SIAM J. Matrix
    Anal. Appl. 1992, Theorem 4.2; Lanczos being invariant under shifts, its relative error is taken to the width of the spectrum.

    Examples
    --------
    >>> import torch
    >>> from bilevel.operators import DenseOperator
    >>> spectrum = lanczos_spectrum(DenseOperator(torch.diag(torch.tensor([1.0, 2.0, 5.0])), symmetric=True))
    >>> round(spectrum.least.item(), 1), round(spectrum.largest.item(), 1)
    (1.0, 5.0)
    """
    check_number("lanczos_spectrum", "failure_probability", failure_probability, below=1.0)
    check_steps("lanczos_spectrum", "max_steps", max_steps)
    return run(operator.matvec, operator.batch, operator.size, operator.dtype, operator.device,
               failure_probability, max_steps, seed)  # fmt: skip


def affordable(batch: int, size: int, most: int) -> int:
    """Return the number of steps, up to ``most``, whose basis fits into 256 MiB."""
    return min(most, _BASIS_NUMBERS // max(1, batch * size))


def cross_norm(point: InnerPoint, failure_probability: float, max_steps: int = 24) -> torch.Tensor | None:
    """Return an upper bound (K,) of ‖B‖ at ``point``, from a run on B Bᵀ; None if B's products cannot be transformed."""

    def tight(least: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(largest, dtype=torch.bool)  # every step tightens it; the limit ends the run

    x = point.x
    try:
        found = run(point.cross_square, len(x), x.shape[1], x.dtype, x.device, failure_probability, max_steps, 1, tight)
    except RuntimeError:
        return None
    return found.largest.clamp_min(0).sqrt()


def run(
    product: Callable[[torch.Tensor], torch.Tensor],
    batch: int,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
    failure_probability: float,
    max_steps: int,
    seed: int,
    ends: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> Spectrum:
    """Run on v ↦ A v (batch, n); ``ends`` of the two bounds (batch,) says what is enough, by default a positive lower bound."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(batch, size, generator=generator, dtype=torch.float64).to(device)
    v = v / v.norm(dim=-1, keepdim=True)
    basis = [v]
    diagonal: list[torch.Tensor] = []
    off: list[torch.Tensor] = []
    before = torch.zeros_like(v)
    beta = v.new_zeros(batch)
    least = v.new_full((batch,), -math.inf)
    largest = -least
    steps = 0
    for k in range(1, min(max_steps, size) + 1):
        # The rounding of a product in a lower dtype is that of a matrix nearby, whose distance is allowed for below.
        w = product(basis[-1].to(dtype)).double() - beta.unsqueeze(-1) * before
        steps = k
        alpha = torch.linalg.vecdot(w, basis[-1])
        if diagonal:  # a run that has ended goes on with zeros, which must not pass for an eigenvalue
            alpha = torch.where((basis[-1] != 0).any(-1), alpha, diagonal[0])
        diagonal.append(alpha)
        w = w - alpha.unsqueeze(-1) * basis[-1]
        stacked = torch.stack(basis, 1)  # (batch, k, n)
        for _ in range(2):
            w = w - torch.einsum("bkn,bk->bn", stacked, torch.einsum("bkn,bn->bk", stacked, w))
        beta = w.norm(dim=-1)
        if k in (size, max_steps) or k % 10 == 0 or not bool((beta > 0).any()):
            least, largest = _bounds(diagonal, off, beta, size, failure_probability, torch.finfo(dtype).eps)
            enough = (least > 0) & (least >= _enough(diagonal, off)) if ends is None else ends(least, largest)
            if bool(enough.all()):
                break
        off.append(beta)
        before = basis[-1]
        basis.append(torch.where((beta > 0).unsqueeze(-1), w / beta.unsqueeze(-1), torch.zeros_like(w)))
    return Spectrum(least, largest, steps, failure_probability)


def _ritz(diagonal: list[torch.Tensor], off: list[torch.Tensor]) -> torch.Tensor:
    matrix = torch.diag_embed(torch.stack(diagonal, -1))
    if off:
        side = torch.diag_embed(torch.stack(off[: len(diagonal) - 1], -1), offset=1)
        matrix = matrix + side + side.mT
    return eigvalsh(matrix)


def _enough(diagonal: list[torch.Tensor], off: list[torch.Tensor]) -> torch.Tensor:
    return 2 / 3 * _ritz(diagonal, off)[..., 0]


def _bounds(
    diagonal: list[torch.Tensor], off: list[torch.Tensor], beta: torch.Tensor, size: int, probability: float, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    k, ritz = len(diagonal), _ritz(diagonal, off)
    low, high = ritz[..., 0], ritz[..., -1]
    rounding = (16 + math.sqrt(size)) * max(eps, 1e-16) * torch.maximum(low.abs(), high.abs())
    if k == size:  # the whole space is spanned: Ritz values are eigenvalues
        return low - rounding, high + rounding
    share = (math.log(2 * 1.648 * math.sqrt(size) / probability) / (2 * k - 1)) ** 2
    if share >= 0.5:
        return torch.full_like(low, -math.inf), torch.full_like(high, math.inf)
    slack = share * (high - low) / (1 - 2 * share) + rounding
    return low - slack, high + slack
