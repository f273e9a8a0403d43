"""The minimiser of a quadratic plus a term of single entries, by its optimality conditions."""

from __future__ import annotations

import numpy as np
import pytest

from bilevel.prox._entries import Entries
from bilevel.solvers.composite.entry_model import EntryModel

TERMS = {
    "L1": Entries(l1=0.05),
    "strengths": Entries(l1=np.linspace(0.02, 0.1, 40)),
    "elastic net": Entries(l1=0.05, l2=0.3),
    "bounds": Entries(lower=-0.2, upper=0.1),
    "non-negative": Entries(lower=0.0),
}


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("rows", [100, 40, 15])  # 15: a singular matrix of order 40
@pytest.mark.parametrize("start", [0.0, 1.0])
def test_the_minimiser_is_stationary(term: str, rows: int, start: float) -> None:
    generator, g = np.random.default_rng(rows), TERMS[term]
    X = generator.standard_normal((rows, 40))
    slope = -X.T @ generator.standard_normal(rows) / rows
    model = EntryModel.of(g, np.zeros(40), slope, X.T @ X / rows, float("inf"))
    assert model is not None
    y = model.minimised(g.prox(start * generator.standard_normal(40), 1.0), 5)
    move = g.prox(y - model.step * model.slope_at(y), model.step) - y
    assert abs(move).max() <= 1e-10 * (1 + abs(y).max())
    free, matrix = model.free_hessian(y)
    assert matrix.shape == (len(free), len(free))
    if g.l1 is not None and g.l2 is None:  # no more than the rank
        assert len(free) <= rows


def test_a_model_without_curvature_is_none() -> None:
    assert EntryModel.of(Entries(l1=1.0), np.zeros(3), np.ones(3), np.zeros((3, 3)), float("inf")) is None
