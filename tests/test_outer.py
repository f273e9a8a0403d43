"""Outer loops: closed forms, what a line search takes and refuses, policies, resuming bit for bit, watching."""

from __future__ import annotations

import io
import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import bilevel
from bilevel.outer.methods import Evaluation
from bilevel.outer.trail import PointHistory, combination
from bilevel.problems.adaptive.quasi_newton import SecantPairs
from tests.states import edited

F64 = torch.float64


class Shrunk(bilevel.BilevelProblem):
    """φ* = d/(1 + e^θ), and F is least where that is 0.8 d and 0.5 d: e^θ = 0.25 and 1."""

    def inner_objective(self, inner, outer, data):
        return ((inner - data) ** 2).sum() + (outer["log"].exp() * inner**2).sum()

    def outer_objective(self, inner, outer, data):
        return ((inner - torch.tensor([0.8, 0.5], dtype=F64) * data) ** 2).sum()


DATA = torch.tensor([1.0, 2.0], dtype=F64)
BEST = torch.tensor([0.25, 1.0], dtype=F64).log()
DESCENT = bilevel.Tolerance(descent=0.5, estimates=True)


def outer() -> dict[str, object]:
    return {"log": torch.tensor([1.0, -2.0], dtype=F64), "name": "strengths"}


def problem(**settings: object) -> Shrunk:
    settings = {"solver": bilevel.LBFGS(), "linear_solver": bilevel.CG(), **settings}
    return Shrunk(**settings)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.1)


def lbfgs(parameters):
    return torch.optim.LBFGS(parameters, lr=1.0, max_iter=3, line_search_fn="strong_wolfe")


@pytest.mark.parametrize(
    ("optimizer", "tolerance"),
    [
        (bilevel.HOAG(), bilevel.Tolerance(1e-10, 1e-10)),
        (bilevel.HOAG(), bilevel.ExponentialSchedule(start=1e-4)),
        (bilevel.HOAG(), DESCENT),
        (bilevel.HOAG(), bilevel.Tolerance(descent=0.5, strong_convexity=2.0)),
        (bilevel.MAID(), DESCENT),
        (bilevel.MAID(), bilevel.Tolerance(hypergradient=0.1, relative=True, strong_convexity=2.0)),
        # What rescales every coordinate for itself needs more than a descent direction.
        (adam, bilevel.Tolerance(hypergradient=1e-2, relative=True, estimates=True)),
        (lbfgs, DESCENT),
        (lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.5), bilevel.Tolerance(1e-8, 1e-8)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value))[:30],
)
def test_it_finds_the_minimum(optimizer: object, tolerance: object) -> None:
    tuned = problem()
    result = bilevel.minimize(
        tuned, outer(), DATA, init=torch.zeros(2, dtype=F64), optimizer=optimizer, tolerance=tolerance,
        gradient_tolerance=1e-3, max_steps=300,
    )  # fmt: skip
    assert result.status is bilevel.OuterStatus.CONVERGED, result.message
    torch.testing.assert_close(result.outer["log"], BEST, atol=2e-2, rtol=0)
    assert result.outer["name"] == "strengths"
    torch.testing.assert_close(result.inner, DATA / (1 + result.outer["log"].exp()), atol=1e-2, rtol=1e-2)
    assert result.history[-1].gradient_norm <= 1e-3 and [s.number for s in result.history][-1] == len(result.history)
    assert tuned.tolerance == bilevel.Tolerance()  # as before
    assert "hypergradient's norm" in str(result) and result.status.success


def test_a_gradient_that_counts_as_zero_is_not_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two gradients determine a quadratic in two unknowns; without the step that they point to there is work left to be spared.
    monkeypatch.setattr(SecantPairs, "fit", lambda self, r: (torch.zeros_like(r), r))
    near = {"log": BEST + 1e-6, "name": ""}
    spent = []
    for stationary in (None, 1e-2):
        tolerance = replace(DESCENT, stationary=stationary)
        # Near enough that the gradient's size alone meets the goal once an error is known: the search used to wait for one for ever.
        init = DATA / (1 + near["log"].exp()) + torch.tensor([1e-2, -5e-3], dtype=F64)
        result = problem(tolerance=tolerance).hypergradient(near, DATA, init=init)
        norm = float(result.grad["log"].norm())
        assert result.report.goal.met and norm + result.error_bound <= 1e-2
        spent.append(int(result.report.iterations.sum()))
    assert spent[1] < spent[0]
    for goal in (
        DESCENT,
        bilevel.Tolerance(hypergradient=0.1, relative=True, estimates=True),
        bilevel.Tolerance(1e-8, 1e-8),
    ):
        seen = []
        bilevel.minimize(
            problem(), outer(), DATA, init=DATA, tolerance=goal, gradient_tolerance=1e-3, max_steps=1,
            callback=lambda run, seen=seen: seen.append(run.problem.tolerance.stationary),
        )  # fmt: skip
        assert seen == [1e-3 if goal.has_goal else None] * 2


def test_the_history_holds_what_was_asked_and_what_it_cost() -> None:
    schedule = bilevel.QuadraticSchedule()
    result = bilevel.minimize(problem(), outer(), DATA, init=DATA, tolerance=schedule, max_steps=4, bounds=True)
    assert result.status is bilevel.OuterStatus.MAX_STEPS and len(result.history) == 5
    taken = [step for step in result.history if step.evaluations == step.number]  # no step was tried twice
    assert taken and all(step.delta == schedule(step.number).delta for step in taken)
    assert all(math.isfinite(step.error_bound) and step.basis is not bilevel.Basis.RESIDUAL for step in result.history)
    assert all(step.inner_iterations > 0 and step.seconds > 0 for step in result.history)
    assert math.isnan(result.history[0].step_size) and result.history[1].step_size > 0
    plain = bilevel.minimize(problem(), outer(), DATA, init=DATA, tolerance=schedule, max_steps=1)
    assert all(math.isnan(step.error_bound) and step.basis is bilevel.Basis.RESIDUAL for step in plain.history)


def test_maid_takes_only_decrease_beyond_the_errors_of_the_values() -> None:
    method = bilevel.MAID(step=0.5)
    result = bilevel.minimize(problem(), outer(), DATA, init=DATA, optimizer=method, tolerance=DESCENT, max_steps=8)
    pairs = list(zip(result.history, result.history[1:], strict=False))
    assert pairs
    for before, after in pairs:
        promised = 0.1 * after.step_size * before.gradient_norm**2
        assert after.corrected_value + after.value_error <= before.corrected_value - promised


def here(value: float, slack: float) -> Evaluation:
    one = torch.ones(1, dtype=F64)
    return Evaluation((one,), value, value, slack, (one,), None, {})


def test_a_decrease_that_errors_may_have_made_is_refused() -> None:
    seen = []

    def evaluate(outer, *, tighter=1.0):
        seen.append((float(outer[0]), tighter))
        return replace(here(float(outer[0]), 10.0), outer=outer)  # it falls, but by less than the errors

    assert bilevel.MAID(step=0.5).advance(here(1.0, 10.0), {"step": 0.5}, evaluate) is None
    assert {value for value, _ in seen} == {0.5, 1.0} and max(tighter for _, tighter in seen) > 1e3

    def sharp(outer, *, tighter=1.0):
        return replace(here(float(outer[0]), 10.0 / tighter**2), outer=outer)

    memory = {"step": 0.5}
    found = bilevel.MAID(step=0.5).advance(here(1.0, 10.0), memory, sharp)
    assert found is not None and float(found.outer[0]) == 0.5 and memory["taken"] == 0.5


@pytest.mark.parametrize("method", [bilevel.HOAG(step=1.0), bilevel.MAID(step=1.0)])
def test_a_step_that_does_not_count_is_tried_again_from_where_it_began(method: bilevel.OuterMethod) -> None:
    tried = []

    def evaluate(outer, *, tighter=1.0):
        tried.append(float(outer[0]))
        # A failed solve, a NaN, a rise, then a fall.
        return [None, here(math.nan, 0.0), here(5.0, 0.0), replace(here(0.0, 0.0), outer=outer)][len(tried) - 1]

    memory = method.begin(here(1.0, 0.0))
    found = method.advance(here(1.0, 0.0), memory, evaluate)
    assert tried == [0.0, 0.5, 0.75, 0.875]  # each from θ = 1, once
    assert found is not None and float(found.outer[0]) == 0.875
    assert memory["taken"] == 0.125 and memory["step"] == pytest.approx(0.1625)


def test_a_step_is_shortened_before_values_are_made_exacter_and_not_where_that_would_not_help() -> None:
    asked = []

    def evaluate(outer, *, tighter=1.0):
        asked.append((float(outer[0]), tighter))
        # It falls by 0.04, within the errors but not certainly by a tenth of what the slope 1 promises; a shorter step falls more.
        value = {0.5: 0.8, 1.0: 1.0}.get(float(outer[0]), 0.96)
        return replace(here(value, 0.05), outer=outer)

    found = bilevel.MAID(step=1.0).advance(here(1.0, 0.05), {"step": 1.0}, evaluate)
    assert asked == [(0.0, 1.0), (0.5, 1.0)] and found is not None
    asked.clear()
    # The errors are larger than α ‖ĝ‖²: no step that is shorter can be certain.
    bilevel.MAID(step=0.05).advance(here(1.0, 0.05), {"step": 0.05}, evaluate)
    assert asked[:3] == [(0.95, 1.0), (1.0, 10.0), (0.95, 10.0)]


def test_the_trail_finds_what_is_linear_in_the_outer_variables() -> None:
    generator = torch.Generator().manual_seed(0)
    slope, offset = (torch.randn(*shape, generator=generator, dtype=F64) for shape in ((5, 3), (5,)))
    split = [torch.randn(2, generator=generator, dtype=F64) for _ in range(5)]
    thetas = [(x, x.sum()[None]) for x in split]  # three numbers, of two independent

    def solution(theta):
        return slope @ torch.cat(theta) + offset

    trail = PointHistory()
    assert trail.start(thetas[0]) is None
    trail.add(thetas[0], {"x": torch.full((5,), torch.nan, dtype=F64)}, solution(thetas[0]))
    assert trail.start(thetas[0]) is None  # what is not finite is not begun from
    for theta in thetas[:4]:
        trail.add(theta, {"x": solution(theta)}, 2 * solution(theta))
    for other in (trail, PointHistory.of(trail.state_dict())):
        inner, adjoint = other.start(thetas[4])
        torch.testing.assert_close(inner["x"], solution(thetas[4]))
        torch.testing.assert_close(adjoint, 2 * inner["x"])
    # Of three collinear points and one aside, those two that are nearest to the target on its line are used, and exactly.
    line = [(torch.tensor([x, 1.0], dtype=F64),) for x in (0.0, 3.0, 4.0)] + [(torch.tensor([4.0, 2.0], dtype=F64),)]
    assert combination(line, (torch.tensor([6.0, 1.0], dtype=F64),)).tolist() == pytest.approx([0.0, -2.0, 3.0, 0.0])
    assert combination(line, (torch.tensor([6.0, 3.0], dtype=F64),)).tolist() == pytest.approx([0.0, -2.0, 1.0, 2.0])
    # A step that hardly leaves the line would be blown up a hundredfold.
    line[3] = (torch.tensor([5.0, 1.01], dtype=F64),)
    assert combination(line, (torch.tensor([4.0, 2.0], dtype=F64),)).abs().max() <= 1.0
    aside = (thetas[3][0], thetas[3][1] + 10.0)  # a direction in which no step was made
    weights = combination(thetas[:4], aside)
    assert float(weights.sum()) == pytest.approx(1.0) and float(weights.abs().sum()) < 30
    repeated = combination([thetas[0], thetas[0]], thetas[1])
    assert sorted(repeated.tolist()) == [0.0, 1.0]


def test_the_trail_is_bounded_and_holds_only_what_a_solve_has_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bilevel.outer.trail, "_MOST_BYTES", 3 * (1 + 10 + 10) * 8)
    trail = PointHistory()
    for number in range(5):
        trail.add((torch.full((1,), float(number), dtype=F64),), torch.zeros(10, dtype=F64), torch.zeros(10, dtype=F64))
    assert [float(point[0][0]) for point in trail.points] == [2.0, 3.0, 4.0]
    held = []
    loose = bilevel.Tolerance(1e3, 1e3)  # met wherever the solves begin
    bilevel.minimize(
        problem(), outer(), DATA, init=DATA, tolerance=loose, max_steps=2, callback=lambda run: held.append(run._trail)
    )
    assert held and not held[-1].points


@pytest.mark.parametrize("tolerance", [DESCENT, bilevel.Tolerance(1e-8, 1e-8)], ids=["goal", "fixed"])
def test_solves_begin_nearer_than_at_the_last_point(tolerance: bilevel.Tolerance) -> None:
    class Spied(Shrunk):
        def begin_at(self, inner, adjoint):
            starts.append(inner)
            super().begin_at(inner, adjoint)

    starts, reached = [], []
    tuned = Spied(solver=bilevel.LBFGS(), linear_solver=bilevel.CG())
    settings = {"init": torch.zeros(2, dtype=F64), "max_steps": 7, "tolerance": tolerance}
    settings["optimizer"] = lambda p: torch.optim.SGD(p, lr=1.0)  # an evaluation for each step
    bilevel.minimize(tuned, outer(), DATA, callback=lambda run: reached.append(run.inner), **settings)
    assert len(starts) == 7 and len(reached) == 8
    from_start = sum(float((a - b).norm()) for a, b in zip(starts[1:], reached[2:], strict=True))
    from_last = sum(float((a - b).norm()) for a, b in itertools.pairwise(reached[1:]))
    assert from_start < 0.5 * from_last
    starts.clear()
    cold = Spied(warm_start=False)
    cold.initial = lambda outer, data: torch.zeros(2, dtype=F64)
    bilevel.minimize(cold, outer(), DATA, max_steps=2)
    assert not starts


@pytest.mark.parametrize("optimizer", [bilevel.HOAG(), bilevel.MAID(), adam, lbfgs])
@pytest.mark.parametrize("tolerance", [DESCENT, bilevel.CubicSchedule()], ids=["goal", "schedule"])
def test_a_run_resumes_bit_for_bit(optimizer: object, tolerance: object) -> None:
    def run(**more: object) -> bilevel.OuterResult:
        return bilevel.minimize(
            problem(), outer(), DATA, init=torch.zeros(2, dtype=F64), optimizer=optimizer, tolerance=tolerance, **more
        )  # fmt: skip

    whole, half = run(max_steps=6), run(max_steps=3)
    file = io.BytesIO()
    torch.save(half.state, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    heard = []
    rest = run(max_steps=6, resume=state, callback=lambda run: heard.append(run.history[-1].number))
    assert heard == [5, 6, 7]  # the point that it was resumed at was heard of before
    assert torch.equal(rest.outer["log"], whole.outer["log"]) and torch.equal(rest.inner, whole.inner)
    timeless = [tuple(replace(s, seconds=0.0, step_size=0.0) for s in r.history) for r in (whole, rest)]
    assert str(timeless[0]) == str(timeless[1])
    assert [str(s.step_size) for s in whole.history] == [str(s.step_size) for s in rest.history]


def test_failed_solves_shorten_the_step_or_are_said() -> None:
    broken = problem(solver=bilevel.GradientDescent(0.1, 1))
    settings = {"init": torch.zeros(2, dtype=F64), "tolerance": bilevel.Tolerance(1e-10, 1e-10)}
    with pytest.raises(bilevel.SolveError, match="ran out of iterations"):
        bilevel.minimize(broken, outer(), DATA, **settings)

    class Delicate(Shrunk):
        def inner_objective(self, inner, outer, data):
            bad = (outer["log"].detach() < -2.5).any()
            return super().inner_objective(inner, outer, data) * torch.where(bad, torch.nan, 1.0)

    tuned = Delicate(solver=bilevel.LBFGS(), linear_solver=bilevel.CG())
    begin = {"log": torch.tensor([3.0, -2.0], dtype=F64), "name": ""}

    def ascend(parameters):
        return torch.optim.SGD(parameters, lr=100.0, maximize=True)

    with pytest.raises(bilevel.SolveError, match="NaN"):
        bilevel.minimize(tuned, begin, DATA, optimizer=ascend, **settings)
    tuned.reset()
    result = bilevel.minimize(tuned, begin, DATA, optimizer=ascend, on_failure="stop", **settings)
    assert result.status is bilevel.OuterStatus.SOLVE_FAILED and not result.status.success
    assert "NaN" in result.message and torch.equal(result.outer["log"], begin["log"])
    tuned.reset()
    found = bilevel.minimize(
        tuned, begin, DATA, optimizer=bilevel.HOAG(step=1e3), gradient_tolerance=1e-3, max_steps=300, **settings
    )  # fmt: skip
    assert found.status is bilevel.OuterStatus.CONVERGED and found.history[-1].evaluations > len(found.history)


def test_at_a_minimum_no_step_is_certain_and_that_is_said() -> None:
    best = {"log": BEST + 1e-9, "name": ""}
    tuned = problem(solver=bilevel.Newton(), linear_solver=bilevel.Exact())
    result = bilevel.minimize(
        tuned, best, DATA, init=DATA, optimizer=bilevel.MAID(step=1e12), tolerance=bilevel.Tolerance(), bounds=True, max_steps=3
    )  # fmt: skip
    assert result.status is bilevel.OuterStatus.NO_DECREASE and "exceeds the errors" in result.message


def test_a_value_that_is_not_finite_is_not_gone_on_from() -> None:
    class Cliff(Shrunk):
        def outer_objective(self, inner, outer, data):
            return super().outer_objective(inner, outer, data) * torch.where(
                outer["log"].detach().sum() == -1, 1.0, torch.nan
            )

    tuned = Cliff(solver=bilevel.Newton(), linear_solver=bilevel.Exact(), on_failure="ignore")
    settings = {"init": DATA, "optimizer": lambda p: torch.optim.SGD(p, lr=0.1), "max_steps": 5}
    with pytest.raises(bilevel.ArgumentError, match="not finite"):
        bilevel.minimize(tuned, outer(), DATA, **settings)
    tuned.reset()
    result = bilevel.minimize(tuned, outer(), DATA, on_failure="stop", **settings)
    assert result.status in (bilevel.OuterStatus.NOT_FINITE, bilevel.OuterStatus.SOLVE_FAILED)


@pytest.mark.parametrize("name", ["outer", "inner", "gradient"])
def test_a_callback_that_changes_the_point_in_place_is_refused(name: str) -> None:
    def clamp(run: Any) -> None:
        shown = getattr(run, name)
        (shown if name == "inner" else shown["log"]).clamp_(max=0.0)

    with pytest.raises(bilevel.ArgumentError, match="changed in place"):
        bilevel.minimize(problem(), outer(), DATA, init=DATA, callback=[lambda run: None, clamp])


def test_callbacks_stop_it_and_an_interruption_loses_nothing() -> None:
    seen = []
    result = bilevel.minimize(
        problem(), outer(), DATA, init=DATA,
        callback=[lambda run: seen.append(float(run.value)), lambda run: len(run.history) == 3],
    )  # fmt: skip
    assert result.status is bilevel.OuterStatus.STOPPED and len(seen) == len(result.history) == 3

    def interrupt(run: bilevel.OuterRun) -> None:
        assert set(run.outer) == {"log", "name"} and run.gradient["name"] is None and run.inner.shape == (2,)
        if len(run.history) == 4:
            raise KeyboardInterrupt

    stopped = bilevel.minimize(problem(), outer(), DATA, init=DATA, callback=interrupt)
    assert stopped.status is bilevel.OuterStatus.INTERRUPTED and len(stopped.history) == 4
    whole = bilevel.minimize(problem(), outer(), DATA, init=DATA, max_steps=6)
    rest = bilevel.minimize(problem(), outer(), DATA, init=DATA, max_steps=6, resume=stopped.state)
    assert torch.equal(whole.outer["log"], rest.outer["log"])


@pytest.mark.parametrize(
    "optimizer",
    [None, bilevel.MAID(), lambda parameters: torch.optim.Adam(parameters, lr=0.1)],
    ids=["HOAG", "MAID", "Adam"],
)
@pytest.mark.parametrize("at", [3, 5, 8])
def test_an_interruption_in_the_middle_of_a_step_loses_nothing(optimizer: Any, at: int) -> None:
    """The optimiser's memory is then that of the point, and not of the step that was not made."""
    settings: dict[str, Any] = {"init": DATA, "max_steps": 8, "optimizer": optimizer}
    whole = bilevel.minimize(problem(), outer(), DATA, **settings)
    tuned, calls, plain = problem(), [0], type(problem()).outer_objective

    class Interrupted(type(tuned)):  # type: ignore[misc]
        def outer_objective(self, inner: Any, outer: Any, data: Any) -> torch.Tensor:
            calls[0] += 1
            if calls[0] == at:
                raise KeyboardInterrupt
            return plain(self, inner, outer, data)

    tuned.__class__ = Interrupted
    stopped = bilevel.minimize(tuned, outer(), DATA, **settings)
    assert stopped.status is bilevel.OuterStatus.INTERRUPTED
    rest = bilevel.minimize(problem(), outer(), DATA, **settings, resume=stopped.state)
    assert torch.equal(whole.outer["log"], rest.outer["log"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": torch.optim.Adam}, "expected optimizer"),
        ({"optimizer": lambda p: 3}, "one that returns 3"),
        ({"optimizer": "adam"}, "expected optimizer"),
        ({"on_failure": "warn"}, "on_failure"),
        ({"max_steps": -1}, "max_steps"),
        ({"resume": {"format": 0}}, "of format 2"),
    ],
)
def test_misuse_is_said(settings: dict[str, object], message: str) -> None:
    with pytest.raises(bilevel.ArgumentError, match=message):
        bilevel.minimize(problem(), outer(), DATA, init=DATA, **settings)


def test_other_misuse_is_said() -> None:
    with pytest.raises(bilevel.ArgumentError, match="floating-point or complex tensor"):
        bilevel.minimize(problem(), 3, DATA)
    with pytest.raises(bilevel.ArgumentError, match="BilevelProblem"):
        bilevel.minimize(object(), outer(), DATA)
    state = bilevel.minimize(problem(), outer(), DATA, init=DATA, max_steps=0).state
    with pytest.raises(bilevel.ArgumentError, match="shapes"):
        bilevel.minimize(problem(), {"log": torch.zeros(3, dtype=F64), "name": ""}, DATA, resume=state)
    for build in (lambda: bilevel.HOAG(shrink=1.5), lambda: bilevel.MAID(tighten=0.5), lambda: bilevel.HOAG(step=-1.0)):
        with pytest.raises(bilevel.ArgumentError):
            build()
    with pytest.raises(bilevel.ArgumentError, match=r"bilevel\.Tolerance"):
        problem().tolerance = 1e-3


def tuning(**start: float) -> bilevel.HyperparameterOptimization:
    """φ* = d/(1 + e^h), and the loss is least at e^h = 0.25; h is a tensor, or several that are added."""
    return bilevel.HyperparameterOptimization(
        lambda w, h, d: ((w - d) ** 2).sum() + (sum(h.values()) if isinstance(h, dict) else h).exp() * (w**2).sum(),
        lambda w, d: ((w - 0.8 * d) ** 2).sum(),
        {name: torch.tensor(value, dtype=F64) for name, value in start.items()} or torch.tensor(0.0, dtype=F64),
        torch.zeros(2, dtype=F64),
    )


def test_the_outer_variables_of_a_module_follow_the_run() -> None:
    model, seen = tuning(), []
    before = model.hyperparameters
    result = bilevel.minimize(
        model, model.outer, DATA, gradient_tolerance=1e-8, callback=lambda run: seen.append(torch.equal(model.outer.detach(), run.outer))
    )  # fmt: skip
    assert float(result.outer.exp()) == pytest.approx(0.25, abs=1e-6) and all(seen)
    assert model.hyperparameters is before and torch.equal(before.detach(), result.outer)
    assert before.requires_grad and before.grad is None and not result.outer.requires_grad
    assert torch.equal(model.state_dict()["hyperparameters"], result.outer)
    assert float(model(DATA).detach()) == pytest.approx(result.value, abs=1e-12)

    several, frozen = tuning(a=0.0, b=0.5), torch.tensor(0.5, dtype=F64)
    found = bilevel.minimize(several, {"a": several.outer["a"], "b": frozen}, DATA, max_steps=3).outer
    # What is not the module's own parameter is left as it is.
    assert several.outer["a"].item() == found["a"].item() != 0.0
    assert several.outer["b"].item() == frozen.item() == 0.5 != found["b"].item()


def test_a_module_resumes_where_its_run_stopped() -> None:
    def run(model: bilevel.HyperparameterOptimization, steps: int, **more: object) -> bilevel.OuterResult:
        return bilevel.minimize(model, model.outer, DATA, max_steps=steps, **more)

    whole, half = tuning(a=0.0, b=0.5), tuning(a=0.0, b=0.5)
    state = run(half, 2).state
    reached = {name: value.detach().clone() for name, value in half.outer.items()}
    expected = run(whole, 5)
    for model in (half, tuning(a=3.0, b=3.0)):  # where it stopped, or one made anew
        at = []
        found = run(model, 2, resume=state, callback=lambda run: at.append(run))
        assert not at and all(torch.equal(model.outer[name].detach(), reached[name]) for name in "ab")
        found = run(model, 5, resume=state)
        for name in "ab":
            assert torch.equal(found.outer[name], expected.outer[name])
            assert torch.equal(model.outer[name].detach(), whole.outer[name].detach())


def test_a_history_is_drawn_with_error_bars_and_a_run_is_shown() -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")
    from bilevel.display import ProgressBar, plot_history

    with ProgressBar(max_steps=4) as bar:
        result = bilevel.minimize(
            problem(), outer(), DATA, init=torch.zeros(2, dtype=F64), tolerance=DESCENT, max_steps=4, callback=bar
        )  # fmt: skip
    values, gradients, accuracies = plot_history(result.history, "$5 of tuning").axes
    (bars,) = gradients.containers
    ends = [segment[:, 1] for segment in bars.lines[2][0].get_segments()]
    for step, (low, high) in zip(result.history, ends, strict=True):
        assert high - low == pytest.approx(2 * step.error_bound) and step.error_bound > 0
    assert len(values.containers) == 1 and len(accuracies.lines) == 2
    with pytest.raises(bilevel.ArgumentError, match="at least one point"):
        plot_history([])


class Barrier(bilevel.BilevelProblem):
    """φ* = exp θ, which a line through two points of it leaves: there G is not defined."""

    def inner_objective(self, inner, outer, data):
        return (inner - outer.exp() * inner.log()).sum()

    def outer_objective(self, inner, outer, data):
        return ((inner.log() - data) ** 2).sum()

    def initial(self, outer, data):
        return torch.ones_like(data)


@pytest.mark.parametrize("policy", ["raise", "nan"])
@pytest.mark.parametrize("tolerance", [bilevel.Tolerance(delta=1e-8, delta_prime=1e-8), DESCENT])
def test_a_trail_that_points_out_of_the_domain_is_left(tolerance: bilevel.Tolerance, policy: str) -> None:
    target = torch.tensor([-3.0, -1.0, -2.0], dtype=F64)
    result = bilevel.minimize(
        Barrier(tolerance=tolerance, on_failure=policy), torch.tensor([2.0, 0.0, -1.0], dtype=F64), target,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.2), max_steps=15,
    )  # fmt: skip
    torch.testing.assert_close(result.outer, target, atol=5e-2, rtol=0)


def test_no_edit_of_a_saved_state_passes() -> None:
    original = bilevel.minimize(problem(), outer(), DATA, init=DATA, max_steps=3).state
    for seed in range(200):
        with pytest.raises(bilevel.ArgumentError, match="expected resume"):
            bilevel.minimize(problem(), outer(), DATA, init=DATA, max_steps=5, resume=edited(original, seed))
    bilevel.minimize(problem(), outer(), DATA, init=DATA, max_steps=5, resume=original)


def test_another_optimizers_state_is_refused() -> None:
    state = bilevel.minimize(problem(), outer(), DATA, init=DATA, max_steps=1).state
    with pytest.raises(bilevel.ArgumentError, match="one by HOAG; resume with the optimizer"):
        bilevel.minimize(
            problem(), outer(), DATA, init=DATA, resume=state, optimizer=lambda p: torch.optim.Adam(p, lr=0.1)
        )


@pytest.mark.parametrize("tolerance", [float("nan"), -1.0, "small"])
def test_a_gradient_tolerance_that_is_no_number_is_refused(tolerance: Any) -> None:
    class Problem(bilevel.BilevelProblem):
        def inner_objective(self, inner, outer, data):
            return ((inner - outer) ** 2).sum()

        def outer_objective(self, inner, outer, data):
            return (inner**2).sum()

    with pytest.raises(bilevel.ArgumentError, match="gradient_tolerance to be a number"):
        bilevel.minimize(Problem(), torch.ones(2), None, init=torch.zeros(2), gradient_tolerance=tolerance)
    with torch.inference_mode(), pytest.raises(bilevel.ArgumentError, match=r"outside torch.inference_mode"):
        Problem().hypergradient(torch.ones(2), None, init=torch.zeros(2))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"callback": 3}, "callback to be a function"),
        ({"callback": [print, None]}, "callback to be a function"),
        ({"tolerance": 1e-3}, "tolerance to be a bilevel.Tolerance"),
        ({"tolerance": lambda step: 1e-3}, "to return a bilevel.Tolerance"),
    ],
)
def test_settings_of_another_type_are_refused(settings: dict[str, object], expected: str) -> None:
    with pytest.raises(bilevel.ArgumentError, match=f"{expected}.*got.*(write|pass)"):
        bilevel.minimize(
            Unrolled(), torch.zeros((), dtype=torch.float64), DATA, init=torch.zeros(2, dtype=torch.float64), **settings
        )


DATA = torch.tensor([1.0, 2.0], dtype=torch.float64)


class Unrolled(bilevel.BilevelProblem):
    def inner_objective(self, inner, outer, data):
        return ((inner - data) ** 2).sum() + outer.exp() * (inner**2).sum()

    def outer_objective(self, inner, outer, data):
        return ((inner - 0.8 * data) ** 2).sum()


def test_a_run_unrolls_every_step_from_where_the_first_began() -> None:
    """Near a stationary point the outer steps are small, and few inner steps from the last solution have almost no derivative."""
    start, outer = torch.zeros(2, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    gradients = []
    for settings in ({}, {"solver": bilevel.GradientDescent(0.2, 500), "differentiation": bilevel.Unrolled()}):
        problem = Unrolled(tolerance=bilevel.Tolerance(delta=1e-5), **settings)
        slow = lambda parameters: torch.optim.SGD(parameters, lr=1e-5)
        result = bilevel.minimize(problem, outer, DATA, init=start, optimizer=slow, max_steps=4)
        gradients.append(result.history[-1].gradient_norm)
    assert gradients[1] == pytest.approx(gradients[0], rel=1e-3)


@pytest.mark.parametrize("optimizer", [None, bilevel.MAID()])
def test_the_first_step_finds_units_far_below_one(optimizer):
    class Scaled(bilevel.BilevelProblem):
        def inner_objective(self, inner, outer, data):
            return (inner - 1e9 * outer) ** 2

        def outer_objective(self, inner, outer, data):
            return (inner - 0.5) ** 2

    zero = torch.zeros((), dtype=F64)
    found = bilevel.minimize(Scaled(), zero, None, optimizer=optimizer, init=zero, max_steps=20)
    assert float(1e9 * found.outer) == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.complex128, torch.int64])
def test_an_outer_loss_that_is_not_real_is_refused(dtype):
    class Other(Shrunk):
        def outer_objective(self, inner, outer, data):
            return inner.sum().to(dtype)

    with pytest.raises(bilevel.DtypeError, match="expected outer_objective to return a floating-point scalar"):
        Other().hypergradient(outer(), DATA, init=torch.zeros(2, dtype=F64))
