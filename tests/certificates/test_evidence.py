"""What was seen at a few points is no proof: nothing wrong is certified, and one problem's trouble stays its own."""

from __future__ import annotations

import math

import pytest
import torch

import bilevel
from bilevel._torch import factorisations as safe
from bilevel.certificates import _inner_point
from bilevel.reports import Basis

from .families import F64, Ridge, draw

BUDGET = bilevel.Tolerance(delta=None, delta_prime=None)
AS_GIVEN = {
    "solver": lambda objective, init, *args: init, "linear_solver": bilevel.Exact(), "tolerance": BUDGET,
}  # fmt: skip
BOUNDS = ("inner_bound", "adjoint_bound", "bound", "value_bound")


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=F64)


class Stiff(bilevel.BilevelProblem):
    """½·1e13·φ₀² + ½(φ₁ − θ)² + log 2cosh φ₁: beside the stiff unknown a random product of H looks constant."""

    def inner_objective(self, x, theta, data):
        return 0.5e13 * x[0] ** 2 + 0.5 * (x[1] - theta) ** 2 + torch.log(2 * torch.cosh(x[1]))

    def outer_objective(self, x, theta, data):
        return x[1] ** 2


def test_a_stiff_unknown_does_not_make_the_others_quadratic():
    result = Stiff(**AS_GIVEN).hypergradient(number(1.0), None, init=torch.zeros(2, dtype=F64))
    star = torch.zeros((), dtype=F64)
    for _ in range(50):  # φ₁ − θ + tanh φ₁ = 0
        star = star - (star - 1 + star.tanh()) / (2 - star.tanh() ** 2)
    for name in BOUNDS:
        assert getattr(result, name).basis is not Basis.CERTIFIED
    # The estimate comes from a better point.
    error = float((result.inner - torch.stack([torch.zeros_like(star), star])).norm())
    assert error / 2 <= result.inner_bound.value <= 2 * error


class Saturating(bilevel.BilevelProblem):
    """F = σ(50(φ − 1)) is flat in floating point wherever it is looked at."""

    def inner_objective(self, x, theta, data):
        return 0.5 * ((x - theta) ** 2).sum()

    def outer_objective(self, x, theta, data):
        return torch.sigmoid(50 * (x - 1)).sum()


def test_what_is_flat_where_it_is_looked_at_is_not_proven_to_be_flat():
    result = Saturating(**AS_GIVEN).hypergradient(number(-30.0).reshape(1), None, init=number(3.0).reshape(1))
    assert result.inner_bound.certified and result.inner_bound.value == pytest.approx(33.0)  # G is quadratic
    for name in BOUNDS[1:]:
        assert getattr(result, name).basis is not Basis.CERTIFIED
    assert result.value_bound.value == pytest.approx(1.0)
    assert result._certificate.constants.outer_smoothness is None


class Hinged(bilevel.BilevelProblem):
    """e^φ − θφ with right constants inside, a hinge outside whose kink Newton's first step does not reach."""

    smoothness: float | None = None

    def inner_objective(self, x, theta, data):
        return (x.exp() - theta * x).sum()

    def outer_objective(self, x, theta, data):
        return torch.relu(1.5 - x).sum()

    def constants(self, theta, data):
        return bilevel.Constants(
            strong_convexity=1.0, hessian_lipschitz=math.exp(3.1), outer_smoothness=self.smoothness
        )


def test_a_kink_beyond_the_first_newton_point_is_not_proven_away():
    theta, start = number(math.exp(0.5)).reshape(1), number(3.0).reshape(1)
    result = Hinged(**AS_GIVEN).hypergradient(theta, None, init=start)
    assert result.inner_bound.certified and result.inner_bound.value >= 2.5  # φ* = ½
    for name in BOUNDS[1:]:
        assert getattr(result, name).basis is not Basis.CERTIFIED
    assert result.bound.value == pytest.approx(math.exp(-0.5), rel=0.3)


class Steps(bilevel.BilevelProblem):
    """F is flat at φ = 3 and after the first step, which ends at φ* = −30; L_F = 0 was declared, and is wrong."""

    def inner_objective(self, x, theta, data):
        return 0.5 * ((x - theta) ** 2).sum()

    def outer_objective(self, x, theta, data):
        return torch.sigmoid(50 * (x - 1)).sum()

    def constants(self, theta, data):
        return bilevel.Constants(outer_smoothness=0.0)


@pytest.mark.parametrize("on_failure", ["raise", "warn", "nan", "ignore"])
@pytest.mark.parametrize("products", [False, True])
def test_two_values_that_bounds_say_must_agree_refute_them(on_failure, products, monkeypatch):
    if products:
        monkeypatch.setattr(_inner_point, "MOST_NUMBERS", 0)

    class Declared(Steps):
        def constants(self, theta, data):
            given = super().constants(theta, data)
            return bilevel.Constants(
                outer_smoothness=0.0, strong_convexity=1.0, hessian_lipschitz=0.0, cross_lipschitz=0.0, outer_cross_lipschitz=0.0,
                cross_norm=1.0,
            ) if products else given  # fmt: skip

    tolerance = bilevel.Tolerance(delta=None, delta_prime=None, bound_products=10)
    problem = Declared(**{**AS_GIVEN, "tolerance": tolerance}, on_failure=on_failure)
    result = problem.hypergradient(number(-30.0).reshape(1), None, init=number(3.0).reshape(1))
    if on_failure == "raise":
        with pytest.raises(bilevel.ConstantsError, match="contradict each other; correct the constants"):
            _ = result.value_bound
    elif on_failure == "warn":
        with pytest.warns(bilevel.FailureWarning, match="contradict"):
            assert result.value_bound.basis is Basis.ESTIMATED
        assert result.value_bound.value == pytest.approx(1.0)
    else:
        bound = result.value_bound
        assert not bound.certified and (math.isnan(bound.value) if on_failure == "nan" else bound.value > 0.9)


def logistic(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(12, 3, generator=generator, dtype=F64)
    return X, torch.randn(12, generator=generator, dtype=F64).sign()


class Separable(bilevel.BilevelProblem):
    """Logistic loss with ridge e^θ, nothing declared."""

    def inner_objective(self, w, theta, data):
        X, y = data
        return torch.logaddexp(-y * (X @ w), torch.zeros((), dtype=w.dtype)).mean() + 0.5 * theta.exp() * (w**2).sum()

    def outer_objective(self, w, theta, data):
        X, y = data
        return torch.logaddexp(-y * (0.5 * (X @ w) + 1), torch.zeros((), dtype=w.dtype)).mean()


def newton(problem, theta, data):
    """Return φ* by damped Newton steps and dense solves."""
    w = torch.zeros(3, dtype=F64)
    for _ in range(100):
        slope = torch.func.grad(problem.inner_objective)(w, theta, data)
        step = torch.linalg.solve(torch.func.hessian(problem.inner_objective)(w, theta, data), slope)
        length = 1.0
        while length > 1e-6 and problem.inner_objective(w - length * step, theta, data) > problem.inner_objective(
            w, theta, data
        ):
            length /= 2
        w = w - length * step
    return w


@pytest.mark.parametrize("seed", [15, 20, 25, 26, 29])
def test_a_refinement_does_not_run_away(seed):
    problem, data, theta = Separable(**AS_GIVEN), logistic(seed), number(-6.0)
    result = problem.hypergradient(theta, data, init=torch.tensor([3.0, -3.0, 6.0], dtype=F64))
    error = float((result.inner - newton(problem, theta, data)).norm())
    for name in BOUNDS:
        bound = getattr(result, name)
        assert bound.basis in (Basis.ESTIMATED, Basis.RESIDUAL)
    assert error / 2 <= result.inner_bound.value <= 2 * error
    assert torch.isfinite(result.corrected_grad).all() and str(result).count("estimated") == 4


def test_one_problem_in_trouble_leaves_the_others_their_bounds():
    theta, (X, y, Xv, yv) = draw(0)
    poisoned = torch.stack([X, X.clone(), -X])
    poisoned[1, 0, 0] = float("nan")
    problem = Ridge(
        solver=bilevel.GradientDescent(0.5, 20), linear_solver=bilevel.CG(max_steps=3), batch_dims=(0, None, None, None),
        tolerance=BUDGET, on_failure="ignore",
    )  # fmt: skip
    start = torch.zeros(3, 5, dtype=F64)
    result = problem.hypergradient(theta, (poisoned, y, Xv, yv), init=start)
    assert str(result.bound) == str(result.inner_bound) == "not known"
    errors = result._certificate.errors
    for found in (errors.inner, errors.adjoint, errors.gradient, errors.value):
        assert torch.isfinite(found.value).tolist() == [True, False, True]
    clean = problem.hypergradient(theta, (torch.stack([X, X, -X]), y, Xv, yv), init=start)
    torch.testing.assert_close(
        errors.gradient.value[::2], clean._certificate.errors.gradient.value[::2], rtol=0.1, atol=0
    )


def test_factorisations_answer_each_matrix_for_itself():
    good = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=F64)
    batch = torch.stack([good, torch.full_like(good, float("nan")), good])
    bad = [False, True, False]
    for values in (
        safe.eigvalsh(batch),
        *safe.eigh(batch),
        safe.norms(batch),
        *safe.svd(batch),
        safe.svdvals(batch),
        safe.pinv(batch, rtol=1e-12),
    ):
        assert torch.isnan(values.reshape(3, -1)).all(1).tolist() == bad
        assert torch.isfinite(values.reshape(3, -1)).all(1).tolist() == [not one for one in bad]
    right = torch.ones(3, 2, 1, dtype=F64)
    singular = torch.stack([good, torch.ones_like(good), good])
    assert torch.isnan(safe.solve(singular, right)).flatten(1).all(1).tolist() == bad
    torch.testing.assert_close(safe.solve(singular, right)[0], torch.linalg.solve(good, right[0]))
    torch.testing.assert_close(safe.norms(good), torch.linalg.matrix_norm(good, 2))
    assert safe.norms(torch.zeros(4, 0, 3)).tolist() == [0.0] * 4
    assert safe.eigvalsh(torch.zeros(0, 3, 3)).shape == (0, 3)


def test_a_factorisation_that_fails_for_one_matrix_is_taken_one_by_one(monkeypatch):
    good, seen = torch.eye(2, dtype=F64), []
    plain = torch.linalg.eigvalsh

    def failing(matrix):
        seen.append(matrix.shape)
        if bool((matrix == 7).any()):
            raise torch.linalg.LinAlgError("did not converge")
        return plain(matrix)

    monkeypatch.setattr(torch.linalg, "eigvalsh", failing)
    values = safe.eigvalsh(torch.stack([good, 7 * good, 2 * good]).reshape(3, 1, 2, 2))
    assert values.shape == (3, 1, 2) and torch.isnan(values[1]).all()
    assert values[0].tolist() == [[1.0, 1.0]] and values[2].tolist() == [[2.0, 2.0]] and len(seen) == 5


def test_each_matrix_that_reaches_lapack_is_finite(monkeypatch):
    # On others it prints errors of its own, and need not end.
    plain = torch.linalg.svdvals

    def careful(matrix):
        assert bool(torch.isfinite(matrix).all())
        return plain(matrix)

    monkeypatch.setattr(torch.linalg, "svdvals", careful)
    batch = torch.stack([torch.eye(2, dtype=F64), torch.full((2, 2), torch.inf, dtype=F64)])
    assert safe.svdvals(batch).isnan().tolist() == [[False, False], [True, True]]
