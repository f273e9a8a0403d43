"""The bounds at a point, per problem: the smallest of all rigorous ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel.certificates import _bounds as bounds
from bilevel.certificates._bounds import Split
from bilevel.certificates._inner_point import InnerPoint
from bilevel.certificates._point import Point, Rounding
from bilevel.certificates.constants import Constant, Constants

__all__ = ["Errors", "Spectral", "errors_at", "number", "through"]


@dataclass(frozen=True, eq=False)
class Errors:
    """Bounds (K,) of ‖φ − φ*‖, ‖q − q*‖, ‖ĝ − g‖ and |F(φ*) − corrected value|; infinite where nothing is known."""

    inner: Split
    adjoint: Split
    gradient: Split
    value: Split

    def better(self, other: Errors) -> Errors:
        """Return the smaller of each."""
        return Errors(
            self.inner.better(other.inner), self.adjoint.better(other.adjoint),
            self.gradient.better(other.gradient), self.value.better(other.value),
        )  # fmt: skip

    def where(self, usable: torch.Tensor) -> Errors:
        """Return the bounds of the ``usable`` problems (K,); infinity for the others."""
        return Errors(*(part.where(usable) for part in (self.inner, self.adjoint, self.gradient, self.value)))


def number(constant: Constant, like: torch.Tensor) -> torch.Tensor:
    """Return a constant per problem (K,), like ``like``; infinite if it is unknown."""
    if constant is None:
        return torch.full_like(like, float("inf"))
    return torch.as_tensor(constant, dtype=like.dtype, device=like.device).detach().expand_as(like)


@dataclass(frozen=True, eq=False)
class Spectral:
    """Bounds (K,) of matrices at a point that are too large to be formed; None where none is known.

    ``curvature`` is at most the least eigenvalue of the inner Hessian H, and ``cross_norm`` at least the norm of B = ∂²G/∂φ∂θ.
    """

    curvature: torch.Tensor | None = None
    cross_norm: torch.Tensor | None = None

    def at_point(self, known: Constants, here: Point, there: Point) -> tuple[Constants, Spectral]:
        """Return the constants and these bounds at another point: H and B change by L_H and L_B times the distance.

        A given ‖B‖ holds at ``here``, and counts as one of the bounds.
        """
        step = (here.x - there.x).norm(dim=-1)
        l_h, l_b = number(known.hessian_lipschitz, step), number(known.cross_lipschitz, step)
        curvature, norm_b = self.curvature, self.cross_norm
        if norm_b is None and known.cross_norm is not None:
            norm_b = number(known.cross_norm, step)
        return known.without("cross_norm"), Spectral(
            None if curvature is None else bounds.curvature_there(curvature, l_h, step),
            None if norm_b is None else (norm_b + l_b * step).nan_to_num(nan=float("inf")),
        )


def errors_at(
    point: Point, known: Constants, spectral: Spectral | None = None, rounding: Rounding | None = None
) -> Errors:
    """Return the bounds at ``point`` that follow from its residuals and from ``known``, with ``rounding`` included; None: the measured one."""
    spectral = Spectral() if spectral is None else spectral
    rounding = point.rounding if rounding is None else rounding
    inner = point.inner
    r_in = inner.residual.norm(dim=-1) + rounding.residual
    r_lin = point.rho.norm(dim=-1) + rounding.rho
    size = point.q.norm(dim=-1)
    l_f, l_h = number(known.outer_smoothness, r_in), number(known.hessian_lipschitz, r_in)
    l_b, l_tf = number(known.cross_lipschitz, r_in), number(known.outer_cross_lipschitz, r_in)
    mu = torch.zeros_like(r_in) if known.strong_convexity is None else number(known.strong_convexity, r_in)
    # C1; of μ = 0, which stands for unknown, nothing follows.
    epsilon = bounds.least(bounds.inner_error(r_in, mu))
    curvature = inner.least if inner.factorable else spectral.curvature
    there = mu
    adjoint: Split | None = None
    if curvature is not None:
        positive = curvature.clamp_min(torch.finfo(r_in.dtype).tiny)
        eta, solved = r_in / positive, r_lin / positive
        if inner.factorable:
            eta = torch.minimum(eta, _solved(inner, inner.residual, rounding.residual, positive))
            solved = torch.minimum(solved, _solved(inner, point.rho, rounding.rho, positive))
        epsilon = bounds.least(epsilon, bounds.kantorovich(eta, curvature, l_h))
        epsilon = bounds.least(epsilon, bounds.inner_error_with_curvature(eta, curvature, l_h, epsilon))
        # Strong convexity at φ*, from what is known of it everywhere or from the curvature here.
        there = torch.maximum(mu, bounds.curvature_there(curvature, l_h, epsilon))
        adjoint = bounds.adjoint_error_here(solved, size, epsilon, curvature, l_f, l_h)
    plain = bounds.adjoint_error(r_lin, size, epsilon, there, l_f, l_h)
    adjoint = plain if adjoint is None else plain.better(adjoint)
    norm_b = bounds.least(
        number(spectral.cross_norm, r_in), number(known.cross_norm, r_in),
        number(inner.cross_norm if inner.factorable else None, r_in),
    )  # fmt: skip
    gradient = bounds.gradient_error(norm_b, size, epsilon, adjoint, l_b, l_tf)
    if curvature is not None and inner.sensitivity is not None and inner.sensitivity_norm is not None:
        exact = torch.einsum("kpn,kn->kp", inner.sensitivity, point.rho).norm(dim=-1)
        pulled = exact + inner.sensitivity_norm * (rounding.rho + 64 * inner.eps * point.rho.norm(dim=-1))
        tighter = bounds.gradient_error_here(
            inner.sensitivity_norm, pulled, size, epsilon, adjoint, l_f, l_h, l_b, l_tf
        )
        gradient = gradient.better(tighter.where(curvature > 0))
    value = bounds.value_error(r_lin, size, epsilon, l_f, l_h)
    return Errors(
        Split.of(epsilon, torch.zeros_like(epsilon)),
        adjoint,
        gradient.plus(rounding.gradient),
        value.plus(rounding.value),
    )


def _solved(point: InnerPoint, b: torch.Tensor, noise: torch.Tensor, curvature: torch.Tensor) -> torch.Tensor:
    """Return an upper bound of ‖H⁻¹b‖ (K,) for a b known up to ``noise``, the solve's own residual included."""
    x = point.solve(b)
    product = point.linear.operator.matvec(x)
    left = (b - product).norm(dim=-1) + 64 * point.eps * (b.norm(dim=-1) + product.norm(dim=-1))
    return x.norm(dim=-1) + (left + noise) / curvature


def through(point: Point, refined: Point, errors: Errors, turned: torch.Tensor | None = None) -> Errors:
    """Return bounds at ``point`` from a better point with bounded ``errors``: ‖a − a*‖ ≤ ‖a − a⁺‖ + ‖a⁺ − a*‖.

    The bounds are as tight as possible if those of the refined point are of second order (C6). The linear residual accounts
    for BᵀH⁻¹ρ of the distance between the two hypergradients, the inner solve for the rest. ``turned`` is H⁻¹ρ, if it is
    known; it only affects the parts.
    """
    zero = torch.zeros_like(errors.inner.value)
    step = (point.x - refined.x).norm(dim=-1)
    turned = point.inner.solve(point.rho) if turned is None else turned
    change = point.q - refined.q
    moved = point.gradient - refined.gradient
    value = (point.corrected_value - refined.corrected_value).abs()
    pulled = point.inner.pulled(turned)
    explained = (point.rho * (point.x - refined.x)).sum(-1).abs()
    slack = 64 * point.inner.eps

    def add(distance: torch.Tensor, remainder: Split, inner: torch.Tensor, linear: torch.Tensor) -> Split:
        total = distance * (1 + slack) + remainder.value
        return Split(total, inner + remainder.inner + remainder.linear, linear)

    of_rho = turned.norm(dim=-1)
    return Errors(
        add(step, errors.inner, step, zero),
        add(change.norm(dim=-1), errors.adjoint, (change + turned).norm(dim=-1), of_rho),
        add(moved.norm(dim=-1), errors.gradient, (moved - pulled).norm(dim=-1), pulled.norm(dim=-1)).plus(
            point.rounding.gradient
        ),
        add(value, errors.value, (value - explained).clamp_min(0), explained).plus(point.rounding.value),
    )
