"""The accelerated proximal gradient method with adaptive restart and automatic step sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from bilevel.equations.problem import Problem
from bilevel.reports import Status
from bilevel.setting_checks import check_steps
from bilevel.solvers._base import Goal, InnerSolution, InnerSolver, iterate, length
from bilevel.solvers.composite.problem import Composite, Iterate
from bilevel.solvers.judging.error import irregular_signs

__all__ = ["ProximalGradient", "descend", "first_step"]

MAX_STEPS = 20_000
_MOST_HALVINGS = 60
# The length of the trial that estimates the first step, relative to x.
_TRIAL = 1e-3
# The share of a short gradient step that has to remain after the prox, so that the curvature can be measured along it.
_HELD = 1e-3
# The longest step, in units of (1 + ‖x‖) / ‖∇f‖, because 1/L is infinite for an f without curvature.
_LONGEST = 1e4
# If the curvature along a step is below this, in units of 1/s, the next step is longer by the second factor.
_FLAT, _LONGER = 1e-3, 10.0
# x has diverged if it exceeds its initial size by this factor.
_FAR = 1e10


@dataclass(frozen=True)
class ProximalGradient(InnerSolver):
    """Minimise f + g: y = x + β (x − x₋), x ← prox_{sg}(y − s ∇f(y)), and finish by Newton's method on the active manifold.

    The momentum is Nesterov's, as in FISTA. It restarts if it points uphill. The step size s begins at an estimate of
    1/L. It is halved until f(x) ≤ f(y) + ⟨∇f(y), x − y⟩ + ‖x − y‖²/(2s), separately for each problem. Without a
    proximal term the method is accelerated gradient descent.

    Once the zeros, bounds and ties of the solution are found, Newton's method on the free unknowns takes over (see
    ``polish``). It needs a few linear systems of the size of the support, and reaches full accuracy. It is tried after
    a few steps, and again later if it fails.

    Each step costs one gradient of f, one value of f and one prox. Memory does not depend on the number of steps.

    Parameters
    ----------
    max_steps
        The largest number of proximal gradient steps; None: 20,000, and spending them all is a failure. A number is a
        budget: spending it without a tolerance is a success.
    accelerated
        Whether to use momentum.
    polish
        Whether Newton's method finishes the solve. With ``Tolerance(delta=None)`` it never does.

    Raises
    ------
    ArgumentError
        If a setting is out of its range.

    References
    ----------
    Beck & Teboulle, "A fast iterative shrinkage-thresholding algorithm", SIAM J. Imaging Sci. 2009; O'Donoghue & Candès, "Adaptive restart
    for accelerated gradient schemes", Found. Comput. Math. 2015 (the gradient scheme); Bareilles, Iutzeler, Malick, "Newton acceleration on
    manifolds identified by proximal gradient methods", Math. Program. 2022.

    Examples
    --------
    >>> import torch, bilevel
    >>> layer = bilevel.argmin(
    ...     lambda x, a: 0.5 * ((x - a) ** 2).sum(), prox=bilevel.prox.L1(1.0), solver=bilevel.ProximalGradient()
    ... )
    >>> layer(torch.zeros(3, dtype=torch.float64), torch.tensor([3.0, 0.5, -2.0], dtype=torch.float64))
    tensor([ 2.,  0., -1.], dtype=torch.float64)
    """

    max_steps: int | None = None
    accelerated: bool = True
    polish: bool = True

    def __post_init__(self) -> None:
        check_steps("ProximalGradient", "max_steps", self.max_steps, optional=True)

    def solve(self, problem: Problem, init: torch.Tensor, goal: Goal) -> InnerSolution:
        smooth = Composite(problem, problem, lambda v, step: v)
        start = first_step(smooth, smooth.at(init, init.new_zeros(len(init))))
        solution, _ = descend(self, smooth, start, goal.threshold, self.max_steps or MAX_STEPS)
        return replace(solution, residual=None, value=None)


def first_step(composite: Composite, at: Iterate) -> Iterate:
    """Return the iterate with an estimate of 1/L as its step size, from the change of ∇f over a short proximal step."""
    norm, size = length(at.slope), 1 + length(at.x)
    longest = _LONGEST * size / norm.clamp_min(torch.finfo(norm.dtype).tiny ** 0.5)
    short = _TRIAL / _LONGEST * longest
    beside = composite.step(at.x, at.slope, short)
    # At a solution, or if g fixes x, a step hardly moves. Any direction is then used.
    held = length(beside - at.x) <= _HELD * short * norm
    if bool(held.any()):
        anywhere = at.x + (_TRIAL * size / at.x.shape[-1] ** 0.5).unsqueeze(-1) * irregular_signs(at.x)
        least = torch.full_like(short, torch.finfo(short.dtype).tiny ** 0.5)
        inside = composite.prox(anywhere, least)
        # At a vertex g fixes x again, and the curvature would be a quotient of roundings. f is then measured off the domain of g.
        fixed = length(inside - at.x) <= _HELD * _TRIAL * size
        inside = torch.where(fixed.unsqueeze(-1), anywhere, inside)
        beside = torch.where(held.unsqueeze(-1), inside, beside)
    slope = composite.objective.residual(beside)
    lipschitz = length(slope - at.slope) / length(beside - at.x)
    step = torch.where(torch.isfinite(lipschitz), (1 / lipschitz).clamp(max=longest), short)
    return replace(at, step=step)


@dataclass(frozen=True, eq=False)
class _State:
    """An iterate of the method.

    Parameters
    ----------
    x
        The last result of a prox (batch, n).
    y, value, slope
        The point at which the next step begins, and f and ∇f there.
    momentum, step
        FISTA's t and the step s (batch,).
    residual
        (y − x)/s of the step that led to x.
    """

    x: torch.Tensor
    y: torch.Tensor
    value: torch.Tensor
    slope: torch.Tensor
    momentum: torch.Tensor
    step: torch.Tensor
    residual: torch.Tensor


@dataclass(frozen=True, eq=False)
class _Goal:
    """The threshold that :func:`iterate` stops at."""

    threshold: torch.Tensor


def descend(
    solver: ProximalGradient,
    composite: Composite,
    start: Iterate,
    threshold: torch.Tensor,
    max_steps: int,
    origin: torch.Tensor | None = None,
) -> tuple[InnerSolution, torch.Tensor]:
    """Take proximal gradient steps until ‖y − x‖/s is at most ``threshold`` (batch,); return the solution and the steps s (batch,).

    ``origin`` (batch, n): the initial guess of the whole search, if it is not ``start``.
    """
    limit = _FAR * (1 + length(start.x if origin is None else origin))
    x = composite.step(start.x, start.slope, start.step)
    first = _State(
        start.x, start.x, start.value, start.slope, torch.ones_like(start.step), start.step,
        (start.x - x) / start.step.unsqueeze(-1),
    )  # fmt: skip

    def step(state: _State, active: torch.Tensor) -> tuple[_State, torch.Tensor | None]:
        x, s, longer, failed = _backtrack(composite, state, active)
        moved = x - state.x
        t = 0.5 * (1 + (1 + 4 * state.momentum**2).sqrt())
        beta = (state.momentum - 1) / t if solver.accelerated else torch.zeros_like(t)
        uphill = ((state.y - x) * moved).sum(dim=-1) > 0
        if bool(uphill.any()):
            t, beta = torch.where(uphill, 1.0, t), torch.where(uphill, 0.0, beta)
        y = x + beta.unsqueeze(-1) * moved
        value, slope = composite.objective.value_and_residual(y)
        outside = ~torch.isfinite(value) & active
        if bool(outside.any()):  # y may be outside the domain of f, x is not
            y = torch.where(outside.unsqueeze(-1), x, y)
            value, slope = composite.objective.value_and_residual(y)
        away = length(x) > limit
        verdict = None
        if bool((away | failed).any()):
            verdict = torch.full(away.shape, int(Status.RUNNING), dtype=torch.int64, device=away.device)
            verdict = torch.where(failed, int(Status.LINE_SEARCH_FAILED), verdict)
            verdict = torch.where(away, int(Status.DIVERGED), verdict)
        return _State(x, y, value, slope, t, longer, (state.y - x) / s.unsqueeze(-1)), verdict

    goal: Goal = _Goal(threshold)  # type: ignore[assignment]  # all that iterate looks at
    solution, state = iterate(first, step, goal, max_steps, descends=True)
    return solution, state.step


def _backtrack(
    composite: Composite, state: _State, active: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return x, its step size s, the next step size, and where no step descends (batch,)."""
    s, eps = state.step, torch.finfo(state.step.dtype).eps
    x = composite.step(state.y, state.slope, s)
    pending = active
    for _ in range(_MOST_HALVINGS):
        moved = x - state.y
        square = (moved * moved).sum(dim=-1)
        rise = composite.objective.value(x) - state.value - (state.slope * moved).sum(dim=-1)
        rounding = 16 * eps * (state.value.abs() + length(state.slope) * square.sqrt())
        held = rise <= square / (2 * s) + rounding  # not where it is NaN
        pending = pending & ~held
        if not bool(pending.any()):
            # If f has almost no curvature, no step is too long.
            flat = (square > 2e3 * s * rounding) & (rise.abs() <= _FLAT * square / s)
            longer = torch.where(flat, _LONGER * s, s) if bool(flat.any()) else s
            return x, s, longer, pending
        # 2 · rise / ‖moved‖² is the measured curvature.
        shorter = torch.clamp(square / (2 * rise), 0.1 * s, 0.5 * s)
        s = torch.where(pending, torch.where(torch.isfinite(shorter), shorter, 0.1 * s), s)
        x = torch.where(pending.unsqueeze(-1), composite.step(state.y, state.slope, s), x)
    return x, s, s, pending
