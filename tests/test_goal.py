"""Goals for the hypergradient: met, at what cost, decided by what, refused where they cannot be had; schedules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import bilevel
import bilevel.problems.adaptive.search
import bilevel.replay.cache
from bilevel.operators import DenseOperator
from bilevel.problems.adaptive.error_model import ErrorModel
from bilevel.problems.adaptive.quasi_newton import JointOperator, RecordedOperator, SecantPairs
from bilevel.problems.adaptive.state import SearchState

from . import oracles

F64 = torch.float64


class Ridge(bilevel.BilevelProblem):
    def inner_objective(self, inner, outer, data):
        X, y, _, _ = data
        return ((X @ inner - y) ** 2).sum() + (outer.exp() * inner**2).sum()

    def outer_objective(self, inner, outer, data):
        _, _, X, y = data
        return ((X @ inner - y) ** 2).mean() + 0.01 * (outer**2).sum()


class Classifier(Ridge):
    def inner_objective(self, inner, outer, data):
        X, y, _, _ = data
        return torch.nn.functional.softplus(-y.sign() * (X @ inner)).sum() + 0.5 * (outer.exp() * inner**2).sum()


def split(seed: int = 0, n: int = 6, dtype: torch.dtype = F64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((30, n), (30,), (20, n), (20,))
    return tuple(torch.randn(shape, generator=generator, dtype=F64).to(dtype) for shape in shapes)


def exact(problem: Ridge, outer: torch.Tensor, data: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return g by an unrolled Newton iteration."""
    free = outer.detach().clone().requires_grad_(True)
    start = torch.zeros(data[0].shape[1], dtype=F64)
    inner = oracles.newton_argmin(problem.inner_objective, start, free, data, steps=12)
    return torch.autograd.grad(problem.outer_objective(inner, free, data), free)[0]


@dataclass
class Passes:
    count: int = 0


@contextmanager
def passes() -> Iterator[Passes]:
    """Count reverse passes: gradients, Hessian products, cross products and slopes alike."""
    counted = Passes()
    places = ((torch.autograd, "grad"), (bilevel._torch.reverse, "_engine_run_backward"))
    plain = [getattr(place, name) for place, name in places]

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args, **kwargs):
            counted.count += 1
            return function(*args, **kwargs)

        return run

    for (place, name), function in zip(places, plain, strict=True):
        setattr(place, name, counting(function))
    try:
        yield counted
    finally:
        for (place, name), function in zip(places, plain, strict=True):
            setattr(place, name, function)


ITERATIVE = {"solver": bilevel.LBFGS(), "linear_solver": bilevel.CG()}
START = torch.zeros(6, dtype=F64)


def asked(goal: float, **others: object) -> bilevel.Tolerance:
    return bilevel.Tolerance(hypergradient=goal, relative=True, **others)


@given(st.integers(0, 10_000), st.sampled_from([Ridge, Classifier]), st.integers(1, 8), st.booleans())
def test_an_estimated_goal_is_met(seed: int, kind: type[Ridge], digits: int, descent: bool) -> None:
    data, outer = split(seed), torch.linspace(-2, 1, 6, dtype=F64)
    solver = bilevel.GradientDescent(0.01, 20_000) if descent else bilevel.LBFGS()
    goal = 10.0**-digits
    problem = kind(solver=solver, linear_solver=bilevel.CG(), tolerance=asked(goal, estimates=True))
    result = problem.hypergradient(outer, data, init=START)
    true = exact(problem, outer, data)
    assert float((result.grad - true).norm()) <= goal * float(true.norm())
    assert result.report.goal is not None and result.report.goal.met and bool(result.report.converged)
    assert result.bound.basis is bilevel.Basis.ESTIMATED and not result.certified


@given(st.integers(0, 10_000), st.integers(1, 8))
def test_a_certified_goal_is_met_and_proven(seed: int, digits: int) -> None:
    data, outer = split(seed), torch.linspace(-2, 1, 6, dtype=F64)
    mu, goal = 2 * float(outer.exp().min()), 10.0**-digits
    problem = Ridge(**ITERATIVE, tolerance=asked(goal, strong_convexity=mu))
    result = problem.hypergradient(outer, data, init=START)
    true = exact(problem, outer, data)
    assert result.certified
    assert float((result.grad - true).norm()) <= result.error_bound <= goal * float(true.norm())


def test_an_absolute_goal() -> None:
    data, outer = split(3), torch.linspace(-1, 1, 6, dtype=F64)
    for goal in (1e-2, 1e-6):
        problem = Classifier(**ITERATIVE, tolerance=bilevel.Tolerance(hypergradient=goal, estimates=True))
        error = float((problem.hypergradient(outer, data, init=START).grad - exact(problem, outer, data)).norm())
        assert error <= goal


@given(st.integers(0, 10_000), st.sampled_from([0.1, 0.5, 0.9]))
def test_a_descent_goal_gives_a_descent_direction(seed: int, eta: float) -> None:
    data, outer = split(seed), torch.linspace(-2, 1, 6, dtype=F64)
    mu = 2 * float(outer.exp().min())
    problem = Ridge(**ITERATIVE, tolerance=bilevel.Tolerance(descent=eta, strong_convexity=mu))
    found = problem.hypergradient(outer, data, init=START).grad
    assert float(found @ exact(problem, outer, data)) >= eta * float(found @ found)


@pytest.mark.counts
def test_it_costs_far_less_than_a_tight_solve_and_more_accuracy_costs_more() -> None:
    scale, start = torch.logspace(0, -1.5, 40, dtype=F64), torch.zeros(40, dtype=F64)
    X, y, Xv, yv = split(1, n=40)
    data, outer = (X * scale, y, Xv * scale, yv), torch.linspace(-5, -3, 40, dtype=F64)
    with passes() as tight:
        fixed = Classifier(**ITERATIVE, tolerance=bilevel.Tolerance(1e-10, 1e-10))
        fixed.hypergradient(outer, data, init=start)
    counts = []
    for goal in (1e-1, 1e-3, 1e-8):
        with passes() as counted:
            Classifier(**ITERATIVE, tolerance=asked(goal, estimates=True)).hypergradient(outer, data, init=start)
        counts.append(counted.count)
    assert counts[0] < counts[1] < counts[2]
    assert counts[1] <= 0.6 * tight.count


def test_the_residuals_that_are_reported_are_the_true_ones() -> None:
    # The solves end on recurrences: what is reported comes from passes at the end.
    data, outer = split(6, dtype=torch.float32), torch.linspace(-2, 1, 6)
    for kind, goal in ((Classifier, 1e-1), (Classifier, 1e-3), (Ridge, 1e-3)):
        problem = kind(**ITERATIVE, tolerance=asked(goal, estimates=True))
        result = problem.hypergradient(outer, data, init=torch.zeros(6))
        inner, q, wide = result.inner.double(), result.adjoint.double(), tuple(part.double() for part in data)
        theta = outer.double()
        slope = torch.func.grad(problem.inner_objective)(inner, theta, wide)
        v = torch.func.grad(problem.outer_objective)(inner, theta, wide)
        rho = v - torch.func.hessian(problem.inner_objective)(inner, theta, wide) @ q
        rounding = 1e-5 * float(v.norm())
        forward, backward = result.report.forward, result.report.backward
        assert float(backward.residual_norm) == pytest.approx(float(rho.norm()), rel=1e-2, abs=rounding)
        assert float(forward.residual_norm) == pytest.approx(float(slope.norm()), rel=1e-2, abs=1e-4)


def test_a_guess_that_is_no_good_costs_passes_and_not_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    (X, y, Xv, yv), outer = split(7, n=30), torch.linspace(-3, -1, 30, dtype=F64)
    scale = torch.logspace(0, -1.5, 30, dtype=F64)
    data = (X * scale, y, Xv * scale, yv)
    true = exact(Classifier(), outer, data)
    for factor in (-1.0, 1e3):
        monkeypatch.setattr(SecantPairs, "guess", lambda self, r, factor=factor: factor * r)
        for goal in (1e-1, 1e-4):
            problem = Classifier(**ITERATIVE, tolerance=asked(goal, estimates=True))
            error = (problem.hypergradient(outer, data, init=torch.zeros(30, dtype=F64)).grad - true).norm()
            assert float(error) <= goal * float(true.norm())


def test_the_default_solvers_and_functions_of_ones_own_reach_goals_too() -> None:
    data, outer = split(2), torch.linspace(-1, 1, 6, dtype=F64)

    def jacobi(operator, rhs):
        diagonal = operator.dense().diagonal(dim1=-2, dim2=-1)
        x = rhs / (2 * diagonal)
        for _ in range(30):
            x = x + (rhs - operator.matvec(x)) / (2 * diagonal)
        return x

    for chosen in ({}, {"linear_solver": jacobi}, {"linear_solver": bilevel.CG(2), "solver": bilevel.Newton()}):
        problem = Classifier(**chosen, tolerance=asked(1e-6, estimates=True))
        true = exact(problem, outer, data)
        error = (problem.hypergradient(outer, data, init=START).grad - true).norm()
        assert float(error) <= 1e-6 * float(true.norm()), chosen


def test_a_batch_of_problems_shares_a_goal() -> None:
    members = [split(seed) for seed in range(3)]
    X, y = (torch.stack([member[i] for member in members]) for i in (0, 1))
    Xv, yv = members[0][2:]
    outer = torch.linspace(-1, 1, 6, dtype=F64)
    problem = Classifier(**ITERATIVE, batch_dims=(0, 0, None, None), tolerance=asked(1e-4, estimates=True))
    result = problem.hypergradient(outer, (X, y, Xv, yv), init=torch.zeros(3, 6, dtype=F64))
    true = torch.stack([exact(problem, outer, (X[k], y[k], Xv, yv)) for k in range(3)]).mean(0)
    assert float((result.grad - true).norm()) <= 1e-4 * float(true.norm())
    assert result.inner.shape == result.adjoint.shape == (3, 6)
    assert result.report.forward.iterations.shape == (3,) and bool(result.report.converged.all())
    # The corrected value's error is of second order: far below the first-order error of the value.
    fresh = torch.stack([_value(problem, outer, (X[k], y[k], Xv, yv)) for k in range(3)]).mean()
    assert abs(float(result.corrected_value - fresh)) <= 10 * result.value_bound.value + 1e-12


def _value(problem: Ridge, outer: torch.Tensor, data: tuple[torch.Tensor, ...]) -> torch.Tensor:
    inner = oracles.newton_argmin(problem.inner_objective, START, outer, data, steps=12)
    return problem.outer_objective(inner, outer, data)


def test_the_next_hypergradient_begins_where_the_last_one_ended() -> None:
    data, outer = split(4), torch.linspace(-1, 1, 6, dtype=F64)
    problem = Classifier(**ITERATIVE, tolerance=asked(1e-3, estimates=True))
    with passes() as cold:
        problem.hypergradient(outer, data, init=START)
    with passes() as warm:
        near = problem.hypergradient(outer + 1e-3, data)
    assert warm.count < 0.6 * cold.count
    true = exact(problem, outer + 1e-3, data)
    assert float((near.grad - true).norm()) <= 1e-3 * float(true.norm())
    twin = copy.deepcopy(problem)
    torch.testing.assert_close(twin.hypergradient(outer, data).grad, problem.hypergradient(outer, data).grad)
    problem.reset()
    with pytest.raises(bilevel.ArgumentError, match="override initial"):
        problem.hypergradient(outer, data)


def test_what_is_not_measured_again_is_not_trusted_the_more() -> None:
    """A goal that the warm start meets already teaches nothing; the error that it reports must not fade away for that."""
    data, outer = split(8), torch.full((6,), -1.0, dtype=F64)
    problem = Classifier(tolerance=bilevel.Tolerance(descent=0.5, estimates=True), **ITERATIVE)
    g = exact(problem, outer, data)
    problem.hypergradient(outer, data, init=START)
    for _ in range(40):
        result = problem.hypergradient(outer, data)
        assert result.error_bound >= float((result.grad - g).norm())


def test_a_proof_without_constants_is_refused_and_an_estimate_is_not_a_proof() -> None:
    problem = Classifier(**ITERATIVE, tolerance=asked(1e-3))
    with pytest.raises(bilevel.ArgumentError, match="estimates=True"):
        problem.hypergradient(torch.zeros(6, dtype=F64), split(), init=START)


def test_the_end_of_the_dtype_is_a_status_with_a_sentence() -> None:
    data, outer = split(0, dtype=torch.float32), torch.linspace(-2, 1, 6)
    start = torch.zeros(6)

    def problem(policy: str) -> Classifier:
        return Classifier(**ITERATIVE, tolerance=asked(1e-12, estimates=True), on_failure=policy)

    with pytest.raises(bilevel.SolveError, match="this dtype permits: use float64"):
        problem("raise").hypergradient(outer, data, init=start)
    with pytest.warns(bilevel.SolveWarning, match="allows"):
        problem("warn").hypergradient(outer, data, init=start)
    assert bool(problem("nan").hypergradient(outer, data, init=start).grad.isnan().all())
    result = problem("ignore").hypergradient(outer, data, init=start)
    goal = result.report.goal
    assert goal.status is bilevel.Status.STAGNATED and not goal.met and goal.error > goal.allowed
    assert "goal" in str(type(result.report).__doc__) and goal.message in str(result.report)
    true = exact(problem("ignore"), outer.double(), tuple(part.double() for part in data))
    assert float((result.grad.double() - true).norm()) <= 1e-3 * float(true.norm())


def test_who_is_in_float64_is_not_told_to_use_it() -> None:
    problem = Classifier(**ITERATIVE, tolerance=asked(1e-25, estimates=True))
    with pytest.raises(bilevel.SolveError, match="this dtype permits: rescale the problem"):
        problem.hypergradient(torch.linspace(-2, 1, 6, dtype=F64), split(0), init=START)


def test_negative_curvature_and_nan_are_said() -> None:
    class Saddle(Ridge):
        def inner_objective(self, inner, outer, data):
            return super().inner_objective(inner, outer, data) - 1e3 * inner[0] ** 2

    outer = torch.zeros(6, dtype=F64)
    still = Saddle(
        solver=lambda objective, init, *args: init, linear_solver=bilevel.CG(), tolerance=asked(1e-3, estimates=True)
    )
    with pytest.raises(bilevel.SolveError, match="negative curvature"):
        still.hypergradient(outer, split(), init=START)
    with pytest.raises(bilevel.SolveError, match="NaN"):
        Ridge(**ITERATIVE, tolerance=asked(1e-3, estimates=True)).hypergradient(
            outer * float("nan"), split(), init=START
        )


class Network(bilevel.BilevelProblem):
    """A tanh network with a weak ridge: not convex where the inner solver's first stretch ends."""

    def predicted(self, weights, X):
        return torch.tanh(X @ weights["W"].T + weights["b"]) @ weights["a"]

    def inner_objective(self, inner, outer, data):
        X, y, _, _ = data
        return ((self.predicted(inner, X) - y) ** 2).mean() + 0.5 * outer.exp() * sum(
            (part**2).sum() for part in inner.values()
        )

    def outer_objective(self, inner, outer, data):
        _, _, X, y = data
        return ((self.predicted(inner, X) - y) ** 2).mean()


def network(seed: int, hidden: int = 8):
    """Return weights to begin from, and data."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=F64)

    X, Xv = draw(30, 2), draw(30, 2)
    init = {"W": draw(hidden, 2), "b": draw(hidden), "a": draw(hidden)}
    return init, (X, torch.sin(2 * X.sum(1)), Xv, torch.sin(2 * Xv.sum(1)))


def gradient_near(problem: Network, inner: dict[str, torch.Tensor], outer: torch.Tensor, data: object) -> torch.Tensor:
    """Return g at the minimum next to ``inner`` by dense Newton steps and a dense solve."""
    names, shapes = list(inner), [leaf.shape for leaf in inner.values()]

    def rebuilt(flat):
        parts = torch.split(flat, [shape.numel() for shape in shapes])
        return {name: part.reshape(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}

    def objective(flat, outer):
        return problem.inner_objective(rebuilt(flat), outer, data)

    flat = torch.cat([leaf.reshape(-1) for leaf in inner.values()])
    for _ in range(20):
        curve = torch.func.hessian(objective)(flat, outer)
        flat = flat - torch.linalg.solve(curve, torch.func.grad(objective)(flat, outer))
    assert float(torch.func.grad(objective)(flat, outer).norm()) < 1e-12
    curve = torch.func.hessian(objective)(flat, outer)
    assert float(torch.linalg.eigvalsh(curve)[0]) > 0
    v = torch.func.grad(lambda flat: problem.outer_objective(rebuilt(flat), outer, data))(flat)
    cross = torch.func.jacrev(torch.func.grad(objective), argnums=1)(flat, outer)
    return -torch.linalg.solve(curve, v) @ cross


@pytest.mark.parametrize("linear_solver", [bilevel.CG(), bilevel.Exact()])
@pytest.mark.parametrize("goal", [{"hypergradient": 0.1, "relative": True}, {"descent": 0.5}])
def test_a_goal_is_met_where_the_first_stretch_ends_at_negative_curvature(linear_solver, goal) -> None:
    (init, data), outer = network(0), torch.tensor(-3.0, dtype=F64)
    tolerance = bilevel.Tolerance(**goal, estimates=True)
    problem = Network(solver=bilevel.LBFGS(max_steps=3000), linear_solver=linear_solver, tolerance=tolerance)
    result = problem.hypergradient(outer, data, init=init)
    assert result.report.goal is not None and result.report.goal.met
    true = gradient_near(problem, result.inner, outer, data)
    assert float((result.grad - true).abs()) <= (0.5 if "descent" in goal else 0.1) * float(true.abs())


def test_where_a_goal_cannot_be_met_the_remedy_named_works() -> None:
    (init, data), outer = network(0), torch.tensor(-3.0, dtype=F64)
    tolerance = asked(0.1, estimates=True)
    short = Network(solver=bilevel.LBFGS(max_steps=4), linear_solver=bilevel.CG(), tolerance=tolerance)
    with pytest.raises(bilevel.SolveError, match=r"error is not known .* negative curvature.*: raise max_steps"):
        short.hypergradient(outer, data, init=init)
    longer = Network(solver=bilevel.LBFGS(max_steps=3000), linear_solver=bilevel.CG(), tolerance=tolerance)
    assert longer.hypergradient(outer, data, init=init).report.goal.met

    class Well(bilevel.BilevelProblem):
        """A double well whose middle is a maximum."""

        def inner_objective(self, inner, outer, data):
            return ((inner**2 - 1) ** 2).sum() - outer * inner.sum()

        def outer_objective(self, inner, outer, data):
            return (inner - 2).square().sum()

    middle = torch.zeros(1, dtype=F64)
    settings = {"solver": bilevel.LBFGS(), "linear_solver": bilevel.CG(), "tolerance": asked(0.1, estimates=True)}
    zero = torch.zeros((), dtype=F64)
    with pytest.raises(bilevel.SolveError, match=r"saddle or a maximum.*: start elsewhere"):
        Well(**settings).hypergradient(zero, None, init=middle)
    elsewhere = Well(**settings).hypergradient(zero, None, init=middle + 0.5)
    assert float(elsewhere.grad) == pytest.approx(2 * (1 - 2) / 8, rel=0.1)


def test_backward_of_the_loss_hands_on_the_promised_gradient() -> None:
    data, outer = split(5), torch.linspace(-1, 1, 6, dtype=F64)
    problem = Classifier(**ITERATIVE, warm_start=False, tolerance=asked(1e-4, estimates=True))
    reference = problem.hypergradient(outer, data, init=START)
    free = outer.clone().requires_grad_(True)
    loss = problem(free, data, init=START)
    (3 * loss).backward()
    torch.testing.assert_close(free.grad, 3 * reference.grad)
    torch.testing.assert_close(loss.detach(), reference.value)
    with torch.no_grad():
        torch.testing.assert_close(problem(outer, data, init=START), _value(problem, outer, data))
    with pytest.raises(bilevel.TransformError, match="create_graph"):
        torch.autograd.grad(problem(free, data, init=START), free, create_graph=True)
    with pytest.raises(bilevel.TransformError, match="no transform"):
        torch.func.grad(lambda outer: problem(outer, data, init=START))(outer)
    with pytest.raises(bilevel.ArgumentError, match="data not to require grad"):
        problem(free, (data[0].clone().requires_grad_(True), *data[1:]), init=START)


class Quadratic(bilevel.BilevelProblem):
    """Newton's method leads to the last digits in one step, after which no step shows how the hypergradient changes."""

    def inner_objective(self, inner, outer, data):
        return 0.5 * inner @ data @ inner - inner @ outer

    def outer_objective(self, inner, outer, data):
        return 0.5 * ((inner - 1) ** 2).sum() + outer[0]


class Linear(Quadratic):
    def outer_objective(self, inner, outer, data):
        return inner.sum() + (outer**2).sum()


class Direct(Quadratic):
    def outer_objective(self, inner, outer, data):
        return (outer**2).sum() + 0 * inner.sum()


@pytest.mark.parametrize("kind", [Quadratic, Linear, Direct])
def test_a_solve_that_ends_in_the_last_digits_at_once_meets_goals(kind: type[Quadratic]) -> None:
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        outer, data = (torch.randn(s, dtype=F64, generator=generator) for s in ((6,), (6, 6)))
        data = data @ data.T + torch.eye(6, dtype=F64)
        free = outer.clone().requires_grad_(True)
        problem = kind(tolerance=bilevel.Tolerance(hypergradient=1e-8, estimates=True))
        solution = torch.linalg.solve(data, free)
        (g,) = torch.autograd.grad(problem.outer_objective(solution, free, data), free)
        for init in (torch.zeros(6, dtype=F64), solution.detach(), None):
            result = problem.hypergradient(outer, data, init=init)
            # Of a gradient that does not depend on φ nothing but rounding is left.
            assert float((result.grad - g).norm()) <= max(result.error_bound, 1e-13) and result.error_bound <= 1e-8


@pytest.mark.parametrize("kind", [Quadratic, Linear, Direct])
def test_a_solve_that_begins_at_the_solution_meets_goals(kind: type[Quadratic]) -> None:
    problem = kind(tolerance=bilevel.Tolerance(hypergradient=1e-8, estimates=True), linear_solver=bilevel.CG())
    data, zero = torch.diag(torch.arange(1.0, 41.0, dtype=F64)), torch.zeros(40, dtype=F64)
    result = problem.hypergradient(zero, data, init=zero)  # where ∇G is zero exactly
    free = zero.clone().requires_grad_(True)
    (g,) = torch.autograd.grad(problem.outer_objective(free / data.diagonal(), free, data), free)
    assert float((result.grad - g).norm()) <= max(result.error_bound, 1e-13) and result.error_bound <= 1e-8


def test_goals_are_refused_where_they_mean_nothing() -> None:
    goal = asked(1e-3, estimates=True)
    with pytest.raises(bilevel.ArgumentError, match="no outer loss"):
        bilevel.argmin(lambda x, a: ((x - a) ** 2).sum(), tolerance=goal)
    with pytest.raises(bilevel.ArgumentError, match="no outer loss"):
        bilevel.linear_solve(lambda x, a: a * x, tolerance=goal)
    learner = bilevel.IMAML(torch.nn.Linear(2, 1), torch.nn.functional.mse_loss, tolerance=goal)
    x, y = torch.randn(2, 4, 2), torch.randn(2, 4, 1)
    with pytest.raises(bilevel.ArgumentError, match="hypergradient\\(batch\\)"):
        learner((x, y, x, y))
    assert learner.hypergradient((x, y, x, y)).report.goal.met


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hypergradient": 1e-3, "descent": 0.5}, "one goal"),
        ({"descent": 1.0}, "descent in"),
        ({"relative": True}, "expected hypergradient"),
        ({"estimates": True}, "got neither"),
        ({"hypergradient": 1e-3, "delta": 1e-3}, "the goal chooses"),
        ({"hypergradient": -1.0}, "hypergradient > 0"),
        ({"hypergradient": 1e-3, "stationary": 1e-3}, "leave stationary out"),
        ({"stationary": 1e-3}, "leave stationary out"),
        ({"descent": 0.5, "stationary": 0.0}, "stationary > 0"),
    ],
)
def test_goals_that_make_no_sense_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(bilevel.ArgumentError, match=message):
        bilevel.Tolerance(**settings)


def test_what_a_goal_allows() -> None:
    assert bilevel.Tolerance(hypergradient=2.0).allowed(100.0) == 2.0
    assert bilevel.Tolerance(hypergradient=1.0, relative=True).allowed(4.0) == 2.0
    assert bilevel.Tolerance(descent=0.25).allowed(4.0) == 3.0
    assert bilevel.Tolerance(descent=0.25, stationary=8.0).allowed(4.0) == 4.0
    assert bilevel.Tolerance(descent=0.25, stationary=5.0).allowed(4.0) == 3.0
    assert bilevel.Tolerance(hypergradient=1.0, relative=True, stationary=1.0).allowed(0.125) == 0.875
    assert repr(bilevel.Tolerance(descent=0.5, stationary=0.1)) == "Tolerance(descent=0.5, stationary=0.1)"
    assert not bilevel.Tolerance().has_goal


def test_schedules_have_the_numbers_of_the_paper() -> None:
    for k in (1, 2, 7, 50):
        assert bilevel.QuadraticSchedule()(k).delta == pytest.approx(0.1 / k**2, rel=1e-15)
        assert bilevel.CubicSchedule()(k).delta_prime == pytest.approx(0.1 / k**3, rel=1e-15)
        assert bilevel.ExponentialSchedule()(k).delta == pytest.approx(0.1 * 0.9**k, rel=1e-15)
    assert bilevel.ExponentialSchedule(least=1e-6)(1000).delta == 1e-6
    assert bilevel.CubicSchedule(strong_convexity=2.0)(1).strong_convexity == 2.0
    with pytest.raises(bilevel.ArgumentError, match="starts at 1"):
        bilevel.QuadraticSchedule()(0)
    with pytest.raises(bilevel.ArgumentError, match="rate"):
        bilevel.ExponentialSchedule(rate=1.0)


def test_secants_invert_a_matrix_on_the_span_of_its_products() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(2, 8, 8, generator=generator, dtype=F64)
    matrix = root @ root.mT + torch.eye(8, dtype=F64)
    operator, secants = RecordedOperator(DenseOperator(matrix, symmetric=True)), SecantPairs()
    rhs = torch.randn(2, 8, generator=generator, dtype=F64)
    x = bilevel.CG()(operator, rhs, bilevel.Tolerance(1e-13, 1e-13))
    operator.tell(secants)
    torch.testing.assert_close(secants(rhs), x, atol=1e-9, rtol=1e-9)
    dense = torch.stack([secants(unit.expand(2, 8)) for unit in torch.eye(8, dtype=F64)], -1)
    torch.testing.assert_close(dense, dense.mT, atol=1e-9, rtol=1e-9)
    assert float(torch.linalg.eigvalsh(0.5 * (dense + dense.mT)).min()) > 0
    # What was multiplied serves another right-hand side: on its span at once, and without a product.
    other = torch.randn(2, 8, generator=generator, dtype=F64)
    part = RecordedOperator(DenseOperator(matrix, symmetric=True))
    unused, rest = part.on_span(other)
    assert bool((unused == 0).all()) and torch.equal(rest, other)
    vectors = torch.randn(3, 2, 8, generator=generator, dtype=F64)
    for vector in (*vectors, vectors[0], 0 * vectors[0]):  # one twice, and one of no use
        part.matvec(vector)
    found, rest = part.on_span(other)
    torch.testing.assert_close(rest, other - torch.einsum("kij,kj->ki", matrix, found), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(
        torch.einsum("vkn,kn->vk", vectors, rest), torch.zeros(3, 2, dtype=F64), atol=1e-8, rtol=0
    )
    assert bool((rest.norm(dim=-1) > 0.1).all())
    assert bool((SecantPairs().guess(other) == 0).all())
    torch.testing.assert_close(secants.guess(rhs), x, atol=1e-9, rtol=1e-9)
    before = len(secants.pairs)
    secants.add(rhs, -rhs)  # negative curvature is no secant of a positive definite matrix
    assert len(secants.pairs) == before


def test_pairs_of_one_matrix_serve_any_right_hand_side_and_contradicting_pairs_none() -> None:
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(2, 8, 8, generator=generator, dtype=F64)
    matrix = root @ root.mT + torch.eye(8, dtype=F64)
    steps, rhs = torch.randn(5, 2, 8, generator=generator, dtype=F64), torch.randn(2, 8, generator=generator, dtype=F64)
    exact, bent = SecantPairs(), SecantPairs()
    for number, step in enumerate(steps):
        exact.add(step, torch.einsum("kij,kj->ki", matrix, step))
        bent.add(step, (1.0 + number) * torch.einsum("kij,kj->ki", matrix, step))
    step, rest = exact.fit(rhs)
    torch.testing.assert_close(rest, rhs - torch.einsum("kij,kj->ki", matrix, step), atol=1e-9, rtol=1e-9)
    images = torch.einsum("kij,vkj->kiv", matrix, steps)
    least = torch.linalg.lstsq(images, rhs.unsqueeze(-1)).solution
    torch.testing.assert_close(rest, rhs - (images @ least).squeeze(-1), atol=1e-8, rtol=1e-8)
    assert bool((bent.fit(rhs)[0] == 0).all())
    unknown, whole = SecantPairs().fit(rhs)
    assert bool((unknown == 0).all()) and torch.equal(whole, rhs)


def test_products_that_come_with_pullbacks_give_both_on_their_span() -> None:
    generator = torch.Generator().manual_seed(2)
    root, cross = (torch.randn(shape, generator=generator, dtype=F64) for shape in ((8, 8), (8, 2)))
    matrix, rhs = root @ root.T + torch.eye(8, dtype=F64), torch.randn(1, 8, generator=generator, dtype=F64)
    operator = JointOperator(DenseOperator(matrix[None], symmetric=True), lambda v: (v @ matrix, (v @ cross)[0]))
    for vector in torch.randn(45, 1, 8, generator=generator, dtype=F64):  # more than are kept
        operator.matvec(vector)
    x, rest, pulled = operator.solve_on_span(rhs)
    torch.testing.assert_close(x, torch.linalg.solve(matrix, rhs[0])[None], atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(pulled, x[0] @ cross, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(rest, rhs - x @ matrix, atol=1e-8, rtol=1e-8)
    few = JointOperator(DenseOperator(matrix[None], symmetric=True), lambda v: (v @ matrix, (v @ cross)[0]))
    first = few.conjugate(rhs)
    few.matvec(first)
    assert torch.equal(first, rhs)
    assert abs(float((few.conjugate(x) @ matrix @ rhs[0])[0])) < 1e-9 * float((x @ matrix @ rhs[0])[0].abs() + 1)


def one_strength(n: int = 30) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], torch.Tensor]:
    """Return θ, a single number, with data whose columns are of many scales, and a start."""
    (X, y, Xv, yv), scale = split(9, n=n), torch.logspace(0, -1, n, dtype=F64)
    return torch.tensor(-2.0, dtype=F64), (X * scale, y, Xv * scale, yv), torch.zeros(n, dtype=F64)


@pytest.mark.counts
@pytest.mark.parametrize("kind", [Ridge, Classifier])
def test_one_outer_variable_takes_fewer_passes_where_it_is_followed(kind: type[Ridge], monkeypatch) -> None:
    outer, data, start = one_strength()
    true, counts = exact(kind(), outer, data), []
    for few in (bilevel.problems.adaptive.search._FEW, 0):
        monkeypatch.setattr(bilevel.problems.adaptive.search, "_FEW", few)
        with passes() as counted:
            for goal in (1e-1, 1e-2, 1e-4):
                problem = kind(**ITERATIVE, tolerance=asked(goal, estimates=True))
                result = problem.hypergradient(outer, data, init=start)
                assert float((result.grad - true).abs()) <= goal * float(true.abs())
                q = result.adjoint
                v = torch.func.grad(problem.outer_objective)(result.inner, outer, data)
                rho = v - torch.func.hessian(problem.inner_objective)(result.inner, outer, data) @ q
                assert float(result.report.backward.residual_norm) == pytest.approx(
                    float(rho.norm()), rel=1e-6, abs=1e-12
                )
        counts.append(counted.count)
    # Of a Hessian that changes, what a step shows is too little for the lesser caution of following.
    assert counts[0] < counts[1] if kind is Ridge else counts[0] == counts[1]


def test_changes_that_vanish_for_a_while_do_not_end_a_goal() -> None:
    # θ acts at one end of a chain and F looks at the other: the first products of the adjoint's solve do not reach θ at all.
    n = 24

    class Chain(bilevel.BilevelProblem):
        def inner_objective(self, inner, outer, data):
            return 0.5 * (inner.diff() ** 2).sum() + 0.05 * (inner**2).sum() - outer[0] * inner[-1] - 0.1 * inner.sum()

        def outer_objective(self, inner, outer, data):
            return 0.5 * (inner[0] - 3) ** 2 + 0.01 * outer[0] ** 2

    outer, start = torch.tensor([1.5], dtype=F64), torch.zeros(n, dtype=F64)
    free = outer.clone().requires_grad_(True)
    matrix = torch.func.hessian(lambda x: Chain().inner_objective(x, outer, None))(start)
    unit = torch.eye(n, dtype=F64)[-1]
    inner = torch.linalg.solve(matrix, free[0] * unit + 0.1)
    (g,) = torch.autograd.grad(Chain().outer_objective(inner, free, None), free)
    for goal in (1e-1, 1e-3):
        problem = Chain(**ITERATIVE, tolerance=asked(goal, estimates=True))
        error = problem.hypergradient(outer, None, init=start).grad - g
        assert float(error.norm()) <= goal * float(g.norm())


def test_an_estimate_from_changes_keeps_a_part_of_the_bound_by_norms() -> None:
    known = SearchState(nu=2.0, pull=3.0, pulls=1)
    model = SimpleNamespace(known=known, caution=lambda here, numbers: 100.0 if numbers == 1 else 1.5)
    here = SimpleNamespace(x=START, v=START, direct=torch.zeros(1, dtype=F64), left=0.1, changes=[5.0, 0.0, 0.0, 0.0])
    vanished = ErrorModel.linear_share(model, here)
    assert 0.1 * known.nu * known.pull * here.left < vanished < known.nu * known.pull * here.left
    here.changes = [0.0, 4.0, 0.0]
    assert ErrorModel.linear_share(model, here) == pytest.approx(vanished + 1.5 * 4.0)
    here.left = 0.0  # nothing is left to change
    assert ErrorModel.linear_share(model, here) == 0.0


@pytest.mark.counts
def test_the_step_beyond_the_inner_solver_saves_passes_and_a_bad_one_costs_no_accuracy(monkeypatch) -> None:
    (X, y, Xv, yv), outer = split(7, n=30), torch.linspace(-1, 1, 30, dtype=F64)
    scale, start = torch.logspace(0, -1, 30, dtype=F64), torch.zeros(30, dtype=F64)
    data = (X * scale, y, Xv * scale, yv)
    lr = 0.9 / float(torch.linalg.matrix_norm(data[0], 2) ** 2 + outer.exp().max())
    true, counts, sizes = exact(Ridge(), outer, data), [], []
    plain, descended = SecantPairs.fit, bilevel.problems.adaptive.search.Search._begin

    def begun(self, x, q):
        here = descended(self, x, q)
        sizes.append(here.size / self.model.first)
        return here

    monkeypatch.setattr(bilevel.problems.adaptive.search.Search, "_begin", begun)
    for fit in (plain, lambda self, r: (torch.zeros_like(r), r), lambda self, r: (1e3 * r, 0 * r)):
        monkeypatch.setattr(SecantPairs, "fit", fit)
        problem = Ridge(
            solver=bilevel.GradientDescent(lr, 20_000),
            linear_solver=bilevel.CG(),
            tolerance=asked(1e-2, estimates=True),
        )
        with passes() as counted:
            error = (problem.hypergradient(outer, data, init=start).grad - true).norm()
        assert float(error) <= 1e-2 * float(true.norm())
        counts.append(counted.count)
    assert counts[0] < counts[1] and sizes[0] < 0.5 and sizes[1:] == [1.0, 1.0]


@pytest.mark.parametrize("goal", [1e-5, 1e-8])
def test_a_stretch_that_determines_a_small_problem_meets_goals(goal: float) -> None:
    # Six gradients of a quadratic in five unknowns lead to its last digits, where no step shows what ĝ makes of it.
    for seed in range(6):
        data, outer = split(seed, n=5), torch.tensor(-1.0 - seed, dtype=F64)
        lr = 0.4 / float(torch.linalg.matrix_norm(data[0], 2) ** 2 + 1)
        problem = Ridge(
            solver=bilevel.GradientDescent(lr, 20_000),
            linear_solver=bilevel.CG(),
            tolerance=asked(goal, estimates=True),
        )
        found = problem.hypergradient(outer, data, init=torch.zeros(5, dtype=F64)).grad
        true = exact(problem, outer, data)
        assert float((found - true).abs()) <= goal * float(true.abs())


@pytest.mark.parametrize("goal", [1e-1, 1e-4])
def test_a_goal_is_proven_for_a_model_that_declares_its_constants(goal: float) -> None:
    from bilevel.hyperopt.linear_models import Logistic, WeightedData

    model, (X, y, Xv, yv) = Logistic(6), split(8)
    rows, ones = torch.cat([X, Xv]), torch.ones(30, dtype=F64)
    training = torch.cat([ones, torch.zeros(20, dtype=F64)])
    data = WeightedData(rows, (torch.cat([y, yv]) > 0).double(), training, 1 - training)
    tuning = bilevel.HyperparameterOptimization(
        model.training_objective, model.validation_loss, torch.full((6,), -2.0, dtype=F64), model.initial(),
        solver=bilevel.LBFGS(), linear_solver=bilevel.CG(), tolerance=asked(goal),
    )  # fmt: skip
    result = tuning.hypergradient(data)
    tuning.tolerance = bilevel.Tolerance(
        1e-13, 1e-13
    )  # the bound is within 1e-7 of the error: so has the reference to be
    true = tuning.hypergradient(data).grad
    assert result.certified and result.report.goal.met
    assert float((result.grad - true).norm()) <= result.error_bound <= goal * float(true.norm())


@given(
    st.integers(0, 10_000), st.sampled_from([Ridge, Classifier]), st.sampled_from([torch.float32, F64]), st.booleans()
)
def test_a_goal_of_a_small_problem_is_estimated_after_full_accuracy(
    seed: int, kind: type[Ridge], dtype: torch.dtype, batched: bool
) -> None:
    data, outer = split(seed, dtype=dtype), torch.linspace(-2, 1, 6, dtype=dtype)
    settings = {"batch_dims": 0} if batched else {}
    if batched:
        data = tuple(torch.stack([part, other]) for part, other in zip(data, split(seed + 1, dtype=dtype), strict=True))
    start = torch.zeros((2, 6) if batched else 6, dtype=dtype)
    goal = kind(**settings, tolerance=asked(1e-2, estimates=True)).hypergradient(outer, data, init=start)
    plain = kind(**settings).hypergradient(outer, data, init=start)
    assert torch.equal(goal.grad, plain.grad) and goal.report.goal is not None and goal.report.goal.met
    members = (
        [tuple(part[k].double() for part in data) for k in range(2)] if batched else [tuple(map(Tensor.double, data))]
    )
    true = torch.stack([exact(kind(), outer.double(), member) for member in members]).mean(0)
    assert float((goal.grad.double() - true).norm()) <= goal.error_bound <= goal.report.goal.allowed


def test_a_goal_of_a_problem_that_prepares_its_data_is_met_and_estimated() -> None:
    class Prepared(Classifier):
        def prepare(self, outer, data):
            return (3 * data[0], *data[1:])

    data, outer = split(3), torch.linspace(-0.5, 0.5, 6, dtype=F64)
    true = exact(Classifier(), outer, (3 * data[0], *data[1:]))
    problem, bounds = Prepared(tolerance=asked(1e-6, estimates=True)), []
    for _ in range(3):
        result = problem.hypergradient(outer, data, init=START)
        assert float((result.grad - true).norm()) <= result.error_bound <= 1e-6 * float(true.norm())
        problem.reset()
        bounds.append(result.error_bound)
    assert result.report.forward.solver == "Newton"
    assert bounds[2] == pytest.approx(bounds[0], rel=1e-3)  # replayed evaluations of G know nothing of the preparation


class Scaled(Classifier):
    """Its data are prepared with the outer variables, to the shapes that they have."""

    calls = 0

    def prepare(self, outer, data):
        self.calls += 1
        return (outer.exp().sum() * data[0], *data[1:])


@pytest.mark.parametrize("settings", [{}, ITERATIVE], ids=["small", "search"])
def test_data_are_prepared_once_a_call_and_differentiated_with_a_goal_and_without(settings: dict[str, object]) -> None:
    data, outer = split(3), torch.linspace(-0.5, 0.5, 6, dtype=F64)
    free = outer.clone().requires_grad_(True)
    whole = (free.exp().sum() * data[0], *data[1:])
    inner = oracles.newton_argmin(Classifier().inner_objective, START, free, whole, steps=12)
    true = torch.autograd.grad(Classifier().outer_objective(inner, free, whole), free)[0]
    problem = Scaled(**settings)
    # Each way is replayed from its third call on, and finds what the other has recorded.
    for tolerance in (asked(1e-6, estimates=True), bilevel.Tolerance(), asked(1e-6, estimates=True)):
        problem.tolerance = tolerance
        for _ in range(4):
            before = problem.calls
            result = problem.hypergradient(outer, data, init=START)
            assert float((result.grad - true).norm()) <= 1e-6 * float(true.norm())
            assert problem.calls == before + 1


def test_a_tensor_that_the_preparation_captures_is_found_with_a_goal() -> None:
    scale = torch.tensor(2.0, dtype=F64, requires_grad=True)

    class Capturing(Classifier):
        def prepare(self, outer, data):
            return (scale * data[0], *data[1:])

    problem = Capturing(tolerance=asked(1e-6, estimates=True))
    with pytest.raises(bilevel.CapturedTensorError, match="requires grad"):
        problem.hypergradient(torch.zeros(6, dtype=F64), split(3), init=START)


def test_the_error_of_a_sensitive_hypergradient_is_not_underestimated() -> None:
    class Steep(Classifier):
        def outer_objective(self, inner, outer, data):
            return torch.sin(3000 * inner).sum() + (outer**2).sum()

    data, outer = split(1, dtype=torch.float32), torch.linspace(-2, 1, 6)
    result = Steep(tolerance=bilevel.Tolerance(hypergradient=1e9, estimates=True)).hypergradient(
        outer, data, init=torch.zeros(6)
    )
    true = exact(Steep(), outer.double(), tuple(part.double() for part in data))
    assert float((result.grad.double() - true).norm()) <= result.error_bound


@pytest.mark.counts
def test_a_goal_of_a_small_problem_costs_no_more_than_full_accuracy_and_an_estimate() -> None:
    data, outer = split(1), torch.linspace(-2, 1, 6, dtype=F64)
    counts = []
    for tolerance in (bilevel.Tolerance(), asked(1e-6, estimates=True)):
        with passes() as counted:
            Classifier(tolerance=tolerance).hypergradient(outer, data, init=START)
        counts.append(counted.count)
    assert counts[1] <= counts[0] + 5


def outer_evaluations(problem: bilevel.BilevelProblem, calls: int, outer: Tensor, data: object) -> list[int]:
    """Return how often F is evaluated in each of some calls that begin at the same guess."""
    counts: list[int] = []
    plain = type(problem).outer_objective

    def counted(self, *arguments):
        counts[-1] += 1
        return plain(self, *arguments)

    type(problem).outer_objective = counted
    try:
        for _ in range(calls):
            counts.append(0)
            problem.hypergradient(outer, data, init=START)
    finally:
        type(problem).outer_objective = plain
    return counts


def test_the_error_of_a_small_problem_is_measured_once_and_then_trusted_less_with_each_call() -> None:
    data, outer = split(1), torch.linspace(-2, 1, 6, dtype=F64)
    loose = outer_evaluations(Ridge(tolerance=asked(1e-3, estimates=True)), 4, outer, data)
    assert loose == [2, 1, 1, 1]  # F at the solution, and once beside it
    without = outer_evaluations(Ridge(tolerance=asked(1e-3, estimates=True), warm_start=False), 3, outer, data)
    assert without == [2, 2, 2]
    problem = Ridge(tolerance=asked(1e-3, estimates=True))
    bounds = [problem.hypergradient(outer, data, init=START).error_bound for _ in range(80)]
    assert bounds[0] < bounds[1] < bounds[2] < 2 * bounds[0]
    problem = Ridge(tolerance=bilevel.Tolerance(hypergradient=10 * bounds[0], estimates=True))
    bounds = [problem.hypergradient(outer, data, init=START).error_bound for _ in range(80)]
    assert max(bounds) <= 10 * bounds[0]  # measured again once the goal asks for more than is trusted
    assert bounds[0] in bounds[1:]


def test_what_was_measured_far_away_is_measured_again() -> None:
    class Steep(Ridge):
        def outer_objective(self, inner, outer, data):
            return (data[3].sum() * inner).exp().sum() + (outer**2).sum()

    data, outer = split(1), torch.linspace(-2, 1, 6, dtype=F64)
    flat, steep = ((*data[:3], torch.full((20,), weight, dtype=F64)) for weight in (1e-3, 5.0))
    problem = Steep(tolerance=bilevel.Tolerance(hypergradient=1e9, estimates=True))
    problem.hypergradient(outer, flat, init=START)
    fresh = Steep(tolerance=problem.tolerance).hypergradient(outer, steep, init=START)
    assert problem.hypergradient(outer, steep, init=START).error_bound == pytest.approx(fresh.error_bound, rel=0.1)


@pytest.mark.counts
def test_a_first_call_with_a_goal_records_nothing_and_a_search_is_replayed() -> None:
    data, outer = split(1), torch.linspace(-2, 1, 6, dtype=F64)
    counts = []
    for tolerance in (bilevel.Tolerance(), asked(1e-6, estimates=True)):
        with recordings() as noted:
            Classifier(tolerance=tolerance).hypergradient(outer, data, init=START)
        counts.append(len(noted))
    assert counts == [0, 0]
    problem, counts = Ridge(**ITERATIVE, warm_start=False, tolerance=asked(1e-6, estimates=True)), []
    for _ in range(4):
        with passes() as counted:
            problem.hypergradient(outer, data, init=START)
        counts.append(counted.count)
    assert counts[-1] <= counts[0] / 2


@contextmanager
def recordings() -> Iterator[list[object]]:
    """List the evaluations that are recorded for replays."""
    noted, plain = [], bilevel.replay.cache.note

    def noting(evaluation, *others):
        noted.append(evaluation)
        return plain(evaluation, *others)

    bilevel.replay.cache.note = noting
    try:
        yield noted
    finally:
        bilevel.replay.cache.note = plain


def test_a_goal_of_a_small_problem_fails_as_the_policy_says() -> None:
    data, outer = split(0), torch.linspace(-2, 1, 6, dtype=F64)

    def problem(policy: str, **others: object) -> Classifier:
        return Classifier(tolerance=asked(1e-25, **others), on_failure=policy)

    with pytest.raises(bilevel.SolveError, match="this dtype permits: rescale the problem"):
        problem("raise", estimates=True).hypergradient(outer, data, init=START)
    with pytest.raises(bilevel.ArgumentError, match="estimates=True"):
        problem("raise").hypergradient(outer, data, init=START)
    assert bool(problem("nan", estimates=True).hypergradient(outer, data, init=START).grad.isnan().all())
    result = problem("ignore", estimates=True).hypergradient(outer, data, init=START)
    assert result.report.goal is not None and not result.report.goal.met
    proven = Ridge(tolerance=asked(1e-6, strong_convexity=2 * float(outer.exp().min())))
    assert proven.hypergradient(outer, data, init=START).certified
