"""More inputs that once gave a wrong answer without a word, a raw error or a false failure at the default settings."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import hessian, jacrev, vmap

import bilevel
from bilevel import Status

from .support import ACCURACY, DTYPES, F64, check, refused


def tensor(*numbers: float, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.tensor(numbers, dtype=dtype)


# --- A stationary point with a singular Hessian is a minimum, or is named ---


def power(exponent: int) -> Any:
    return lambda x, a: ((x - a) ** exponent).sum()


SADDLES = {
    "cubic": (power(3), tensor(5.0), tensor(3.0)),
    "cubic at zero": (power(3), tensor(5.0), tensor(0.0)),
    "cubic, two unknowns": (power(3), tensor(5.0, 4.0), tensor(3.0, 1.0)),
    "quintic": (power(5), tensor(2.0), tensor(1.0)),
    "cubic beside a parabola": (lambda x, a: (x[0] - a[0]) ** 3 + (x[1] - 1) ** 2, tensor(5.0, 0.0), tensor(3.0)),
    "quartic of two signs": (lambda x, a: (x[0] - 1) ** 4 - (x[1] - a[0]) ** 4, tensor(2.0, 2.0), tensor(2.0)),
    "with a constant": (lambda x, a: 100 + (x[0] - 1) ** 4 + (x[1] - a[0]) ** 3, tensor(2.0, 3.0), tensor(2.0)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SADDLES)
def test_a_degenerate_saddle_is_named(name: str, dtype: torch.dtype) -> None:
    function, start, a = SADDLES[name]
    found = bilevel.argmin(function, on_failure="ignore").solve(start.to(dtype), a.to(dtype))
    assert not bool(found.report.success), found.value
    assert found.report.status in (Status.INDEFINITE, Status.DIVERGED, Status.NOT_FINITE)


@pytest.mark.parametrize("how", [{}, {"tolerance": bilevel.Tolerance(delta=1e-6)}], ids=["default", "delta"])
def test_a_cubic_is_named_from_the_start_and_at_the_saddle(how: Any) -> None:
    for start in (5.0, 3.0, 3.001):
        refused(lambda start=start: bilevel.argmin(power(3), **how)(tensor(start), tensor(3.0)))


@pytest.mark.parametrize(
    ("exponent", "solver"), [(4, None), (6, None), (4, bilevel.LBFGS())], ids=["4", "6", "4, L-BFGS"]
)
def test_a_degenerate_minimum_stays_one(exponent: int, solver: Any) -> None:
    layer = bilevel.argmin(power(exponent), solver=solver, on_failure="ignore")
    for start, a in ((tensor(5.0), tensor(3.0)), (tensor(2.0, 7.0), tensor(1.0, 1.0)), (tensor(5.0), tensor(0.0))):
        found = layer.solve(start, a)
        assert found.report.status is Status.CONVERGED
        assert torch.allclose(found.value, a, atol=0.02)


@settings(max_examples=5)
@given(st.floats(-2, 2), st.floats(0.1, 3), st.floats(0.1, 4))
def test_no_success_of_a_cubic_anywhere(a: float, scale: float, beyond: float) -> None:
    function = lambda x, a: (scale * (x - a) ** 3).sum()
    found = bilevel.argmin(function, on_failure="ignore").solve(tensor(a + beyond), tensor(a))
    assert not bool(found.report.success)


def test_saddles_of_a_batch_leave_the_minima_alone() -> None:
    function = lambda x, a, k: torch.where(k > 0, ((x - a) ** 3).sum(), ((x - a) ** 2).sum())
    layer = bilevel.argmin(function, on_failure="ignore")
    kinds = torch.tensor([1.0, -1.0, 1.0], dtype=F64)
    found = vmap(layer.solve)(torch.full((3, 2), 5.0, dtype=F64), tensor(1.0, 2.0, 3.0), kinds)
    assert found.report.success.tolist() == [False, True, False]
    assert torch.allclose(found.value[1], torch.full((2,), 2.0, dtype=F64))


# --- A function that changes between the call and the derivative ---


class Stateful:
    def __init__(self) -> None:
        self.factor = 2.0

    def objective(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return ((x - self.factor * t) ** 2).sum()

    def residual(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x - self.factor * t

    def mapping(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 0.5 * (x + self.factor * t)


KINDS = {
    "argmin": lambda s, **how: bilevel.argmin(s.objective, **how),
    "argmin by L-BFGS": lambda s, **how: bilevel.argmin(s.objective, solver=bilevel.LBFGS(), **how),
    "argmin by descent": lambda s, **how: bilevel.argmin(
        s.objective, solver=bilevel.GradientDescent(lr=0.1, max_steps=300), **how
    ),
    "root": lambda s, **how: bilevel.root(s.residual, **how),
    "fixed point": lambda s, **how: bilevel.fixed_point(s.mapping, **how),
}


@pytest.mark.parametrize("again", [False, True], ids=["backward", "create_graph"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_function_that_changed_gives_no_gradient_of_another_problem(kind: str, again: bool) -> None:
    owner, t = Stateful(), torch.tensor(1.0, dtype=F64, requires_grad=True)
    x = KINDS[kind](owner)(tensor(0.0), t)
    owner.factor = 5.0
    try:
        (slope,) = torch.autograd.grad(x.sum(), t, create_graph=again)
    except bilevel.StochasticObjectiveError:
        return
    # The linearisation of the call was at hand.
    assert float(slope.detach()) == pytest.approx(2.0)


def test_a_function_that_changed_follows_the_policy() -> None:
    owner, t = Stateful(), torch.tensor(1.0, dtype=F64, requires_grad=True)
    x = KINDS["root"](owner, on_failure="nan")(tensor(0.0), t)
    owner.factor = 5.0
    (slope,) = torch.autograd.grad(x.sum(), t)
    assert bool(slope.isnan())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_function_that_did_not_change_is_not_refused(kind: str, dtype: torch.dtype) -> None:
    owner, t = Stateful(), torch.tensor([1.0, 1e3, 1e-3], dtype=dtype, requires_grad=True)
    x = KINDS[kind](owner)(torch.zeros(3, dtype=dtype), t)
    for again in (True, False):
        (slope,) = torch.autograd.grad(x.sum(), t, create_graph=again, retain_graph=True)
        assert torch.allclose(slope.detach(), torch.full_like(t, 2.0), rtol=10 * ACCURACY[dtype])


# --- Trial points outside the domain of an operation that raises ---


def log_determinant(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """−log det(diag(x)) + a·x, whose minimum is 1/a."""
    return -2 * torch.linalg.cholesky(torch.diag(x)).diagonal().log().sum() + (a * x).sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("solver", [None, bilevel.LBFGS(), bilevel.Newton()], ids=["default", "LBFGS", "Newton"])
def test_a_line_search_comes_back_from_where_cholesky_fails(solver: Any, dtype: torch.dtype) -> None:
    start, a = tensor(30.0, 2.0, dtype=dtype), torch.tensor([1.0, 0.5], dtype=dtype, requires_grad=True)
    x = bilevel.argmin(log_determinant, solver=solver)(start, a)
    assert torch.allclose(x, 1 / a, rtol=ACCURACY[dtype])
    (slope,) = torch.autograd.grad(x.sum(), a)
    assert torch.allclose(slope, -1 / a.detach() ** 2, rtol=10 * ACCURACY[dtype])


def test_a_start_outside_the_domain_is_named() -> None:
    layer = bilevel.argmin(log_determinant)
    for _ in range(2):
        with pytest.raises(bilevel.SolveError, match="cholesky") as caught:
            layer(tensor(-1.0, 2.0), tensor(1.0, 1.0))
        assert caught.value.report.status is Status.NOT_FINITE
    with pytest.raises(bilevel.SolveError, match="cholesky"):
        torch.func.grad(lambda a: layer(tensor(-1.0, 2.0), a).sum())(tensor(1.0, 1.0))


@pytest.mark.parametrize("solver", [None, bilevel.LBFGS()], ids=["default", "LBFGS"])
def test_a_start_outside_the_domain_fails_alone_in_its_batch(solver: Any) -> None:
    starts = torch.tensor([[30.0, 2.0], [-1.0, 2.0], [1e-3, 1.0]], dtype=F64)
    a = torch.tensor([1.0, 2.0], dtype=F64)
    layer = bilevel.argmin(log_determinant, solver=solver, on_failure="ignore")
    found = vmap(layer.solve, in_dims=(0, None))(starts, a)
    assert found.report.success.tolist() == [True, False, True]
    assert int(found.report.status_code[1]) == Status.NOT_FINITE
    assert torch.allclose(found.value[[0, 2]], (1 / a).expand(2, 2), rtol=1e-6)


def test_a_derivative_outside_the_domain_is_refused() -> None:
    starts = torch.tensor([[30.0], [-1.0]], dtype=F64)
    a = torch.tensor([1.0], dtype=F64, requires_grad=True)
    x = vmap(bilevel.argmin(log_determinant, on_failure="ignore"), in_dims=(0, None))(starts, a)
    with pytest.raises(bilevel.ArgumentError, match="leave the problem"):
        torch.autograd.grad(x[0].sum(), a)


def test_a_parameter_that_a_distribution_refuses_is_outside_the_domain() -> None:
    y = torch.linspace(0.05, 0.95, 40, dtype=F64) ** 1.5
    # Said here, because torch.compile switches these checks off for the rest of the process.
    likelihood = lambda p, y: -torch.distributions.Beta(p[0], p[1], validate_args=True).log_prob(y).mean()
    found = bilevel.argmin(likelihood).solve(tensor(50.0, 50.0), y)
    slope = torch.func.grad(lambda p: likelihood(p, y))(found.value)
    assert bool(found.report.success)
    assert float(slope.norm()) < 1e-9


def test_marginal_likelihood_of_a_gaussian_process_in_single_precision() -> None:
    """Rounding inside the Hessian's products, through a Cholesky factor, is more than that of the products.

    On some processors it exceeds what passes for rounding in one of the three problems, which is then refused.
    """
    refused = [error for seed in range(3) if (error := _marginal_likelihood(seed)) is not None]
    assert len(refused) <= 1
    assert all("use float64" in str(error) for error in refused)


def _marginal_likelihood(seed: int) -> bilevel.SolveError | None:
    X = torch.linspace(0, 5, 30, dtype=F64)
    y = torch.sin(2 * X) + 0.1 * torch.randn(30, generator=torch.Generator().manual_seed(seed), dtype=F64)

    def evidence(h: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = X.to(h)
        K = (2 * h[1]).exp() * torch.exp(-0.5 * (x[:, None] - x) ** 2 * (-2 * h[0]).exp())
        L = torch.linalg.cholesky(K + (2 * h[2]).exp() * torch.eye(30, dtype=h.dtype))
        return 0.5 * (y * torch.cholesky_solve(y[:, None], L)[:, 0]).sum() + L.diagonal().log().sum()

    found = []
    for dtype in (F64, torch.float32):
        given = y.to(dtype).requires_grad_()
        x = bilevel.argmin(evidence)(tensor(0.0, 0.0, -1.0, dtype=dtype), given)
        try:
            gradient = torch.autograd.grad(x.sum(), given)[0].double()
        except bilevel.SolveError as error:
            assert dtype is torch.float32
            return error
        found.append((x.detach().double(), gradient))
    (right, slope), (single, its_slope) = found
    assert torch.allclose(single, right, atol=2e-3)
    assert float((its_slope - slope).norm()) <= 2e-2 * float(slope.norm())
    return None


# --- Newton on equations, and maps that stand still ---


@pytest.mark.parametrize("start", [-100.0, -30.0, 10.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_exponential_from_where_it_is_flat(start: float, dtype: torch.dtype) -> None:
    check(
        bilevel.root,
        lambda x, a: torch.exp(x) - a,
        tensor(start),
        torch.tensor(2.0, dtype=F64),
        solution=tensor(2.0).log(),
        dtype=dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", [(5.0, 3e4, 2.0), (1e5, 1.0, 7e3)])
def test_relu_of_a_shift_from_far_away(start: tuple[float, ...], dtype: torch.dtype) -> None:
    mapping = lambda x, c: torch.relu(x - c)
    check(
        bilevel.fixed_point,
        mapping,
        tensor(*start),
        torch.tensor(1.0, dtype=F64),
        solution=torch.zeros(3, dtype=F64),
        dtype=dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_linear_cost_over_a_box_from_far_away(dtype: torch.dtype) -> None:
    cost = torch.logspace(-2, 0, 12, dtype=F64) * tensor(1.0, -1.0).repeat(6)
    start = 5e3 * torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=F64)
    mapping = lambda x, cost: torch.clamp(x - cost, -1.0, 1.0)
    check(bilevel.fixed_point, mapping, start, cost, solution=-torch.sign(cost), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_unknown_in_large_units_hides_no_other(dtype: torch.dtype) -> None:
    units = torch.tensor([0.33, 4e4, 1e3], dtype=F64)
    cost = units * tensor(0.01, 0.07, -0.07)
    mapping = lambda x, cost, units: torch.clamp(x - cost, -units, units)
    start, solution = 700 * units * tensor(1.0, -1.0, 1.0), units * tensor(-1.0, -1.0, 1.0)
    check(bilevel.fixed_point, mapping, start, cost, units, solution=solution, dtype=dtype, scale=0.33)


@pytest.mark.parametrize("dtype", DTYPES)
def test_exponentials_whose_rounding_is_the_direction_of_others(dtype: torch.dtype) -> None:
    matrix = torch.tensor([[1.0, 0.5, -0.2], [0.3, 0.8, 0.4], [-0.5, 0.2, 1.1]], dtype=F64)
    solution = tensor(1.0, -1.0, 0.5)
    target = matrix @ (solution.exp() + 0.3 * solution)
    residual = lambda z, target, matrix: matrix @ (z.exp() + 0.3 * z) - target
    check(bilevel.root, residual, tensor(40.0, -40.0, 5.0), target, matrix, solution=solution, dtype=dtype)


MAPS = {
    "shift": lambda x: x + 1.0,
    "shift of a relu": lambda x: torch.relu(x) + 1.0,
    "softplus": lambda x: torch.nn.functional.softplus(x) + 0.5,
    "vanishing": lambda x: x + 1 / (1 + x * x),
    "vanishing faster": lambda x: x + 1 / (1 + x**4),
    "vanishing exponentially": lambda x: x + torch.exp(-x),
    "one of two": lambda x: torch.stack([x[0] + 1 / (1 + x[0] ** 2), torch.cos(x[1])]),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MAPS)
def test_a_map_without_fixed_point_is_named_early(name: str, dtype: torch.dtype) -> None:
    start = torch.tensor([1.0, 2.0], dtype=dtype)
    found = bilevel.fixed_point(MAPS[name], on_failure="ignore").solve(start)
    assert found.report.status is Status.DIVERGED
    assert int(found.report.iterations) < 2500


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", [(0.0, 0.0), (100.0, -3.0)])
@pytest.mark.parametrize("name", ["vanishing", "vanishing exponentially"])
def test_a_map_without_fixed_point_is_named_from_elsewhere(
    name: str, start: tuple[float, ...], dtype: torch.dtype
) -> None:
    found = bilevel.fixed_point(MAPS[name], on_failure="ignore").solve(tensor(*start, dtype=dtype))
    assert found.report.status is Status.DIVERGED
    assert int(found.report.iterations) < 4000


BELLS = {
    "rational": lambda x, t: (t / (1 + x * x)).sum(),
    "Gaussian": lambda x, t: (t * torch.exp(-x * x)).sum(),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", [(1e-6, -2e-6, 3e-6, 1e-6), (1e-3, -5e-4, 2e-4, 6e-4)])
@pytest.mark.parametrize("name", BELLS)
def test_a_way_down_a_bell_ends_at_no_minimum(name: str, start: tuple[float, ...], dtype: torch.dtype) -> None:
    # The gradient underflows far away, and vanishes at zero, the maximum.
    levels = torch.tensor([0.5, 0.8, 1.2, 1.5], dtype=dtype)
    refused(lambda: bilevel.argmin(BELLS[name])(tensor(*start, dtype=dtype), levels))


def test_one_of_a_batch_runs_away() -> None:
    """x + a/(1 + x²) has no fixed point, and x + 0.1·(2 − x) converges slowly to 2."""
    function = lambda x, k: torch.where(k > 0, x + 1 / (1 + x * x), x + 0.1 * (2 - x))
    layer = bilevel.fixed_point(function, on_failure="ignore")
    found = vmap(layer.solve)(torch.ones(3, 2, dtype=F64), tensor(-1.0, 1.0, -1.0))
    assert found.report.success.tolist() == [True, False, True]
    assert Status(int(found.report.status_code[1])) is Status.DIVERGED
    assert torch.allclose(found.value[[0, 2]], torch.full((2, 2), 2.0, dtype=F64))


def test_a_long_way_to_a_fixed_point_is_gone() -> None:
    """Plain iteration takes 2,000 equal steps and then contracts."""
    found = bilevel.fixed_point(
        lambda x: torch.where(x < 2000.5, x + 1, 2001 + 0.5 * (x - 2001)), on_failure="ignore"
    ).solve(tensor(0.0))
    assert found.report.status is Status.CONVERGED
    assert float(found.value) == pytest.approx(2001)


ROOTS_AT_INFINITY = {
    "arc tangent": lambda x: torch.atan(x) - torch.pi / 2,
    "quotient": lambda x: x.abs() / (1 + x.abs()) - 1,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", [1.0, 100.0])
@pytest.mark.parametrize("name", ROOTS_AT_INFINITY)
def test_a_root_at_infinity_is_named(name: str, start: float, dtype: torch.dtype) -> None:
    found = bilevel.root(ROOTS_AT_INFINITY[name], on_failure="ignore").solve(tensor(start, dtype=dtype))
    assert found.report.status is Status.DIVERGED


def test_a_far_root_is_found() -> None:
    found = bilevel.root(lambda x, a: torch.atan(x) - a).solve(tensor(1.0), torch.tan(tensor(1.57)).atan())
    assert float(found.value) == pytest.approx(float(torch.tan(tensor(1.57))), rel=1e-6)


@pytest.mark.parametrize("batched", [False, True])
def test_a_root_whose_squared_residual_overflows(batched: bool) -> None:
    layer = bilevel.root(lambda x, a: 1e15 * (x**3 - a))
    start, a = torch.full((2,), 1e3, dtype=torch.float32), torch.tensor([8.0, 27.0])
    x = vmap(layer)(torch.stack([start, -start]), torch.stack([a, a]))[0] if batched else layer(start, a)
    assert torch.allclose(x, torch.tensor([2.0, 3.0]), rtol=1e-5)


# --- A search that ended at a saddle leaves it ---


def atoms(x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    """Lennard-Jones energy of three atoms at (0, 0), (u, 0) and (v, w), 2^(1/6) apart in the minimum."""
    u, v, w = x.unbind(-1)
    cubes = torch.stack([u * u, v * v + w * w, (u - v) ** 2 + w * w], -1) ** -3
    return (4 * e * (cubes * cubes - cubes)).sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", [(31.72, 777.7, 337.3), (24.69, 467.0, 7.638), (55.7, 475.6, 5.859)])
def test_atoms_in_a_row_are_left(start: tuple[float, ...], dtype: torch.dtype) -> None:
    x = bilevel.argmin(atoms)(tensor(*start, dtype=dtype), tensor(1.0, dtype=dtype)[0])
    u, v, w = x.double()
    sides = torch.stack([u.abs(), torch.hypot(v, w), torch.hypot(u - v, w)])
    assert torch.allclose(sides, torch.full((3,), 2 ** (1 / 6), dtype=F64), rtol=1e-4)


# Starts at which one search ends at the atoms in a row, and the next ones far above them or at the same place.
FAR_ATOMS = {
    "steps spent at the saddle": (tensor(73.6, 561.82, 37.39), tensor(1.0, 1.0, 1.0)),
    "the other searches end above the saddle": (tensor(1122493.0, 76919.0, 1613.3), tensor(1.0, 1.0, 1.0)),
    "units of 6e-6": (tensor(77540.0, 561251.0, 1.8821), tensor(2.742e-4, 5.952e-6, 0.3299)),
    "units of 3e3": (tensor(18.184, 561237.0, 622.1), tensor(5e-6, 3.1e3, 0.11)),
}


@pytest.mark.parametrize("name", FAR_ATOMS)
def test_a_saddle_is_left_from_where_the_energy_is_lowest(name: str) -> None:
    start, units = FAR_ATOMS[name]
    energy = lambda x, e: atoms(x / units, e)
    e = torch.tensor(1.3, dtype=F64, requires_grad=True)
    x = bilevel.argmin(energy)(start * units, e)
    u, v, w = (x / units).detach()
    sides = torch.stack([u.abs(), torch.hypot(v, w), torch.hypot(u - v, w)])
    assert torch.allclose(sides, torch.full((3,), 2 ** (1 / 6), dtype=F64), rtol=1e-5)
    # The distances do not depend on the depth of the wells.
    assert abs(float(torch.autograd.grad((x / units).sum(), e)[0])) < 1e-5


def test_the_step_off_a_saddle_is_in_the_units_of_the_curvature() -> None:
    """½z₀² − ½z₁² + ¼z₁⁴ falls from its saddle to z₁ = ±1, whatever the unit of x₁."""
    for unit in (1e-9, 1.0, 1e9):
        units = tensor(1.0, unit)
        layer = bilevel.argmin(
            lambda x, a, units=units: (
                0.5 * (x[0] - a) ** 2 - 0.5 * (x[1] / units[1]) ** 2 + 0.25 * (x[1] / units[1]) ** 4
            )
        )
        # So near the ridge that Newton's steps end on it.
        x = layer(tensor(3.0, 1e-30) * units, tensor(2.0)[0])
        assert torch.allclose((x / units).abs(), tensor(2.0, 1.0), rtol=1e-6)


def bent(x: torch.Tensor, b: torch.Tensor, q: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """A quadratic and absolute values that are smooth within one unit: ½xᵀQx + Σ log 2cosh(½ aᵢ·x)·2 + b·x."""
    t = a @ x
    return 0.5 * x @ q @ x + (torch.nn.functional.softplus(t) + torch.nn.functional.softplus(-t)).sum() + b @ x


@pytest.mark.parametrize("seed", range(4))
def test_newton_does_not_zigzag_between_bends(seed: int) -> None:
    """From 1e6 away the bends are narrower than any step. Sufficient decrease alone takes hundreds of steps."""
    draws = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=draws, dtype=F64)
    basis = torch.linalg.qr(normal(11, 11)).Q
    q = basis @ torch.diag(torch.logspace(-8, 0, 11, dtype=F64)) @ basis.T
    a = torch.linalg.qr(normal(11, 11)).Q[:5]
    right = torch.where(normal(11) < 0, -1.0, 1.0) * (1 + torch.rand(11, generator=draws, dtype=F64))
    b = -torch.func.grad(bent)(right, torch.zeros(11, dtype=F64), q, a)
    found = bilevel.argmin(bent, solver=bilevel.Newton()).solve(right + 1e6 * normal(11), b, q, a)
    assert torch.allclose(found.value, right, rtol=1e-5)
    assert int(found.report.iterations) <= 60


BARRIERS = {
    "walls a million times nearer": (tensor(1.03e-5, 5.26e-6, 1.83e-6, 0.115), tensor(1.0, 1.0, 1.0, 1.0)),
    "one wall at 6e-7": (tensor(0.152, 4.46e-5, 0.322, 5.85e-7), tensor(1.0, 1.0, 1.0, 1.0)),
    "far away": (tensor(731.0, 471.0, 7.35, 54.0), tensor(7.6e4, 6e-4, 1.2e-4, 1.0)),
    "walls and far, in other units": (tensor(1.6e3, 1e-3, 40.7, 1.97e3), tensor(3.7e-4, 6.9e-3, 3.1e3, 1.1e-5)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BARRIERS)
def test_a_coupled_barrier_from_its_walls_and_from_far_away(name: str, dtype: torch.dtype) -> None:
    start, units = BARRIERS[name]
    q = 0.02 * torch.eye(4, dtype=F64) + 0.01 * torch.ones(4, 4, dtype=F64)
    right = tensor(0.742, 0.826, 1.83, 1.67)
    b = 1 / right - q @ right

    def barrier(x: torch.Tensor, b: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        z = x / units.to(dtype).to(x)
        return 0.5 * z @ q @ z - torch.log(z).sum() + b @ z

    check(bilevel.argmin, barrier, start * units, b, q, solution=right * units, dtype=dtype, scale=float(units.min()))


def test_a_minimum_is_not_taken_outside_the_domain() -> None:
    """Beyond zero the logarithm has no value, and its gradient goes on: from so far it is below the first goal."""
    a, q = tensor(0.4, 0.9, dtype=torch.float32), tensor(0.1, 0.05, dtype=torch.float32)
    barrier = lambda x, a: (0.5 * q * x * x + a * x - torch.log(x)).sum()
    for start in ((3e5, 1.4e6), (9e5, 2e3), (1e6, 1e6), (2e6, 40.0)):
        x = bilevel.argmin(barrier)(tensor(*start, dtype=torch.float32), a).double()
        right = (-a.double() + (a.double() ** 2 + 4 * q.double()).sqrt()) / (2 * q.double())
        assert torch.allclose(x, right, rtol=2e-3)


def test_a_far_pair_is_found_below_the_rounding_of_a_near_one() -> None:
    energy = lambda x, e: (4 * e * (x**-12 - x**-6)).sum()
    x = bilevel.argmin(energy)(tensor(1542.0, 31.35, 989.6, dtype=torch.float32), tensor(0.7, dtype=torch.float32)[0])
    assert torch.allclose(x, torch.full((3,), 2 ** (1 / 6)), rtol=2e-3)


# --- What is amiss is named ---


def squares(x: torch.Tensor, a: torch.Tensor, *more: Any) -> torch.Tensor:
    return ((x - a) ** 2).sum()


@pytest.mark.parametrize(
    ("prox", "name"),
    [
        (lambda a, s: bilevel.prox.L1(s), "strength of prox.L1 that has to be finite and at least 0"),
        (lambda a, s: bilevel.prox.Box(-s, s), "lower of prox.Box that has to be at most upper"),
    ],
)
def test_a_parameter_of_one_problem_that_is_out_of_range_is_named(prox: Any, name: str) -> None:
    layer = bilevel.argmin(squares, prox=prox, on_failure="nan")
    a = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=F64)
    given = torch.zeros(2, 2, dtype=F64), a, tensor(1.0, -1.0)
    assert vmap(layer)(*given).isnan().any(-1).tolist() == [False, True]
    with pytest.raises(bilevel.SolveError, match=name):
        vmap(bilevel.argmin(squares, prox=prox))(*given)


@pytest.mark.parametrize(
    ("how", "name"),
    [
        (lambda c: {"inequality": lambda x, a: x.sum() - c}, "a constraint or bound reaches"),
        (lambda c: {"equality": lambda x, a: x.sum() - c}, "a constraint or bound reaches"),
        (lambda c: {"lower": lambda a: c}, "a constraint or bound reaches"),
        (lambda c: {"prox": lambda a: bilevel.prox.L1(c)}, "prox reaches"),
    ],
)
def test_the_function_that_captures_a_tensor_is_named(how: Any, name: str) -> None:
    c = tensor(1.0).requires_grad_()[0]
    with pytest.raises(bilevel.CapturedTensorError, match=name):
        bilevel.argmin(squares, **how(c))(torch.zeros(2, dtype=F64), tensor(1.0, 2.0))


@pytest.mark.parametrize("use", [lambda n: n.size(0), lambda n: n.float().mean()])
def test_an_integer_array_of_numpy_is_named(use: Any) -> None:
    layer = bilevel.argmin(lambda x, a, n: ((x - a) ** 2).sum() / use(n))
    with pytest.raises(bilevel.DtypeError, match=re.escape("numpy array at args[1]")):
        layer(torch.zeros(2, dtype=F64), tensor(1.0, 2.0), np.array([0, 1]))


def test_a_second_derivative_that_is_infinite_is_named_with_a_remedy_that_works() -> None:
    a = tensor(1.0, 2.0).requires_grad_()
    x = bilevel.argmin(lambda x, a: ((x - a).abs() ** 1.5).sum())(torch.zeros(2, dtype=F64), a)
    with pytest.raises(
        bilevel.SolveError, match=r"second derivative of the objective to be infinite .*\(d\*\*2 \+ 1e-6\)\*\*0\.75"
    ):
        torch.autograd.grad(x.sum(), a)
    x = bilevel.argmin(lambda x, a: (((x - a) ** 2 + 1e-6) ** 0.75).sum())(torch.zeros(2, dtype=F64), a)
    assert torch.allclose(torch.autograd.grad(x.sum(), a)[0], torch.ones(2, dtype=F64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", [(0.5,), (1.0,)])
def test_steps_that_rounding_absorbs_are_no_fixed_point(start: tuple[float, ...], dtype: torch.dtype) -> None:
    """From one unknown, the last Newton step took the rounding of 1 − T′ for a slope."""
    found = bilevel.fixed_point(MAPS["vanishing"], on_failure="ignore").solve(tensor(*start, dtype=dtype))
    assert found.report.status is Status.DIVERGED


@pytest.mark.parametrize("size", [1.0, 100.0])
@pytest.mark.parametrize("delta", [1e-12, 1e-13])
def test_an_error_below_rounding_is_refused_with_one_that_works(delta: float, size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    data, target = torch.randn(30, 4, generator=generator, dtype=F64), torch.randn(30, generator=generator, dtype=F64)
    objective = lambda w, ridge: size**2 * ((data @ w - target) ** 2).sum() / 2 + ridge * (w**2).sum() / 2
    strength, init = tensor(0.01)[0].requires_grad_(), torch.zeros(4, dtype=F64)

    def solve(delta: float) -> Any:
        accuracy = bilevel.Tolerance(delta=delta, strong_convexity=0.01)
        return bilevel.argmin(objective, tolerance=accuracy, on_failure="ignore").solve(init, strength)

    found = solve(delta)
    assert found.report.status is Status.STAGNATED
    assert "rounding" in found.report.message
    named = float(re.search(r"ask for (\S+) ", found.report.message)[1])  # type: ignore[index]
    followed = solve(named)
    assert followed.report.status is Status.CONVERGED
    assert float(followed.report.error_bound) <= named
    hessian_there = size**2 * data.mT @ data + 0.01 * torch.eye(4, dtype=F64)
    right = torch.linalg.solve(hessian_there, size**2 * data.mT @ target)
    assert float((followed.value.detach() - right).norm()) <= named
    followed.value.sum().backward()
    assert bool(torch.isfinite(strength.grad))


# --- Sparse constants, and empty batches ---


@pytest.mark.filterwarnings("ignore:Sparse CS. tensor support")
@pytest.mark.parametrize("layout", ["to_sparse_csr", "to_sparse_csc", "to_sparse_coo"])
def test_second_derivatives_through_a_sparse_constant(layout: str) -> None:
    dense = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    found = []
    for matrix in (dense, getattr(dense, layout)()):
        layer = bilevel.argmin(lambda x, t, A=matrix: ((A @ x - t) ** 2).sum() + 0.1 * (x**4).sum())
        outcome = lambda t, layer=layer: layer(torch.zeros(4, dtype=F64), t).pow(2).sum()
        t = torch.ones(4, dtype=F64)
        found.append(torch.stack([jacrev(jacrev(outcome))(t), hessian(outcome)(t)]))
    torch.testing.assert_close(found[0], found[1], atol=1e-12, rtol=1e-9)


class Ridge(bilevel.BilevelProblem):
    def inner_objective(self, inner: Any, outer: Any, data: Any) -> torch.Tensor:
        return ((inner - outer * data) ** 2).sum()

    def outer_objective(self, inner: Any, outer: Any, data: Any) -> torch.Tensor:
        return (inner**2).sum()


def test_an_empty_batch_of_a_problem_is_refused() -> None:
    problem, nothing = Ridge(batch_dims=0), torch.zeros(0, 2, dtype=F64)
    outer = torch.ones((), dtype=F64)
    for call in (problem, problem.hypergradient):
        with pytest.raises(bilevel.ShapeError, match="at least one problem"):
            call(outer, nothing, init=nothing)
