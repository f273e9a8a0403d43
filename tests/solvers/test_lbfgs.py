"""L-BFGS and its line search."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bilevel
from bilevel.reports import Status
from bilevel.solvers.parts.line_search import line_search

from . import support
from .support import F64, statuses


@given(seed=st.integers(0, 10_000), n=st.integers(1, 8), decades=st.floats(0, 3))
def test_random_strongly_convex_objectives(seed, n, decades):
    generator = torch.Generator().manual_seed(seed)
    h = 10 ** (decades * torch.rand(n, dtype=F64, generator=generator))
    a = torch.randn(n, dtype=F64, generator=generator)

    def objective(x):
        return 0.5 * (h * (x - a) ** 2).sum() + (x - a).cosh().sum()

    outcome = support.minimize(bilevel.LBFGS(), objective, torch.randn(n, dtype=F64, generator=generator))
    assert statuses(outcome) == [Status.CONVERGED]
    torch.testing.assert_close(outcome.x[0], a, atol=1e-8, rtol=0)


@pytest.mark.parametrize("offset", [1e3, 1e6, -1e6])
def test_reaches_rounding_though_values_drown(offset):
    batch = support.logistic()

    def objective(w, X, y, strength):
        return batch.function(w, X, y, strength) + offset

    outcome = support.minimize(bilevel.LBFGS(), objective, batch.init, *batch.args, batched=True)
    assert statuses(outcome) == [Status.CONVERGED] * 3
    torch.testing.assert_close(outcome.x, batch.solution, atol=1e-8, rtol=0)


def test_slow_problem_neither_moves_nor_marks_a_fast_one():
    h = torch.stack([torch.logspace(0, k, 10, dtype=F64) for k in (0.5, 4.0)])

    def objective(x, h):
        return 0.5 * (h * (x - 1) ** 2).sum()

    outcome = support.minimize(bilevel.LBFGS(max_steps=60), objective, torch.zeros(2, 10, dtype=F64), h, batched=True)
    assert statuses(outcome) == [Status.CONVERGED, Status.BUDGET_SPENT]
    assert outcome.iterations[0] < outcome.iterations[1]


def test_history_of_one_suffices_for_a_small_problem():
    outcome = support.rosenbrock().solve(bilevel.LBFGS(history=1), F64)
    assert statuses(outcome) == [Status.CONVERGED] * 4


def test_kink_ends_in_a_failure_not_in_a_loop():
    outcome = support.minimize(
        bilevel.LBFGS(), lambda x: torch.maximum(x, -2 * x).sum(), torch.full((1,), 0.7, dtype=F64)
    )
    assert statuses(outcome) == [Status.KINK]
    assert outcome.iterations.item() < 10


@pytest.mark.parametrize("first", [1e-6, 1.0, 1e6])
def test_line_search_meets_the_wolfe_conditions_from_any_first_step(first):
    a = torch.tensor([1.0, 5.0, 100.0], dtype=F64)
    problem, x = support.build(
        support.ArgminSystem,
        lambda x, a: ((x - a) ** 2).sum() + (x**4).sum(),
        torch.zeros(3, 2, dtype=F64),
        a,
        batched=True,
    )
    value, gradient = problem.value_and_residual(x)
    slope = -(gradient**2).sum(-1)
    zero = torch.zeros(3, dtype=F64)
    active = torch.tensor([True, True, False])
    found = line_search(problem, x, -gradient, value, slope, torch.full((3,), first, dtype=F64), zero, zero, active)
    t = ((found.x - x) * -gradient).sum(-1) / (gradient**2).sum(-1)
    turned = -(found.gradient * gradient).sum(-1)
    assert not bool(found.failed.any())
    assert bool((found.value <= value + 0.1 * t * slope)[:2].all())
    assert bool((turned.abs() <= 0.9 * slope.abs())[:2].all())
    assert torch.equal(found.x[2], x[2])


def test_the_direction_is_that_of_the_dense_inverse_hessian() -> None:
    from bilevel.solvers.lbfgs import _Memory

    generator = torch.Generator().manual_seed(0)
    n = 5
    A = torch.randn(n, n, generator=generator, dtype=torch.float64)
    A = A @ A.T + torch.eye(n, dtype=torch.float64)
    memory = _Memory(3, torch.zeros(1, dtype=torch.float64))
    steps = torch.randn(3, n, generator=generator, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.bool)
    for s in steps:
        memory.store(s[None], (A @ s)[None], one)
    # Nocedal & Wright (6.17): B ← (I − s yᵀ/sᵀy) B (I − y sᵀ/sᵀy) + s sᵀ/sᵀy, from (sᵀy/yᵀy) I of the newest pair.
    eye, newest = torch.eye(n, dtype=torch.float64), A @ steps[-1]
    B = (steps[-1] @ newest) / (newest @ newest) * eye
    for s in steps:
        y = A @ s
        left = eye - torch.outer(s, y) / (s @ y)
        B = left @ B @ left.T + torch.outer(s, s) / (s @ y)
    gradient = torch.randn(1, n, generator=generator, dtype=torch.float64)
    d, slope = memory.direction(gradient, one)
    torch.testing.assert_close(d[0], -B @ gradient[0], atol=1e-11, rtol=1e-10)
    torch.testing.assert_close(slope, (gradient * d).sum(-1))
