"""Conjugate gradients that damp the tasks whose curvature is negative: what :class:`bilevel.IMAML` takes where no linear solver is given."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import bilevel

__all__ = ["SafeguardedCG"]

_POWERS = 4
_PARTS = (1 / 64, 1 / 16, 1 / 4, 1.0)


@dataclass(frozen=True)
class SafeguardedCG(bilevel.LinearSolver):
    """Conjugate gradients on H + λI; on H + (λ + γ)I, with γ > 0, for each task where H + λI is not positive definite.

    A few steps of adaptation rarely end at a minimum, and the loss of a network with kinks may have negative curvature even there.
    Conjugate gradients break down on such a task. γ begins at 1/64 of an estimate of ‖A‖, A = H + λI, and is multiplied by four until
    they do not: four products for the estimate, and as many steps again for each try. Where no task has negative curvature nothing is
    added, and the numbers are those of :class:`bilevel.CG`. The residual in the report is that of the system without damping.

    A task is reported as indefinite, and not damped, where an accuracy was asked for, since the answer would be another problem's;
    and where γ = ‖A‖ does not help: its negative curvature is as strong as the positive, as at a maximum.

    Parameters
    ----------
    max_steps
        Steps of each solve.

    References
    ----------
    Damping where curvature is negative: Martens, "Deep learning via Hessian-free optimization", ICML 2010, section 4.1.
    """

    max_steps: int = 5

    @property
    def name(self) -> str:
        """The name used in messages and reports."""
        return "CG, damped where curvature is negative,"

    def solve(
        self,
        operator: bilevel.LinearOperator,
        rhs: torch.Tensor,
        threshold: torch.Tensor,
        start: torch.Tensor | None = None,
    ) -> bilevel.LinearSolution:
        """Return ``max_steps`` steps of conjugate gradients for each task of ``rhs`` (T, n)."""
        cg = bilevel.CG(max_steps=self.max_steps)
        found = cg.solve(operator, rhs, threshold, start)
        bent = _is_bent(operator, found, rhs)
        if not bool(bent.any()) or bool((threshold > 0).any()):
            return found
        x, iterations, status = found.x, found.iterations, found.status
        size = _norm(operator, rhs)
        for part in _PARTS:
            damping = torch.where(bent, part * size, torch.zeros_like(size))
            damped = bilevel.operators.DampedOperator(operator, damping)
            tried = cg.solve(damped, rhs, threshold)
            sound = bent & ~_is_bent(damped, tried, rhs)
            x = torch.where(sound.unsqueeze(-1), tried.x, x)
            iterations = torch.where(bent, iterations + tried.iterations, iterations)
            status = torch.where(sound, tried.status, status)
            bent = bent & ~sound
            if not bool(bent.any()):
                break
        # The residual that CG may hand on is that of a damped system: the true one is for the judge to compute.
        return bilevel.LinearSolution(x, iterations, status)


def _norm(operator: bilevel.LinearOperator, start: torch.Tensor) -> torch.Tensor:
    """Return an estimate of each ‖A‖ (T,) from below, by the power method."""
    v = start
    for _ in range(_POWERS):
        v = operator.matvec(v / v.norm(dim=-1, keepdim=True))
    return v.norm(dim=-1)


def _is_bent(operator: bilevel.LinearOperator, found: bilevel.LinearSolution, rhs: torch.Tensor) -> torch.Tensor:
    """Return the tasks (T,) in which conjugate gradients met curvature that is not positive, before A x = b was solved."""
    bent = (found.status == bilevel.Status.INDEFINITE) | (found.status == bilevel.Status.SINGULAR)
    flat = found.status == bilevel.Status.MINIMUM_NORM
    if not bool(flat.any()):
        return bent
    # Conjugate gradients end so wherever curvature vanishes, and leave it to the residual whether that was at a solution:
    # the one that AUTO stands for, by which the report is judged too.
    residual = (rhs - operator.matvec(found.x)).norm(dim=-1)
    return bent | (flat & ~(residual <= torch.finfo(rhs.dtype).eps ** 0.75 * rhs.norm(dim=-1)))
