"""Newton's own promises: steps, definiteness, singular systems, large problems."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bilevel
from bilevel.equations.problem import Problem
from bilevel.reports import Status
from bilevel.tolerance import Tolerance

from . import support
from .support import F64, statuses

BOTH = pytest.mark.parametrize("solver", [bilevel.Newton(), bilevel.Newton(dense_limit=0)], ids=["dense", "products"])


@BOTH
def test_quadratic_takes_one_step(solver):
    batch = support.quadratic()
    outcome = batch.solve(solver, F64)
    assert outcome.iterations.tolist() == [1, 1, 1, 1] if solver.dense_limit else bool((outcome.iterations <= 3).all())


def test_quadratic_takes_one_matrix_and_one_gradient(monkeypatch):
    calls = []
    for name in ("linearize", "linearize_dense", "value_and_residual", "value"):
        method = getattr(Problem, name)

        def counted(self, *args, method=method, name=name, **kwargs):
            calls.append(name)
            return method(self, *args, **kwargs)

        monkeypatch.setattr(Problem, name, counted)
    support.quadratic().solve(bilevel.Newton(), F64)
    assert calls == ["linearize_dense", "value_and_residual"]


def test_linear_root_takes_one_step():
    A = torch.tensor([[1.0, 2.0], [-3.0, 1.0]], dtype=F64)
    outcome = support.solve(bilevel.Newton(), support.RootSystem, lambda x: A @ x - 1, torch.zeros(2, dtype=F64))
    assert outcome.iterations.item() == 1
    torch.testing.assert_close(outcome.x[0], torch.linalg.solve(A, torch.ones(2, dtype=F64)))


@BOTH
@pytest.mark.parametrize("start", [[0.0, 0.0], [1.0, 0.0]], ids=["at", "towards"])
def test_saddle_is_reported(solver, start):
    outcome = support.minimize(solver, lambda x: x[0] ** 2 - x[1] ** 2, torch.tensor(start, dtype=F64))
    assert statuses(outcome) == [Status.INDEFINITE]


@BOTH
def test_maximum_is_reported_beside_minima(solver):
    sign = torch.tensor([1.0, -1.0, 2.0], dtype=F64)
    outcome = support.minimize(
        solver, lambda x, sign: sign * (x**2).sum(), torch.zeros(3, 2, dtype=F64), sign, batched=True
    )
    assert statuses(outcome) == [Status.CONVERGED, Status.INDEFINITE, Status.CONVERGED]
    assert outcome.iterations.tolist() == [0, 0, 0]


@BOTH
def test_leaves_the_neighbourhood_of_a_saddle(solver):
    outcome = support.minimize(solver, lambda x: x[0] ** 2 + (x[1] ** 2 - 1) ** 2, torch.tensor([1.0, 1e-3], dtype=F64))
    assert statuses(outcome) == [Status.CONVERGED]
    torch.testing.assert_close(outcome.x[0], torch.tensor([0.0, 1.0], dtype=F64), atol=1e-9, rtol=0)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("start", [0.0, 1.0])
def test_flat_valley_is_a_solution(solver, dtype, start):
    A = torch.randn(3, 6, dtype=F64, generator=torch.Generator().manual_seed(0)).to(dtype)
    outcome = support.minimize(solver, lambda x: ((A @ x - 1) ** 2).sum(), torch.full((6,), start, dtype=dtype))
    assert statuses(outcome) == [Status.CONVERGED]
    assert float((A @ outcome.x[0] - 1).norm()) < 1e4 * torch.finfo(dtype).eps
    assert float(outcome.x.norm()) < 100


def test_linear_objective_fails():
    outcome = support.minimize(bilevel.Newton(), lambda x: x.sum(), torch.zeros(2, dtype=F64))
    assert not statuses(outcome)[0].success


def test_singular_jacobian_is_named():
    def inconsistent(x):
        return torch.stack([x.sum(), x.sum() - 1])

    outcome = support.solve(bilevel.Newton(), support.RootSystem, inconsistent, torch.ones(2, dtype=F64))
    assert statuses(outcome) == [Status.SINGULAR]


def test_singular_but_consistent_equations_are_solved():
    def consistent(x):
        return torch.stack([x.sum() - 1, 2 * x.sum() - 2])

    outcome = support.solve(bilevel.Newton(), support.RootSystem, consistent, torch.ones(2, dtype=F64))
    assert statuses(outcome) == [Status.CONVERGED]


@BOTH
def test_steps_outside_the_domain_are_shortened(solver):
    outcome = support.minimize(solver, lambda x: (x - 2 * x.log()).sum(), torch.tensor([1e-3, 5.0], dtype=F64))
    assert statuses(outcome) == [Status.CONVERGED]
    torch.testing.assert_close(outcome.x[0], torch.full((2,), 2.0, dtype=F64))


@BOTH
def test_offset_of_the_objective_does_not_stop_it(solver):
    outcome = support.minimize(solver, lambda x: 1e6 + (x**4 + (x - 1) ** 2).sum(), torch.full((2,), 3.0, dtype=F64))
    assert statuses(outcome) == [Status.CONVERGED]
    x = outcome.x
    torch.testing.assert_close(4 * x**3 + 2 * (x - 1), torch.zeros_like(x), atol=1e-9, rtol=0)


def test_large_problem_is_solved_by_products():
    n = 1000
    h = torch.logspace(0, 3, n, dtype=F64)
    outcome = support.minimize(
        bilevel.Newton(), lambda x: 0.5 * (h * (x - 1) ** 2).sum() + (x**4).sum() / n, torch.zeros(n, dtype=F64)
    )
    assert statuses(outcome) == [Status.CONVERGED]
    x = outcome.x[0]
    torch.testing.assert_close(h * (x - 1) + 4 * x**3 / n, torch.zeros_like(x), atol=1e-6, rtol=0)


def test_operation_without_a_batching_rule_falls_back_to_products():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        def backward(ctx, cotangent):
            (x,) = ctx.saved_tensors
            return 2 * x * cotangent

    outcome = support.minimize(bilevel.Newton(), lambda x: Square.apply(x - 1).sum(), torch.zeros(3, dtype=F64))
    assert statuses(outcome) == [Status.CONVERGED]
    torch.testing.assert_close(outcome.x[0], torch.ones(3, dtype=F64))


@given(seed=st.integers(0, 10_000), n=st.integers(1, 8), decades=st.floats(0, 6))
def test_random_strongly_convex_quadratics(seed, n, decades):
    generator = torch.Generator().manual_seed(seed)
    V = torch.linalg.qr(torch.randn(n, n, dtype=F64, generator=generator))[0]
    spectrum = 10 ** (decades * torch.rand(n, dtype=F64, generator=generator))
    A = V @ torch.diag(spectrum) @ V.mT
    b = torch.randn(n, dtype=F64, generator=generator)
    start = torch.randn(n, dtype=F64, generator=generator)
    outcome = support.minimize(
        bilevel.Newton(), lambda x: 0.5 * x @ A @ x - b @ x, start, tolerance=Tolerance(strong_convexity=1.0)
    )
    assert statuses(outcome) == [Status.CONVERGED]
    error = float((outcome.x[0] - torch.linalg.solve(0.5 * (A + A.mT), b)).norm())
    assert error <= float(outcome.error_bound) + 1e-9


@BOTH
def test_a_plateau_beyond_the_minimum_is_no_solution(solver):
    # Where the curvature is small a full step lands where exp(-x²) is zero in floating point, and so is the gradient.
    starts = torch.tensor([[0.5], [0.69], [0.7], [0.705]], dtype=F64)
    outcome = support.minimize(solver, lambda x, _: (1 - torch.exp(-(x**2))).sum(), starts, torch.ones(4), batched=True)
    assert statuses(outcome) == [Status.CONVERGED] * 4
    torch.testing.assert_close(outcome.x, torch.zeros_like(starts), rtol=0, atol=1e-7)


@BOTH
def test_a_maximum_that_a_full_step_lands_on_is_no_solution(solver):
    # G = -cos: from here, with positive curvature, Newton's step leads to π.
    start = 0.0
    low, high = 1.0, 1.5
    for _ in range(200):
        start = 0.5 * (low + high)
        low, high = (start, high) if start - math.tan(start) > -math.pi else (low, start)
    outcome = support.minimize(solver, lambda x: -torch.cos(x).sum(), torch.tensor([start], dtype=F64))
    assert statuses(outcome) == [Status.CONVERGED]
    assert abs(math.remainder(float(outcome.x), 2 * math.pi)) < 1e-6


def _double_well(x, a):
    return x[0] ** 4 / 4 - a * x[0] ** 2 / 2 + (x[1] - a) ** 2  # indefinite at 0.25, with a minimum at (1, 1) for a = 1


def _parabola(x, a):
    return torch.stack([x[0] ** 2 - a, x[1] - x[0] ** 2])  # singular where x₀ = 0


@pytest.mark.parametrize(
    ("make", "function", "near"), [(bilevel.argmin, _double_well, 0.25), (bilevel.root, _parabola, 0.0)]
)
def test_a_decomposition_that_fails_spoils_its_own_problem_alone(monkeypatch, make, function, near):
    asked = []

    def failing(matrix, *args, **settings):
        asked.append(matrix.shape)
        raise torch.linalg.LinAlgError("did not converge")

    for name in ("eigh", "eigvalsh", "svd", "svdvals", "pinv"):
        plain, of_unit = getattr(torch.linalg, name), torch.eye(2, dtype=F64)
        monkeypatch.setattr(
            torch.linalg, name,
            lambda m, *args, plain=plain, **s: plain(m, *args, **s) if torch.equal(m, of_unit) else failing(m),
        )  # fmt: skip
    layer = make(function, on_failure="nan")
    start = torch.tensor([[near, 0.5], [2.0, 0.5], [1.5, 3.0]], dtype=F64)
    found = torch.func.vmap(layer, in_dims=(0, None))(start, torch.tensor(1.0, dtype=F64))
    torch.testing.assert_close(found[1:], torch.ones(2, 2, dtype=F64))
    assert asked and bool((found[0].isnan() | (found[0] - 1).abs().lt(1e-8)).all())
