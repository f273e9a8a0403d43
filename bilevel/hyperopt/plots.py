"""The pictures of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from bilevel.cli.output import save_figures
from bilevel.hyperopt.data import Task
from bilevel.hyperopt.outcome import Outcome, OuterStep, Row

__all__ = ["plot_curve", "plot_losses", "plot_strengths", "write_plots"]


def write_plots(outcome: Outcome, directory: Path) -> list[Path]:
    """Write the pictures to ``directory`` and return their paths.

    Raises
    ------
    bilevel.BilevelError
        If one cannot be written.
    """
    figures = {"cv_curve.png": plot_curve(outcome), "losses.png": plot_losses(outcome)}
    if len(outcome.rows[-1].log_strengths) > 1:
        figures["strengths.png"] = plot_strengths(outcome)
    return save_figures(figures, directory)


def plot_curve(outcome: Outcome) -> Figure:
    """Draw the CV loss over the shared strength: the grid, what tuning evaluated, and what it chose."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    grid = outcome.grid
    axes.plot(_exp(grid.log_strengths), grid.losses, "o-", ms=3, lw=1, color="0.6", label="scikit-learn grid")
    steps = [step for step in outcome.history if step.stage == "shared"]
    axes.plot(
        [math.exp(step.log_strengths[0]) for step in steps], [step.cv_loss for step in steps],
        "x", color="C0", label="evaluated by tuning",
    )  # fmt: skip
    tuned = _row(outcome, "tuned, shared")
    axes.plot(
        _exp(tuned.log_strengths),
        [tuned.cv_loss],
        "*",
        ms=12,
        color="C3",
        label=f"tuned: CV loss {tuned.cv_loss:.5f}",
    )
    axes.set(xscale="log", xlabel="shared strength per example", ylabel=f"CV loss ({_loss(outcome)})")
    axes.set_title(
        f"{_literal(outcome.dataset.name)}: {grid.solves} inner solves on the grid, {tuned.inner_solves} in tuning"
    )
    axes.legend()
    return figure


def plot_losses(outcome: Outcome) -> Figure:
    """Draw CV loss, held-back loss and gradient norm over the outer steps."""
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    losses, gradients = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    stage = outcome.history[-1].stage
    steps: list[OuterStep] = [step for step in outcome.history if step.stage == stage]
    numbers = [step.number for step in steps]
    losses.plot(numbers, [step.cv_loss for step in steps], ".-", label="CV loss")
    losses.plot(numbers, [step.watch_loss for step in steps], ".-", label="held-back loss")
    chosen = _row(outcome, "tuned, shared" if stage == "shared" else "tuned, per feature")
    at = next(step.number for step in steps if step.log_strengths == chosen.log_strengths)
    for axes in (losses, gradients):
        axes.axvline(at, color="0.6", lw=1, ls="--", label="returned" if axes is losses else None)
    losses.set(
        ylabel=_loss(outcome),
        title=f"{_literal(outcome.dataset.name)}: {outcome.settings.penalty.value} penalty",
    )
    losses.legend()
    gradients.plot(numbers, [step.gradient_norm for step in steps], ".-", color="C2")
    gradients.set(yscale="log", xlabel="outer step", ylabel="norm of hypergradient")
    return figure


def plot_strengths(outcome: Outcome, most: int = 64) -> Figure:
    """Draw the strengths per feature, against the shared one; the ``most`` that differ most from it."""
    shared = _row(outcome, "tuned, shared").log_strengths[0]
    tuned = _row(outcome, "tuned, per feature").log_strengths
    order = sorted(range(len(tuned)), key=lambda j: -abs(tuned[j] - shared))[:most]
    order.sort(key=lambda j: tuned[j])
    figure = Figure(figsize=(6.4, max(2.4, 0.19 * len(order) + 1)), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([math.exp(tuned[j]) for j in order], range(len(order)), "o", ms=4)
    axes.axvline(math.exp(shared), color="0.6", lw=1, ls="--", label="tuned, shared")
    axes.set_yticks(range(len(order)), [_literal(outcome.dataset.features[j]) for j in order], fontsize=7)
    axes.set(xscale="log", xlabel="strength per example (right: the feature is used less)")
    of = "" if len(order) == len(tuned) else f" ({len(order)} of {len(tuned)} features)"
    axes.set_title(f"{_literal(outcome.dataset.name)}: strengths per feature{of}")
    axes.legend()
    return figure


def _row(outcome: Outcome, name: str) -> Row:
    return next(row for row in outcome.rows if row.name == name)


def _exp(thetas: Sequence[float]) -> list[float]:
    return [math.exp(theta) for theta in thetas]


def _loss(outcome: Outcome) -> str:
    return "mean squared error" if outcome.dataset.task is Task.REGRESSION else "log loss"


def _literal(name: str) -> str:
    # Matplotlib reads text between dollars as mathematics, and fails on what is none.
    return name.replace("$", r"\$")
