"""Tune the strengths of a linear model's penalty by the gradient of its cross-validation loss.

The steps of :func:`tune`, and the data that each uses:

1. *Grid.* scikit-learn's estimators on :data:`~bilevel.hyperopt.grid.GRID_POINTS` values of one shared
   strength: the comparison.
2. *Shared strength.* :func:`~bilevel.hyperopt.scalar_search.minimise_scalar` on θ, in the grid's range: a few
   coarse probes, then interpolation with the hypergradient.
3. *One strength per feature.* Adam on the vector θ, from the shared strength found, kept in the grid's range.
   Many strengths can overfit the folds: the loss of the K fold models on *watch* rows, which are in no fold,
   is looked at after each step. Tuning stops when it has not improved for ``patience`` steps, and returns the
   strengths at which it was least.

The K inner problems of one evaluation are solved and differentiated as one batch, from the previous
evaluation's solutions. At the end every choice is fitted once to all development rows and tested on the test
rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

import bilevel
from bilevel.hyperopt.data import Dataset
from bilevel.hyperopt.folds import TOLERANCE, Folds
from bilevel.hyperopt.grid import GRID_POINTS, LOG_RANGE, fit, grid_search, loss_of, score_of, scores_of
from bilevel.hyperopt.linear_models import WeightedData
from bilevel.hyperopt.outcome import Outcome, OuterStep, Penalty, Progress, Row, TuneSettings, WatchEvidence
from bilevel.hyperopt.scalar_search import minimise_scalar
from bilevel.hyperopt.splits import Splits, model_for, split

__all__ = ["tune"]

PROBES = 9
"""Coarse probes of the shared strength: one per decade."""

REFINEMENTS = 15
"""The most evaluations after the probes; with them 24, fewer than the grid's 33."""

GRADIENT_TOLERANCE = 1e-6
"""Per-feature tuning has converged when the (projected) hypergradient's norm is at or below this."""


class _Silence:
    def stage(self, name: str, total: int) -> None: ...

    def step(self, step: OuterStep | None) -> None: ...


def tune(dataset: Dataset, settings: TuneSettings | None = None, *, progress: Progress | None = None) -> Outcome:
    """Tune the strengths for ``dataset`` and compare with scikit-learn's default and a grid.

    Parameters
    ----------
    dataset
        The data, see :func:`bilevel.hyperopt.data.load`.
    settings
        Defaults if None.
    progress
        Told of every step.

    Raises
    ------
    bilevel.hyperopt.data.DataError
        If the data cannot be divided as asked.
    bilevel.SolveError
        If no evaluation of the shared strength succeeds.

    Examples
    --------
    >>> from bilevel.hyperopt.data import load_bundled
    >>> outcome = tune(load_bundled("diabetes"))
    >>> [row.name for row in outcome.rows]
    ['untuned', 'best of grid', 'tuned, shared']
    >>> default, grid, tuned = outcome.rows
    >>> tuned.cv_loss <= grid.cv_loss, tuned.inner_solves < grid.inner_solves
    (True, True)
    """
    settings = settings or TuneSettings()
    splits = split(
        dataset,
        folds=settings.folds,
        test_size=settings.test_size,
        watch_size=settings.watch_size,
        seed=settings.seed,
    )
    return _Run(dataset, splits, settings, progress or _Silence()).run()


@dataclass(eq=False)
class _Run:
    dataset: Dataset
    splits: Splits
    settings: TuneSettings
    progress: Progress
    history: list[OuterStep] = field(default_factory=list)
    stopped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def run(self) -> Outcome:
        began = time.perf_counter()
        self.model = model_for(self.dataset)
        rows = [self._untuned(), self._grid()]
        shared = self._shared()
        rows.append(shared)
        evidence = None
        if self.settings.penalty is Penalty.FEATURE:
            chosen, evidence = self._per_feature(shared)
            rows += chosen
        return Outcome(
            self.dataset,
            self.splits,
            self.settings,
            tuple(rows),
            tuple(self.history),
            self.grid,
            self.stopped,
            evidence,
            tuple(self.notes),
            time.perf_counter() - began,
        )

    def _untuned(self) -> Row:
        theta = -math.log(self.splits.training_size)  # alpha = 1 or C = 1, scikit-learn's default
        step, _ = Folds(self.model, self.splits, torch.tensor(theta, dtype=torch.float64), "untuned").evaluate()
        return self._row("untuned", step, 0, 0.0)

    def _grid(self) -> Row:
        self.progress.stage("grid", GRID_POINTS)
        import sklearn.linear_model  # noqa: F401  # so that its import is not counted as the grid's time

        began = time.perf_counter()
        self.grid = grid_search(self.dataset.task, self.splits, on_point=lambda: self.progress.step(None))
        seconds = time.perf_counter() - began
        self.notes += [f"scikit-learn warned on the grid: {message}" for message in self.grid.warnings]
        best = self.grid.best
        theta = self.grid.log_strengths[best]
        fitted = fit(self.dataset.task, self.splits, theta, self.splits.development)
        inputs, targets = (part.numpy() for part in self.splits.part(self.splits.test))
        scores = scores_of(self.dataset.task, fitted, inputs)
        return Row(
            "best of grid", (theta,), self.grid.losses[best], self.grid.watch_losses[best],
            loss_of(self.dataset.task, scores, targets), score_of(self.dataset.task, scores, targets),
            self.grid.solves, seconds,
        )  # fmt: skip

    def _shared(self) -> Row:
        budget = PROBES + min(self.settings.steps, REFINEMENTS)
        self.progress.stage("shared", budget)
        folds = Folds(self.model, self.splits, torch.zeros((), dtype=torch.float64), "shared")
        steps: dict[float, OuterStep] = {}
        failures: list[bilevel.SolveError] = []

        def function(theta: float) -> tuple[float, float]:
            folds.move_to(theta)
            try:
                step, gradient = folds.evaluate()
            except bilevel.SolveError as error:
                failures.append(error)
                self.notes.append(
                    f"shared strength {math.exp(theta):.3g} was left out, because a solve failed: {error}"
                )
                folds.problem.reset()
                return math.inf, math.nan
            steps[theta] = self._file(step)
            return step.cv_loss, float(gradient)

        search = minimise_scalar(function, *LOG_RANGE, probes=PROBES, max_evaluations=budget)
        if not steps:
            raise failures[-1]
        self.stopped["shared"] = search.stopped
        if search.at_end:
            self.notes.append(
                f"the best shared strength, {math.exp(search.best.x):.3g}, is at an end of the range that was searched"
            )
        best, solves, seconds = steps[search.best.x], folds.solves, folds.seconds
        self._bound(folds, best)
        return self._row("tuned, shared", best, solves, seconds)

    def _per_feature(self, shared: Row) -> tuple[list[Row], WatchEvidence]:
        self.progress.stage("feature", self.settings.steps + 1)
        start = torch.full((self.model.features,), shared.log_strengths[0], dtype=torch.float64)
        folds = Folds(self.model, self.splits, start, "feature")
        descent = _descend(folds, self.settings, self._file)
        self.stopped["feature"] = descent.stopped
        if descent.failure is not None:
            self.notes.append(f"per-feature tuning stopped early, because a solve failed: {descent.failure}")
        if descent.best is None or descent.last is None:
            raise descent.failure or AssertionError("a descent without failure has steps")
        seconds = shared.seconds + folds.seconds
        for step in {descent.best.number: descent.best, descent.last.number: descent.last}.values():
            self._bound(folds, step)
        rows = [self._row("tuned, per feature", descent.best, shared.inner_solves + folds.solves, seconds)]
        if descent.last is not descent.best:
            rows.append(self._row("per feature, last step", descent.last, rows[0].inner_solves, rows[0].seconds))
        return rows, descent.evidence()

    def _bound(self, folds: Folds, step: OuterStep) -> None:
        """Bound the error at a step that the table shows. The other steps need no bound."""
        self.history[self.history.index(step)] = folds.bounded(step)

    def _file(self, step: OuterStep) -> OuterStep:
        self.history.append(step)
        self.progress.step(step)
        return step

    def _row(self, name: str, step: OuterStep, solves: int, seconds: float) -> Row:
        inputs, targets = self.splits.part(self.splits.development)
        weights = torch.ones_like(inputs[:, 0])
        theta = torch.tensor(step.log_strengths, dtype=torch.float64)
        train = bilevel.argmin(self.model.training_objective, solver=bilevel.Newton(), tolerance=TOLERANCE)
        try:
            trained = train(self.model.initial(), theta, WeightedData(inputs, targets, weights, weights))
        except bilevel.SolveError as error:
            self.notes.append(f"{name} has no test loss, because the final fit failed: {error}")
            trained = {part: torch.full_like(value, math.nan) for part, value in self.model.initial().items()}
        inputs, targets = self.splits.part(self.splits.test)
        scores, truth = self.model.scores(trained, inputs).numpy(), targets.numpy()
        task = self.dataset.task
        return Row(
            name, step.log_strengths, step.cv_loss, step.watch_loss,
            loss_of(task, scores, truth), score_of(task, scores, truth), solves, seconds,
        )  # fmt: skip


@dataclass(eq=False)
class _Descent:
    """The course of per-feature tuning, judged by the watch loss."""

    best: OuterStep | None = None
    last: OuterStep | None = None
    stopped: str = ""
    failure: bilevel.SolveError | None = None
    first_losses: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    best_losses: torch.Tensor = field(default_factory=lambda: torch.zeros(0))

    def take(self, step: OuterStep, watch_losses: torch.Tensor) -> None:
        if self.last is None:
            self.first_losses = watch_losses
        if self.best is None or step.watch_loss < self.best.watch_loss:
            self.best, self.best_losses = step, watch_losses
        self.last = step

    def waited(self) -> int:
        assert self.best is not None
        assert self.last is not None
        return self.last.number - self.best.number

    def evidence(self) -> WatchEvidence:
        difference = self.first_losses - self.best_losses
        rows = difference.numel()
        error = float(difference.std()) / math.sqrt(rows) if rows > 1 else math.nan
        return WatchEvidence(float(difference.mean()), error, rows)


def _descend(folds: Folds, settings: TuneSettings, file: Callable[[OuterStep], OuterStep]) -> _Descent:
    theta = folds.theta
    optimizer = torch.optim.Adam([theta], lr=settings.learning_rate)
    low, high = LOG_RANGE
    course = _Descent()
    while True:
        try:
            step, gradient = folds.evaluate()
        except bilevel.SolveError as error:
            course.stopped, course.failure = "a solve failed", error
            return course
        course.take(file(step), folds.watch_losses)
        outward = ((theta <= low) & (gradient > 0)) | ((theta >= high) & (gradient < 0))
        if float(torch.where(outward, 0.0, gradient).norm()) <= GRADIENT_TOLERANCE:
            course.stopped = "the hypergradient vanished"
            return course
        if course.waited() >= settings.patience:
            course.stopped = f"the held-back loss has not improved for {settings.patience} steps"
            return course
        if step.number >= settings.steps:
            course.stopped = f"the limit of {settings.steps} steps is reached"
            return course
        theta.grad = gradient.detach().clone()
        optimizer.step()
        with torch.no_grad():
            theta.clamp_(low, high)
