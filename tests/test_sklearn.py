"""Ridge, logistic and softmax regression as layers, on scikit-learn's data, beside scikit-learn and dense references.

The derivative references are written from the models' closed-form gradient, Hessian and cross derivative in float64.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

import bilevel

F64 = torch.float64
LINEAR = {
    "exact": (bilevel.Exact(), bilevel.Tolerance(delta=1e-12), 1e-9),
    "cg": (bilevel.CG(), bilevel.Tolerance(delta=1e-12, delta_prime=1e-12), 1e-7),
}


@cache
def data(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    loader = {"diabetes": load_diabetes, "breast_cancer": load_breast_cancer, "wine": load_wine}[name]
    X, y = loader(return_X_y=True)
    X = StandardScaler().fit_transform(X)
    if name == "diabetes":
        y = (y - y.mean()) / y.std()
    return torch.tensor(X, dtype=F64), torch.tensor(y, dtype=F64 if name == "diabetes" else torch.int64)


def ridge(w, X, y, strength):
    return 0.5 * ((X @ w - y) ** 2).sum() + 0.5 * (strength * w**2).sum()


def logistic(w, X, y, strength):
    return torch.nn.functional.softplus(-(2 * y - 1) * (X @ w)).sum() + 0.5 * (strength * w**2).sum()


def softmax(W, X, y, strength):
    return torch.nn.functional.cross_entropy(X @ W, y, reduction="sum") + 0.5 * (strength * W**2).sum()


def assert_close(mine: torch.Tensor, reference: torch.Tensor, tolerance: float) -> None:
    assert (mine - reference).abs().max() <= tolerance * max(1.0, float(reference.abs().max()))


@pytest.mark.parametrize("linear", LINEAR)
def test_ridge_on_diabetes(linear: str) -> None:
    solver, tolerance, accuracy = LINEAR[linear]
    X, y = data("diabetes")
    n = X.shape[1]
    strengths = torch.logspace(-1, 2, n, dtype=F64)
    layer = bilevel.argmin(ridge, linear_solver=solver, tolerance=tolerance)
    inputs = [t.clone().requires_grad_(True) for t in (X, y, strengths)]
    w = layer(torch.zeros(n, dtype=F64), *inputs)
    single = layer(torch.zeros(n, dtype=F64), X, y, torch.tensor(3.0, dtype=F64))
    expected = Ridge(alpha=3.0, fit_intercept=False, tol=1e-12).fit(X.numpy(), y.numpy()).coef_
    np.testing.assert_allclose(single.numpy(), expected, atol=1e-6)

    v = torch.linspace(-1, 1, n, dtype=F64)
    mine = torch.autograd.grad(w @ v, inputs)
    A = X.T @ X + torch.diag(strengths)
    solution = torch.linalg.solve(A, X.T @ y)
    q = torch.linalg.solve(A, v)
    residual = X @ solution - y
    closed = (-(torch.outer(residual, q) + torch.outer(X @ q, solution)), X @ q, -q * solution)
    assert_close(w.detach(), solution, 1e-10)
    for got, reference in zip(mine, closed, strict=True):
        assert_close(got, reference, accuracy)


@pytest.mark.parametrize("linear", LINEAR)
def test_logistic_on_breast_cancer(linear: str) -> None:
    solver, tolerance, accuracy = LINEAR[linear]
    X, y = data("breast_cancer")
    n, targets = X.shape[1], y.to(F64)
    strengths = torch.logspace(-1, 1, n, dtype=F64)
    layer = bilevel.argmin(logistic, linear_solver=solver, tolerance=tolerance)
    single = layer(torch.zeros(n, dtype=F64), X, targets, torch.tensor(2.0, dtype=F64))
    fitted = LogisticRegression(C=0.5, fit_intercept=False, tol=1e-10, max_iter=10_000, solver="newton-cholesky")
    expected = fitted.fit(X.numpy(), y.numpy()).coef_[0]
    np.testing.assert_allclose(single.numpy(), expected, atol=1e-6)

    inputs = [t.clone().requires_grad_(True) for t in (X, targets, strengths)]
    w = layer(torch.zeros(n, dtype=F64), *inputs)
    v = torch.linspace(-1, 1, n, dtype=F64)
    mine = torch.autograd.grad(w @ v, inputs)
    # Closed form, with m = (2y−1) Xw: the gradient is −Xᵀ[(2y−1) σ(−m)] + strength·w.
    at, sign = w.detach(), 2 * targets - 1
    margin = sign * (X @ at)
    down, curve = torch.sigmoid(-margin), torch.sigmoid(margin) * torch.sigmoid(-margin)
    H = X.T @ (curve[:, None] * X) + torch.diag(strengths)
    q = torch.linalg.solve(H, v)
    Xq = X @ q
    # θ̄ = −∂_θ⟨q, ∇G⟩, term by term.
    by_X = sign[:, None] * down[:, None] * q - (curve * Xq)[:, None] * at
    by_y = 2 * down * Xq - 2 * sign * curve * Xq * (X @ at)
    for got, reference in zip(mine, (by_X, by_y, -q * at), strict=True):
        assert_close(got, reference, accuracy)


@pytest.mark.parametrize("linear", LINEAR)
def test_softmax_on_wine(linear: str) -> None:
    solver, tolerance, accuracy = LINEAR[linear]
    X, y = data("wine")
    n, classes = X.shape[1], 3
    strengths = torch.logspace(-1, 1, n, dtype=F64)[:, None]
    layer = bilevel.argmin(softmax, linear_solver=solver, tolerance=tolerance)
    start = torch.zeros(n, classes, dtype=F64)
    single = layer(start, X, y, torch.tensor(2.0, dtype=F64))
    fitted = LogisticRegression(C=0.5, fit_intercept=False, tol=1e-12, max_iter=100_000)
    np.testing.assert_allclose(single.T.numpy(), fitted.fit(X.numpy(), y.numpy()).coef_, atol=1e-6)

    free_X, free_s = X.clone().requires_grad_(True), strengths.clone().requires_grad_(True)
    W = layer(start, free_X, y, free_s)
    V = torch.linspace(-1, 1, n * classes, dtype=F64).reshape(n, classes)
    mine = torch.autograd.grad((W * V).sum(), (free_X, free_s))
    at = W.detach()
    P = torch.softmax(X @ at, 1)
    blocks = torch.diag_embed(P) - P[:, :, None] * P[:, None, :]
    H = torch.einsum("ia,icd,ib->acbd", X, blocks, X).reshape(n * classes, n * classes)
    H = H + torch.diag(strengths.expand(n, classes).reshape(-1))
    Q = torch.linalg.solve(H, V.reshape(-1)).reshape(n, classes)
    error = P - torch.nn.functional.one_hot(y, classes)
    by_X = -(error @ Q.T + torch.einsum("icd,id->ic", blocks, X @ Q) @ at.T)
    by_s = -(Q * at).sum(1, keepdim=True)
    for got, reference in zip(mine, (by_X, by_s), strict=True):
        assert_close(got, reference, accuracy)


def test_a_non_symmetric_root_and_a_contraction_against_dense_references() -> None:
    torch.manual_seed(0)
    n = 12
    W = torch.randn(n, n, dtype=F64) / n**0.5
    b = torch.randn(n, dtype=F64, requires_grad=True)

    def residual(x, W, b):
        return x + 0.2 * x**3 + 0.5 * torch.tanh(W @ x) - b

    free = W.clone().requires_grad_(True)
    v = torch.linspace(-1, 1, n, dtype=F64)
    for solver in (None, bilevel.Newton(), bilevel.ScipyRoot()):
        for linear in (None, bilevel.Exact(), bilevel.GMRES(), bilevel.BiCGStab()):
            layer = bilevel.root(
                residual,
                solver=solver,
                linear_solver=linear,
                tolerance=bilevel.Tolerance(delta=1e-11, delta_prime=1e-12),
            )
            x = layer(torch.zeros(n, dtype=F64), free, b)
            mine = torch.autograd.grad(x @ v, (free, b))
            at = x.detach()
            slope = 1 - torch.tanh(W @ at) ** 2
            J = torch.diag(1 + 0.6 * at**2) + 0.5 * slope[:, None] * W
            q = torch.linalg.solve(J.T, v)
            assert float(residual(at, W, b.detach()).norm()) < 1e-10
            assert_close(mine[0], -0.5 * torch.outer(slope * q, at), 1e-9)
            assert_close(mine[1], q, 1e-9)


def test_a_128_dimensional_contraction_by_anderson() -> None:
    torch.manual_seed(0)
    d = 128
    W = torch.randn(d, d, dtype=F64)
    W = 0.9 * W / torch.linalg.matrix_norm(W, 2)
    U = torch.randn(d, d, dtype=F64) / d**0.5
    u = torch.randn(d, dtype=F64, requires_grad=True)
    free = W.clone().requires_grad_(True)
    layer = bilevel.fixed_point(
        lambda z, W, u: torch.tanh(W @ z + U @ u),
        solver=bilevel.Anderson(),
        tolerance=bilevel.Tolerance(delta=1e-12, delta_prime=1e-12),
    )
    z = layer(torch.zeros(d, dtype=F64), free, u)
    v = torch.linspace(-1, 1, d, dtype=F64)
    mine = torch.autograd.grad(z @ v, (free, u))
    at = z.detach()
    slope = 1 - at**2
    q = torch.linalg.solve((torch.eye(d, dtype=F64) - slope[:, None] * W).T, v)
    assert float((at - torch.tanh(W @ at + U @ u.detach())).norm()) < 1e-11
    assert_close(mine[0], torch.outer(slope * q, at), 1e-9)
    assert_close(mine[1], U.T @ (slope * q), 1e-9)
