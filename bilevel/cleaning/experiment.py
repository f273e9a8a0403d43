"""Clean a data set several times, and compare with the alternatives.

Each run, in order:

1. *Parts.* A trusted and a test part are split off, and labels of the training part are made wrong if asked.
2. *Weights.* :func:`~bilevel.cleaning.clean.clean` learns them. The test rows take no part.
3. *Comparisons.* Small-loss selection and confident learning flag rows by a cross-validation of the same model.
4. *Classifiers.* One is trained for each choice of training rows, from the same initial parameters, in the same steps. The trusted rows
   are added to all choices.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from bilevel import stochastic
from bilevel.cleaning import comparisons
from bilevel.cleaning.clean import Cleaned, clean
from bilevel.cleaning.data import LabelledData, numbered_like
from bilevel.cleaning.model_choice import choose_model
from bilevel.cleaning.noise import corrupt
from bilevel.cleaning.outcome import (
    ALONE,
    CLEANED,
    CONFIDENT,
    GIVEN,
    SMALL_LOSS,
    TRUE,
    Choice,
    CleanRunSettings,
    Outcome,
    Progress,
    Run,
    StepPoint,
)  # fmt: skip
from bilevel.cleaning.settings import CleaningSettings, default_method
from bilevel.cleaning.splits import Sizes, check_classes, split
from bilevel.cleaning.training import Examples, accuracy, train_classifier

__all__ = ["FOLDS", "run_cleaning"]

FOLDS = 5
"""Of the cross-validation that the comparisons judge by."""

_POINTS = 50
"""Outer steps at which the test accuracy is measured, about."""


class _Silence:
    def stage(self, name: str, total: int) -> None: ...

    def step(self, point: StepPoint | None) -> None: ...


def run_cleaning(
    data: LabelledData,
    settings: CleanRunSettings | None = None,
    *,
    trusted: LabelledData | None = None,
    model: str = "linear",
    progress: Progress | None = None,
) -> Outcome:
    """Clean ``data`` in ``settings.seeds`` runs.

    Parameters
    ----------
    data
        See :func:`bilevel.cleaning.data.load`.
    settings
        Defaults if None.
    trusted
        A trusted set; None: rows of ``data`` are split off for it.
    model
        See :func:`bilevel.cleaning.model_choice.choose_model`.
    progress
        Told of every step.

    Raises
    ------
    bilevel.cleaning.data.DataError
        If the data cannot be divided as asked.
    bilevel.ArgumentError
        If the model does not fit.
    """
    settings = settings or CleanRunSettings()
    began = time.perf_counter()
    if trusted is not None:
        trusted = numbered_like(trusted, data)
        check_classes(trusted.labels, data.classes, f"the rows of {trusted.name}", "add one")
    make = choose_model(model, data)
    confident = settings.compare and comparisons.has_cleanlab()
    notes = []
    if settings.compare and not confident:
        notes.append(
            'Confident learning is left out, because cleanlab is not installed; pip install ".[clean]" in a clone adds the row.'
        )
    sizes = Sizes(
        trusted=0 if trusted is not None else settings.trusted_size,
        training=settings.training_size,
        test=settings.test_size,
    )
    for number in range(settings.seeds):  # before any work
        split(data, sizes, run=number, seed=settings.seed)
    runs = tuple(
        _SingleRun(data, trusted, settings, sizes, make, confident, progress or _Silence(), number, notes).run()
        for number in range(settings.seeds)
    )
    return Outcome(data, trusted, model, settings, runs, tuple(dict.fromkeys(notes)), time.perf_counter() - began)


@dataclass(eq=False)
class _SingleRun:
    data: LabelledData
    given_trusted: LabelledData | None
    settings: CleanRunSettings
    sizes: Sizes
    make: Callable[[], nn.Module]
    confident: bool
    progress: Progress
    number: int
    notes: list[str]
    choices: list[Choice] = field(default_factory=list)
    points: list[StepPoint] = field(default_factory=list)

    def run(self) -> Run:
        self.seed = self.settings.seed + self.number
        self.cleaning = CleaningSettings(
            steps=self.settings.steps,
            training_steps=self.settings.training_steps,
            batch_size=self.settings.batch_size,
            include_trusted=True,
            seed=self.seed,
        )
        self._divide()
        self.progress.stage(f"run {self.number + 1} of {self.settings.seeds}", self.settings.steps)
        cleaned, seconds = self._timed(self._learn_weights)
        others = 2 + (self.wrong is not None) + self.settings.compare * (FOLDS + 1) + self.confident
        self.progress.stage(f"run {self.number + 1} of {self.settings.seeds}, comparisons", others)
        self._train(GIVEN, self.training)
        self._train(ALONE, self.trusted)
        self._file(CLEANED, cleaned.model, cleaned.flagged, seconds)
        if self.settings.compare:
            self._compare(int((cleaned.flagged if self.wrong is None else self.wrong).sum()))
        if self.wrong is not None:
            self._train(TRUE, (self.training[0], self.data.labels[self.split.training]))
        return Run(
            self.seed, self.split, self.training[1], self.wrong, cleaned, tuple(self.choices), tuple(self.points)
        )

    def _divide(self) -> None:
        self.split = split(self.data, self.sizes, run=self.number, seed=self.settings.seed)
        rows = self.split.training
        scale = _scaler(self.data.inputs[rows], images=self.data.images)
        labels = self.data.labels[rows]
        self.wrong: torch.Tensor | None = None
        if self.settings.corrupt > 0:
            labels, self.wrong = corrupt(
                labels, self.settings.corrupt, seed=self.seed, classes=len(self.data.classes), noise=self.settings.noise
            )
        self.training: Examples = scale(self.data.inputs[rows]), labels
        if self.given_trusted is not None:
            self.trusted: Examples = scale(self.given_trusted.inputs), self.given_trusted.labels
        else:
            self.trusted = scale(self.data.inputs[self.split.trusted]), self.data.labels[self.split.trusted]
        self.test: Examples = scale(self.data.inputs[self.split.test]), self.data.labels[self.split.test]

    def _learn_weights(self) -> Cleaned:
        made: list[stochastic.StochasticMethod] = []

        def make_method(problem: Any, inner: nn.Module, outer: torch.Tensor) -> stochastic.StochasticMethod:
            made.append(default_method(problem, inner, outer))
            return made[0]

        every = max(self.settings.steps // _POINTS, 1)

        def on_step(step: int, result: stochastic.StepResult) -> None:
            measured = step == 1 or step % every == 0
            point = StepPoint(
                step,
                float(result.outer_loss),
                float(result.hypergradient_norm),
                self._accuracy(made[0].inner) if measured else math.nan,
            )
            self.points.append(point)
            self.progress.step(point)

        settings = replace(self.cleaning, make_method=make_method)
        return clean(self.training, self.trusted, make_model=self.make, settings=settings, on_step=on_step)

    def _compare(self, count: int) -> None:
        judge = partial(
            comparisons.cross_validated_probabilities, self.make, self.training, self.trusted, settings=self.cleaning,
            folds=FOLDS, on_fold=lambda: self.progress.step(None),
        )  # fmt: skip
        probabilities, judging = self._timed(judge)
        labels = self.training[1]
        self._select(SMALL_LOSS, lambda: comparisons.small_loss(probabilities, labels, count), judging)
        if self.confident:
            self._select(CONFIDENT, lambda: comparisons.confident_learning(probabilities, labels), judging)

    def _select(self, name: str, select: Callable[[], torch.Tensor], judging: float) -> None:
        """Flag rows by ``select``, and train on the others."""
        flagged, choosing = self._timed(select)
        weights = self.cleaning.weights.neutral * (~flagged).to(self.training[0])  # that of the trusted rows
        train = partial(train_classifier, self.make, self.training, settings=self.cleaning, trusted=self.trusted)
        model, training = self._timed(lambda: train(weights=weights))
        self._file(name, model, flagged, judging + choosing + training)
        self.progress.step(None)

    def _train(self, name: str, examples: Examples) -> None:
        trusted = None if name == ALONE else self.trusted
        model, seconds = self._timed(
            lambda: train_classifier(self.make, examples, settings=self.cleaning, trusted=trusted)
        )
        self._file(name, model, None, seconds)
        self.progress.step(None)

    def _file(self, name: str, model: nn.Module, flagged: torch.Tensor | None, seconds: float) -> None:
        precision = recall = math.nan
        if flagged is not None and self.wrong is not None:
            hits = int((flagged & self.wrong).sum())
            precision = hits / int(flagged.sum()) if bool(flagged.any()) else math.nan
            recall = hits / int(self.wrong.sum()) if bool(self.wrong.any()) else math.nan
        count = None if flagged is None else int(flagged.sum())
        self.choices.append(Choice(name, self._accuracy(model), count, precision, recall, seconds))

    def _accuracy(self, model: nn.Module) -> float:
        if not len(self.test[1]):
            return math.nan
        training = model.training
        try:
            return accuracy(model.eval(), self.test)
        finally:
            model.train(training)

    @staticmethod
    def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
        began = time.perf_counter()
        return work(), time.perf_counter() - began


_NORM = 8.0
"""Root mean square of ‖x‖ above which inputs are scaled down: Adam's steps change scores by up to its learning rate times ‖x‖₁."""

_CONSTANT = 1e-13
"""A column whose deviation is a smaller share of its size is constant up to rounding."""


def _scaler(seen: torch.Tensor, *, images: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a map that standardises columns by ``seen`` (a constant column becomes zero) and limits the norm of inputs.

    Images are not standardised: their values lie in [0, 1] already.
    """
    double = seen.double()
    mean, deviation = double.mean(0), double.std(0, correction=0)
    constant = deviation <= _CONSTANT * double.abs().amax(0)
    deviation = torch.where(constant, torch.inf, deviation)
    if images:
        mean, deviation = torch.zeros_like(mean), torch.ones_like(deviation)
    norm = ((double - mean) / deviation).square().flatten(1).sum(1).mean().sqrt()
    factor = _NORM / norm.clamp(min=_NORM)
    return lambda inputs: ((inputs.double() - mean) / deviation * factor).float()
