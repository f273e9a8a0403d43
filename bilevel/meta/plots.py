"""Pictures of a meta-training run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from bilevel.cli.output import save_figure
from bilevel.meta.training import Score, StepRecord

__all__ = ["write_plots"]

_SMOOTHED_OVER = 50


def write_plots(history: Sequence[StepRecord], validations: Sequence[tuple[int, Score]], directory: Path) -> list[Path]:
    """Draw loss, accuracy and residuals over the meta-steps, and return the files' paths.

    Raises
    ------
    bilevel.BilevelError
        If one cannot be written.
    """
    if not history:
        return []
    paths = [directory / "learning.png", directory / "residuals.png"]
    save_figure(_learning(history, validations), paths[0])
    save_figure(_residuals(history), paths[1])
    return paths


def _learning(history: Sequence[StepRecord], validations: Sequence[tuple[int, Score]]) -> Figure:
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    steps = [record.step for record in history]
    left, right = figure.subplots(1, 2)
    left.plot(steps, _smooth([record.loss for record in history]), color="C0")
    left.set(xlabel="meta-step", ylabel="query loss", title="training tasks")
    right.plot(steps, _smooth([record.accuracy for record in history]), color="C0", alpha=0.6, label="training tasks")
    if validations:
        right.errorbar(
            [step for step, _ in validations],
            [found.mean for _, found in validations],
            [found.half_width for _, found in validations],
            color="C1", marker="o", ms=3, label="unseen tasks, 95 %",
        )  # fmt: skip
    right.set(xlabel="meta-step", ylabel="accuracy", title="query examples")
    right.legend()
    return figure


def _residuals(history: Sequence[StepRecord]) -> Figure:
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.add_subplot()
    steps = [record.step for record in history]
    axes.semilogy(steps, _smooth([record.inner_residual for record in history]), label="inner, ‖∇G‖")
    axes.semilogy(steps, _smooth([record.linear_residual for record in history]), label="linear, relative")
    axes.set(xlabel="meta-step", ylabel="residual", title="What the two solves left")
    axes.legend()
    return figure


def _smooth(values: Sequence[float]) -> np.ndarray:
    """Return running means over the last steps."""
    array = np.asarray(values, dtype=float)
    window = min(_SMOOTHED_OVER, len(array))
    sums = np.cumsum(np.insert(array, 0, 0.0))
    numbers = np.minimum(np.arange(1, len(array) + 1), window)
    return (sums[1:] - sums[np.arange(1, len(array) + 1) - numbers]) / numbers
