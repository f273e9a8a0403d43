"""Read a data set for tuning: bundled with scikit-learn, or a CSV file with a target column.

Whatever cannot be used is said in one sentence, as a :class:`DataError`.
"""

from __future__ import annotations

import csv
import enum
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import bilevel

__all__ = ["BUNDLED", "DataError", "Dataset", "Task", "infer_task", "load", "load_bundled", "read_csv"]

BUNDLED = ("breast_cancer", "diabetes", "digits", "wine")
"""Names of the bundled data sets: real data that scikit-learn carries."""

MOST_CLASSES = 20
"""A numeric target column of whole numbers with at most so many different ones is read as classes."""


class DataError(bilevel.BilevelError, ValueError):
    """A data set cannot be used as it is; the message says why, and what to do."""


class Task(enum.Enum):
    """What is predicted."""

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
        What is predicted.
    """

    name: str
    inputs: NDArray[np.float64]
    targets: NDArray[Any]
    features: tuple[str, ...]
    classes: tuple[str, ...]
    task: Task

    @property
    def rows(self) -> int:
        """How many examples."""
        return int(self.inputs.shape[0])


def load(source: str, *, target: str | None = None, task: Task | None = None) -> Dataset:
    """Load a bundled data set by name, or a CSV file by path.

    Parameters
    ----------
    source
        A name in :data:`BUNDLED`, or the path of a CSV file.
    target
        The target column of a CSV file.
    task
        What is predicted; inferred from the targets if None, see :func:`infer_task`.

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
        return load_bundled(source, task=task)
    if Path(source).suffix == "" and not Path(source).exists():
        raise DataError(
            f"there is no data set and no file called {source!r}; the bundled data sets are {', '.join(BUNDLED)}"
        )
    return read_csv(Path(source), target=target, task=task)


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
    labels = [str(label) for label in getattr(bunch, "target_names", ())]
    values = bunch.target.astype(np.float64)
    if task is None:
        task = Task.REGRESSION if name == "diabetes" else infer_task(values)
    targets, classes = _encode(list(bunch.target), values, task, name)
    if labels and task is not Task.REGRESSION:
        classes = tuple(labels[int(label)] for label in classes)
    return Dataset(name, np.ascontiguousarray(bunch.data, dtype=np.float64), targets, features, classes, task)


def read_csv(path: Path, *, target: str | None, task: Task | None = None) -> Dataset:
    """Read a comma-separated file with a header line; every column but the target must be numeric.

    Parameters
    ----------
    path
        A UTF-8 text file.
    target
        The target column: numbers, or text for classes.
    task
        What is predicted; inferred if None.

    Raises
    ------
    DataError
        If the file is missing, empty or malformed, a column is missing, doubled or not numeric, a cell is empty
        or not finite, or the target has but one value.
    """
    header, rows = _read_table(path)
    if target is None:
        raise DataError(f"{path}: which column is the target? Pass --target, one of: {_listed(header)}")
    if target not in header:
        raise DataError(f"{path}: there is no column {target!r}; there are: {_listed(header)}")
    if len(header) == 1:
        raise DataError(f"{path}: there is no column besides the target {target!r}; at least one feature is needed")
    at = header.index(target)
    features = tuple(name for name in header if name != target)
    inputs = np.array(
        [[_number(path, row, j, header) for j in range(len(header)) if j != at] for row in rows], dtype=np.float64
    )
    labels = [_present(path, row, at, header) for row in rows]
    values = _numbers(labels)
    if values is not None and not np.isfinite(values).all():
        raise DataError(
            f"{path}: line {_first_line(~np.isfinite(values), rows)}, target {target!r} is not a finite number; "
            "remove the row or fill it in"
        )
    if task is None:
        task = infer_task(values)
    targets, classes = _encode(labels, values, task, f"{path}: target {target!r}")
    return Dataset(path.stem, inputs, targets, features, classes, task)


def infer_task(values: NDArray[np.float64] | None) -> Task:
    """Guess what is predicted from a target column; ``--task`` overrides it.

    Text is classes. Numbers are classes if they are whole and at most :data:`MOST_CLASSES` different ones occur,
    otherwise a regression target. Two classes are binary.

    Parameters
    ----------
    values
        The column as numbers, or None if it is text.

    Examples
    --------
    >>> import numpy as np
    >>> infer_task(np.array([0.0, 1.0, 1.0])), infer_task(np.array([0.5, 1.5, 2.5]))
    (<Task.BINARY: 'binary'>, <Task.REGRESSION: 'regression'>)
    """
    if values is None:
        return Task.MULTICLASS  # _encode narrows it to binary when there are two labels
    different = np.unique(values)
    if different.size > MOST_CLASSES or not np.array_equal(different, np.round(different)):
        return Task.REGRESSION
    return Task.BINARY if different.size == 2 else Task.MULTICLASS


def _encode(
    labels: Sequence[Any], values: NDArray[np.float64] | None, task: Task, where: str
) -> tuple[NDArray[Any], tuple[str, ...]]:
    """Return targets as the task has them, with class labels, or say why they do not fit it."""
    ...


def _read_table(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return the header and the rows with their line numbers."""
    ...
