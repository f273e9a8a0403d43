"""Levenberg–Marquardt: damped Gauss–Newton steps for least squares, batched; by products alone if the Jacobians are large."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from bilevel.equations.least_squares import (
    Products,
    refuse_objective,
    residual_count,
    residual_products,
    weighted_jacobian,
)
from bilevel.equations.linearization import Linearization
from bilevel.equations.problem import Problem
from bilevel.linear._lsmr import lsmr
from bilevel.operators import DenseOperator, FunctionOperator, LinearOperator
from bilevel.reports import Status
from bilevel.setting_checks import check_number, check_steps
from bilevel.solvers._base import Goal, InnerSolution, InnerSolver, iterate
from bilevel.solvers.parts.gauss_newton_model import Model, column_scale

__all__ = ["LevenbergMarquardt"]

_MAX_STEPS = 250
_DENSE_NUMBERS = 2**25
# The smallest share of the predicted decrease for a step to be accepted.
_ACCEPTED = 1e-4
# The number of consecutive rejections, at decreases below rounding, after which a problem has stagnated.
_LAST_GROWTH = 64.0
# The factor of the first threshold if the accuracy of the unknowns decides.
_FURTHER = 0.01
# How accurately the large linear systems are solved, relative to the gradient.
_FORCING = 0.1


@dataclass(frozen=True)
class LevenbergMarquardt(InnerSolver):
    """Step to the minimiser of ½‖r + J d‖² + ½ λ‖D d‖², and adapt λ by how well that model predicts the decrease.

    D holds the largest column lengths of J so far. The steps then do not depend on the units of the unknowns or of r. λ
    follows Nielsen's rule. A step that decreases the objective by the share ρ of the predicted decrease multiplies λ by
    max(1/3, 1 − (2ρ − 1)³). A step that does not decrease it is rejected, and λ is multiplied by 2, 4, 8, …. If J does not
    have full column rank, D is the same for all unknowns, and steps have no part in the null space of J. A linear problem
    solved from zero then ends at its solution of minimum norm.

    *Small problems* (n ≤ ``dense_limit``): J is materialised, by n passes or m, and factorised by QR.
    *Large problems*: LSMR, by products with J and Jᵀ, to a tenth of the gradient, with D = σI and σ an estimate of ‖J‖.

    Convergence is quadratic if the residuals vanish at the solution. Otherwise it is linear, and slow for large and
    curved residuals. It solves least-squares problems and roots; for a root it minimises ½‖R‖².

    Each step costs one evaluation of r and J. Memory is batch · m · n numbers (small) or some vectors (large).

    Parameters
    ----------
    max_steps
        The largest number of steps, rejected ones included; None: 250, and spending them all is a failure. A number is a
        budget: spending it without a tolerance is a success.
    damping
        The first λ, relative to the squared column lengths of J.
    dense_limit
        The largest n for which J is materialised (if those of the batch also take fewer than 2²⁵ numbers).
    linear_steps
        The most products with J for each step of a large problem.

    Raises
    ------
    ArgumentError
        If a setting is out of its range; on use, for an ``argmin``, whose residuals are not known.

    References
    ----------
    Levenberg 1944; Marquardt 1963; Moré, "The Levenberg–Marquardt algorithm", 1978 (D); Nielsen, "Damping parameter in Marquardt's method",
    IMM-REP-1999-05 (λ); Fong & Saunders, "LSMR", SIAM J. Sci. Comput. 33, 2011.

    Examples
    --------
    >>> import torch, bilevel
    >>> fit = bilevel.least_squares(lambda p, t, y: p[0] * torch.exp(-p[1] * t) - y, solver=LevenbergMarquardt())
    >>> t = torch.linspace(0, 2, 20, dtype=torch.float64)
    >>> fit(torch.ones(2, dtype=torch.float64), t, 3 * torch.exp(-0.5 * t))
    tensor([3.0000, 0.5000], dtype=torch.float64)
    """

    max_steps: int | None = None
    damping: float = 1e-3
    dense_limit: int = 512
    linear_steps: int = 250

    def __post_init__(self) -> None:
        check_steps("LevenbergMarquardt", "max_steps", self.max_steps, optional=True)
        check_number("LevenbergMarquardt", "damping", self.damping)
        check_steps("LevenbergMarquardt", "dense_limit", self.dense_limit, least=0)
        check_steps("LevenbergMarquardt", "linear_steps", self.linear_steps)

    def solve(self, problem: Problem, init: torch.Tensor, goal: Goal) -> InnerSolution:
        refuse_objective(problem, "LevenbergMarquardt")
        m = residual_count(problem, init)
        dense = problem.size <= self.dense_limit and problem.batch * problem.size * m <= _DENSE_NUMBERS
        # There are no factorisations in half precision.
        dense = dense and torch.finfo(init.dtype).bits >= 32
        begin, step = self._dense_steps(problem, m) if dense else self._large_steps(problem)
        start, operator = begin(init)
        goal.measure(Linearization(start.residual, operator, (), start.value, init))
        if goal.given is None and goal.target.rtol:
            # A further step costs less than a second call of the judge for a result that is not accurate enough.
            goal = replace(goal, given=_FURTHER * goal.threshold)
        solution, _ = iterate(start, step, goal, self.max_steps or _MAX_STEPS, descends=True)
        if not problem.minimizes:
            return solution
        # The gradient is computed from the objective itself. Its graph is kept for the derivative.
        value, residual = problem.value_and_residual(solution.x, last=True)
        return replace(solution, residual=residual, value=value)

    def _dense_steps(self, problem: Problem, m: int) -> _Steps:
        by_rows = m <= problem.size

        def state_at(x: torch.Tensor, before: _State | None) -> tuple[_State, torch.Tensor]:
            value, residual, jacobian = weighted_jacobian(problem, x, by_rows=by_rows)
            gradient = (jacobian.mT @ residual.unsqueeze(-1)).squeeze(-1)
            scale = column_scale(jacobian, None if before is None else before.scale)
            shown = gradient if problem.minimizes else residual
            return _State.first(x, shown, value, gradient, scale, residual, jacobian, self.damping), jacobian

        def begin(init: torch.Tensor) -> tuple[_State, LinearOperator]:
            state, jacobian = state_at(init, None)
            matrix = jacobian.mT @ jacobian if problem.minimizes else jacobian
            return state, DenseOperator(matrix, symmetric=problem.minimizes)

        def step(state: _State, active: torch.Tensor) -> tuple[_State, torch.Tensor | None]:
            assert state.jacobian is not None
            model = Model.of(state.jacobian, state.weighted, state.scale)
            d = model.step(state.damping)
            pushed = (state.jacobian @ d.unsqueeze(-1)).squeeze(-1)
            trial, _ = state_at(torch.where(active.unsqueeze(-1), state.x + d, state.x), state)
            return _judged(replace(state, scale=model.scale), trial, d, pushed, active)

        return begin, step

    def _large_steps(self, problem: Problem) -> _Steps:
        held: list[tuple[torch.Tensor, Products]] = []

        def products_at(x: torch.Tensor) -> Products:
            known = next((products for point, products in held if torch.equal(point, x)), None)
            if known is None:
                known = residual_products(problem, x)
                held[:] = [*held[-1:], (x, known)]
            return known

        def state_at(x: torch.Tensor, before: _State | None) -> _State:
            products = products_at(x)
            gradient = products.rmatvec(products.residual)
            length = gradient.norm(dim=-1, keepdim=True)
            size = products.matvec(gradient / torch.where(length > 0, length, 1.0)).norm(dim=-1, keepdim=True)
            size = torch.where(torch.isfinite(size) & (size > 0), size, 1.0 if before is None else before.scale[:, :1])
            scale = size if before is None else torch.maximum(size, before.scale[:, :1])
            shown = gradient if problem.minimizes else products.residual
            return _State.first(
                x, shown, products.value, gradient, scale.expand_as(x), products.residual, None, self.damping
            )

        def begin(init: torch.Tensor) -> tuple[_State, LinearOperator]:
            state, products = state_at(init, None), products_at(init)
            if not problem.minimizes:
                return state, FunctionOperator(products.matvec, init, products.rmatvec)
            return state, FunctionOperator(lambda v: products.rmatvec(products.matvec(v)), init, symmetric=True)

        def step(state: _State, active: torch.Tensor) -> tuple[_State, torch.Tensor | None]:
            products = products_at(state.x)
            damping = (state.damping.sqrt() * state.scale[:, 0]).unsqueeze(-1)
            accuracy = torch.where(active, _FORCING * state.gradient.norm(dim=-1), torch.inf)
            m = state.weighted.shape[-1]
            # The damping adds a second block of rows.
            d = lsmr(
                lambda v: torch.cat([products.matvec(v), damping * v], dim=-1),
                lambda u: products.rmatvec(u[:, :m].contiguous()) + damping * u[:, m:],
                -state.gradient,
                accuracy,
                self.linear_steps,
            ).x
            pushed = products.matvec(d)
            trial = state_at(torch.where(active.unsqueeze(-1), state.x + d, state.x), state)
            return _judged(state, trial, d, pushed, active)

        return begin, step


_Steps = tuple[
    Callable[[torch.Tensor], "tuple[_State, LinearOperator]"],
    Callable[["_State", torch.Tensor], "tuple[_State, torch.Tensor | None]"],
]


@dataclass(frozen=True, eq=False)
class _State:
    """An iterate.

    Parameters
    ----------
    x
        (batch, n).
    residual
        The gradient (batch, n), or R of equations.
    value, gradient
        ½‖r‖² or Σ c(r) (batch,), and J̃ᵀ r̃ (batch, n).
    scale
        D (batch, n).
    weighted, jacobian
        r̃ (batch, m) and J̃ (batch, m, n), or None of a large one.
    damping, growth
        λ, and its factor at the next rejection (batch,).
    """

    x: torch.Tensor
    residual: torch.Tensor
    value: torch.Tensor
    gradient: torch.Tensor
    scale: torch.Tensor
    weighted: torch.Tensor
    jacobian: torch.Tensor | None
    damping: torch.Tensor
    growth: torch.Tensor

    @staticmethod
    def first(
        x: torch.Tensor,
        residual: torch.Tensor,
        value: torch.Tensor,
        gradient: torch.Tensor,
        scale: torch.Tensor,
        weighted: torch.Tensor,
        jacobian: torch.Tensor | None,
        damping: float,
    ) -> _State:
        first = torch.full_like(gradient[:, 0], damping)
        return _State(x, residual, value, gradient, scale, weighted, jacobian, first, torch.full_like(first, 2.0))


def _judged(
    state: _State, trial: _State, d: torch.Tensor, pushed: torch.Tensor, active: torch.Tensor
) -> tuple[_State, torch.Tensor | None]:
    """Return ``trial`` where its step d is accepted and ``state`` where not, each with its next damping, and a verdict. ``pushed`` is J̃ d."""
    eps = torch.finfo(d.dtype).eps
    length = (state.scale * d).square().sum(-1)
    promised = 0.5 * pushed.square().sum(-1) + state.damping * length
    decrease = state.value - trial.value
    ratio = decrease / promised
    finite = torch.isfinite(trial.value) & torch.isfinite(trial.gradient).all(dim=-1)
    # Residuals that are differences of larger numbers have rounding errors above their last place. Gradients then
    # decide.
    level = (promised <= eps**0.5 * state.value) & (decrease >= -(eps**0.5) * state.value)
    drowned = promised <= 64 * eps * state.value
    before, after = ((at.gradient / state.scale).norm(dim=-1) for at in (state, trial))
    closer = level & (after < before)
    taken = finite & (closer | ((ratio > _ACCEPTED) & ~drowned))
    # A share of 1/2 leaves the damping unchanged: an undamped Gauss–Newton step may overshoot.
    seen = torch.where(after < 0.25 * before, torch.ones_like(after), 0.5)
    blurred = drowned | (closer & (ratio < 0.5))
    quality = torch.where(blurred, seen, ratio.clamp(0.0, 1.0)).nan_to_num(0.0)
    lower = state.damping * torch.clamp(1 - (2 * quality - 1) ** 3, min=1 / 3)
    damping = torch.where(taken, lower, state.damping * state.growth)
    growth = torch.where(taken, 2.0, 2 * state.growth)
    stuck = active & ~taken & (level | drowned) & (state.growth >= _LAST_GROWTH)
    verdict: torch.Tensor | None = None
    if bool(stuck.any()):
        running = torch.full(stuck.shape, int(Status.RUNNING), dtype=torch.int64, device=d.device)
        verdict = torch.where(stuck, int(Status.STAGNATED), running)
    return replace(_chosen(taken, trial, state), damping=damping, growth=growth), verdict


def _chosen(taken: torch.Tensor, trial: _State, state: _State) -> _State:
    if bool(taken.all()):
        return trial

    def mixed(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        return torch.where(taken.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    jacobian = None
    if trial.jacobian is not None and state.jacobian is not None:
        jacobian = mixed(trial.jacobian, state.jacobian)
    return _State(
        mixed(trial.x, state.x),
        mixed(trial.residual, state.residual),
        mixed(trial.value, state.value),
        mixed(trial.gradient, state.gradient),
        mixed(trial.scale, state.scale),
        mixed(trial.weighted, state.weighted),
        jacobian,
        state.damping,
        state.growth,
    )
