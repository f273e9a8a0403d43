"""Divide data into a training, a trusted and a test part for each run, stratified by class."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from bilevel.cleaning.data import DataError, LabelledData

__all__ = ["Sizes", "Split", "split"]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How many rows each part has.

    Parameters
    ----------
    trusted
        Rows of the trusted set; 0 where the trusted set is given.
    training
        Rows of the training set; None: all rows that are in no other part.
    test
        The share of all rows that is in the test set; None: a quarter, or all other rows where ``training`` is given.
    """

    trusted: int
    training: int | None = None
    test: float | None = None


@dataclass(frozen=True, eq=False)
class Split:
    """Row numbers, int64, of the three parts of one run."""

    training: torch.Tensor
    trusted: torch.Tensor
    test: torch.Tensor


def split(data: LabelledData, sizes: Sizes, *, run: int, seed: int) -> Split:
    """Divide ``data`` for run number ``run``.

    The rows are put in one random order, in which each class is spread evenly. Each run takes its trusted and test rows where the last
    run stopped. So two runs examine every row, if the trusted and test rows are less than half of all.

    Raises
    ------
    DataError
        If there are too few rows.
    """
    total = len(data.labels)
    order = _stratified_order(data.labels, seed)
    held = _test_rows(data, sizes)
    training = total - held - sizes.trusted
    if sizes.training is not None:
        training = min(training, sizes.training)
    fewest = 2 * len(data.classes)
    if training < fewest or (sizes.training or fewest) > total - held - sizes.trusted:
        raise DataError(
            f"{data.name} has {total} rows, too few for {sizes.trusted} trusted, {held} test and at least "
            f"{max(fewest, sizes.training or 0)} training rows; lower --trusted-size, --test-size or --training-size"
        )
    order = order.roll(-run * (held + sizes.trusted))
    parts = (
        order[: sizes.trusted],
        order[sizes.trusted : sizes.trusted + held],
        order[sizes.trusted + held :][:training],
    )
    trusted, test, train = (part.sort().values for part in parts)
    if sizes.trusted:
        rarest = int(data.labels.bincount(minlength=len(data.classes)).min())
        # Rows of a class are spread evenly: so long a stretch holds one of them.
        remedy = "raise --trusted-size"
        if math.ceil(total / max(rarest, 1)) > total - held - fewest:
            remedy = f"it has {rarest} of {total} rows, too few for --trusted-size: leave the class out, or pass --trusted with examples of it"
        check_classes(data.labels[trusted], data.classes, f"the {sizes.trusted} trusted rows", remedy)
    return Split(train, trusted, test)


def check_classes(labels: torch.Tensor, classes: tuple[str, ...], where: str, remedy: str) -> None:
    """Raise :class:`DataError` if a class does not occur in ``labels``."""
    counts = labels.bincount(minlength=len(classes))
    if not bool(counts.all()):
        raise DataError(f"{where} hold no example of the class {classes[int(counts.argmin())]!r}; {remedy}")


def _test_rows(data: LabelledData, sizes: Sizes) -> int:
    total = len(data.labels)
    if sizes.test is not None:
        return round(sizes.test * total)
    if sizes.training is not None:
        return max(total - sizes.trusted - sizes.training, 0)
    return math.ceil(total / 4)


def _stratified_order(labels: torch.Tensor, seed: int) -> torch.Tensor:
    """Return all rows in a random order, of which every stretch has about the classes' shares."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.empty(len(labels), dtype=torch.float64)
    for number in labels.unique().tolist():
        rows = (labels == number).nonzero().flatten()
        shuffled = rows[torch.randperm(len(rows), generator=generator)]
        offset = torch.rand((), generator=generator, dtype=torch.float64)
        place[shuffled] = (torch.arange(len(rows), dtype=torch.float64) + offset) / len(rows)
    return place.argsort()
