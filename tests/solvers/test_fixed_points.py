"""Anderson acceleration and plain iteration."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bilevel
from bilevel.reports import Status

from . import support
from .support import F64, FixedPointSystem, statuses


def fixed_point(solver, mapping, init, *args, **how):
    return support.solve(solver, FixedPointSystem, mapping, init, *args, **how)


@pytest.mark.parametrize("solver", [bilevel.Anderson(), bilevel.FixedPointIteration()], ids=repr)
def test_mapping_without_a_fixed_point_diverges(solver):
    outcome = fixed_point(solver, lambda x: x**2 + 2, torch.zeros(3, dtype=F64))
    assert statuses(outcome) == [Status.DIVERGED]
    assert bool(torch.isfinite(outcome.x).all())


def test_expanding_mapping_diverges_by_iteration_and_not_by_acceleration():
    args = (lambda x: 2 * x + 1, torch.zeros(3, dtype=F64))
    assert statuses(fixed_point(bilevel.FixedPointIteration(), *args)) == [Status.DIVERGED]
    accelerated = fixed_point(bilevel.Anderson(), *args)
    torch.testing.assert_close(accelerated.x[0], -torch.ones(3, dtype=F64))


def test_damping_tames_an_oscillation():
    args = (lambda x: 1 - 1.5 * x, torch.zeros(2, dtype=F64))
    assert statuses(fixed_point(bilevel.FixedPointIteration(), *args)) == [Status.DIVERGED]
    assert statuses(fixed_point(bilevel.FixedPointIteration(damping=0.5), *args)) == [Status.CONVERGED]


def test_linear_mapping_is_solved_in_as_many_steps_as_unknowns():
    n = 6
    M = torch.randn(n, n, dtype=F64, generator=torch.Generator().manual_seed(0))
    M = 0.9 * M / torch.linalg.matrix_norm(M, 2)
    outcome = fixed_point(bilevel.Anderson(history=n), lambda x: M @ x + 1, torch.zeros(n, dtype=F64))
    assert statuses(outcome) == [Status.CONVERGED]
    assert outcome.iterations.item() <= n + 2
    torch.testing.assert_close(outcome.x[0], torch.linalg.solve(torch.eye(n, dtype=F64) - M, torch.ones(n, dtype=F64)))


def test_acceleration_at_contraction_near_one():
    n, batch = 32, 8
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(n, n, dtype=F64, generator=generator)
    W = 0.5 * (W + W.mT)
    W = 0.99 * W / torch.linalg.matrix_norm(W, 2)
    c = 0.1 * torch.randn(batch, n, dtype=F64, generator=generator)
    args = (lambda x, c: torch.tanh(W @ x + c), torch.zeros(batch, n, dtype=F64), c)
    fast = fixed_point(bilevel.Anderson(), *args, batched=True)
    slow = fixed_point(bilevel.FixedPointIteration(), *args, batched=True)
    assert statuses(fast) == statuses(slow) == [Status.CONVERGED] * batch
    torch.testing.assert_close(fast.x, slow.x, atol=1e-8, rtol=0)
    assert int(fast.iterations.max()) * 4 < int(slow.iterations.max())


def test_one_evaluation_for_each_step():
    calls = []

    def mapping(x):
        calls.append(1)
        return torch.cos(x)

    outcome = fixed_point(
        bilevel.Anderson(), mapping, torch.zeros(4, dtype=F64), tolerance=bilevel.Tolerance(delta=1e-8)
    )
    assert len(calls) == outcome.iterations.item() + 1


@given(seed=st.integers(0, 10_000), n=st.integers(1, 8), factor=st.floats(0.05, 0.95), history=st.integers(1, 10))
def test_random_contractions(seed, n, factor, history):
    generator = torch.Generator().manual_seed(seed)
    M = torch.randn(n, n, dtype=F64, generator=generator)
    M = factor * M / torch.linalg.matrix_norm(M, 2)
    c = torch.randn(n, dtype=F64, generator=generator)
    outcome = fixed_point(
        bilevel.Anderson(history=history), lambda x: torch.tanh(M @ x) + c, torch.zeros(n, dtype=F64),
        tolerance=bilevel.Tolerance(delta=1e-9, strong_convexity=1 - factor),
    )  # fmt: skip
    assert statuses(outcome) == [Status.CONVERGED]
    x = torch.zeros(n, dtype=F64)
    for _ in range(600):
        x = torch.tanh(M @ x) + c
    assert float((outcome.x[0] - x).norm()) <= float(outcome.error_bound) + 1e-12
