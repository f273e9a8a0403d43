"""Evidence against constants: quantities that were computed for other purposes may prove that a constant is wrong."""

from __future__ import annotations

from dataclasses import fields

import torch

from bilevel.certificates._errors import Errors
from bilevel.certificates._inner_point import InnerPoint
from bilevel.certificates._point import Point
from bilevel.certificates.constants import Constant, Constants, ObservedConstants

__all__ = ["contradicted", "observed", "refuted"]

# By how much evidence has to exceed a claim: constants are computed, too, and in other ways.
_MARGIN = 1e-4


def observed(point: Point, other: InnerPoint) -> Constants:
    """Return the observed value of each constant at two points, per problem (K,): no Lipschitz constant is smaller, no μ larger.

    Curvature is the least eigenvalue at ``point`` if H is factorised, else the least Rayleigh quotient met. Lipschitz quotients are
    those of ∇_φF, H q, Bᵀq and ∇_θF between the two points. Where H is factorised, what ∇G does beside H along the step counts too:
    ‖∇G(φ⁺) − ∇G(φ) − H (φ⁺ − φ)‖ ≤ ½ L_H ‖φ⁺ − φ‖². At a kink, as |φ| has one, that is all there is to see: H is the same on both sides.
    """
    step = (point.x - other.x).norm(dim=-1)
    size = point.q.norm(dim=-1)
    inner, there = point.inner, Point(other, point.q)
    zero = torch.zeros_like(point.q)
    slope, slope_there = inner.gradient(zero), other.gradient(zero)
    pulled, pulled_there = slope - point.gradient, slope_there - there.gradient
    rounding = point.rounding

    def quotient(change: torch.Tensor, noise: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        certain = (change.norm(dim=-1) - 2 * noise).clamp_min(0).nan_to_num(nan=0.0)  # which is no evidence
        return torch.where(length > 0, certain / length, torch.zeros_like(length))

    if inner.factorable:
        curvature = 2 * inner.eigenvalues[:, 0] - inner.least  # rounded up by what `least` is rounded down
    else:
        curvature = _rayleigh(point.q, point.hq, rounding.rho)
    # To form B for evidence alone is too much where it cannot be shared with H.
    norm_b = inner.cross_norm if inner.factorable else None
    norm_b = quotient(pulled, rounding.gradient, size) if norm_b is None else norm_b
    return ObservedConstants(
        strong_convexity=curvature,
        outer_smoothness=quotient(other.v - inner.v, rounding.rho, step),
        hessian_lipschitz=torch.maximum(
            quotient(there.hq - point.hq, rounding.rho, step * size),
            _bend(point, there) if inner.factorable else zero[:, 0],
        ),
        cross_lipschitz=quotient(pulled_there - pulled, rounding.gradient, step * size),
        outer_cross_lipschitz=quotient(slope_there - slope, rounding.gradient, step),
        cross_norm=norm_b,
    )


def contradicted(point: Point, other: Point, here: Errors, there: Errors) -> torch.Tensor:
    """Return where (K,) two points differ by more than the sum of their bounds, in φ, q, ĝ or the corrected value.

    Both bounds are about one solution. Such points therefore refute the assumptions of the bounds.
    """
    pairs = (
        ((point.x - other.x).norm(dim=-1), here.inner, there.inner),
        ((point.q - other.q).norm(dim=-1), here.adjoint, there.adjoint),
        ((point.gradient - other.gradient).norm(dim=-1), here.gradient, there.gradient),
        ((point.corrected_value - other.corrected_value).abs(), here.value, there.value),
    )
    wrong = torch.zeros(len(point.x), dtype=torch.bool, device=point.x.device)
    for distance, one, another in pairs:
        wrong = wrong | (distance * (1 - _MARGIN) > one.value + another.value)
    return wrong


def _bend(point: Point, other: Point) -> torch.Tensor:
    """Return 2 ‖∇G(φ⁺) − ∇G(φ) − H (φ⁺ − φ)‖/‖φ⁺ − φ‖² (K,), rounded down; H is at φ."""
    move = other.x - point.x
    length = move.norm(dim=-1)
    product = point.inner.linear.operator.matvec(move)
    beside = (other.inner.residual - point.inner.residual - product).norm(dim=-1)
    # φ⁺ itself is rounded, and H stretches that as well as the rounding of its products.
    stretch = point.inner.eigenvalues.abs().amax(-1) * (point.x.norm(dim=-1) + other.x.norm(dim=-1))
    noise = point.rounding.residual + other.rounding.residual + 64 * point.inner.eps * stretch
    return torch.where(
        length > 0, 2 * (beside - 2 * noise).clamp_min(0).nan_to_num(nan=0.0) / length**2, torch.zeros_like(length)
    )


def _rayleigh(u: torch.Tensor, product: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Return uᵀHu/uᵀu, rounded up; ∞ for u = 0."""
    square = torch.linalg.vecdot(u, u)
    value = (torch.linalg.vecdot(u, product) + u.norm(dim=-1) * noise) / square
    return torch.where(square > 0, value, torch.full_like(value, float("inf")))


def refuted(claimed: Constants, evidence: Constants) -> dict[str, str]:
    """Return half a sentence of evidence for each constant that is refuted, by its name."""
    found = {}
    for item in fields(Constants):
        claim, shown = getattr(claimed, item.name), getattr(evidence, item.name)
        if claim is None or not isinstance(shown, torch.Tensor):
            continue
        bound = torch.as_tensor(claim, dtype=shown.dtype, device=shown.device).expand_as(shown)
        if item.name == "strong_convexity":
            wrong, words = shown < bound * (1 - _MARGIN), "the Hessian at the returned point has curvature"
        else:
            wrong, words = shown > bound * (1 + _MARGIN), "the points met show at least"
        if bool(wrong.any()):
            which = int(wrong.nonzero()[0, 0])
            of = f" in problem {which}" if len(shown) > 1 else ""
            found[item.name] = f"{item.name}={_short(bound[which])}{of}, where {words} {_short(shown[which])}"
    return found


def _short(value: Constant) -> str:
    return f"{float(value):.3g}" if value is not None else "unknown"
