"""Gradient descent with a fixed step, heavy-ball momentum and an optional backtracking line search."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel.equations.problem import Problem
from bilevel.errors import ArgumentError
from bilevel.reports import Status
from bilevel.setting_checks import check_number, check_steps
from bilevel.solvers._base import Goal, InnerSolution, InnerSolver, iterate

__all__ = ["GradientDescent"]

_ARMIJO = 0.1
_MOST_HALVINGS = 60


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
        at once. It cannot be combined with momentum.

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
            return _backtrack(problem, state, active)

        return iterate(start, searched if self.line_search else fixed, goal, self.max_steps)[0]


@dataclass(frozen=True, eq=False)
class _State:
    x: torch.Tensor
    residual: torch.Tensor
    value: torch.Tensor
    momentum: torch.Tensor
    lr: torch.Tensor


def _backtrack(problem: Problem, state: _State, active: torch.Tensor) -> tuple[_State, torch.Tensor]:
    slope = (state.residual**2).sum(dim=-1)
    # Near a minimum, rounding hides the decrease of the value. The slope at the new point then decides (Hager & Zhang's
    # approximate Wolfe condition).
    slack = 4 * torch.finfo(state.value.dtype).eps * state.value.abs()
    lr, pending, first = state.lr, active, True
    grown = lr
    for _ in range(_MOST_HALVINGS):
        x = state.x - lr.unsqueeze(-1) * state.residual
        value, gradient = problem.value_and_residual(x)
        turned = (gradient * state.residual).sum(dim=-1) < -0.5 * slope
        held = value <= state.value - _ARMIJO * lr * slope - slack
        held = held | ((value <= state.value + slack) & ~turned)
        pending = pending & ~held
        if first:
            grown, first = torch.where(held, 2 * lr, lr), False
        if not bool(pending.any()):
            break
        lr = torch.where(pending, lr / 2, lr)
        grown = torch.where(pending, lr, grown)
    verdict = torch.full(pending.shape, int(Status.RUNNING), dtype=torch.int64, device=pending.device)
    verdict = torch.where(pending, torch.full_like(verdict, Status.LINE_SEARCH_FAILED), verdict)
    return _State(x, gradient, value, state.momentum, grown), verdict
