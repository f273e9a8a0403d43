"""Following a path of solutions from a game that is solved to the given one, past its kinks and turning points."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel._torch.factorisations import solve
from bilevel.equations.player_path import path_problem
from bilevel.equations.problem import Problem
from bilevel.reports import Status
from bilevel.solvers._base import Goal, InnerSolution, InnerSolver, length

__all__ = ["PathFollowing"]

# Steps that a path may take, and more for each unknown. Paths of random games of 16 unknowns took at most 30.
_STEPS, _STEPS_EACH = 40, 4
# Newton steps back to the path, and at its end.
_CORRECTIONS, _LAST_CORRECTIONS = 5, 20
# The shortest step along the path, relative to 1 + |x|.
_SHORTEST = 1e-8


@dataclass(frozen=True)
class PathFollowing(InnerSolver):
    """Follow the solutions of H(x, t) = 0 from t = 0 to t = 1, by predicted steps along the path and Newton steps back to it.

    H is smooth but for kinks, where the support of a solution changes. The direction of the path is the null vector v of H′ with
    det [H′; vᵀ] > 0. The sign holds across kinks and turning points, so that the search never turns back. Where Newton's method does not come
    back to the path, a kink lies ahead: the direction beyond it is that of H′ at the predicted point.

    Each step costs about three Jacobians of n + 1 rows. It takes no step in problems that are solved.

    References
    ----------
    Allgower & Georg, "Introduction to numerical continuation methods", 2003, chapters 3 and 12 (the direction, and kinks); Lemke & Howson,
    "Equilibrium points of bimatrix games", 1964 (the path of a bimatrix game); Herings & Peeters, "Homotopy methods to compute equilibria in game
    theory", Economic Theory 42, 2010.
    """

    #: The longest step, relative to 1 + |x|. A long one may come to another path, which can be closed.
    longest: float = 0.2

    def resumed(self, taken: int) -> InnerSolver | None:
        return None

    def solve(self, problem: Problem, init: torch.Tensor, goal: Goal) -> InnerSolution:
        path = _Path(problem, init, length(problem.residual(init)) > goal.threshold, self.longest)
        for _ in range(round((_STEPS + _STEPS_EACH * problem.size) * max(1.0, 0.08 / self.longest))):
            if not bool(path.running.any()):
                break
            path.step()
        x, status = path.end()
        return InnerSolution(torch.where(path.meant.unsqueeze(-1), x, init), path.steps, status)


class _Path:
    """The state of a batch: z = (x, t) on the path and its direction (batch, n + 1), and the length of the next step (batch,)."""

    def __init__(self, problem: Problem, init: torch.Tensor, meant: torch.Tensor, longest: float) -> None:
        self.longest = longest
        self.family, self.z = path_problem(problem, init)
        eps = torch.finfo(init.dtype).eps
        self.accuracy = eps**0.5 * (1 + init.abs().amax(-1))
        self.meant = self.running = meant
        self.steps = torch.zeros_like(meant, dtype=torch.int64)
        self.direction = _direction(self.evaluated(self.z)[1])
        self.first = self.size
        self.length = 0.5 * longest * self.first

    @property
    def size(self) -> torch.Tensor:
        """1 + |x| (batch,)."""
        return 1 + self.z[:, :-1].abs().amax(-1)

    def evaluated(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return H (batch, n) and H′ (batch, n, n + 1)."""
        linear = self.family.linearize_dense(z)
        return linear.residual.detach()[:, :-1], linear.operator.dense()[:, :-1].nan_to_num(0.0, 0.0, 0.0)

    def step(self) -> None:
        """Take one step in each problem that runs, or shorten the next one where none is found."""
        ahead, border = self.predicted(self.z, self.direction)
        found, jacobian, good = self.corrected(ahead, border, self.running)
        kinked = self.running & ~good
        if bool(kinked.any()):
            beyond = _direction(self.evaluated(ahead)[1])
            second, border = self.predicted(ahead, beyond)
            other, matrix, turned = self.corrected(second, border, kinked)
            rows = (kinked & turned)[:, None]
            found, jacobian = torch.where(rows, other, found), torch.where(rows[..., None], matrix, jacobian)
            good = good | (kinked & turned)
        moved = self.running & good
        self.z = torch.where(moved[:, None], found, self.z)
        self.direction = torch.where(moved[:, None], _direction(jacobian), self.direction)
        longer = torch.minimum(2 * self.length, self.longest * self.size)
        self.length = torch.where(moved, longer, self.length / 4)
        self.steps = self.steps + self.running
        t = self.z[:, -1]
        away = (
            (t < 0) | (self.length < _SHORTEST * self.size) | (self.size > self.first / torch.finfo(t.dtype).eps ** 0.5)
        )
        self.running = self.running & (t < 1) & ~away

    def predicted(self, z: torch.Tensor, direction: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the point (batch, n + 1) a step ahead, at most at t = 1, and what Newton steps leave as it is: a row (batch, n + 1)."""
        ahead = z + self.length[:, None] * direction
        last = (ahead[:, -1:] >= 1) & (direction[:, -1:] > 0)
        share = ((1 - z[:, -1:]) / direction[:, -1:]).clamp_min(0.0)
        end = torch.cat([(z + share * direction)[:, :-1], torch.ones_like(z[:, :1])], dim=-1)
        row = torch.zeros_like(z)
        row[:, -1] = 1.0
        return torch.where(last, end, ahead), torch.where(last, row, direction)

    def corrected(
        self, ahead: torch.Tensor, border: torch.Tensor, these: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the point of the path where ``border`` · z is that of ``ahead``, H′ there, and where one was found near z, among ``these``."""
        z, reach = ahead, 4 * self.length
        for count in range(_CORRECTIONS + 1):
            h, jacobian = self.evaluated(z)
            good = length(h) <= self.accuracy
            near = length(z - self.z) <= reach
            if count == _CORRECTIONS or not bool((these & near & ~good).any()):
                break
            right = torch.cat([h, torch.zeros_like(h[:, :1])], dim=-1)
            d = solve(torch.cat([jacobian, border[:, None]], dim=1), right.unsqueeze(-1)).squeeze(-1)
            d = torch.where(torch.isfinite(d), d, reach.unsqueeze(-1))
            z = torch.where((these & near & ~good)[:, None], z - d, z)
        return z, jacobian, these & good & near & (z[:, -1] <= 1)

    def end(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x (batch, n) and the statuses, after Newton steps at t = 1 while they lower the residual."""
        arrived = self.meant & (self.z[:, -1] >= 1)
        row = torch.zeros_like(self.z)
        row[:, -1] = 1.0
        h, jacobian = self.evaluated(self.z)
        for _ in range(_LAST_CORRECTIONS):
            right = torch.cat([h, torch.zeros_like(h[:, :1])], dim=-1)
            z = self.z - solve(torch.cat([jacobian, row[:, None]], dim=1), right.unsqueeze(-1)).squeeze(-1)
            further, matrix = self.evaluated(torch.where(torch.isfinite(z), z, self.z))
            lower = arrived & torch.isfinite(z).all(-1) & (length(further) < length(h))
            if not bool(lower.any()):
                break
            self.z = torch.where(lower[:, None], z, self.z)
            h, jacobian = torch.where(lower[:, None], further, h), torch.where(lower[:, None, None], matrix, jacobian)
        status = torch.where(self.running, int(Status.MAX_STEPS), int(Status.STAGNATED))
        return self.z[:, :-1], torch.where(arrived | ~self.meant, int(Status.NOT_CONVERGED), status)


def _direction(jacobian: torch.Tensor) -> torch.Tensor:
    """Return the unit vectors v (batch, n + 1) with H′ v = 0 and det [H′; vᵀ] > 0, for matrices (batch, n, n + 1) of full rank."""
    v = torch.linalg.qr(jacobian.mT, mode="complete")[0][..., -1]
    sign = torch.linalg.slogdet(torch.cat([jacobian, v[:, None]], dim=1))[0]
    return torch.where((sign < 0).unsqueeze(-1), -v, v)
