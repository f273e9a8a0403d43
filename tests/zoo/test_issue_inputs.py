"""Inputs that once gave a wrong answer at the default settings, or a false failure: each is right now, or refused by name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.func import grad, vmap

import bilevel
from bilevel import Status

from .support import ACCURACY, DTYPES, F64, check, refused


def tensor(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=F64)


def scalar(number: float) -> torch.Tensor:
    return torch.tensor(number, dtype=F64)


def draws(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# --- "Converged" is judged by the error in x, not by where the search began ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", [3.0, 100.0, 1e4, 1e6])
def test_cube_root_from_far_away(start: float, dtype: torch.dtype) -> None:
    check(bilevel.root, lambda x, a: x**3 - a, tensor(start), scalar(8.0), solution=tensor(2.0), dtype=dtype)


def poisson(w: torch.Tensor, X: torch.Tensor, y: torch.Tensor, ridge: torch.Tensor) -> torch.Tensor:
    eta = X @ w
    return (torch.exp(eta) - y * eta).sum() + ridge * (w**2).sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", [0.0, 3.0, -3.0])
@pytest.mark.parametrize("seed", range(4))
def test_poisson_regression_from_far_away(seed: int, start: float, dtype: torch.dtype) -> None:
    X = draws(seed, 50, 3)
    truth = tensor(0.5, -0.3, 0.2)
    y = torch.poisson(torch.exp(X @ truth), generator=torch.Generator().manual_seed(seed))
    check(bilevel.argmin, poisson, torch.full((3,), start), X, y, scalar(0.1), solution=truth, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", [1e-12, 1e-6, 1.0, 3.9])
def test_log_barrier_from_the_wall(start: float, dtype: torch.dtype) -> None:
    barrier = lambda x, a: (a * x - torch.log(x)).sum()
    check(bilevel.argmin, barrier, tensor(start), scalar(0.5), solution=tensor(2.0), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", [0.5, 0.9, 1.2])
def test_lennard_jones_pair_from_the_repulsive_side(start: float, dtype: torch.dtype) -> None:
    pair = lambda r, s: (4 * ((s / r) ** 12 - (s / r) ** 6)).sum()
    check(bilevel.argmin, pair, tensor(start), scalar(1.0), solution=tensor(2 ** (1 / 6)), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", [[0.0, 1.0], [0.0, 10.0], [0.0, 100.0], [1e8, 5.0]])
def test_a_large_unknown_does_not_hide_a_small_one(start: list[float], dtype: torch.dtype) -> None:
    mixed = lambda x, a: (x[0] - 1e8) ** 2 + x[1] ** 4 / 4 - a * x[1]
    check(bilevel.argmin, mixed, tensor(*start), scalar(8.0), solution=tensor(1e8, 2.0), dtype=dtype)


class Quartic(bilevel.BilevelProblem):
    def inner_objective(self, inner: Any, outer: Any, data: Any) -> torch.Tensor:
        return (inner**4).sum() / 4 - (outer * inner).sum()

    def outer_objective(self, inner: Any, outer: Any, data: Any) -> torch.Tensor:
        return (data * inner).sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", [10.0, 1e3, 1e5])
def test_hypergradient_of_a_quartic_from_far_away(start: float, dtype: torch.dtype) -> None:
    outer, data = torch.ones(2, dtype=dtype), torch.tensor([2.0, 1.0], dtype=dtype)
    result = Quartic().hypergradient(outer, data, init=torch.full((2,), start, dtype=dtype))
    right = torch.tensor([2 / 3, 1 / 3], dtype=dtype)
    assert torch.allclose(result.grad, right, rtol=10 * ACCURACY[dtype], atol=0.0)
    assert torch.allclose(result.inner, torch.ones(2, dtype=dtype), rtol=ACCURACY[dtype], atol=0.0)


# Meyer's measurements, in the scaling of Kowalik and Osborne: Moré, Garbow, Hillstrom 1981, problem 10.
_MEYER = tensor(
    34.78, 28.61, 23.65, 19.63, 16.37, 13.72, 11.54, 9.744, 8.261, 7.03, 6.005, 5.147, 4.427, 3.82, 3.307, 2.872
)
_MEYER_SOLUTION = tensor(2.481778, 6.181346, 3.4502235)


def meyer(x: torch.Tensor, measured: torch.Tensor) -> torch.Tensor:
    u = 0.45 + 0.05 * torch.arange(1, 17, dtype=x.dtype)
    return ((x[0] * torch.exp(10 * x[1] / (u + x[2]) - 13) - measured) ** 2).sum()


@pytest.mark.parametrize("method", ["trust-exact", "TNC"])
def test_scipy_does_not_call_a_plateau_a_minimum(method: str) -> None:
    layer = bilevel.argmin(meyer, solver=bilevel.ScipyMinimize(method), on_failure="ignore")
    found = layer.solve(tensor(40.0, 50.0, 30.0), _MEYER)
    right = torch.allclose(found.value, _MEYER_SOLUTION, rtol=1e-5)
    assert right or not bool(found.report.success), f"{found.value} is a success"


@pytest.mark.parametrize("start", [[8.85, 4.0, 2.5], [40.0, 50.0, 30.0]])
def test_meyer_fit_at_the_default_settings(start: list[float]) -> None:
    check(bilevel.argmin, meyer, tensor(*start), _MEYER, solution=_MEYER_SOLUTION)


# --- Steps that rounding absorbs are no solution ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_map_without_a_fixed_point_diverges(dtype: torch.dtype) -> None:
    layer = bilevel.fixed_point(lambda x, a: x + a / (1 + x * x))
    start, a = torch.tensor([1.0, 2.0], dtype=dtype), torch.tensor(1.0, dtype=dtype)
    refused(lambda: layer(start, a), Status.DIVERGED)


@pytest.mark.parametrize("start", [1e8, 1e12, 1e18])
def test_a_step_below_the_rounding_of_x_is_no_solution(start: float) -> None:
    layer = bilevel.fixed_point(lambda x, a: x + a)
    refused(lambda: layer(tensor(start), scalar(1.0)))
    refused(lambda: bilevel.root(lambda x, a: a / x)(tensor(start), scalar(1.0)))
    refused(lambda: bilevel.argmin(lambda x, a: (a / x).sum())(tensor(start), scalar(1.0)))


def shrunk(x: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    return torch.sign(x) * torch.relu(x.abs() - threshold)


def iterated(mapping: Any, x: torch.Tensor, *args: Any, steps: int = 200_000) -> torch.Tensor:
    """Return the fixed point by plain iteration, the reference, in float64."""
    for _ in range(steps):
        new = mapping(x, *args)
        if bool((new - x).abs().max() <= 1e-15 * (1 + new.abs().max())):
            return new
        x = new
    raise AssertionError("plain iteration did not converge")


def sparse_logistic(x: torch.Tensor, X: torch.Tensor, y: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
    step = 4 * len(y) / torch.linalg.matrix_norm(X, 2) ** 2
    slope = -(X.mT @ (y * torch.sigmoid(-y * (X @ x)))) / len(y)
    return shrunk(x - step * slope, step * lam)


@pytest.mark.parametrize("seed", range(10))
def test_a_proximal_step_of_a_sparse_logistic_regression(seed: int) -> None:
    X, y = draws(seed, 12, 3), torch.sign(draws(100 + seed, 12))
    start = torch.zeros(3, dtype=F64)
    right = iterated(sparse_logistic, start, X, y, scalar(0.01))
    check(bilevel.fixed_point, sparse_logistic, start, X, y, scalar(0.01), solution=right)


# --- The default for fixed points succeeds where plain iteration does ---


def logistic_descent(x: torch.Tensor, X: torch.Tensor, y: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
    step = 1 / (torch.linalg.matrix_norm(X, 2) ** 2 / (4 * len(y)) + lam)
    return x - step * (lam * x - (X.mT @ (y * torch.sigmoid(-y * (X @ x)))) / len(y))


@pytest.mark.parametrize("seed", range(10))
def test_gradient_maps_of_a_logistic_regression(seed: int) -> None:
    X, y = draws(seed, 30, 3), torch.sign(draws(100 + seed, 30))
    start, lam = torch.zeros(3, dtype=F64), scalar(1e-3)
    check(
        bilevel.fixed_point, logistic_descent, start, X, y, lam, solution=iterated(logistic_descent, start, X, y, lam)
    )
    exact = bilevel.Tolerance(delta=1e-9)
    layer = bilevel.fixed_point(logistic_descent, solver=bilevel.Anderson(), tolerance=exact)
    assert bool(layer.solve(start, X, y, lam).report.converged)


@pytest.mark.parametrize("dtype", DTYPES)
def test_clamp(dtype: torch.dtype) -> None:
    mapping = lambda x, c: torch.clamp(x - c, -1.0, 1.0)
    check(bilevel.fixed_point, mapping, tensor(1.0, 0.5), scalar(0.01), solution=tensor(-1.0, -1.0), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_relu(dtype: torch.dtype) -> None:
    mapping = lambda x, c: torch.relu(x - c)
    check(bilevel.fixed_point, mapping, tensor(1.0, 0.5), scalar(0.01), solution=tensor(0.0, 0.0), dtype=dtype)


@pytest.mark.parametrize("seed", range(4))
def test_nonnegative_lasso_with_an_empty_column(seed: int) -> None:
    X = draws(seed, 20, 5)
    X[:, 2] = 0
    y = X @ tensor(1.0, 0.5, 0.0, 0.0, 2.0) + 0.1 * draws(50 + seed, 20)
    step = 1 / float(torch.linalg.matrix_norm(X, 2) ** 2)
    mapping = lambda x, X, y, lam: torch.relu(x - step * (X.mT @ (X @ x - y) + lam))
    start, lam = torch.ones(5, dtype=F64), scalar(0.05)
    check(bilevel.fixed_point, mapping, start, X, y, lam, solution=iterated(mapping, start, X, y, lam))


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_cost_over_a_box(dtype: torch.dtype) -> None:
    mapping = lambda x, cost: torch.clamp(x - 0.1 * cost, 0.0, 1.0)
    start, cost = torch.full((3,), 0.5), tensor(0.3, -0.2, 0.01)
    check(bilevel.fixed_point, mapping, start, cost, solution=tensor(0.0, 1.0, 0.0), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pytree_of_powers(dtype: torch.dtype) -> None:
    mapping = lambda x: (torch.sin(x[0]) * x[0] ** 2, x[1] ** 3)
    start = tensor(0.6, 0.0, -0.1), tensor(0.7, 0.5)[:, None]
    zeros = torch.zeros(3, dtype=F64), torch.zeros(2, 1, dtype=F64)
    check(bilevel.fixed_point, mapping, start, solution=zeros, dtype=dtype)


def lasso_data(seed: int, correlation: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return X (40, 20) with features correlated like correlation^|i − j|, and y of a sparse truth with noise."""
    n = 20
    place = torch.arange(n, dtype=F64)
    covariance = correlation ** (place[:, None] - place[None]).abs()
    X = draws(seed, 40, n) @ torch.linalg.cholesky(covariance).mT
    truth = torch.zeros(n, dtype=F64)
    truth[:3] = tensor(2.0, -1.5, 1.0)
    return X, X @ truth + 0.5 * draws(1000 + seed, 40)


def lasso_step(x: torch.Tensor, X: torch.Tensor, y: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
    step = len(y) / torch.linalg.matrix_norm(X, 2) ** 2
    return shrunk(x - step * (X.mT @ (X @ x - y)) / len(y), step * lam)


@pytest.mark.parametrize("correlation", [0.5, 0.9])
@pytest.mark.parametrize("seed", range(10))
def test_textbook_lasso(seed: int, correlation: float) -> None:
    X, y = lasso_data(seed, correlation)
    start, lam = torch.zeros(20, dtype=F64), scalar(0.2)
    right = iterated(lasso_step, start, X, y, lam)
    found = check(bilevel.fixed_point, lasso_step, start, X, y, lam, solution=right)
    assert torch.equal(found.value == 0, right == 0), "coefficients that are zero came back as small numbers"


def test_probabilities_stay_probabilities() -> None:
    """Mirror descent of a linear cost with entropy: x ∝ x^(1−s) exp(−s c); the solution is softmax(−c)."""
    mapping = lambda p, cost: torch.softmax(0.5 * torch.log(p) - 0.5 * cost, dim=-1)
    cost = torch.tensor([0.0, 5.0, 20.0, 45.0], dtype=F64, requires_grad=True)
    p = bilevel.fixed_point(mapping)(torch.full((4,), 0.25, dtype=F64), cost)
    assert bool((p > 0).all())
    assert torch.allclose(p, torch.softmax(-cost, dim=-1), rtol=1e-5, atol=1e-14)
    assert math.isfinite(float(-(p * p.log()).sum().detach()))
    (slope,) = torch.autograd.grad(p[1], cost)
    (right,) = torch.autograd.grad(torch.softmax(-cost, dim=-1)[1], cost)
    assert torch.allclose(slope, right, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_a_projected_fixed_point_lies_in_the_range_of_the_map(seed: int) -> None:
    """Projected gradient descent of a quadratic over the positive orthant: no entry may come back negative."""
    A, b = draws(seed, 12, 8), draws(50 + seed, 12)
    step = 1 / float(torch.linalg.matrix_norm(A, 2) ** 2)
    mapping = lambda x, b: torch.relu(x - step * (A.to(x).mT @ (A.to(x) @ x - b)))
    start = torch.ones(8, dtype=F64)
    right = iterated(mapping, start, b)
    found = check(bilevel.fixed_point, mapping, start, b, solution=right)
    assert bool((found.value >= 0).all())
    assert torch.equal(found.value == 0, right == 0)


# --- False failures ---


def train_energy_layer(unknowns: int, seed: int, steps: int) -> list[float]:
    """Return the losses of an energy network in float32, 64 convex inner problems under vmap, trained by Adam."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    W, U, b = 0.7 * draw(16, unknowns), 0.7 * draw(16, 3), torch.zeros(16)
    weights = [leaf.requires_grad_() for leaf in (W, U, b)]
    inputs = draw(64, 3)
    targets = torch.stack([torch.sin(inputs.sum(1)), inputs[:, 0] * inputs[:, 1]], 1)[:, :unknowns]

    def energy(y: torch.Tensor, x: torch.Tensor, W: torch.Tensor, U: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.softplus(W @ y + U @ x + b).sum() - y.sum() + 0.05 * (y**2).sum()

    layer = bilevel.argmin(energy)
    optimizer, losses = torch.optim.Adam(weights, lr=0.03), []
    for _ in range(steps):
        optimizer.zero_grad()
        y = vmap(lambda x: layer(torch.zeros(unknowns), x, W, U, b))(inputs)
        loss = ((y - targets) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("unknowns", [1, 2])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))])
def test_training_an_energy_layer_in_single_precision(seed: int, unknowns: int) -> None:
    """Now and then one of 64 starts lies so near its solution that its first residual says nothing of rounding."""
    losses = train_energy_layer(unknowns, seed, 160)
    assert losses[-1] < 0.7 * losses[0]


class Digits(bilevel.BilevelProblem):
    """A network of 64, 8 and 10 units (610 weights) with a ridge; the outer variable is the log of its strength."""

    def logits(self, inner: Any, X: torch.Tensor) -> torch.Tensor:
        return torch.tanh(X @ inner["first"] + inner["bias"]) @ inner["second"] + inner["shift"]

    def inner_objective(self, inner: Any, outer: Any, data: Any) -> torch.Tensor:
        X, y, _, _ = data
        ridge = sum((leaf**2).sum() for leaf in inner.values())
        return torch.nn.functional.cross_entropy(self.logits(inner, X), y) + outer.exp() * ridge

    def outer_objective(self, inner: Any, outer: Any, data: Any) -> torch.Tensor:
        _, _, X, y = data
        return torch.nn.functional.cross_entropy(self.logits(inner, X), y)


def digits() -> tuple[dict[str, torch.Tensor], tuple[torch.Tensor, ...]]:
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    X, y = torch.tensor(X[:300] / 16, dtype=F64), torch.tensor(y[:300])
    init = {"first": 0.1 * draws(0, 64, 8), "bias": torch.zeros(8, dtype=F64), "second": 0.3 * draws(1, 8, 10)}
    return init | {"shift": torch.zeros(10, dtype=F64)}, (X[:200], y[:200], X[200:], y[200:])


@pytest.mark.parametrize("goal", [{"hypergradient": 0.1}, {"descent": 0.5}], ids=["hypergradient", "descent"])
def test_goals_on_a_network_end_where_the_default_tolerance_works(goal: dict[str, float]) -> None:
    init, data = digits()
    outer = scalar(-5.0)
    plain = Digits().hypergradient(outer, data, init=init)
    tolerance = bilevel.Tolerance(**goal, estimates=True)
    result = Digits(tolerance=tolerance).hypergradient(outer, data, init=init)
    assert float((result.grad - plain.grad).norm()) <= tolerance.allowed(float(result.grad.norm())) + 1e-6


def sinusoids(lam: float, **settings: Any) -> torch.Tensor:
    """Return the meta-loss of a network of two hidden layers on 25 tasks of sinusoid regression, with its gradient taken."""
    layers = torch.nn.Linear(1, 40), torch.nn.Tanh(), torch.nn.Linear(40, 40), torch.nn.Tanh(), torch.nn.Linear(40, 1)
    model = torch.nn.Sequential(*layers)
    learner = bilevel.IMAML(model, torch.nn.functional.mse_loss, lam=lam, **settings)
    tasks = bilevel.meta.SinusoidSampler(seed=1).sample(25)
    loss = learner((tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y))
    loss.backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())
    return loss.detach()


@pytest.mark.parametrize("lam", [100.0, 1000.0])
def test_imaml_with_nothing_but_lam_on_sinusoids(lam: float) -> None:
    """Plain descent with a fixed step runs away where λ is large."""
    assert math.isfinite(float(sinusoids(lam)))


def test_imaml_as_the_readme_has_it_on_sinusoids() -> None:
    """λ = 2 leaves negative curvature in most tasks: right, or a message that names what helps."""
    said = "lam, Damped"
    try:
        assert math.isfinite(float(sinusoids(2.0)))
    except bilevel.SolveError as error:
        said = str(error)
    assert "lam" in said
    assert "Damped" in said
    assert float(sinusoids(2.0, on_failure="ignore")) < 1e3, "descent ran away"


def trigonometric(y: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    n = len(y)
    k = torch.arange(1, n + 1, dtype=y.dtype)
    return ((n - torch.cos(y).sum() + k * (c - torch.cos(y)) - torch.sin(y)) ** 2).sum()


@pytest.mark.parametrize("c", [1.0, 1 - 1e-6, 1 + 1e-6, 0.999])
def test_rounding_inside_the_objective_does_not_stop_newton(c: float) -> None:
    start = torch.full((70,), 1 / 70, dtype=F64)
    found = bilevel.argmin(trigonometric).solve(start, scalar(c))
    assert bool(found.report.success)
    slope = grad(trigonometric)(found.value, scalar(c))
    step = torch.linalg.solve(torch.func.hessian(trigonometric)(found.value, scalar(c)), slope)
    assert float(step.norm()) <= 1e-6 * max(float(found.value.norm()), 1e-3)


# --- Kinks, maxima and saddles ---


def kinked(x: torch.Tensor, a: torch.Tensor, ridge: torch.Tensor) -> torch.Tensor:
    return ((x.abs() - a) ** 2).sum() + ridge * (x**2).sum()


@pytest.mark.parametrize("start", [0.0, 0.5, -0.5])
def test_a_local_maximum_at_a_kink_is_left_or_named(start: float) -> None:
    a, ridge = torch.tensor(1.0, dtype=F64, requires_grad=True), scalar(0.1)
    layer = bilevel.argmin(kinked, on_failure="ignore")
    found = layer.solve(torch.full((2,), start, dtype=F64), a, ridge)
    if start == 0.0 and not bool(found.report.success):
        refused(lambda: bilevel.argmin(kinked)(torch.zeros(2, dtype=F64), a, ridge))
        return
    assert bool(found.report.success)
    assert torch.allclose(found.value.abs(), torch.full((2,), 1 / 1.1, dtype=F64), rtol=1e-5)
    (slope,) = torch.autograd.grad(found.value.abs().sum(), a)
    assert float(slope) == pytest.approx(2 / 1.1, rel=1e-4)


def test_diagnose_names_a_stationary_point_that_is_so_by_convention_only() -> None:
    diagnosis = bilevel.testing.diagnose(bilevel.argmin(kinked), torch.zeros(2, dtype=F64), scalar(1.0), scalar(0.1))
    left = diagnosis.inner is not None and diagnosis.inner.status != "CONVERGED"
    assert not diagnosis.healthy or left


def wells(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return ((x**2 - a) ** 2).sum()


@pytest.mark.parametrize("size", [2, 512, 513])
def test_a_start_at_a_maximum_is_left_or_named_alike_at_every_size(size: int) -> None:
    """Beyond 512 unknowns another solver and another factorisation are the default."""
    a = torch.tensor(1.0, dtype=F64, requires_grad=True)
    found = bilevel.argmin(wells, on_failure="ignore").solve(torch.zeros(size, dtype=F64), a)
    if bool(found.report.success):
        assert torch.allclose(found.value.abs(), torch.ones(size, dtype=F64), rtol=1e-5)
    else:
        assert found.report.status is Status.INDEFINITE


def test_the_verdict_on_a_maximum_does_not_hang_on_the_size() -> None:
    verdicts = set()
    for size in (3, 512, 513):
        layer = bilevel.argmin(wells, on_failure="ignore")
        verdicts.add(layer.solve(torch.zeros(size, dtype=F64), scalar(1.0)).report.status)
    assert len(verdicts) == 1, verdicts


def singular_start(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return x**3 - a


def singular_solution(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return (x.sum() - a) * torch.ones_like(x)


def verdict(function: Any, size: int, start: float) -> tuple[Status, str]:
    """Return the status and what the message says of it, without the figures."""
    layer = bilevel.root(function, on_failure="ignore")
    x, a = torch.full((size,), start, dtype=F64), torch.tensor(8.0, dtype=F64, requires_grad=True)
    found = layer.solve(x, a)
    if not bool(found.report.success):
        return found.report.status, found.report.status.meaning + found.report.status.remedy
    right = torch.allclose(function(found.value, a), torch.zeros(size, dtype=F64), atol=1e-6)
    assert right
    return found.report.status, ""


def test_a_jacobian_that_is_singular_at_the_start_alone() -> None:
    """From zero the Jacobian of x³ − 8 is zero; the solution, 2, is unique: whatever is said, it is not that it is not."""
    verdicts = {verdict(singular_start, size, 0.0) for size in (2, 512, 513)}
    assert len(verdicts) == 1, verdicts
    ((_, said),) = verdicts
    assert "not unique" not in said


@pytest.mark.parametrize("start", [0.5, 0.0, 3.0])
def test_a_jacobian_that_is_singular_at_the_solution(start: float) -> None:
    """The sum alone is determined: the minimum-norm answer, and a status that says so, or a refusal; alike at every size."""
    ended = set()
    for size in (2, 512, 513):
        x, a = torch.full((size,), start, dtype=F64), torch.tensor(8.0, dtype=F64, requires_grad=True)
        with bilevel.record() as reports:
            try:
                total = bilevel.root(singular_solution)(x, a).sum()
                (slope,) = torch.autograd.grad(total, a)
            except bilevel.SolveError as error:
                ended.add(error.report.status)
                continue
        assert float(total.detach()) == pytest.approx(8.0, rel=1e-6)
        assert float(slope) == pytest.approx(1.0, rel=1e-4)
        said = {report.status for report in reports}
        # A Krylov method that never meets the null space cannot know of it.
        assert size > 512 or said != {Status.CONVERGED}, "nothing says that the solution is not unique"
        ended.add("minimum norm")
    assert len(ended) == 1, ended
