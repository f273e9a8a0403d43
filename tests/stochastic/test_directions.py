"""With full batches and small steps every method's outer direction tends to the implicit hypergradient."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch

import bilevel
from bilevel import stochastic
from tests.stochastic.problems import SGD, Quadratic, Recorder

LONG = {"terms": 20, "neumann_rate": 0.7}
METHODS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "SOBA": (stochastic.SOBA, {}, 250),
    "MASOBA": (stochastic.MASOBA, {"weight": 0.2}, 250),
    "SABA": (stochastic.SABA, {}, 250),
    "SRBA": (stochastic.SRBA, {"period": 7}, 250),
    "AmIGO": (stochastic.AmIGO, {}, 25),
    "StocBiO": (stochastic.StocBiO, LONG, 18),
    "MRBO": (stochastic.MRBO, LONG, 180),
    "VRBO": (stochastic.VRBO, LONG, 60),
    "PZOBO": (stochastic.PZOBO, {"inner_steps": 170, "directions": 3, "orthogonal": True}, 1),
    "ImplicitStep, gradient steps": (stochastic.ImplicitStep, {}, 50),
    "ImplicitStep, CG": (stochastic.ImplicitStep, {"linear_solver": bilevel.CG()}, 35),
    "ImplicitStep, Neumann": (stochastic.ImplicitStep, {"linear_solver": bilevel.Neumann(terms=40, step=0.5)}, 35),
    "ImplicitStep, a function": (
        stochastic.ImplicitStep,
        {"linear_solver": lambda operator, rhs: torch.linalg.solve(operator.dense(), rhs)},
        35,
    ),
    "ImplicitStep, preconditioned": (
        stochastic.ImplicitStep,
        {"linear_solver": bilevel.CG(), "preconditioned": True},
        35,
    ),
}


def in_two_dtypes() -> Iterator[Any]:
    """Yield all methods in float64, and in float32 one in three; all with ``--long``."""
    for number, name in enumerate(METHODS):
        yield pytest.param(name, torch.float64, id=f"{name}-float64")
        yield pytest.param(name, torch.float32, id=f"{name}-float32", marks=[pytest.mark.long] if number % 3 else [])


@pytest.mark.parametrize(("name", "dtype"), [*in_two_dtypes()])
def test_the_direction_tends_to_the_hypergradient(name: str, dtype: torch.dtype) -> None:
    make, settings, steps = METHODS[name]
    problem = Quadratic.random(dtype=dtype)
    z, x = torch.zeros(5, dtype=dtype), torch.tensor([0.3, -0.5, 0.8], dtype=dtype)
    method = make(problem.losses, z, x, inner_optimizer=SGD, outer_optimizer=Recorder, **settings)
    for _ in range(steps):
        result = method.step(problem.all, problem.all)
    expected = problem.hypergradient(x.detach())
    (direction,) = method.outer_optimizer.direction
    rtol = 1e-6 if dtype == torch.float64 else 3e-4
    torch.testing.assert_close(direction, expected, rtol=rtol, atol=rtol)
    torch.testing.assert_close(result.hypergradient_norm, expected.norm(), rtol=rtol, atol=rtol)
    torch.testing.assert_close(z.detach(), problem.solution(x.detach()), rtol=rtol, atol=rtol)


def test_the_reference_is_that_of_the_library() -> None:
    problem = Quadratic.random()

    class Problem(bilevel.BilevelProblem):
        inner_objective = staticmethod(problem.inner_objective)
        outer_objective = staticmethod(problem.outer_objective)

    x = torch.tensor([0.3, -0.5, 0.8], dtype=torch.float64)
    found = Problem().hypergradient(x, problem.all, init=torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(found.grad, problem.hypergradient(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(problem.hypergradient(problem.best()), torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("make", [stochastic.TTSA, stochastic.ALSET])
def test_the_random_neumann_term_is_right_in_the_mean(make: Any) -> None:
    problem = Quadratic.random()
    x = torch.tensor([0.3, -0.5, 0.8], dtype=torch.float64)
    z = problem.solution(x).requires_grad_()
    method = make(
        problem.losses,
        z,
        x.requires_grad_(),
        inner_optimizer=SGD,
        outer_optimizer=Recorder,
        max_terms=40,
        neumann_rate=0.7,
    )
    # The expectation is a mean over the 40 equally likely powers: each is asked for once.
    seen = torch.zeros(3, dtype=torch.float64)
    powers = iter(range(40))
    randint = torch.randint
    try:
        torch.randint = lambda *args, **kwargs: torch.tensor(next(powers))  # type: ignore[assignment]
        for _ in range(40):
            method.step(problem.all, problem.all)
            seen += method.outer_optimizer.direction[0] / 40
    finally:
        torch.randint = randint
    torch.testing.assert_close(seen, problem.hypergradient(x.detach()), rtol=1e-6, atol=1e-6)


def f2sa_bias(penalty: float) -> float:
    problem = Quadratic.random()
    x = torch.tensor([0.3, -0.5, 0.8], dtype=torch.float64)
    method = stochastic.F2SA(
        problem.losses, torch.zeros(5, dtype=torch.float64), x, inner_optimizer=SGD, outer_optimizer=Recorder,
        inner_steps=150, penalty=penalty, penalty_increment=0.0,
    )  # fmt: skip
    method.step(problem.all, problem.all)
    return float((method.outer_optimizer.direction[0] - problem.hypergradient(x.detach())).norm())


def test_the_bias_of_f2sa_falls_as_one_over_the_penalty() -> None:
    biases = [f2sa_bias(penalty) for penalty in (10.0, 100.0, 1000.0)]
    assert biases[0] > 1e-3
    for first, second in pairwise(biases):
        assert 8 < first / second < 12


def test_bome_moves_along_the_hypergradient_in_one_dimension() -> None:
    """With scalars G = ½ h z² + b z x and F: the tangent direction is −dF/dx times h² / (h² + b²)."""
    h, b = 2.0, 0.7
    losses = (
        lambda z, x, data: (0.5 * h * z**2 + b * z * x).sum(),
        lambda z, x, data: ((z - 1.0) ** 2 + 0.1 * x**2).sum(),
    )
    x = torch.tensor([0.5], dtype=torch.float64)
    start = -b / h * x + 1e-7
    method = stochastic.BOME(
        losses, start.detach().clone(), x, inner_optimizer=SGD, outer_optimizer=Recorder, inner_steps=150
    )
    method.step(None, None)
    z = -b / h * x.detach()
    hypergradient = 0.2 * x.detach() - b * 2 * (z - 1.0) / h
    torch.testing.assert_close(
        method.outer_optimizer.direction[0], hypergradient * h**2 / (h**2 + b**2), rtol=1e-5, atol=1e-6
    )


ROAD: dict[str, tuple[Any, dict[str, Any], int, float]] = {
    "SOBA": (stochastic.SOBA, {}, 600, 1e-5),
    "VRBO": (stochastic.VRBO, {"terms": 20, "neumann_rate": 0.7, "inner_steps": 1}, 300, 1e-5),
    "BOME": (stochastic.BOME, {"inner_steps": 10}, 400, 0.05),  # it circles around the solution at constant rates
}


@pytest.mark.parametrize("name", ROAD)
def test_full_batches_lead_to_the_solution(name: str) -> None:
    make, settings, steps, tolerance = ROAD[name]
    problem = Quadratic.random()
    z, x = torch.zeros(5, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    method = make(problem.losses, z, x, inner_optimizer=SGD, outer_optimizer=SGD, **settings)
    for _ in range(steps):
        method.step(problem.all, problem.all)
    torch.testing.assert_close(x.detach(), problem.best(), rtol=tolerance, atol=tolerance)
    assert problem.best().norm() > 5 * tolerance
