"""The settings of a tuning run and its results: steps, rows of the table, and the progress interface."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Protocol

import bilevel
from bilevel.hyperopt.data import Dataset
from bilevel.hyperopt.grid import GridCurve
from bilevel.hyperopt.splits import Splits

__all__ = ["Outcome", "OuterStep", "Penalty", "Progress", "Row", "TuneSettings", "WatchEvidence"]


class Penalty(enum.Enum):
    """The number of strengths."""

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
        The share of all rows that is held out, and tested on once.
    watch_size
        The share of the other rows that is kept out of the folds.
    steps
        The largest number of outer steps: after the probes for a shared strength (at most 15), and of Adam for one per
        feature.
    patience
        Per-feature tuning stops after this many steps without a lower watch loss.
    learning_rate
        The learning rate of Adam, in units of the log-strengths.
    seed
        The seed of the splits. Nothing else is random.
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
        Of the hypergradient; None where none is known, and at steps that are not in the table.
    certified
        Whether the bound is proven.
    inner_solves
        In this stage so far.
    seconds
        Wall time in this stage so far.
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
    """One line of the final table: a choice of strengths and its results.

    Parameters
    ----------
    name
        The name of the choice.
    log_strengths
        θ: one value, or one per feature.
    cv_loss, watch_loss
        Mean over the folds' models, on their validation rows and on the watch rows.
    test_loss, test_score
        Of one model fitted to all development rows: loss, and accuracy or R², on the test rows. NaN if that fit
        failed.
    inner_solves, seconds
        The cost of the choice from the beginning: fits of one model to one fold, and the wall time.
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
    """A display of the progress of a run."""

    def stage(self, name: str, total: int) -> None:
        """Begin a stage of at most ``total`` steps."""

    def step(self, step: OuterStep | None) -> None:
        """Count one step of the stage as done. ``step`` is None for steps of the grid."""
