"""A call is a value: its solves and all of its derivatives go by the settings that it was made with, whatever comes later."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.func import jacrev, vmap

import bilevel

F64 = torch.float64
SCALES = torch.tensor([1.0, 3.0, 10.0, 30.0], dtype=F64)
TIGHT = bilevel.Tolerance(delta=1e-10, delta_prime=1e-10)
LOOSE = bilevel.Tolerance(delta=1e3, delta_prime=1e3)


def bowl(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """A convex objective that is not quadratic, so that derivatives of every order need a linear solve of several steps."""
    return 0.5 * (SCALES.to(x) * (x - a) ** 2).sum() + 0.05 * ((x - a.flip(0)) ** 4).sum()


class Bowls(bilevel.BilevelProblem):
    """One bowl for each task."""

    def inner_objective(self, inner: Any, outer: Any, data: Any) -> torch.Tensor:
        return bowl(inner, outer * data)

    def outer_objective(self, inner: Any, outer: Any, data: Any) -> torch.Tensor:
        return (inner**2).sum()

    def initial(self, outer: Any, data: Any) -> torch.Tensor:
        return torch.zeros_like(data)


def layer(**settings: Any) -> bilevel.Layer:
    given = {"solver": bilevel.Newton(), "linear_solver": bilevel.CG(), "tolerance": TIGHT, **settings}
    return bilevel.argmin(bowl, **given)


def problem(**settings: Any) -> Bowls:
    given = {"solver": bilevel.Newton(), "linear_solver": bilevel.CG(), "tolerance": TIGHT, "batch_dims": 0, **settings}
    return Bowls(**given)


def outer() -> torch.Tensor:
    return torch.tensor([1.0, -0.5, 2.0, 0.7], dtype=F64, requires_grad=True)


def tasks(count: int, seed: int = 0) -> torch.Tensor:
    return 1 + 0.3 * torch.randn(count, 4, generator=torch.Generator().manual_seed(seed), dtype=F64)


def backward(loss: torch.Tensor, theta: torch.Tensor) -> tuple[torch.Tensor, bilevel.SolveReport]:
    """Return the gradient, and the report of the linear solve."""
    with bilevel.record() as reports:
        (gradient,) = torch.autograd.grad(loss, theta)
    return gradient, reports.backward[-1]


def same_threshold(report: bilevel.SolveReport, other: bilevel.SolveReport) -> None:
    torch.testing.assert_close(report.threshold, other.threshold, rtol=1e-6, atol=0)


@pytest.mark.parametrize("later", [2, 1, 1000])
def test_a_call_with_fewer_tasks_does_not_loosen_an_earlier_one(later: int) -> None:
    theta = outer()
    expected, runs_plainly = backward(problem()(theta, tasks(100)), theta)
    tuned = problem(warm_start=False)
    first = tuned(theta, tasks(100))
    tuned(theta, tasks(later))
    gradient, report = backward(first, theta)
    same_threshold(report, runs_plainly)
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-12)


def test_a_hypergradient_with_fewer_tasks_does_not_loosen_an_earlier_call() -> None:
    theta = outer()
    _, runs_plainly = backward(problem()(theta, tasks(100)), theta)
    tuned = problem(warm_start=False)
    first = tuned(theta, tasks(100))
    tuned.hypergradient(theta, tasks(2))
    same_threshold(backward(first, theta)[1], runs_plainly)


def test_a_goal_that_is_met_in_between_is_not_the_tolerance_of_an_earlier_call() -> None:
    theta = outer()
    tuned = problem(warm_start=False)
    first = tuned(theta, tasks(3))
    expected, runs_plainly = backward(tuned(theta, tasks(3)), theta)
    tuned.tolerance = bilevel.Tolerance(hypergradient=0.5, estimates=True)
    tuned.hypergradient(theta, tasks(3))
    gradient, report = backward(first, theta)
    same_threshold(report, runs_plainly)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(("made_with", "set_later"), [(TIGHT, LOOSE), (LOOSE, TIGHT)])
def test_the_tolerance_of_a_layer_is_that_of_the_call(
    made_with: bilevel.Tolerance, set_later: bilevel.Tolerance
) -> None:
    theta = outer()
    expected, runs_plainly = backward(layer(tolerance=made_with)(torch.zeros(4, dtype=F64), theta).sum(), theta)
    changed = layer(tolerance=made_with)
    x = changed(torch.zeros(4, dtype=F64), theta)
    changed.tolerance = set_later
    gradient, report = backward(x.sum(), theta)
    assert int(report.iterations) == int(runs_plainly.iterations)
    same_threshold(report, runs_plainly)
    torch.testing.assert_close(gradient, expected)


def test_the_tolerance_of_a_problem_is_that_of_the_call() -> None:
    theta, tuned = outer(), problem()
    expected, runs_plainly = backward(problem()(theta, tasks(3)), theta)
    loss = tuned(theta, tasks(3))
    tuned.tolerance = LOOSE
    gradient, report = backward(loss, theta)
    same_threshold(report, runs_plainly)
    torch.testing.assert_close(gradient, expected)
    assert float(backward(tuned(theta, tasks(3)), theta)[1].threshold.min()) > 1.0  # the next call has what was set


@pytest.mark.parametrize("make", [layer, problem])
def test_the_linear_solver_is_that_of_the_call(make: Callable[..., Any]) -> None:
    theta, changed = outer(), make()
    if make is problem:
        changed.warm_start = False
    loss = called(changed, theta)
    changed.linear_solver = bilevel.Neumann(terms=1, step=1e-6)  # wrong by far
    gradient, report = backward(loss, theta)
    assert report.solver == "CG"
    torch.testing.assert_close(gradient, backward(called(make(), theta), theta)[0])
    with pytest.raises(bilevel.SolveError, match="Neumann"):
        backward(called(changed, theta), theta)


@pytest.mark.parametrize("make", [layer, problem])
@pytest.mark.parametrize(
    ("policy", "later"), [("ignore", "raise"), ("nan", "ignore"), ("ignore", "nan"), ("raise", "ignore")]
)
def test_the_policy_is_that_of_the_call(make: Callable[..., Any], policy: str, later: str) -> None:
    theta, changed = outer(), make(linear_solver=bilevel.CG(max_steps=1), on_failure=policy)
    loss = called(changed, theta)
    changed.on_failure = later
    if policy == "raise":
        with pytest.raises(bilevel.SolveError, match="the backward solve"):
            backward(loss, theta)
    else:
        gradient, _ = backward(loss, theta)
        assert bool(torch.isnan(gradient).all()) == (policy == "nan")
        assert bool(torch.isfinite(gradient).all()) == (policy == "ignore")


def called(made: Any, theta: torch.Tensor) -> torch.Tensor:
    """Return a scalar of one call of a layer or a problem."""
    if isinstance(made, Bowls):
        return made(theta, tasks(3))
    return (made(torch.zeros(4, dtype=F64), theta) ** 2).sum()


@pytest.mark.parametrize("make", [layer, problem])
def test_settings_are_checked_when_they_are_set(make: Callable[..., Any]) -> None:
    made = make()
    for name, wrong, message in (
        ("solver", bilevel.LBFGS, "an instance"),
        ("linear_solver", "cg", "expected linear_solver"),
        ("tolerance", 1e-3, "a bilevel.Tolerance"),
        ("on_failure", "explode", "'raise', 'warn'"),
    ):
        before = getattr(made, name)
        with pytest.raises(bilevel.ArgumentError, match=message):
            setattr(made, name, wrong)
        assert getattr(made, name) is before
    made.solver = bilevel.LBFGS()
    theta = outer()
    with bilevel.record() as reports:
        called(made, theta)
    assert reports.forward[0].solver == "LBFGS"
    made.solver = made.linear_solver = None
    with bilevel.record() as reports:
        called(made, theta)
    assert reports.forward[0].solver == "Newton"


def test_a_solver_that_is_a_module_can_be_set() -> None:
    class Given(torch.nn.Module):
        def forward(self, objective: Any, init: torch.Tensor, outer: Any, data: Any) -> torch.Tensor:
            return bilevel.argmin(objective, tolerance=TIGHT)(init, outer, data)

    tuned = Bowls(tolerance=TIGHT)
    tuned.solver = Given()
    with bilevel.record() as reports:
        tuned(outer(), tasks(1)[0])
    assert reports.forward[-1].solver == "Given" and "solver" not in dict(tuned.named_modules())


def test_a_linear_layer_goes_by_the_settings_of_its_call() -> None:
    solve = bilevel.linear_solve(
        lambda x, d: SCALES * x * d, linear_solver=bilevel.CG(), tolerance=TIGHT, symmetric=True
    )
    d = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64, requires_grad=True)
    x = solve(torch.ones(4, dtype=F64), d)
    solve.linear_solver, solve.tolerance, solve.on_failure = bilevel.CG(max_steps=1), LOOSE, "nan"
    gradient, report = backward(x.sum(), d)
    assert int(report.iterations) > 1
    torch.testing.assert_close(gradient, -1 / (SCALES * d.detach() ** 2), rtol=1e-8, atol=0)


def test_the_second_derivative_goes_by_the_settings_of_the_call() -> None:
    theta, changed = outer(), layer()
    reference = torch.autograd.functional.hessian(
        lambda theta: (layer()(torch.zeros(4, dtype=F64), theta) ** 2).sum(), theta.detach()
    )
    loss = called(changed, theta)
    changed.tolerance, changed.linear_solver = LOOSE, bilevel.CG(max_steps=1)
    (first,) = torch.autograd.grad(loss, theta, create_graph=True)
    changed.on_failure = "nan"
    rows = [torch.autograd.grad(entry, theta, retain_graph=True)[0] for entry in first]
    torch.testing.assert_close(torch.stack(rows), reference, rtol=1e-7, atol=1e-8)


def test_a_vmapped_call_and_its_jacobian_go_by_the_settings_of_the_call() -> None:
    theta, changed = outer(), layer()
    batch = tasks(5)
    zeros = torch.zeros(4, dtype=F64)
    x = vmap(lambda scale: changed(zeros, theta * scale))(batch)
    changed.tolerance, changed.linear_solver = LOOSE, bilevel.CG(max_steps=1)
    (gradient,) = torch.autograd.grad(x.sum(), theta)
    alone = [torch.autograd.grad(layer()(zeros, theta * scale).sum(), theta)[0] for scale in batch]
    torch.testing.assert_close(gradient, sum(alone), rtol=1e-7, atol=1e-9)
    changed = layer()

    def loosened(theta: torch.Tensor) -> torch.Tensor:
        x = changed(zeros, theta)
        changed.tolerance = LOOSE
        return x

    torch.testing.assert_close(
        jacrev(loosened)(theta.detach()),
        jacrev(lambda theta: layer()(zeros, theta))(theta.detach()),
        rtol=1e-7,
        atol=1e-9,
    )


def test_one_layer_twice_in_a_graph_with_other_settings() -> None:
    theta, shared, zeros = outer(), layer(linear_solver=bilevel.Exact()), torch.zeros(4, dtype=F64)
    x = shared(zeros, theta)
    shared.linear_solver = bilevel.CG()
    y = shared(zeros, x)
    with bilevel.record() as reports:
        (gradient,) = torch.autograd.grad(y.sum(), theta)
    assert [report.solver for report in reports.backward] == ["CG", "Exact"]
    twice = layer()
    (expected,) = torch.autograd.grad(twice(zeros, twice(zeros, theta)).sum(), theta)
    torch.testing.assert_close(gradient, expected)


def test_a_problem_inside_another_ones_objective() -> None:
    inside = Bowls(tolerance=TIGHT, linear_solver=bilevel.CG())

    class Outside(bilevel.BilevelProblem):
        def inner_objective(self, inner: Any, outer: Any, data: Any) -> torch.Tensor:
            return ((inner - outer) ** 2).sum()

        def outer_objective(self, inner: Any, outer: Any, data: Any) -> torch.Tensor:
            loss: torch.Tensor = inside(inner, data, init=torch.zeros(4, dtype=F64))
            inside.tolerance = LOOSE  # for the next call
            return loss

    theta, data = outer(), tasks(1)[0]
    result = Outside(tolerance=TIGHT, solver=bilevel.LBFGS()).hypergradient(theta, data, init=torch.zeros(4, dtype=F64))
    expected, _ = backward(Bowls(tolerance=TIGHT)(theta, data), theta)
    # The outer problem's own adjoint, not that of the one inside.
    torch.testing.assert_close(2 * result.adjoint, expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(result.grad, expected, rtol=1e-7, atol=1e-9)


def test_a_graph_that_is_kept_gives_the_same_again() -> None:
    theta, tuned = outer(), problem()
    for _ in range(2):
        loss = tuned(theta, tasks(3))
        first, one = torch.autograd.grad(loss, theta, retain_graph=True)[0], tuned.memory()["adjoint"]
        tuned.tolerance = LOOSE
        torch.testing.assert_close(torch.autograd.grad(loss, theta)[0], first, rtol=0, atol=0)
        torch.testing.assert_close(tuned.memory()["adjoint"], one, rtol=0, atol=0)
        tuned.tolerance = TIGHT


def test_copies_and_pickles_have_settings_of_their_own() -> None:
    theta, tuned = outer(), problem(on_failure="warn")
    tuned(theta, tasks(3))
    for twin in (copy.deepcopy(tuned), pickle.loads(pickle.dumps(tuned))):
        twin.tolerance, twin.on_failure = LOOSE, "nan"
        twin.reset()
        assert tuned.tolerance == TIGHT and tuned.on_failure == "warn" and tuned.memory()["inner"] is not None
        assert twin.inner_layer.tolerance == LOOSE and twin.inner_layer.on_failure == "nan"
        twin.tolerance = TIGHT
        torch.testing.assert_close(twin(theta, tasks(3)), tuned(theta, tasks(3)))
    original = bilevel.argmin(bowl, tolerance=TIGHT)
    twin = copy.deepcopy(original)
    twin.tolerance = LOOSE
    assert original.tolerance == TIGHT and "delta=1000" in repr(twin)


def test_without_warm_starts_nothing_is_begun_from() -> None:
    theta, tuned = outer(), problem(solver=bilevel.LBFGS())
    loss = tuned(theta, tasks(3))
    cold = backward(loss, theta)[1]
    tuned.warm_start = False
    with bilevel.record() as reports:
        loss = tuned(theta, tasks(3))
    again = backward(loss, theta)[1]
    assert int(reports.forward[0].iterations.max()) > 1
    assert again.iterations.tolist() == cold.iterations.tolist()
    kept = problem(warm_start=False)
    kept.hypergradient(theta, tasks(3))
    backward(kept(theta, tasks(3)), theta)
    assert kept.memory() == {"inner": None, "adjoint": None, "known": None, "multipliers": {}}


def test_a_call_begins_from_the_warm_start_of_when_it_was_made() -> None:
    theta, tuned = outer(), problem()
    backward(tuned(theta, tasks(3)), theta)
    loss = tuned(theta, tasks(3))
    tuned.reset()
    assert backward(loss, theta)[1].iterations.tolist() == [0, 0, 0]
    # A start of another shape, dtype or without meaning is only a start.
    for adjoint in (torch.ones(2, 4, dtype=F64), torch.full((3, 4), torch.nan, dtype=F64), torch.ones(3, 4)):
        tuned.begin_at(torch.zeros(3, 4, dtype=F64), adjoint)
        gradient, report = backward(tuned(theta, tasks(3)), theta)
        assert bool(report.converged.all())
        torch.testing.assert_close(gradient, backward(problem()(theta, tasks(3)), theta)[0])


def test_a_warm_start_does_not_decide_the_dtype() -> None:
    theta, tuned = outer(), problem(tolerance=None)
    tuned.hypergradient(theta.detach().float(), tasks(3).float())
    result = tuned.hypergradient(theta, tasks(3))
    assert result.inner.dtype == F64
    torch.testing.assert_close(result.grad, problem().hypergradient(theta, tasks(3)).grad)


@pytest.mark.parametrize(
    "tolerance",
    [bilevel.Tolerance(delta=1e-2), bilevel.Tolerance(hypergradient=1e-2, estimates=True)],
    ids=["fixed", "goal"],
)
def test_what_a_result_computes_later_is_of_the_theta_that_it_was_made_at(tolerance: bilevel.Tolerance) -> None:
    def made() -> tuple[torch.Tensor, bilevel.Hypergradient]:
        theta = outer()
        tuned = problem(tolerance=tolerance, solver=bilevel.GradientDescent(0.02, 1000))
        return theta, tuned.hypergradient(theta, tasks(3))

    _, reference = made()
    theta, result = made()
    with torch.no_grad():
        theta.mul_(3)  # as a step of an optimiser does
    assert result.bound.value == pytest.approx(reference.bound.value, rel=1e-6)
    torch.testing.assert_close(result.corrected_grad, reference.corrected_grad)
    torch.testing.assert_close(result.refined().value, reference.refined().value)


def test_a_bound_of_data_that_were_changed_in_place_is_refused() -> None:
    data = tasks(3)
    tuned = problem(warm_start=False)
    result = tuned.hypergradient(outer(), data)
    data.mul_(2)
    with pytest.raises(bilevel.ArgumentError, match=r"read the bound before you change data, or pass a copy of data"):
        result.bound  # noqa: B018  # computed when it is asked for
    result = tuned.hypergradient(outer(), data.clone())
    data.mul_(2)
    assert result.bound.value < 1e-6
    result = tuned.hypergradient(outer(), data)
    known = result.bound
    data.mul_(2)
    assert result.bound == known


@pytest.mark.parametrize("policy", ["raise", "nan"])
def test_a_tensor_that_reaches_no_objective_is_found_in_every_call(policy: str) -> None:
    class Partly(Bowls):
        def inner_objective(self, inner: Any, outer: Any, data: Any) -> torch.Tensor:
            return bowl(inner, outer[0] * data)

    loose = (outer(), outer())
    tuned = Partly(tolerance=TIGHT, on_failure=policy)
    for _ in range(3):
        if policy == "raise":
            with pytest.raises(bilevel.ArgumentError, match=r"outer\[1\]"):
                tuned(loose, tasks(1)[0])
        else:
            assert bool(torch.isnan(tuned(loose, tasks(1)[0])))
    used = tuned((loose[0], loose[1].detach()), tasks(1)[0])
    assert bool(torch.isfinite(used))


def test_calls_in_several_threads_keep_apart() -> None:
    tuned = problem()
    sizes = (1, 2, 7, 40)
    expected = {count: problem().hypergradient(outer(), tasks(count, count)) for count in sizes}
    thresholds = {}
    for count in sizes:
        theta = outer()
        thresholds[count] = backward(problem()(theta, tasks(count, count)), theta)[1].threshold
    wrong: list[str] = []

    def work(count: int) -> None:
        try:
            for turn in range(15):
                theta = outer()
                if turn % 3 == 0:
                    result = tuned.hypergradient(theta, tasks(count, count))
                    gradient, shape = result.grad, result.adjoint.shape
                    torch.testing.assert_close(result.adjoint, expected[count].adjoint, rtol=1e-6, atol=1e-8)
                else:
                    loss = tuned(theta, tasks(count, count))
                    gradient, report = backward(loss, theta)
                    shape = (*report.threshold.shape, 4)
                    torch.testing.assert_close(report.threshold, thresholds[count], rtol=1e-5, atol=0)
                assert shape == (count, 4)
                torch.testing.assert_close(gradient, expected[count].grad, rtol=1e-6, atol=1e-8)
        except BaseException as error:  # to be shown in the main thread
            wrong.append(f"{count}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=work, args=(count,)) for count in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[0]


def test_imaml_and_hyperparameters_go_by_the_settings_of_the_call() -> None:
    torch.manual_seed(0)
    batch = tuple(torch.randn(6, 5, size) for size in (3, 1, 3, 1))
    model = torch.nn.Linear(3, 1)
    tight = bilevel.Tolerance(delta=1e-4, delta_prime=1e-5)

    def learner() -> bilevel.IMAML:
        return bilevel.IMAML(
            model, torch.nn.functional.mse_loss, solver=bilevel.Newton(), linear_solver=bilevel.CG(), tolerance=tight
        )

    expected, runs_plainly = backward(learner()(batch), model.weight)
    changed = learner()
    loss = changed(batch)
    changed(tuple(part[:1] for part in batch))
    changed.tolerance = bilevel.Tolerance(delta=1e3, delta_prime=1e3)
    changed.adapt(batch[:2])
    gradient, report = backward(loss, model.weight)
    same_threshold(report, runs_plainly)
    torch.testing.assert_close(gradient, expected)

    def tuning() -> bilevel.HyperparameterOptimization:
        return bilevel.HyperparameterOptimization(
            lambda w, h, data: bowl(w, h * data), lambda w, data: (w**2).sum(), outer(), torch.zeros(4, dtype=F64),
            tolerance=TIGHT, linear_solver=bilevel.CG(),
        )  # fmt: skip

    (data,) = tasks(1)
    made = tuning()
    expected, _ = backward(made(data), made.hyperparameters)
    made = tuning()
    loss = made(data)
    made.tolerance, made.linear_solver = LOOSE, bilevel.CG(max_steps=1)
    torch.testing.assert_close(backward(loss, made.hyperparameters)[0], expected)


@pytest.mark.parametrize("tasks_per_pass", [1, 4, None])
def test_tasks_that_are_adapted_in_parts_are_held_to_the_accuracy_of_all(tasks_per_pass: int | None) -> None:
    batch = tuple(torch.randn(6, 5, size, dtype=F64) for size in (3, 1, 3, 1))
    learner = bilevel.IMAML(
        torch.nn.Linear(3, 1).double(), torch.nn.functional.mse_loss, solver=bilevel.Newton(), linear_solver=bilevel.CG(),
        tolerance=bilevel.Tolerance(delta=1e-8, delta_prime=1e-6), tasks_per_pass=tasks_per_pass,
    )  # fmt: skip
    with bilevel.record() as reports:
        (100 * learner(batch)).backward()  # right-hand sides above one, for which δ′ is absolute
    thresholds = torch.cat([report.threshold for report in reports.backward])
    torch.testing.assert_close(thresholds, torch.full((6,), 1e-6 / 2.0 / 6, dtype=F64), rtol=1e-6, atol=0)


def test_an_inspection_left_out_of_one_call_is_not_left_out_of_another_one_inside() -> None:
    class Nested(bilevel.BilevelProblem):
        found = False

        def inner_objective(self, inner: Any, outer: Any, data: Any) -> torch.Tensor:
            if data["noisy"]:
                return ((inner - outer - torch.rand(4, dtype=F64)) ** 2).sum()
            if not self.found:
                with pytest.raises(bilevel.StochasticObjectiveError), torch.no_grad():
                    self.solve(torch.zeros(4, dtype=F64), {"noisy": True}, init=torch.zeros(4, dtype=F64))
                self.found = True
            return ((inner - outer) ** 2).sum()

        def outer_objective(self, inner: Any, outer: Any, data: Any) -> torch.Tensor:
            return inner.sum()

    nested = Nested()
    nested.solve(torch.ones(4, dtype=F64), {"noisy": False}, init=torch.zeros(4, dtype=F64), inspect=False)
    assert nested.found
