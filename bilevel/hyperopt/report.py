"""What a run leaves behind: a table on the terminal and a JSON file of everything."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from bilevel.cli.output import OutputError, finite, prepare_output, versions, write_document
from bilevel.hyperopt.data import Task
from bilevel.hyperopt.outcome import Outcome, Row
from bilevel.hyperopt.splits import Splits

__all__ = ["OutputError", "as_json", "prepare_output", "remarks", "table", "write_json"]

SCHEMA = 1
"""Version of the JSON file's layout."""


def table(outcome: Outcome) -> Table:
    """Return the final table: every choice of strengths, failed ones included."""
    regression = outcome.dataset.task is Task.REGRESSION
    loss = "MSE" if regression else "log loss"
    # Text and not a string, in which rich would read square brackets as markup.
    title = Text(f"{outcome.dataset.name}: {outcome.settings.penalty.value} penalty, {loss}")
    drawn = Table(title=title, title_justify="left")
    drawn.add_column("strengths")
    for heading in ("CV loss", "held-back loss", "test loss", "test R²" if regression else "test accuracy"):
        drawn.add_column(heading, justify="right")
    for heading in ("inner solves", "seconds"):
        drawn.add_column(heading, justify="right")
    for row in outcome.rows:
        drawn.add_row(
            f"{row.name} {_strengths(row)}",
            f"{row.cv_loss:.5f}", f"{row.watch_loss:.5f}", f"{row.test_loss:.5f}", _score(row),
            str(row.inner_solves), f"{row.seconds:.2f}",
        )  # fmt: skip
    return drawn


def remarks(outcome: Outcome) -> list[str]:
    """Return the sentences that belong under the table."""
    splits = outcome.splits
    lines = [
        f"{splits.fold_rows.size} rows in {len(splits.folds)} folds (CV loss), {splits.watch.size} held back "
        "from them "
        f"(held-back loss: mean over the folds' models), {splits.test.size} test rows (one model fitted to "
        "all others); "
        "inner solves and seconds: spent to choose the strengths."
    ]
    if outcome.dataset.task is Task.REGRESSION:
        lines.append("Losses are for targets scaled to unit variance.")
    if any(map(_is_undefined, outcome.rows)):
        lines.append(
            f"R² is undefined, because the target has one value only in the {splits.test.size} test rows; raise --test-size."
        )
    lines += [f"Stopped ({stage}): {reason}." for stage, reason in outcome.stopped.items()]
    lines.append(f"The run took {outcome.seconds:.1f} seconds in all, fits for the table and error bounds included.")
    lines += _evidence(outcome)
    lines += [f"Note: {note}" for note in outcome.notes]
    return lines


def _score(row: Row) -> str:
    return "undefined" if _is_undefined(row) else f"{row.test_score:.4f}"


def _is_undefined(row: Row) -> bool:
    """Return whether the score has no value although the model could be fitted, as R² for one test row."""
    return math.isnan(row.test_score) and not math.isnan(row.test_loss)


def _strengths(row: Row) -> str:
    if len(row.log_strengths) == 1:
        return f"({math.exp(row.log_strengths[0]):.3g})"
    return f"({math.exp(min(row.log_strengths)):.2g} to {math.exp(max(row.log_strengths)):.2g})"


def _evidence(outcome: Outcome) -> list[str]:
    evidence = outcome.evidence
    if evidence is None:
        return []
    rows = {row.name: row for row in outcome.rows}
    shared, tuned = rows["tuned, shared"], rows["tuned, per feature"]
    if not evidence.improvement > 0:
        return ["On the held-back rows no strengths per feature did better than the shared one, which is returned."]
    weak = "" if evidence.improvement > 2 * evidence.standard_error else ", which is weak evidence"
    told = [
        f"Strengths per feature lowered the held-back loss by {evidence.improvement:.2g} ± "
        f"{evidence.standard_error:.2g} "
        f"(standard error over {evidence.rows} rows){weak}."
    ]
    if tuned.test_loss > shared.test_loss:
        told.append("The test loss is higher than with one shared strength: the strengths per feature overfit.")
    return told


def as_json(outcome: Outcome) -> dict[str, Any]:
    """Return everything about the run, in types that JSON has; numbers that are not finite become None."""
    settings = asdict(outcome.settings) | {"penalty": outcome.settings.penalty.value}
    document = {
        "schema": SCHEMA,
        "versions": versions("torch", "numpy", "scipy", "scikit-learn"),
        "settings": settings,
        "data": _data(outcome),
        "grid": asdict(outcome.grid),
        "history": [asdict(step) for step in outcome.history],
        "rows": [_row(row, outcome.dataset.features) for row in outcome.rows],
        "stopped": outcome.stopped,
        "evidence": None if outcome.evidence is None else asdict(outcome.evidence),
        "notes": list(outcome.notes),
        "seconds": outcome.seconds,
    }
    cleaned: dict[str, Any] = finite(document)
    return cleaned


def write_json(outcome: Outcome, path: Path) -> None:
    """Write :func:`as_json` to ``path``.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    write_document(as_json(outcome), path)


def _data(outcome: Outcome) -> dict[str, Any]:
    dataset, splits = outcome.dataset, outcome.splits
    return {
        "name": dataset.name,
        "task": dataset.task.value,
        "rows": dataset.rows,
        "features": list(dataset.features),
        "classes": list(dataset.classes),
        "rows_in": _sizes(splits),
        "target_scale": splits.target_scale,
    }


def _sizes(splits: Splits) -> dict[str, Any]:
    return {
        "folds": [int(fold.size) for fold in splits.folds],
        "watch": int(splits.watch.size),
        "test": int(splits.test.size),
    }


def _row(row: Row, features: tuple[str, ...]) -> dict[str, Any]:
    strengths = [math.exp(theta) for theta in row.log_strengths]
    shared = len(strengths) == 1 and len(features) != 1
    named = {"shared": strengths[0]} if shared else dict(zip(features, strengths, strict=True))
    return asdict(row) | {"strengths": named}
