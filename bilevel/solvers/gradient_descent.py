"""Gradient descent with a fixed step, heavy-ball momentum and an optional backtracking line search."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.linalg import vecdot

from bilevel.equations.problem import Problem
from bilevel.errors import ArgumentError
from bilevel.reports import Status
from bilevel.setting_checks import check_number, check_steps
from bilevel.solvers._base import Goal, InnerSolution, InnerSolver, iterate

__all__ = ["GradientDescent"]

_ARMIJO = 0.1
_MOST_HALVINGS = 60
_KEPT_SLOPE = 0.5


@dataclass(frozen=True)
class GradientDescent(InnerSolver):
    """Descend: m ← β m + ∇G(x), x ← x − α m.

    A step costs one gradient, and with ``line_search`` one more for each halving. Memory does not depend on the number
    of steps. The problems of a batch step together, and each ends on its own.

    Parameters
    ----------
    lr
        α > 0, in units of x per unit of gradient: below 2/L for an L-smooth objective. With ``line_search`` it is only
        the first trial.
    max_steps
        The number of steps. Without a tolerance it is a budget, and spending it is a success.
    momentum
        β in [0, 1), of the heavy-ball method.
    line_search
        Halve α, separately for each problem, until Armijo's condition holds. Double it after a step that was accepted
        at once and lost at most half of the slope. It cannot be combined with momentum.

    Raises
    ------
    ArgumentError
        If a setting is out of its range; on use, for a root or a fixed point, which have no objective.

    References
    ----------
    Polyak, "Some methods of speeding up the convergence of iteration methods", 1964; Armijo 1966.

    Examples
    --------
    >>> import torch, bilevel
    >>> layer = bilevel.argmin(
    ...     lambda x, a: ((x - a) ** 2).sum(),
    ...     solver=GradientDescent(lr=0.4, max_steps=50),
    ...     tolerance=bilevel.Tolerance(delta=1e-6),
    ... )
    >>> layer(torch.zeros(2, dtype=torch.float64), torch.tensor([1.0, 2.0], dtype=torch.float64))
    tensor([1.0000, 2.0000], dtype=torch.float64)
    """

    lr: float
    max_steps: int
    momentum: float = 0.0
    line_search: bool = False

    def __post_init__(self) -> None:
        check_number("GradientDescent", "lr", self.lr)
        check_steps("GradientDescent", "max_steps", self.max_steps)
        check_number("GradientDescent", "momentum", self.momentum, below=1.0, closed=True)
        if self.line_search and self.momentum:
            raise ArgumentError(
                "GradientDescent: expected line_search or momentum, got both; momentum steps need not descend, "
                "so that a line search would reject them"
            )

    def solve(self, problem: Problem, init: torch.Tensor, goal: Goal) -> InnerSolution:
        value, gradient = problem.value_and_residual(init)
        still = torch.zeros_like(init) if self.momentum else gradient
        start = _State(init, gradient, value, still, torch.full_like(value, self.lr, dtype=init.dtype))

        budget = bool((goal.threshold == 0).all())  # so that the last step is known in advance
        taken = 0

        def fixed(state: _State, active: torch.Tensor) -> tuple[_State, torch.Tensor | None]:
            nonlocal taken
            taken += 1
            momentum = self.momentum * state.momentum + state.residual if self.momentum else state.residual
            x = torch.add(state.x, momentum, alpha=-self.lr)
            value, gradient = problem.value_and_residual(x, last=budget and taken == self.max_steps)
            return _State(x, gradient, value, momentum, state.lr), None

        def searched(state: _State, active: torch.Tensor) -> tuple[_State, torch.Tensor | None]:
            nonlocal taken
            taken += 1
            return _backtrack(problem, state, active, last=budget and taken == self.max_steps)

        return iterate(start, searched if self.line_search else fixed, goal, self.max_steps)[0]


@dataclass(frozen=True, eq=False)
class _State:
    x: torch.Tensor
    residual: torch.Tensor
    value: torch.Tensor
    momentum: torch.Tensor
    lr: torch.Tensor


def _backtrack(
    problem: Problem, state: _State, active: torch.Tensor, *, last: bool
) -> tuple[_State, torch.Tensor | None]:
    """Take one step by a line search; ``last``: probably the last one.

    Twice the step is tried next only if the slope along this step kept half of its size. For a quadratic, twice the step is then no longer than the
    step to the minimum on this line. A longer one is mostly refused, and a refused step costs a gradient of the whole batch.
    """
    lr, slope = state.lr, vecdot(state.residual, state.residual)
    size, rounding = state.value.abs(), 4 * torch.finfo(state.value.dtype).eps
    begun = torch.sub(state.value, size, alpha=rounding)
    pending: torch.Tensor | None = active
    for _ in range(_MOST_HALVINGS):
        x = torch.addcmul(state.x, lr.unsqueeze(-1), state.residual, value=-1)
        value, gradient = problem.value_and_residual(x, last=last)
        along = vecdot(gradient, state.residual)
        held = value <= torch.addcmul(begun, lr, slope, value=-_ARMIJO)
        if bool(held.all()):
            pending = None
            break
        assert pending is not None
        # Near a minimum, rounding hides the decrease of the value. The slope at the new point then decides (Hager & Zhang's
        # approximate Wolfe condition).
        near = value <= torch.add(state.value, size, alpha=rounding)
        pending = pending & ~(held | (near & (along >= -0.5 * slope)))
        if not bool(pending.any()):
            pending = None
            break
        lr = torch.where(pending, lr / 2, lr)
    longer = along >= _KEPT_SLOPE * slope
    longer = longer if lr is state.lr else longer & (lr == state.lr)
    new = _State(x, gradient, value, state.momentum, torch.where(longer, 2 * lr, lr))
    if pending is None:
        return new, None
    return new, torch.where(pending, int(Status.LINE_SEARCH_FAILED), int(Status.RUNNING))
