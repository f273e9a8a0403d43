"""Turn columns of words, and cells without a value, into numbers: what ``--encode`` does."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bilevel.cli.table import MOST_CLASSES, DataError, Features, Table, counted, is_missing, parse

__all__ = ["Column", "Encoder", "Encoding", "encoder"]


@dataclass(frozen=True)
class Column:
    """How one column of a file becomes columns of numbers.

    Parameters
    ----------
    name
        In the file.
    words
        The words of the column, each of which gets a column of zeros and ones; empty for a column of numbers.
    median
        What stands for a missing number.
    missing
        How many cells have no value.
    """

    name: str
    words: tuple[str, ...]
    median: float
    missing: int

    @property
    def features(self) -> tuple[str, ...]:
        """The names of the columns of numbers."""
        return tuple(f"{self.name}={word}" for word in self.words) or (self.name,)

    def numbers(self, table: Table) -> NDArray[np.float64]:
        """Return the columns of numbers (rows, features). A missing word is a row of zeros."""
        at = table.header.index(self.name)
        if self.words:
            for row in table.rows:
                cell = row.cells[at].strip()
                if cell not in self.words and not is_missing(cell):
                    raise DataError(
                        f"{table.path}: line {row.line}: column {self.name!r} holds {cell!r}, which the data to be examined do not; "
                        "correct it, or leave it empty"
                    )
            return np.array([[row.cells[at].strip() == word for word in self.words] for row in table.rows], np.float64)
        filled = [self.median if is_missing(row.cells[at]) else table.number(row, at) for row in table.rows]
        return np.array(filled)[:, None]

    @property
    def sentence(self) -> str:
        """What became of the column; empty if it was taken as it is."""
        if self.words:
            lost = f", all zero in {counted(self.missing)} without a value" if self.missing else ""
            return f"Column {self.name!r} became {len(self.words)} columns of zeros and ones{lost}."
        filled = (
            f"Column {self.name!r} has no value in {counted(self.missing)}: its median, {self.median:g}, stands there."
        )
        return filled if self.missing else ""


@dataclass(frozen=True)
class Encoding:
    """How the features of a file become numbers, decided by one file and applied to others of its form."""

    columns: tuple[Column, ...]

    @classmethod
    def of(cls, table: Table, used: Sequence[str]) -> Encoding:
        """Decide by the cells of ``table`` how its columns ``used`` become numbers.

        Raises
        ------
        DataError
            If a column has no value at all, or too many words.
        """
        return cls(tuple(_column(table, name) for name in used))

    @property
    def features(self) -> tuple[str, ...]:
        """The names of all columns of numbers."""
        return tuple(name for column in self.columns for name in column.features)

    @property
    def sentences(self) -> list[str]:
        """What became of each column that was not taken as it is."""
        return [column.sentence for column in self.columns if column.sentence]

    def numbers(self, table: Table) -> NDArray[np.float64]:
        """Return the features of ``table`` (rows, features)."""
        return np.concatenate([column.numbers(table) for column in self.columns], axis=1)


class Encoder:
    """Reads features by an encoding, which is made by the first file if none is given."""

    def __init__(self, encoding: Encoding | None = None) -> None:
        self.encoding = encoding

    def __call__(self, table: Table, used: Sequence[str]) -> Features:
        """Return the names and the values of the features of ``table``."""
        if self.encoding is None:
            self.encoding = Encoding.of(table, used)
        if [column.name for column in self.encoding.columns] != list(used):
            raise DataError(f"{table.path} has other columns than the data to be examined; give both the same form")
        return self.encoding.features, self.encoding.numbers(table)


def encoder(encode: bool | Encoding) -> Encoder | None:
    """Return what reads features as ``encode`` says; None: all are numbers."""
    return Encoder(encode if isinstance(encode, Encoding) else None) if encode else None


def _column(table: Table, name: str) -> Column:
    at = table.header.index(name)
    cells = [row.cells[at].strip() for row in table.rows]
    present = [cell for cell in cells if not is_missing(cell)]
    missing = len(cells) - len(present)
    remedy = f"leave it out by --ignore {shlex.quote(name)}"
    if not present:
        raise DataError(f"{table.path}: column {name!r} has no value in any row; {remedy}")
    numbers = [number for number in map(parse, present) if number is not None]
    if len(numbers) == len(present):
        return Column(name, (), statistics.median(numbers), missing)
    words = tuple(sorted(set(present)))
    if len(words) > MOST_CLASSES:
        raise DataError(
            f"{table.path}: column {name!r} has {len(words)} different words, such as {words[0]!r}, and at most {MOST_CLASSES} can be "
            f"encoded; {remedy}, or correct the odd cell of a column of numbers"
        )
    return Column(name, words, 0.0, missing)
