"""An upper bound of the error of conjugate gradients by Gauss–Radau quadrature, for a few operations a step."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

__all__ = ["RadauBound"]


@dataclass(frozen=True, eq=False)
class RadauBound:
    """γ^(μ) with ‖x − A⁻¹b‖²_A ≤ γ^(μ) ‖r‖² at the present step, per problem.

    The squared A-norm of the error is ‖r‖² times the integral of 1/λ against the measure that r defines on the spectrum. The
    quadrature rule with one node fixed at μ ≤ λ_min exceeds it, and obeys, with CG's γ_j = ‖r_j‖²/p_jᵀAp_j and δ_j = ‖r_j‖²/‖r_{j−1}‖²::

        γ₀^(μ) = 1/μ,    γ_{j+1}^(μ) = (γ_j^(μ) − γ_j) / (μ (γ_j^(μ) − γ_j) + δ_{j+1})

    As γ^(μ) ≤ 1/μ, the bound on ‖x − A⁻¹b‖ that follows, √(γ^(μ)/μ) ‖r‖, is never above ‖r‖/μ. γ_j^(μ) > γ_j holds
    while μ is below the least Ritz value. γ_j^(μ) < γ_j therefore proves that A has an eigenvalue below μ.

    It differs from the literature in its treatment of rounding. Digits cancel in γ_j^(μ) − γ_j once a Ritz value is
    near μ. The difference is therefore increased by the rounding error of γ_j, which is a quotient with pᵀAp. The bound
    also includes the distance between the recursive and the true residual.

    Parameters
    ----------
    mu
        μ.
    gamma
        γ^(μ) (batch,).
    refuted
        Bool (batch,): μ is too large.

    References
    ----------
    Golub & Meurant, "Matrices, Moments and Quadrature with Applications", 2010; the recurrence: Meurant & Tichý, "On computing
    quadrature-based bounds for the A-norm of the error in conjugate gradients", Numerical Algorithms 2013.
    """

    mu: float
    gamma: torch.Tensor
    refuted: torch.Tensor

    @staticmethod
    def begin(mu: float, like: torch.Tensor) -> RadauBound:
        """Return the bound before the first step, 1/μ, for right-hand sides ``like`` (batch, n)."""
        gamma = like.new_full((like.shape[0],), 1 / mu)
        return RadauBound(mu, gamma, torch.zeros_like(gamma, dtype=torch.bool))

    def after(
        self, step: torch.Tensor, quotient: torch.Tensor, largest: torch.Tensor,
        before: torch.Tensor, now: torch.Tensor, active: torch.Tensor,
    ) -> RadauBound:  # fmt: skip
        """Return the bound after a step γ_j = ``step``, from ‖r_j‖² = ``before`` to ‖r_{j+1}‖² = ``now``; all (batch,).

        ``quotient`` is pᵀAp/pᵀp and ``largest`` the largest so far. Problems that are not ``active`` do not change.
        """
        eps = torch.finfo(step.dtype).eps
        doubt = 16 * eps * (step * largest / quotient + self.gamma)
        difference = self.gamma - step
        wrong = active & (difference < -doubt - 1e-4 * step)
        difference = (difference + doubt).clamp_min(0)
        gamma = difference / (self.mu * difference + now / before)
        gamma = torch.where(torch.isfinite(gamma), gamma.clamp_max(1 / self.mu), 1 / self.mu)
        # Once μ is refuted, the bound is invalid.
        return replace(self, gamma=torch.where(active, gamma, self.gamma), refuted=self.refuted | wrong)

    def again(self, these: torch.Tensor) -> RadauBound:
        """Return the bound with ``these`` problems (batch,) at the first step of a new run."""
        return replace(self, gamma=torch.where(these, 1 / self.mu, self.gamma))

    def error(self, square: torch.Tensor, drift: torch.Tensor | None = None) -> torch.Tensor:
        """Return the bound of ‖x − A⁻¹b‖ (batch,) for ‖r‖² = ``square``, r being off the true residual by ``drift``."""
        bound = (self.gamma * square / self.mu).sqrt()
        bound = bound if drift is None else bound + drift / self.mu
        return torch.where(self.refuted, torch.full_like(bound, float("inf")), bound)
