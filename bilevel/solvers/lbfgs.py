"""Limited-memory BFGS for a batch of objectives."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import partial

import torch

from bilevel.equations.problem import Problem
from bilevel.reports import Status
from bilevel.setting_checks import check_steps
from bilevel.solvers._base import Goal, InnerSolution, InnerSolver, iterate
from bilevel.solvers.parts.line_search import line_search
from bilevel.solvers.parts.tiny_steps import TinySteps

__all__ = ["LBFGS"]

_MAX_STEPS = 2000
# Hager & Zhang's decay of the average of |G|. The average measures the rounding of differences of G.
# A run ends at rounding level after this many steps that lower neither the objective beyond its rounding nor the
# gradient.
_MOST_IDLE = 40
_DECAY = 0.7


@dataclass(frozen=True)
class LBFGS(InnerSolver):
    """Step along −Bₖ ∇G(x), Bₖ the inverse Hessian approximated from the last ``history`` steps.

    Every problem of a batch has its own history, line search and end. A pair of step and gradient change is stored only if
    their product is positive beyond rounding. If the direction does not descend, or no step along it is found, the problem
    drops its history and restarts from steepest descent.

    The line search uses the strong Wolfe conditions, or the approximate Wolfe conditions of Hager and Zhang. Where rounding
    hides differences of the objective it uses slopes. Gradients as small as the dtype allows are reached.

    Each step costs one gradient, sometimes two or three, and 4 · ``history`` · n operations; memory is
    2 · ``history`` · n numbers for each problem and does not depend on the number of steps.

    Parameters
    ----------
    max_steps
        The largest number of steps; None: 2,000, and spending them all is a failure. A number is a budget: spending it
        without a tolerance is a success.
    history
        The number of pairs that are kept.

    Raises
    ------
    ArgumentError
        If a setting is out of its range; on use, for a root or a fixed point, which have no objective.

    References
    ----------
    Nocedal & Wright, "Numerical Optimization", 2006, algorithms 7.4 and 7.5; Hager & Zhang, "A new conjugate
    gradient method with guaranteed descent and an efficient line search", SIAM J. Optim. 2005.

    Examples
    --------
    >>> import torch, bilevel
    >>> layer = bilevel.argmin(lambda x, a: ((x - a) ** 4).sum() + (x**2).sum(), solver=LBFGS())
    >>> layer(torch.zeros(2, dtype=torch.float64), torch.tensor([1.0, 3.0], dtype=torch.float64))
    tensor([0.4102, 2.0000], dtype=torch.float64)
    """

    max_steps: int | None = None
    history: int = 10

    def __post_init__(self) -> None:
        check_steps("LBFGS", "max_steps", self.max_steps, optional=True)
        check_steps("LBFGS", "history", self.history)

    def solve(self, problem: Problem, init: torch.Tensor, goal: Goal) -> InnerSolution:
        value, gradient = problem.value_and_residual(init)
        memory = _Memory(self.history, value)
        threshold = goal.threshold
        eps = torch.finfo(init.dtype).eps

        tiny = TinySteps(problem)

        def step(state: _State, active: torch.Tensor) -> tuple[_State, torch.Tensor | None]:
            d, slope = memory.direction(state.residual, active)
            cold, first = ~memory.warm, torch.ones_like(slope)
            if bool(cold.any()):
                first = torch.where(cold, _first_step(state), first)
            noise = 1e3 * eps * state.average
            found = line_search(problem, state.x, d, state.value, slope, first, noise, threshold, active)
            failed = found.failed
            x, gradient, value = found.x, found.gradient, found.value
            verdict: torch.Tensor | None = None
            if bool(failed.any()):
                keep = failed.unsqueeze(-1)
                x, gradient = torch.where(keep, state.x, x), torch.where(keep, state.residual, gradient)
                value = torch.where(failed, state.value, value)
                verdict = _verdict(failed & cold, first * slope.abs() <= noise)
            if bool(state.endless.any()):  # only now, so that the last point is returned
                verdict = (
                    torch.full_like(failed, int(Status.RUNNING), dtype=torch.int64) if verdict is None else verdict
                )
                verdict = torch.where(state.endless, int(Status.DIVERGED), verdict)
            share = partial(_share, x, state.x, d, first)
            verdict = tiny.end(share, state.x, x, state.residual, active, verdict)
            memory.store(x - state.x, gradient - state.residual, active & ~failed)
            memory.forget(failed)
            weight = 1 + _DECAY * state.weight
            average = state.average + (value.abs() - state.average) / weight
            norm = gradient.norm(dim=-1)
            gained = (value < state.value - 4 * eps * state.average) | (norm < 0.98 * state.best)
            idle = torch.where(gained, torch.zeros_like(state.idle), state.idle + 1)
            stuck = idle >= _MOST_IDLE
            if bool(stuck.any()):
                verdict = torch.full_like(stuck, int(Status.RUNNING), dtype=torch.int64) if verdict is None else verdict
                verdict = torch.where(stuck & (verdict == Status.RUNNING), int(Status.STAGNATED), verdict)
            best = torch.minimum(norm, state.best)
            return _State(x, gradient, value, average, weight, best, idle, found.endless), verdict

        ones = torch.ones_like(value)
        zeros = torch.zeros_like(ones)
        start = _State(init, gradient, value, value.abs(), ones, gradient.norm(dim=-1), zeros, zeros > 0)
        return iterate(start, step, goal, self.max_steps or _MAX_STEPS, descends=True)[0]


@dataclass(frozen=True, eq=False)
class _State:
    """An iterate x with its gradient ∇G (``residual``) and its objective G (``value``).

    ``average`` is a running average of abs(G), and ``weight`` the sum of its weights. ``best`` is the smallest ‖∇G‖ so far, and ``idle`` counts
    the steps since one last gained. ``endless``: G fell at every trial of the last line search, each longer than the one before.
    """

    x: torch.Tensor
    residual: torch.Tensor
    value: torch.Tensor
    average: torch.Tensor
    weight: torch.Tensor
    best: torch.Tensor
    idle: torch.Tensor
    endless: torch.Tensor


class _Memory:
    """The last pairs (s, y) of each problem, both divided by √(sᵀy); 0 for a pair that a problem has not stored."""

    def __init__(self, history: int, like: torch.Tensor) -> None:
        self.pairs: deque[tuple[torch.Tensor, torch.Tensor]] = deque(maxlen=history)
        self.scale = torch.zeros_like(like)  # sᵀy / yᵀy of the newest pair; 0: none is stored

    @property
    def warm(self) -> torch.Tensor:
        """Bool (batch,): which problems remember anything."""
        return self.scale > 0

    def direction(self, gradient: torch.Tensor, active: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return d = −B g by the two-loop recursion, or −g, and dᵀg < 0."""
        q = gradient
        shares = []
        for s, y in reversed(self.pairs):
            share = (s * q).sum(dim=-1, keepdim=True)
            q = torch.addcmul(q, share, y, value=-1)
            shares.append(share)
        warm = self.warm
        r = torch.where(warm, self.scale, torch.ones_like(self.scale)).unsqueeze(-1) * q
        for (s, y), share in zip(self.pairs, reversed(shares), strict=True):
            r = torch.addcmul(r, share - (y * r).sum(dim=-1, keepdim=True), s)
        slope = -(gradient * r).sum(dim=-1)
        bad = active & ~(slope < 0)
        if bool(bad.any()):
            self.forget(bad)
            r = torch.where(bad.unsqueeze(-1), gradient, r)
            slope = torch.where(bad, -(gradient * gradient).sum(dim=-1), slope)
        return -r, slope

    def store(self, s: torch.Tensor, y: torch.Tensor, moved: torch.Tensor) -> None:
        """Store the pairs of the problems that ``moved``, if sᵀy is positive beyond rounding."""
        sy, yy = (s * y).sum(dim=-1), (y * y).sum(dim=-1)
        eps = torch.finfo(s.dtype).eps
        fit = moved & (sy > eps * s.norm(dim=-1) * yy.sqrt()) & (sy < torch.inf) & (yy < torch.inf) & (yy > 0)
        root, scale = sy.sqrt().unsqueeze(-1), sy / yy
        pair = s / root, y / root
        if not bool(fit.all()):
            pair, scale = _where(fit, pair), torch.where(fit, scale, self.scale)
        self.pairs.append(pair)
        self.scale = scale

    def forget(self, which: torch.Tensor) -> None:
        """Drop all pairs of the problems of ``which``."""
        if bool(which.any()):
            self.pairs.extend([_where(~which, pair) for pair in self.pairs])
            self.scale = torch.where(which, torch.zeros_like(self.scale), self.scale)


def _where(these: torch.Tensor, pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the vectors of ``these`` problems (batch,), and zero for the others."""
    zero, keep = torch.zeros_like(pair[0]), these.unsqueeze(-1)
    return torch.where(keep, pair[0], zero), torch.where(keep, pair[1], zero)


def _share(x: torch.Tensor, last: torch.Tensor, d: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """Return the length of a step (batch,) as a share of the first one tried."""
    return (x - last).norm(dim=-1) / (first * d.norm(dim=-1))


def _first_step(state: _State) -> torch.Tensor:
    """Return the first t along −g: it moves by one per cent of x, or of the possible decrease of G (Hager & Zhang's I0)."""
    gradient = state.residual
    by_point = 0.01 * state.x.abs().amax(dim=-1) / gradient.abs().amax(dim=-1)
    by_value = 0.01 * state.value.abs() / (gradient * gradient).sum(dim=-1)
    t = torch.where(by_point > 0, by_point, by_value)
    return torch.where((t > 0) & torch.isfinite(t), t, torch.ones_like(t))


def _verdict(failed: torch.Tensor, tiny: torch.Tensor) -> torch.Tensor:
    verdict = torch.full(failed.shape, int(Status.RUNNING), dtype=torch.int64, device=failed.device)
    verdict = torch.where(failed, torch.full_like(verdict, Status.LINE_SEARCH_FAILED), verdict)
    return torch.where(failed & tiny, torch.full_like(verdict, Status.STAGNATED), verdict)
