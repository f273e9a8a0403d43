"""The first thirty problems of Hock & Schittkowski, from their own starts: minima, and derivatives against central differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bilevel
from tests.constraints.hock_schittkowski import PROBLEMS, HockSchittkowski

# From their starts, these end at another local minimum than the one that the book lists.
OTHER_MINIMUM = {2: 4.9412293}


def layer(problem: HockSchittkowski, **settings: Any) -> bilevel.Layer:
    """Return the layer of (x, tilt), of which ``tilt`` (n,) adds a linear term to f and the sum of it moves constraints."""
    given: dict[str, Any] = {}
    if problem.lower is not None:
        given["lower"] = torch.tensor(problem.lower, dtype=torch.float64)
    if problem.upper is not None:
        given["upper"] = torch.tensor(problem.upper, dtype=torch.float64)
    h, g = problem.h, problem.g
    if h is not None:
        given["equality"] = lambda x, tilt: torch.stack(h(x)) + tilt.sum()
    if g is not None:
        given["inequality"] = lambda x, tilt: -torch.stack(g(x)) + tilt.sum()
    return bilevel.argmin(lambda x, tilt: problem.f(x) + (tilt * x).sum(), **given, **settings)


def start(problem: HockSchittkowski) -> torch.Tensor:
    return torch.tensor(problem.start, dtype=torch.float64)


@pytest.mark.parametrize("number", PROBLEMS)
def test_minimum(number: int) -> None:
    problem = PROBLEMS[number]
    x0 = start(problem)
    solution = layer(problem).solve(x0, torch.zeros_like(x0))
    assert bool(solution.report.converged)
    value = float(problem.f(solution.value))
    expected = OTHER_MINIMUM.get(number, problem.minimum)
    # No multipliers exist at the solution of problem 13, which interior points approach like a root of their barrier parameter.
    assert value == pytest.approx(expected, rel=1e-7, abs=1e-4 if number == 13 else 1e-7)


@pytest.mark.parametrize("number", [1, 5, 7, 10, 12, 14, 18, 19, 22, 23, 28, 29])
def test_derivative(number: int) -> None:
    problem = PROBLEMS[number]
    solve, x0 = layer(problem), start(problem)
    tilt = 0.01 * torch.arange(1, len(x0) + 1, dtype=torch.float64)
    x = solve(x0, tilt)
    found = torch.func.jacrev(lambda t: solve(x, t))(tilt)
    h = 1e-5
    columns = [(solve(x, tilt + h * e) - solve(x, tilt - h * e)) / (2 * h) for e in torch.eye(len(x0), dtype=x0.dtype)]
    torch.testing.assert_close(found, torch.stack(columns, dim=-1), rtol=1e-5, atol=1e-7)


def test_where_no_multipliers_exist_the_derivative_is_refused() -> None:
    problem = PROBLEMS[13]
    x0 = start(problem)
    tilt = torch.zeros_like(x0, requires_grad=True)
    x = layer(problem)(x0, tilt)
    with pytest.raises(bilevel.SolveError, match="no constraint qualification") as caught:
        x.sum().backward()
    assert caught.value.report.status is bilevel.Status.DEGENERATE
