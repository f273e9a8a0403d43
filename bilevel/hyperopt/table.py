"""Read a CSV file: its header, and rows of text that turn into numbers one cell at a time.

Whatever cannot be used is said in one sentence, as a :class:`DataError`, with the line where it is.
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import bilevel

__all__ = ["DataError", "Row", "Table", "listed", "parse", "read_table"]


class DataError(bilevel.BilevelError, ValueError):
    """A data set cannot be used as it is; the message says why, and what to do."""


@dataclass(frozen=True)
class Row:
    """The cells of one row, and the line of the file on which it ends."""

    line: int
    cells: list[str]


@dataclass(frozen=True)
class Table:
    """A file's header and rows, all of one length.

    Parameters
    ----------
    path
        For messages.
    header
        Column names, all different.
    rows
        At least one.
    """

    path: Path
    header: list[str]
    rows: list[Row]

    def cell(self, row: Row, at: int) -> str:
        """Return the text in column number ``at`` of ``row``, or raise :class:`DataError` if there is none."""
        cell = row.cells[at].strip()
        if not cell:
            raise DataError(f"{self._place(row, at)} is empty; fill in missing values or remove such rows")
        return cell

    def number(self, row: Row, at: int) -> float:
        """Return the number in column number ``at`` of ``row``, or raise :class:`DataError` if there is none."""
        cell = self.cell(row, at)
        number = parse(cell)
        if number is None:
            raise DataError(
                f"{self._place(row, at)} holds {cell!r}, which is not a number; encode the column in numbers or remove it"
            )
        if not math.isfinite(number):
            raise DataError(f"{self._place(row, at)} holds {cell!r}; fill in missing values or remove such rows")
        return number

    def _place(self, row: Row, at: int) -> str:
        return f"{self.path}: line {row.line}: column {self.header[at]!r}"


def read_table(path: Path) -> Table:
    """Read a comma-separated file with a header line.

    Parameters
    ----------
    path
        A UTF-8 text file.

    Raises
    ------
    DataError
        If the file is missing, empty or malformed, or a column's name is not its own.
    """
    if path.is_dir():
        raise DataError(f"{path} is a directory; pass a CSV file")
    if not path.exists():
        raise DataError(f"there is no file {path}; pass a CSV file or the name of a bundled data set")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, skipinitialspace=True)
            lines = [Row(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text; save it as a CSV file in UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{path} is not a CSV file ({error}); separate columns with commas") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; check its permissions") from None
    if not lines:
        raise DataError(f"{path} is empty; a header line and rows of numbers are needed")
    header = [cell.strip() for cell in lines[0].cells]
    _check_header(path, header)
    rows = lines[1:]
    if not rows:
        raise DataError(f"{path} has a header and no rows; rows of numbers are needed")
    for row in rows:
        if len(row.cells) != len(header):
            raise DataError(
                f"{path}: line {row.line}: expected {len(header)} columns as in the header, got {len(row.cells)}; quote "
                "cells that hold commas"
            )
    return Table(path, header, rows)


def _check_header(path: Path, header: list[str]) -> None:
    doubled = [name for name, times in Counter(header).items() if times > 1]
    if doubled:
        raise DataError(f"{path}: the column {doubled[0]!r} occurs more than once; rename or remove one")
    if len(header) == 1 and (";" in header[0] or "\t" in header[0]):
        raise DataError(f"{path}: the columns seem to be separated by semicolons or tabs; separate them with commas")


def parse(cell: str) -> float | None:
    """Return the number that ``cell`` is, or None.

    Examples
    --------
    >>> parse("2e3"), parse("1_0"), parse("red")
    (2000.0, None, None)
    """
    try:
        return None if "_" in cell else float(cell)
    except ValueError:
        return None


def listed(names: Sequence[str], most: int = 12) -> str:
    """Return the first ``most`` names, and how many more there are."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
