"""Pytrees as vectors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.func import functional_call, grad, vmap

import bilevel
from bilevel._torch.tree_spec import children
from bilevel.pytree import Raveler, unravelled

F64 = torch.float64


def tree() -> dict[str, torch.Tensor]:
    return {"b": torch.arange(2.0, dtype=F64), "a": torch.ones(1, 3, dtype=F64)}


def test_ravel_is_in_the_order_of_the_tree_and_widest_in_dtype() -> None:
    mixed = {"b": torch.arange(2.0), "a": torch.ones(1, 3, dtype=F64)}
    assert bilevel.ravel(mixed).dtype == F64
    torch.testing.assert_close(bilevel.ravel(mixed), Raveler.of(mixed, "here").ravel(mixed))
    torch.testing.assert_close(bilevel.ravel(tree()), torch.tensor([0.0, 1, 1, 1, 1], dtype=F64))


def test_ravel_of_the_unknown_is_the_vector_it_was_made_of() -> None:
    raveler = Raveler.of(tree(), "here")
    flat = torch.arange(5.0, dtype=F64)
    with unravelled(raveler, flat) as unknown:
        assert bilevel.ravel(unknown) is flat
        other = {name: leaf.clone() for name, leaf in unknown.items()}
        assert bilevel.ravel(other) is not flat
        assert bilevel.ravel({"b": unknown["b"]}).shape == (2,)
        with unravelled(raveler, 2 * flat) as inner:
            assert bilevel.ravel(inner)[1] == 2
            assert bilevel.ravel(unknown) is not flat  # another unknown's turn: made anew
            torch.testing.assert_close(bilevel.ravel(unknown), flat)
        assert bilevel.ravel(unknown) is flat
    assert bilevel.ravel(unknown) is not flat


def test_ravel_under_a_transform_of_the_user_s_own() -> None:
    """Inside the user's own grad the leaves are others than those that were handed over."""

    def objective(w, a):
        slope = grad(lambda v: (bilevel.ravel(v) ** 3).sum())(w)
        return ((bilevel.ravel(slope) - a) ** 2).sum() + (bilevel.ravel(w) ** 2).sum()

    layer = bilevel.argmin(objective)
    a = torch.linspace(0.5, 2.0, 5, dtype=F64)
    start = {"b": torch.ones(2, dtype=F64), "a": torch.ones(1, 3, dtype=F64)}
    w = bilevel.ravel(layer(start, a))
    torch.testing.assert_close(18 * w**3 * 2 - 12 * w * a + 2 * w, torch.zeros_like(w), atol=1e-8, rtol=0)


@pytest.mark.parametrize("batched", [False, True])
def test_a_penalty_written_with_ravel_is_the_penalty(batched: bool) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)).double()
    start = {name: p.detach() for name, p in model.named_parameters()}
    x, s = torch.randn(4, 6, 2, dtype=F64), torch.tensor(0.5, dtype=F64)

    def loss(w, x):
        return functional_call(model, w, (x,)).sin().mean()

    one = bilevel.argmin(lambda w, x, s: loss(w, x) + s * (bilevel.ravel(w) ** 2).sum())
    two = bilevel.argmin(lambda w, x, s: loss(w, x) + s * sum((p**2).sum() for p in w.values()))

    def slope(layer):
        def total(s):
            if not batched:
                return bilevel.ravel(layer(start, x[0], s)).sum()
            return sum(p.sum() for p in vmap(layer, in_dims=(None, 0, None))(start, x, s).values())

        return torch.func.jacrev(total)(s), torch.func.hessian(total)(s)

    torch.testing.assert_close(slope(one), slope(two), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("wrong", [{}, {"a": 3.0}, {"a": torch.ones(2, dtype=torch.int64)}])
def test_what_cannot_be_a_vector(wrong: object) -> None:
    with pytest.raises((bilevel.ShapeError, bilevel.DtypeError), match=r"bilevel\.ravel"):
        bilevel.ravel(wrong)


def test_the_children_of_a_structure_are_found_in_each_version_of_torch() -> None:
    structure = torch.utils._pytree.tree_structure((1, {"a": 2, "b": 3}))
    assert [child.num_leaves for child in children(structure)] == [1, 2]
    as_in_torch_2_9 = SimpleNamespace(children_specs=["first", "second"])
    assert list(children(as_in_torch_2_9)) == ["first", "second"]
