"""Gradient descent whose steps follow the curvature that it meets: how ``bilevel imaml`` adapts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import bilevel

__all__ = ["MeasuredDescent"]

_PROBE = 0.05
_FORGET = 0.9


@dataclass(frozen=True)
class MeasuredDescent(bilevel.InnerSolver):
    """Heavy-ball descent v ← β v − α ∇G(x), x ← x + v, with α = min(``lr``, (1 + β) / L) for each task by itself.

    L is the largest of the ratios ‖∇G(x') − ∇G(x)‖ / ‖x' − x‖ of the steps so far, of which an older one counts 0.9 for each step
    since. The ratios cost no evaluation. The ball is stable on a quadratic with α < 2 (1 + β) / L: half of that leaves room for a ratio
    that is below the largest curvature. The first step, which has no ratio to go by, is of ``lr`` / 20.

    Parameters
    ----------
    lr
        The longest step.
    max_steps
        The number of steps.
    momentum
        β in [0, 1).

    References
    ----------
    The ratio as an estimate of curvature: Malitsky, Mishchenko, "Adaptive gradient descent without descent", ICML 2020. The heavy ball: Polyak,
    "Some methods of speeding up the convergence of iteration methods", 1964.
    """

    lr: float
    max_steps: int
    momentum: float = 0.0

    def solve(self, problem: bilevel.Problem, init: torch.Tensor, goal: bilevel.Goal) -> bilevel.InnerSolution:
        """Make ``max_steps`` steps from ``init`` (T, n)."""
        x, (value, gradient) = init, problem.value_and_residual(init)
        alpha = torch.full_like(gradient[:, 0], _PROBE * self.lr)
        curvature, velocity = torch.zeros_like(alpha), torch.zeros_like(init)
        for number in range(self.max_steps):
            velocity = torch.addcmul(self.momentum * velocity, gradient, alpha.unsqueeze(-1), value=-1)
            x, before = x + velocity, gradient
            value, gradient = problem.value_and_residual(x, last=number == self.max_steps - 1)
            ratio = (gradient - before).norm(dim=-1) / velocity.norm(dim=-1)
            curvature = torch.fmax(_FORGET * curvature, ratio)
            alpha = ((1 + self.momentum) / curvature).clamp(max=self.lr)
        steps = torch.full((len(init),), self.max_steps, device=init.device)
        status = torch.full_like(steps, int(bilevel.Status.MAX_STEPS))
        return bilevel.InnerSolution(x, steps, status, gradient, value)
