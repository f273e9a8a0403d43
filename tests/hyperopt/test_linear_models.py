"""Linear models against scikit-learn, and their hypergradients against dense references."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.func import grad, hessian, jacrev

import bilevel
from bilevel.hyperopt import FOLD_DIMS, HyperparameterOptimization, LinearModel, Logistic, Ridge, Softmax
from bilevel.hyperopt.data import Dataset, load_bundled
from bilevel.hyperopt.grid import estimator, loss_of, scores_of
from bilevel.hyperopt.linear_models import WeightedData
from bilevel.hyperopt.splits import model_for, split

NAMES = ["diabetes", "breast_cancer", "wine"]


def small(name: str) -> tuple[Dataset, LinearModel, torch.Tensor, torch.Tensor]:
    """Return a bundled data set with its model, its scaled inputs and its targets."""
    dataset = load_bundled(name)
    splits = split(dataset)
    return dataset, model_for(dataset), splits.inputs, splits.targets


def solve(model: LinearModel, theta: torch.Tensor, inputs: torch.Tensor, targets: torch.Tensor) -> Any:
    weights = torch.ones(len(inputs), dtype=torch.float64)
    return bilevel.argmin(model.training_objective)(
        model.initial(), theta, WeightedData(inputs, targets, weights, weights)
    )


def as_coef(weights: torch.Tensor, like: np.ndarray) -> np.ndarray:
    """Return weights (features, classes) or (features,) in the shape of scikit-learn's ``coef_``."""
    return weights.reshape(len(weights), -1).mT.numpy().reshape(like.shape)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("log_strength", [-7.0, -3.0, 1.0])
def test_solutions_agree_with_scikit_learn(name: str, log_strength: float) -> None:
    dataset, model, inputs, targets = small(name)
    theta = torch.tensor(log_strength, dtype=torch.float64)
    found = model.coefficients(solve(model, theta, inputs, targets))
    fitted = estimator(dataset.task, log_strength, dataset.rows).fit(inputs.numpy(), targets.numpy())
    np.testing.assert_allclose(as_coef(found["weights"], fitted.coef_), fitted.coef_, rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.atleast_1d(found["intercept"]), fitted.intercept_, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_strengths_per_feature_are_scaled_columns(name: str) -> None:
    dataset, model, inputs, targets = small(name)
    theta = torch.linspace(-5, 0, model.features, dtype=torch.float64)
    found = model.coefficients(solve(model, theta, inputs, targets))
    scale = (theta / 2).exp()
    fitted = estimator(dataset.task, 0.0, dataset.rows).fit((inputs / scale).numpy(), targets.numpy())
    expected = fitted.coef_ / scale.numpy()
    np.testing.assert_allclose(as_coef(found["weights"], expected), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_those_of_scikit_learn(name: str) -> None:
    from sklearn.metrics import log_loss, mean_squared_error

    dataset, model, inputs, targets = small(name)
    found = solve(model, torch.tensor(-2.0, dtype=torch.float64), inputs, targets)
    ones = torch.ones(len(inputs), dtype=torch.float64)
    loss = float(model.validation_loss(found, WeightedData(inputs, targets, ones, ones)))
    fitted = estimator(dataset.task, -2.0, dataset.rows).fit(inputs.numpy(), targets.numpy())
    if isinstance(model, Ridge) and not isinstance(model, Logistic):
        expected = mean_squared_error(targets.numpy(), fitted.predict(inputs.numpy()))
    else:
        expected = log_loss(targets.numpy(), fitted.predict_proba(inputs.numpy()))
    assert loss == pytest.approx(expected, abs=1e-8)
    assert loss_of(dataset.task, scores_of(dataset.task, fitted, inputs.numpy()), targets.numpy()) == pytest.approx(
        expected, abs=1e-12
    )


def test_weights_of_zero_leave_rows_out() -> None:
    _, model, inputs, targets = small("wine")
    theta = torch.tensor(-2.0, dtype=torch.float64)
    kept = torch.arange(len(inputs)) % 3 > 0
    weights = kept.double()
    found = bilevel.argmin(model.training_objective)(
        model.initial(), theta, WeightedData(inputs, targets, weights, weights)
    )
    expected = solve(model, theta, inputs[kept], targets[kept])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def flat_reference(
    model: LinearModel, theta: torch.Tensor, data: WeightedData, steps: int = 30
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the loss, its hypergradient and the least eigenvalue of the Hessian, by dense linear algebra."""
    shapes = {name: value.shape for name, value in model.initial().items()}

    def tree(flat: torch.Tensor) -> dict[str, torch.Tensor]:
        parts = flat.split([shape.numel() for shape in shapes.values()])
        return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    def inner(flat: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        return model.training_objective(tree(flat), theta, data)

    flat = torch.zeros(sum(shape.numel() for shape in shapes.values()), dtype=torch.float64)
    for _ in range(steps):
        step = torch.linalg.solve(hessian(inner)(flat, theta), grad(inner)(flat, theta))
        size = 1.0
        while inner(flat - size * step, theta) > inner(flat, theta) and size > 1e-6:
            size /= 2
        flat = flat - size * step
    curvature = hessian(inner)(flat, theta)

    def outer(flat: torch.Tensor) -> torch.Tensor:
        return model.validation_loss(tree(flat), data)

    adjoint = torch.linalg.solve(curvature, grad(outer)(flat))
    cross = jacrev(grad(inner), argnums=1)(flat, theta).reshape(len(flat), -1)  # (n, strengths)
    return outer(flat), -(adjoint @ cross).reshape(theta.shape), torch.linalg.eigvalsh(curvature)[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("per_feature", [False, True])
def test_the_hypergradient_of_the_cv_loss_agrees_with_a_dense_reference(name: str, per_feature: bool) -> None:
    dataset = load_bundled(name)
    splits = split(dataset, folds=3)
    model, data = model_for(dataset), splits.cross_validation()
    shape = (model.features,) if per_feature else ()
    theta = -4 + torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    problem = HyperparameterOptimization(
        model.training_objective, model.validation_loss, theta, model.initial(3), batch_dims=FOLD_DIMS
    )
    result = problem.hypergradient(data)
    references = [
        flat_reference(model, theta, data._replace(training=w, validation=v))
        for w, v in zip(data.training, data.validation, strict=True)
    ]
    value = torch.stack([reference[0] for reference in references]).mean()
    gradient = torch.stack([reference[1] for reference in references]).mean(0)
    assert float(result.value) == pytest.approx(float(value), rel=1e-9)
    assert (result.grad - gradient).norm() <= 1e-7 * gradient.norm()
    problem(data).backward()
    (parameter,) = problem.parameters()
    assert parameter.grad is not None
    assert (parameter.grad - gradient).norm() <= 1e-7 * gradient.norm()


def test_the_softmax_hessian_is_not_singular() -> None:
    _, model, inputs, targets = small("wine")
    ones = torch.ones(len(inputs), dtype=torch.float64)
    theta = torch.full((model.features,), -3.0, dtype=torch.float64)
    _, _, least = flat_reference(model, theta, WeightedData(inputs, targets, ones, ones))
    assert least > 1e-3


def test_softmax_scores_and_coefficients_sum_to_zero() -> None:
    model = Softmax(features=4, classes=5)
    generator = torch.Generator().manual_seed(0)
    parameters = {
        name: torch.randn(value.shape, generator=generator, dtype=torch.float64)
        for name, value in model.initial().items()
    }
    inputs = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    scores = model.scores(parameters, inputs)
    coefficients = model.coefficients(parameters)
    torch.testing.assert_close(scores, inputs @ coefficients["weights"] + coefficients["intercept"])
    assert scores.sum(1).abs().max() < 1e-14
    assert float(coefficients["weights"].norm()) == pytest.approx(float(parameters["weights"].norm()))


def test_two_classes_of_softmax_are_logistic_regression_of_half_the_strength() -> None:
    _, _, inputs, targets = small("breast_cancer")
    theta = torch.tensor(-2.0, dtype=torch.float64)
    binary = solve(Logistic(30), theta, inputs, targets)
    model = Softmax(30, 2)
    double = model.coefficients(solve(model, theta + math.log(2), inputs, targets.long()))
    torch.testing.assert_close(double["weights"][:, 1] - double["weights"][:, 0], binary["weights"], rtol=0, atol=1e-8)


def test_the_logistic_loss_is_exact_at_large_scores() -> None:
    """torch's softplus is the identity above 20: its value is 2e-9 short there, and its curvature is gone."""
    scores = torch.tensor([-40.0, 0.0, 19.0, 21.0, 30.0], dtype=torch.float64)
    model, targets = Logistic(1), torch.zeros(5, dtype=torch.float64)
    exact = [math.log1p(math.exp(-abs(s))) + max(s, 0.0) for s in scores.tolist()]
    assert model.losses(scores, targets).tolist() == pytest.approx(exact, rel=1e-15)
    curvature = hessian(lambda s: model.losses(s, targets).sum())(scores).diagonal().tolist()
    assert curvature == pytest.approx(
        [math.exp(-abs(s)) / (1 + math.exp(-abs(s))) ** 2 for s in scores.tolist()], rel=1e-9
    )


def test_misuse_is_refused() -> None:
    with pytest.raises(bilevel.ArgumentError, match="at least one feature"):
        Ridge(0)
    with pytest.raises(bilevel.ArgumentError, match="at least two classes"):
        Softmax(3, 1)
