"""Read a data set for tuning: bundled with scikit-learn, or a CSV file with a target column.

A data set that cannot be used raises a :class:`DataError` of one sentence.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bilevel.cli.encoding import Encoding, encoder
from bilevel.cli.table import MOST_CLASSES, DataError, parse, plain, read_table, split_target

__all__ = ["BUNDLED", "DataError", "Dataset", "Task", "infer_task", "load", "load_bundled", "read_csv"]

BUNDLED = ("breast_cancer", "diabetes", "digits", "wine")
"""Names of the bundled data sets: real data that scikit-learn carries."""


class Task(enum.Enum):
    """The kind of target."""

    REGRESSION = "regression"
    BINARY = "binary"
    MULTICLASS = "multiclass"


@dataclass(frozen=True, eq=False)
class Dataset:
    """A design matrix with its targets.

    Parameters
    ----------
    name
        For tables and files.
    inputs
        float64 (rows, features), finite.
    targets
        (rows,): float64 for regression, class numbers from 0 in int64 otherwise.
    features
        Column names.
    classes
        Class labels in the order of their numbers; empty for regression.
    task
        The kind of target.
    encoding
        How columns of words and missing numbers became inputs; None if they were not encoded.
    """

    name: str
    inputs: NDArray[np.float64]
    targets: NDArray[Any]
    features: tuple[str, ...]
    classes: tuple[str, ...]
    task: Task
    encoding: Encoding | None = None

    @property
    def rows(self) -> int:
        """How many examples."""
        return int(self.inputs.shape[0])


def load(
    source: str,
    *,
    target: str | None = None,
    task: Task | None = None,
    ignore: Sequence[str] = (),
    encode: bool = False,
) -> Dataset:
    """Load a bundled data set by name, or a CSV file by path.

    Parameters
    ----------
    source
        A name in :data:`BUNDLED`, or the path of a CSV file.
    target
        The target column of a CSV file.
    task
        The kind of target; None: inferred from the targets, see :func:`infer_task`.
    ignore
        Columns of a CSV file that are no features, such as names of the rows.
    encode
        Whether a CSV file may have columns of words, and cells without a value.

    Raises
    ------
    DataError
        If there is no such data set, or it cannot be used.
    """
    if source in BUNDLED:
        if target is not None:
            raise DataError(
                f"{source} is a bundled data set, whose target is fixed; leave --target out, or pass a CSV file"
            )
        if ignore or encode:
            option = "--ignore" if ignore else "--encode"
            raise DataError(
                f"{source} is a bundled data set, whose features are fixed; leave {option} out, or pass a CSV file"
            )
        return load_bundled(source, task=task)
    if Path(source).suffix == "" and not os.path.exists(source):  # which says False of a name too long for a file, too
        raise DataError(
            f"there is no data set and no file called {source!r}; the bundled data sets are {', '.join(BUNDLED)}"
        )
    return read_csv(Path(source), target=target, task=task, ignore=ignore, encode=encode)


def load_bundled(name: str, *, task: Task | None = None) -> Dataset:
    """Load one of scikit-learn's data sets.

    Parameters
    ----------
    name
        One of :data:`BUNDLED`.
    task
        What is predicted; inferred if None.

    Raises
    ------
    DataError
        If the task does not fit the data.
    """
    from sklearn import datasets

    if name not in BUNDLED:
        raise DataError(f"there is no bundled data set called {name!r}; there are {', '.join(BUNDLED)}")
    bunch = getattr(datasets, f"load_{name}")()
    features = tuple(str(feature) for feature in bunch.feature_names)
    column = bunch.target.astype(np.float64)
    if task is None:
        task = infer_task(column)
    targets, classes = _encode(column, task, name)
    if task is not Task.REGRESSION:
        classes = _names(bunch, classes)
    return Dataset(name, np.ascontiguousarray(bunch.data, dtype=np.float64), targets, features, classes, task)


def read_csv(
    path: Path, *, target: str | None, task: Task | None = None, ignore: Sequence[str] = (), encode: bool = False
) -> Dataset:
    """Read a comma-separated file with a header line; without ``encode`` every column but the target and the ignored ones must be numeric.

    Parameters
    ----------
    path
        A UTF-8 text file, plain or packed by gzip.
    target
        The target column: numbers, or text for classes.
    task
        What is predicted; inferred if None.
    ignore
        Columns that are no features, such as names of the rows.
    encode
        Whether there may be columns of words, and cells without a value.

    Raises
    ------
    DataError
        If the file is missing, empty or malformed, a column is missing, doubled or not numeric, a cell is
        empty or not finite, or the target has but one value.
    """
    table = read_table(path)
    read = encoder(encode)
    features, inputs, cells = split_target(table, target, ignore, read or plain)
    assert target is not None  # or split_target had raised
    column = _column(cells)
    if column.dtype.kind == "f" and not np.isfinite(column).all():
        line = table.rows[int(np.flatnonzero(~np.isfinite(column))[0])].line
        raise DataError(f"{path}: line {line}: target {target!r} is not a finite number; remove the row or fill it in")
    if task is None:
        task = infer_task(column)
    targets, classes = _encode(column, task, f"{path}: target {target!r}")
    name, encoding = Path(path.name.removesuffix(".gz")).stem, None if read is None else read.encoding
    return Dataset(name, inputs, targets, features, classes, task, encoding)


def infer_task(column: NDArray[Any]) -> Task:
    """Infer the kind of target from a target column; ``--task`` overrides it.

    Text is classes. Numbers are classes if they are whole and at most :data:`MOST_CLASSES` different ones
    occur, otherwise a regression target. Two classes are binary.

    Parameters
    ----------
    column
        Floating-point numbers, or text.

    Examples
    --------
    >>> import numpy as np
    >>> infer_task(np.array([0.0, 1.0, 1.0])), infer_task(np.array([0.5, 1.5, 2.5]))
    (<Task.BINARY: 'binary'>, <Task.REGRESSION: 'regression'>)
    """
    different = np.unique(column)
    if column.dtype.kind == "f" and (different.size > MOST_CLASSES or (different != np.round(different)).any()):
        return Task.REGRESSION
    return Task.BINARY if different.size == 2 else Task.MULTICLASS


def _encode(column: NDArray[Any], task: Task, where: str) -> tuple[NDArray[Any], tuple[str, ...]]:
    """Return targets as the task has them, with class labels, or say why they do not fit it."""
    labels, numbers = np.unique(column, return_inverse=True)
    if labels.size < 2:
        raise DataError(f"{where} has one value only, {labels[0]}; there is nothing to predict")
    if task is Task.REGRESSION:
        if column.dtype.kind != "f":
            raise DataError(
                f"{where} is text, such as {str(labels[0])!r}, and regression needs numbers; pass --task "
                f"{infer_task(column).value}"
            )
        return column, ()
    if task is Task.BINARY and labels.size != 2:
        raise DataError(
            f"{where} has {labels.size} different values, and a binary task needs two; pass --task "
            f"{infer_task(column).value}"
        )
    if task is Task.MULTICLASS and labels.size == 2:
        raise DataError(f"{where} has two different values, and a multiclass task needs more; pass --task binary")
    names = tuple(f"{label:g}" if column.dtype.kind == "f" else str(label) for label in labels)
    return (numbers.astype(np.float64) if task is Task.BINARY else numbers.astype(np.int64)), names


def _names(bunch: Any, classes: tuple[str, ...]) -> tuple[str, ...]:
    # diabetes forced into classes has no names for them, and keeps the numbers.
    names = getattr(bunch, "target_names", None)
    return classes if names is None else tuple(str(names[int(label)]) for label in classes)


def _column(cells: Sequence[str]) -> NDArray[Any]:
    """Return cells as float64 if all are numbers, else as text."""
    numbers = [parse(cell) for cell in cells]
    if any(number is None for number in numbers):
        return np.array(cells, dtype=np.str_)
    return np.array(numbers, dtype=np.float64)
