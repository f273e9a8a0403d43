"""A given solution: it is checked once, and then differentiated like any other."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from bilevel.equations.problem import Problem
from bilevel.reports import Basis, Status
from bilevel.solvers._base import Goal, InnerSolution, InnerSolver, length
from bilevel.solvers.judging.error import estimate_error, is_dense, residual_rounding
from bilevel.solvers.judging.judge import solve_inner
from bilevel.solvers.judging.outcome import InnerOutcome
from bilevel.tolerance import Target

__all__ = ["GivenAnswer", "check_answer", "compared"]

_WORDS = {
    Status.NOT_CONVERGED: (
        "is no solution: judged by its residual and by Newton's next step, it is more than 1 % off",
        "check that the layer's function is your solver's, with its factors and its intercept; or solve further before you pass the answer, "
        "call the layer with it as init, or say how far off it may be with bilevel.Tolerance(delta=...)",
    )
}
# With no accuracy asked, the relative error of a solution may be this. External optimisers stop at 1e-2 to 1e-6.
_MOST_RELATIVE = 1e-2


@dataclass(frozen=True)
class GivenAnswer(InnerSolver):
    """Return the initial guess, which an external solver found.

    Parameters
    ----------
    own
        The layer's own solver, or None. Its steps are those that :class:`bilevel.Truncated` and its like differentiate.
    """

    own: InnerSolver | None = None

    @property
    def name(self) -> str:
        return "the answer given"

    def solve(self, problem: Problem, init: torch.Tensor, goal: Goal) -> InnerSolution:
        residual = problem.value_and_residual(init, last=True)[1] if problem.minimizes else problem.residual(init)
        steps = torch.zeros(len(init), dtype=torch.int64, device=init.device)
        return InnerSolution(init, steps, torch.full_like(steps, Status.NOT_CONVERGED), residual)


def check_answer(problem: Problem, x: torch.Tensor, target: Target) -> InnerOutcome:
    """Judge ``x`` (batch, n) as a solution. With no accuracy asked it costs one residual, and a factorisation where n is small.

    With no accuracy asked, x passes if ‖R(x)‖ ≤ 0.01 max(‖R(0)‖, ‖∂R x‖), about 1 % of x: an external optimiser may
    have stopped early. R(0) does not count where it is not finite, as that of a logarithm. A residual does not see an error
    along directions of small curvature, so a Jacobian that is small is factorised for Newton's next step. With δ or ``rtol``
    x is judged like the results of our own solvers.
    """
    if target.asked or not x.numel():
        return solve_inner(GivenAnswer(), problem, x, target)
    slot = problem.linearization_slot
    linear = problem.linearize(x, None if slot is None else slot.needs_grad)
    if slot is not None:
        slot.linearization = linear
    residual = linear.residual.detach()
    norm = length(residual)
    sizes = torch.stack([length(linear.operator.matvec(x)), length(problem.residual(torch.zeros_like(x)))])
    threshold = _MOST_RELATIVE * sizes.nan_to_num(0.0, 0.0).amax(0)
    codes = torch.full(norm.shape, int(Status.NOT_CONVERGED), dtype=torch.int64, device=norm.device)
    codes = torch.where(norm <= threshold, torch.full_like(codes, Status.CONVERGED), codes)
    codes = torch.where(torch.isfinite(norm), codes, torch.full_like(codes, Status.NOT_FINITE))
    codes, factor = _by_step(problem, x, residual, codes)
    mu = target.strong_convexity
    bound = torch.full_like(norm, float("nan")) if mu is None else norm / mu
    basis = Basis.RESIDUAL if mu is None else Basis.CERTIFIED
    steps = torch.zeros_like(codes)
    return InnerOutcome(
        x, codes, steps, norm, threshold, bound, basis, residual, factor, factor is not None, GivenAnswer().name, words=_WORDS
    )  # fmt: skip


def _by_step(
    problem: Problem, x: torch.Tensor, residual: torch.Tensor, codes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return ``codes`` (batch,) with NOT_CONVERGED where Newton's next step from ``x`` is long, and Cholesky factors of ∂R, if found."""
    near = codes == Status.CONVERGED
    if not is_dense(problem) or not bool(near.any()):
        return codes, None
    found = estimate_error(problem, x, residual, near)
    far = near & ~(found.error.abs().amax(dim=-1) <= _MOST_RELATIVE * x.abs().amax(dim=-1))
    if bool(far.any()):  # the rounding of R in a flat direction is no error
        far = far & (length(residual) > length(residual_rounding(problem, x, residual)))
    return torch.where(far, int(Status.NOT_CONVERGED), codes), found.factor


def compared(outcome: InnerOutcome, given: torch.Tensor) -> InnerOutcome:
    """Return ``outcome``, a solve of a problem with a structure from the answer ``given`` (batch, n), with NOT_CONVERGED where that is far off."""
    n = given.shape[-1]
    if not outcome.x.numel() or not n:
        return outcome
    off = (outcome.x[:, :n] - given).abs().amax(dim=-1)
    far = (outcome.status == Status.CONVERGED) & ~(off <= _MOST_RELATIVE * (1 + outcome.x[:, :n].abs().amax(dim=-1)))
    if not bool(far.any()):
        return outcome
    which = int(far.nonzero()[0])
    words = {
        Status.NOT_CONVERGED: (
            f"is no solution: the solution found from it is {float(off[which]):.2g} away",
            "solve further before you pass the answer, or call the layer with it as init",
        )
    }
    status = torch.where(far, int(Status.NOT_CONVERGED), outcome.status)
    return replace(outcome, status=status, words={**outcome.words, **words}, solver=GivenAnswer().name)
