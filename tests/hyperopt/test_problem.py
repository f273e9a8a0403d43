"""HyperparameterOptimization as a module: parameters, gradients, optimisers, state."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import bilevel
from bilevel import HyperparameterOptimization

Data = dict[str, torch.Tensor]


def make_data(batch: tuple[int, ...] = (), seed: int = 0) -> Data:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*batch, *shape, generator=generator, dtype=torch.float64)

    truth = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    data = {"x": normal(12, 3), "x_val": normal(9, 3)}
    return data | {
        "y": data["x"] @ truth + normal(12),
        "y_val": data["x_val"] @ truth + normal(9),
    }


def training(weights: torch.Tensor, log_strength: torch.Tensor, data: Data) -> torch.Tensor:
    residual = data["x"] @ weights - data["y"]
    return 0.5 * residual @ residual + 0.5 * (log_strength.exp() * weights**2).sum()


def validation(weights: torch.Tensor, data: Data) -> torch.Tensor:
    return ((data["x_val"] @ weights - data["y_val"]) ** 2).mean()


def closed_form(log_strength: torch.Tensor, data: Data) -> torch.Tensor:
    x = data["x"]
    penalty = torch.diag_embed(log_strength.exp().expand(3))
    weights = torch.linalg.solve(x.mT @ x + penalty, (x.mT @ data["y"].unsqueeze(-1))).squeeze(-1)
    return ((data["x_val"] @ weights.unsqueeze(-1)).squeeze(-1) - data["y_val"]).square().mean(-1).mean()


def start(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def test_the_loss_and_its_gradient_are_those_of_the_closed_form() -> None:
    data, theta = make_data(), torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    tuning = HyperparameterOptimization(training, validation, theta, start(3))
    loss = tuning(data)
    loss.backward()
    expected = closed_form(theta, data)
    (gradient,) = torch.autograd.grad(expected, theta)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(tuning.hyperparameters.grad, gradient, rtol=1e-9, atol=1e-12)
    result = tuning.hypergradient(data)
    torch.testing.assert_close(result.value, expected.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(result.grad, gradient, rtol=1e-9, atol=1e-12)


def test_a_batch_of_problems_shares_the_hyperparameters() -> None:
    data, theta = make_data((4,)), torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    tuning = HyperparameterOptimization(training, validation, theta, start(4, 3), batch_dims=0)
    result = tuning.hypergradient(data)
    expected = closed_form(theta, data)
    (gradient,) = torch.autograd.grad(expected, theta)
    torch.testing.assert_close(result.value, expected.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(result.grad, gradient, rtol=1e-9, atol=1e-12)
    assert result.inner.shape == (4, 3)


def test_hyperparameters_by_name() -> None:
    def named(weights: torch.Tensor, theta: dict[str, torch.Tensor], data: Data) -> torch.Tensor:
        return training(weights, torch.cat([theta["first"].reshape(1), theta["others"]]), data)

    data = make_data()
    theta = {
        "first": torch.tensor(0.3, dtype=torch.float64),
        "others": torch.tensor([-1.0, 2.0], dtype=torch.float64),
    }
    tuning = HyperparameterOptimization(named, validation, theta, start(3))
    assert sorted(tuning.state_dict()) == ["hyperparameters.first", "hyperparameters.others"]
    tuning(data).backward()
    flat = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(closed_form(flat, data), flat)
    parameters = dict(tuning.named_parameters())
    torch.testing.assert_close(parameters["hyperparameters.first"].grad, gradient[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(parameters["hyperparameters.others"].grad, gradient[1:], rtol=1e-9, atol=1e-12)
    assert set(tuning.hypergradient(data).grad) == {"first", "others"}


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.5),
        lambda p: torch.optim.Adam(p, lr=0.2),
        lambda p: torch.optim.LBFGS(p, max_iter=2, line_search_fn="strong_wolfe"),
    ],
    ids=["SGD", "Adam", "LBFGS"],
)
def test_any_optimiser_of_torch_tunes_it(make: Any) -> None:
    data = make_data()
    tuning = HyperparameterOptimization(training, validation, start(), start(3))
    optimizer = make(tuning.parameters())

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = tuning(data)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(6)]
    assert losses[-1] < losses[0]


def test_the_state_is_the_hyperparameters_and_survives() -> None:
    data = make_data()
    tuning = HyperparameterOptimization(training, validation, start(), start(3))
    tuning(data)
    with torch.no_grad():
        tuning.hyperparameters.fill_(0.7)
    other = HyperparameterOptimization(training, validation, start(), start(3))
    other.load_state_dict(tuning.state_dict())
    assert list(tuning.state_dict()) == ["hyperparameters"]
    torch.testing.assert_close(other(data), tuning(data), rtol=1e-10, atol=0)


def test_it_is_both_a_module_and_a_bilevel_problem() -> None:
    tuning = HyperparameterOptimization(training, validation, start(), start(3))
    assert isinstance(tuning, nn.Module)
    assert isinstance(tuning, bilevel.BilevelProblem)


def test_what_it_is_given_is_copied() -> None:
    theta, init = start(), start(3)
    tuning = HyperparameterOptimization(training, validation, theta, init)
    theta.fill_(9.0)
    init.fill_(float("nan"))
    assert float(tuning.hyperparameters.detach()) == 0
    assert tuning(make_data()).isfinite()


def test_warm_starts_can_be_forgotten_and_overridden() -> None:
    data = make_data()
    tuning = HyperparameterOptimization(training, validation, start(), start(3))
    loss = tuning(data)
    tuning.reset()
    torch.testing.assert_close(tuning(data), loss, rtol=1e-10, atol=0)
    torch.testing.assert_close(tuning(data, init=torch.ones(3, dtype=torch.float64)), loss, rtol=1e-10, atol=0)


def test_the_start_follows_the_module() -> None:
    tuning = HyperparameterOptimization(
        training, validation, torch.zeros(()), {"w": torch.zeros(3), "b": torch.zeros(())}
    ).double()
    assert all(leaf.dtype == torch.float64 for leaf in tuning.initial(None, None).values())


def test_the_warm_start_follows_the_module() -> None:
    tuning = HyperparameterOptimization(training, validation, torch.zeros(()).double(), torch.zeros(3).double())
    data = make_data()
    before = tuning(data)
    tuning.float()
    after = tuning({name: tensor.float() for name, tensor in data.items()})
    assert after.dtype == torch.float32
    torch.testing.assert_close(after.double(), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [None, [1.0], {"weights": "zero"}])
def test_the_start_has_to_be_made_of_tensors(bad: Any) -> None:
    with pytest.raises(bilevel.DtypeError, match="init to be a tensor or a pytree"):
        HyperparameterOptimization(training, validation, torch.zeros(()), bad)


def test_options_reach_the_solvers() -> None:
    tuning = HyperparameterOptimization(
        training,
        validation,
        start(),
        start(3),
        solver=bilevel.GradientDescent(lr=1e-6, max_steps=2),
        tolerance=bilevel.Tolerance(delta=1e-9),
    )
    with pytest.raises(bilevel.SolveError):
        tuning(make_data())


@pytest.mark.parametrize("bad", [torch.tensor(1), {"a": 1.0}])
def test_hyperparameters_have_to_be_floating_point(bad: Any) -> None:
    with pytest.raises(bilevel.DtypeError, match="floating-point tensor"):
        HyperparameterOptimization(training, validation, bad, start(3))


@pytest.mark.parametrize("bad", [{}, 1.0])
def test_hyperparameters_have_to_be_a_tensor_or_a_dict(bad: Any) -> None:
    with pytest.raises(bilevel.ArgumentError, match="a tensor or a dict of tensors"):
        HyperparameterOptimization(training, validation, bad, start(3))


def test_names_of_named_parameters_are_hyperparameters() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)).double()
    data = make_data()
    given = dict(network.named_parameters()) | {"keys": torch.ones((), dtype=torch.float64)}

    def objective(weights: torch.Tensor, theta: dict[str, torch.Tensor], data: Data) -> torch.Tensor:
        features = torch.func.functional_call(
            network, {name: value for name, value in theta.items() if name != "keys"}, (data["x"],)
        )
        return ((features[:, 0] * weights[0] - data["y"]) ** 2).mean() + theta["keys"] * (weights**2).sum()

    tuning = HyperparameterOptimization(
        objective, lambda w, data: (w**2).sum(), given, torch.zeros(1, dtype=torch.float64)
    )
    tuning(data).backward()
    assert isinstance(tuning.hyperparameters, nn.ParameterDict)
    assert set(tuning.outer) == set(given)
    assert all(value.grad is not None for value in tuning.parameters())
    other = HyperparameterOptimization(
        objective, lambda w, data: (w**2).sum(), {name: torch.zeros_like(value) for name, value in given.items()},
        torch.zeros(1, dtype=torch.float64),
    )  # fmt: skip
    other.load_state_dict(tuning.state_dict())
    assert all(torch.equal(other.outer[name], value) for name, value in tuning.outer.items())


@pytest.mark.parametrize("names", [{"a.b": 0, "a/b": 1}, {3: 0}])
def test_names_that_cannot_be_kept_apart(names: dict[Any, int]) -> None:
    given = {name: torch.zeros(1) for name in names}
    with pytest.raises(bilevel.ArgumentError, match="names of hyperparameters"):
        HyperparameterOptimization(lambda w, t, d: w.sum(), lambda w, d: w.sum(), given, torch.zeros(1))


def test_a_validation_loss_may_see_the_hyperparameters() -> None:
    data = make_data()
    start, init = torch.tensor(0.3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)

    def seeing(weights: torch.Tensor, log_strength: torch.Tensor, data: Data) -> torch.Tensor:
        return validation(weights, data) + log_strength**2

    plain = HyperparameterOptimization(training, validation, start, init)
    both = HyperparameterOptimization(training, seeing, start, init)
    scaled = HyperparameterOptimization(training, lambda w, data, scale=1.0: scale * validation(w, data), start, init)
    expected = plain.hypergradient(data)
    found = both.hypergradient(data)
    torch.testing.assert_close(found.value, expected.value + 0.09)
    torch.testing.assert_close(found.grad, expected.grad + 0.6)
    torch.testing.assert_close(scaled.hypergradient(data).grad, expected.grad)  # a default is no place for θ
    both(data).backward()
    torch.testing.assert_close(both.hyperparameters.grad, found.grad)


def test_folds_of_unequal_sizes_are_scikit_learns() -> None:
    from sklearn.linear_model import Ridge as Reference
    from sklearn.model_selection import KFold, cross_val_score

    from bilevel.hyperopt import FOLD_DIMS, Ridge, WeightedData, fold_weights

    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(23, 3, generator=generator, dtype=torch.float64)
    targets = inputs.sum(1) + 0.5 * torch.randn(23, generator=generator, dtype=torch.float64)
    folds = list(KFold(5).split(inputs))
    assert {len(held) for _, held in folds} == {4, 5}
    model, theta = Ridge(3), torch.tensor(-1.0, dtype=torch.float64)
    weights = fold_weights(folds, 23)
    tuning = HyperparameterOptimization(
        model.training_objective, model.validation_loss, theta, model.initial(5), batch_dims=FOLD_DIMS
    )
    data = WeightedData(inputs, targets, *weights)

    def reference(theta: float) -> float:
        # alpha = n e^θ, with the n of each fold.
        scores = [
            cross_val_score(
                Reference(alpha=len(train) * math.exp(theta)), inputs, targets, cv=[(train, held)],
                scoring="neg_mean_squared_error",
            )[0]
            for train, held in folds
        ]  # fmt: skip
        return -sum(scores) / 5

    found = tuning.hypergradient(data)
    assert found.value.item() == pytest.approx(reference(-1.0), rel=1e-9)
    slope = (reference(-1.0 + 1e-4) - reference(-1.0 - 1e-4)) / 2e-4
    assert found.grad.item() == pytest.approx(slope, rel=1e-4)
    masks = [
        (torch.isin(torch.arange(23), torch.as_tensor(a)), torch.isin(torch.arange(23), torch.as_tensor(b)))
        for a, b in folds
    ]
    assert all(torch.equal(a, b) for a, b in zip(fold_weights(masks, 23), weights, strict=True))


@pytest.mark.parametrize("folds", [[], [([0], [])], [([0], [7])], [([0], ["a"])]])
def test_folds_that_are_none(folds: Any) -> None:
    from bilevel.hyperopt import fold_weights

    with pytest.raises(bilevel.ArgumentError, match="fold_weights: expected"):
        fold_weights(folds, 5)


@pytest.mark.parametrize("bad", [3, None, lambda w: w.sum()], ids=["a number", "None", "of one argument"])
@pytest.mark.parametrize("name", ["training_objective", "validation_loss"])
def test_functions_of_another_form_are_named(name: str, bad: Any) -> None:
    good = {"training_objective": lambda w, s, data: ((w - s) ** 2).sum(), "validation_loss": lambda w, data: w.sum()}
    with pytest.raises(bilevel.ArgumentError, match=f"expected {name} to be a function of"):
        bilevel.HyperparameterOptimization(**{**good, name: bad}, hyperparameters=torch.zeros(2), init=torch.zeros(2))
