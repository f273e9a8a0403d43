"""Where H is known by its products alone: the bounds hold, are tight, and cost what was allowed for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bilevel
from bilevel.certificates import _inner_point
from bilevel.reports import Basis

from .families import F64, Logistic, Ridge, draw, excess, truth

BUDGET = bilevel.Tolerance(delta=None, delta_prime=None)
NO_SOLVE = {"solver": lambda objective, init, *args: init, "tolerance": BUDGET}


class Declared(Ridge):
    """Least squares with every constant declared, exactly: by products nothing is found out."""

    def constants(self, outer, data):
        X, _, Xv, _ = (t.double() for t in data)
        strengths = outer.double().exp()
        return bilevel.Constants(
            strong_convexity=torch.linalg.eigvalsh(X.mT @ X / X.shape[-2] + torch.diag(strengths))[..., 0],
            outer_smoothness=torch.linalg.eigvalsh(Xv.mT @ Xv / len(Xv))[-1],
            hessian_lipschitz=0.0,
            cross_lipschitz=strengths.max(),
            outer_cross_lipschitz=0.0,
        )


@pytest.fixture(autouse=True)
def _nothing_is_formed(monkeypatch):
    monkeypatch.setattr(_inner_point, "MOST_NUMBERS", 0)


def solve(problem_class, theta, data, tolerance=BUDGET, dtype=F64, inner=20, linear=3, **others):
    problem = problem_class(
        solver=bilevel.GradientDescent(0.5, inner),
        linear_solver=bilevel.CG(max_steps=linear),
        tolerance=tolerance,
        **others,
    )
    data, start = tuple(t.to(dtype) for t in data), torch.zeros(len(theta), dtype=dtype)
    result = problem.hypergradient(theta.to(dtype), data, init=start)
    return result, truth(problem, theta.to(dtype), data, start)


def sizes(result, true) -> list[tuple[float, bilevel.Bound]]:
    found = (result.inner, result.adjoint, result.grad)
    bounds = (result.inner_bound, result.adjoint_bound, result.bound)
    return [(float((a.double() - b).norm()), bound) for a, b, bound in zip(found, true[:3], bounds, strict=True)]


@settings(max_examples=30)
@given(
    st.integers(0, 10_000), st.floats(0, 5), st.integers(1, 60), st.integers(1, 6), st.booleans(), st.booleans(),
    st.sampled_from([1, 7, 40, 1000]),
)  # fmt: skip
def test_no_error_exceeds_its_bound(seed, log_condition, inner, linear, double, logistic, products):
    theta, data = draw(seed, log_condition)
    tolerance = bilevel.Tolerance(delta=None, delta_prime=None, bound_products=products)
    problem_class, dtype = (Logistic if logistic else Declared), (F64 if double else torch.float32)
    result, true = solve(problem_class, theta, data, tolerance, dtype, inner, linear)
    assert result.inner_bound.certified and result.adjoint_bound.certified and result.value_bound.certified
    assert result.bound.basis is Basis.PROBABILISTIC  # for ‖B‖
    assert all(over <= 1e-13 * 10**log_condition for over in excess(result, true))
    assert 0 <= result._certificate._route.left <= products


@pytest.mark.parametrize("problem_class", [Declared, Logistic])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("log_condition", [2.0, 5.0])
def test_bounds_are_tight_where_the_formulas_are_not(problem_class, dtype, log_condition):
    theta, data = draw(3, log_condition)
    result, true = solve(problem_class, theta, data, dtype=dtype)
    direct = result._certificate.direct
    for error, bound in sizes(result, true):
        assert error <= bound.value <= 1.3 * error
        assert bound.value <= 1.3 * (bound.inner_part + bound.linear_part)
    assert float(direct.gradient.value) > 3 * result.bound.value


def test_the_products_allowed_are_what_is_spent():
    theta, data = draw(4, 4.0)
    values, spent = [], []
    for products in (0, 4, 16, 1000):
        tolerance = bilevel.Tolerance(delta=None, delta_prime=None, bound_products=products)
        result, _ = solve(Logistic, theta, data, tolerance)
        values.append(result.bound.value)
        spent.append(products - result._certificate._route.left)
        if not products:
            assert values[0] == float(result._certificate.direct.gradient.value)
    assert values == sorted(values, reverse=True) and values[-1] < 0.1 * values[0]
    assert spent[:3] == [0, 4, 16] and spent[3] < 200
    assert result.adjoint_bound.value < 2 * values[-1] / float(result._certificate._spectral.cross_norm)
    assert "bound_products=16" in repr(bilevel.Tolerance(bound_products=16)) and "bound" not in repr(BUDGET)
    with pytest.raises(bilevel.ArgumentError, match="bound_products"):
        bilevel.Tolerance(bound_products=-1)


def test_a_goal_is_decided_by_the_formulas_alone(monkeypatch):
    monkeypatch.setattr("bilevel.certificates._route.Route._advance", None)
    theta, data = draw(2, 1.0)
    problem = Declared(tolerance=bilevel.Tolerance(hypergradient=1e-4, relative=True))
    result = problem.hypergradient(theta, data, init=torch.zeros(5, dtype=F64))
    g = truth(problem, theta, data, torch.zeros(5, dtype=F64))[2]
    assert float((result.grad - g).norm()) <= result.error_bound <= 1e-4 * float(g.norm())


def test_one_problem_neither_lends_nor_borrows_a_bound():
    theta = draw(0, 5.0)[0]
    X, y = (torch.stack([draw(seed, c)[1][part] for seed, c in ((0, 0.5), (1, 5.0), (2, 1.0))]) for part in (0, 1))
    Xv, yv = draw(0)[1][2:]
    settings = {"solver": bilevel.GradientDescent(0.5, 60), "linear_solver": bilevel.CG(max_steps=3)}
    good = Declared(**settings, tolerance=BUDGET, batch_dims=(0, 0, None, None))
    result = good.hypergradient(theta, (X, y, Xv, yv), init=torch.zeros(3, 5, dtype=F64))
    truths = [truth(Declared(), theta, (X[k], y[k], Xv, yv), torch.zeros(5, dtype=F64)) for k in range(3)]
    phi, q, g, _ = (torch.stack(parts) for parts in zip(*truths, strict=True))
    bounds = result._certificate.errors
    for found, exact, bound in ((result.inner, phi, bounds.inner), (result.adjoint, q, bounds.adjoint)):
        error = (found - exact).norm(dim=1)
        assert bool(((error <= bound.value) & (bound.value <= 1.2 * error)).all())
    assert float((result.grad - g.mean(0)).norm()) <= result.bound.value

    # With a NaN in its data the worst problem has no bound, and the others keep theirs.
    class Known(Declared):
        def constants(self, outer, data):
            return good.constants(outer, (X, y, Xv, yv))

    poisoned = X.clone()
    poisoned[1, 0, 0] = float("nan")
    problem = Known(**settings, tolerance=BUDGET, batch_dims=(0, 0, None, None), on_failure="ignore")
    partly = problem.hypergradient(theta, (poisoned, y, Xv, yv), init=torch.zeros(3, 5, dtype=F64))
    without = partly._certificate._others.inner.value
    torch.testing.assert_close(without[::2], bounds.inner.value[::2], rtol=0.1, atol=0)
    assert float(without[1]) == float("inf") and not partly.inner_bound.certified


class Quartic(bilevel.BilevelProblem):
    """½aφ² + ¼cφ⁴ − θφ of one number, with an outer objective that depends on θ directly."""

    def __init__(self, a: float, c: float, **settings) -> None:
        super().__init__(**settings)
        self.a, self.c = a, c

    def inner_objective(self, inner, outer, data):
        return (0.5 * self.a * inner**2 + 0.25 * self.c * inner**4 - outer * inner).sum()

    def outer_objective(self, inner, outer, data):
        return ((inner - 1) ** 2).sum() + (outer * inner).sum()

    def constants(self, outer, data):  # H′ = 6cφ, |φ| ≤ 1
        return bilevel.Constants(
            strong_convexity=self.a, outer_smoothness=2.0, hessian_lipschitz=6 * self.c, cross_lipschitz=0.0,
            outer_cross_lipschitz=1.0, cross_norm=1.0,
        )  # fmt: skip


@pytest.mark.parametrize("a", [1.0, 1e-6, 1e-12, 1e6])
@pytest.mark.parametrize("c", [0.0, 1.0])
def test_one_unknown_and_next_to_no_curvature(a, c):
    start, theta = torch.tensor([0.1 / max(a, 1.0)], dtype=F64), torch.tensor([0.3 * min(a, 1.0)], dtype=F64)
    problem = Quartic(a, c, **NO_SOLVE, linear_solver=bilevel.CG())
    result = problem.hypergradient(theta, (), init=start)
    true = truth(problem, theta, (), start)
    assert result.certified and all(over <= 1e-13 for over in excess(result, true))
    if not c:  # μ is exact
        assert all(bound.value <= (1 + 1e-3) * error for error, bound in sizes(result, true))


def test_the_solution_itself_and_a_zero_adjoint_cost_nothing():
    class Direct(Declared):
        def outer_objective(self, inner, outer, data):
            return (outer**2).sum()

    theta, data = draw(0)
    phi, *_ = true = truth(Declared(), theta, data, torch.zeros(5, dtype=F64))
    problem = Declared(
        **NO_SOLVE, linear_solver=lambda operator, rhs: torch.linalg.solve(operator.dense(), rhs[..., None])[..., 0]
    )
    result = problem.hypergradient(theta, data, init=phi)
    assert result.error_bound < 1e-11 and all(over <= 0 for over in excess(result, true))
    assert result._certificate._route.left == 1000
    result, true = solve(Direct, theta, data)
    assert result.error_bound < 1e-11 and all(over <= 1e-14 for over in excess(result, true))


class DoubleWell(Quartic):
    """¼φ⁴ − ½φ², whose minima are ±1; nothing is known but L_H where |φ| ≤ 1.5."""

    def outer_objective(self, inner, outer, data):
        return (inner**2).sum()

    def constants(self, outer, data):
        return bilevel.Constants(
            outer_smoothness=2.0, hessian_lipschitz=9.0, cross_lipschitz=0.0, outer_cross_lipschitz=0.0, cross_norm=1.0
        )


@pytest.mark.parametrize(("start", "proven"), [(1.02, True), (0.96, True), (0.9, False)])
def test_without_convexity_the_better_point_belongs_to_the_same_minimum(start, proven):
    problem = DoubleWell(-1.0, 1.0, **NO_SOLVE, linear_solver=bilevel.Exact())
    result = problem.hypergradient(torch.zeros(1, dtype=F64), None, init=torch.tensor([start], dtype=F64))
    assert (result.inner_bound.basis is Basis.PROBABILISTIC) == proven
    if proven:  # φ* = 1, g = 2φ*/H = 1
        error = abs(start - 1)
        assert error <= result.inner_bound.value <= 1.1 * error
        assert abs(float(result.grad) - 1) <= result.error_bound <= 1.1 * abs(float(result.grad) - 1)
