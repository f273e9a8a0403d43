"""Implicit = closed form = unrolled = dense = finite differences, in both modes; and refused where it cannot be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bilevel
from bilevel.testing import check_gradients
from bilevel.testing import strategies as draw
from bilevel.testing.strategies import RandomProblem

from .support import assert_near, flat, implicit, normal, pull, wide

REGULAR = draw.problems(regular=True)
seeds = st.integers(0, 1000)


@given(REGULAR, draw.dtypes(), seeds)
def test_reverse_mode_is_that_of_the_closed_form(problem: RandomProblem, dtype: torch.dtype, seed: int) -> None:
    problem = problem.to(dtype)
    cotangent = normal(flat(problem.init), seed)
    x, gradients = pull(implicit(problem), problem.args, cotangent)
    exact, expected = pull(problem.solution, wide(problem.args), cotangent)
    assert x.dtype == dtype and all(gradient.dtype == dtype for gradient in gradients)
    assert_near([x], [exact], problem.stated_error)
    size = max(float(gradient.norm()) for gradient in expected)
    assert_near(gradients, expected, problem.stated_error, scale=size)


@given(REGULAR, draw.dtypes(), seeds)
def test_forward_mode_is_that_of_the_closed_form(problem: RandomProblem, dtype: torch.dtype, seed: int) -> None:
    problem = problem.to(dtype)
    tangents = tuple(normal(argument, seed + number) for number, argument in enumerate(problem.args))
    _, pushed = torch.func.jvp(implicit(problem), problem.args, tangents)
    _, expected = torch.func.jvp(problem.solution, tuple(wide(problem.args)), tuple(wide(tangents)))
    # The parts of several arguments may cancel: the error is relative to their sizes.
    parts = [
        torch.func.jvp(problem.solution, tuple(wide(problem.args)), only)[1].norm()
        for only in _one_at_a_time(wide(tangents))
    ]
    assert_near([pushed], [expected], problem.stated_error, scale=float(max(parts)))


def _one_at_a_time(tangents: list[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
    return [
        tuple(t if at == number else torch.zeros_like(t) for at, t in enumerate(tangents))
        for number in range(len(tangents))
    ]


@given(draw.problems(regular=True, most=4), draw.dtypes(), seeds)
def test_four_references_agree(problem: RandomProblem, dtype: torch.dtype, seed: int) -> None:
    # The unrolled and differenced derivatives of check_gradients know nothing of the closed form either.
    problem = problem.to(dtype)
    check = check_gradients(problem.layer(), (problem.init, *problem.args), seed=seed)
    assert check.passed, str(check)


@given(st.one_of(draw.ill_conditioned(), draw.badly_scaled()), draw.dtypes(), seeds)
def test_hard_problems_are_right_to_their_condition_or_refused(
    problem: RandomProblem, dtype: torch.dtype, seed: int
) -> None:
    problem = problem.to(dtype)
    cotangent = normal(problem.init, seed)
    try:
        x, gradients = pull(implicit(problem), problem.args, cotangent)
    except bilevel.SolveError:
        # Nothing less than the dtype's own limit excuses it.
        if problem.condition * torch.finfo(dtype).eps < 1e-3:
            raise
        return
    exact, expected = pull(problem.solution, wide(problem.args), cotangent)
    assert_near([x], [exact], problem.stated_error)
    assert_near(gradients, expected, problem.stated_error, scale=max(float(g.norm()) for g in expected))


@given(st.integers(2, 5), st.integers(1, 4), seeds)
def test_a_flat_valley_has_a_solution_and_no_derivative(n: int, rank: int, seed: int) -> None:
    # Convex, and the minimiser is not unique: a point is found, and a gradient is not made up.
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(min(rank, n - 1), n, generator=generator, dtype=torch.float64)
    y = torch.randn(len(X), generator=generator, dtype=torch.float64, requires_grad=True)
    layer = bilevel.argmin(lambda w, y: ((X @ w - y) ** 2).sum())
    w = layer(torch.zeros(n, dtype=torch.float64), y)
    torch.testing.assert_close(X @ w.detach(), y.detach(), atol=1e-8, rtol=1e-8)
    with pytest.raises(bilevel.SolveError):
        torch.autograd.grad(w, y, torch.randn(n, generator=generator, dtype=torch.float64))
