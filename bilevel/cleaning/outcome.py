"""The settings and results of a run of ``bilevel clean``: rows of the table, and the protocol of progress displays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

import bilevel
from bilevel.cleaning.clean import Cleaned
from bilevel.cleaning.data import LabelledData
from bilevel.cleaning.noise import Noise
from bilevel.cleaning.splits import Split

__all__ = [
    "ALONE", "CLEANED", "CONFIDENT", "GIVEN", "SMALL_LOSS", "TRUE", "Choice", "CleanRunSettings", "Interval", "Outcome", "Progress",
    "Run", "StepPoint", "interval",
]  # fmt: skip

GIVEN, ALONE, CLEANED = "labels as given", "trusted rows alone", "cleaned by learned weights"
SMALL_LOSS, CONFIDENT, TRUE = "small-loss selection", "confident learning (cleanlab)", "true labels"
"""The rows of the table: what a classifier is trained on."""


@dataclass(frozen=True, kw_only=True)
class CleanRunSettings:
    """Settings of ``bilevel clean``.

    Parameters
    ----------
    corrupt
        The share of the training labels that is made wrong on the spot, in [0, 1).
    noise
        Which other label they get.
    seeds
        How many runs, each with other parts, wrong labels and initial parameters.
    steps
        Outer steps.
    training_steps
        Steps of each classifier.
    batch_size
        Examples in a minibatch of both levels; None: all.
    trusted_size, training_size, test_size
        See :class:`~bilevel.cleaning.splits.Sizes`.
    compare
        Whether small-loss selection and confident learning are run too.
    seed
        Of the first run.

    Raises
    ------
    bilevel.ArgumentError
        If a setting is out of its range.
    """

    corrupt: float = 0.0
    noise: Noise = Noise.NEXT
    seeds: int = 5
    steps: int = 150
    training_steps: int = 300
    batch_size: int | None = None
    trusted_size: int = 100
    training_size: int | None = None
    test_size: float | None = None
    compare: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("seeds", "steps", "training_steps", "batch_size", "trusted_size", "training_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise bilevel.ArgumentError(
                    f"expected {name.replace('_', ' ')} to be at least 1, got {value}; pass for example "
                    f"--{name.replace('_', '-')} 10"
                )
        if not 0 <= self.corrupt < 1:
            raise bilevel.ArgumentError(
                f"expected the share of corrupted labels in [0, 1), got {self.corrupt:g}; pass for example --corrupt 0.3"
            )
        if self.test_size is not None and not 0 <= self.test_size < 1:
            raise bilevel.ArgumentError(
                f"expected a test size in [0, 1), got {self.test_size:g}; it is a share of the rows"
            )
        if not 0 <= self.seed < 2**32:
            raise bilevel.ArgumentError(
                f"expected a seed from 0 to 2^32 - 1, got {self.seed}; pass for example --seed 0"
            )


@dataclass(frozen=True)
class StepPoint:
    """An outer step of the weights.

    Parameters
    ----------
    step
        From 1.
    trusted_loss
        Before the step.
    hypergradient_norm
        Of the trusted loss in the outer variables.
    test_accuracy
        Of the classifier that is trained along with the weights; NaN where it was not measured.
    """

    step: int
    trusted_loss: float
    hypergradient_norm: float
    test_accuracy: float


@dataclass(frozen=True)
class Choice:
    """One row of the table in one run: a choice of training examples, and the classifier trained on them.

    Parameters
    ----------
    name
        One of :data:`GIVEN`, :data:`ALONE`, :data:`CLEANED`, :data:`SMALL_LOSS`, :data:`CONFIDENT`, :data:`TRUE`.
    accuracy
        On the test rows; NaN without any.
    flagged
        How many training rows are flagged; None where none are judged.
    precision, recall
        The share of the flagged that are wrong, and of the wrong that are flagged; NaN where the wrong ones are not known.
    seconds
        To choose the examples and train the classifier.
    """

    name: str
    accuracy: float
    flagged: int | None
    precision: float
    recall: float
    seconds: float


@dataclass(frozen=True, eq=False)
class Run:
    """One run.

    Parameters
    ----------
    seed
        Of its wrong labels and initial parameters.
    split
        Row numbers of its parts.
    given
        int64 (n,): the training labels, in the order of ``split.training``.
    wrong
        Bool (n,): which of them were made wrong; None if none were.
    cleaned
        Weights, flagged rows and suggested labels.
    choices
        Rows of the table.
    points
        The outer steps.
    """

    seed: int
    split: Split
    given: torch.Tensor
    wrong: torch.Tensor | None
    cleaned: Cleaned
    choices: tuple[Choice, ...]
    points: tuple[StepPoint, ...]


@dataclass(frozen=True, eq=False)
class Outcome:
    """All runs.

    Parameters
    ----------
    data
        What was examined.
    trusted
        The trusted set that was given; None if it was split off.
    model
        The name of the model.
    settings
        As asked.
    runs
        At least one.
    notes
        Sentences for the report.
    seconds
        Wall time of everything.
    """

    data: LabelledData
    trusted: LabelledData | None
    model: str
    settings: CleanRunSettings
    runs: tuple[Run, ...]
    notes: tuple[str, ...]
    seconds: float

    @property
    def names(self) -> tuple[str, ...]:
        """The rows of the table."""
        return tuple(choice.name for choice in self.runs[0].choices)

    def values(self, name: str, quantity: str) -> list[float]:
        """Return a quantity of the row ``name``, such as ``"accuracy"``, for each run; NaN where there is none."""
        found = (getattr(choice, quantity) for run in self.runs for choice in run.choices if choice.name == name)
        return [math.nan if value is None else float(value) for value in found]


class Progress(Protocol):
    """A display of the progress of a run."""

    def stage(self, name: str, total: int) -> None:
        """Begin a stage of ``total`` steps."""

    def step(self, point: StepPoint | None) -> None:
        """Count one step of the stage as done."""


@dataclass(frozen=True)
class Interval:
    """A mean over the runs, with the half-width of its 95 % interval (Student's t); NaN for one run."""

    mean: float
    half_width: float

    @property
    def above_zero(self) -> bool:
        """Whether the interval lies above zero. Never for one run."""
        return self.mean - self.half_width > 0

    @property
    def below_zero(self) -> bool:
        """Whether the interval lies below zero. Never for one run."""
        return self.mean + self.half_width < 0


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of ``values`` and the half-width t s / √n of its 95 % interval.

    Examples
    --------
    >>> interval([1.0, 2.0, 3.0])
    Interval(mean=2.0, half_width=2.48...)
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return Interval(mean, math.nan)
    from scipy.stats import t

    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    return Interval(mean, float(t.ppf(0.975, count - 1)) * spread / math.sqrt(count))
