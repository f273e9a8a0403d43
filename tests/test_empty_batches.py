"""A vmap over a batch of no problems: torch fails in operations of two numbers there, so no function of the user's is called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.func import grad, vmap

import bilevel

F64 = torch.float64
T = torch.tensor([0.5, 2.0], dtype=F64)
NOTHING = torch.zeros(0, 2, dtype=F64)


def number(x: torch.Tensor, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Return an operation of two numbers, of which one is batched: torch's own vmap fails in it for an empty batch."""
    return (x * u).sum() - t.sum()


def objective(x: torch.Tensor, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    return ((x - t) ** 2).sum() + number(x, t, u) ** 2


LAYERS: dict[str, dict[str, Any]] = {
    "free": {},
    "equality": {"equality": number},
    "inequality": {"inequality": number},
    "a bound": {"lower": lambda t, u: u.sum() - t.sum()},
    "the central path": {"inequality": number, "lower": 0.0, "smoothing": 1e-3},
    "a proximal term": {"prox": lambda t, u: bilevel.prox.L1(u.sum() * t.sum())},
}


def test_torch_fails_in_an_operation_of_two_numbers() -> None:
    with pytest.raises(IndexError, match="index 0 out of range"):
        vmap(lambda u: number(T, T, u))(NOTHING)


@pytest.mark.parametrize("settings", LAYERS.values(), ids=LAYERS)
def test_the_answer_is_empty(settings: dict[str, Any]) -> None:
    layer = bilevel.argmin(objective, **settings)
    solution = vmap(lambda u: layer.solve(torch.zeros_like(T), T, u))(NOTHING)
    like = vmap(lambda u: layer.solve(torch.zeros_like(T), T, u))(torch.ones(3, 2, dtype=F64))
    found, reference = (torch.utils._pytree.tree_flatten((s.value, s.multipliers, s.active)) for s in (solution, like))
    assert found[1] == reference[1]
    for empty, full in zip(found[0], reference[0], strict=True):
        assert (empty is None and full is None) or (empty.shape, empty.dtype) == ((0, *full.shape[1:]), full.dtype)


@pytest.mark.parametrize("settings", LAYERS.values(), ids=LAYERS)
def test_the_gradient_of_what_is_shared_is_zero(settings: dict[str, Any]) -> None:
    layer = bilevel.argmin(objective, **settings)

    def loss(t: torch.Tensor) -> torch.Tensor:
        return vmap(lambda u: layer(torch.zeros_like(T), t, u))(NOTHING).sum()

    assert torch.equal(grad(loss)(T), torch.zeros_like(T))
    t = T.clone().requires_grad_(True)
    loss(t).backward()
    assert t.grad is not None and torch.equal(t.grad, torch.zeros_like(T))


def test_a_batch_of_starts_of_several_tensors() -> None:
    game = bilevel.equilibrium([lambda x, y, t: (x - t) ** 2 + x * y / 2, lambda x, y, t: (y - t) ** 2])
    x, y = vmap(lambda v: game((v[0], v[1]), T[0]))(NOTHING)
    assert x.shape == y.shape == (0,)


def test_a_constraint_that_does_not_work_is_named() -> None:
    layer = bilevel.argmin(objective, equality=lambda x, t, u: torch.cat([x, t]) @ u)
    with pytest.raises(bilevel.ShapeError, match="expected equality to be a function"):
        vmap(lambda u: layer(torch.zeros_like(T), T, u))(NOTHING)
