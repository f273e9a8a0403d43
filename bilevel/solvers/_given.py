"""An answer that is already there: checked once, and then differentiated as any other."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel.equations.problem import Problem
from bilevel.reports import Basis, Status
from bilevel.solvers._base import Goal, InnerSolution, InnerSolver, length
from bilevel.solvers._judge import InnerOutcome, solve_inner
from bilevel.tolerance import Target

__all__ = ["GivenAnswer", "check_answer"]

_WORDS = {
    Status.NOT_CONVERGED: (
        "is no solution: its residual is more than 1 % of that of an answer of its size",
        "solve further before you pass the answer, call the layer with it as init, or say how far off it may be with bilevel.Tolerance(delta=...)",
    )
}
# With no accuracy asked, an answer may be as far off as this part of itself, as its residual tells. Optimisers of others stop at 1e-2 to 1e-6.
_MOST_RELATIVE = 1e-2


@dataclass(frozen=True)
class GivenAnswer(InnerSolver):
    """Return the start, which somebody else's solver found."""

    @property
    def name(self) -> str:
        return "the answer given"

    def solve(self, problem: Problem, init: torch.Tensor, goal: Goal) -> InnerSolution:
        residual = problem.value_and_residual(init, last=True)[1] if problem.minimizes else problem.residual(init)
        steps = torch.zeros(len(init), dtype=torch.int64, device=init.device)
        return InnerSolution(init, steps, torch.full_like(steps, Status.NOT_CONVERGED), residual)


def check_answer(problem: Problem, x: torch.Tensor, target: Target) -> InnerOutcome:
    """Judge ``x`` (batch, n) as a solution, by one residual where no accuracy was asked.

    With nothing chosen an answer passes if ‖R(x)‖ ≤ 0.01 max(‖R(0)‖, ‖∂R x‖), about 1 % of x: an optimiser of somebody else's may have stopped
    early. With δ or ``rtol`` asked it is judged as an answer of our own solvers.
    """
    if target.asked or not x.numel():
        return solve_inner(GivenAnswer(), problem, x, target)
    slot = problem.linearization_slot
    linear = problem.linearize(x, None if slot is None else slot.needs_grad)
    if slot is not None:
        slot.linearization = linear
    residual = linear.residual.detach()
    norm = length(residual)
    size = torch.maximum(length(linear.operator.matvec(x)), length(problem.residual(torch.zeros_like(x))))
    threshold = _MOST_RELATIVE * size.nan_to_num(0.0, 0.0)
    codes = torch.full(norm.shape, int(Status.NOT_CONVERGED), dtype=torch.int64, device=norm.device)
    codes = torch.where(norm <= threshold, torch.full_like(codes, Status.CONVERGED), codes)
    codes = torch.where(torch.isfinite(norm), codes, torch.full_like(codes, Status.NOT_FINITE))
    mu = target.strong_convexity
    bound = torch.full_like(norm, float("nan")) if mu is None else norm / mu
    basis = Basis.RESIDUAL if mu is None else Basis.CERTIFIED
    steps = torch.zeros_like(codes)
    return InnerOutcome(
        x, codes, steps, norm, threshold, bound, basis, residual, solver=GivenAnswer().name, words=_WORDS
    )
