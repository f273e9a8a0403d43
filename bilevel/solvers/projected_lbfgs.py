"""Limited-memory BFGS for bounds and many unknowns: gradients alone, no matrix."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch

from bilevel.reports import Status
from bilevel.setting_checks import check_steps
from bilevel.solvers.constrained.program import Answer, ConstrainedSolver, Program
from bilevel.solvers.parts.projected import ProjectedSearch, evaluated, search_in_bounds

__all__ = ["ProjectedLBFGS"]

_MAX_STEPS = 20_000
_ARMIJO, _MOST_TRIALS, _MOST_IDLE = 1e-4, 30, 5
# The projected gradient that is small enough, relative to the first one.
_SMALL = 1e-11
# The length of a first step along the gradient, relative to x, and its growth for each one in a row that was taken whole.
# Without growth, an objective that falls without end would be followed for thousands of steps.
_FIRST, _GROWTH = 0.01, 4.0


@dataclass(frozen=True)
class ProjectedLBFGS(ConstrainedSolver):
    """A quasi-Newton step on the free unknowns, with a search along its projection onto the bounds.

    An unknown is held if it is at a bound (or within ε of it) and the gradient points outwards. The last pairs of steps and changes of the gradient,
    cut to the free unknowns, make the step of the two-loop recursion. The new point is x(α) = P(x + α d), with α shortened until the objective falls
    enough. Held unknowns move along the negative gradient. It costs one gradient a step, and 2 ``history`` vectors. The problems of a batch step
    together.

    It differs from L-BFGS-B (Byrd, Lu, Nocedal, Zhu 1995), which minimises a quadratic model along the projected gradient. Here a projection takes
    its place.

    Parameters
    ----------
    max_steps
        The largest number of steps; None: 20,000.
    history
        The number of pairs.

    Raises
    ------
    ArgumentError
        If a setting is not a positive integer; on use, if there are constraints other than bounds.

    References
    ----------
    Bertsekas, "Projected Newton methods for optimization problems with simple constraints", SIAM Journal on Control and Optimization 20, 1982, for
    the step and its search; Kim, Sra, Dhillon, "Tackling box-constrained optimization via a new projected quasi-Newton approach", SIAM Journal on
    Scientific Computing 32, 2010, for the quasi-Newton matrix of the free unknowns.

    Examples
    --------
    >>> import torch, bilevel
    >>> layer = bilevel.argmin(lambda x, a: ((x - a) ** 2).sum(), lower=0.0, solver=ProjectedLBFGS())
    >>> layer(torch.zeros(2, dtype=torch.float64), torch.tensor([-1.0, 2.0], dtype=torch.float64))
    tensor([0., 2.], dtype=torch.float64)
    """

    max_steps: int | None = None
    history: int = 10

    def __post_init__(self) -> None:
        check_steps("ProjectedLBFGS", "max_steps", self.max_steps, optional=True)
        check_steps("ProjectedLBFGS", "history", self.history)

    def solve_program(self, program: Program, init: torch.Tensor, smoothing: float | None) -> Answer:
        steps = _MAX_STEPS if self.max_steps is None else self.max_steps
        return search_in_bounds(self.name, program, smoothing, lambda: _Run(program, init, self.history), steps)


class _Run(ProjectedSearch):
    def __init__(self, program: Program, init: torch.Tensor, history: int) -> None:
        super().__init__(program, init)
        self.first = self.optimality()
        self.pairs: deque[tuple[torch.Tensor, torch.Tensor]] = deque(maxlen=history)
        solved = (self.status == Status.RUNNING) & (self.first == 0)
        self.status = torch.where(solved, int(Status.CONVERGED), self.status)
        self.idle = torch.zeros_like(self.status)
        self.reach = torch.full_like(self.value, _FIRST)

    def step(self) -> None:
        program, x, gradient = self.program, self.x, self.gradient
        running, eps = self.status == Status.RUNNING, torch.finfo(x.dtype).eps
        held = self.held()
        direction, warm = self._direction((~held).to(x))
        largest = gradient.abs().amax(-1).clamp_min(torch.finfo(x.dtype).tiny)
        alpha = first = torch.where(warm, 1.0, self.reach * (1 + x.abs().amax(-1)) / largest)
        promised = -(gradient * direction * ~held).sum(-1)
        noise = 10 * eps * self.value.abs()
        accepted, moved, value, slope = torch.zeros_like(running), x, self.value, gradient
        for _ in range(_MOST_TRIALS):
            trial = program.inside(x + alpha.unsqueeze(-1) * direction)
            new, after = evaluated(program, trial)
            decrease = alpha * promised + (gradient * (x - trial) * held).sum(-1)
            # Where rounding hides the change of f, the gradients tell it.
            fell = 0.5 * ((gradient + after) * (x - trial)).sum(-1)
            enough = (new <= self.value - _ARMIJO * decrease) | (
                (new <= self.value + noise) & (fell >= _ARMIJO * decrease)
            )
            fresh = enough & running & ~accepted
            mask = fresh.unsqueeze(-1)
            moved, slope = torch.where(mask, trial, moved), torch.where(mask, after, slope)
            value, accepted = torch.where(fresh, new, value), accepted | fresh
            if bool((accepted | ~running).all()):
                break
            # The minimiser of the parabola through f(x), its slope and f at the trial, kept in bounds.
            shorter = 0.5 * alpha * decrease / (new - self.value + decrease)
            shorter = torch.maximum(0.1 * alpha, torch.minimum(0.5 * alpha, shorter.nan_to_num(0.0)))
            alpha = torch.where(accepted, alpha, shorter)
        whole = accepted & ~warm & (alpha == first)
        self.reach = torch.where(whole, _GROWTH * self.reach, _FIRST)
        self._end(running, accepted, moved, value, slope)

    def _end(
        self,
        running: torch.Tensor,
        accepted: torch.Tensor,
        x: torch.Tensor,
        value: torch.Tensor,
        gradient: torch.Tensor,
    ) -> None:
        self.iterations = self.iterations + running
        self.pairs.append((x - self.x, gradient - self.gradient))  # zero where a problem has not moved
        still = self.value - value <= 4 * torch.finfo(x.dtype).eps * self.value.abs()
        before = self.optimality()
        self.x, self.value, self.gradient = x, value, gradient
        optimality = self.optimality()
        self.idle = torch.where(still & (optimality > 0.9 * before), self.idle + 1, 0)
        # Without a decrease along a step of stored pairs, the next one is along the gradient.
        cold = running & ~accepted
        stuck = cold & (self.idle > 1)
        if bool(cold.any()):
            keep = (~cold).to(x).unsqueeze(-1)
            self.pairs.extend([(keep * s, keep * y) for s, y in self.pairs])
        small = optimality <= _SMALL * self.first
        ended = torch.where(small, int(Status.CONVERGED), int(Status.STAGNATED))
        over = running & (small | stuck | (self.idle >= _MOST_IDLE))
        self.status = torch.where(over, ended, self.status)
        self.name_lost(running)

    def _direction(self, free: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return d (K, n), and where it is a quasi-Newton step (K,) bool. Elsewhere no pair is stored, and it is along the gradient."""
        gradient, eps = self.gradient, torch.finfo(self.x.dtype).eps
        q, shares = gradient * free, []
        scale = torch.zeros_like(self.value)
        for s, y in reversed(self.pairs):
            s, y = s * free, y * free
            sy, yy, ss = (s * y).sum(-1), (y * y).sum(-1), (s * s).sum(-1)
            rho = torch.where(sy > eps * (ss * yy).sqrt(), 1 / sy, 0.0)
            scale = torch.where((scale == 0) & (rho > 0), sy / yy, scale)
            share = rho * (s * q).sum(-1)
            q = torch.addcmul(q, share.unsqueeze(-1), y, value=-1)
            shares.append((rho, share))
        warm = scale > 0
        r = torch.where(warm, scale, 1.0).unsqueeze(-1) * q
        for (s, y), (rho, share) in zip(self.pairs, reversed(shares), strict=True):
            back = share - rho * (y * r * free).sum(-1)
            r = torch.addcmul(r, back.unsqueeze(-1), s * free)
        downwards = (r * gradient).sum(-1) > 0
        r = torch.where((downwards & warm).unsqueeze(-1), r, gradient * free)
        warm = warm & downwards
        held = torch.where(warm, scale, 1.0).unsqueeze(-1) * gradient * (1 - free)
        return -(r + held) * (~self.program.fixed), warm
