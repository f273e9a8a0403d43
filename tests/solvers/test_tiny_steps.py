"""Searches that make no headway are ended, also where no jump was seen at their first tiny step."""

from __future__ import annotations

import pytest
import torch

from bilevel.equations.system import ArgminSystem
from bilevel.reports import Status
from bilevel.solvers.parts.tiny_steps import TinySteps

from .support import F64, build

RUNNING, FAILED = int(Status.RUNNING), int(Status.LINE_SEARCH_FAILED)


def codes(shares: list[float]) -> list[int]:
    """Return the verdicts on successive steps of so large ``shares`` along a smooth objective; the first is not looked at."""
    problem, x = build(ArgminSystem, lambda x: (x**2).sum(), torch.ones(2, dtype=F64))
    tiny, active, found = TinySteps(problem), torch.ones(1, dtype=torch.bool), []
    for share in shares:
        last, gradient = x, 2 * x
        x = last - share * last
        verdict = tiny.end(lambda share=share: torch.tensor([share], dtype=F64), last, x, gradient, active, None)
        found.append(RUNNING if verdict is None else int(verdict))
    return found


def test_six_tiny_steps_one_after_the_other_end_a_search() -> None:
    assert codes([1.0, *6 * [1e-7]]) == [*6 * [RUNNING], FAILED]


@pytest.mark.parametrize("shares", [[1.0, *5 * [1e-7], 0.5, *5 * [1e-7]], 20 * [1e-3]])
def test_fewer_of_them_or_longer_ones_do_not(shares: list[float]) -> None:
    assert set(codes(shares)) == {RUNNING}
