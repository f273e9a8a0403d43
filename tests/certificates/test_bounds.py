"""The bounds hold, are tight, and say what they rest on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bilevel
from bilevel.certificates import _certificate, _inner_point, logistic_constants
from bilevel.certificates._errors import Spectral
from bilevel.reports import Basis

from .families import F64, Logistic, Ridge, draw, excess, truth

BUDGET = bilevel.Tolerance(delta=None, delta_prime=None)
LOOSE = {"solver": bilevel.LBFGS(max_steps=100), "linear_solver": bilevel.CG()}


def solve(problem_class, theta, data, tolerance=None, dtype=F64, **settings):
    problem = problem_class(**{**LOOSE, **settings}, tolerance=tolerance or bilevel.Tolerance(delta=None))
    data = tuple(t.to(dtype) for t in data)
    start = torch.zeros(len(theta), dtype=dtype)
    result = problem.hypergradient(theta.to(dtype), data, init=start)
    return result, truth(problem, theta.to(dtype), data, start)


@given(
    st.integers(0, 10_000), st.floats(0, 4), st.integers(1, 12), st.integers(1, 6), st.booleans(), st.booleans()
)  # fmt: skip
def test_no_error_exceeds_its_certified_bound(seed, log_condition, steps, linear_steps, double, logistic):
    theta, data = draw(seed, log_condition)
    dtype = F64 if double else torch.float32
    settings = {"solver": bilevel.LBFGS(max_steps=steps), "linear_solver": bilevel.CG(max_steps=linear_steps)}
    tolerance = bilevel.Tolerance(delta=None, delta_prime=None)
    result, true = solve(Logistic if logistic else Ridge, theta, data, tolerance, dtype, **settings)
    for bound in (result.inner_bound, result.adjoint_bound, result.bound, result.value_bound):
        assert bound.basis is Basis.CERTIFIED and bound.certified and bound.failure_probability == 0
    # The reference is itself computed in float64.
    assert all(over <= 1e-13 * 10**log_condition for over in excess(result, true))
    formulas = result._certificate.direct
    assert float((result.inner.double() - true[0]).norm()) <= float(formulas.inner.value) + 1e-9
    assert float((result.adjoint.double() - true[1]).norm()) <= float(formulas.adjoint.value) + 1e-9
    assert float((result.grad.double() - true[2]).norm()) <= float(formulas.gradient.value) + 1e-4 * (not double) + 1e-9


@pytest.mark.parametrize("problem_class", [Ridge, Logistic])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_bounds_of_small_problems_are_tight(problem_class, dtype):
    theta, data = draw(3)
    settings = {"solver": bilevel.GradientDescent(0.5, 40), "linear_solver": bilevel.CG(max_steps=3)}
    tolerance = bilevel.Tolerance(delta=None, delta_prime=None)
    result, (phi, q, g, _) = solve(problem_class, theta, data, tolerance, dtype, **settings)
    for found, exact, bound in (
        (result.inner, phi, result.inner_bound), (result.adjoint, q, result.adjoint_bound), (result.grad, g, result.bound)
    ):  # fmt: skip
        error = float((found.double() - exact).norm())
        assert error <= bound.value <= 1.2 * error
        assert bound.value <= 1.2 * (bound.inner_part + bound.linear_part)


def test_the_parts_say_which_solve_to_improve():
    theta, data = draw(1)
    crude, fine = bilevel.GradientDescent(0.5, 20), bilevel.Newton()
    tolerance = bilevel.Tolerance(delta=None, delta_prime=None)
    inner_crude, _ = solve(Ridge, theta, data, tolerance, solver=crude, linear_solver=bilevel.Exact())
    linear_crude, _ = solve(Ridge, theta, data, tolerance, solver=fine, linear_solver=bilevel.CG(max_steps=2))
    assert inner_crude.bound.linear_part < 1e-6 * inner_crude.bound.inner_part
    assert linear_crude.bound.inner_part < 1e-6 * linear_crude.bound.linear_part


def test_a_batch_is_bounded_as_the_mean_that_it_is():
    theta, (X, y, Xv, yv) = draw(0)
    others = [draw(seed)[1] for seed in (1, 2)]
    Xs, ys = torch.stack([X, *(o[0] for o in others)]), torch.stack([y, *(o[1] for o in others)])
    problem = Ridge(
        solver=bilevel.GradientDescent(0.5, 60), linear_solver=bilevel.CG(max_steps=3), batch_dims=(0, 0, None, None),
        tolerance=bilevel.Tolerance(delta=None, delta_prime=None),
    )  # fmt: skip
    result = problem.hypergradient(theta, (Xs, ys, Xv, yv), init=torch.zeros(3, 5, dtype=F64))
    truths = [truth(problem, theta, (Xs[k], ys[k], Xv, yv), torch.zeros(5, dtype=F64)) for k in range(3)]
    phi, q, g, value = (torch.stack(parts) for parts in zip(*truths, strict=True))
    error = float((result.grad - g.mean(0)).norm())
    assert result.certified
    assert error <= result.error_bound <= 1.2 * error
    assert float((result.inner - phi).norm(dim=1).max()) <= result.inner_bound.value
    assert float((result.adjoint - q).norm(dim=1).max()) <= result.adjoint_bound.value
    assert float((result.corrected_value - value.mean()).abs()) <= result.value_bound.value


def test_without_constants_the_error_is_estimated_within_a_factor_two():
    class Undeclared(Logistic):
        constants = bilevel.BilevelProblem.constants

    for seed in range(5):
        theta, data = draw(seed)
        result, (phi, q, g, _) = solve(Undeclared, theta, data, solver=bilevel.GradientDescent(0.5, 150))
        for found, exact, bound in (
            (result.grad, g, result.bound), (result.inner, phi, result.inner_bound), (result.adjoint, q, result.adjoint_bound)
        ):  # fmt: skip
            error = float((found - exact).norm())
            assert bound.basis is Basis.ESTIMATED and not bound.certified
            assert 0.5 * error <= bound.value <= 2 * error


def test_refining_squares_the_error_and_is_certified_again():
    theta, data = draw(5, log_condition=1.0)
    errors = []
    for steps in (10, 20, 40):
        result, true = solve(Logistic, theta, data, solver=bilevel.GradientDescent(0.5, steps))
        better = result.refined()
        assert better.certified and all(over <= 1e-13 for over in excess(better, true))
        assert better.bound.value < result.bound.value
        torch.testing.assert_close(better.grad, result.corrected_grad, atol=1e-14, rtol=1e-12)
        errors.append((float((result.grad - true[2]).norm()), float((better.grad - true[2]).norm())))
        again = better.refined().refined()
        assert float((again.grad - true[2]).norm()) < 1e-13
    # Second order: the refined error over the square of the first one stays bounded, as both vanish.
    assert errors[2][0] < 0.5 * errors[0][0]
    ratios = [refined / first**2 for first, refined in errors]
    assert max(ratios) < 10 * min(ratios)


class DoubleWell(bilevel.BilevelProblem):
    """¼φ⁴ − ½φ² − θφ near φ = 1: not convex, H′ = 6φ is at most 9 where |φ| ≤ 1.5."""

    def inner_objective(self, inner, outer, data):
        return (0.25 * inner**4 - 0.5 * inner**2 - outer * inner).sum()

    def outer_objective(self, inner, outer, data):
        return (inner**2).sum()

    def constants(self, outer, data):
        return bilevel.Constants(hessian_lipschitz=9.0)


@pytest.mark.parametrize(("start", "basis"), [(1.02, Basis.CERTIFIED), (0.96, Basis.CERTIFIED), (0.9, Basis.ESTIMATED)])
def test_without_convexity_a_minimum_nearby_is_proven_where_kantorovich_holds(start, basis):
    problem = DoubleWell(
        solver=lambda objective, init, *args: init, linear_solver=bilevel.Exact(),
        tolerance=bilevel.Tolerance(delta=None, delta_prime=None),
    )  # fmt: skip
    theta, start = torch.tensor(0.0, dtype=F64), torch.tensor([start], dtype=F64)
    result = problem.hypergradient(theta, None, init=start)
    assert result.inner_bound.basis is basis
    if basis is Basis.CERTIFIED:  # φ* = 1, dφ*/dθ = 1/H = ½, g = 2 φ* ½ = 1
        assert abs(float(start) - 1) <= result.inner_bound.value <= 0.25
        assert result.certified and abs(float(result.grad) - 1) <= result.error_bound


@pytest.fixture
def _nothing_is_formed(monkeypatch):
    monkeypatch.setattr(_inner_point, "MOST_NUMBERS", 0)


@pytest.mark.usefixtures("_nothing_is_formed")
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_problems_too_large_to_form_are_bounded_from_products(known, batched):
    class Declared(Logistic):
        def constants(self, outer, data):
            given = super().constants(outer, data)
            return given if known else given.without("strong_convexity")

    theta, (X, y, Xv, yv) = draw(2, log_condition=1.0)
    settings = {"solver": bilevel.Newton(max_steps=3), "linear_solver": bilevel.CG(max_steps=4)}
    problem = Declared(
        **settings,
        tolerance=bilevel.Tolerance(delta=None, delta_prime=None),
        batch_dims=(0, 0, None, None) if batched else None,
    )
    data, start = (X, y, Xv, yv), torch.zeros(5, dtype=F64)
    if batched:
        data, start = (torch.stack([X, -X.flip(0)]), torch.stack([y, y.flip(0)]), Xv, yv), start.expand(2, 5)

        def constants(outer, data, base=problem.constants):
            return base(outer, (data[0][0], *data[1:]))

        problem.constants = constants
    result = problem.hypergradient(theta, data, init=start)
    pairs = [(data[0][k], data[1][k], Xv, yv) for k in range(2)] if batched else [data]
    truths = [truth(problem, theta, pair, torch.zeros(5, dtype=F64)) for pair in pairs]
    phi, _, g, _ = (torch.stack(parts) for parts in zip(*truths, strict=True))
    bound = result.bound
    assert bound.basis is Basis.PROBABILISTIC and not bound.certified
    assert 0 < bound.failure_probability < 1e-5
    assert float((result.grad - g.mean(0)).norm()) <= bound.value
    inner = result.inner_bound
    assert inner.basis is (Basis.CERTIFIED if known else Basis.PROBABILISTIC)
    assert float((result.inner.reshape(-1, 5) - phi).norm(dim=1).max()) <= inner.value
    # A declared ‖B‖ takes the place of the run that finds it.
    if known and not batched:
        largest = float((theta.exp() * result.inner).abs().max())
        problem.constants = lambda outer, data: bilevel.Constants(
            **{**vars(Logistic.constants(problem, outer, data)), "cross_norm": largest * (1 + 1e-9)}
        )
        declared = problem.hypergradient(theta, data, init=start)
        assert declared.bound.certified and declared.bound.value <= 1.01 * bound.value


def test_an_objective_that_rounds_to_float32_inside_is_not_taken_for_a_float64_one():
    class Rounding(Ridge):
        def inner_objective(self, inner, outer, data):
            X, y, _, _ = (t.float() for t in data)
            return (
                0.5 * ((X @ inner.float() - y) ** 2).mean() + 0.5 * (outer.float().exp() * inner.float() ** 2).sum()
            ).to(inner)

    theta, data = (draw(0)[0].float(), tuple(t.float() for t in draw(0)[1]))
    problem = Rounding(solver=bilevel.Newton(), tolerance=bilevel.Tolerance())
    result = problem.hypergradient(theta, data, init=torch.zeros(5))
    assert result._certificate.exact.x.dtype == torch.float32
    true = truth(Ridge(), theta, data, torch.zeros(5))
    assert all(over <= 0 for over in excess(result, true))
    assert result.bound.value < 1e-2


def test_an_operation_without_rules_for_transforms_is_bounded_by_reverse_passes():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, cotangent):
            (x,) = ctx.saved_tensors
            return 2 * x * cotangent

    class Old(Ridge):
        def inner_objective(self, inner, outer, data):
            X, y, _, _ = data
            return 0.5 * Square.apply(X @ inner - y).mean() + 0.5 * (outer.exp() * inner**2).sum()

    theta, data = draw(0)
    problem = Old(
        solver=bilevel.LBFGS(max_steps=8), linear_solver=bilevel.CG(), tolerance=bilevel.Tolerance(delta=None)
    )
    point = problem.hypergradient(theta, data, init=torch.zeros(5, dtype=F64))._certificate.point
    plain = Ridge(solver=lambda objective, init, *args: init, tolerance=bilevel.Tolerance(delta=None))
    reference = plain.hypergradient(theta, data, init=point.x[0])._certificate.point
    torch.testing.assert_close(point.inner.cross, reference.inner.cross)


def test_a_zero_adjoint_and_an_exact_solution_are_no_special_case():
    class Direct(Ridge):
        def outer_objective(self, inner, outer, data):
            return (outer**2).sum()

    theta, data = draw(0)
    result, true = solve(Direct, theta, data)
    assert result.certified and result.error_bound < 1e-12
    assert all(over <= 1e-14 for over in excess(result, true))


def test_printing_shows_value_bound_and_basis():
    theta, data = draw(0)
    result, _ = solve(Ridge, theta, data, bilevel.Tolerance(delta=1e-6, strong_convexity=1e-4))
    lines = str(result).splitlines()
    assert "hypergradient" in lines[0] and 5 <= len(lines) <= 7
    for line, name in zip(lines[1:], ("value", "gradient", "solution", "adjoint"), strict=False):
        assert line.split()[0] == name and "at most" in line and "certified" in line
    forward = str(result.report.forward).splitlines()
    assert len(forward) == 4 and forward[1].split()[:2] == ["status", "CONVERGED:"] and "certified" in forward[3]
    unknown = str(solve(Ridge, theta, data)[0].report.forward)
    assert "error     not known" in unknown
    assert str(bilevel.Bound(float("nan"), Basis.RESIDUAL)) == "not known"
    chance = bilevel.Bound(0.1, Basis.PROBABILISTIC, failure_probability=1e-6)
    assert str(chance) == "at most 0.1 (with probability 1 - 1e-06)"


def test_applications_are_certified():
    from bilevel.hyperopt.linear_models import FOLD_DIMS, Logistic, Ridge, Softmax, WeightedData

    generator = torch.Generator().manual_seed(0)
    X = torch.randn(24, 3, generator=generator, dtype=F64)
    weights = (torch.arange(24) % 3 != torch.arange(3)[:, None]).double()
    for model, y in (
        (Ridge(3), X[:, 0]), (Logistic(3), (X[:, 0] > 0).double()), (Softmax(3, classes=3), torch.arange(24) // 3 % 3)
    ):  # fmt: skip
        tuning = bilevel.HyperparameterOptimization(
            model.training_objective,
            model.validation_loss,
            torch.zeros(3, dtype=F64),
            model.initial(3),
            batch_dims=FOLD_DIMS,
        )
        result = tuning.hypergradient(WeightedData(X, y, weights, 1 - weights))
        assert result.certified and result.error_bound < 1e-8
    learner = bilevel.IMAML(torch.nn.Linear(3, 1).double(), torch.nn.functional.mse_loss, 0.5)
    batch = (X.reshape(4, 6, 3), X[:, :1].reshape(4, 6, 1)) * 2
    assert learner.hypergradient(batch).inner_bound.certified
    deep = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh(), torch.nn.Linear(2, 1)).double()
    assert (
        not bilevel.IMAML(deep, torch.nn.functional.mse_loss, 2.0, bilevel.Newton())
        .hypergradient(batch)
        .inner_bound.certified
    )


def test_the_certificate_is_only_made_when_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(_certificate, "errors_at", None)
    solve(Ridge, *draw(0))


def test_the_bound_of_a_report_allows_for_rounding():
    generator = torch.Generator().manual_seed(0)
    b = 1e3 * torch.randn(300, generator=generator)
    c = b + torch.rand(300, generator=generator)
    layer = bilevel.argmin(
        lambda x, b, c: 0.5 * x**2 + (torch.sin(c) * b - torch.sin(b) * c) * x,
        solver=bilevel.Newton(), tolerance=bilevel.Tolerance(strong_convexity=1.0),
    )  # fmt: skip
    solution = torch.func.vmap(layer.solve)(torch.zeros(300), b, c)
    exact = b.double().sin() * c.double() - c.double().sin() * b.double()
    error = (solution.value.double() - exact).abs()
    report = solution.report
    assert bool(report.certified.all()) and bool((error <= report.error_bound.double()).all())
    assert bool((error > report.residual_norm.double()).any())  # which the residual alone does not show


def test_a_norm_of_b_that_was_given_is_moved_with_the_point(monkeypatch):
    # H (2 × 2) may be formed and B (2 × 5) not: the bounds by way of a better point need ‖B‖ there.
    monkeypatch.setattr(_inner_point, "MOST_NUMBERS", 5)

    class Products(bilevel.BilevelProblem):
        def inner_objective(self, inner, outer, data):
            return 0.5 * (inner**2).sum() - inner[0] + 0.1 * (inner.sum() ** 2) * outer.sum()

        def outer_objective(self, inner, outer, data):
            return ((inner - 3) ** 2).sum()

        def constants(self, outer, data):
            return bilevel.Constants(
                strong_convexity=1.0, outer_smoothness=2.0, hessian_lipschitz=0.0, cross_lipschitz=0.4 * 5**0.5,
                outer_cross_lipschitz=0.0, cross_norm=1e-12,
            )  # fmt: skip

    theta, start = torch.full((5,), 0.1, dtype=F64), torch.zeros(2, dtype=F64)  # where B = 0
    problem = Products(solver=lambda objective, init, *args: init, linear_solver=bilevel.Exact(), tolerance=BUDGET)
    result = problem.hypergradient(theta, (), init=start)
    phi, _, g, _ = truth(problem, theta, (), start)
    certificate = result._certificate
    assert certificate.exact.inner.factorable and certificate.exact.inner.cross is None
    known, there = Spectral().at_point(certificate.constants, certificate.exact, certificate.refined)
    exact = 0.2 * float(phi.sum()) * 10**0.5  # B = 0.2 (φ₁ + φ₂) 11ᵀ
    assert known.cross_norm is None and exact <= float(there.cross_norm) <= 2 * exact
    assert result.certified and float((result.grad - g).norm()) <= result.error_bound


def test_b_is_made_of_whichever_are_fewer_its_rows_or_its_columns():
    data = draw(0)[1]

    class Common(Ridge):
        def inner_objective(self, inner, outer, data):
            return super().inner_objective(inner, outer[:1].expand(5) + outer[1] * data[1][:5], data)

    outer = torch.tensor([-1.0, 0.3], dtype=F64)
    result = Common(tolerance=BUDGET).hypergradient(outer, data, init=torch.zeros(5, dtype=F64))
    cross = torch.func.jacrev(torch.func.grad(Common().inner_objective), argnums=1)(result.inner, outer, data)
    torch.testing.assert_close(result._certificate.exact.inner.cross[0], cross)


def test_a_problem_too_large_to_factorise_is_certified_tightly():
    generator = torch.Generator().manual_seed(0)
    rows, n = 40, 1100
    X, Xv = (torch.randn(rows, n, generator=generator, dtype=F64) / n**0.5 for _ in range(2))
    y, yv = (torch.randn(rows, generator=generator, dtype=F64).sign() for _ in range(2))

    class Large(bilevel.BilevelProblem):
        def inner_objective(self, inner, outer, data):
            return torch.nn.functional.softplus(-y * (X @ inner)).mean() + 0.5 * outer.exp() * (inner**2).sum()

        def outer_objective(self, inner, outer, data):
            return torch.nn.functional.softplus(-yv * (Xv @ inner)).mean()

        def constants(self, outer, data):
            strength = float(outer.exp())
            return bilevel.Constants(
                strong_convexity=strength * (1 - 1e-12), outer_smoothness=logistic_constants(Xv).smoothness,
                hessian_lipschitz=logistic_constants(X).hessian_lipschitz, cross_lipschitz=strength * (1 + 1e-12),
                outer_cross_lipschitz=0.0,
            )  # fmt: skip

    outer, start = torch.tensor(-8.0, dtype=F64), torch.zeros(n, dtype=F64)
    problem = Large(solver=bilevel.LBFGS(max_steps=12), linear_solver=bilevel.CG(max_steps=4), tolerance=BUDGET)
    result = problem.hypergradient(outer, None, init=start)
    assert not result._certificate.exact.inner.factorable
    # φ lies in the span of the rows, where there are 40 unknowns.
    basis = torch.linalg.qr(X.mT)[0]
    coordinates, step = torch.zeros(rows, dtype=F64), torch.ones(1)

    def reduced(a):
        return problem.inner_objective(basis @ a, outer, None)

    while float(step.norm()) > 1e-14 * float(coordinates.norm()):
        slope, curve = torch.func.grad(reduced)(coordinates), torch.func.hessian(reduced)(coordinates)
        step = torch.linalg.solve(curve, slope)
        coordinates = coordinates - step
    phi = basis @ coordinates
    v = torch.func.grad(problem.outer_objective)(phi, outer, None)
    q = basis @ torch.linalg.solve(curve, basis.mT @ v) + (v - basis @ (basis.mT @ v)) / outer.exp()
    g = -outer.exp() * (q @ phi)
    for found, exact, bound in (
        (result.inner, phi, result.inner_bound), (result.adjoint, q, result.adjoint_bound), (result.grad, g, result.bound)
    ):  # fmt: skip
        error = float((found - exact).norm())
        assert bound.certified and error <= bound.value <= 1.3 * error
    assert float(result._certificate.direct.gradient.value) > 30 * result.error_bound


def test_an_estimate_goes_on_until_newtons_method_has_contracted():
    class Undeclared(Logistic):
        constants = bilevel.BilevelProblem.constants

    worst = 1.0
    for seed in range(8):
        theta, data = draw(seed, 4.0)
        theta = theta - 8
        result, true = solve(
            Undeclared,
            theta,
            data,
            BUDGET,
            solver=lambda objective, init, *args: init,
            linear_solver=bilevel.CG(max_steps=1),
        )
        error = float((result.grad - true[2]).norm())
        one_step = float((result.grad - result.corrected_grad).norm()) / error
        assert result.bound.basis is Basis.ESTIMATED and 0.5 * error <= result.error_bound <= 2 * error
        worst = min(worst, one_step)
    assert worst < 0.5  # what one step alone would have said


@pytest.mark.parametrize("seed", [18, 24, 87, 146])
def test_what_is_quadratic_in_pieces_only_is_not_taken_for_quadratic(seed):
    """Two random points may lie in the piece of φ, and the solution in another: the way there tells."""
    torch.manual_seed(seed)
    X = torch.randn(5, 2, dtype=F64)
    signs = torch.randn(5, dtype=F64).sign()

    class SquaredHinge(bilevel.BilevelProblem):
        def inner_objective(self, w, strength, data):
            return torch.relu(1 - signs * (X @ w)).square().sum() + strength * (w**2).sum()

        def outer_objective(self, w, strength, data):
            return (X @ w - signs).square().mean()

    tolerance = bilevel.Tolerance(delta=None, strong_convexity=2.0)
    at, start = torch.tensor(1.0, dtype=F64), 2 * torch.randn(2, dtype=F64)
    crude = SquaredHinge(solver=bilevel.GradientDescent(0.02, max_steps=1), tolerance=tolerance)
    result, exact = crude.hypergradient(at, (), init=start), SquaredHinge().hypergradient(at, (), init=start)
    assert result._certificate.constants.hessian_lipschitz is None
    for bound, found, true in (
        (result.inner_bound, result.inner, exact.inner),
        (result.bound, result.grad, exact.grad),
    ):
        assert not bound.certified or float((found - true).norm()) <= bound.value


@pytest.mark.parametrize("convex", [False, True])
@pytest.mark.parametrize("theta", [0.5, -0.9, 2.0])
def test_a_kink_between_the_point_and_the_solution_is_seen(theta, convex):
    """H is the same on both sides of that of |φ|, and at the solution the implicit function theorem does not hold."""

    class Shrunk(bilevel.BilevelProblem):
        def inner_objective(self, w, shift, data):
            return 0.5 * ((w - shift) ** 2).sum() + w.abs().sum()

        def outer_objective(self, w, shift, data):
            return w.sum()

        def constants(self, shift, data):
            return bilevel.Constants(strong_convexity=1.0, convex=True) if convex else bilevel.Constants()

    problem = Shrunk(solver=bilevel.GradientDescent(0.1, max_steps=20), tolerance=bilevel.Tolerance(delta=None))
    result = problem.hypergradient(torch.tensor([theta], dtype=F64), None, init=torch.tensor([0.3], dtype=F64))
    exact = max(0.0, abs(theta) - 1) * (1 if theta > 0 else -1)
    slope = 1.0 if exact else 0.0
    for bound, found, true in (
        (result.inner_bound, result.inner, exact),
        (result.adjoint_bound, result.adjoint, slope),
        (result.bound, result.grad, slope),
        (result.value_bound, result.corrected_value, exact),
    ):
        assert not bound.certified or abs(float(found) - true) <= bound.value
    assert not result.certified  # |w| is no polynomial, whatever the points met show
