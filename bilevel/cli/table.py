"""Read a CSV file: its header, and rows of text that turn into numbers one cell at a time.

A file that cannot be used raises a :class:`DataError` of one sentence, with the line number.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import itertools
import math
import re
import shlex
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

import bilevel

__all__ = [
    "MISSING",
    "MOST_CLASSES",
    "DataError",
    "Row",
    "Table",
    "counted",
    "is_missing",
    "listed",
    "parse",
    "read_table",
    "split_target",
]


MOST_CLASSES = 20
"""A numeric target column of whole numbers with at most so many different ones is read as classes."""


MISSING = frozenset({"na", "n/a", "nan", "null", "?"})
"""What stands for a missing value, in lower case; as the name of a class it is too likely one."""

Features: TypeAlias = tuple[tuple[str, ...], NDArray[np.float64]]
"""Names of features, and their values (rows, features)."""

_GROUPED = re.compile(r"[-+]?[0-9]+(,[0-9]+)+(\.[0-9]*)?")
_GZIP = b"\x1f\x8b"  # what every such file begins with


class DataError(bilevel.BilevelError, ValueError):
    """A data set cannot be used as it is; the message says why, and what to do."""


class _MissingError(Exception):
    """A cell is empty or says that there is no value; the argument says which."""


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
        """Return the text in column number ``at`` of ``row``, or raise if there is none."""
        cell = row.cells[at].strip()
        if not cell:
            raise _MissingError(f"{self._place(row, at)} is empty")
        return cell

    def number(self, row: Row, at: int) -> float:
        """Return the number in column number ``at`` of ``row``, or raise if there is none."""
        cell = self.cell(row, at)
        number = parse(cell)
        if cell.lower() in MISSING or (number is not None and not math.isfinite(number)):
            raise _MissingError(f"{self._place(row, at)} holds {cell!r}")
        if number is None:
            raise DataError(
                f"{self._place(row, at)} holds {cell!r}, which is not a number; "
                + (
                    "write it with a point for decimals, and nothing for thousands"
                    if _GROUPED.fullmatch(cell)
                    else f"pass --encode to turn words into numbers, or leave it out by --ignore {shlex.quote(self.header[at])}"
                )
            )
        return number

    def missing(self, columns: Sequence[int]) -> tuple[int, int]:
        """Return how many cells of ``columns`` are empty or hold no finite value, and how many rows have one."""
        counts = [sum(is_missing(row.cells[at]) for at in columns) for row in self.rows]
        return sum(counts), sum(map(bool, counts))

    def _place(self, row: Row, at: int) -> str:
        return f"{self.path}: line {row.line}: column {self.header[at]!r}"


def read_table(path: Path) -> Table:
    """Read a comma-separated file with a header line.

    Parameters
    ----------
    path
        A UTF-8 text file, plain or packed by gzip.

    Raises
    ------
    DataError
        If the file is missing, empty or malformed, or a column's name is not its own.
    """
    reader = csv.reader(io.StringIO(_text(path), newline=""), skipinitialspace=True)
    try:
        lines = [Row(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except csv.Error as error:
        raise DataError(f"{path} is not a CSV file ({error}); separate columns with commas") from None
    if not lines:
        raise DataError(f"{path} is empty; a header line and rows of numbers are needed")
    # A comma at the end of every line, which some exporters leave, makes a column without a name or a cell.
    while len(lines[0].cells) > 1 and not any("".join(row.cells[len(lines[0].cells) - 1 :]).strip() for row in lines):
        lines = [Row(row.line, row.cells[: len(lines[0].cells) - 1]) for row in lines]
    header = [cell.strip() for cell in lines[0].cells]
    rows = lines[1:]
    if len(header) == 1 and rows and len(rows[0].cells) > 2:
        raise DataError(
            f"{path}: line {lines[0].line} is {header[0]!r} and the next has {len(rows[0].cells)} columns; remove lines above that with the "
            "columns' names"
        )
    _check_header(path, header)
    if not rows:
        raise DataError(f"{path} has a header and no rows; rows of numbers are needed")
    for row in rows:
        if len(row.cells) != len(header):
            remedy = "quote cells that hold commas"
            if len(row.cells) < len(header):
                remedy = "fill in the cells that are missing, and close every quotation mark"
            elif not any(cell.strip() for cell in row.cells[len(header) :]):
                remedy = "remove the commas at the ends of lines"
            raise DataError(
                f"{path}: line {row.line}: expected {len(header)} columns as in the header, got {len(row.cells)}; {remedy}"
            )
    return Table(path, header, rows)


def plain(table: Table, used: Sequence[str]) -> Features:
    """Return the columns ``used`` of ``table``, all of whose cells have to be numbers."""
    columns = [table.header.index(name) for name in used]
    return tuple(used), np.array([[table.number(row, j) for j in columns] for row in table.rows], dtype=np.float64)


def split_target(
    table: Table,
    target: str | None,
    ignore: Sequence[str] = (),
    read: Callable[[Table, Sequence[str]], Features] = plain,
) -> tuple[tuple[str, ...], NDArray[np.float64], list[str]]:
    """Return the feature columns of ``table`` as numbers, and the target column as text.

    Parameters
    ----------
    table
        Of :func:`read_table`.
    target
        The target column.
    ignore
        Columns that are no features, such as names or numbers of the rows. Their cells may hold anything.
    read
        Makes features of the columns of these names.

    Returns
    -------
    tuple
        The features' names, their values (rows, features) in float64, and the target's cells.

    Raises
    ------
    DataError
        If there is no target column, no column of this name to ignore or no feature, or a cell cannot be used.
    """
    path, header = table.path, table.header
    if target is None:
        raise DataError(
            f"{path}: which column is the target? Pass --target, one of: {listed([header[-1], *header[:-1]])}"
        )
    if target not in header:
        row = (
            "; if that is a row, put a line of names above it"
            if any(parse(name) is not None for name in header)
            else ""
        )
        raise DataError(f"{path}: there is no column {target!r}; there are: {listed(header)}{row}")
    for name in ignore:
        if name == target:
            raise DataError(f"{path}: {name!r} is the target and cannot be ignored; leave --ignore {name} out")
        if name not in header:
            raise DataError(f"{path}: there is no column {name!r} to ignore; there are: {listed(header)}")
    used = [name for name in header if name != target and name not in ignore]
    if not used:
        besides = " and the ignored ones" if ignore else ""
        raise DataError(
            f"{path}: there is no column besides the target {target!r}{besides}; at least one feature is needed"
        )
    encode = ", or pass --encode, which fills in medians"
    try:
        features, inputs = read(table, used)
        encode = ""  # which does not help where a label is missing
        cells = [table.cell(row, header.index(target)) for row in table.rows]
    except _MissingError as error:
        missing, rows = table.missing([header.index(name) for name in (*used, target)])
        others = f" ({missing} cells in {counted(rows)} have no value)" if missing > 1 else ""
        raise DataError(f"{error}{others}; fill in missing values or remove such rows{encode}") from None
    _check_labels(table, target, cells)
    return features, inputs, cells


def _check_labels(table: Table, target: str, cells: list[str]) -> None:
    """Refuse the odd cell that would turn a column of numbers into text, or missing values into a class."""
    numbers = {number for number in map(parse, cells) if number is not None}
    for row, cell in zip(table.rows, cells, strict=True):
        where = f"{table.path}: line {row.line}: target {target!r} holds {cell!r}"
        if cell.lower() in MISSING:
            raise DataError(f"{where}, which is no value; remove the row or fill it in")
        if len(numbers) > MOST_CLASSES and parse(cell) is None:
            raise DataError(f"{where}, which is not a number as others are; correct it or remove the row")


def _text(path: Path) -> str:
    """Return the text of the file, unpacked if necessary."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"there is no file {path}; pass a CSV file or the name of a bundled data set") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a directory; pass a CSV file") from None
    except (OSError, ValueError) as error:  # the latter is of a NUL character
        why = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read ({why}); pass a CSV file that can") from None
    if content.startswith(_GZIP):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error):
            raise DataError(f"{path} is a gzip file that is damaged or cut short; fetch or pack it again") from None
    for name, marks in (
        ("UTF-32", (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)),  # whose first mark begins like that of UTF-16
        ("UTF-16", (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)),
    ):
        if content.startswith(marks):
            raise DataError(f"{path} is text in {name}; save it as a CSV file in UTF-8")
    if b"\0" in content:
        raise DataError(f"{path} is not text; expected a CSV file in UTF-8, plain or packed by gzip: export it as one")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}: line {line} is not text in UTF-8; save it as a CSV file in UTF-8") from None


def _check_header(path: Path, header: list[str]) -> None:
    if _is_data(header):
        raise DataError(
            f"{path}: the first line holds numbers where column names are expected ({listed(header, 4)}); put a line of names "
            "above it, for example a,b,target"
        )
    if "" in header and len(header) > 1:
        raise DataError(
            f"{path}: column {header.index('') + 1} of {len(header)} has no name; name it if it is a feature, or remove it if it "
            "numbers the rows (pandas: to_csv(..., index=False))"
        )
    doubled = [name for name, times in Counter(header).items() if times > 1]
    if doubled:
        raise DataError(f"{path}: the column {doubled[0]!r} occurs more than once; rename or remove one")
    for separator, name in _SEPARATORS.items():
        if len(header) == 1 and separator in header[0]:
            raise DataError(f"{path}: the columns seem to be separated by {name}; separate them with commas")


def _is_data(header: list[str]) -> bool:
    """Whether the first line is a row of data and not a header: mostly numbers, and not like the names of columns.

    Some names are numbers: pandas counts columns, tables have one per year, and spectra one per wavelength. Such names only
    rise or only fall, and few are not whole.
    """
    numbers = [number for number in map(parse, header) if number is not None]
    if len(numbers) <= len(header) / 2:
        return False
    steps = [after - before for before, after in itertools.pairwise(numbers)]
    sorted_ = all(step > 0 for step in steps) or all(step < 0 for step in steps)
    whole = all(name.isdigit() for name in header if parse(name) is not None)
    if len(numbers) == len(header):
        return not (whole and set(steps) <= {1.0})
    return not (sorted_ and (whole or len(numbers) >= _SPECTRUM))


_SPECTRUM = 8
"""Numbers that are sorted by chance are fewer."""


_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars", " ": "spaces"}


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


def counted(rows: int) -> str:
    """Return "1 row", "2 rows" and so on."""
    return f"{rows} row" if rows == 1 else f"{rows} rows"


def is_missing(cell: str) -> bool:
    """Whether a cell is empty, or says that there is no finite value."""
    cell = cell.strip()
    number = parse(cell)
    return not cell or cell.lower() in MISSING or (number is not None and not math.isfinite(number))


def listed(names: Sequence[str], most: int = 12) -> str:
    """Return the first ``most`` names, and how many more there are."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
