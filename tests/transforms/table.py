"""The table of the documentation: what became of each cell. ``python -m tests.transforms.table`` writes it anew.

The program runs every cell and writes what happened; the test beside it holds the page to the registry, and one test for
each cell holds the registry to what happens.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from .problems import COLUMNS, Column
from .rows import ROWS, Row

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "transforms_table.inc"
EXCEPTIONS = PAGE.with_name("transforms_exceptions.inc")
SIGNS = {"right": "right", "none": "–"}


def declared(row: Row, column: Column) -> str:
    """Return what the registry says of a cell: ``"right"``, ``"none"``, or the name of the error that refuses it."""
    if row.needs_start and not column.kind.has_start:
        return "none"
    if row.refusal is not None and row.refused(column):
        return row.refusal.error.__name__
    return "right"


def rendered(verdict: Callable[[Row, Column], str] = declared) -> str:
    """Return the table as reStructuredText, both dtypes of a kind of problem in one cell where they agree."""
    pairs = [list(pair) for _, pair in itertools.groupby(COLUMNS, lambda column: (column.kind.name, column.batched))]
    cells = len(ROWS) * len(COLUMNS)
    lines = [f".. {cells} cells, written by python -m tests.transforms.table; do not edit", ""]
    for group, rows in itertools.groupby(ROWS, lambda row: row.group):
        lines += [f".. list-table:: {group}", "   :header-rows: 1", "   :widths: 30" + " 10" * len(pairs), ""]
        heads = ["way of use", *(f"{p[0].kind.name}, {'batch' if p[0].batched else 'single'}" for p in pairs)]
        lines += _line(heads)
        for row in rows:
            lines += _line([f"``{row.name}``", *(_cell([verdict(row, column) for column in pair]) for pair in pairs)])
        lines.append("")
    return "\n".join(lines)


def rendered_exceptions() -> str:
    """Return a table of the ways of use that are refused for some kind of problem, by the registry."""
    lines = [".. written by python -m tests.transforms.table; do not edit", ""]
    lines += [".. list-table::", "   :header-rows: 1", "   :widths: 22 38 22 18", ""]
    lines += _line(["group", "way of use", "refused for", "with"])
    for row in ROWS:
        verdicts = [(column, declared(row, column)) for column in COLUMNS]
        refused = [column for column, verdict in verdicts if verdict not in SIGNS]
        if not refused:
            continue
        possible = [column for column, verdict in verdicts if verdict != "none"]
        names = dict.fromkeys(verdict for _, verdict in verdicts if verdict not in SIGNS)
        errors = " or ".join(f"``{name}``" for name in names)
        lines += _line([row.group, f"``{row.name}``", _where(refused, possible), errors])
    return "\n".join([*lines, ""])


def _where(refused: list[Column], possible: list[Column]) -> str:
    """Return which of the kinds of problem that there can be are refused: all, all in one dtype, or their names."""
    if refused == possible:
        return "all"
    for dtype in (torch.float64, torch.float32):
        if refused == [column for column in possible if column.dtype == dtype]:
            return f"all in {str(dtype).removeprefix('torch.')}"
    return "; ".join(column.name for column in refused)


def _line(entries: list[str]) -> list[str]:
    return [f"   {'*' if number == 0 else ' '} - {entry}" for number, entry in enumerate(entries)]


def _cell(verdicts: list[str]) -> str:
    named = [SIGNS.get(verdict, f"refused: ``{verdict}``") for verdict in verdicts]
    return named[0] if len(set(named)) == 1 else f"float64 {named[0]}, float32 {named[1]}"


def main() -> None:
    from .test_matrix import outcome

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    PAGE.write_text(rendered(outcome))
    EXCEPTIONS.write_text(rendered_exceptions())
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
