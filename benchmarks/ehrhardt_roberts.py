"""Our hypergradient bound beside the published one, on the quadratic of Ehrhardt & Roberts.

"Analyzing inexact hypergradients for bilevel learning", IMA Journal of Applied Mathematics 89, 2024, section on least squares:
min_θ ‖A φ*(θ) − b‖² with φ*(θ) = argmin ‖C θ + D φ − e‖², all matrices 1000 × 10 with entries uniform in [0, 1], targets with noise
0.01, at θ = 1. Their a posteriori bound, with constants that are exact here (L_B = L_H = 0), is

    ‖B‖ r_lin/μ + L_B ‖∇F‖ r_in/μ² + ‖B‖ L_F r_in/μ² + L_B L_F r_in²/μ³.

The inner problem is solved by N steps of heavy ball and the adjoint by k steps of conjugate gradients, as in their figures.
"""

from __future__ import annotations

import math

import numpy as np
import torch

import bilevel

F64 = torch.float64
ROWS, SIZE = 1000, 10


class LeastSquares(bilevel.BilevelProblem):
    def inner_objective(self, inner, outer, data):
        _, _, C, D, e = data
        return ((C @ outer + D @ inner - e) ** 2).sum()

    def outer_objective(self, inner, outer, data):
        A, b, *_ = data
        return ((A @ inner - b) ** 2).sum()


def draw(seed: int) -> tuple[torch.Tensor, ...]:
    rng = np.random.RandomState(seed)
    A = rng.uniform(size=(ROWS, SIZE))
    b = A @ rng.uniform(size=SIZE) + 0.01 * rng.normal(size=ROWS)
    C, D = rng.uniform(size=(ROWS, SIZE)), rng.uniform(size=(ROWS, SIZE))
    e = C @ rng.uniform(size=SIZE) + D @ rng.uniform(size=SIZE) + 0.01 * rng.normal(size=ROWS)
    return tuple(torch.tensor(part, dtype=F64) for part in (A, b, C, D, e))


def heavy_ball(steps: int, largest: float, least: float):
    ratio = (math.sqrt(largest) - math.sqrt(least)) / (math.sqrt(largest) + math.sqrt(least))
    lr = 4 / (math.sqrt(largest) + math.sqrt(least)) ** 2
    return bilevel.GradientDescent(lr, steps, momentum=ratio**2)


def main() -> None:
    torch.set_num_threads(1)
    columns = ("true error", "published", "C3", "bound", "publ./true", "publ./C3", "publ./bound")
    print(f"{'N':>4s} {'k':>4s} " + " ".join(f"{column:>11s}" for column in columns))
    ratios, formula, violations = [], [], 0
    for seed in range(5):
        A, b, C, D, e = data = draw(seed)
        theta = torch.ones(SIZE, dtype=F64)
        H, B = 2 * D.T @ D, 2 * D.T @ C
        eigenvalues = torch.linalg.eigvalsh(H)
        mu, l_f = float(eigenvalues[0]), 2 * float(torch.linalg.matrix_norm(A, 2)) ** 2
        exact = torch.linalg.lstsq(D, (e - C @ theta)[:, None]).solution[:, 0]
        true = -B.T @ torch.linalg.solve(H, 2 * A.T @ (A @ exact - b))
        for n in (20, 40, 60, 80, 100):
            for k in (2, 4, 6, 8):
                problem = LeastSquares(
                    solver=heavy_ball(n, float(eigenvalues[-1]), mu),
                    linear_solver=bilevel.CG(max_steps=k),
                    tolerance=bilevel.Tolerance(delta=None, delta_prime=None, strong_convexity=mu * (1 - 1e-12)),
                )
                result = problem.hypergradient(theta, data, init=torch.zeros(SIZE, dtype=F64))
                r_in = float(result.report.forward.residual_norm)
                r_lin = float(result.report.backward.residual_norm)
                published = float(torch.linalg.matrix_norm(B, 2)) * (r_lin / mu + l_f * r_in / mu**2)
                error = float((result.grad - true).norm())
                direct = float(result._certificate.direct.gradient.value.mean())
                assert result.certified
                violations += (error > result.error_bound) + (error > direct) + (error > published)
                if error > 1e-9 * float(true.norm()):
                    ratios.append(published / result.error_bound)
                    formula.append(published / direct)
                if seed == 0:
                    sizes = " ".join(f"{number:11.2e}" for number in (error, published, direct, result.error_bound))
                    compared = " ".join(f"{published / number:11.1f}" for number in (error, direct, result.error_bound))
                    print(f"{n:4d} {k:4d} {sizes} {compared}")
    for name, found in (("C3 by formula", formula), ("the bound", ratios)):
        low, middle, high = np.quantile(found, [0, 0.5, 1])
        print(
            f"published / {name}: least {low:.1f}, median {middle:.1f}, most {high:.1f}, over {len(found)} runs on 5 problems"
        )
    print(f"{violations} violations of any of the three")


if __name__ == "__main__":
    main()
