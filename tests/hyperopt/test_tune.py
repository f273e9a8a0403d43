"""Tuning on real data: what it promises against the grid, and how it stops."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import bilevel
from bilevel.hyperopt import HyperparameterOptimization
from bilevel.hyperopt.data import Dataset, Task, load_bundled
from bilevel.hyperopt.folds import Folds
from bilevel.hyperopt.grid import LOG_RANGE, cross_validate
from bilevel.hyperopt.outcome import Outcome, OuterStep, Penalty, Row, TuneSettings
from bilevel.hyperopt.splits import Splits, model_for, split
from bilevel.hyperopt.tune import tune


def row(outcome: Outcome, name: str) -> Row:
    return next(row for row in outcome.rows if row.name == name)


@pytest.mark.parametrize("name", ["diabetes", "wine"])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long)])
def test_the_shared_strength_is_at_least_as_good_as_the_grid_for_fewer_solves(name: str, seed: int) -> None:
    outcome = tune(load_bundled(name), TuneSettings(seed=seed))
    untuned, grid, tuned = outcome.rows
    assert tuned.cv_loss <= grid.cv_loss
    assert tuned.cv_loss <= untuned.cv_loss
    assert tuned.inner_solves < grid.inner_solves == 33 * 5


def wide(rows: int = 40, features: int = 100) -> Dataset:
    """Return a regression with more features than rows."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(rows, features))
    targets = inputs[:, 0] - inputs[:, 1] + 0.5 * rng.normal(size=rows)
    return Dataset("wide", inputs, targets, tuple(map(str, range(features))), (), Task.REGRESSION)


@pytest.mark.parametrize("seed", [0, 1])
def test_with_more_features_than_rows_no_strength_is_left_out(seed: int) -> None:
    outcome = tune(wide(), TuneSettings(seed=seed))
    assert not [note for note in outcome.notes if "left out" in note]
    assert {step.log_strengths[0] for step in outcome.history} >= {LOG_RANGE[0], LOG_RANGE[1]}
    untuned, grid, tuned = outcome.rows
    assert tuned.cv_loss <= min(grid.cv_loss, untuned.cv_loss) * (1 + 1e-9)


@pytest.mark.parametrize("strength", [1e-6, 1e-4, 1e-2])
def test_with_more_features_than_rows_the_gradient_is_right(strength: float) -> None:
    dataset = wide()
    splits, theta = split(dataset), math.log(strength)
    folds = Folds(model_for(dataset), splits, torch.tensor(theta, dtype=torch.float64), "shared")
    _, gradient = folds.evaluate()
    assert float(gradient) == pytest.approx(dual_gradient(splits, theta), rel=1e-6, abs=1e-10)


def dual_gradient(splits: Splits, theta: float) -> float:
    """Return d(CV loss)/dθ of ridge regression by kernels, which know nothing of null spaces: β = Zᵀ(ZZᵀ + n e^θ)⁻¹ y of centred rows."""
    slopes = []
    for held in splits.folds:
        rows = np.setdiff1d(splits.fold_rows, held)
        (inputs, targets), (seen, truth) = ([part.numpy() for part in splits.part(at)] for at in (rows, held))
        centre, level = inputs.mean(0), targets.mean()
        kernel = (inputs - centre) @ (inputs - centre).T
        strength = rows.size * math.exp(theta)
        inverse = np.linalg.inv(kernel + strength * np.eye(rows.size))
        to_seen = (seen - centre) @ (inputs - centre).T
        weights = inverse @ (targets - level)
        errors = to_seen @ weights + level - truth
        slopes.append(2 * np.mean(errors * -(to_seen @ inverse @ weights)) * strength)
    return float(np.mean(slopes))


def test_the_cv_loss_is_what_scikit_learn_finds_at_the_same_strength(diabetes: Outcome) -> None:
    tuned = row(diabetes, "tuned, shared")
    cv, watch = cross_validate(Task.REGRESSION, diabetes.splits, tuned.log_strengths[0])
    assert tuned.cv_loss == pytest.approx(cv, abs=1e-8)
    assert tuned.watch_loss == pytest.approx(watch, abs=1e-8)


def test_the_history_holds_every_evaluation(diabetes: Outcome) -> None:
    steps = diabetes.history
    assert [step.number for step in steps] == list(range(len(steps)))
    assert {step.stage for step in steps} == {"shared"}
    tuned = row(diabetes, "tuned, shared")
    assert steps[-1].inner_solves == tuned.inner_solves == 5 * len(steps)
    assert min(step.cv_loss for step in steps) == tuned.cv_loss
    assert all(step.inner_residual < 1e-6 for step in steps)
    assert all(step.corrected_cv_loss == pytest.approx(step.cv_loss, abs=1e-6) for step in steps)
    assert all(step.error_bound is None or step.error_bound >= 0 for step in steps)


def test_strengths_per_feature_start_from_the_shared_one(wine_per_feature: Outcome) -> None:
    outcome = wine_per_feature
    shared = row(outcome, "tuned, shared")
    first = next(step for step in outcome.history if step.stage == "feature")
    assert set(first.log_strengths) == {shared.log_strengths[0]}
    assert len(first.log_strengths) == 13
    assert first.cv_loss == pytest.approx(shared.cv_loss, abs=1e-9)
    assert first.watch_loss == pytest.approx(shared.watch_loss, abs=1e-7)


def test_the_watch_stops_per_feature_tuning_and_nothing_is_hidden(wine_per_feature: Outcome) -> None:
    outcome = wine_per_feature
    steps = [step for step in outcome.history if step.stage == "feature"]
    best = min(steps, key=lambda step: step.watch_loss)
    chosen, last = row(outcome, "tuned, per feature"), row(outcome, "per feature, last step")
    assert "has not improved for 10 steps" in outcome.stopped["feature"]
    assert steps[-1].number == best.number + 10
    assert chosen.log_strengths == best.log_strengths
    assert chosen.watch_loss == best.watch_loss <= row(outcome, "tuned, shared").watch_loss
    assert last.log_strengths == steps[-1].log_strengths
    assert last.cv_loss < chosen.cv_loss < row(outcome, "tuned, shared").cv_loss
    assert (
        chosen.inner_solves
        == last.inner_solves
        == outcome.history[-1].inner_solves + row(outcome, "tuned, shared").inner_solves
    )
    assert outcome.evidence is not None
    assert outcome.evidence.improvement == pytest.approx(steps[0].watch_loss - best.watch_loss, abs=1e-12)
    assert outcome.evidence.rows == outcome.splits.watch.size
    assert outcome.evidence.standard_error > 0


def test_test_rows_have_no_say(wine_per_feature: Outcome) -> None:
    dataset = wine_per_feature.dataset
    inputs = dataset.inputs.copy()
    inputs[wine_per_feature.splits.test] = np.random.default_rng(0).normal(size=(45, 13))
    again = tune(replace(dataset, inputs=inputs), wine_per_feature.settings)
    for before, after in zip(wine_per_feature.rows, again.rows, strict=True):
        assert before.log_strengths == after.log_strengths
        assert (before.cv_loss, before.watch_loss) == (after.cv_loss, after.watch_loss)
        assert before.test_loss != after.test_loss


def test_strengths_stay_in_the_range() -> None:
    settings = TuneSettings(penalty=Penalty.FEATURE, folds=2, learning_rate=5.0, steps=4, patience=50)
    outcome = tune(load_bundled("diabetes"), settings)
    values = np.array([step.log_strengths for step in outcome.history if step.stage == "feature"])
    assert values.min() >= LOG_RANGE[0]
    assert values.max() <= LOG_RANGE[1]
    assert outcome.stopped["feature"] == "the limit of 4 steps is reached"


def noise(rows: int = 60) -> Dataset:
    rng = np.random.default_rng(1)
    return Dataset("noise", rng.normal(size=(rows, 2)), rng.normal(size=rows), ("a", "b"), (), Task.REGRESSION)


def test_an_optimum_at_an_end_is_said_and_a_vanishing_gradient_ends_the_descent() -> None:
    outcome = tune(noise(), TuneSettings(penalty=Penalty.FEATURE, folds=3))
    assert row(outcome, "tuned, shared").log_strengths[0] == pytest.approx(LOG_RANGE[1])
    assert "at an end of the range" in outcome.notes[0]
    assert outcome.stopped["feature"] == "the hypergradient vanished"


def test_steps_limit_the_shared_search() -> None:
    outcome = tune(load_bundled("diabetes"), TuneSettings(steps=1))
    assert len(outcome.history) == 10
    assert "budget of 10" in outcome.stopped["shared"]


class Recorder:
    def __init__(self) -> None:
        self.stages: list[tuple[str, int]] = []
        self.steps: dict[str, list[OuterStep | None]] = {}

    def stage(self, name: str, total: int) -> None:
        self.stages.append((name, total))
        self.steps[name] = []

    def step(self, step: OuterStep | None) -> None:
        self.steps[self.stages[-1][0]].append(step)


def test_progress_is_told() -> None:
    told = Recorder()
    outcome = tune(noise(), TuneSettings(penalty=Penalty.FEATURE, folds=2, steps=2), progress=told)
    assert told.stages == [("grid", 33), ("shared", 11), ("feature", 3)]
    assert len(told.steps["grid"]) == 33
    # Error bounds are computed at the end, and only for the steps of the table.
    assert [*told.steps["shared"], *told.steps["feature"]] == [
        replace(step, error_bound=None, certified=False) for step in outcome.history
    ]
    bounded = {step.log_strengths for step in outcome.history if step.error_bound is not None}
    assert bounded == {
        row.log_strengths for row in outcome.rows if "feature" in row.name or row.name == "tuned, shared"
    }


def failing(monkeypatch: pytest.MonkeyPatch, fails: Any) -> None:
    """Make the hypergradient fail wherever ``fails(log_strengths)``."""
    original = HyperparameterOptimization.hypergradient

    def hypergradient(self: HyperparameterOptimization, data: Any, *, init: Any = None) -> Any:
        (theta,) = self.parameters()
        if fails(theta.detach()):
            raise bilevel.SolveError("the inner solve ran out of iterations", None)  # type: ignore[arg-type]
        return original(self, data, init=init)

    monkeypatch.setattr(HyperparameterOptimization, "hypergradient", hypergradient)


def test_a_failed_probe_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, lambda theta: theta.ndim == 0 and theta < -9.5)
    outcome = tune(load_bundled("diabetes"))
    assert len(outcome.notes) == 2
    assert "left out, because a solve failed: the inner solve ran out of iterations" in outcome.notes[0]
    tuned, grid = row(outcome, "tuned, shared"), row(outcome, "best of grid")
    assert tuned.cv_loss <= grid.cv_loss
    assert tuned.inner_solves == 5 * (len(outcome.history) + 2)  # failed solves cost, too


def test_per_feature_tuning_ends_at_a_failed_solve_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []

    def fails(theta: Any) -> bool:
        calls.extend([None] if theta.ndim else [])
        return len(calls) > 3

    failing(monkeypatch, fails)
    outcome = tune(load_bundled("diabetes"), TuneSettings(penalty=Penalty.FEATURE))
    assert outcome.stopped["feature"] == "a solve failed"
    assert "stopped early, because a solve failed" in outcome.notes[0]
    assert len([step for step in outcome.history if step.stage == "feature"]) == 3


def test_a_failed_final_fit_costs_its_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    argmin, calls = bilevel.argmin, []

    def sometimes(*args: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) > 1:
            return argmin(*args, **options)

        def fail(*args: Any) -> Any:
            raise bilevel.SolveError("diverged", None)  # type: ignore[arg-type]

        return fail

    monkeypatch.setattr(bilevel, "argmin", sometimes)
    outcome = tune(noise(), TuneSettings(folds=2))
    assert math.isnan(outcome.rows[0].test_loss)
    assert math.isnan(outcome.rows[0].test_score)
    assert "untuned has no test loss, because the final fit failed: diverged" in outcome.notes
    assert math.isfinite(outcome.rows[2].test_loss)


def test_if_every_solve_fails_the_error_comes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    first: list[None] = []

    def fails(theta: Any) -> bool:
        first.append(None)
        return len(first) > 1  # the untuned row is solved

    failing(monkeypatch, fails)
    with pytest.raises(bilevel.SolveError):
        tune(noise())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "steps to be at least 1, got -1"),
        ({"patience": 0}, "patience to be at least 1"),
        ({"learning_rate": 0.0}, "learning rate to be positive"),
        ({"learning_rate": math.nan}, "learning rate to be positive"),
    ],
)
def test_settings_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(bilevel.ArgumentError, match=message):
        TuneSettings(**options)
