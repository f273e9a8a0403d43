"""A primal–dual interior-point method for batches of small and medium nonlinear programs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from bilevel.reports import Status
from bilevel.setting_checks import check_steps
from bilevel.solvers._base import merge
from bilevel.solvers.constrained.filter import Filter
from bilevel.solvers.constrained.interior_pieces import (
    gaps,
    longest_step,
    pick,
    pushed,
    weights,
)
from bilevel.solvers.constrained.interior_state import State, fresh_state, kkt_error, merits, with_duals
from bilevel.solvers.constrained.kkt import Direction, newton_direction
from bilevel.solvers.constrained.program import Answer, ConstrainedSolver, Program
from bilevel.solvers.constrained.restoration import restore, with_feasibility

__all__ = ["InteriorPoint"]

_MAX_STEPS = 300
_MOST_TRIALS = 30
# The barrier parameter: its first value, the factor and the power by which it falls, and its last value (in units of
# the scaled problem).
_FIRST_BARRIER, _BARRIER_FACTOR, _BARRIER_POWER, _LAST_BARRIER = 0.1, 0.2, 1.5, 1e-9
# A subproblem is solved when its error is at most this many barrier parameters.
_SUBPROBLEM = 10.0
# A problem is unbounded if x is this many times its first size away, and the objective still falls, nearly feasible, at
# these multiples of the distance.
_FAR, _NEARLY, _REACHES = 1e6, 1e-6, (10.0, 1e3)
_MOST_RESTORATIONS = 6
_MOST_CORRECTIONS = 4


@dataclass(frozen=True)
class InteriorPoint(ConstrainedSolver):
    """Follow the central path: Newton on the KKT system with slacks, step lengths by a filter.

    Inequalities get slacks, c(x) + s = 0, s > 0. Each step solves the symmetric KKT system of the barrier problem

        [ W + Σ_x + ∇cᵀ Σ_s ∇c + δ I    ∇hᵀ ] [ dx ]
        [ ∇h                           −δ_c ] [ dν ]

    with a δ that makes the inertia that of a minimum. A fraction-to-the-boundary rule keeps s and the slacks of bounds
    positive. A step is accepted if it lowers the barrier objective or the violation ‖(h, c + s)‖₁ enough. If the full
    step is rejected, second-order corrections are tried. If no step is accepted, a restoration minimises ½‖h‖² +
    ½‖max(c, 0)‖² within the bounds, and detects infeasible problems. Each problem of a batch has its own barrier
    parameter, filter, step length and status. The start need not be feasible.

    A step costs one Jacobian, one Hessian of the Lagrangian and O((n + p)³) operations for each problem; memory is batch · (n + p + m) · n
    numbers.

    Parameters
    ----------
    max_steps
        The most steps; None for 300.

    Raises
    ------
    ArgumentError
        If ``max_steps`` is not a positive integer.

    References
    ----------
    Wächter & Biegler, "On the implementation of an interior-point filter line-search algorithm for large-scale nonlinear programming",
    Mathematical Programming 106, 2006; Nocedal & Wright, "Numerical Optimization", chapter 19.

    Examples
    --------
    >>> import torch, bilevel
    >>> layer = bilevel.argmin(lambda x, a: ((x - a) ** 2).sum(), inequality=lambda x, a: x.sum() - 1, solver=InteriorPoint())
    >>> layer(torch.zeros(2, dtype=torch.float64), torch.tensor([1.0, 2.0], dtype=torch.float64)).round(decimals=9)
    tensor([0., 1.], dtype=torch.float64)
    """

    max_steps: int | None = None

    def __post_init__(self) -> None:
        check_steps("InteriorPoint", "max_steps", self.max_steps, optional=True)

    def solve_program(self, program: Program, init: torch.Tensor, smoothing: float | None) -> Answer:
        run = _Run(program, init, smoothing)
        for _ in range(_MAX_STEPS if self.max_steps is None else self.max_steps):
            if not bool(run.running.any()):
                break
            run.step()
        return run.answer()


class _Run:
    """The loop's state; one :meth:`step` moves every problem that is running."""

    def __init__(self, program: Program, init: torch.Tensor, smoothing: float | None) -> None:
        self.smoothing = smoothing
        self.given = program
        contradictory = (program.lower > program.upper).any(-1)
        x = pushed(program, init)
        self.weights = weights(program, x)
        self.program = program.scaled(self.weights)
        count = len(x)
        self.status = torch.full((count,), int(Status.RUNNING), dtype=torch.int64, device=x.device)
        self.status = torch.where(contradictory, int(Status.INFEASIBLE), self.status)
        self.iterations = torch.zeros_like(self.status)
        # With smoothing the central path ends at τ, in the problem's own units.
        self.last = x.new_full((count,), _LAST_BARRIER) if smoothing is None else smoothing * self.weights[:, 0]
        self.barrier = torch.maximum(x.new_full((count,), _FIRST_BARRIER), self.last)
        self.shift = torch.zeros_like(self.barrier)  # δ of the last step
        self.restorations = torch.zeros_like(self.status)
        self.parts, self.rows = self.program.jacobian(x)
        self.first_value = self.parts[:, 0]
        broken = ~torch.isfinite(self.parts).all(-1) | ~torch.isfinite(self.rows).all(-1).all(-1)
        self.status = torch.where(broken & self.running, int(Status.NOT_FINITE), self.status)
        self.state = self._fresh(x)
        self.filter = Filter(self._merits(x, self.state.slack, self.parts)[0])
        self.origin = x

    @property
    def running(self) -> torch.Tensor:
        return self.status == Status.RUNNING

    def _fresh(self, x: torch.Tensor) -> State:
        return fresh_state(self.program, x, self.parts, self.rows, self.barrier)

    def _error(self, barrier: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return kkt_error(self.program, self.state, self.parts, self.rows, barrier)

    def _merits(self, x: torch.Tensor, slack: torch.Tensor, parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return merits(self.program, x, slack, parts, self.barrier)

    def step(self) -> None:
        """Move the problems that are running by one step."""
        self._lower_barrier()
        if not bool(self.running.any()):
            return
        program, state = self.program, self.state
        weights = torch.cat([torch.ones_like(self.parts[:, :1]), state.equality, state.inequality], dim=-1)
        hessian = program.hessian(state.x, weights)
        low, high = gaps(program, state.x)
        direction = newton_direction(
            program, self.parts, self.rows, hessian, low, high, state.slack, state.equality, state.inequality,
            state.lower, state.upper, self.barrier, self.shift,
        )  # fmt: skip
        self.shift = torch.where(self.running, direction.shift, self.shift)
        accepted, moved, parts = self._search(direction, low, high)
        self.iterations = self.iterations + self.running
        self._take(accepted & self.running, moved, parts)
        stuck = self.running & ~accepted
        if bool(stuck.any()):
            self._help(stuck)
        self._notice_unbounded()

    def _take(self, these: torch.Tensor, moved: State, parts: torch.Tensor) -> None:
        if not bool(these.any()):
            return
        self.state = merge(these, moved, self.state)
        fresh, rows = self.program.jacobian(self.state.x)
        whole = torch.isfinite(rows).all(-1).all(-1) & torch.isfinite(fresh).all(-1)
        self.status = torch.where(these & ~whole, int(Status.NOT_FINITE), self.status)
        self.parts, self.rows = fresh, rows.nan_to_num(0.0, 0.0, 0.0)

    def _lower_barrier(self) -> None:
        for _ in range(8):
            error, _ = self._error(self.barrier)
            solved = self.running & (error <= _SUBPROBLEM * self.barrier)
            if not bool(solved.any()):
                return
            # With smoothing, the point on the path has to be exact: an error of the size of τ would be as large as the
            # smoothing itself.
            exact = error <= (1e-9 if self.smoothing is not None else math.inf)
            done = solved & (self.barrier <= self.last) & exact
            self.status = torch.where(done, int(Status.CONVERGED), self.status)
            lower = solved & (self.barrier > self.last)
            if not bool(lower.any()):
                return
            fallen = torch.minimum(_BARRIER_FACTOR * self.barrier, self.barrier**_BARRIER_POWER)
            self.barrier = torch.where(lower, torch.maximum(fallen, self.last), self.barrier)
            self.filter.clear(lower)

    def _search(
        self, direction: Direction, low: torch.Tensor, high: torch.Tensor
    ) -> tuple[torch.Tensor, State, torch.Tensor]:
        """Return which problems have an acceptable step (K,), the states and their parts."""
        program, state = self.program, self.state
        keep = torch.clamp(1 - self.barrier, min=0.99).unsqueeze(-1)
        dual = longest_step(state.inequality, direction.inequality, keep)
        dual = torch.minimum(dual, longest_step(state.lower, direction.lower, keep))
        dual = torch.minimum(dual, longest_step(state.upper, direction.upper, keep))
        old = self._merits(state.x, state.slack, self.parts)
        alpha = longest = self._longest_primal(direction, low, high, keep)
        accepted = augment = torch.zeros_like(self.running)
        chosen: tuple[torch.Tensor, ...] = (state.x, state.slack, self.parts)
        for trial in range(_MOST_TRIALS):
            tried = self._moved(direction, alpha)
            good, enters = self.filter.accepts(alpha, direction.slope, old, self._merits(*tried))
            fresh = good & ~accepted
            chosen, accepted, augment = pick(fresh, tried, chosen), accepted | fresh, augment | (enters & fresh)
            if trial == 0 and not program.only_bounds and bool((self.running & ~accepted).any()):
                for other in self._corrections(direction, alpha, tried, low, high, keep):
                    good, enters = self.filter.accepts(alpha, direction.slope, old, self._merits(*other))
                    fresh = good & ~accepted
                    chosen, accepted, augment = (
                        pick(fresh, other, chosen),
                        accepted | fresh,
                        augment | (enters & fresh),
                    )
            if bool((accepted | ~self.running).all()):
                break
            alpha = torch.where(accepted, alpha, 0.5 * alpha)
        self.filter.add(self.running & augment, *old)
        # Without a shortened trial, the step length also applies to the multipliers of equalities.
        length = torch.where(accepted, alpha, longest)
        moved = with_duals(program, state, (chosen[0], chosen[1]), direction, length, dual, self.barrier)
        return accepted, moved, chosen[2]

    def _longest_primal(
        self, direction: Direction, low: torch.Tensor, high: torch.Tensor, keep: torch.Tensor
    ) -> torch.Tensor:
        longest = torch.minimum(
            longest_step(self.state.slack, direction.slack, keep), longest_step(low, direction.x, keep)
        )
        return torch.minimum(longest, longest_step(high, -direction.x, keep))

    def _moved(self, direction: Direction, alpha: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return (x, slack, parts) at the step lengths ``alpha`` (K,). Slacks are at least −c: smaller ones would increase both φ and θ."""
        x = self.program.inside(self.state.x + alpha.unsqueeze(-1) * direction.x)
        x = torch.where(self.program.fixed, self.state.x, x)
        parts = self.program.parts(x)
        slack = self.state.slack + alpha.unsqueeze(-1) * direction.slack
        return x, torch.maximum(slack, -self.program.split(parts)[2]), parts

    def _corrections(
        self, direction: Direction, alpha: torch.Tensor, tried: tuple[torch.Tensor, ...], low: torch.Tensor,
        high: torch.Tensor, keep: torch.Tensor,
    ) -> Iterator[tuple[torch.Tensor, ...]]:  # fmt: skip
        """Yield second-order corrections: steps that include the constraint values at the end of the last one."""
        program, slack = self.program, self.state.slack
        _, h, c = program.split(self.parts)
        c = c + slack
        length, step = alpha, direction
        for _ in range(_MOST_CORRECTIONS):
            _, h_there, c_there = program.split(tried[2])
            h = length.unsqueeze(-1) * h + h_there
            c = length.unsqueeze(-1) * c + c_there + slack + length.unsqueeze(-1) * step.slack
            step = direction.again(h, c)
            length = self._longest_primal(step, low, high, keep)
            tried = self._moved(step, length)
            yield tried

    def _help(self, stuck: torch.Tensor) -> None:
        """End or restore the problems without a step: at rounding level, not feasible yet, or infeasible."""
        error, primal = self._error(torch.zeros_like(self.barrier))
        ended = stuck & (error <= 1e-6)
        spent = stuck & ~ended & ((self.restorations >= _MOST_RESTORATIONS) | (primal <= 1e-10))
        # Rounding may stop a problem near its solution. The following polish decides.
        self.status = torch.where(ended, int(Status.CONVERGED), self.status)
        self.status = torch.where(spent, int(Status.STAGNATED), self.status)
        these = stuck & ~ended & ~spent
        if not bool(these.any()):
            return
        self.restorations = self.restorations + these
        self.filter.add(these, *self._merits(self.state.x, self.state.slack, self.parts))
        x, feasible, stationary = restore(self.program, self.state.x, these, 0.1)
        self.status = torch.where(these & stationary, int(Status.INFEASIBLE), self.status)
        go_on = these & feasible
        self.status = torch.where(these & ~feasible & ~stationary, int(Status.STAGNATED), self.status)
        x = torch.where(
            these.unsqueeze(-1), torch.where(go_on.unsqueeze(-1), pushed(self.program, x, 1e-4), x), self.state.x
        )
        self.parts, self.rows = self.program.jacobian(x)
        self.state = merge(go_on, self._fresh(x), replace(self.state, x=x))
        self.shift = torch.where(go_on, torch.zeros_like(self.shift), self.shift)

    def _notice_unbounded(self) -> None:
        x, program = self.state.x, self.program
        size = x.abs().amax(-1)
        far = self.running & (size > _FAR * (1 + self.origin.abs().amax(-1))) & (self.parts[:, 0] < self.first_value)
        if not bool(far.any()):
            return
        far = far & (program.violation(self.parts) <= _NEARLY * (1 + size))
        ray, fallen = x - self.origin, self.first_value - self.parts[:, 0]
        for reach in _REACHES:
            there = x + reach * ray
            parts = program.parts(there)
            outside = (there - program.inside(there)).abs().amax(-1)
            far = far & (torch.maximum(program.violation(parts), outside) <= _NEARLY * (1 + reach * size))
            far = far & (parts[:, 0] <= self.parts[:, 0] - 0.1 * reach * fallen)
        self.status = torch.where(far, int(Status.UNBOUNDED), self.status)

    def answer(self) -> Answer:
        """Return the answer in the units of the problem as given."""
        status = torch.where(self.running, int(Status.MAX_STEPS), self.status)
        f, h, c = self.program.split(self.weights)
        state = self.state
        x = torch.where(self.given.fixed, self.given.lower, state.x)
        equality, inequality = state.equality * h / f.unsqueeze(-1), state.inequality * c / f.unsqueeze(-1)
        answer = Answer(x, equality, inequality, status, self.iterations)
        return with_feasibility(self.given, answer, self.origin)
