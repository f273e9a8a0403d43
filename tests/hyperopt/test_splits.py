"""Splits keep test and watch rows apart and classes in proportion, and scale with the folds' statistics."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import bilevel
from bilevel.hyperopt import Logistic, Ridge, Softmax
from bilevel.hyperopt.data import DataError, Dataset, Task, load_bundled
from bilevel.hyperopt.splits import model_for, split


def small(rows: int = 40, task: Task = Task.REGRESSION) -> Dataset:
    rng = np.random.default_rng(0)
    targets = rng.normal(size=rows) if task is Task.REGRESSION else (np.arange(rows) % 2).astype(float)
    classes = () if task is Task.REGRESSION else ("a", "b")
    return Dataset("small", rng.normal(3, 2, size=(rows, 3)), targets, ("a", "b", "c"), classes, task)


@pytest.mark.parametrize("name", ["wine", "diabetes"])
def test_every_row_is_in_exactly_one_part(name: str) -> None:
    dataset = load_bundled(name)
    splits = split(dataset, folds=4)
    parts = np.concatenate([splits.test, splits.watch, *splits.folds])
    np.testing.assert_array_equal(np.sort(parts), np.arange(dataset.rows))
    assert len(splits.folds) == 4
    assert splits.test.size == pytest.approx(dataset.rows / 4, abs=1)
    np.testing.assert_array_equal(splits.development, np.setdiff1d(np.arange(dataset.rows), splits.test))


def test_classes_are_stratified() -> None:
    dataset = load_bundled("breast_cancer")
    splits = split(dataset)
    share = dataset.targets.mean()
    for part in (splits.test, splits.watch, *splits.folds):
        assert dataset.targets[part].mean() == pytest.approx(share, abs=0.02)


def test_scaling_knows_nothing_of_test_and_watch_rows() -> None:
    dataset = small()
    splits = split(dataset)
    inside = splits.fold_rows
    assert splits.inputs[inside].mean(0).abs().max() < 1e-14
    assert (splits.inputs[inside].std(0, correction=0) - 1).abs().max() < 1e-14
    outside = np.concatenate([splits.test, splits.watch])
    inputs, targets = dataset.inputs.copy(), dataset.targets.copy()
    inputs[outside], targets[outside] = 1e6, 1e6
    again = split(replace(dataset, inputs=inputs, targets=targets))
    assert (again.inputs[inside] == splits.inputs[inside]).all()
    assert (again.targets[inside] == splits.targets[inside]).all()


@pytest.mark.parametrize("level", [0.0, 0.1, 1e9])
def test_constant_features_become_zero(level: float) -> None:
    dataset = small()
    inputs = dataset.inputs.copy()
    inputs[:, 1] = level
    splits = split(replace(dataset, inputs=inputs))
    assert splits.inputs[:, 1].abs().max() <= 1e-6 * max(level, 1)
    assert splits.inputs.isfinite().all()


def test_folds_are_weights_over_shared_rows() -> None:
    splits = split(small())
    data = splits.cross_validation()
    folds, rows = data.training.shape
    assert (folds, rows) == (5, splits.fold_rows.size)
    assert ((data.training + data.validation) == 1).all()
    assert (data.validation.sum(0) == 1).all()
    assert float(data.training.sum(1).mean()) == splits.training_size


def test_the_seed_decides() -> None:
    dataset = small()
    first, same, other = (split(dataset, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.test, same.test)
    assert not np.array_equal(first.test, other.test)


def test_the_model_fits_the_task() -> None:
    assert model_for(small()) == Ridge(3)
    assert model_for(small(task=Task.BINARY)) == Logistic(3)
    assert model_for(load_bundled("wine")) == Softmax(13, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folds": 1}, "at least 2 folds"),
        ({"test_size": 0.0}, "test size between 0 and 1"),
        ({"watch_size": 1.5}, "watch size between 0 and 1"),
        ({"seed": -1}, "seed from 0"),
    ],
)
def test_settings_are_checked(options: dict, message: str) -> None:
    with pytest.raises(bilevel.ArgumentError, match=message):
        split(small(), **options)


@pytest.mark.parametrize(
    ("dataset", "folds", "message"),
    [
        (small(10), 11, "10 rows, too few for 11 folds"),
        (small(10), 10, "5 of 10 rows remain for 10 folds"),
        (small(20, Task.BINARY), 11, "class 'a' has 10 rows, too few for 11 folds"),
        (small(20, Task.BINARY), 10, "rows left for 10 folds"),
        (small(4, Task.BINARY), 2, "class 'a' has 2 rows, too few for 2 folds; leave the class out"),
        (small(1), 2, "has 1 row, too few for 2 folds; use more rows"),
    ],
)
def test_too_few_rows(dataset: Dataset, folds: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        split(dataset, folds=folds)


def test_whole_numbers_that_may_be_a_quantity_are_told_of_the_other_task() -> None:
    grades = replace(small(task=Task.MULTICLASS), targets=np.arange(40) // 14, classes=("-1", "0", "1"))
    with pytest.raises(
        DataError, match=r"class '1' has 12 rows, too few for 13 folds.*quantity, pass --task regression"
    ):
        split(grades, folds=13)
    with pytest.raises(DataError) as named:
        split(replace(grades, classes=("a", "b", "c")), folds=13)
    assert "regression" not in str(named.value)


def test_many_classes_in_words_may_be_a_quantity() -> None:
    classes = tuple(f"1,{k:03d}" for k in range(30))
    dataset = Dataset(
        "sums", np.random.default_rng(0).normal(size=(30, 2)), np.arange(30), ("a", "b"), classes, Task.MULTICLASS
    )
    with pytest.raises(
        DataError, match="there are 30 in 30 rows: where the target is a quantity, write it in plain numbers"
    ):
        split(dataset)


def test_a_target_that_is_constant_in_the_folds() -> None:
    dataset = small()
    splits = split(dataset)
    targets = np.zeros(dataset.rows)
    targets[splits.test] = 1.0
    with pytest.raises(DataError, match="one value only in the rows to train on"):
        split(replace(dataset, targets=targets))


@pytest.mark.parametrize("factor", [2.0**1000, 2.0**-1000])
def test_numbers_whose_squares_overflow_or_vanish_are_standardised_alike(factor: float) -> None:
    dataset = small()
    plain, extreme = (
        split(dataset),
        split(replace(dataset, inputs=dataset.inputs * factor, targets=dataset.targets * factor)),
    )
    assert (plain.inputs == extreme.inputs).all() and (plain.targets == extreme.targets).all()
    assert extreme.target_scale == plain.target_scale * factor


def test_a_row_beyond_all_bounds_names_its_column() -> None:
    dataset = small()
    inputs = dataset.inputs.copy()
    inputs[:, 2] *= 1e-300
    inputs[split(dataset).test[0], 2] = 1e300
    with pytest.raises(DataError, match="column 'c' has numbers so much larger"):
        split(replace(dataset, inputs=inputs))


def test_features_that_are_all_constant_in_the_folds() -> None:
    dataset = small()
    outside = split(dataset, folds=2).test  # these vary, where nothing is trained
    inputs = np.full_like(dataset.inputs, 0.1)
    inputs[outside] = dataset.inputs[outside]
    with pytest.raises(DataError, match="no feature has more than one value"):
        split(replace(dataset, inputs=inputs), folds=2)
    inputs[:, 0] = dataset.inputs[:, 0]  # one that varies is enough
    assert split(replace(dataset, inputs=inputs), folds=2).inputs.shape == inputs.shape


@pytest.mark.parametrize("value", [1e300, -1e200])
def test_targets_whose_squares_overflow_are_refused(value: float) -> None:
    import warnings

    from bilevel.hyperopt.data import Dataset, Task

    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(30, 2))
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for at in range(30):
            targets = inputs.sum(1) + rng.normal(size=30)
            targets[at] = value
            try:
                splits = split(Dataset("outlier", inputs, targets, ("a", "b"), (), Task.REGRESSION), folds=2)
            except bilevel.BilevelError as error:
                refused += "their squares are beyond all numbers" in str(error)
            else:
                assert bool(torch.isfinite(splits.targets.square().sum()))
    assert 5 <= refused <= 20  # wherever it is a row of the test or held back
