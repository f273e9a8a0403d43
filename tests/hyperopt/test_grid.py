"""The grid is scikit-learn's own, on the same folds."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest

from bilevel.hyperopt import grid
from bilevel.hyperopt.data import Task, load_bundled
from bilevel.hyperopt.grid import LOG_RANGE, cross_validate, fit, grid_search, score_of, scores_of
from bilevel.hyperopt.splits import split


@pytest.mark.parametrize("name", ["diabetes", "wine", "breast_cancer"])
def test_the_curve_is_that_of_cross_val_score(name: str) -> None:
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.model_selection import PredefinedSplit, cross_val_score

    dataset = load_bundled(name)
    splits = split(dataset, folds=3)
    rows = splits.fold_rows
    number = np.concatenate([np.full(fold.size, k) for k, fold in enumerate(splits.folds)])
    number = number[np.argsort(np.concatenate(splits.folds))]
    inputs, targets = (part.numpy() for part in splits.part(rows))
    mean, _ = cross_validate(dataset.task, splits, -3.0)
    regression = dataset.task is Task.REGRESSION
    strength = splits.training_size * math.exp(-3.0)
    # Folds differ by a row at most in size, and thus a little in scikit-learn's setting.
    expected = -cross_val_score(
        Ridge(alpha=strength) if regression else LogisticRegression(C=1 / strength, tol=1e-10, max_iter=5000),
        inputs,
        targets,
        cv=PredefinedSplit(number),
        scoring="neg_mean_squared_error" if regression else "neg_log_loss",
    ).mean()
    assert mean == pytest.approx(expected, rel=1e-3)


def test_the_grid_counts_its_fits_and_tells_of_each_point() -> None:
    dataset = load_bundled("diabetes")
    splits = split(dataset, folds=4)
    told: list[None] = []
    curve = grid_search(dataset.task, splits, points=5, on_point=lambda: told.append(None))
    assert (curve.solves, len(told), len(curve.losses), len(curve.watch_losses)) == (20, 5, 5, 5)
    assert (curve.log_strengths[0], curve.log_strengths[-1]) == LOG_RANGE
    assert curve.losses[curve.best] == min(curve.losses)


@pytest.mark.parametrize("name", ["diabetes", "wine", "breast_cancer"])
def test_scores_are_those_of_the_estimator(name: str) -> None:
    dataset = load_bundled(name)
    splits = split(dataset)
    fitted = fit(dataset.task, splits, -3.0, splits.development)
    inputs, targets = (part.numpy() for part in splits.part(splits.test))
    score = score_of(dataset.task, scores_of(dataset.task, fitted, inputs), targets)
    assert score == pytest.approx(fitted.score(inputs, targets), abs=1e-12)


def test_warnings_of_scikit_learn_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    original = grid.fit

    def fit_with_warning(*args: Any) -> Any:
        warnings.warn("did not converge\nat all", UserWarning, stacklevel=1)
        return original(*args)

    monkeypatch.setattr(grid, "fit", fit_with_warning)
    dataset = load_bundled("diabetes")
    assert grid_search(dataset.task, split(dataset), points=2).warnings == ("did not converge",)


def test_r_squared_of_constant_targets_is_not_a_number() -> None:
    assert math.isnan(score_of(Task.REGRESSION, np.ones(3), np.ones(3)))
    assert math.isnan(score_of(Task.REGRESSION, np.ones(3), np.full(3, 0.1)))  # whose mean is not quite 0.1
