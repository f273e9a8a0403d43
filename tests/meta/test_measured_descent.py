"""Descent by the measured curvature: against a loop in numpy, where fixed steps diverge, and for each task by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import bilevel
from bilevel.meta.measured_descent import MeasuredDescent


def energy(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (0.5 * a * x**2 - b * x).sum() + (0.1 * a * x**4).sum()


def layer(solver: bilevel.InnerSolver) -> Any:
    budget = bilevel.Tolerance(delta=None, delta_prime=None)
    return bilevel.argmin(energy, solver=solver, tolerance=budget, on_failure="ignore")


def reference(a: np.ndarray, b: np.ndarray, lr: float, steps: int, beta: float) -> tuple[np.ndarray, list[float]]:
    """Return the last iterate from 0 and the steps α, written as the docstring has them."""

    def gradient(x: np.ndarray) -> np.ndarray:
        return a * x - b + 0.4 * a * x**3

    x, v, ratios, alphas = np.zeros_like(b), np.zeros_like(b), [], [lr / 20]
    for _ in range(steps):
        v = beta * v - alphas[-1] * gradient(x)
        ratios.append(np.linalg.norm(gradient(x + v) - gradient(x)) / np.linalg.norm(v))
        x = x + v
        largest = max(ratio * 0.9**age for age, ratio in enumerate(reversed(ratios)))
        alphas.append(min(lr, (1 + beta) / largest))
    return x, alphas[:-1]


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_it_is_the_loop_of_its_docstring(beta: float, dtype: torch.dtype, tolerance: float) -> None:
    draw = np.random.default_rng(0)
    a, b = draw.uniform(1, 200, (3, 5)), 50 * draw.standard_normal((3, 5))
    solve = layer(MeasuredDescent(0.02, 9, beta))
    start = torch.zeros(5, dtype=dtype)
    inputs = torch.tensor(a, dtype=dtype), torch.tensor(b, dtype=dtype)
    together = torch.func.vmap(solve, (None, 0, 0))(start, *inputs)
    for number in range(3):
        expected, alphas = reference(a[number], b[number], 0.02, 9, beta)
        assert min(alphas[1:]) < 0.02 and len(set(alphas)) > 3  # steps that were shortened, and not all alike
        alone = solve(start, inputs[0][number], inputs[1][number])
        for found in (alone, together[number]):
            torch.testing.assert_close(found.double().numpy(), expected, rtol=tolerance, atol=tolerance)


def test_it_descends_where_fixed_steps_diverge() -> None:
    a, b = torch.logspace(2, 3, 6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    start = torch.zeros(6, dtype=torch.float64)

    def residual(solver: bilevel.InnerSolver) -> float:
        return float(layer(solver).solve(start, a, b).report.residual_norm)

    assert residual(bilevel.GradientDescent(0.05, 10, momentum=0.5)) > 1e3
    assert residual(MeasuredDescent(0.05, 10, 0.5)) < 0.5 * float(b.norm())


def test_a_start_at_the_minimum_stays_there() -> None:
    zero = torch.zeros(2, dtype=torch.float64)
    solution = layer(MeasuredDescent(0.1, 3)).solve(zero, zero + 1, zero)
    assert solution.value.tolist() == [0.0, 0.0]
    assert bool(solution.report.success)
