"""Tune the strengths of a linear model's penalty by the gradient of its cross-validation loss.

The steps of :func:`tune`, and what each may look at:

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

import enum
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

import bilevel
from bilevel.hyperopt.data import Dataset
from bilevel.hyperopt.grid import (
    GRID_POINTS,
    LOG_RANGE,
    GridCurve,
    fit,
    grid_search,
    loss_of,
    score_of,
    scores_of,
)
from bilevel.hyperopt.linear_models import FOLD_DIMS, LinearModel, Parameters, WeightedData
from bilevel.hyperopt.problem import HyperparameterOptimization
from bilevel.hyperopt.scalar_search import minimise_scalar
from bilevel.hyperopt.splits import Splits, model_for, split

__all__ = ["Outcome", "OuterStep", "Penalty", "Progress", "Row", "TuneSettings", "WatchEvidence", "tune"]

PROBES = 9
"""Coarse probes of the shared strength: one per decade."""

REFINEMENTS = 15
"""The most evaluations after the probes; with them 24, fewer than the grid's 33."""

TOLERANCE = bilevel.Tolerance(delta=1e-10, delta_prime=1e-10)
"""Residuals of the two solves. The weakest strength makes condition numbers near 1e6, where the default, all
that float64 holds, is at times out of reach."""

GRADIENT_TOLERANCE = 1e-6
"""Per-feature tuning has converged when the (projected) hypergradient's norm is at or below this."""


class Penalty(enum.Enum):
    """How many strengths there are."""

    SHARED = "shared"
    FEATURE = "feature"


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """Settings of a run.

    Parameters
    ----------
    penalty
        One strength shared by all features, or one per feature.
    folds
        K.
    test_size
        The part of all rows that is held out and tested on once.
    watch_size
        The part of the other rows that is held back from the folds.
    steps
        The most outer steps: after the probes for a shared strength (where 15 is the limit), and of Adam for
        one per feature.
    patience
        Per-feature tuning stops when the watch loss has not improved for so many steps.
    learning_rate
        Of Adam, in units of the log-strengths.
    seed
        Of the splits; nothing else is random.
    """

    penalty: Penalty = Penalty.SHARED
    folds: int = 5
    test_size: float = 0.25
    watch_size: float = 0.2
    steps: int = 60
    patience: int = 10
    learning_rate: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "patience"):
            if getattr(self, name) < 1:
                raise bilevel.ArgumentError(
                    f"expected {name} to be at least 1, got {getattr(self, name)}; pass for example --{name} 10"
                )
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise bilevel.ArgumentError(
                f"expected the learning rate to be positive and finite, got {self.learning_rate}; pass for "
                "example "
                "--learning-rate 0.1"
            )


@dataclass(frozen=True)
class OuterStep:
    """One evaluation of the cross-validation loss and its hypergradient.

    Parameters
    ----------
    stage
        ``"shared"`` or ``"feature"``.
    number
        From 0 in its stage.
    log_strengths
        θ: one value, or one per feature.
    cv_loss, watch_loss
        Mean over the folds.
    corrected_cv_loss
        ``cv_loss`` with the first-order error of the inner solves removed.
    gradient_norm
        Of the hypergradient.
    inner_residual, inner_steps, adjoint_steps
        The largest over the folds: of the inner solve's gradient norm, of its steps, and of the linear
        solve's.
    error_bound
        Of the hypergradient; None where none is known.
    certified
        Whether the bound is proven.
    inner_solves
        In this stage so far.
    seconds
        In this stage so far.
    """

    stage: str
    number: int
    log_strengths: tuple[float, ...]
    cv_loss: float
    watch_loss: float
    corrected_cv_loss: float
    gradient_norm: float
    inner_residual: float
    inner_steps: int
    adjoint_steps: int
    error_bound: float | None
    certified: bool
    inner_solves: int
    seconds: float


@dataclass(frozen=True)
class Row:
    """One line of the final table: a choice of strengths and what became of it.

    Parameters
    ----------
    name
        What the strengths are.
    log_strengths
        θ: one value, or one per feature.
    cv_loss, watch_loss
        Mean over the folds' models, on their validation rows and on the watch rows.
    test_loss, test_score
        Of one model fitted to all development rows: loss, and accuracy or R², on the test rows. NaN if that fit
        failed.
    inner_solves, seconds
        Spent to arrive at the choice, from nothing: fits of one model to one fold, and wall time (without that of
        the error bounds, which only the report wants).
    """

    name: str
    log_strengths: tuple[float, ...]
    cv_loss: float
    watch_loss: float
    test_loss: float
    test_score: float
    inner_solves: int
    seconds: float


@dataclass(frozen=True)
class WatchEvidence:
    """How far per-feature strengths lowered the watch loss, against the shared strength they began from.

    Parameters
    ----------
    improvement
        Mean over the watch rows.
    standard_error
        Of that mean, from the paired differences of the rows. The choice among steps was made on the
        same rows, so that the improvement is optimistic.
    rows
        How many there are.
    """

    improvement: float
    standard_error: float
    rows: int


@dataclass(frozen=True, eq=False)
class Outcome:
    """Everything that a run found.

    Parameters
    ----------
    dataset, splits, settings
        What was tuned, and how.
    rows
        The final table.
    history
        Every outer step, shared stage first.
    grid
        The grid's curve.
    stopped
        Why each stage ended.
    evidence
        For per-feature tuning.
    notes
        What a reader has to know: failed solves, an optimum at an end of the range.
    seconds
        Wall time of all.
    """

    dataset: Dataset
    splits: Splits
    settings: TuneSettings
    rows: tuple[Row, ...]
    history: tuple[OuterStep, ...]
    grid: GridCurve
    stopped: dict[str, str]
    evidence: WatchEvidence | None
    notes: tuple[str, ...]
    seconds: float


class Progress(Protocol):
    """Hears how a run goes."""

    def stage(self, name: str, total: int) -> None:
        """Hear that a stage of at most ``total`` steps begins."""

    def step(self, step: OuterStep | None) -> None:
        """Hear that a step of the stage is done; the grid's have no details."""


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
        step, _ = _Folds(self.model, self.splits, torch.tensor(theta, dtype=torch.float64), "untuned").evaluate()
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
        folds = _Folds(self.model, self.splits, torch.zeros((), dtype=torch.float64), "shared")
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
        return self._row("tuned, shared", steps[search.best.x], folds.solves, folds.seconds)

    def _per_feature(self, shared: Row) -> tuple[list[Row], WatchEvidence]:
        self.progress.stage("feature", self.settings.steps + 1)
        start = torch.full((self.model.features,), shared.log_strengths[0], dtype=torch.float64)
        folds = _Folds(self.model, self.splits, start, "feature")
        descent = _descend(folds, self.settings, self._file)
        self.stopped["feature"] = descent.stopped
        if descent.failure is not None:
            self.notes.append(f"per-feature tuning stopped early, because a solve failed: {descent.failure}")
        if descent.best is None or descent.last is None:
            raise descent.failure or AssertionError("a descent without failure has steps")
        rows = [
            self._row(
                "tuned, per feature",
                descent.best,
                shared.inner_solves + folds.solves,
                shared.seconds + folds.seconds,
            )
        ]
        if descent.last is not descent.best:
            rows.append(self._row("per feature, last step", descent.last, rows[0].inner_solves, rows[0].seconds))
        return rows, descent.evidence()

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


class _Folds:
    """The cross-validation loss as a function of θ, its hypergradient, and what they cost."""

    def __init__(self, model: LinearModel, splits: Splits, theta: torch.Tensor, stage: str) -> None:
        self.model, self.stage, self.folds = model, stage, len(splits.folds)
        self.data = splits.cross_validation()
        self.watch = splits.part(splits.watch)
        self.problem = HyperparameterOptimization(
            model.training_objective,
            model.validation_loss,
            theta,
            model.initial(self.folds),
            batch_dims=FOLD_DIMS,
            # The problems are convex and warm: a few steps each, by factorisation or Hessian-free as size has it.
            solver=bilevel.Newton(),
            tolerance=TOLERANCE,
        )
        self.evaluations = 0
        self.solves = 0
        self.seconds = 0.0
        self.watch_losses = torch.zeros(0)

    @property
    def theta(self) -> torch.nn.Parameter:
        theta: torch.nn.Parameter
        (theta,) = self.problem.parameters()
        return theta

    def move_to(self, theta: float) -> None:
        with torch.no_grad():
            self.theta.fill_(theta)

    def evaluate(self) -> tuple[OuterStep, torch.Tensor]:
        """Solve and differentiate the K problems; return the step and the hypergradient."""
        began = time.perf_counter()
        self.solves += self.folds
        try:
            result = self.problem.hypergradient(self.data)
        finally:
            self.seconds += time.perf_counter() - began
        gradient = result.grad
        self.watch_losses = self._rowwise_watch_losses(result.inner)
        bound = float(torch.as_tensor(result.error_bound).max())
        step = OuterStep(
            stage=self.stage,
            number=self.evaluations,
            log_strengths=tuple(self.theta.detach().reshape(-1).tolist()),
            cv_loss=float(result.value),
            watch_loss=float(self.watch_losses.mean()),
            corrected_cv_loss=float(result.corrected_value),
            gradient_norm=float(gradient.norm()),
            inner_residual=float(result.report.residual_norm.max()),
            inner_steps=int(result.report.forward.iterations.max()),
            adjoint_steps=int(result.report.backward.iterations.max()),
            error_bound=bound if math.isfinite(bound) else None,
            certified=bool(torch.as_tensor(result.certified).all()),
            inner_solves=self.solves,
            seconds=self.seconds,
        )
        self.evaluations += 1
        return step, gradient

    def _rowwise_watch_losses(self, inner: Parameters) -> torch.Tensor:
        inputs, targets = self.watch

        def losses(parameters: Parameters) -> torch.Tensor:
            return self.model.losses(self.model.scores(parameters, inputs), targets)

        with torch.no_grad():
            return self.model.metric_scale * torch.func.vmap(losses)(inner).mean(0)  # (watch rows,)


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


def _descend(folds: _Folds, settings: TuneSettings, file: Callable[[OuterStep], OuterStep]) -> _Descent:
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
