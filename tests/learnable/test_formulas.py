"""The losses of every learnable part, beside the formula of its docstring written out in plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear, one_hot

from bilevel.learnable import (
    Architecture,
    Augmentation,
    DistilledData,
    ExampleWeights,
    Learnable,
    LossWeights,
    MixedOperation,
    SharedBody,
    TaskHeads,
    WeightDecay,
)

F64 = torch.float64
GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(7, 4, generator=GENERATOR, dtype=F64), torch.tensor([0, 2, 1, 1, 0, 2, 2])
HELD = torch.randn(5, 4, generator=GENERATOR, dtype=F64), torch.tensor([1, 0, 2, 2, 1])
ROWS = torch.tensor([8, 2, 0, 5, 11, 7, 3])  # a minibatch of twelve examples
W, B = torch.randn(3, 4, generator=GENERATOR, dtype=F64), torch.randn(3, generator=GENERATOR, dtype=F64)
SIZE = (W**2).sum() + (B**2).sum()


def classifier() -> nn.Module:
    model = nn.Linear(4, 3).double()
    model.load_state_dict({"weight": W, "bias": B})
    return model


def moved(learned: Any) -> Any:
    """Return a learnable part whose parameters are all different."""
    with torch.no_grad():
        for parameter in learned.parameters():
            parameter += 0.1 * torch.arange(parameter.numel()).reshape(parameter.shape).to(parameter)
    return learned


def losses(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The cross-entropy of each example, (n,)."""
    scores = x @ W.T + B
    return scores.exp().sum(1).log() - (scores * one_hot(y, 3)).sum(1)


Case = tuple[Learnable, nn.Module, Any, Any, torch.Tensor, torch.Tensor]


def example_weights() -> Case:
    learned = moved(ExampleWeights(12, weight_decay=0.3, dtype=F64))
    weights = 2 / (1 + (-0.1 * ROWS.double()).exp())
    expected = (weights * losses(X, Y)).sum() / 7 + 0.15 * SIZE
    return learned, classifier(), (X, Y, ROWS), HELD, expected, losses(*HELD).mean()


def loss_weights() -> Case:
    def height(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return outputs**2  # (n, 3)

    def shift(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs[:, 0] - targets) ** 2

    learned = moved(LossWeights([height, shift], initial=0.5, weight_decay=0.3, dtype=F64))
    scores = X @ W.T + B
    expected = losses(X, Y).mean() + 0.5 * (scores**2).mean() + 0.5 * math.exp(0.1) * ((scores[:, 0] - Y) ** 2).mean()
    return learned, classifier(), (X, Y), HELD, expected + 0.15 * SIZE, losses(*HELD).mean()


def weight_decay() -> Case:
    model = classifier()
    learned = moved(WeightDecay.for_entries(model, initial=0.2))
    steps = 0.1 * torch.arange(12, dtype=F64).reshape(3, 4), 0.1 * torch.arange(3, dtype=F64)
    decays = [0.2 * step.exp() for step in steps]
    expected = losses(X, Y).mean() + 0.5 * ((decays[0] * W**2).sum() + (decays[1] * B**2).sum())
    return learned, model, (X, Y), HELD, expected, losses(*HELD).mean()


def augmentation() -> Case:
    learned = Augmentation({"brightness": 0.3}, weight_decay=0.3, dtype=F64)
    model = nn.Sequential(nn.Flatten(), classifier())
    torch.manual_seed(3)
    shifts = 0.3 * (2 * torch.rand(7, 1, dtype=F64) - 1)
    expected = losses(X + shifts, Y).mean() + 0.15 * SIZE
    held = HELD[0].reshape(5, 1, 2, 2), HELD[1]
    return learned, model, (X.reshape(7, 1, 2, 2), Y), held, expected, losses(*HELD).mean()


def distilled_data() -> Case:
    learned = moved(DistilledData(X[:3], Y[:3], weight_decay=0.3))
    inputs = X[:3] + 0.1 * torch.arange(12, dtype=F64).reshape(3, 4)
    return learned, classifier(), None, HELD, losses(inputs, Y[:3]).mean() + 0.15 * SIZE, losses(*HELD).mean()


def shared_body() -> Case:
    body = nn.Linear(4, 2).double()
    heads = moved(TaskHeads(2, 2, 3, dtype=F64))
    x, y = torch.stack([X[:3], X[3:6]]), torch.stack([Y[:3], Y[3:6]])
    held = torch.stack([HELD[0][:2], HELD[0][2:4]]), torch.stack([HELD[1][:2], HELD[1][2:4]])

    def mean(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        features = linear(x, body.weight, body.bias)
        return sum(cross_entropy(features[t] @ heads.weight[t] + heads.bias[t], y[t]) for t in range(2)) / 2

    size = sum((p**2).sum() for p in heads.parameters())
    return SharedBody(body, weight_decay=0.3), heads, (x, y), held, mean(x, y) + 0.15 * size / 2, mean(*held)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.places = nn.ModuleList(MixedOperation([nn.Identity(), nn.Tanh()]) for _ in range(2))
        self.last = classifier()

    def forward(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        for place, row in zip(self.places, weights, strict=True):
            x = place(x, row)
        return self.last(x)


def architecture() -> Case:
    learned = moved(Architecture(2, 2, weight_decay=0.3, dtype=F64))
    share = 1 / (1 + math.exp(0.1))  # of the first operation: logits (0, 0.1) and (0.2, 0.3)

    def mixed(x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = share * x + (1 - share) * x.tanh()
        return x

    expected = losses(mixed(X), Y).mean() + 0.15 * SIZE
    return learned, Mixed(), (X, Y), HELD, expected, losses(mixed(HELD[0]), HELD[1]).mean()


CASES: list[Callable[[], Case]] = [
    example_weights,
    loss_weights,
    weight_decay,
    augmentation,
    distilled_data,
    shared_body,
    architecture,
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_both_losses_are_their_formulas(case: Callable[[], Case]) -> None:
    learned, model, train, held, lower, upper = case()
    inner, outer = learned.objectives
    torch.manual_seed(3)
    torch.testing.assert_close(inner(model, learned, train), lower, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(outer(model, learned, held), upper, rtol=1e-12, atol=0.0)


def test_distilled_data_leaves_the_examples_it_begins_from() -> None:
    inputs, targets = X[:3].clone(), Y[:3].clone()
    moved(DistilledData(inputs, targets))
    assert torch.equal(inputs, X[:3]) and torch.equal(targets, Y[:3])


def test_draws_of_augmentations_are_uniform_on_both_sides() -> None:
    torch.manual_seed(0)
    flat = torch.ones(20000, 1, 1, 1, dtype=F64)
    draws = {
        "brightness": Augmentation({"brightness": 0.2}, dtype=F64)(flat) - 1,
        "contrast": Augmentation({"contrast": 0.2}, dtype=F64)(flat).log(),
    }
    for name, found in draws.items():
        assert float(found.detach().abs().max()) <= 0.2, name
        assert abs(float(found.detach().mean())) < 5 * 0.2 / (3 * 20000) ** 0.5, name
        assert float(found.detach().std()) == pytest.approx(0.2 / 3**0.5, rel=0.02), name
    noise = Augmentation({"noise": 0.2}, dtype=F64)(flat) - 1
    assert float(noise.detach().std()) == pytest.approx(0.2, rel=0.03)


@pytest.mark.parametrize("width", [8, 14])
def test_a_quarter_turn_turns_pixels_whatever_the_shape_of_the_image(width: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch, "rand_like", torch.ones_like)  # the largest draw
    block = torch.rand(8, 8, generator=GENERATOR, dtype=F64)
    images = torch.zeros(1, 1, 8, width, dtype=F64)
    left = (width - 8) // 2
    images[0, 0, :, left : left + 8] = block
    turned = Augmentation({"rotation": math.pi / 2}, dtype=F64)(images).detach()
    torch.testing.assert_close(turned[0, 0, :, left : left + 8], block.rot90(), rtol=0, atol=1e-12)
    assert float(turned.sum()) == pytest.approx(float(block.sum()))
