"""Plain and damped fixed-point iteration."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel.equations.problem import Problem
from bilevel.errors import ArgumentError
from bilevel.reports import Status
from bilevel.setting_checks import check_number, check_steps
from bilevel.solvers._base import Goal, InnerSolution, InnerSolver, iterate

__all__ = ["FixedPointIteration"]

_MAX_STEPS = 10_000
# After so many steps without a lower residual, whether rounding is the reason is looked at.
CHECK_EVERY = 64


def check_fixed_point(problem: Problem, solver: str) -> None:
    """Raise unless ``problem`` has a mapping to iterate."""
    if not problem.is_fixed_point:
        raise ArgumentError(
            f"{problem.where}: expected a fixed point for {solver}, which iterates a mapping, got "
            f"{'an objective' if problem.minimizes else 'a residual'}; take Newton(), "
            f"{'LBFGS()' if problem.minimizes else 'ScipyRoot()'}, or state it as bilevel.fixed_point"
        )


def rounding_verdict(
    problem: Problem, x: torch.Tensor, residual: torch.Tensor, stalled: torch.Tensor, threshold: torch.Tensor
) -> torch.Tensor | None:
    """Return ``STAGNATED`` for those ``stalled`` whose R at ``x`` is at rounding level, ``RUNNING`` for the others; None if all are.

    Rounding level is eight times what R changes by when every entry of ``x`` moves by one unit in its last place, as a norm: one evaluation.
    It is also one such unit of each entry, as x − T(x) is a multiple of it. Each entry has to be at its own rounding, or so small that the
    others keep ‖R‖ above ``threshold``: the rounding of an unknown in large units hides the progress of one in small units. Two more
    evaluations measure that.
    """
    eps, n = torch.finfo(x.dtype).eps, x.shape[-1]

    def moved(irrational: float) -> torch.Tensor:
        signs = 1 - 2 * (torch.arange(n, device=x.device) * irrational % 1).round()
        return problem.residual(x * (1 + eps * signs.to(x))) - residual

    size = residual.abs()
    change = moved(0.6180339887)
    absorbed = (size <= eps * x.abs()).all(dim=-1)
    ended = stalled & ((residual.norm(dim=-1) <= 8 * change.norm(dim=-1)) | absorbed)
    if not bool(ended.any()):
        return None
    if not bool((absorbed | ~ended).all()):
        # An entry may change little by chance, not three times.
        own = torch.stack([change.abs(), moved(0.7548776662).abs(), moved(0.5698402910).abs(), eps * x.abs()]).amax(
            dim=0
        )
        floor = torch.maximum(8 * own, threshold.unsqueeze(-1) / n**0.5)
        ended = ended & (absorbed | (size <= floor).all(dim=-1))
        if not bool(ended.any()):
            return None
    return torch.where(ended, int(Status.STAGNATED), int(Status.RUNNING))


@dataclass(frozen=True)
class FixedPointIteration(InnerSolver):
    """Iterate x ← d x + (1 − d) T(x).

    Converges where the mapping is a contraction, with its factor as rate; damping d > 0 also tames a mapping
    that oscillates. One evaluation of T for each step, and no memory beyond the iterate. A problem whose residual is at rounding
    level, and has not fallen for 64 steps, ends there.

    Parameters
    ----------
    max_steps
        The most steps; None for 10,000, spending which is a failure, where spending a given budget with no
        tolerance asked is none.
    damping
        d in [0, 1): the share of the old iterate that is kept.

    Raises
    ------
    ArgumentError
        If a setting is out of its range; on use, for an argmin or a root.

    References
    ----------
    Banach 1922; Krasnoselskii 1955 (damped).

    Examples
    --------
    >>> import torch, bilevel
    >>> layer = bilevel.fixed_point(lambda x, a: torch.cos(a * x), solver=FixedPointIteration())
    >>> layer(torch.zeros((), dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    tensor(0.7391, dtype=torch.float64)
    """

    max_steps: int | None = None
    damping: float = 0.0

    def __post_init__(self) -> None:
        check_steps("FixedPointIteration", "max_steps", self.max_steps, optional=True)
        check_number("FixedPointIteration", "damping", self.damping, below=1.0, closed=True)

    def solve(self, problem: Problem, init: torch.Tensor, goal: Goal) -> InnerSolution:
        check_fixed_point(problem, "FixedPointIteration")
        share = 1.0 - self.damping
        start = _State(init, problem.residual(init))
        steps, seen = 0, start.residual.norm(dim=-1)

        def step(state: _State, active: torch.Tensor) -> tuple[_State, torch.Tensor | None]:
            nonlocal steps, seen
            steps += 1
            verdict = None
            if steps % CHECK_EVERY == 0:
                norm = state.residual.norm(dim=-1)
                stalled = active & ~(norm < seen)
                seen = torch.minimum(norm, seen)
                if bool(stalled.any()):
                    verdict = rounding_verdict(problem, state.x, state.residual, stalled, goal.threshold)
            x = torch.sub(state.x, state.residual, alpha=share)
            return _State(x, problem.residual(x)), verdict

        return iterate(start, step, goal, self.max_steps or _MAX_STEPS)[0]


@dataclass(frozen=True, eq=False)
class _State:
    """An iterate with R = x − T(x) there."""

    x: torch.Tensor
    residual: torch.Tensor
