"""What a step of a method holds at its peak, counted in copies of the inner variables: every tensor that lives beyond the variables."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import cross_entropy
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from bilevel import stochastic

SGD = partial(torch.optim.SGD, lr=0.01)


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside have held at one time, after each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.living: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        old = {tensor.untyped_storage()._cdata for tensor in given}
        result = function(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in old:
                storage = leaf.untyped_storage()
                self.living[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.living = {key: one for key, one in self.living.items() if not one[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self.living.values()))
        return result


def lower(inner: Any, outer: Any, batch: Any) -> torch.Tensor:
    losses = cross_entropy(inner(batch[0]), batch[1], reduction="none")
    return (outer.sigmoid() * losses).mean()


def upper(inner: Any, outer: Any, batch: Any) -> torch.Tensor:
    return cross_entropy(inner(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("make", "most"),
    [  # an adjoint that is kept is made before
        (partial(stochastic.StocBiO, inner_steps=2, terms=4), 2.5),
        (partial(stochastic.AmIGO, inner_steps=2, adjoint_steps=4), 2.5),
        (partial(stochastic.ImplicitStep, inner_steps=2, adjoint_steps=4), 2.5),
        (partial(stochastic.ImplicitStep, inner_steps=2, adjoint_steps=4, warm_start=False), 2.5),
    ],
    ids=["StocBiO", "AmIGO", "ImplicitStep, warm", "ImplicitStep, cold"],
)
def test_a_product_finds_the_right_hand_side_and_its_result_alone(make: Any, most: float) -> None:
    """The gradient whose graph it runs through, and the last residual, are freed before it."""
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(96, 96), nn.Tanh())), nn.Linear(96, 3))
    batch = torch.randn(4, 96), torch.randint(3, (4,))
    method = make((lower, upper), model, torch.zeros(4), inner_optimizer=SGD, outer_optimizer=SGD)
    method.step(batch, batch)
    with Peak() as peak:
        method.step(batch, batch)
    assert peak.bytes < most * sum(4 * parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("outer", [(3,), (40, 40)], ids=["small outer", "large outer"])
@pytest.mark.parametrize("name", ["StocBiO", "MRBO"])
def test_both_ways_to_sum_a_neumann_series_are_the_series(name: str, outer: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    root = torch.randn(30, 30, dtype=torch.float64)
    A, c = root @ root.T / 30 + torch.eye(30), torch.randn(30, dtype=torch.float64)
    mixing = torch.randn(30, torch.Size(outer).numel(), dtype=torch.float64) / 30

    def inner_objective(z: torch.Tensor, x: torch.Tensor, data: object) -> torch.Tensor:
        return 0.5 * z @ A @ z + z @ mixing @ x.reshape(-1)

    def outer_objective(z: torch.Tensor, x: torch.Tensor, data: object) -> torch.Tensor:
        return z @ c + 0.5 * (x**2).sum()

    z, x = torch.randn(30, dtype=torch.float64), torch.randn(outer, dtype=torch.float64)
    q, term = torch.zeros(30, dtype=torch.float64), c
    for _ in range(4):
        q, term = q + 0.05 * term, term - 0.05 * (A @ term)
    exact = x.clone() - (mixing.T @ q).reshape(outer)
    before = x.clone()
    settings: dict[str, Any] = {"inner_steps": 1} if name == "StocBiO" else {}
    method = getattr(stochastic, name)(
        (inner_objective, outer_objective), z, x, inner_optimizer=SGD, outer_optimizer=partial(torch.optim.SGD, lr=1.0),
        terms=3, neumann_rate=0.05, **settings,
    )  # fmt: skip
    method.step(None, None)
    torch.testing.assert_close(before - x.detach(), exact)
