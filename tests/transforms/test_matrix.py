"""Every transform of every kind of problem: right, or refused with the error that the row names. One test for each cell."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from .problems import COLUMNS, F32, F64, Column
from .rows import ROWS, Row
from .table import EXCEPTIONS, PAGE, declared, rendered, rendered_exceptions

# What a residual at the default tolerance, eps^(3/4), leaves of digits: each derivative is one more solve with it.
MARGIN = 20.0
# The version of torch that the page is of. How far torch's compiler gets differs from one to the next.
SHOWN = "2.13"


@functools.cache
def expected(row: Row, kind: str, batched: bool) -> Any:
    """Return what the oracle gives, in float64, shared by the dtypes."""
    column = next(c for c in COLUMNS if (c.kind.name, c.batched, c.dtype) == (kind, batched, F64))
    return (row.expect or row.run)(column, column.oracle, *column.inputs(F64))


def outcome(row: Row, column: Column) -> str:
    """Run a cell and return what became of it as :func:`declared` says it; raise if it is wrong."""
    if row.needs_start and not column.kind.has_start:
        return "none"
    if row.refusal is not None and row.refused(column):
        with pytest.raises(row.refusal.error, match=row.refusal.match) as caught:
            row.run(column, column.solve(), *column.inputs())
        return type(caught.value).__name__
    compare(row, column, row.run(column, column.solve(), *column.inputs()))
    return "right"


def compare(row: Row, column: Column, made: Any) -> None:
    """Raise if what a cell's run ``made`` is not what the oracle gives."""
    found = pytree.tree_leaves(made)
    needs_grad = pytree.tree_leaves(expected(row, column.kind.name, column.batched))
    assert len(found) == len(needs_grad)
    tolerance = MARGIN * torch.finfo(row.arithmetic or column.dtype).eps ** 0.75 * max(1, row.order)
    for mine, reference in zip(found, needs_grad, strict=True):
        assert mine.shape == reference.shape and mine.dtype == column.dtype
        if not reference.numel():
            continue
        scale = float(reference.detach().abs().max())
        assert scale > 1e-2, "a derivative that is next to nothing would prove nothing"
        error = float((mine.detach().double() - reference.detach()).abs().max())
        assert error <= tolerance * scale, f"relative error {error / scale:.1e}, allowed {tolerance:.1e}"


def elsewhere(row: Row, column: Column) -> None:
    """Raise if a cell of the compiler's is wrong; it may be refused, in whatever words."""
    if row.needs_start and not column.kind.has_start:
        return
    try:
        made = row.run(column, column.solve(), *column.inputs())
    except Exception:
        return
    compare(row, column, made)


def cells() -> Iterator[Any]:
    """Yield every cell. All rows of the first kind of problem run, and of the others one in five, in float32 one in eleven; all with ``--long``."""
    first = COLUMNS[0].kind
    for number, row in enumerate(ROWS):
        for other, column in enumerate(COLUMNS):
            period = 11 if column.dtype == F32 else 1 if column.kind is first else 5
            marks: list[pytest.MarkDecorator] = [pytest.mark.long] if (number + other) % period else []
            if "two processes" in row.name:
                marks.append(pytest.mark.xdist_group("two processes of the matrix"))
            yield pytest.param(row, column, id=f"{row.group}, {row.name}-{column.name}", marks=marks)


# torch's compiler looks at .grad of what is on the stack where a graph breaks, wherever that is.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(("row", "column"), [*cells()])
def test_cell(row: Row, column: Column) -> None:
    if row.group.startswith("torch.compile") and not torch.__version__.startswith(SHOWN):
        elsewhere(row, column)
        return
    assert outcome(row, column) == declared(row, column)


def test_the_page_shows_these_outcomes() -> None:
    assert PAGE.read_text() == rendered(), "the table of the documentation is stale: `make transforms` writes it anew"
    assert EXCEPTIONS.read_text() == rendered_exceptions(), (
        "the list of exceptions is stale: `make transforms` writes it anew"
    )


def test_names_are_told_apart() -> None:
    names = [(row.group, row.name) for row in ROWS]
    assert len(set(names)) == len(names)
