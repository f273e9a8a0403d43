"""The table, the remarks, the JSON file and the pictures say what the run found."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bilevel.hyperopt.outcome import Outcome, WatchEvidence
from bilevel.hyperopt.plots import plot_curve, plot_losses, plot_strengths, write_plots
from bilevel.hyperopt.report import OutputError, as_json, prepare_output, remarks, table, write_json


def printed(outcome: Outcome) -> str:
    console = Console(width=200, file=io.StringIO())
    console.print(table(outcome))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_table_shows_every_row(wine_per_feature: Outcome) -> None:
    text = printed(wine_per_feature)
    for row in wine_per_feature.rows:
        assert row.name in text
        for number in (row.cv_loss, row.watch_loss, row.test_loss):
            assert f"{number:.5f}" in text
    assert "test accuracy" in text


def test_the_table_of_a_regression_has_r_squared(diabetes: Outcome) -> None:
    assert "test R²" in printed(diabetes)


def test_names_are_not_markup(diabetes: Outcome) -> None:
    assert "[red]x[/red]" in printed(replace(diabetes, dataset=replace(diabetes.dataset, name="[red]x[/red]")))


def test_remarks_tell_what_was_looked_at(diabetes: Outcome, wine_per_feature: Outcome) -> None:
    assert "rows in 5 folds" in remarks(diabetes)[0]
    assert any("unit variance" in line for line in remarks(diabetes))
    assert any("held-back loss has not improved" in line for line in remarks(wine_per_feature))
    noted = replace(diabetes, notes=("something failed",))
    assert remarks(noted)[-1] == "Note: something failed"


@pytest.mark.parametrize(
    ("evidence", "said"),
    [
        (WatchEvidence(0.0, 0.1, 9), "no strengths per feature did better"),
        (WatchEvidence(0.1, 0.2, 9), "which is weak evidence"),
        (WatchEvidence(0.5, 0.1, 9), "lowered the held-back loss by 0.5 ± 0.1"),
    ],
)
def test_remarks_weigh_the_evidence(wine_per_feature: Outcome, evidence: WatchEvidence, said: str) -> None:
    assert said in " ".join(remarks(replace(wine_per_feature, evidence=evidence)))


def test_remarks_admit_overfitting(wine_per_feature: Outcome) -> None:
    rows = [replace(row, test_loss=9.0) if row.name == "tuned, per feature" else row for row in wine_per_feature.rows]
    worse = replace(wine_per_feature, rows=tuple(rows))
    assert any("overfit" in line for line in remarks(worse))


def test_remarks_say_that_tuning_raised_the_test_loss(diabetes: Outcome) -> None:
    def told(**losses: float) -> list[str]:
        rows = [replace(row, test_loss=losses[row.name.replace(" ", "_").replace(",", "")]) for row in diabetes.rows]
        return [line for line in remarks(replace(diabetes, rows=tuple(rows))) if "has a higher loss" in line]

    assert told(untuned=0.5, best_of_grid=0.4, tuned_shared=0.4) == []
    assert told(untuned=0.5, best_of_grid=0.399999, tuned_shared=0.4) == []  # the table shows the same digits
    (line,) = told(untuned=0.3, best_of_grid=0.5, tuned_shared=0.4)
    assert "'tuned, shared' has a higher loss (0.40000) than 'untuned' (0.30000): tuning looks at the CV loss" in line
    (line,) = told(untuned=0.3, best_of_grid=0.2, tuned_shared=0.4)
    assert "than 'untuned' (0.30000) and 'best of grid' (0.20000)" in line


SCHEMA: dict[str, Any] = {
    "schema": int,
    "versions": {
        "python": str,
        "bilevel": str,
        "torch": str,
        "numpy": str,
        "scipy": str,
        "scikit-learn": str,
    },
    "settings": {
        "penalty": str,
        "folds": int,
        "test_size": float,
        "watch_size": float,
        "steps": int,
        "patience": int,
        "learning_rate": float,
        "seed": int,
    },
    "data": {
        "name": str,
        "task": str,
        "rows": int,
        "features": [str],
        "classes": [str],
        "rows_in": {"folds": [int], "watch": int, "test": int},
        "target_scale": float,
    },
    "grid": {"log_strengths": [float], "losses": [float], "watch_losses": [float], "solves": int, "warnings": [str]},
    "history": [
        {
            "stage": str,
            "number": int,
            "log_strengths": [float],
            "cv_loss": float,
            "watch_loss": float,
            "corrected_cv_loss": float,
            "gradient_norm": float,
            "inner_residual": float,
            "inner_steps": int,
            "adjoint_steps": int,
            "error_bound": (float, None),
            "certified": bool,
            "inner_solves": int,
            "seconds": float,
        }
    ],
    "rows": [
        {
            "name": str,
            "log_strengths": [float],
            "cv_loss": float,
            "watch_loss": float,
            "test_loss": (float, None),
            "test_score": (float, None),
            "inner_solves": int,
            "seconds": float,
            "strengths": {str: float},
        }
    ],
    "stopped": {str: str},
    "evidence": ({"improvement": float, "standard_error": (float, None), "rows": int}, None),
    "notes": [str],
    "seconds": float,
}


def check(value: Any, schema: Any, where: str = "") -> None:
    """Compare ``value`` with a type, a list of one, a dict of them, or a tuple of alternatives."""
    if isinstance(schema, tuple):
        if value is not None:
            check(value, schema[0], where)
    elif isinstance(schema, list):
        assert isinstance(value, list), where
        for number, item in enumerate(value):
            check(item, schema[0], f"{where}[{number}]")
    elif isinstance(schema, dict) and set(schema) == {str}:
        for key, item in value.items():
            check(item, schema[str], f"{where}.{key}")
    elif isinstance(schema, dict):
        assert set(value) == set(schema), where
        for key, item in value.items():
            check(item, schema[key], f"{where}.{key}")
    else:
        assert type(value) is schema, f"{where}: {value!r}"


def test_the_json_has_everything(diabetes: Outcome, wine_per_feature: Outcome, tmp_path: Path) -> None:
    for outcome in (diabetes, wine_per_feature):
        write_json(outcome, tmp_path / "results.json")
        document = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
        check(document, SCHEMA)
        assert len(document["history"]) == len(outcome.history)
        assert len(document["grid"]["losses"]) == 33
        assert document["rows"][2]["cv_loss"] == outcome.rows[2].cv_loss
    strengths = document["rows"][3]["strengths"]
    assert list(strengths) == list(wine_per_feature.dataset.features)
    assert strengths["alcohol"] == math.exp(wine_per_feature.rows[3].log_strengths[0])


def test_numbers_that_are_not_finite_become_null(diabetes: Outcome) -> None:
    odd = replace(diabetes, rows=(replace(diabetes.rows[0], test_score=math.nan),))
    assert as_json(odd)["rows"][0]["test_score"] is None


def test_the_pictures_are_drawn(wine_per_feature: Outcome, diabetes: Outcome, tmp_path: Path) -> None:
    paths = write_plots(wine_per_feature, tmp_path)
    assert [path.name for path in paths] == ["cv_curve.png", "losses.png", "strengths.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert [path.name for path in write_plots(diabetes, tmp_path)] == ["cv_curve.png", "losses.png"]


def test_the_pictures_show_the_run(wine_per_feature: Outcome) -> None:
    (curve,) = plot_curve(wine_per_feature).axes
    assert len(curve.lines[0].get_xdata()) == 33
    losses, gradients = plot_losses(wine_per_feature).axes
    steps = [step for step in wine_per_feature.history if step.stage == "feature"]
    assert list(losses.lines[1].get_ydata()) == [step.watch_loss for step in steps]
    assert list(gradients.lines[-1].get_ydata()) == [step.gradient_norm for step in steps]
    (strengths,) = plot_strengths(wine_per_feature, most=5).axes
    assert "5 of 13 features" in strengths.get_title()


def test_names_with_dollars_and_foreign_scripts_can_be_drawn(wine_per_feature: Outcome, tmp_path: Path) -> None:
    features = ("$x", "$y$", "長", *wine_per_feature.dataset.features[3:])
    dataset = replace(wine_per_feature.dataset, features=features, name="$\\bad")
    assert len(write_plots(replace(wine_per_feature, dataset=dataset), tmp_path)) == 3


def test_an_output_directory_is_made(tmp_path: Path) -> None:
    prepare_output(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_output_that_cannot_be_written(diabetes: Outcome, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for directory in (file, file / "below"):
        with pytest.raises(OutputError, match="cannot be written to"):
            prepare_output(directory)
    with pytest.raises(OutputError, match="cannot be written"):
        write_json(diabetes, file / "results.json")
    with pytest.raises(OutputError, match="cannot be written"):
        write_plots(diabetes, file)


def test_a_score_without_a_value_says_so() -> None:
    import math
    from dataclasses import replace

    from bilevel.hyperopt.outcome import Row
    from bilevel.hyperopt.report import _score

    row = Row("untuned", (0.0,), 1.0, 1.0, 0.5, math.nan, 0, 0.0)
    assert _score(row) == "undefined"  # one test row: R² has no value, the loss has
    assert _score(replace(row, test_loss=math.nan)) == "nan"  # the fit failed
    assert _score(replace(row, test_score=0.25)) == "0.2500"
