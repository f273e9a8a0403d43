"""The functions of the random problems, a family each: plain torch, in the dtype of their arguments."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

import bilevel
from bilevel.testing._random_problems import RandomProblem


def quadratic(x: torch.Tensor, A: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return 0.5 * x @ A @ x - b @ x


def well(x: torch.Tensor, A: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    # Strictly convex around A⁻¹(b + c): a quadratic, a quartic and log cosh of the distance from there.
    away = A @ x - b - c
    return 0.5 * away @ away + 0.25 * (away**4).sum() + (away + torch.nn.functional.softplus(-2 * away)).sum()


def pseudo_huber(x: torch.Tensor, A: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    return (1 + (A @ x - b - c) ** 2).sqrt().sum()


def wells(x: torch.Tensor, Q: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    # Each coordinate of Qx has wells at ±a and a maximum between.
    return 0.25 * (((Q @ x) ** 2 - a**2) ** 2).sum()


def curved(x: torch.Tensor, A: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    # Monotone along each row, and A far from symmetric.
    away = A @ x - b - c
    return away + away**3


def skewed(x: torch.Tensor, M: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    # The fixed point is b + c; ∂T = M diag(1 − tanh²) there is M.
    return M @ torch.tanh(x - b - c) + b + c


def linear_solution(A: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    return torch.linalg.solve(A, b + c)


def measured(problem: RandomProblem) -> RandomProblem:
    """Return the problem, of a vector, with its ``reach``."""
    x, init = problem.solution(*problem.args), problem.init
    residual = torch.func.grad(problem.function) if problem.make is bilevel.argmin else problem.function
    made: Any = torch.func.jvp(lambda at: residual(at, *problem.args), (x,), (x - init,))
    expected = float(made[1].norm())
    return replace(problem, reach=max(1.0, float(residual(init, *problem.args).norm()) / max(expected, 1e-300)))
