"""Where constants come from, and that wrong ones are found out."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import bilevel
from bilevel.certificates import (
    contraction_distance,
    identify_support,
    lanczos_spectrum,
    logistic_constants,
    newton_on_support,
    proximal_distance,
    softmax_constants,
    squares_constants,
)
from bilevel.operators import DenseOperator
from bilevel.reports import Basis

from .families import F64, Logistic, Ridge, draw, excess, truth

BUDGET = bilevel.Tolerance(delta=None, delta_prime=None)


def mean_loss(kind: str, phi: torch.Tensor, X: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """A linear model's weighted mean loss for targets that do not matter to its curvature."""
    if kind == "squares":
        losses = 0.5 * (X @ phi) ** 2
    elif kind == "logistic":
        losses = F.softplus(X @ phi)
    else:
        losses = (X @ phi.reshape(X.shape[1], 3)).logsumexp(1)
    return (w * losses).sum() / w.sum()


MADE = {"squares": squares_constants, "logistic": logistic_constants, "softmax": softmax_constants}


@given(st.sampled_from(sorted(MADE)), st.integers(0, 10_000), st.floats(-2, 1), st.booleans())
def test_constants_of_losses_hold(kind, seed, log_scale, intercept):
    generator = torch.Generator().manual_seed(seed)
    X = 10**log_scale * torch.randn(9, 3, generator=generator, dtype=F64)
    w = torch.rand(9, generator=generator, dtype=F64)
    found = MADE[kind](X, w, intercept=intercept)
    full = torch.cat([X, torch.ones(9, 1, dtype=F64)], 1) if intercept else X
    size = full.shape[1] * (3 if kind == "softmax" else 1)
    curve = torch.func.hessian(lambda phi: mean_loss(kind, phi, full, w))
    for scale in (1e-2, 1.0, 10.0):
        a = scale * torch.randn(size, generator=generator, dtype=F64)
        b = a + scale * 0.1 * torch.randn(size, generator=generator, dtype=F64)
        assert float(torch.linalg.matrix_norm(curve(a), 2)) <= float(found.smoothness)
        change = float(torch.linalg.matrix_norm(curve(a) - curve(b), 2))
        assert change <= float(found.hessian_lipschitz * (a - b).norm()) + 1e-12


def test_constants_of_losses_are_attained():
    X = torch.ones(1, 1, dtype=F64)
    for kind, at, moved in (
        (
            "logistic",
            torch.tensor([0.0], dtype=F64),
            torch.tensor([1.3169579], dtype=F64),
        ),  # p = ½, where σ″ is largest
        ("softmax", torch.zeros(3, dtype=F64), None),
    ):
        found = MADE[kind](X)
        curve = torch.func.hessian(lambda phi, kind=kind: mean_loss(kind, phi, X, torch.ones(1, dtype=F64)))
        if moved is not None:
            assert float(torch.linalg.matrix_norm(curve(at), 2)) == pytest.approx(float(found.smoothness))
            near = moved + 1e-6
            slope = float((curve(near) - curve(moved)).abs().max()) / 1e-6
            assert slope == pytest.approx(float(found.hessian_lipschitz), rel=1e-4)
    # Softmax: two classes carry the mass, a third has none; p(1 − p)(1 − 2p) is largest at p = (1 − 1/√3)/2.
    p = (1 - 3**-0.5) / 2
    at = torch.tensor([p, 1 - p, 1e-300], dtype=F64).log()
    u = torch.tensor([2**-0.5, -(2**-0.5), 0.0], dtype=F64)
    curve = torch.func.hessian(lambda phi: mean_loss("softmax", phi, X, torch.ones(1, dtype=F64)))
    slope = float(torch.linalg.matrix_norm(curve(at + 1e-6 * u) - curve(at), 2)) / 1e-6
    assert slope == pytest.approx(float(softmax_constants(X).hessian_lipschitz), rel=1e-4)


def test_constants_of_losses_of_many_problems():
    X, w = torch.randn(4, 6, 2, dtype=F64), torch.rand(4, 6, dtype=F64)
    together = logistic_constants(X, w)
    alone = [logistic_constants(x, weights) for x, weights in zip(X, w, strict=True)]
    torch.testing.assert_close(together.smoothness, torch.stack([c.smoothness for c in alone]))
    torch.testing.assert_close(together.hessian_lipschitz, torch.stack([c.hessian_lipschitz for c in alone]))
    folds = squares_constants(X[0], w)
    torch.testing.assert_close(folds.smoothness[2], squares_constants(X[0], w[2]).smoothness)
    with pytest.raises(bilevel.ShapeError, match="weights"):
        squares_constants(X[0], w[:, :3])


def test_constants_that_cannot_be_are_refused():
    for name, value in (("strong_convexity", 0.0), ("hessian_lipschitz", -1.0), ("cross_norm", float("nan"))):
        with pytest.raises(bilevel.ArgumentError, match=name):
            bilevel.Constants(**{name: value})
    assert bilevel.Constants(hessian_lipschitz=torch.tensor([0.0, 1.0])).with_mu(0.5).strong_convexity == 0.5


CLAIMS = {
    "strong_convexity": lambda true: true * 1.5,
    "outer_smoothness": lambda true: true * 0.01,
    "hessian_lipschitz": lambda true: true * 1e-4,
    "cross_lipschitz": lambda true: true * 1e-3,
}


def claim(name: str) -> type[Logistic]:
    class Claimed(Logistic):
        def constants(self, outer, data):
            true = super().constants(outer, data)
            if name == "strong_convexity":
                X = data[0]
                curvature = torch.linalg.eigvalsh(0.25 * X.mT @ X / len(X) + torch.diag(outer.exp()))[0]
                return bilevel.Constants(**{**vars(true), name: CLAIMS[name](curvature)})
            return bilevel.Constants(**{**vars(true), name: CLAIMS[name](getattr(true, name))})

    return Claimed


@pytest.mark.parametrize("name", sorted(CLAIMS))
def test_wrong_constants_are_found_out_and_said(name):
    theta, data = draw(4)
    start = torch.zeros(5, dtype=F64)
    settings = {"solver": bilevel.GradientDescent(0.5, 20), "linear_solver": bilevel.CG(), "tolerance": BUDGET}
    result = claim(name)(**settings).hypergradient(theta, data, init=start)
    with pytest.raises(bilevel.ConstantsError, match=f"`Claimed`: .*{name}=.*correct"):
        _ = result.bound
    assert name in str(result)
    # Warned, a constant that is refuted is dropped: what a quadratic F and an affine B determine is found, L_H is not.
    warned_problem = claim(name)(**settings, on_failure="warn")
    warned = warned_problem.hypergradient(theta, data, init=start)
    with pytest.warns(bilevel.FailureWarning, match=name):
        bound = warned.bound
    assert (bound.basis is Basis.ESTIMATED) == (name == "hessian_lipschitz")
    if bound.certified:
        assert all(over <= 1e-10 for over in excess(warned, truth(warned_problem, theta, data, start)))
    nan = claim(name)(**settings, on_failure="nan").hypergradient(theta, data, init=start)
    assert str(nan.bound) == str(nan.value_bound) == str(nan.inner_bound) == "not known"


def test_right_constants_are_never_refuted():
    for seed in range(10):
        theta, data = draw(seed, log_condition=4.0)
        for problem_class in (Logistic, Ridge):
            problem = problem_class(
                solver=bilevel.LBFGS(max_steps=seed + 1), linear_solver=bilevel.CG(), tolerance=BUDGET
            )
            assert problem.hypergradient(theta, data, init=torch.zeros(5, dtype=F64)).certified


def test_a_wrong_mu_is_found_out_without_a_matrix(monkeypatch):
    monkeypatch.setattr("bilevel.certificates._inner_point.MOST_NUMBERS", 0)
    theta, data = draw(4)
    problem = Logistic(solver=bilevel.GradientDescent(0.5, 20), linear_solver=bilevel.CG(), tolerance=BUDGET)
    true = Logistic.constants(problem, theta, data)
    problem.constants = lambda outer, data: bilevel.Constants(**{**vars(true), "strong_convexity": 1.0})
    result = problem.hypergradient(theta, data, init=torch.zeros(5, dtype=F64))
    with pytest.raises(bilevel.ConstantsError, match="strong_convexity=1,"):
        _ = result.inner_bound


@pytest.mark.parametrize("linear_solver", [bilevel.CG(), bilevel.Exact()])
def test_a_wrong_mu_in_the_tolerance_fails_the_linear_solve_by_policy(linear_solver):
    theta, data = draw(4)
    start = torch.zeros(5, dtype=F64)

    def run(on_failure):
        tolerance = bilevel.Tolerance(delta=1e-3, delta_prime=1e-3, strong_convexity=5.0)
        return Ridge(
            solver=bilevel.Newton(), linear_solver=linear_solver, tolerance=tolerance, on_failure=on_failure
        ).hypergradient(theta, data, init=start)

    with pytest.raises(bilevel.SolveError, match="refutes the strong convexity"):
        run("raise")
    with pytest.warns(bilevel.SolveWarning, match="refutes"):
        run("warn")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = run("ignore").report.backward
    assert report.status is bilevel.Status.REFUTED and not bool(report.certified)


@given(st.integers(0, 10_000), st.floats(0, 4), st.integers(2, 30), st.booleans())
def test_lanczos_bounds_hold(seed, log_condition, n, double):
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(3, n, n, generator=generator, dtype=F64))[0]
    values = 10 ** (-log_condition * torch.rand(3, n, generator=generator, dtype=F64))
    matrix = ((q * values[:, None]) @ q.mT).to(F64 if double else torch.float32)
    matrix = 0.5 * (matrix + matrix.mT)
    exact = torch.linalg.eigvalsh(matrix.double())
    for steps in (5, 25):
        spectrum = lanczos_spectrum(DenseOperator(matrix, symmetric=True), max_steps=steps)
        assert spectrum.steps <= steps and spectrum.failure_probability == 1e-6
        assert bool((spectrum.least <= exact[:, 0]).all()) and bool((exact[:, -1] <= spectrum.largest).all())


def test_lanczos_is_tight_long_before_the_space_is_spanned():
    values = torch.linspace(0.1, 1.0, 400, dtype=F64)
    operator = DenseOperator(torch.diag(values), symmetric=True)
    spectrum = lanczos_spectrum(operator)
    assert spectrum.steps <= 120 and 0.06 <= float(spectrum.least) <= 0.1 and 1.0 <= float(spectrum.largest) <= 1.05
    identity = lanczos_spectrum(DenseOperator(2 * torch.eye(50, dtype=F64), symmetric=True), max_steps=50)
    assert float(identity.least) == pytest.approx(2.0) and float(identity.largest) == pytest.approx(2.0)
    with pytest.raises(bilevel.ArgumentError, match="failure_probability"):
        lanczos_spectrum(operator, failure_probability=0.0)


def test_a_contraction_bounds_its_fixed_point():
    x = torch.linspace(-1, 2, 7, dtype=F64)
    residual = (x - (0.5 * torch.cos(x) + 0.3)).abs()
    star = torch.tensor(0.3, dtype=F64)
    for _ in range(200):
        star = 0.5 * torch.cos(star) + 0.3
    assert bool(((x - star).abs() <= contraction_distance(residual, 0.5)).all())
    with pytest.raises(bilevel.ArgumentError, match="factor"):
        contraction_distance(residual, 1.0)


@given(st.integers(0, 10_000), st.floats(-4, -0.5), st.integers(1, 60))
def test_lasso_distances_hold_and_supports_are_not_proven_wrongly(seed, log_strength, steps):
    generator = torch.Generator().manual_seed(seed)
    n = 5
    X, y = torch.randn(12, n, generator=generator, dtype=F64), torch.randn(12, generator=generator, dtype=F64)
    gram, target = X.mT @ X / 12, X.mT @ y / 12
    eigenvalues = torch.linalg.eigvalsh(gram)
    mu, step = eigenvalues[0] * (1 - 1e-9), 1 / (eigenvalues[-1] * (1 + 1e-9))
    lam = target.abs().max() * 10**log_strength

    def mapped(x):
        moved = x - step * (gram @ x - target)
        return moved.sign() * (moved.abs() - step * lam).clamp_min(0)

    star = torch.zeros(n, dtype=F64)  # coordinate descent, to the end
    for _ in range(3000):
        for j in range(n):
            z = target[j] - gram[j] @ star + gram[j, j] * star[j]
            star[j] = z.sign() * (z.abs() - lam).clamp_min(0) / gram[j, j]
        if float((mapped(star) - star).norm()) < 1e-15:
            break
    x = torch.zeros(n, dtype=F64)
    for _ in range(steps):
        x = mapped(x)
    distance = proximal_distance((x - mapped(x)).norm(), step, mu)
    assert float((x - star).norm()) <= float(distance) + 1e-12
    support = identify_support(x, gram @ x - target, lam, distance, gram.norm(dim=1))
    assert not bool((support.inside & (star == 0)).any()) and not bool((support.outside & (star != 0)).any())
    if bool(support.decided):
        polished = newton_on_support(
            torch.where(support.inside, x, 0.0), gram @ (x * support.inside) - target, gram, lam
        )
        torch.testing.assert_close(polished, star, atol=1e-9, rtol=0)
