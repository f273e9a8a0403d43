"""What cannot be learned is refused in a sentence that names the remedy; and what the parts return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from bilevel.errors import ArgumentError, DtypeError, ShapeError
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

X, Y = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)


def frozen() -> nn.Module:
    return nn.Linear(3, 2).requires_grad_(False)


def mean(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs, targets)


REFUSED: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (
        lambda: Learnable(weight_decay=-1.0),
        ArgumentError,
        "Learnable: expected weight_decay to be a number >= 0, got -1.0; pass",
    ),
    (lambda: Learnable(loss="mse"), ArgumentError, r"expected loss to be a function .* None for cross-entropy"),
    (lambda: ExampleWeights(0), ArgumentError, r"expected count to be an int > 0, got 0; pass len\(targets\)"),
    (
        lambda: ExampleWeights(4).training_loss(torch.zeros(4, 2), (X, Y)),
        ArgumentError,
        r"expected training data \(inputs, targets, rows\), got 2 entries; add torch.arange",
    ),
    (
        lambda: ExampleWeights(4, loss=mean).training_loss(torch.zeros(4, 2), (X, Y, torch.arange(4))),
        ShapeError,
        r'one loss for each example, of shape \(4,\), got \(\); let loss return that, as .*reduction="none"',
    ),
    (lambda: LossWeights([]), ArgumentError, "expected auxiliary to be functions .* at least one"),
    (lambda: LossWeights([mean], initial=0.0), ArgumentError, "expected initial to be a number > 0, got 0.0"),
    (lambda: WeightDecay(frozen()), ArgumentError, "a parameter that requires grad, and it has none; unfreeze one"),
    (
        lambda: WeightDecay(nn.Linear(3, 2), initial=-0.1),
        ArgumentError,
        "expected initial to be a number > 0, got -0.1",
    ),
    (
        lambda: WeightDecay(nn.Linear(3, 2)).penalty(nn.Linear(4, 2)),
        ShapeError,
        r"weight \(2, 3\), bias \(2,\), got weight \(2, 4\), bias \(2,\); make WeightDecay\(model\)",
    ),
    (lambda: Augmentation({"flip": 0.1}), ArgumentError, "some of the names rotation, .*, noise, got 'flip'; pass"),
    (lambda: Augmentation({}), ArgumentError, "got none; pass for example"),
    (lambda: Augmentation({"noise": 0.0}), ArgumentError, "expected noise to be a number > 0, got 0.0"),
    (
        lambda: Augmentation()(torch.zeros(4, 64)),
        ShapeError,
        r"images \(n, channels, height, width\), got torch.float32 of shape \(4, 64\); reshape them",
    ),
    (
        lambda: Augmentation()(torch.zeros(4, 1, 8, 8, dtype=torch.uint8)),
        ShapeError,
        r"got torch.uint8 .* with .float\(\)",
    ),
    (lambda: DistilledData(X, Y[:3]), ShapeError, r"got \(4, 3\) and \(3,\); pass one target for each input"),
    (
        lambda: DistilledData(X.long(), Y),
        DtypeError,
        r"expected floating-point inputs, got torch.int64; convert them with .float\(\)",
    ),
    (
        lambda: SharedBody(nn.Linear(3, 2))(X),
        ShapeError,
        r"expected inputs \(tasks, n, ...\), got \(4, 3\); stack .*inputs\[None\]",
    ),
    (
        lambda: SharedBody(nn.Conv2d(1, 2, 1))(torch.zeros(2, 4, 1, 3, 3)),
        ShapeError,
        r"expected the body to return features \(m, d\), got \(8, 2, 3, 3\); let it end in torch.nn.Flatten\(\)",
    ),
    (lambda: MixedOperation([]), ArgumentError, "expected at least one operation, got none; pass a list of modules"),
    (
        lambda: MixedOperation([nn.Identity()])(X, torch.ones(2)),
        ShapeError,
        r"expected weights \(1,\), one for each operation, got \(2,\); pass the row",
    ),
    (lambda: Architecture(2, 0), ArgumentError, "expected operations to be an int > 0, got 0; pass one"),
    (lambda: LearningRates(frozen()), ArgumentError, "a parameter that requires grad, and it has none; unfreeze one"),
    (
        lambda: LearningRates(nn.Linear(3, 2), steps=0),
        ArgumentError,
        "expected steps to be an int > 0, got 0; pass one",
    ),
    (
        lambda: LearningRates(nn.Linear(3, 2)).trained(nn.Sequential(nn.Linear(3, 2)), (X, Y)),
        ArgumentError,
        r"expected a model with the parameters weight, bias, got 0.weight, 0.bias; make LearningRates\(model\)",
    ),
]


@pytest.mark.parametrize(("make", "error", "words"), REFUSED, ids=[str(number) for number in range(len(REFUSED))])
def test_what_cannot_be_used_is_refused_in_a_sentence(
    make: Callable[[], Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        make()


def test_layers_share_a_decay_and_frozen_parameters_have_none() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    model[0].bias.requires_grad_(False)
    decay = WeightDecay.for_layers(model, initial=0.5)
    assert set(decay()) == {"0.weight", "2.weight", "2.bias"} and len(list(decay.parameters())) == 2
    with torch.no_grad():
        decay.logarithms[1].fill_(float("-inf"))
    torch.testing.assert_close(decay.penalty(model), 0.25 * (model[0].weight ** 2).sum())
    assert decay.to(torch.float64)()["2.bias"].dtype == torch.float64


def test_heads_fitted_to_a_task_minimise_its_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 20, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (3, 20), generator=generator)
    body = SharedBody(nn.Flatten(), weight_decay=0.1)
    heads = body.fit(x, y, outputs=3)
    assert isinstance(heads, TaskHeads) and all(p.is_leaf and p.requires_grad for p in heads.parameters())
    inner, _ = body.objectives
    slopes = torch.autograd.grad(inner(heads, body, (x, y)), list(heads.parameters()))
    assert all(slope.abs().max() < 1e-4 for slope in slopes)


def test_states_are_saved_and_loaded() -> None:
    for make in (
        lambda: ExampleWeights(3),
        lambda: WeightDecay.for_entries(nn.Linear(3, 2)),
        lambda: Augmentation(),
        lambda: DistilledData(X, Y),
        lambda: Architecture(2, 3),
        lambda: LearningRates(nn.Linear(3, 2)),
    ):
        one, other = make(), make()
        with torch.no_grad():
            for parameter in one.parameters():
                parameter += 1
        other.load_state_dict(one.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
