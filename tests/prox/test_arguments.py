"""What a term takes and refuses, and a term of the user's own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.func import vmap

from bilevel import prox
from bilevel.errors import ArgumentError, DtypeError, ShapeError

X = torch.ones(4)
MATRIX = torch.ones(2, 3)
REFUSED: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: prox.L1(-1.0), ArgumentError, "prox.L1: expected strength to be finite and at least 0, got -1"),
    (lambda: prox.L1(torch.tensor([1.0, -2.0])), ArgumentError, "got -2"),
    (lambda: prox.L1(float("nan")), ArgumentError, "got nan"),
    (lambda: prox.L1("1"), ArgumentError, "a number or a tensor"),  # type: ignore[arg-type]
    (lambda: prox.L1(True), ArgumentError, "a number or a tensor"),
    (lambda: prox.L1(torch.tensor(1.0j)), DtypeError, "complex"),
    (lambda: prox.L1(torch.ones(3)).prox(X), ShapeError, r"expands to \(4,\), got the shape \(3,\)"),
    (lambda: prox.ElasticNet(1.0, -1.0), ArgumentError, "l2"),
    (lambda: prox.GroupL2(1.0, groups=[[0, 1], [1]]), ArgumentError, "got 1 again"),
    (lambda: prox.GroupL2(1.0, groups=[[0, -1]]), ArgumentError, "below 0"),
    (lambda: prox.GroupL2(1.0, groups=[[]]), ArgumentError, "not empty"),
    (lambda: prox.GroupL2(1.0, groups=[[0, 4]]).prox(X), ArgumentError, "below 4"),
    (lambda: prox.GroupL2(torch.ones(3), groups=[[0], [1]]).prox(X), ShapeError, "strength"),
    (lambda: prox.GroupL2(1.0, groups=[0, 1]), ArgumentError, "lists of indices"),  # type: ignore[list-item]
    (lambda: prox.GroupL2(1.0, groups=[[0.5]]), ArgumentError, "lists of indices"),  # type: ignore[list-item]
    (lambda: prox.LInf(torch.ones(2)).prox(X), ShapeError, "strength"),
    (lambda: prox.NuclearNorm(1.0).prox(X), ShapeError, "matrix"),
    (lambda: prox.TotalVariation1D(1.0).prox(torch.tensor(1.0)), ShapeError, "at least 1"),
    (lambda: prox.Box(1.0, 0.0), ArgumentError, "got 1 above 0"),
    (lambda: prox.Box(torch.zeros(2), torch.tensor([1.0, -1.0])), ArgumentError, "got 0 above -1"),
    (lambda: prox.Box(float("nan")), ArgumentError, "expected lower to be a number, got nan"),
    (lambda: prox.Box(torch.zeros(2), torch.ones(3)), ArgumentError, "one shape"),
    (lambda: prox.Box("a", 1.0), ArgumentError, "a number or a tensor"),  # type: ignore[arg-type]
    (lambda: prox.Box(torch.zeros(3)).prox(X), ShapeError, "lower"),
    (lambda: prox.Simplex(0.0), ArgumentError, "above 0"),
    (lambda: prox.Simplex(dim=1).prox(X), ArgumentError, "axis 1"),
    (lambda: prox.Simplex(dim=1.0), ArgumentError, "integer"),  # type: ignore[arg-type]
    (lambda: prox.Simplex().prox(torch.ones(2, 0)), ShapeError, "at least one"),
    (lambda: prox.L1Ball(-1.0), ArgumentError, "radius"),
    (lambda: prox.L2Ball(float("inf")), ArgumentError, "radius"),
    (lambda: prox.L2Ball(1.0, torch.zeros(3)).prox(X), ShapeError, "centre"),
    (lambda: prox.AffineSet(torch.ones(2, 4), 1.0), ArgumentError, "linearly independent"),
    (lambda: prox.AffineSet(torch.ones(1, 4), torch.ones(2)), ShapeError, "b to be"),
    (lambda: prox.AffineSet(torch.ones(4), 1.0), ShapeError, r"\(m, n\)"),
    (lambda: prox.AffineSet(torch.ones(1, 3), 1.0).prox(X), ShapeError, "4 columns"),
    (lambda: prox.AffineSet(torch.eye(5), 1.0).prox(X), ShapeError, "4 columns"),
    (lambda: prox.HalfSpace(torch.zeros(4), 1.0), ArgumentError, "not zero"),
    (lambda: prox.HalfSpace(torch.ones(3), 1.0).prox(X), ShapeError, "shape of x"),
    (lambda: prox.HalfSpace(1.0, 1.0), ArgumentError, "tensor"),  # type: ignore[arg-type]
    (lambda: prox.SecondOrderCone().prox(torch.tensor(1.0)), ShapeError, "at least 1"),
    (lambda: prox.PSDCone().prox(MATRIX), ShapeError, "square"),
    (lambda: prox.TransportPolytope(torch.ones(2), torch.ones(3)), ArgumentError, "got 2 and 3"),
    (lambda: prox.TransportPolytope(torch.tensor([1.0, -1.0]), torch.zeros(3)), ArgumentError, "row"),
    (lambda: prox.TransportPolytope(torch.zeros(2), torch.zeros(3)), ArgumentError, "positive sum"),
    (lambda: prox.TransportPolytope(torch.ones(2, 1), torch.ones(2)), ShapeError, "vector"),
    (lambda: prox.TransportPolytope(torch.ones(3), torch.ones(3)).prox(MATRIX), ShapeError, r"\(3, 3\)"),
    (lambda: prox.Custom(1.0), ArgumentError, "function"),  # type: ignore[arg-type]
    (lambda: prox.Custom(lambda v, step: v, value=1.0), ArgumentError, "value"),  # type: ignore[arg-type]
    (lambda: prox.Custom(lambda v, step: v[:1]).prox(X), ShapeError, r"\(4,\), got \(1,\)"),
    (lambda: prox.Custom(lambda v, step: v).value(X), ArgumentError, "value="),
    (lambda: prox.Custom(lambda v, step: v).manifold(X), ArgumentError, "fixed point"),
    (lambda: prox.Custom(lambda v, step: v).margin(X, X), ArgumentError, "margin"),
]


@pytest.mark.parametrize(("make", "kind", "words"), REFUSED)
def test_what_cannot_be_used_is_refused_in_a_sentence(
    make: Callable[[], object], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words) as caught:
        make()
    assert type(caught.value) is kind
    assert "; " in str(caught.value) or kind is DtypeError or kind is ShapeError


def test_a_batched_parameter_that_cannot_be_used_gives_nan_for_its_own_problem() -> None:
    v = torch.ones(2, 3)
    good_and_bad = torch.tensor([1.0, -1.0])
    terms: list[Callable[[torch.Tensor], prox.Term]] = [
        prox.L1, lambda s: prox.ElasticNet(s, 0.0), prox.GroupL2, prox.LInf, prox.TotalVariation1D, prox.Simplex, prox.L1Ball, prox.L2Ball,
        lambda upper: prox.Box(0.0, upper), lambda s: prox.TransportPolytope(s * torch.ones(1), torch.ones(3) / 3),
    ]  # fmt: skip
    for build in terms:
        found = vmap(
            lambda v, s: build(s).prox(v) if build(s).where != "prox.TransportPolytope" else build(s).prox(v[None])
        )(v, good_and_bad)
        assert found[0].isfinite().all(), build(1.0)
        assert found[1].isnan().any(), build(1.0)
    found = vmap(lambda s: prox.NuclearNorm(s).prox(torch.ones(2, 2)))(good_and_bad)
    assert found[0].isfinite().all() and found[1].isnan().any()


def test_a_row_that_is_not_finite_is_nan_and_leaves_the_others_alone() -> None:
    v = torch.tensor([[1.0, 2.0, 3.0, 4.0], [float("nan")] * 4])
    for term in (prox.TotalVariation1D(0.1), prox.Simplex(), prox.LInf(1.0)):
        found = vmap(term.prox)(v)
        assert found[0].isfinite().all() and found[1].isnan().all(), term
    for term in (prox.PSDCone(), prox.NuclearNorm(0.1), prox.TransportPolytope(torch.ones(2), torch.ones(2))):
        found = vmap(term.prox)(v.reshape(2, 2, 2))
        assert found[0].isfinite().all() and found[1].isnan().all(), term


def test_numbers_and_tensors_of_another_dtype_are_converted() -> None:
    v = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float32)
    for strength in (1, 1.0, np.float32(1.0), np.int64(1), torch.tensor(1), torch.tensor(1.0, dtype=torch.float64)):
        assert prox.L1(strength).prox(v).dtype == torch.float32
        assert prox.L1(strength).prox(v).tolist() == [0.0, -1.0, 2.0, 0.0]
    assert prox.L1(torch.tensor(1.0)).tensors() and not prox.L1(1.0).tensors()


def test_the_same_point_by_rows_or_by_columns() -> None:
    v = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(prox.Simplex(dim=0).prox(v), prox.Simplex().prox(v.mT).mT)
    groups = [[4 * row + column for column in range(4)] for row in range(3)]
    torch.testing.assert_close(prox.GroupL2(0.5, groups=groups).prox(v), prox.GroupL2(0.5).prox(v))
    torch.testing.assert_close(prox.TotalVariation1D(0.5).prox(v)[1], prox.TotalVariation1D(0.5).prox(v[1]))
    torch.testing.assert_close(prox.SecondOrderCone().prox(v)[1], prox.SecondOrderCone().prox(v[1]))


def test_fields_may_be_given_by_position() -> None:
    assert prox.ElasticNet(0.1, 0.2).l2 == 0.2
    assert prox.Box(0.0, 1.0).upper == 1.0
    assert prox.Simplex(2.0, 0).dim == 0
    assert prox.L2Ball(1.0, 0.5).centre == 0.5
    assert prox.GroupL2(1.0, [[0]]).groups == [[0]]


def test_a_prox_of_the_users_own_has_the_derivative_of_autograd() -> None:
    term = prox.Custom(lambda v, step: v / (1 + step), value=lambda x: 0.5 * x.square().sum())
    v = torch.randn(3, 4)
    torch.testing.assert_close(vmap(lambda v: term.prox(v, 3.0))(v), v / 4)
    torch.testing.assert_close(torch.func.jacrev(lambda v: term.prox(v, 3.0))(v[0]), torch.eye(4) / 4)
    assert not term.has_manifold and prox.L1(1.0).has_manifold
    assert float(term.value(torch.ones(4))) == 2.0
