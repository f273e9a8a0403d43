"""What other libraries' tests ask of implicit differentiation, asked here: known models, and every other way to a gradient.

The ideas are those of the tests of jaxopt (ridge, logistic regression and Lasso, differentiated in their strength) and of theseus
(the implicit gradient beside the unrolled, the truncated and the numeric one).
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import numpy as np
import pytest
import sklearn.linear_model
import torch
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import bilevel

F64 = torch.float64


def data(rows: int = 40, columns: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(rows, columns, generator=generator, dtype=F64)
    truth = torch.tensor([2.0, -1.5, 0.0, 0.0, 0.7, 0.0], dtype=F64)[:columns]
    return X, X @ truth + 0.3 * torch.randn(rows, generator=generator, dtype=F64)


# Models of scikit-learn, solved and differentiated in the logarithm of their strength.


def test_ridge_beside_scikit_learn_and_its_closed_form() -> None:
    X, y = data()
    layer = bilevel.argmin(lambda w, X, y, s: ((X @ w - y) ** 2).sum() + s.exp() * (w**2).sum())
    s, start = torch.tensor(0.7, dtype=F64), torch.zeros(6, dtype=F64)
    fitted = sklearn.linear_model.Ridge(alpha=float(s.exp()), fit_intercept=False, tol=1e-14).fit(X.numpy(), y.numpy())
    torch.testing.assert_close(layer(start, X, y, s), torch.tensor(fitted.coef_), atol=1e-9, rtol=1e-9)

    def closed(X: torch.Tensor, y: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve(X.T @ X + s.exp() * torch.eye(6, dtype=F64), X.T @ y)

    for number in range(3):
        for jacobian in (jacrev, jacfwd):
            mine = jacobian(lambda *a: layer(start, *a), argnums=number)(X, y, s)
            torch.testing.assert_close(mine, jacrev(closed, argnums=number)(X, y, s), atol=1e-9, rtol=1e-8)


def test_ridge_as_a_linear_system() -> None:
    X, y = data()
    layer = bilevel.linear_solve(lambda w, X, s: X.T @ (X @ w) + s.exp() * w, symmetric=True)
    argmin = bilevel.argmin(lambda w, X, y, s: ((X @ w - y) ** 2).sum() + s.exp() * (w**2).sum())
    s, start = torch.tensor(0.7, dtype=F64), torch.zeros(6, dtype=F64)
    for number in range(3):
        one = jacrev(lambda X, y, s: layer(X.T @ y, X, s), argnums=number)(X, y, s)
        torch.testing.assert_close(
            one, jacrev(lambda *a: argmin(start, *a), argnums=number)(X, y, s), atol=1e-9, rtol=1e-8
        )


def test_logistic_regression_beside_differences_of_scikit_learn() -> None:
    X, y = data(60)
    signs = torch.sign(y)
    layer = bilevel.argmin(
        lambda w, s: torch.nn.functional.softplus(-signs * (X @ w)).sum() + 0.5 * s.exp() * (w**2).sum()
    )
    s = torch.tensor(-0.5, dtype=F64)

    def fitted(s: float) -> np.ndarray:
        settings = {"C": float(np.exp(-s)), "fit_intercept": False, "tol": 1e-12, "max_iter": 10_000}
        return sklearn.linear_model.LogisticRegression(**settings).fit(X.numpy(), signs.numpy()).coef_[0]

    start = torch.zeros(6, dtype=F64)
    torch.testing.assert_close(layer(start, s), torch.tensor(fitted(-0.5)), atol=1e-6, rtol=1e-6)
    step = 1e-3
    numeric = torch.tensor((fitted(-0.5 + step) - fitted(-0.5 - step)) / (2 * step))
    torch.testing.assert_close(jacrev(lambda s: layer(start, s))(s), numeric, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("linear_solver", [None, bilevel.GMRES(), bilevel.Neumann(5000)])
def test_lasso_is_a_fixed_point_of_its_proximal_step(linear_solver: object) -> None:
    X, y = data()
    n = len(y)
    step = float(n / torch.linalg.matrix_norm(X, 2) ** 2)

    def proximal_step(w: torch.Tensor, X: torch.Tensor, y: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        moved = w - step * X.T @ (X @ w - y) / n
        return moved.sign() * (moved.abs() - step * s.exp()).clamp(min=0)

    layer = bilevel.fixed_point(proximal_step, linear_solver=linear_solver)
    s, start = torch.tensor(-2.0, dtype=F64), torch.zeros(6, dtype=F64)
    w = layer(start, X, y, s)
    fitted = sklearn.linear_model.Lasso(alpha=float(s.exp()), fit_intercept=False, tol=1e-14, max_iter=100_000)
    torch.testing.assert_close(w, torch.tensor(fitted.fit(X.numpy(), y.numpy()).coef_), atol=1e-8, rtol=1e-8)
    support = w != 0  # what a proximal step returns
    assert 0 < int(support.sum()) < 6
    # −n λ (X_Sᵀ X_S)⁻¹ sign(w_S) on the support, and zero off it.
    expected = torch.zeros(6, dtype=F64)
    XS = X[:, support]
    expected[support] = -n * s.exp() * torch.linalg.solve(XS.T @ XS, w[support].sign())
    for jacobian in (jacrev, jacfwd):
        torch.testing.assert_close(jacobian(lambda s: layer(start, X, y, s))(s), expected, atol=1e-8, rtol=1e-8)
    by_y = torch.zeros(6, n, dtype=F64)
    by_y[support] = torch.linalg.solve(XS.T @ XS, XS.T)
    torch.testing.assert_close(jacrev(lambda y: layer(start, X, y, s))(y), by_y, atol=1e-8, rtol=1e-8)


# Four ways to one gradient.


def fit(v: torch.Tensor, x: torch.Tensor, y: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """Fit y ≈ v₀ exp(−v₁ x) with a pull to one: nonlinear least squares in two unknowns."""
    return 0.5 * ((v[0] * torch.exp(-v[1] * x) - y) ** 2).sum() + 0.5 * strength * ((v - 1) ** 2).sum()


@pytest.mark.parametrize("way", ["unrolled", "truncated", "numeric"])
@pytest.mark.parametrize("number", [0, 1, 2], ids=["x", "y", "strength"])
def test_every_way_to_a_gradient_leads_to_the_same(way: str, number: int) -> None:
    x = torch.linspace(0, 2, 8, dtype=F64)
    inputs = [x, 2 * torch.exp(-0.7 * x) + 0.05 * torch.sin(9 * x), torch.tensor(1.0, dtype=F64)]
    start = torch.ones(2, dtype=F64)
    layer = bilevel.argmin(fit)

    def loss(v: torch.Tensor) -> torch.Tensor:
        return (v * torch.tensor([1.0, 3.0], dtype=F64)).sum().sin()

    def of(solve: Callable[..., torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda t: loss(solve(start, *inputs[:number], t, *inputs[number + 1 :]))

    def descend(v: torch.Tensor, *rest: torch.Tensor, steps: int) -> torch.Tensor:
        for _ in range(steps):
            v = v - 0.12 * grad(fit)(v, *rest)
        return v

    implicit = grad(of(layer))(inputs[number])
    assert float(implicit.abs().max()) > 1e-2
    if way == "unrolled":
        found, close = grad(of(lambda v, *rest: descend(v, *rest, steps=250)))(inputs[number]), 1e-8
    elif way == "truncated":
        solution = layer(start, *inputs)
        found, close = grad(of(lambda v, *rest: descend(solution, *rest, steps=120)))(inputs[number]), 1e-6
    else:
        found, h = torch.zeros_like(inputs[number]), 1e-5
        for place in range(found.numel()):
            shift = torch.zeros_like(found)
            shift.view(-1)[place] = h
            ahead, behind = (of(layer)(inputs[number] + sign * shift) for sign in (1, -1))
            found.view(-1)[place] = (ahead - behind) / (2 * h)
        close = 1e-8
    torch.testing.assert_close(implicit, found, atol=close, rtol=close)


# Shapes of unknowns.


@pytest.mark.parametrize("make", ["argmin", "root", "fixed_point"])
def test_a_scalar_unknown(make: str) -> None:
    a = torch.tensor(0.6, dtype=F64)
    layer = {
        "argmin": bilevel.argmin(lambda x, a: x.cosh() - a * x),
        "root": bilevel.root(lambda x, a: x.sinh() - a),
        "fixed_point": bilevel.fixed_point(lambda x, a: x - 0.5 * (x.sinh() - a)),
    }[make]
    solve = lambda a: layer(torch.zeros((), dtype=F64), a)
    assert solve(a).shape == ()
    torch.testing.assert_close(solve(a), a.asinh(), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(hessian(solve)(a), hessian(torch.asinh)(a), atol=1e-8, rtol=1e-8)


def test_coupled_tensors_of_a_pytree() -> None:
    # Only the diagonal blocks kept would be 28–44 % wrong on problems such as this one.
    M = torch.randn(5, 5, generator=torch.Generator().manual_seed(2), dtype=F64)
    M = M @ M.T + 0.5 * torch.eye(5, dtype=F64)

    def objective(x, a):
        z = torch.cat([x["u"].reshape(-1), x["v"][0]])
        return 0.5 * z @ M @ z - a @ z + 0.1 * (z**4).sum()

    def flat(z, a):
        return 0.5 * z @ M @ z - a @ z + 0.1 * (z**4).sum()

    start = {"u": torch.zeros(2, 1, dtype=F64), "v": (torch.zeros(3, dtype=F64),)}
    a = torch.linspace(-1, 1, 5, dtype=F64)
    for settings in ({}, {"solver": bilevel.LBFGS(), "linear_solver": bilevel.CG()}):
        layer = bilevel.argmin(objective, **settings)

        def joined(a, layer=layer):
            x = layer(start, a)
            return torch.cat([x["u"].reshape(-1), x["v"][0]])

        z = joined(a)
        torch.testing.assert_close(M @ z + 0.4 * z**3, a, atol=1e-9, rtol=1e-9)
        expected = torch.linalg.inv(hessian(flat)(z, a))
        torch.testing.assert_close(jacrev(joined)(a), expected, atol=1e-8, rtol=1e-8)
        torch.testing.assert_close(jacfwd(joined)(a), expected, atol=1e-8, rtol=1e-8)


def test_nested_batches_reach_a_users_own_solver_in_order() -> None:
    layer = bilevel.argmin(
        lambda x, a, b, c: ((x - a) ** 2).sum() + b * (x**2).sum() + (c * x).sum(),
        solver=lambda objective, init, a, b, c: (2 * a - c) / (2 + 2 * b),
    )
    a = torch.randn(2, 3, dtype=F64)
    b, c = torch.tensor([0.1, 0.5, 2.0, 3.0], dtype=F64), torch.randn(4, 2, 3, dtype=F64)
    start = torch.zeros(3, dtype=F64)
    found = vmap(vmap(layer, in_dims=(None, 0, None, 0)), in_dims=(None, None, 0, 0))(start, a, b, c)
    torch.testing.assert_close(found, (2 * a - c) / (2 + 2 * b[:, None, None]))


def test_heavy_ball_steps_are_those_of_its_formula() -> None:
    a = torch.tensor([1.0, -2.0], dtype=F64)
    layer = bilevel.argmin(
        lambda x, a: ((x - a) ** 2).sum() + (x**4).sum(),
        solver=bilevel.GradientDescent(0.02, 7, momentum=0.8),
        tolerance=bilevel.Tolerance(delta=None),
    )
    x = m = torch.zeros(2, dtype=F64)
    for _ in range(7):
        m = 0.8 * m + 2 * (x - a) + 4 * x**3
        x = x - 0.02 * m
    torch.testing.assert_close(layer(torch.zeros(2, dtype=F64), a), x)


# Memory.


@pytest.mark.parametrize("make", ["argmin", "root", "fixed_point", "linear_solve"])
def test_nothing_is_left_behind_by_any_use(make: str) -> None:
    start = torch.zeros(3, dtype=F64)
    layer = {
        "argmin": bilevel.argmin(lambda x, a: ((x - a) ** 2).sum() + (x**4).sum()),
        "root": bilevel.root(lambda x, a: x + x**3 - a),
        "fixed_point": bilevel.fixed_point(lambda x, a: 0.5 * x.cos() + a),
        "linear_solve": bilevel.linear_solve(lambda x, a: (1 + a**2) * x),
    }[make]

    def solve(a: torch.Tensor) -> torch.Tensor:
        return layer(a if make == "linear_solve" else start, a)

    def once() -> None:
        a = torch.linspace(-1, 1, 3, dtype=F64, requires_grad=True)
        (first,) = torch.autograd.grad(solve(a).sum(), a, create_graph=True)
        torch.autograd.grad(first.sum(), a)
        solve(a)  # a graph that nobody walks
        hessian(lambda a: solve(a).sum())(a.detach())
        vmap(jacfwd(solve))(torch.stack([a.detach(), 2 * a.detach()]))
        with pytest.raises(bilevel.SolveError):
            solve(float("nan") * a)

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    for _ in range(3):
        once()
    before = tensors()
    for _ in range(8):
        once()
    assert tensors() <= before
