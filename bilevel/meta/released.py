"""What the authors' released code does in place of the paper's Algorithms 1 and 2, as a pair of solvers.

Two differences from the paper. The inner solve descends on the task's loss L̂ *without* the proximal term, and takes one
step on the proximal term alone at the end. The linear system is ((1 + c) I + H / (λ + d)) g = ∇L with c = 1 and
d = 10, in place of (I + H / λ) g = ∇L.

Facts from the code that Rajeswaran, Finn, Kakade, Levine published beside "Meta-Learning with Implicit Gradients" (2019).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import bilevel

__all__ = ["ReleasedDescent", "ReleasedLinearSolve"]


@dataclass(frozen=True)
class ReleasedDescent(bilevel.InnerSolver):
    """φ ← φ − α∇L̂(φ) for ``max_steps`` steps from θ, then φ ← φ − αλ(φ − θ) once.

    Parameters
    ----------
    lr
        α.
    max_steps
        Steps on L̂.
    lam
        λ of the proximal term, which is in the objective and is taken out here.
    """

    lr: float
    max_steps: int
    lam: float

    def solve(self, problem: bilevel.Problem, init: torch.Tensor, goal: bilevel.Goal) -> bilevel.InnerSolution:
        """Descend from ``init``, which is θ; no accuracy is aimed for."""
        x = init
        for _ in range(self.max_steps):
            x = x - self.lr * (problem.residual(x) - self.lam * (x - init))
        x = x - self.lr * self.lam * (x - init)
        steps = torch.full((len(init),), self.max_steps + 1, dtype=torch.int64, device=init.device)
        return bilevel.InnerSolution(x, steps, torch.full_like(steps, bilevel.Status.MAX_STEPS))


@dataclass(frozen=True)
class ReleasedLinearSolve:
    """Conjugate gradients on ((1 + c) I + H / (λ + d)) g = ∇L, returned as the adjoint q = g / λ of the library's rule.

    The operator that comes is H + λI. Multiplied by λ + d the system is (H + λI + s I) g = (λ + d) ∇L with
    s = (1 + c)(λ + d) − λ: the same Krylov spaces, so that the same number of steps gives the same g.

    Parameters
    ----------
    max_steps
        Of conjugate gradients.
    lam, c, d
        λ, and the two additions.
    """

    max_steps: int
    lam: float
    c: float = 1.0
    d: float = 10.0

    def __call__(self, operator: Any, rhs: torch.Tensor) -> torch.Tensor:
        """Return q for ∇L = ``rhs`` (T, n)."""
        shift = (1 + self.c) * (self.lam + self.d) - self.lam
        damped = bilevel.operators.DampedOperator(operator, shift)
        budget = bilevel.Tolerance(delta=None, delta_prime=None)
        g = (self.lam + self.d) * bilevel.CG(max_steps=self.max_steps)(damped, rhs, budget)
        return g / self.lam
