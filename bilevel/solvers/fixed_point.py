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
# After this many steps without a lower residual, rounding is checked as the reason.
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
    """Return ``STAGNATED`` for the ``stalled`` problems whose R at ``x`` is at rounding level, ``RUNNING`` for the others; None if all are running.

    The rounding level is eight times the norm of the change of R when every entry of ``x`` moves by one unit in its
    last place. It costs one evaluation. It is at least one such unit for each entry, because x − T(x) is a multiple of
    it. Each entry has to be at its own rounding level, or so small that the others keep ‖R‖ above ``threshold``.
    Otherwise the rounding of an unknown in large units would hide the progress of one in small units. This costs two
    more evaluations.
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
        # An entry may change little by chance once, but not three times.
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

    It converges if the mapping is a contraction, with the contraction factor as rate. Damping d > 0 also helps with a
    mapping that oscillates. A step costs one evaluation of T, and no memory beyond the iterate. A problem ends if its
    residual is at rounding level and has not fallen for 64 steps.

    Parameters
    ----------
    max_steps
        The largest number of steps; None: 10,000, and spending them all is a failure. A number is a budget: spending it
        without a tolerance is a success.
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
