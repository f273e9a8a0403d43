"""The list of deliberate faults is up to date; ``make mutations`` tries them."""

from __future__ import annotations

import ast
from collections import Counter

import pytest

from .mutations import MUTATIONS, ROOT, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_fault_can_still_be_put_in(mutation: Mutation) -> None:
    text = (ROOT / "bilevel" / mutation.file).read_text()
    assert text.count(mutation.old) == 1, f"expected once in {mutation.file}: {mutation.old!r}"
    assert mutation.new != mutation.old
    ast.parse(text.replace(mutation.old, mutation.new, 1))
    assert (ROOT / mutation.tests[0].partition("::")[0]).is_file()


def test_there_are_many_and_each_has_a_name() -> None:
    assert len(MUTATIONS) >= 30
    assert set(Counter(mutation.name for mutation in MUTATIONS).values()) == {1}
