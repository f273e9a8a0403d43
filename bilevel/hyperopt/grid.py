"""The grid search that tuning is compared with: scikit-learn's own estimator, for each strength and fold."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from bilevel.hyperopt.data import Task
from bilevel.hyperopt.splits import Splits

__all__ = [
    "GRID_POINTS",
    "LOG_RANGE",
    "GridCurve",
    "cross_validate",
    "estimator",
    "fit",
    "grid_search",
    "loss_of",
    "score_of",
    "scores_of",
]

GRID_POINTS = 33
"""Four points for each of the eight decades, both ends included."""

LOG_RANGE = (math.log(1e-6), math.log(1e2))
"""Range of the shared log-strength θ, per example (features have unit variance)."""


@dataclass(frozen=True)
class GridCurve:
    """The cross-validation loss over the grid.

    Parameters
    ----------
    log_strengths, losses, watch_losses
        One of each per grid point: θ, the mean over the folds of the validation loss and of the loss on watch
        rows.
    solves
        Estimators fitted: grid points times folds.
    warnings
        scikit-learn's warnings, each once.
    """

    log_strengths: tuple[float, ...]
    losses: tuple[float, ...]
    watch_losses: tuple[float, ...]
    solves: int
    warnings: tuple[str, ...] = ()

    @property
    def best(self) -> int:
        """The number of the point with the least loss."""
        return int(np.argmin(self.losses))


def estimator(task: Task, log_strength: float, rows: float) -> Any:
    """Return scikit-learn's estimator with the objective of :mod:`bilevel.hyperopt.linear_models`.

    Parameters
    ----------
    task
        Regression, binary or multiclass.
    log_strength
        θ, shared by all features.
    rows
        n, the number of rows it will be fitted to.
    """
    from sklearn.linear_model import LogisticRegression, Ridge

    if task is Task.REGRESSION:
        return Ridge(alpha=rows * math.exp(log_strength), solver="cholesky")
    # The fastest of scikit-learn's solvers that is exact here, for each. The multinomial Hessian is singular but for
    # the penalty, and newton-cholesky's line search gives up on it. A looser tol leaves fits at the weakest
    # strengths off in the fourth digit of the loss.
    solver = "newton-cholesky" if task is Task.BINARY else "newton-cg"
    return LogisticRegression(C=1 / (rows * math.exp(log_strength)), solver=solver, tol=1e-10, max_iter=1000)


def scores_of(task: Task, fitted: Any, inputs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return predictions for regression, and otherwise the scores before the (soft)max."""
    scores: NDArray[np.float64] = (
        fitted.predict(inputs) if task is Task.REGRESSION else fitted.decision_function(inputs)
    )
    return scores


def loss_of(task: Task, scores: NDArray[np.float64], targets: NDArray[Any]) -> float:
    """Return the mean squared error, or the mean log loss."""
    if task is Task.REGRESSION:
        return float(np.mean((targets - scores) ** 2))
    # From scores, not from probabilities: those round to 0 and 1, and their logarithms to infinity.
    if task is Task.BINARY:
        return float(np.mean(np.logaddexp(0, scores) - targets * scores))
    chosen = scores[np.arange(targets.size), targets]
    return float(np.mean(logsumexp(scores, axis=1) - chosen))


def score_of(task: Task, scores: NDArray[np.float64], targets: NDArray[Any]) -> float:
    """Return R² (NaN for targets that are all the same), or the accuracy; NaN for scores that are NaN."""
    if np.isnan(scores).any():
        return math.nan
    if task is Task.REGRESSION:
        if not np.ptp(targets) > 0:  # not by the spread, which rounding of the mean leaves above zero
            return math.nan
        return float(1 - np.sum((targets - scores) ** 2) / np.sum((targets - targets.mean()) ** 2))
    predicted = scores > 0 if task is Task.BINARY else scores.argmax(1)
    return float(np.mean(predicted == targets))


def cross_validate(task: Task, splits: Splits, log_strength: float) -> tuple[float, float]:
    """Return the validation loss and the loss on the watch rows, each the mean over the folds' estimators."""
    rows = splits.fold_rows
    losses = []
    for held in splits.folds:
        fitted = fit(task, splits, log_strength, np.setdiff1d(rows, held))
        losses.append([_loss_on(task, splits, fitted, part) for part in (held, splits.watch)])
    mean = np.mean(losses, axis=0)
    return float(mean[0]), float(mean[1])


def fit(task: Task, splits: Splits, log_strength: float, rows: NDArray[np.int64]) -> Any:
    """Return scikit-learn's estimator fitted to ``rows``."""
    inputs, targets = (part.numpy() for part in splits.part(rows))
    return estimator(task, log_strength, rows.size).fit(inputs, targets)


def _loss_on(task: Task, splits: Splits, fitted: Any, rows: NDArray[np.int64]) -> float:
    inputs, targets = (part.numpy() for part in splits.part(rows))
    return loss_of(task, scores_of(task, fitted, inputs), targets)


def grid_search(
    task: Task, splits: Splits, points: int = GRID_POINTS, *, on_point: Callable[[], None] | None = None
) -> GridCurve:
    """Fit an estimator for each point of an equidistant grid in θ over :data:`LOG_RANGE`, and each fold.

    Parameters
    ----------
    task
        Regression, binary or multiclass.
    splits
        The folds.
    points
        Of the grid.
    on_point
        Called after each point.
    """
    thetas = [float(theta) for theta in np.linspace(*LOG_RANGE, points)]
    losses = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for theta in thetas:
            losses.append(cross_validate(task, splits, theta))
            if on_point is not None:
                on_point()
    return GridCurve(
        tuple(thetas),
        tuple(loss for loss, _ in losses),
        tuple(watch for _, watch in losses),
        points * len(splits.folds),
        tuple(dict.fromkeys(str(warning.message).partition("\n")[0] for warning in caught)),
    )
