"""What ``bilevel clean`` leaves behind: a table on the terminal, remarks, and a JSON file of everything."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from bilevel.cleaning.experiment import FOLDS
from bilevel.cleaning.outcome import (
    ALONE,
    CLEANED,
    CONFIDENT,
    GIVEN,
    SMALL_LOSS,
    Interval,
    Outcome,
    Run,
    interval,
)  # fmt: skip
from bilevel.cleaning.suspects import suspects
from bilevel.cli.output import finite, versions, write_document

__all__ = ["as_json", "remarks", "table", "write_json"]

SCHEMA = 1
"""Version of the JSON file's layout."""


def table(outcome: Outcome) -> Table:
    """Return the final table: one row for each choice of training examples, means over the runs with intervals."""
    settings = outcome.settings
    corrupted = (
        f", {settings.corrupt:.1%} of the training labels made wrong ({settings.noise.value})"
        if settings.corrupt > 0
        else ""
    )
    # Text and not a string, in which rich would read square brackets as markup.
    title = Text(f"{outcome.data.name}: {outcome.model} model{corrupted}, {_count(settings.seeds, 'run')}")
    drawn = Table(title=title, title_justify="left")
    drawn.add_column("trained on")
    for heading in ("test accuracy, %", "flagged", "precision, %", "recall, %", "seconds"):
        drawn.add_column(heading, justify="right")
    for name in outcome.names:
        drawn.add_row(
            name,
            _shown(outcome, name, "accuracy", 100),
            _shown(outcome, name, "flagged", 1, digits=0),
            _shown(outcome, name, "precision", 100),
            _shown(outcome, name, "recall", 100),
            f"{interval(outcome.values(name, 'seconds')).mean:.1f}",
        )
    return drawn


def _shown(outcome: Outcome, name: str, quantity: str, scale: float, digits: int = 1) -> str:
    values = [scale * value for value in outcome.values(name, quantity)]
    if any(map(math.isnan, values)):
        return "-"
    found = interval(values)
    digits = 1 if abs(found.mean) < 10 else digits
    error = "" if math.isnan(found.half_width) else f" ± {found.half_width:.{digits}f}"
    return f"{found.mean:.{digits}f}{error}"


def remarks(outcome: Outcome) -> list[str]:
    """Return the sentences that belong under the table, among them what the numbers do not support."""
    lines = [_sizes(outcome.runs[0], outcome)]
    if SMALL_LOSS in outcome.names:
        told = (
            "is told how many labels are wrong"
            if outcome.settings.corrupt > 0
            else "flags as many rows as the weights do"
        )
        others = (
            "Small-loss selection and confident learning judge"
            if CONFIDENT in outcome.names
            else "Small-loss selection judges"
        )
        lines.append(f"{others} rows by {FOLDS}-fold cross-validation; small-loss selection {told}.")
    lines += _accuracies(outcome)
    lines += _flags(outcome)
    if outcome.settings.corrupt == 0:
        lines.append(_assumption(outcome))
    return lines + list(outcome.notes)


def _sizes(run: Run, outcome: Outcome) -> str:
    wrong = "" if run.wrong is None else f" ({int(run.wrong.sum())} with wrong labels)"
    trusted = len(run.split.trusted) if outcome.trusted is None else len(outcome.trusted.labels)
    spread = "; ± is the half-width of a 95 % interval over the runs" if len(outcome.runs) > 1 else ""
    return (
        f"{len(run.split.training)} training rows{wrong}, {trusted} trusted rows and {len(run.split.test)} test rows in each run; the "
        f"trusted rows are added to each choice{spread}."
    )


def _accuracies(outcome: Outcome) -> list[str]:
    """Return what the test accuracies say about cleaning, and what they do not."""
    if any(map(math.isnan, outcome.values(CLEANED, "accuracy"))):
        return ["Without test rows no accuracy is known; lower --training-size or raise --test-size."]
    lines = []
    gain = _difference(outcome, GIVEN)
    if len(outcome.runs) == 1:
        lines.append(
            f"Cleaning changed the test accuracy by {100 * gain.mean:+.1f} points; one run has no interval, raise --seeds."
        )
    elif gain.above_zero:
        lines.append(f"Cleaning raised the test accuracy by {_points(gain)} points.")
    else:
        lines.append(f"The runs do not show that cleaning helps: the test accuracy changed by {_points(gain)} points.")
    for name in (ALONE, SMALL_LOSS, CONFIDENT):
        if name in outcome.names and len(outcome.runs) > 1:
            lines.append(_verdict(name, _difference(outcome, name)))
    return lines


def _verdict(name: str, difference: Interval) -> str:
    if difference.above_zero:
        return f"Learned weights are more accurate than {name}, by {_points(difference)} points."
    if difference.below_zero:
        return f"Learned weights are less accurate than {name}, by {_points(Interval(-difference.mean, difference.half_width))} points."
    return f"Learned weights are not shown to be more or less accurate than {name}: {_points(difference)} points."


def _difference(outcome: Outcome, name: str) -> Interval:
    """Return the mean gain in accuracy, over the runs, of classifiers trained on cleaned data over those of the report's row ``name``."""
    pairs = zip(outcome.values(CLEANED, "accuracy"), outcome.values(name, "accuracy"), strict=True)
    return interval([cleaned - other for cleaned, other in pairs])


def _points(difference: Interval) -> str:
    return f"{100 * difference.mean:.1f} ± {100 * difference.half_width:.1f}"


def _flags(outcome: Outcome) -> list[str]:
    lines = []
    rows = [len(run.split.training) for run in outcome.runs]
    flagged = outcome.values(CLEANED, "flagged")
    if any(count == 0 for count in flagged):
        lines.append("A run flagged no row; raise --steps if labels are wrong.")
    if any(count > 0.9 * total for count, total in zip(flagged, rows, strict=True)):
        lines.append(
            "A run flagged almost every row: the trusted set and the training set disagree; look at the trusted labels."
        )
    examined = {row for run in outcome.runs for row in run.split.training.tolist()}
    missing = len(outcome.data.labels) - len(examined)
    if outcome.settings.corrupt == 0 and missing:
        lines.append(
            f"{missing} rows were trusted or test rows in every run and are not judged; raise --seeds to reach more."
        )
    return lines


def _assumption(outcome: Outcome) -> str:
    if outcome.trusted is None:
        return (
            f"The trusted and the test rows come from {outcome.data.name} itself and are taken to be right; if they may be wrong, pass "
            "--trusted, and read the accuracies with care."
        )
    return f"The test rows come from {outcome.data.name} itself: where their labels are wrong, so are the accuracies."


def as_json(outcome: Outcome) -> dict[str, Any]:
    """Return everything about the runs but the data, in types that JSON has; numbers that are not finite become None."""
    document = {
        "schema": SCHEMA,
        "versions": versions("torch", "numpy", "scipy", "scikit-learn"),
        "settings": asdict(outcome.settings) | {"noise": outcome.settings.noise.value, "model": outcome.model},
        "data": {
            "name": outcome.data.name,
            "rows": len(outcome.data.labels),
            "input_shape": list(outcome.data.inputs.shape[1:]),
            "classes": list(outcome.data.classes),
            "trusted": None if outcome.trusted is None else outcome.trusted.name,
        },
        "rows": [_row(outcome, name) for name in outcome.names],
        "runs": [_run(run) for run in outcome.runs],
        "suspects": [asdict(each) for each in suspects(outcome)],
        "remarks": remarks(outcome),
        "seconds": outcome.seconds,
    }
    cleaned: dict[str, Any] = finite(document)
    return cleaned


def _row(outcome: Outcome, name: str) -> dict[str, Any]:
    quantities = "accuracy", "flagged", "precision", "recall", "seconds"
    return {"name": name} | {each: asdict(interval(outcome.values(name, each))) for each in quantities}


def _run(run: Run) -> dict[str, Any]:
    return {
        "seed": run.seed,
        "training": run.split.training.tolist(),
        "trusted": run.split.trusted.tolist(),
        "test": run.split.test.tolist(),
        "given": run.given.tolist(),
        "wrong": None if run.wrong is None else run.wrong.tolist(),
        "weights": run.cleaned.weights.tolist(),
        "flagged": run.cleaned.flagged.tolist(),
        "suggested": run.cleaned.suggested.tolist(),
        "choices": [asdict(choice) for choice in run.choices],
        "points": [asdict(point) for point in run.points],
    }


def write_json(outcome: Outcome, path: Path) -> None:
    """Write :func:`as_json` to ``path``.

    Raises
    ------
    bilevel.cli.output.OutputError
        If the file cannot be written.
    """
    write_document(as_json(outcome), path)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
