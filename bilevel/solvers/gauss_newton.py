"""Gauss–Newton with a line search: undamped steps for least squares, batched."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from bilevel.equations.least_squares import refuse_objective, residual_count, weighted_jacobian
from bilevel.equations.linearization import Linearization
from bilevel.equations.problem import Problem
from bilevel.errors import ArgumentError
from bilevel.operators import DenseOperator
from bilevel.reports import Status
from bilevel.setting_checks import check_steps
from bilevel.solvers._base import Goal, InnerSolution, InnerSolver, iterate
from bilevel.solvers.parts.gauss_newton_model import Model, column_scale

__all__ = ["GaussNewton"]

_MAX_STEPS = 250
_ARMIJO = 1e-4
_MOST_TRIALS = 40
_MOST_NUMBERS = 2**27


@dataclass(frozen=True)
class GaussNewton(InnerSolver):
    """Step to the minimiser of ½‖r + J d‖², shortened until the objective decreases enough.

    A linear problem takes one step. If J does not have full column rank, d is the shortest minimiser: a linear problem
    solved from zero ends at its minimum-norm solution. Convergence is quadratic if the residuals vanish at the
    solution. If they are large and curved, the method may stall far from the solution, and
    :class:`bilevel.LevenbergMarquardt` is safer. It solves least-squares problems and roots.

    Each trial of a step costs one evaluation of r and J. J is materialised: memory is batch · m · n numbers.

    Parameters
    ----------
    max_steps
        The largest number of steps; None: 250, and spending them all is a failure. A number is a budget: spending it
        without a tolerance is a success.

    Raises
    ------
    ArgumentError
        If the setting is out of its range; on use, for an ``argmin``, whose residuals are unknown, or if J takes more
        than 1 GiB of float64.

    References
    ----------
    Nocedal & Wright, "Numerical Optimization", 2006, section 10.3.

    Examples
    --------
    >>> import torch, bilevel
    >>> line = bilevel.least_squares(lambda p, t, y: p[0] + p[1] * t - y, solver=GaussNewton())
    >>> t = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    >>> line(torch.zeros(2, dtype=torch.float64), t, torch.tensor([1.0, 3.0, 6.0], dtype=torch.float64))
    tensor([0.8333, 2.5000], dtype=torch.float64)
    """

    max_steps: int | None = None

    def __post_init__(self) -> None:
        check_steps("GaussNewton", "max_steps", self.max_steps, optional=True)

    def solve(self, problem: Problem, init: torch.Tensor, goal: Goal) -> InnerSolution:
        refuse_objective(problem, "GaussNewton")
        m = residual_count(problem, init)
        if problem.batch * problem.size * m > _MOST_NUMBERS:
            raise ArgumentError(
                f"{problem.where}: expected Jacobians of at most {_MOST_NUMBERS} numbers for GaussNewton, got {problem.batch} of {m} by "
                f"{problem.size}; take LevenbergMarquardt(), which needs only products"
            )
        if torch.finfo(init.dtype).bits < 32:
            raise ArgumentError(
                f"{problem.where}: expected float32 or float64 for GaussNewton, got {str(init.dtype).removeprefix('torch.')}, which has no "
                "factorisations; take LevenbergMarquardt(), or convert init with .float()"
            )
        by_rows = m <= problem.size

        def state_at(x: torch.Tensor) -> _State:
            value, residual, jacobian = weighted_jacobian(problem, x, by_rows=by_rows)
            gradient = (jacobian.mT @ residual.unsqueeze(-1)).squeeze(-1)
            return _State(x, gradient if problem.minimizes else residual, value, gradient, residual, jacobian)

        start = state_at(init)
        matrix = start.jacobian.mT @ start.jacobian if problem.minimizes else start.jacobian
        operator = DenseOperator(matrix, symmetric=problem.minimizes)
        goal.measure(Linearization(start.residual, operator, (), start.value, init))

        def step(state: _State, active: torch.Tensor) -> tuple[_State, torch.Tensor | None]:
            model = Model.of(state.jacobian, state.weighted, column_scale(state.jacobian))
            d = model.step(torch.zeros_like(state.value))
            slope = (state.gradient * d).sum(dim=-1)
            down = (slope < 0) & torch.isfinite(d).all(dim=-1)
            d = torch.where(down.unsqueeze(-1), d, -state.gradient)
            slope = torch.where(down, slope, -state.gradient.square().sum(dim=-1))
            return _search(state_at, state, d, slope, active)

        solution, _ = iterate(start, step, goal, self.max_steps or _MAX_STEPS, descends=True)
        if not problem.minimizes:
            return solution
        value, residual = problem.value_and_residual(solution.x, last=True)
        return replace(solution, residual=residual, value=value)


@dataclass(frozen=True, eq=False)
class _State:
    """x (batch, n), the gradient or R (batch, n), the objective (batch,) and its gradient (batch, n), r̃ (batch, m) and J̃ (batch, m, n)."""

    x: torch.Tensor
    residual: torch.Tensor
    value: torch.Tensor
    gradient: torch.Tensor
    weighted: torch.Tensor
    jacobian: torch.Tensor


def _search(
    state_at: object, state: _State, d: torch.Tensor, slope: torch.Tensor, active: torch.Tensor
) -> tuple[_State, torch.Tensor | None]:
    """Try the full step, then shorter ones, until the objective has decreased enough. Each problem has its own step length."""
    assert callable(state_at)
    eps = torch.finfo(d.dtype).eps
    t, pending = torch.ones_like(slope), active
    before = state.gradient.norm(dim=-1)
    level = -slope <= 64 * eps * state.value  # differences of values are rounding, so gradients decide
    for _ in range(_MOST_TRIALS):
        new: _State = state_at(torch.where(active.unsqueeze(-1), state.x + t.unsqueeze(-1) * d, state.x))
        after = new.gradient.norm(dim=-1)
        steady = (new.value - state.value <= 64 * eps * state.value) & (after < before)
        held = (new.value <= state.value + _ARMIJO * t * slope) | (level & steady)
        pending = pending & ~(held & torch.isfinite(after))
        if not bool(pending.any()):
            return new, None
        parabola = -slope * t * t / (2 * (new.value - state.value - slope * t))
        shorter = torch.where(torch.isfinite(parabola), torch.clamp(parabola, min=0.1 * t, max=0.5 * t), 0.25 * t)
        t = torch.where(pending, shorter, t)
        if not bool((pending & ~(level & (t < 0.01))).any()):
            break
    verdict = torch.full(pending.shape, int(Status.RUNNING), dtype=torch.int64, device=d.device)
    verdict = torch.where(pending, int(Status.LINE_SEARCH_FAILED), verdict)
    return new, torch.where(pending & level, int(Status.STAGNATED), verdict)
