"""The pictures of ``bilevel clean``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from bilevel.cleaning.outcome import GIVEN, TRUE, Outcome, interval
from bilevel.cleaning.suspects import Suspect, suspects
from bilevel.cli.output import save_figures

__all__ = ["plot_accuracy", "plot_flagged", "plot_weights", "write_plots"]

_RIGHT, _WRONG, _PLAIN = "C0", "C3", "0.4"
_COLOURS = (
    "blue: the given label is wrong and the suggested one right",
    "grey: both are wrong",
    "red: the given label was right",
)


def write_plots(outcome: Outcome, directory: Path) -> list[Path]:
    """Write the pictures to ``directory`` and return their paths.

    Raises
    ------
    bilevel.BilevelError
        If one cannot be written.
    """
    figures = {"weights.png": plot_weights(outcome), "accuracy.png": plot_accuracy(outcome)}
    if outcome.data.images and any(each.flagged for each in suspects(outcome)):
        figures["flagged.png"] = plot_flagged(outcome)
    return save_figures(figures, directory)


def plot_flagged(outcome: Outcome, most: int = 32) -> Figure:
    """Draw the ``most`` suspicious images that are flagged, each with its given and its suggested label."""
    flagged = [each for each in suspects(outcome) if each.flagged]
    shown = flagged[:most]
    columns = min(8, len(shown))
    lines = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(max(1.15 * columns, 5.6), 1.45 * lines + 1.2), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for panel in panels:
        panel.set_axis_off()
    size = 8 if max(map(len, outcome.data.classes)) <= 6 else 6
    for panel, each in zip(figure.axes, shown, strict=False):
        _draw_image(panel, outcome.data.inputs[each.row])
        given, suggested = (_short(outcome.data.classes[label]) for label in (each.given, each.suggested))
        panel.set_title(f"given {given}\nsuggested {suggested}", fontsize=size, color=_colour(each))
    which = (
        f"{len(shown)} flagged images"
        if len(shown) == len(flagged)
        else f"{len(shown)} most suspicious of {len(flagged)} flagged images"
    )
    title = f"{_literal(outcome.data.name)}: the {which}"
    if shown[0].true is not None:
        between = "; " if columns == 8 else "\n"
        title += "\n" + between.join(_COLOURS)
    figure.suptitle(title, fontsize=10)
    return figure


def _colour(each: Suspect) -> str:
    if each.true is None:
        return "black"
    if each.true == each.given:
        return _WRONG
    return _RIGHT if each.true == each.suggested else "0.55"


def _draw_image(panel: Any, image: torch.Tensor) -> None:
    pixels = image.squeeze(0).numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()
    panel.imshow(pixels, cmap="gray_r" if len(image) == 1 and float(image.mean()) < 0.5 else "gray", vmin=0, vmax=1)


def plot_weights(outcome: Outcome) -> Figure:
    """Draw the histogram of the learned weights over all runs, by whether the label is wrong where that is known."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    weights = torch.cat([run.cleaned.weights for run in outcome.runs]).double().cpu()
    masks = [run.wrong for run in outcome.runs if run.wrong is not None]
    if masks:
        wrong = torch.cat(masks).cpu()
        parts, labels = [weights[~wrong], weights[wrong]], ["label right", "label wrong"]
        colours = [_RIGHT, _WRONG]
    else:
        parts, labels, colours = [weights], ["training rows"], [_PLAIN]
    axes.hist([part.numpy() for part in parts], bins=40, range=(0, 1), stacked=True, color=colours, label=labels)
    axes.axvline(0.5, color="black", lw=1, ls="--", label="initial weight; flagged below")
    runs = "" if len(outcome.runs) == 1 else f", {len(outcome.runs)} runs together"
    axes.set(xlabel="learned weight", ylabel="training rows", xlim=(0, 1))
    axes.set_title(f"{_literal(outcome.data.name)}: weights after {outcome.settings.steps} outer steps{runs}")
    axes.legend()
    return figure


def plot_accuracy(outcome: Outcome) -> Figure:
    """Draw the test accuracy of the classifier and the trusted loss over the outer steps, a line for each run."""
    measured = not math.isnan(outcome.runs[0].points[0].test_accuracy)
    figure = Figure(figsize=(6.4, 5.6 if measured else 3.4), layout="constrained")
    if not measured:
        _plot_losses(figure.add_subplot(), outcome).set(title=_title(outcome))
        return figure
    accuracies, losses = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    _plot_losses(losses, outcome)
    for number, run in enumerate(outcome.runs):
        points = [point for point in run.points if not math.isnan(point.test_accuracy)]
        label = "while weights are learned" + (", each run" if len(outcome.runs) > 1 else "")
        accuracies.plot(
            [point.step for point in points], [100 * point.test_accuracy for point in points],
            color=_RIGHT, lw=1, alpha=0.8, label=None if number else label,
        )  # fmt: skip
    for name, style in ((GIVEN, "--"), (TRUE, ":")):
        if name in outcome.names:
            mean = 100 * interval(outcome.values(name, "accuracy")).mean
            accuracies.axhline(mean, color="black", lw=1, ls=style, label=f"trained on {name}: {mean:.1f} %")
    lowest = min(*_later_accuracies(outcome), interval(outcome.values(GIVEN, "accuracy")).mean)
    accuracies.set(ylabel="test accuracy, %", title=_title(outcome), ylim=(max(100 * lowest - 9, 0), 100.5))
    accuracies.legend(loc="lower right")
    return figure


def _plot_losses(axes: Any, outcome: Outcome) -> Any:
    for run in outcome.runs:
        axes.plot([p.step for p in run.points], [p.trusted_loss for p in run.points], color="C2", lw=1, alpha=0.8)
    axes.set(ylim=(0, None), xlabel="outer step", ylabel="trusted loss")
    return axes


def _title(outcome: Outcome) -> str:
    return f"{_literal(outcome.data.name)}: {_literal(outcome.model)} model"


def _later_accuracies(outcome: Outcome) -> list[float]:
    """Return the accuracies without the first steps, at which the classifier knows nothing yet."""
    found = [
        point.test_accuracy
        for run in outcome.runs
        for point in run.points
        if point.step > outcome.settings.steps / 5 and not math.isnan(point.test_accuracy)
    ]
    return found or [0.0, 0.0]


def _short(name: str, most: int = 10) -> str:
    return _literal(name if len(name) <= most else name[: most - 1] + "…")


def _literal(name: str) -> str:
    # Matplotlib reads text between dollars as mathematics, and fails on what is none.
    return name.replace("$", r"\$")
