"""``bilevel clean``: options, progress bar, and where results go."""

# No `from __future__ import annotations` here: typer reads the annotations when the command is registered.

import functools
import math
from pathlib import Path
from typing import Annotated

import typer

from bilevel.cleaning.data import DIGITS, IMAGE_SIZE, DataError, LabelledData, load
from bilevel.cleaning.experiment import run_cleaning
from bilevel.cleaning.model_choice import MODELS
from bilevel.cleaning.noise import Noise
from bilevel.cleaning.outcome import CleanRunSettings, Outcome, StepPoint
from bilevel.cli.output import console, prepare_output, printing
from bilevel.cli.progress import StageBar

__all__ = ["clean"]

_DEFAULT = CleanRunSettings()

DIGITS_CORRUPTED = 0.345
"""The share of wrong labels in ``digits``, unless another is asked."""

DIGITS_TRAINING = 400


def clean(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA", help=f"{DIGITS}, a CSV file (plain or .gz) with a header line, or a folder CLASS/IMAGE.png."
        ),
    ] = DIGITS,
    target: Annotated[str | None, typer.Option(help="The label column of a CSV file.", show_default=False)] = None,
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
    model: Annotated[
        str, typer.Option(help=f"{', '.join(MODELS)}, or module:function, called with input shape and classes.")
    ] = "linear",
    corrupt: Annotated[
        float | None,
        typer.Option(
            help=f"Share of the training labels to make wrong on the spot; {DIGITS_CORRUPTED} for {DIGITS}, else 0.",
            show_default=False,
        ),
    ] = None,
    noise: Annotated[
        Noise, typer.Option(help="What a corrupted label becomes: the next class, as if by a habit, or any other one.")
    ] = _DEFAULT.noise,
    seeds: Annotated[int, typer.Option(help="Runs, each with other parts and another start.")] = _DEFAULT.seeds,
    steps: Annotated[int, typer.Option(help="Outer steps of the weights.")] = _DEFAULT.steps,
    training_steps: Annotated[
        int, typer.Option(help="Steps of each classifier that is tested.")
    ] = _DEFAULT.training_steps,
    batch_size: Annotated[
        int | None, typer.Option(help="Examples in a minibatch; all by default.", show_default=False)
    ] = None,
    trusted: Annotated[
        str | None, typer.Option(help="A file or folder like DATA whose labels are right.", show_default=False)
    ] = None,
    trusted_size: Annotated[
        int | None,
        typer.Option(
            help=f"Rows of DATA to trust, without --trusted; default: {_DEFAULT.trusted_size}.", show_default=False
        ),
    ] = None,
    training_size: Annotated[
        int | None,
        typer.Option(help=f"Most training rows; {DIGITS_TRAINING} for {DIGITS}, else all.", show_default=False),
    ] = None,
    test_size: Annotated[
        float | None,
        typer.Option(help="Share of the rows to test on; a quarter, or all that is left.", show_default=False),
    ] = None,
    image_size: Annotated[int, typer.Option(help="Pixels on a side of a folder's images.")] = IMAGE_SIZE,
    compare: Annotated[
        bool, typer.Option("--compare/--no-compare", help="Run small-loss selection and confident learning too.")
    ] = _DEFAULT.compare,
    seed: Annotated[int, typer.Option(help="Of the first run.")] = _DEFAULT.seed,
    output: Annotated[
        Path | None,
        typer.Option(help="Directory for suspicious.csv, cleaned.csv, results.json and pictures.", show_default=False),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Find wrong labels in DATA: learn a weight for each training example by the loss on a small trusted set.

    Ends with a table: classifiers trained on the labels as given, on the trusted rows alone, and on the cleaned data.
    """
    bundled = data == DIGITS
    if training_size is None and test_size is None and bundled:
        training_size = DIGITS_TRAINING
    settings = CleanRunSettings(
        corrupt=(DIGITS_CORRUPTED if bundled else 0.0) if corrupt is None else corrupt,
        noise=noise,
        seeds=seeds,
        steps=steps,
        training_steps=training_steps,
        batch_size=batch_size,
        trusted_size=_DEFAULT.trusted_size if trusted_size is None else trusted_size,
        training_size=training_size,
        test_size=test_size,
        compare=compare,
        seed=seed,
    )
    if trusted is not None and trusted_size is not None:
        raise DataError("a trusted set is given and another is to be split off; pass --trusted or --trusted-size")
    read = functools.partial(load, target=target, ignore=ignore or (), image_size=image_size)
    dataset = read(data, encode=encode)
    right = None if trusted is None else read(trusted, encode=dataset.encoding or False)
    if output is not None:
        prepare_output(output)
    outcome = _run(dataset, settings, right, model, shown=not quiet)
    # Write files first: printing may fail, as in `| head -1`, and the files are then complete.
    written = [] if output is None else _save(outcome, output)
    with printing():
        _show(outcome)
        if written:
            print(f"Written: {', '.join(str(path) for path in written)}")


def _run(
    data: LabelledData, settings: CleanRunSettings, trusted: LabelledData | None, model: str, *, shown: bool
) -> Outcome:
    with _Bar(shown=shown) as bar:
        return run_cleaning(data, settings, trusted=trusted, model=model, progress=bar)


def _show(outcome: Outcome) -> None:
    from bilevel.cleaning.report import remarks, table

    screen = console(stderr=False)
    for line in () if outcome.data.encoding is None else outcome.data.encoding.sentences:
        screen.print(line, markup=False)
    screen.print(table(outcome))
    for line in remarks(outcome):
        screen.print(line, markup=False)
    screen.print(f"The runs took {outcome.seconds:.1f} seconds in all.", markup=False)


def _save(outcome: Outcome, output: Path) -> list[Path]:
    from bilevel.cleaning.plots import write_plots
    from bilevel.cleaning.report import write_json
    from bilevel.cleaning.suspects import write_cleaned, write_suspects

    suspicious, cleaned, document = (output / name for name in ("suspicious.csv", "cleaned.csv", "results.json"))
    write_suspects(outcome, suspicious)
    write_cleaned(outcome, cleaned)
    write_json(outcome, document)
    return [suspicious, cleaned, document, *write_plots(outcome, output)]


class _Bar(StageBar):
    """The progress bar: trusted loss, norm of the hypergradient, test accuracy."""

    def __init__(self, *, shown: bool) -> None:
        super().__init__(shown=shown)
        self._accuracy = ""

    def step(self, point: StepPoint | None) -> None:
        numbers = ""
        if point is not None:
            if not math.isnan(point.test_accuracy):
                self._accuracy = f"  test accuracy {point.test_accuracy:.1%}"
            numbers = (
                f"trusted loss {point.trusted_loss:.4f}  |hypergradient| {point.hypergradient_norm:.1e}{self._accuracy}"
            )
        self.advance(numbers)
