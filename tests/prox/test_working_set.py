"""The working-set method: problems of many unknowns, few of them free, against scikit-learn, scipy and the general method."""

from __future__ import annotations

from typing import Any

import pytest
import scipy.optimize
import torch
from sklearn import linear_model

import bilevel
from bilevel import prox
from bilevel.equations.problem import Problem
from bilevel.layers.proximal import ProximalSystem
from bilevel.pytree import Raveler
from bilevel.solvers.composite import judge as _composite_judge
from tests.prox.test_layer import data, least_squares, zeros

DOUBLE = torch.float64
D = 150


def general(**settings: Any) -> Any:
    """Return a layer that takes the general method: any solver but the default one does."""
    return bilevel.argmin(solver=bilevel.ProximalGradient(max_steps=19_999), **settings)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return a list that each call of the working-set method adds to whether it solved the problem."""
    found: list[bool] = []
    method = _composite_judge.solve_sparse

    def watched(*args: Any) -> Any:
        made = method(*args)
        found.append(made is not None)
        return made

    monkeypatch.setattr(_composite_judge, "solve_sparse", watched)
    return found


def logistic(w: torch.Tensor, X: torch.Tensor, y: torch.Tensor, *strengths: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.softplus(-y.sign() * (X @ w)).mean()


@pytest.mark.parametrize("loss", [least_squares, logistic])
@pytest.mark.parametrize(
    "term",
    [
        lambda X, y, s: prox.L1(s),
        lambda X, y, s: prox.L1(s * torch.linspace(0.5, 2, D, dtype=DOUBLE)),
        lambda X, y, s: prox.ElasticNet(s, 3 * s),
        lambda X, y, s: prox.NonNegative(),
        lambda X, y, s: prox.Box(0.0, s),
    ],
)
@pytest.mark.parametrize("strength", [0.03, 0.2])
def test_it_agrees_with_the_general_method(loss: Any, term: Any, strength: float) -> None:
    X, y = data(100, D, seed=5)
    ridge = lambda w, *args: loss(w, *args) + 0.01 * (w**2).sum()
    s = torch.tensor(strength, dtype=DOUBLE)
    fast, slow = bilevel.argmin(ridge, prox=term), general(prox=term)(ridge)
    w, reference = fast(zeros(D), X, y, s), slow(zeros(D), X, y, s)
    torch.testing.assert_close(w, reference, rtol=1e-8, atol=1e-10)
    outer = lambda layer: lambda s: ((layer(zeros(D), X, y, s) - 0.1) ** 2).sum()
    torch.testing.assert_close(torch.func.grad(outer(fast))(s), torch.func.grad(outer(slow))(s), rtol=1e-7, atol=1e-9)
    leaf = s.clone().requires_grad_()
    (slope,) = torch.autograd.grad(outer(fast)(leaf), leaf)
    torch.testing.assert_close(slope, torch.func.grad(outer(slow))(s), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("strength", [0.02, 0.1, 1.0, 100.0])
def test_lasso_is_that_of_scikit_learn(strength: float, taken: list[bool]) -> None:
    X, y = data(60, D, seed=6)
    s = torch.tensor(strength, dtype=DOUBLE, requires_grad=True)
    layer = bilevel.argmin(least_squares, prox=lambda X, y, s: prox.L1(s))
    w = layer(zeros(D), X, y, s)
    model = linear_model.Lasso(alpha=strength, fit_intercept=False, tol=1e-14, max_iter=10**6).fit(X, y)
    torch.testing.assert_close(w.detach(), torch.as_tensor(model.coef_), rtol=1e-7, atol=1e-9)
    S = w.detach() != 0
    (slope,) = torch.autograd.grad(w.sum(), s)
    want = -len(y) * torch.linalg.solve(X[:, S].T @ X[:, S], w.detach()[S].sign()).sum()
    torch.testing.assert_close(slope, want)
    # At 0.02, nearly as many unknowns are free as there are rows, and either method may be the one that ends.
    assert taken == [strength < 100] or strength == 0.02


def test_it_is_the_method_of_a_sparse_lasso(taken: list[bool]) -> None:
    X, y = data(60, D, seed=6)
    bilevel.argmin(least_squares, prox=prox.L1(0.5))(zeros(D), X, y)
    assert taken == [True]


def test_non_negative_least_squares_is_that_of_scipy() -> None:
    X, y = data(100, D, seed=7)
    w = bilevel.argmin(least_squares, prox=prox.NonNegative())(zeros(D), X, y)
    torch.testing.assert_close(w, torch.as_tensor(scipy.optimize.nnls(X.numpy(), y.numpy())[0]), rtol=1e-8, atol=1e-10)


def test_single_precision_and_a_warm_start() -> None:
    X, y = data(60, D, seed=6)
    s = torch.tensor(0.3, dtype=DOUBLE)
    layer = bilevel.argmin(least_squares, prox=lambda X, y, s: prox.L1(s))
    w = layer(zeros(D), X, y, s)
    torch.testing.assert_close(layer(w, X, y, s), w, rtol=1e-12, atol=1e-13)
    single = layer(zeros(D, torch.float32), X.float(), y.float(), s.float())
    torch.testing.assert_close(single, w.float(), rtol=1e-4, atol=1e-5)


def test_it_evaluates_the_gradient_of_a_quadratic_three_times(
    monkeypatch: pytest.MonkeyPatch, taken: list[bool]
) -> None:
    X, y = data(60, D, seed=6)
    layer, counted = bilevel.argmin(least_squares, prox=prox.L1(0.3)), []
    plain = Problem.value_and_residual
    monkeypatch.setattr(Problem, "value_and_residual", lambda *a, **k: counted.append(1) or plain(*a, **k))
    with bilevel.record() as reports:
        layer(zeros(D), X, y)
    assert taken == [True]
    assert len(counted) == 3 < int(reports[0].iterations)


def test_an_intercept_without_a_term(taken: list[bool]) -> None:
    X, y = data(60, D, seed=6)
    layer = bilevel.argmin(
        lambda x, s: least_squares(x["w"], X, y - x["b"]), prox=lambda s: {"b": None, "w": prox.L1(s)}
    )
    s = torch.tensor(0.3, dtype=DOUBLE, requires_grad=True)
    x = layer({"b": torch.zeros((), dtype=DOUBLE), "w": zeros(D)}, s)
    model = linear_model.Lasso(alpha=0.3, tol=1e-14, max_iter=10**6).fit(X, y)
    torch.testing.assert_close(x["w"].detach(), torch.as_tensor(model.coef_), rtol=1e-7, atol=1e-9)
    assert abs(float(x["b"].detach()) - model.intercept_) < 1e-8
    (slope,) = torch.autograd.grad(x["b"], s)
    A = torch.cat([torch.ones(len(y), 1, dtype=DOUBLE), X[:, x["w"] != 0]], dim=1)
    signs = torch.cat([torch.zeros(1, dtype=DOUBLE), x["w"].detach()[x["w"] != 0].sign()])
    torch.testing.assert_close(slope, -len(y) * torch.linalg.solve(A.mT @ A, signs)[0])
    assert taken == [True]


def test_rows_of_a_hessian_are_its_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    X, Y = torch.randn(2, 20, 9, generator=generator, dtype=DOUBLE)
    M = torch.randn(30, 20, generator=generator, dtype=DOUBLE)

    def objective(x: torch.Tensor) -> torch.Tensor:
        return (M @ (X @ x)).exp().log1p().sum() + ((Y @ x) ** 4).sum()

    layer = bilevel.argmin(objective)
    system, tensors = layer._system(Raveler.of(zeros(9), "here"), (), {})
    x, places = 0.1 * torch.randn(9, generator=generator, dtype=DOUBLE), torch.tensor([7, 0, 3])
    found = Problem.of(system, tensors).some_rows(x[None], places)
    torch.testing.assert_close(found, torch.func.hessian(objective)(x)[places])


def test_its_local_model_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = data(60, D, seed=6)
    layer, called = bilevel.argmin(least_squares, prox=lambda X, y, s: prox.L1(s)), []
    plain = ProximalSystem.model
    monkeypatch.setattr(ProximalSystem, "model", lambda *a: called.append(1) or plain(*a))
    for strength in (0.1, 0.2, 0.3, 0.4):  # other supports, other signs
        called.clear()
        s = torch.tensor(strength, dtype=DOUBLE, requires_grad=True)
        w = layer(zeros(D), X, -y if strength > 0.3 else y, s)
        (slope,) = torch.autograd.grad(w.square().sum(), s)
        w, S = w.detach(), w.detach() != 0
        want = -2 * len(y) * w[S] @ torch.linalg.solve(X[:, S].T @ X[:, S], w[S].sign())
        torch.testing.assert_close(slope, want)
    assert not called
    with pytest.raises(bilevel.ArgumentError, match="strength to be finite and at least 0"):
        layer(zeros(D), X, y, torch.tensor(-0.1, dtype=DOUBLE))


@pytest.mark.parametrize("error", [1e-3, 1e-9])
def test_a_bound_from_strong_convexity_holds(error: float, taken: list[bool]) -> None:
    X, y = data(60, D, seed=6)
    ridge = lambda w, *args: least_squares(w, *args) + 0.1 * (w**2).sum()
    asked = bilevel.Tolerance(delta=error, strong_convexity=0.2)
    with bilevel.record() as reports:
        w = bilevel.argmin(ridge, prox=prox.L1(0.1), tolerance=asked)(zeros(D), X, y)
    exact = general(prox=prox.L1(0.1))(ridge)(zeros(D), X, y)
    assert taken == [True]
    assert (w - exact).norm() <= reports[0].error_bound + 1e-12
    assert reports[0].error_bound <= error
