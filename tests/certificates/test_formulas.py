"""Each formula on one-dimensional problems that attain it: a bound any smaller would be wrong."""

from __future__ import annotations

import pytest
import torch

from bilevel.certificates import _bounds as bounds
from bilevel.certificates._bounds import Split

F64 = torch.float64
ZERO, FREE = torch.zeros(1, dtype=F64), torch.full((1,), float("inf"), dtype=F64)


def one(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=F64)


def test_inner_error_of_a_parabola():
    # G = ½ μ φ², φ = 0.3.
    assert float(bounds.inner_error(one(2.0 * 0.3), one(2.0))) == pytest.approx(0.3)


@pytest.mark.parametrize("distance", [0.01, 0.2, 0.6])
def test_kantorovich_on_the_cubic_that_it_majorises(distance):
    # ∇G(φ) = φ − ½ L φ² has the root 0, and at φ = −e the step η = (e + ½Le²)/(1 + Le); at φ = e, η = (e − ½Le²)/(1 − Le).
    lipschitz = 1.0
    eta = (distance - 0.5 * lipschitz * distance**2) / (1 - lipschitz * distance)
    curvature = 1 - lipschitz * distance
    found = float(bounds.kantorovich(one(eta), one(curvature), one(lipschitz)))
    if lipschitz * eta / curvature <= 0.5:
        assert distance <= found
    else:
        assert found == float("inf")
    # From the other side h is below ½ however far away.
    eta, curvature = (distance + 0.5 * lipschitz * distance**2) / (1 + lipschitz * distance), 1 + lipschitz * distance
    assert distance <= float(bounds.kantorovich(one(eta), one(curvature), one(lipschitz))) <= 2 * eta


def test_kantorovich_is_attained_at_the_nearer_root_of_a_quadratic_equation():
    # ∇G(t) = ½ L t² − λ t + λ η at t = 0: curvature λ in size, step η, and the nearer root at η (1 − √(1 − 2h))/h.
    lipschitz, curvature, eta = 0.8, 2.0, 0.7
    h = lipschitz * eta / curvature
    root = (curvature - (curvature**2 - 2 * lipschitz * curvature * eta) ** 0.5) / lipschitz
    assert float(bounds.kantorovich(one(eta), one(curvature), one(lipschitz))) == pytest.approx(root)
    assert eta < root <= 2 * eta and h <= 0.5
    # From any bound ε that is known, the expansion gives the root back as its fixed point.
    better = bounds.inner_error_with_curvature(one(eta), one(curvature), one(lipschitz), one(root))
    assert float(better) == pytest.approx(root)
    assert float(bounds.kantorovich(one(1.3), one(curvature), one(lipschitz))) == float("inf")
    assert float(bounds.kantorovich(one(eta), one(-1.0), one(lipschitz))) == float("inf")


def test_adjoint_error_of_quadratics():
    # H = μ, F = ½ L_F φ², φ = e, q = (L_F e + ρ)/μ, q* = 0, all signs alike.
    mu, l_f, e, rho = 0.5, 3.0, 0.2, 0.4
    error = (l_f * e + rho) / mu
    found = bounds.adjoint_error(one(rho), one(error), one(e), one(mu), one(l_f), ZERO)
    assert float(found.value) == pytest.approx(error)
    assert float(found.inner) == pytest.approx(l_f * e / mu) and float(found.linear) == pytest.approx(rho / mu)
    here = bounds.adjoint_error_here(one(rho / mu), one(error), one(e), one(mu), one(l_f), ZERO)
    assert float(here.value) == pytest.approx(error)


def test_adjoint_error_with_a_hessian_that_varies():
    # H(φ) = μ + L_H φ (φ* = 0, φ = e), F linear: v = c, q* = c/μ, q = c/H(φ), ρ = 0.
    mu, l_h, e, c = 1.0, 2.0, 0.3, 5.0
    q, star = c / (mu + l_h * e), c / mu
    found = bounds.adjoint_error(ZERO, one(q), one(e), one(mu), ZERO, one(l_h))
    assert float(found.value) == pytest.approx(star - q)
    # Seen from the flatter side: H(φ) = μ − L_H e, with the curvature at φ, and |q| > |q*|.
    near = 0.1
    q = c / (mu - l_h * near)
    here = bounds.adjoint_error_here(ZERO, one(q), one(near), one(mu - l_h * near), ZERO, one(l_h))
    assert q - star <= float(here.value) <= 2 * (q - star)
    assert float(bounds.curvature_there(one(mu + l_h * e), one(l_h), one(e))) == pytest.approx(mu)
    assert float(bounds.curvature_there(one(0.1), one(l_h), one(e))) == 0.0


def test_gradient_error_is_the_sum_of_its_parts():
    # ĝ − g = B E + L_B ε (q + E) + L_θF ε with one sign: B = b + L_B φ, ∇_θF = L_θF φ, q* = q + E.
    b, l_b, l_tf, e, q = 2.0, 0.5, 0.7, 0.1, 3.0
    adjoint = Split.of(one(0.2), one(0.05))
    error = b * 0.25 + l_b * e * (q + 0.25) + l_tf * e
    found = bounds.gradient_error(one(b), one(q), one(e), adjoint, one(l_b), one(l_tf))
    assert float(found.value) == pytest.approx(error)
    assert float(found.linear) == pytest.approx(b * 0.05)
    # With BᵀH⁻¹ = b/h known and v − v* = L_F e, H − H* = L_H e: E = [ρ + L_F e + L_H e (q + E)]/h.
    h, l_f, l_h, rho = 4.0, 1.0, 0.5, 0.3
    total = (rho + l_f * e + l_h * e * q) / (h - l_h * e)
    star = Split.of(one(total), ZERO)
    here = bounds.gradient_error_here(
        one(b / h), one(b / h * rho), one(q), one(e), star, one(l_f), one(l_h), one(l_b), one(l_tf)
    )
    assert float(here.value) == pytest.approx(b * total + l_b * e * (q + total) + l_tf * e)


def test_value_error_of_parabolas():
    # F = ½ L_F φ², G = ½ μ φ² + (L_H/6) φ³, φ = e, q = −s: F − q∇G against F(0) = 0.
    l_f, mu, l_h, e = 3.0, 2.0, 0.6, 0.25
    for q in (0.4, -0.7):
        curvature, slope = mu + l_h * e, mu * e + 0.5 * l_h * e**2
        rho = l_f * e - curvature * q
        corrected = 0.5 * l_f * e**2 - q * slope
        found = float(bounds.value_error(one(abs(rho)), one(abs(q)), one(e), one(l_f), one(l_h)).value)
        assert abs(corrected) <= found * (1 + 1e-12)
    # With q = 0 the adjoint's residual is all there is: F* = F − ρe + ½L_F e², |error| = ½ L_F e².
    exact = bounds.value_error(ZERO, ZERO, one(e), one(l_f), one(l_h))
    assert float(exact.value) == pytest.approx(0.5 * l_f * e**2)


def test_what_is_not_known_is_infinite_and_never_not_a_number():
    unknown = bounds.adjoint_error(one(0.1), ZERO, ZERO, one(1.0), FREE, FREE)
    assert float(unknown.value) == float("inf") and float(unknown.linear) == pytest.approx(0.1)
    assert float(bounds.least(FREE, one(float("nan")), one(2.0))) == 2.0
    mixed = unknown.better(Split.of(one(1.0), one(2.0)))
    assert [float(part) for part in (mixed.value, mixed.inner, mixed.linear)] == [3.0, 1.0, 2.0]
