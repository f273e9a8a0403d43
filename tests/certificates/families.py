"""Problems with a reference: random ones with a chosen condition number, and errors measured against dense float64 solves."""

from __future__ import annotations

import math

import torch

import bilevel
from bilevel.certificates import logistic_constants, squares_constants

F64 = torch.float64


class Ridge(bilevel.BilevelProblem):
    """Least squares with a strength for each feature; the constants that are not declared are those of quadratics."""

    def inner_objective(self, inner, outer, data):
        X, y, _, _ = data
        return 0.5 * ((X @ inner - y) ** 2).mean() + 0.5 * (outer.exp() * inner**2).sum()

    def outer_objective(self, inner, outer, data):
        _, _, X, y = data
        return 0.5 * ((X @ inner - y) ** 2).mean()


class Logistic(Ridge):
    """Logistic regression with a strength for each feature, constants declared."""

    def inner_objective(self, inner, outer, data):
        X, y, _, _ = data
        margins = y.sign() * (X @ inner)
        return torch.logaddexp(-margins, margins.new_zeros(())).mean() + 0.5 * (outer.exp() * inner**2).sum()

    def constants(self, outer, data):
        X, _, Xv, _ = data
        return bilevel.Constants(
            strong_convexity=outer.double().exp().min() * (1 - 1e-12),
            outer_smoothness=squares_constants(Xv.double()).smoothness,
            hessian_lipschitz=logistic_constants(X.double()).hessian_lipschitz,
            cross_lipschitz=outer.double().exp().max() * (1 + 1e-12),
            outer_cross_lipschitz=0.0,
        )


def draw(seed: int, log_condition: float = 2.0, n: int = 5, rows: int = 20) -> tuple[torch.Tensor, tuple]:
    """Return θ (n,) and (X, y, Xv, yv), X's squared singular values spread over 10^log_condition."""
    generator = torch.Generator().manual_seed(seed)

    def design() -> torch.Tensor:
        u, _, v = torch.linalg.svd(torch.randn(rows, n, generator=generator, dtype=F64), full_matrices=False)
        return math.sqrt(rows) * (u * torch.logspace(0, -log_condition / 2, n, dtype=F64)) @ v

    X, Xv = design(), design()
    y, yv = (torch.randn(rows, generator=generator, dtype=F64) for _ in range(2))
    theta = -log_condition - 1 + 2 * torch.rand(n, generator=generator, dtype=F64)
    return theta, (X, y, Xv, yv)


def truth(problem: bilevel.BilevelProblem, theta: torch.Tensor, data: tuple, start: torch.Tensor):
    """Return φ*, q*, g and F(φ*) by Newton's method and dense solves in float64, written out."""
    theta, start = theta.double(), start.double()
    data = tuple(t.double() for t in data)

    def inner(phi, theta):
        return problem.inner_objective(phi, theta, data)

    phi = start
    for _ in range(60):
        step = torch.linalg.solve(torch.func.hessian(inner)(phi, theta), torch.func.grad(inner)(phi, theta))
        size = 1.0
        while size > 1e-6 and inner(phi - size * step, theta) > inner(phi, theta) + 1e-15:
            size /= 2
        phi = phi - size * step
        if float(step.norm()) <= 1e-14 * float(phi.norm()):
            break
    v, direct = torch.func.grad(problem.outer_objective, argnums=(0, 1))(phi, theta, data)
    q = torch.linalg.solve(torch.func.hessian(inner)(phi, theta), v)
    cross = torch.func.jacrev(torch.func.grad(inner), argnums=1)(phi, theta)
    return phi, q, direct - q @ cross, problem.outer_objective(phi, theta, data)


def excess(result: bilevel.Hypergradient, true: tuple) -> list[float]:
    """Return error − bound of φ, q, g and F(φ*)."""
    phi, q, g, value = true
    return [
        float((result.inner.double() - phi).norm()) - result.inner_bound.value,
        float((result.adjoint.double() - q).norm()) - result.adjoint_bound.value,
        float((result.grad.double() - g).norm()) - result.bound.value,
        float((result.corrected_value.double() - value).abs()) - result.value_bound.value,
    ]
