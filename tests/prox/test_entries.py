"""Terms of single entries as numbers for each entry: they have to be the terms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bilevel import prox
from bilevel.prox._flat import FlatTerm

DOUBLE = torch.float64
N = 7
STRENGTHS = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.0], dtype=DOUBLE)
TERMS = [
    prox.L1(0.3),
    prox.L1(0.0),
    prox.L1(STRENGTHS),
    prox.ElasticNet(0.2, STRENGTHS),
    prox.ElasticNet(STRENGTHS, 0.7),
    prox.NonNegative(),
    prox.Box(-0.2, 0.3),
    prox.Box(None, 0.1),
    prox.Box(-STRENGTHS, 0.3),
    prox.Box(-0.3, STRENGTHS),
]


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
@pytest.mark.parametrize("term", TERMS, ids=str)
def test_numbers_for_each_entry_are_the_term(term: prox.Term, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(N, generator=generator, dtype=dtype)
    v[0] = 0.0  # where some strengths are zero
    found = FlatTerm([term], [torch.Size([N])]).entries(v)
    assert found is not None
    x = term.prox(v, 0.5)
    torch.testing.assert_close(found.prox(v, 0.5), x)
    assert torch.equal(found.free(x), term.manifold(x).free)
    torch.testing.assert_close(torch.as_tensor(found.value(x), dtype=dtype), term.value(x))
    places = torch.tensor([5, 0, 2])
    part = found.at(places)
    np.testing.assert_allclose(part.prox(v[places].double().numpy(), 0.5), x[places].double(), rtol=1e-6)
    assert (part.free(x[places].numpy()) == found.free(x)[places].numpy()).all()
    # The slope is that of the value on the manifold.
    free, y = found.free(x), x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(term.manifold(x).value(y) + 0 * y.sum(), y)
    given = torch.as_tensor(found.slope(x, x.sign()), dtype=dtype).expand(N)
    torch.testing.assert_close(given[free], slope[free])


def test_the_numbers_of_several_terms_are_joined() -> None:
    term = FlatTerm([prox.L1(0.3), None, prox.Box(0.1, 0.2)], [torch.Size([2]), torch.Size([]), torch.Size([1, 2])])
    v = torch.tensor([-1.0, 0.2, 5.0, -1.0, 0.15], dtype=DOUBLE)
    found = term.entries(v)
    assert found is not None
    torch.testing.assert_close(found.prox(v, 0.5), term.prox(v, torch.tensor(0.5, dtype=DOUBLE)))
    assert found.free(found.prox(v, 0.5)).tolist() == [True, True, True, False, True]


def test_a_term_of_the_user_is_no_such_term() -> None:
    class Twice(prox.L1):
        def prox(self, v: torch.Tensor, step: prox.Parameter = 1.0) -> torch.Tensor:
            return super().prox(v, 2 * step)

    assert FlatTerm([Twice(0.3)], [torch.Size([2])]).entries(torch.zeros(2)) is None
    assert FlatTerm([prox.L2Ball(1.0)], [torch.Size([2])]).entries(torch.zeros(2)) is None
