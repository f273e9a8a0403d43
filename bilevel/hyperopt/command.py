"""``bilevel tune``: options, progress bar, and output files."""

# No `from __future__ import annotations` here: typer reads the annotations when the command is registered.

from pathlib import Path
from typing import Annotated, ClassVar

import typer

from bilevel.cli.output import console, prepare_output, printing
from bilevel.cli.progress import StageBar
from bilevel.hyperopt.data import BUNDLED, Task, load
from bilevel.hyperopt.outcome import Outcome, OuterStep, Penalty, TuneSettings
from bilevel.hyperopt.tune import tune as run

__all__ = ["tune"]

_DEFAULT = TuneSettings()


def tune(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA", help=f"One of {', '.join(BUNDLED)}, or a CSV file (plain or .gz) with a header line."
        ),
    ],
    target: Annotated[str | None, typer.Option(help="The target column of a CSV file.", show_default=False)] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(help="A column of a CSV file that is no feature, as an id; may be repeated.", show_default=False),
    ] = None,
    encode: Annotated[
        bool,
        typer.Option(
            "--encode", help="Turn words of a CSV file into 0/1 columns, and fill missing numbers by medians."
        ),
    ] = False,
    penalty: Annotated[
        Penalty, typer.Option(help="Tune one strength shared by all features, or one per feature.")
    ] = _DEFAULT.penalty,
    folds: Annotated[int, typer.Option(help="Folds of the cross-validation.")] = _DEFAULT.folds,
    task: Annotated[
        Task | None,
        typer.Option(help="What is predicted; guessed from the target by default.", show_default=False),
    ] = None,
    test_size: Annotated[float, typer.Option(help="Part of the rows to test on at the end.")] = _DEFAULT.test_size,
    watch_size: Annotated[
        float,
        typer.Option(help="Part of the other rows that is held back from the folds, to notice overfitting."),
    ] = _DEFAULT.watch_size,
    steps: Annotated[
        int,
        typer.Option(help="Most steps: after the probes for a shared strength, of Adam for one per feature."),
    ] = _DEFAULT.steps,
    patience: Annotated[
        int,
        typer.Option(help="Stop when the held-back loss has not improved for so many steps (per feature)."),
    ] = _DEFAULT.patience,
    learning_rate: Annotated[float, typer.Option(help="Of Adam, on log-strengths.")] = _DEFAULT.learning_rate,
    seed: Annotated[int, typer.Option(help="Of the splits.")] = _DEFAULT.seed,
    output: Annotated[
        Path | None, typer.Option(help="Directory for results.json and plots.", show_default=False)
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Tune ridge, logistic or softmax regression on DATA by the gradient of its cross-validation loss.

    Ends with a table: scikit-learn's default, the best of a grid of 33 shared strengths, and the tuned.
    """
    settings = TuneSettings(
        penalty=penalty,
        folds=folds,
        test_size=test_size,
        watch_size=watch_size,
        steps=steps,
        patience=patience,
        learning_rate=learning_rate,
        seed=seed,
    )
    dataset = load(data, target=target, task=task, ignore=ignore or (), encode=encode)
    if output is not None:
        prepare_output(output)
    with _Bar(shown=not quiet) as bar:
        outcome = run(dataset, settings, progress=bar)
    # Files first: what becomes of standard output, as in `| head -1`, is no matter for them.
    written = [] if output is None else _save(outcome, output)
    with printing():
        _show(outcome)
        if written:
            print(f"Written: {', '.join(str(path) for path in written)}")


def _show(outcome: Outcome) -> None:
    from bilevel.hyperopt.report import remarks, table

    screen = console(stderr=False)
    for line in () if outcome.dataset.encoding is None else outcome.dataset.encoding.sentences:
        screen.print(line, markup=False)
    screen.print(table(outcome))
    for line in remarks(outcome):
        screen.print(line, markup=False)


def _save(outcome: Outcome, output: Path) -> list[Path]:
    from bilevel.hyperopt.plots import write_plots
    from bilevel.hyperopt.report import write_json

    document = output / "results.json"
    write_json(outcome, document)
    return [document, *write_plots(outcome, output)]


class _Bar(StageBar):
    """The progress bar: outer step, CV loss, gradient norm, held-back loss."""

    TITLES: ClassVar[dict[str, str]] = {
        "grid": "grid (scikit-learn)",
        "shared": "shared strength",
        "feature": "strengths per feature",
    }

    def stage(self, name: str, total: int) -> None:
        super().stage(self.TITLES[name], total)

    def step(self, step: OuterStep | None) -> None:
        self.advance("" if step is None else (
            f"CV {step.cv_loss:.5f}  |gradient| {step.gradient_norm:.1e}  held back {step.watch_loss:.5f}"
        ))  # fmt: skip
