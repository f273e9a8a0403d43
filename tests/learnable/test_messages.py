"""What cannot be learned is refused in a sentence that names the remedy; and what the parts return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import bilevel
from bilevel.errors import ArgumentError, DtypeError, NonFiniteError, ShapeError
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
        lambda: objectives(ExampleWeights(4), (X, Y)),
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
    (
        lambda: WeightDecay(nn.Linear),
        ArgumentError,
        "expected model to be a torch.nn.Module, got <class .*; pass an instance",
    ),
    (lambda: LearningRates(None), ArgumentError, "expected model to be a torch.nn.Module, got None"),
    (lambda: SharedBody(nn.Linear), ArgumentError, "expected body to be a torch.nn.Module"),
    (lambda: SharedBody(nn.Linear(3, 2), weight_decay=0.0), ArgumentError, "expected weight_decay to be a number > 0"),
    (lambda: TaskHeads(0, 3, 2), ArgumentError, "expected tasks to be an int > 0, got 0"),
    (lambda: TaskHeads(2, 3, 2)(X), ShapeError, r"expected features \(2, 'n', 3\), got \(4, 3\); make TaskHeads"),
    (lambda: MixedOperation([torch.tanh]), ArgumentError, r"expected operations\[0\] to be a torch.nn.Module"),
    (
        lambda: MixedOperation([nn.Linear(3, 2), nn.Linear(3, 4)])(X, torch.ones(2)),
        ShapeError,
        r"outputs have one shape, got \[\(4, 2\), \(4, 4\)\]",
    ),
    (lambda: objectives(Architecture(2, 3), (X, Y)), ArgumentError, r"called as model\(inputs, weights\), got Linear"),
    (lambda: LossWeights(mean), ArgumentError, "expected auxiliary to be functions .* pass a list"),
    (
        lambda: LossWeights([lambda outputs: 0.0]),
        ArgumentError,
        r"expected auxiliary\[0\] to be a function \(outputs, targets\)",
    ),
    (
        lambda: Learnable(loss=lambda outputs: 0.0),
        ArgumentError,
        r"expected loss to be a function \(outputs, targets\)",
    ),
    (lambda: objectives(Learnable(loss=lambda o, y: None), (X, Y)), DtypeError, "tensor of losses, got NoneType"),
    (lambda: objectives(Learnable(loss=lambda o, y: o.argmax(1)), (X, Y)), DtypeError, "losses, got torch.int64"),
    (lambda: objectives(LossWeights([lambda o, y: None]), (X, Y)), DtypeError, "tensor of losses, got NoneType"),
    (lambda: objectives(Learnable(), X[0, 0]), ArgumentError, r"expected data to be \(inputs, targets\), got Tensor"),
    (lambda: objectives(Learnable(), None), ArgumentError, r"expected data to be \(inputs, targets\), got NoneType"),
    (
        lambda: objectives(Learnable(), [(X, Y)]),
        ArgumentError,
        r"expected data to be \(inputs, targets\), got 1 entries",
    ),
    (lambda: objectives(ExampleWeights(4), {"x": X}), ArgumentError, r"\(inputs, targets, rows\), got dict"),
    (
        lambda: Learnable().objectives[0](Learnable(), nn.Linear(3, 2), (X, Y)),
        ArgumentError,
        r"the model as inner and the Learnable as outer, .* ImplicitStep\(learned.objectives, model, learned\)",
    ),
    (lambda: Augmentation(["rotation"]), ArgumentError, "expected initial to be a dict of strengths by name"),
    (lambda: Augmentation()(torch.zeros(0, 1, 8, 8)), ShapeError, r"got .* \(0, 1, 8, 8\); .* skip an empty batch"),
    (
        lambda: DistilledData([[1.0]], [1]),
        ArgumentError,
        "expected inputs and targets to be tensors, got list and list",
    ),  # type: ignore[arg-type]
]


def objectives(learned: Learnable, data: Any) -> torch.Tensor:
    return learned.objectives[0](nn.Linear(3, 2), learned, data)


@pytest.mark.parametrize(("make", "error", "words"), REFUSED, ids=[str(number) for number in range(len(REFUSED))])
def test_what_cannot_be_used_is_refused_in_a_sentence(
    make: Callable[[], Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        make()


def step(learned: Learnable, data: Any, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    model = nn.Linear(3, 2).to(dtype)
    inputs = X.to(dtype), Y
    return ImplicitStep(learned.objectives, model, learned, **settings).step(data, inputs)


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (
            (X, Y, torch.arange(4) + 1),
            ArgumentError,
            "inner_objective to have indices in their range, got data.*number classes and rows",
        ),
        ((X, Y, torch.arange(4) - 1), ArgumentError, "inner_objective to have indices in their range"),
        ((X, Y, torch.arange(4.0)), DtypeError, "inner_objective to have dtypes that fit"),
        ((X, Y, torch.arange(4)[:, None]), ShapeError, "inner_objective to have shapes that fit"),
        (
            (X, Y + 2, torch.arange(4)),
            ArgumentError,
            r"indices in their range, got data\[0\] \(4, 3\) float32.*Target 2 is out of bounds",
        ),
        (
            (X[:, :2], Y, torch.arange(4)),
            ShapeError,
            r"shapes that fit .* data\[0\] \(4, 2\) .* inner\['weight'\] \(2, 3\)",
        ),
        ((X.double(), Y, torch.arange(4)), DtypeError, r"dtypes that fit .* data\[0\] \(4, 3\) float64"),
        ((X.numpy(), Y, torch.arange(4)), DtypeError, r"a numpy array at data\[0\]; convert it with torch.as_tensor"),
        ((X[:0], Y[:0], torch.arange(0)), NonFiniteError, r"tensor of shape \(0, 3\), without examples"),
    ],
)
def test_a_step_names_the_data_that_do_not_fit(data: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        step(ExampleWeights(4), data)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("linear_solver", [bilevel.Exact(), bilevel.CG()])
def test_systems_of_few_digits_are_solved_in_float32(dtype: torch.dtype, linear_solver: Any) -> None:
    weights = ExampleWeights(4, weight_decay=0.5, dtype=dtype)
    result = step(weights, (X.to(dtype), Y, torch.arange(4)), dtype, linear_solver=linear_solver)
    assert float(result.adjoint_residual_norm) < 2e-3 and torch.isfinite(result.hypergradient_norm)


def test_data_of_inference_mode_are_data() -> None:
    with torch.inference_mode():
        data = X + 1, Y + 1, torch.arange(4)
    assert float(step(ExampleWeights(4), data).hypergradient_norm) > 0


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
