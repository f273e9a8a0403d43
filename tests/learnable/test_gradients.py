"""Hypergradients of every learnable part, beside central differences of the outer loss at minimisers found by plain Newton steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import bilevel
from bilevel.learnable import (
    Architecture,
    Augmentation,
    DistilledData,
    ExampleWeights,
    Learnable,
    LearningRates,
    LossWeights,
    MixedOperation,
    SharedBody,
    TaskHeads,
    WeightDecay,
)
from bilevel.stochastic import F2SA, SOBA, ImplicitStep

F64 = torch.float64
Case = tuple[Learnable, nn.Module, Any, Any]


def examples(n: int, features: int = 4, classes: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, features, generator=generator, dtype=F64)
    return x, torch.randint(classes, (n,), generator=generator)


class Mixed(nn.Module):
    """A linear classifier of mixed features: the inner problem is convex."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.ModuleList(MixedOperation([nn.Identity(), nn.Tanh(), nn.ReLU()]) for _ in range(2))
        self.last = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        for place, row in zip(self.places, weights, strict=True):
            x = place(x, row)
        return self.last(x)


def example_weights() -> Case:
    train = (*examples(12), torch.arange(12))
    return ExampleWeights(12, weight_decay=0.1, dtype=F64), nn.Linear(4, 3), train, examples(9, seed=1)


def loss_weights() -> Case:
    def size(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs[:, 3] - targets.to(outputs)) ** 2

    def smooth(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs[:, :3] - 1.0) ** 2

    def main(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return cross_entropy(outputs[:, :3] + 0.3 * outputs[:, 3:], targets, reduction="none")

    learned = LossWeights([size, smooth], loss=main, initial=0.5, weight_decay=0.1, dtype=F64)
    return learned, nn.Linear(4, 4), examples(12), examples(9, seed=1)


def decay(make: Callable[..., WeightDecay]) -> Case:
    model = nn.Linear(4, 3).double()
    return make(model, initial=0.2), model, examples(12), examples(9, seed=1)


def augmentation() -> Case:
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    (x, y), (held_x, held_y) = examples(8, 36), examples(6, 36, seed=1)
    learned = Augmentation(weight_decay=0.3, dtype=F64)
    return learned, model, (x.reshape(-1, 1, 6, 6), y), (held_x.reshape(-1, 1, 6, 6), held_y)


def distilled_data() -> Case:
    return DistilledData(*examples(3), weight_decay=0.1), nn.Linear(4, 3), None, examples(9, seed=1)


def shared_body() -> Case:
    body = nn.Sequential(nn.Linear(4, 3), nn.Tanh()).double()
    (x, y), (held_x, held_y) = examples(12), examples(10, seed=1)
    train = x.reshape(2, 6, 4), y.reshape(2, 6)
    return (
        SharedBody(body, weight_decay=0.1),
        TaskHeads(2, 3, 3),
        train,
        (held_x.reshape(2, 5, 4), held_y.reshape(2, 5)),
    )


def architecture() -> Case:
    return Architecture(2, 3, weight_decay=0.1, dtype=F64), Mixed(), examples(12), examples(9, seed=1)


CASES: dict[str, Callable[[], Case]] = {
    "example weights": example_weights,
    "loss weights": loss_weights,
    "decay of tensors": partial(decay, WeightDecay),
    "decay of layers": partial(decay, WeightDecay.for_layers),
    "decay of entries": partial(decay, WeightDecay.for_entries),
    "augmentation": augmentation,
    "distilled data": distilled_data,
    "shared body": shared_body,
    "architecture": architecture,
}


def made(name: str) -> tuple[Case, tuple[Any, Any]]:
    """Return a case, and its objectives with the same random draws in each evaluation."""
    torch.manual_seed(0)
    learned, model, train, held = CASES[name]()
    inner, outer = learned.objectives

    def outputs(*arguments: Any) -> torch.Tensor:
        torch.manual_seed(7)
        return inner.outputs(*arguments)

    seeded = type(inner)(outputs, inner.loss, inner.penalty)
    return (learned, model.double(), train, held), (seeded, outer)


def minimise(objective: Any, model: nn.Module, learned: Learnable, data: Any) -> None:
    """Put the minimiser of the inner objective into the model, by Newton steps on a dense Hessian."""
    names, tensors = zip(*model.named_parameters(), strict=True)
    sizes = [tensor.numel() for tensor in tensors]

    def loss(flat: torch.Tensor) -> torch.Tensor:
        pieces = zip(names, flat.split(sizes), tensors, strict=True)
        return functional_call(
            Holder(model), {f"model.{n}": p.reshape(t.shape) for n, p, t in pieces}, (objective, learned, data)
        )

    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    for _ in range(30):
        (slope,) = torch.autograd.grad(loss(flat.requires_grad_()), flat)
        if slope.norm() < 1e-12:
            break
        matrix = torch.autograd.functional.hessian(loss, flat.detach())
        flat = flat.detach() - torch.linalg.solve(matrix, slope)
    assert slope.norm() < 1e-12
    torch.nn.utils.vector_to_parameters(flat, model.parameters())


class Holder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, objective: Any, learned: Any, data: Any) -> torch.Tensor:
        return objective(self.model, learned, data)


@pytest.mark.parametrize(
    "hessian", [bilevel.FullHessian(), bilevel.GaussNewtonHessian()], ids=["Hessian", "Gauss-Newton"]
)
@pytest.mark.parametrize("name", CASES)
def test_the_hypergradient_is_that_of_differences(name: str, hessian: Any) -> None:
    (learned, model, train, held), losses = made(name)
    minimise(losses[0], model, learned, train)
    parameters = list(learned.parameters())
    generator = torch.Generator().manual_seed(3)
    direction = [torch.randn(p.shape, generator=generator, dtype=F64) for p in parameters]

    def value(length: float) -> float:
        moved, at = copy.deepcopy(learned), copy.deepcopy(model)
        with torch.no_grad():
            for parameter, part in zip(moved.parameters(), direction, strict=True):
                parameter += length * part
        minimise(losses[0], at, moved, train)
        with torch.no_grad():
            return losses[1](at, moved, held).item()

    expected = (value(1e-4) - value(-1e-4)) / 2e-4
    before = [p.detach().clone() for p in parameters]
    method = ImplicitStep(
        losses, model, learned, inner_steps=0, linear_solver=bilevel.Exact(), hessian=hessian,
        outer_optimizer=partial(torch.optim.SGD, lr=1.0),
    )  # fmt: skip
    method.step(train, held)
    found = sum(((b - p.detach()) * part).sum() for b, p, part in zip(before, parameters, direction, strict=True))
    assert float(found) == pytest.approx(expected, rel=1e-6, abs=1e-10) and abs(expected) > 1e-6


@pytest.mark.parametrize("name", CASES)
def test_methods_with_and_without_second_derivatives_take_every_part(name: str) -> None:
    for method in (SOBA, F2SA):
        (learned, model, train, held), losses = made(name)
        before = [p.detach().clone() for p in learned.parameters()]
        made_method = method(losses, model, learned)
        for _ in range(3):
            result = made_method.step(train, held)
        assert torch.isfinite(result.outer_loss) and float(result.hypergradient_norm) > 0
        assert all(not torch.equal(b, p) for b, p in zip(before, learned.parameters(), strict=True))


@pytest.mark.parametrize("network", [False, True], ids=["linear", "network"])
def test_learning_rates_are_differentiated_as_a_loop_is(network: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)) if network else nn.Linear(4, 3)
    model.double()
    train, held = examples(12), examples(9, seed=1)
    train[0].requires_grad_()
    rates = LearningRates(model, initial=0.3, steps=6, weight_decay=0.1)
    rates(model, train, held).backward()

    start = [p.detach().clone().requires_grad_() for p in model.parameters()]
    logarithms = [p.detach().clone().requires_grad_() for p in rates.logarithms]
    inputs = train[0].detach().clone().requires_grad_()
    names, point = [name for name, _ in model.named_parameters()], start
    for _ in range(6):
        loss = cross_entropy(functional_call(model, dict(zip(names, point, strict=True)), (inputs,)), train[1])
        loss = loss + 0.05 * sum((p**2).sum() for p in point)
        slopes = torch.autograd.grad(loss, point, create_graph=True)
        point = [p - log.exp() * slope for p, log, slope in zip(point, logarithms, slopes, strict=True)]
    final = functional_call(model, dict(zip(names, point, strict=True)), (held[0],))
    expected = torch.autograd.grad(cross_entropy(final, held[1]), [*logarithms, *start, inputs])
    found = [*(p.grad for p in rates.parameters()), *(p.grad for p in model.parameters()), train[0].grad]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
