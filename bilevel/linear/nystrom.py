"""Nyström's approximation of a symmetric matrix by some of its columns, as a solver and as a preconditioner."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel._torch.factorisations import eigh
from bilevel.linear._approximation import Approximation
from bilevel.operators import LinearOperator
from bilevel.setting_checks import check_number, check_steps

__all__ = ["Nystrom"]


@dataclass(frozen=True)
class Nystrom(Approximation):
    r"""(H_k + ρI)⁻¹ b in place of H⁻¹ b, with H_k = H[:, K] H[K, K]⁺ H[K, :] for k random columns. It costs k products in all.

    Woodbury's identity gives (H_k + ρI)⁻¹ b = b/ρ − ρ⁻² C (W + CᵀC/ρ)⁻¹ Cᵀ b with C = H[:, K] and W = H[K, K]. The result
    is accurate, up to the bias of ρ, if the eigenvalues of H fall fast. The report has the residual of H x = b. With no
    accuracy asked, the bias is not a failure: the status is ``BUDGET_SPENT``.

    ``CG(preconditioner=Nystrom(...))`` uses it as a preconditioner and has no bias.

    Parameters
    ----------
    rank
        k, the number of columns; at most n are used.
    rho
        ρ > 0, in the units of H's eigenvalues.
    seed
        The seed of the choice of columns.

    Raises
    ------
    ArgumentError
        If a setting is out of its range; on use, for a matrix that is not known to be symmetric.

    References
    ----------
    Hataya & Yamada, "Nyström method for accurate and scalable implicit differentiation", AISTATS 2023, equation 6; as a preconditioner, Frangella,
    Tropp & Udell, "Randomized Nyström preconditioning", SIAM J. Matrix Anal. Appl. 44, 2023.

    Examples
    --------
    >>> import torch, bilevel
    >>> from bilevel.operators import DenseOperator
    >>> H = DenseOperator(torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64)), symmetric=True)
    >>> silent = bilevel.Tolerance(delta_prime=None)
    >>> Nystrom(rank=2, rho=1.0)(H, torch.tensor([[5.0, 4.0]], dtype=torch.float64), silent).round(decimals=4)
    tensor([[1., 2.]], dtype=torch.float64)
    """

    rank: int = 10
    rho: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        check_steps("Nystrom", "rank", self.rank)
        check_number("Nystrom", "rho", self.rho)
        check_steps("Nystrom", "seed", self.seed, least=0)

    def products(self, size: int) -> int:
        return min(self.rank, size)

    def factor(self, base: LinearOperator) -> _LowRank:
        n, k = base.size, min(self.rank, base.size)
        generator = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(n, generator=generator)[:k].to(base.device)
        units = torch.zeros(k, base.batch, n, dtype=base.dtype, device=base.device)
        units[torch.arange(k, device=base.device), :, chosen] = 1.0
        columns = base.matmat(units).movedim(0, -1)  # C (batch, n, k)
        Q, R = torch.linalg.qr(torch.nan_to_num(columns))
        W = columns[:, chosen]
        values, vectors = eigh(0.5 * (W + W.mT))  # the core may be singular, so its pseudo-inverse is used
        least = n * torch.finfo(base.dtype).eps * values.abs().amax(dim=-1, keepdim=True)
        kept = values > least  # negative eigenvalues are left out
        inverse = torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0)
        half = R @ vectors * inverse.sqrt().unsqueeze(-2)
        sizes, turned = eigh(half @ half.mT)
        finite = torch.isfinite(columns).all(dim=-1).all(dim=-1)
        weights = torch.where(finite.unsqueeze(-1), sizes.clamp_min(0.0), torch.nan)
        return _LowRank(Q @ turned, weights / (weights + self.rho), self.rho)

    def restored(self, state: list[torch.Tensor | None]) -> _LowRank:
        basis, weights = state
        assert basis is not None and weights is not None
        return _LowRank(basis, weights, self.rho)


@dataclass(frozen=True, eq=False)
class _LowRank:
    """(I − U diag(w) Uᵀ) / ρ, which is (H_k + ρI)⁻¹ for H_k = U diag(s) Uᵀ and w = s / (s + ρ).

    Parameters
    ----------
    basis, weights
        U (batch, n, k) and w (batch, k).
    rho
        ρ.
    """

    basis: torch.Tensor
    weights: torch.Tensor
    rho: float

    def solve(self, r: torch.Tensor) -> torch.Tensor:
        columns = r.permute(1, 2, 0)  # (batch, n, repeats)
        along = self.weights.unsqueeze(-1) * (self.basis.mT @ columns)
        return ((columns - self.basis @ along) / self.rho).permute(2, 0, 1)

    def state(self) -> list[torch.Tensor | None]:
        return [self.basis, self.weights]
