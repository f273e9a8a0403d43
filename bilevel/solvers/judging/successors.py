"""Where another solver takes over from one that failed: at the initial guess, at the last iterate, or at the lowest point, off its saddle."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel._torch.factorisations import eigh
from bilevel.equations.problem import Problem
from bilevel.reports import Status
from bilevel.solvers._base import InnerSolver, is_one_of, merge
from bilevel.solvers.judging.error import irregular_signs, scaled_symmetric
from bilevel.solvers.judging.trials import Trial

__all__ = ["Lowest", "Successor", "beside", "off_the_saddle"]

# A step off a saddle is first so long that G falls by this many roundings. Then it is doubled while G falls. The way down may be short.
_SEEN = 4.0
_MOST_DOUBLINGS = 60


@dataclass(frozen=True)
class Successor:
    """A solver that takes over the problems at which another failed. It begins at the initial guess if ``afresh``, else at the last iterate.

    ``beside`` moves a root's beginning by a thousandth, out of a place where the Jacobian happens to be singular. ``onward``: an argmin goes on
    from the lowest point that any search found, if steps were all that was missing there, or if it is a saddle, which is left first.
    """

    solver: InnerSolver
    afresh: bool = False
    beside: bool = False
    onward: bool = False


@dataclass(frozen=True, eq=False)
class Lowest:
    """The lowest points x (batch, n) that failed searches of an argmin found, their objectives (batch,), and the statuses there.

    Where no search ended at a usable point, the objective is infinite.
    """

    x: torch.Tensor
    value: torch.Tensor
    status: torch.Tensor

    @staticmethod
    def of(problem: Problem, trial: Trial) -> Lowest:
        """Return the points at which ``trial`` ended. One that diverged is not usable."""
        value = problem.value(trial.x) if trial.value is None else trial.value
        usable = torch.isfinite(value) & ~is_one_of(trial.status, (Status.DIVERGED, Status.NOT_FINITE))
        return Lowest(trial.x, torch.where(usable, value, torch.inf), trial.status)

    def updated(self, problem: Problem, trial: Trial, these: torch.Tensor) -> Lowest:
        """Return the lower points of these and of ``trial`` for the problems ``these`` (batch,)."""
        other = Lowest.of(problem, trial)
        return merge(these & (other.value < self.value), other, self)

    def onward(self, problem: Problem, these: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return where the problems ``these`` (batch,) go on (batch, n), and which of them have somewhere to go, (batch,) bool."""
        usable = these & torch.isfinite(self.value)
        if not bool(usable.any()):
            return self.x, usable
        x, left = off_the_saddle(problem, self.x, self.value, usable)
        return x, usable & (left | is_one_of(self.status, (Status.MAX_STEPS, Status.KINK)))


def beside(x: torch.Tensor) -> torch.Tensor:
    """Return points a thousandth beside ``x`` (batch, n)."""
    return x + 1e-3 * (1 + x.abs()) * irregular_signs(x)


def off_the_saddle(
    problem: Problem, x: torch.Tensor, value: torch.Tensor, these: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Follow the direction of most negative curvature from ``x`` (batch, n) as long as G falls.

    Curvatures are compared in units with a Hessian of unit diagonal, so that those of the unknowns do not matter. A search that
    lowers G does not come back to where this step began.

    Parameters
    ----------
    problem, x, value
        An argmin whose Hessians fit into memory, and G (batch,) at ``x``.
    these
        (batch,) bool: the others stay.

    Returns
    -------
    The points (batch, n), and where G was lowered (batch,) bool.
    """
    linear = problem.linearize_dense(x)
    scaled, unit = scaled_symmetric(linear.operator.dense())
    values, vectors = eigh(scaled)
    eps = torch.finfo(x.dtype).eps
    least = values[:, 0]
    curved = these & (least < -100 * x.shape[-1] * eps * values.abs().amax(dim=-1))  # a NaN is none
    if not bool(curved.any()):
        return x, curved
    direction = unit * vectors[..., 0]
    direction = torch.where((direction * linear.residual.detach()).sum(dim=-1, keepdim=True) > 0, -direction, direction)
    t = (2 * _SEEN * eps * value.abs() / least.abs()).sqrt()
    t = torch.maximum(t, eps**0.5 * (x / unit).abs().amax(dim=-1))
    t = torch.where(curved & (t > 0) & torch.isfinite(t), t, torch.ones_like(t))
    best, lowest, rising = x, value, ~curved
    for _ in range(_MOST_DOUBLINGS):
        point = x + t.unsqueeze(-1) * direction
        found = problem.value(torch.where(rising.unsqueeze(-1), x, point))
        lower = ~rising & (found < lowest)
        rising = rising | (~lower & (lowest < value))
        best, lowest = torch.where(lower.unsqueeze(-1), point, best), torch.where(lower, found, lowest)
        if bool(rising.all()):
            break
        t = 2 * t
    return best, curved & (lowest < value)
