"""What is learned is worth learning: each part on scikit-learn's digits, or where the answer is known."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample

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
from bilevel.stochastic import ImplicitStep

pytestmark = pytest.mark.slow
Digits = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def digits() -> Digits:
    """Images (1797, 1, 8, 8) in a random order, and labels."""
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.images, dtype=torch.float32)[order, None] / 16, torch.tensor(data.target)[order]


def mlp(outputs: int = 10, hidden: int = 32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return bilevel.cleaning.convolutional(1, 8, 10, width=4)


def implicit(
    learned: Learnable, model: nn.Module, *, rate: float, inner_steps: int = 2, **settings: Any
) -> ImplicitStep:
    chosen = {
        "linear_solver": bilevel.CG(max_steps=5),
        "hessian": bilevel.GaussNewtonHessian(),
        "inner_optimizer": partial(torch.optim.Adam, lr=1e-2),
        "outer_optimizer": partial(torch.optim.Adam, lr=rate),
        **settings,
    }
    return ImplicitStep(learned.objectives, model, learned, inner_steps=inner_steps, **chosen)


def accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    return (outputs.argmax(-1) == targets).double().mean().item()


def test_weights_of_examples_bring_back_a_class_of_one_in_a_hundred(digits: Digits) -> None:
    x, y = digits[0], (digits[1] == 8).long()
    rare, common = torch.nonzero(y == 1).squeeze(1), torch.nonzero(y == 0).squeeze(1)
    train, held = torch.cat([rare[:8], common[:800]]), torch.cat([rare[8:28], common[800:820]])

    def recalls(learn: bool) -> tuple[float, float, torch.Tensor]:
        model, weights = mlp(2), ExampleWeights(len(train), weight_decay=1e-3)
        method = implicit(weights, model, rate=0.1 if learn else 0.0, inner_steps=1)
        for _ in range(150):
            method.step((x[train], y[train], torch.arange(len(train))), (x[held], y[held]))
        with torch.no_grad():
            scores = model(x)
        return (
            accuracy(scores[rare[28:]], y[rare[28:]]),
            accuracy(scores[common[820:]], y[common[820:]]),
            weights().detach(),
        )

    rare_plain, common_plain, _ = recalls(learn=False)
    rare_learned, common_learned, weights = recalls(learn=True)
    assert rare_plain < 0.5 < 0.7 < rare_learned
    assert rare_learned + common_learned > rare_plain + common_plain + 0.15
    assert weights[:8].min() > 1.2 > weights[8:].mean()


def test_an_auxiliary_loss_that_helps_outweighs_one_that_harms(digits: Digits) -> None:
    x, y = digits
    drawn = torch.randint(10, (1000,), generator=torch.Generator().manual_seed(0))
    known = torch.where(torch.arange(1000) < 40, y[:1000], -100)  # -100: no label
    targets = torch.stack([known, y[:1000] % 5, drawn], dim=1)
    targets[600:, 0] = y[600:1000]

    def part(column: int, start: int, stop: int) -> Any:
        return lambda outputs, targets: cross_entropy(outputs[:, start:stop], targets[:, column])

    weights = LossWeights([part(1, 10, 15), part(2, 15, 25)], loss=part(0, 0, 10), weight_decay=2e-3)
    method = implicit(weights, mlp(25, 16), rate=0.1)
    for _ in range(50):
        method.step((x[:600], targets[:600]), (x[600:800], targets[600:800]))
    helpful, harmful = weights().tolist()
    assert helpful > 3 * harmful


@pytest.mark.parametrize("make", [mlp, cnn], ids=["MLP", "CNN"])
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(WeightDecay, id="tensors", marks=pytest.mark.long),
        pytest.param(WeightDecay.for_layers, id="layers"),
        pytest.param(WeightDecay.for_entries, id="entries", marks=pytest.mark.long),
    ],
)
def test_learned_decays_bring_the_validation_loss_down(digits: Digits, make: Any, kind: Any) -> None:
    x, y = digits
    given, _ = bilevel.cleaning.corrupt(y[:100], 0.2)  # a network that learns these by heart overfits

    def final(learn: bool) -> float:
        model = make()
        decay = kind(model, initial=1e-4)
        method = implicit(decay, model, rate=0.3 if learn else 0.0, inner_steps=4)
        for _ in range(60):
            method.step((x[:100], given), (x[100:300], y[100:300]))
        with torch.no_grad():
            return cross_entropy(model(x[100:300]), y[100:300]).item()

    assert final(learn=True) < 0.8 * final(learn=False)


def test_as_many_decays_as_weights_overfit_a_validation_set(digits: Digits) -> None:
    """Lorraine, Vicol, Duvenaud (2020), Section 5.1: 50 validation examples, on which no model was trained, are all labelled rightly."""
    x, y = digits
    model = mlp(hidden=50)
    decay = WeightDecay.for_entries(model, initial=1e-3)
    method = implicit(decay, model, rate=0.2, inner_steps=5)
    for _ in range(150):
        method.step((x[:50], y[:50]), (x[50:100], y[50:100]))
    with torch.no_grad():
        shares = [accuracy(model(x[rows]), y[rows]) for rows in (slice(0, 50), slice(50, 100), slice(100, None))]
    assert shares[1] == 1.0 and shares[2] < 0.95


def test_the_rotation_of_held_out_images_is_found(digits: Digits) -> None:
    x, y = digits
    angle = math.pi / 4 * (2 * torch.rand(600, generator=torch.Generator().manual_seed(0)) - 1)
    rows = [angle.cos(), -angle.sin(), 0 * angle, angle.sin(), angle.cos(), 0 * angle]
    grid = affine_grid(torch.stack(rows, 1).view(-1, 2, 3), [600, 1, 8, 8], align_corners=False)
    turned = grid_sample(x[:600], grid, align_corners=False)
    augmentation = Augmentation({"rotation": 0.1, "noise": 0.1}, weight_decay=1e-3)
    model = mlp()
    torch.manual_seed(0)
    method = implicit(augmentation, model, rate=0.03, inner_optimizer=partial(torch.optim.Adam, lr=5e-3))
    for _ in range(80):
        method.step((x[600:1200], y[600:1200]), (turned[:300], y[:300]))
    assert 0.45 < augmentation.strengths["rotation"] < 1.0 and augmentation.strengths["noise"] < 0.1


def test_each_strength_changes_images_as_its_table_says() -> None:
    image = torch.zeros(1, 1, 9, 9)
    image[0, 0, 4, 4] = 1.0  # a dot in the middle
    many = image.expand(4000, -1, -1, -1)
    torch.manual_seed(0)
    # The middle stays where it is under rotation, scale and shear.
    turned = Augmentation({"rotation": 1.0, "scale": 0.2, "shear": 0.2})(many)
    torch.testing.assert_close(turned[:, 0, 4, 4], torch.ones(4000), rtol=0, atol=1e-4)
    # A dot to the right of it moves to the angle drawn: uniform in ±θ.
    line = torch.zeros(4000, 1, 9, 9)
    line[:, :, 4, 5:] = 1.0
    turned = Augmentation({"rotation": math.pi / 4})(line)
    height = torch.linspace(-4, 4, 9)[:, None] * torch.ones(9)
    right = torch.linspace(-4, 4, 9) * torch.ones(9, 1)
    angles = torch.atan2((turned[:, 0] * height).sum((1, 2)), (turned[:, 0] * right).sum((1, 2))).detach()
    assert angles.abs().max() < math.pi / 4 + 0.05 and angles.std() == pytest.approx(
        math.pi / 4 / math.sqrt(3), rel=0.05
    )
    # Shifts are in halves of the width: 2/9 of it is one pixel.
    shifted = Augmentation({"translation": 2 / 9})(many)
    where = (shifted[:, 0] * right).sum((1, 2)).detach()
    assert where.abs().max() <= 1.001 and where.std() == pytest.approx(1 / math.sqrt(3), rel=0.05)
    # The grey values.
    grey = torch.full((4000, 1, 2, 2), 0.5)
    noisy = Augmentation({"noise": 0.3})(grey).detach()
    assert noisy.std() == pytest.approx(0.3, rel=0.03)
    bright = Augmentation({"brightness": 0.2})(grey).detach()
    assert (bright - bright[:, :, :1, :1]).abs().max() == 0 and bright.std() == pytest.approx(
        0.2 / math.sqrt(3), rel=0.05
    )
    contrast = Augmentation({"contrast": 0.4})(grey).detach()
    assert contrast.max() < 0.5 * math.exp(0.4) and contrast.log().std() == pytest.approx(0.4 / math.sqrt(3), rel=0.05)


def test_ten_distilled_digits_train_a_fresh_model(digits: Digits) -> None:
    x, y = digits[0].flatten(1), digits[1]
    first = torch.stack([x[:1200][y[:1200] == digit][0] for digit in range(10)])
    distilled = DistilledData(first, torch.arange(10), weight_decay=1e-2)
    torch.manual_seed(0)
    method = implicit(distilled, nn.Linear(64, 10), rate=0.02, inner_steps=5)
    for _ in range(100):
        method.step(None, (x[:1200], y[:1200]))

    def trained(inputs: torch.Tensor, targets: torch.Tensor) -> float:
        torch.manual_seed(1)
        fresh = nn.Linear(64, 10)
        optimizer = torch.optim.Adam(fresh.parameters(), lr=1e-2)
        for _ in range(300):
            optimizer.zero_grad()
            squares = sum((p**2).sum() for p in fresh.parameters())
            (cross_entropy(fresh(inputs), targets) + 0.5e-2 * squares).backward()
            optimizer.step()
        with torch.no_grad():
            return accuracy(fresh(x[1200:]), y[1200:])

    inputs, targets = distilled()
    assert trained(first, torch.arange(10)) < 0.75 < 0.85 < trained(inputs.detach(), targets)


def test_a_learned_body_serves_new_tasks(digits: Digits) -> None:
    """A task is whether a digit is one of five."""
    x, y = digits[0].flatten(1), digits[1]
    generator = torch.Generator().manual_seed(0)
    member = torch.stack([torch.randperm(10, generator=generator) < 5 for _ in range(24)]).long()

    def tasks(first: int, last: int, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return x[rows].expand(last - first, -1, -1), member[first:last][:, y[rows]]

    def body() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16), nn.Tanh())

    learned = SharedBody(body())
    method = implicit(
        learned, TaskHeads(12, 16, 2), rate=5e-3, inner_steps=5, hessian=None,
        inner_optimizer=partial(torch.optim.SGD, lr=0.5, momentum=0.9),
    )  # fmt: skip
    for _ in range(60):
        method.step(tasks(0, 12, slice(0, 60)), tasks(0, 12, slice(60, 400)))

    def new(chosen: SharedBody) -> float:
        heads = chosen.fit(*tasks(12, 24, slice(400, 440)), outputs=2)
        inputs, targets = tasks(12, 24, slice(440, None))
        with torch.no_grad():
            return accuracy(heads(chosen(inputs)), targets)

    assert new(learned) > max(new(SharedBody(body())), new(SharedBody(nn.Flatten()))) + 0.05


def test_the_one_operation_that_can_fit_is_chosen() -> None:
    """Labels that depend on |x|: a linear model of absolute values fits them, those of x, −x and sin x do not."""

    class Function(nn.Module):
        def __init__(self, function: Any) -> None:
            super().__init__()
            self.function = function

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.function(x)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.place = MixedOperation([nn.Identity(), Function(torch.neg), Function(torch.abs), Function(torch.sin)])
            self.last = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            return self.last(self.place(x, weights[0]))

    torch.manual_seed(0)
    x = torch.randn(200, 3)
    y = (x.abs().sum(1) > 2.3).long()
    architecture = Architecture(1, 4, weight_decay=1e-3)
    method = implicit(architecture, Network(), rate=0.1)
    for _ in range(60):
        method.step((x[:100], y[:100]), (x[100:], y[100:]))
    assert architecture.chosen() == [2] and architecture()[0, 2] > 0.6


def test_learned_rates_of_a_quadratic_are_the_reciprocals_of_its_curvatures() -> None:
    class Point(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steep, self.flat = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.steep - 1, self.flat - 1])[None] * x

    def half_squares(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return 0.5 * ((outputs - targets) ** 2).sum(1)

    model, data = (
        Point().double(),
        (torch.tensor([[2.0, 0.5]]).double(), torch.zeros(1, 2).double()),
    )  # curvatures 4 and 1/4
    rates = LearningRates(model, initial=0.2, steps=1, loss=half_squares)
    before = rates(model, data, data).item()
    optimizer = torch.optim.Adam(rates.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        loss = rates(model, data, data)
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-6 * before
    found = {name: rate.item() for name, rate in rates.rates.items()}
    assert found == {"steep": pytest.approx(0.25, rel=1e-2), "flat": pytest.approx(4.0, rel=1e-2)}
    assert torch.equal(model.steep, torch.zeros(1).double())  # the start is not moved
