"""The formulas: bounds of the errors at a point, from residuals and constants alone.

With e = φ − φ*, ε ≥ ‖e‖, and all norms Euclidean or spectral, everything follows from three expansions around φ,

    H e = ∇G(φ) + R,             ‖R‖ ≤ ½ L_H ‖e‖²
    q − q* = H⁻¹ [ −ρ + (v − v*) − (H − H*) q* ]
    ĝ − g  = (∇_θF − ∇_θF*) − Bᵀ(q − q*) − (B − B*)ᵀ q*

in which H and B may be taken at φ, where they are known, or, with the starred and the plain exchanged, at φ*, where
strong convexity holds. Each function works on a batch: tensors are (K,), and a constant that is not known is infinite.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = [
    "Split", "adjoint_error", "adjoint_error_here", "curvature_there", "gradient_error", "gradient_error_here", "inner_error",
    "inner_error_with_curvature", "kantorovich", "least", "value_error",
]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Split:
    """A bound (K,), with the parts due to the inner residual and to the linear residual."""

    value: torch.Tensor
    inner: torch.Tensor
    linear: torch.Tensor

    @staticmethod
    def of(inner: torch.Tensor, linear: torch.Tensor) -> Split:
        """Return the sum of two parts. NaN (0 · ∞) counts as unknown, and so as infinite."""
        inner, linear = _known(inner), _known(linear)
        return Split(inner + linear, inner, linear)

    def plus(self, more: torch.Tensor) -> Split:
        """Return the bound plus ``more`` (K,), which belongs to neither solve."""
        return Split(self.value + more, self.inner, self.linear)

    def better(self, other: Split) -> Split:
        """Return the smaller bound of each problem, with its parts. NaN is not a bound."""
        mine = ~(other.value < self.value)
        return Split(
            torch.where(mine, self.value, other.value),
            torch.where(mine, self.inner, other.inner),
            torch.where(mine, self.linear, other.linear),
        )

    def where(self, usable: torch.Tensor) -> Split:
        """Return the bound where ``usable`` (K,), infinity elsewhere."""
        never = torch.full_like(self.value, float("inf"))
        return Split(*(torch.where(usable, part, never) for part in (self.value, self.inner, self.linear)))


def _known(bound: torch.Tensor) -> torch.Tensor:
    return torch.nan_to_num(bound, nan=float("inf"), posinf=float("inf"))


def least(*bounds: torch.Tensor) -> torch.Tensor:
    """Return the smallest of several bounds of one error, NaN ignored."""
    return torch.stack([_known(bound) for bound in bounds]).amin(0)


def inner_error(r_in: torch.Tensor, mu: torch.Tensor) -> torch.Tensor:
    """Return ε = ‖∇G‖/μ ≥ ‖φ − φ*‖ (C1): a strongly convex G has ‖∇G(φ) − ∇G(φ*)‖ ≥ μ ‖φ − φ*‖."""
    return r_in / mu


def kantorovich(eta: torch.Tensor, curvature: torch.Tensor, l_h: torch.Tensor) -> torch.Tensor:
    """Return η (1 − √(1 − 2h))/h ≥ ‖φ − φ*‖ with h = L_H η/λ_min(H) ≤ ½, else ∞ (C7): no global convexity is needed.

    Parameters
    ----------
    eta
        An upper bound of η = ‖H⁻¹∇G‖, Newton's step.
    curvature
        A lower bound of λ_min(H(φ)).
    l_h
        Lipschitz constant of H in the ball of radius 2η.

    References
    ----------
    Kantorovich 1948; the sharp form: Gragg & Tapia, "Optimal error bounds for the Newton–Kantorovich theorem", 1974.
    """
    h = l_h * eta / curvature
    sharp = 2 * eta / (1 + (1 - 2 * h).clamp_min(0).sqrt())
    return torch.where((curvature > 0) & (h <= 0.5), sharp, torch.full_like(eta, float("inf")))


def inner_error_with_curvature(
    eta: torch.Tensor, curvature: torch.Tensor, l_h: torch.Tensor, epsilon: torch.Tensor
) -> torch.Tensor:
    """Return η + ½ L_H ε²/λ_min(H) ≥ ‖φ − φ*‖, from a bound ε that is known already: e = H⁻¹(∇G + R)."""
    bound = eta + 0.5 * l_h * epsilon**2 / curvature
    return torch.where(curvature > 0, bound, torch.full_like(eta, float("inf")))


def curvature_there(curvature: torch.Tensor, l_h: torch.Tensor, epsilon: torch.Tensor) -> torch.Tensor:
    """Return λ_min(H(φ)) − L_H ε ≤ λ_min(H(φ*)), or 0 if that is negative."""
    return torch.nan_to_num(curvature - l_h * epsilon, nan=0.0, neginf=0.0).clamp_min(0)


def adjoint_error(
    r_lin: torch.Tensor, size: torch.Tensor, epsilon: torch.Tensor,
    mu: torch.Tensor, l_f: torch.Tensor, l_h: torch.Tensor,
) -> Split:  # fmt: skip
    """Return [r_lin + (L_F + L_H‖q‖) ε]/μ ≥ ‖q − q*‖ (C2), from H*(q − q*) = (H* − H) q − ρ + v − v*.

    ``mu`` bounds the eigenvalues of H at φ*, ``size`` is ‖q‖.
    """
    return Split.of((l_f + l_h * size) * epsilon / mu, r_lin / mu)


def adjoint_error_here(
    solved: torch.Tensor, size: torch.Tensor, epsilon: torch.Tensor,
    curvature: torch.Tensor, l_f: torch.Tensor, l_h: torch.Tensor,
) -> Split:  # fmt: skip
    """Return C2 with H at φ: ‖q − q*‖ ≤ (‖H⁻¹ρ‖ + (L_F + L_H‖q‖) ε/λ)/(1 − L_H ε/λ), with λ = λ_min(H(φ)).

    ``solved`` is an upper bound of ‖H⁻¹ρ‖. It comes from ‖(H − H*) q*‖ ≤ L_H ε (‖q‖ + ‖q − q*‖).
    """
    shrink = 1 - l_h * epsilon / curvature
    usable = (curvature > 0) & (shrink > 0)
    never = torch.full_like(solved, float("inf"))
    return Split.of(
        torch.where(usable, (l_f + l_h * size) * epsilon / (curvature * shrink), never),
        torch.where(usable, solved / shrink, never),
    )


def gradient_error(
    norm_b: torch.Tensor, size: torch.Tensor, epsilon: torch.Tensor, adjoint: Split,
    l_b: torch.Tensor, l_tf: torch.Tensor,
) -> Split:  # fmt: skip
    """Return ‖B‖ E_q + L_B ε (‖q‖ + E_q) + L_θF ε ≥ ‖ĝ − g‖ (C3), B being taken at φ.

    For iMAML's B = −λI and L_B = 0 this is (λ/μ)[r′ + (L_F + L_H‖ĝ‖/λ) ε] with r′ = ‖∇F − (I + ∇²L̂/λ) ĝ‖: ĝ = λq has
    (I + ∇²L̂/λ) ĝ = H q, so that r′ = r_lin.
    """
    inner = norm_b * adjoint.inner + l_b * epsilon * (size + adjoint.value) + l_tf * epsilon
    return Split.of(inner, norm_b * adjoint.linear)


def gradient_error_here(
    sensitivity: torch.Tensor, pulled: torch.Tensor, size: torch.Tensor, epsilon: torch.Tensor, adjoint: Split,
    l_f: torch.Tensor, l_h: torch.Tensor, l_b: torch.Tensor, l_tf: torch.Tensor,
) -> Split:  # fmt: skip
    """Return C3 with BᵀH⁻¹ in place of ‖B‖/μ, tighter by an order of magnitude where H is ill-conditioned.

    ‖ĝ − g‖ ≤ ‖BᵀH⁻¹ρ‖ + ‖BᵀH⁻¹‖ [L_F ε + L_H ε (‖q‖ + E_q)] + L_B ε (‖q‖ + E_q) + L_θF ε.
    ``sensitivity`` is ‖BᵀH⁻¹‖ at φ, and ``pulled`` an upper bound of ‖BᵀH⁻¹ρ‖.
    """
    star = size + adjoint.value  # ≥ ‖q*‖
    inner = sensitivity * (l_f + l_h * star) * epsilon + l_b * epsilon * star + l_tf * epsilon
    return Split.of(inner, pulled)


def value_error(
    r_lin: torch.Tensor, size: torch.Tensor, epsilon: torch.Tensor, l_f: torch.Tensor, l_h: torch.Tensor
) -> Split:
    """Return r_lin ε + ½ (L_F + L_H‖q‖) ε² ≥ |F(φ*) − (F − qᵀ∇G)| (C4).

    With F* = F − vᵀe + R′, |R′| ≤ ½ L_F ε², and qᵀ∇G = qᵀ(H e − R) = (v − ρ)ᵀe − qᵀR, what is left is −ρᵀe + R′ − qᵀR.
    """
    return Split.of(0.5 * (l_f + l_h * size) * epsilon**2, r_lin * epsilon)
