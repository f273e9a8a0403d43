"""Divide a data set into test rows, watch rows and folds, and scale it with the folds' statistics alone.

::

    all rows ── test ───────────────────────── looked at once, when everything is settled
             └─ development ─ watch ────────── held back from the folds: says when to stop
                            └ K folds ──────── what strengths are tuned on
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import bilevel
from bilevel.cli.table import counted
from bilevel.hyperopt.data import DataError, Dataset, Task
from bilevel.hyperopt.linear_models import LinearModel, Logistic, Ridge, Softmax, WeightedData

__all__ = ["Splits", "model_for", "split"]

Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Splits:
    """A data set divided and scaled, in float64.

    Standardisation (each column less its mean, over its standard deviation; a constant column is only
    centred) and, for regression, the centring and scaling of the targets take their statistics from the rows
    in the folds, never from watch or test rows. One scaling serves all K folds, so that they share a design
    matrix: a fold's validation rows thus take part in the scaling, of inputs and targets alike, as they do
    for the grid that tuning is compared with.

    Parameters
    ----------
    inputs
        (rows, features), scaled.
    targets
        (rows,), scaled for regression.
    test, watch
        Row numbers.
    folds
        K arrays of row numbers, each one fold's validation rows.
    target_scale
        What one unit of a scaled regression target is in the original units; 1 for classes.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    test: Rows
    watch: Rows
    folds: tuple[Rows, ...]
    target_scale: float

    @property
    def fold_rows(self) -> Rows:
        """All rows in the folds."""
        return np.sort(np.concatenate(self.folds))

    @property
    def development(self) -> Rows:
        """All rows but the test rows."""
        return np.sort(np.concatenate([*self.folds, self.watch]))

    @property
    def training_size(self) -> float:
        """The mean number of rows a fold is trained on."""
        return self.fold_rows.size * (len(self.folds) - 1) / len(self.folds)

    def cross_validation(self) -> WeightedData:
        """Return the K folds as weights over the rows in them; ``FOLD_DIMS`` are its batch dimensions."""
        rows = self.fold_rows
        validation = torch.stack(
            [torch.from_numpy(np.isin(rows, fold).astype(np.float64)) for fold in self.folds]
        )  # (K, rows)
        at = torch.from_numpy(rows)
        return WeightedData(self.inputs[at], self.targets[at], 1 - validation, validation)

    def part(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the inputs and targets of ``rows``."""
        at = torch.from_numpy(rows)
        return self.inputs[at], self.targets[at]


def model_for(dataset: Dataset) -> LinearModel:
    """Return the linear model of the data set's task."""
    features = dataset.inputs.shape[1]
    if dataset.task is Task.REGRESSION:
        return Ridge(features)
    return Logistic(features) if dataset.task is Task.BINARY else Softmax(features, len(dataset.classes))


def split(
    dataset: Dataset, *, folds: int = 5, test_size: float = 0.25, watch_size: float = 0.2, seed: int = 0
) -> Splits:
    """Divide ``dataset``: stratified by class for classes, shuffled by ``seed``.

    Parameters
    ----------
    dataset
        The data.
    folds
        K, at least 2.
    test_size
        The part of all rows that is held out.
    watch_size
        The part of the development rows that is held back from the folds.
    seed
        Of the shuffles.

    Raises
    ------
    DataError
        If there are too few rows, in all or of one class, or the rows to train on show one value of every feature.
    bilevel.ArgumentError
        If a size is not between 0 and 1, or there are fewer than two folds.
    """
    _check_settings(folds, test_size, watch_size, seed)
    _check_rows(dataset, folds)
    from sklearn.model_selection import KFold, StratifiedKFold, train_test_split

    classes = None if dataset.task is Task.REGRESSION else dataset.targets.astype(np.int64)

    def divide(rows: Rows, size: float) -> tuple[Rows, Rows]:
        labels = None if classes is None else classes[rows]
        try:
            kept, taken = train_test_split(rows, test_size=size, random_state=seed, stratify=labels)
        except ValueError as error:
            raise DataError(
                f"{dataset.name}: {rows.size} rows cannot be divided with a part of {size:g} held out "
                f"({error}); "
                "use more rows or other sizes"
            ) from None
        return np.sort(kept), np.sort(taken)

    development, test = divide(np.arange(dataset.rows), test_size)
    inside, watch = divide(development, watch_size)
    _check_folds(dataset, inside, classes, folds)
    splitter: Any = KFold if classes is None else StratifiedKFold
    parts = splitter(folds, shuffle=True, random_state=seed).split(inside, None if classes is None else classes[inside])
    inputs, targets, scale = _standardise(dataset, inside)
    return Splits(inputs, targets, test, watch, tuple(inside[held] for _, held in parts), scale)


def _check_settings(folds: int, test_size: float, watch_size: float, seed: int) -> None:
    if folds < 2:
        raise bilevel.ArgumentError(f"expected at least 2 folds, got {folds}; pass for example --folds 5")
    if not 0 <= seed < 2**32:
        raise bilevel.ArgumentError(f"expected a seed from 0 to 2^32 - 1, got {seed}; pass for example --seed 0")
    for name, size in (("test size", test_size), ("watch size", watch_size)):
        if not 0 < size < 1:
            raise bilevel.ArgumentError(f"expected a {name} between 0 and 1, got {size:g}; it is a part of the rows")


def _check_rows(dataset: Dataset, folds: int) -> None:
    if folds > dataset.rows:
        raise DataError(
            f"{dataset.name} has {counted(dataset.rows)}, too few for {folds} folds; {_fewer_folds(dataset.rows, 'use more rows')}"
        )
    if dataset.task is not Task.REGRESSION:
        counts = np.bincount(dataset.targets.astype(np.int64))
        rarest = int(counts.argmin())
        if counts[rarest] < max(folds, _FEWEST):
            raise DataError(
                f"{dataset.name}: the class {dataset.classes[rarest]!r} has {counted(counts[rarest])}, too few for {folds} folds; "
                f"{_fewer_folds(int(counts[rarest]), 'leave the class out')}{_if_numbers(dataset)}"
            )


def _fewer_folds(rows: int, otherwise: str) -> str:
    """Return the remedy for too few rows. Of the rows some are held out, and each fold needs one: few are too few for any folds."""
    return f"lower --folds, or {otherwise}" if rows >= _FEWEST else otherwise


_FEWEST = 3
"""Rows of a class of which one is tested on and two remain for the folds."""


def _if_numbers(dataset: Dataset) -> str:
    """Return what else may be meant: classes that are whole numbers may be counts or grades, and very many in words no classes."""
    if len(dataset.classes) > dataset.rows / 3:
        return (
            f" (there are {len(dataset.classes)} in {dataset.rows} rows: where the target is a quantity, write it in plain numbers, "
            "without commas and units)"
        )
    whole = all(name.lstrip("-").isdigit() for name in dataset.classes)
    return "; where the target is a quantity, pass --task regression" if whole and len(dataset.classes) > 2 else ""


def _check_folds(dataset: Dataset, inside: Rows, classes: NDArray[np.int64] | None, folds: int) -> None:
    if inside.size < folds:
        raise DataError(
            f"{dataset.name}: {inside.size} of {counted(dataset.rows)} remain for {folds} folds; lower --folds "
            "or --test-size"
        )
    if classes is not None:
        counts = np.bincount(classes[inside], minlength=len(dataset.classes))
        rarest = int(counts.argmin())
        if counts[rarest] < folds:
            raise DataError(
                f"{dataset.name}: the class {dataset.classes[rarest]!r} has {counted(counts[rarest])} left for {folds} folds; "
                f"lower --folds or --test-size, or leave the class out{_if_numbers(dataset)}"
            )


def _standardise(dataset: Dataset, rows: Rows) -> tuple[torch.Tensor, torch.Tensor, float]:
    inputs, _, constant = _scaled(dataset.inputs, rows)
    if not np.isfinite(inputs).all():
        name = dataset.features[int(np.flatnonzero(~np.isfinite(inputs).all(0))[0])]
        raise DataError(
            f"{dataset.name}: column {name!r} has numbers so much larger than in the rows to train on that they cannot be "
            "standardised; rescale it, or remove the outliers"
        )
    if constant.all():
        raise DataError(
            f"{dataset.name}: no feature has more than one value in the rows to train on, so that no strength changes a "
            "prediction; add columns that vary, or lower --test-size or --watch-size"
        )
    if dataset.task is not Task.REGRESSION:
        return torch.from_numpy(inputs), torch.from_numpy(dataset.targets), 1.0
    targets, scale, same = _scaled(dataset.targets, rows)
    if same or not scale > 0:
        raise DataError(
            f"{dataset.name}: the target has one value only in the rows to train on; there is nothing to predict"
        )
    if not np.abs(targets).max() < _SQUARED:
        raise DataError(
            f"{dataset.name}: the target has numbers so much larger than in the rows to train on that their squares are beyond all "
            "numbers; rescale it, or remove the outliers"
        )
    return torch.from_numpy(inputs), torch.from_numpy(targets), float(scale)


_SQUARED = 1e150
"""The largest target that is accepted: squares of it, and sums of many squares, do not overflow."""


def _scaled(
    columns: NDArray[np.float64], rows: Rows
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Return ``columns`` standardised by what is seen in ``rows``, the spreads there, and which are constant there."""
    # By powers of two first, which changes no digit: squares of large numbers overflow, and those of small ones vanish.
    exponent = np.frexp(np.abs(columns[rows]).max(0))[1]
    with np.errstate(over="ignore"):  # a row that was not seen may lie beyond all numbers, and is found out by that
        unit = np.ldexp(columns, -exponent)
    seen = unit[rows]
    mean, spread = seen.mean(0), seen.std(0)
    # A constant column's computed spread is rounding, not zero; dividing by it would make noise of it.
    constant = spread <= 16 * np.finfo(np.float64).eps * np.abs(seen).max(0)
    return (unit - mean) / np.where(constant, 1.0, spread), np.ldexp(spread, exponent), constant
