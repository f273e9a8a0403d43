"""Whether a stationary point with a singular Hessian is a minimum. Second derivatives do not decide this, so nearby points are evaluated.

At 3, the slope and curvature of (x − 3)³ are zero, and it falls to the left. (x − 3)⁴ has its minimum there. Newton's
method converges linearly to both: the next step is half, or two thirds, of the last one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bilevel.equations.problem import Problem
from bilevel.solvers.judging.error import residual_rounding

__all__ = ["SLOW", "falls_beside", "is_slow", "slow_directions"]

# If a Newton step leaves this share of the residual, or of the last step, convergence is not quadratic.
SLOW = 0.2
# The second distance that is tried, as a share of the first.
_NEARER = 1 / 2


def is_slow(problem: Problem, x: torch.Tensor, residual: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    """Return where the Newton step ``error`` (batch, n) leaves much of R, (batch,) bool. It costs one gradient."""
    left = problem.residual(x - error).norm(dim=-1)
    moved = (error.abs() > 8 * torch.finfo(x.dtype).eps * x.abs()).any(dim=-1)
    return moved & ~(left <= SLOW * residual.norm(dim=-1))


def slow_directions(x: torch.Tensor, error: torch.Tensor, these: torch.Tensor) -> list[torch.Tensor]:
    """Return directions (batch, n) in which ``these`` problems (batch,) converged slowly: the next step, and its signs in the units of x.

    Along the step alone, the unknown that is farthest from its solution would hide the others.
    """
    error = torch.where(these.unsqueeze(-1), error, 0.0).nan_to_num(0.0, 0.0, 0.0)
    return [error, error.sign() * x.abs().clamp_min(1e-5)]


def falls_beside(
    problem: Problem,
    x: torch.Tensor,
    residual: torch.Tensor,
    error: torch.Tensor,
    start: torch.Tensor,
    directions: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Return where the objective falls from ``x`` along one of the ``directions``, (batch,) bool. Each costs two gradients.

    Parameters
    ----------
    problem, x, residual
        An argmin, and R at ``x`` (batch, n), which is small.
    error
        The estimated error of x (batch, n).
    start
        The initial guess of the search (batch, n). It gives a scale to unknowns whose solution is zero.
    directions
        Each (batch, n); zero for problems to skip. Both signs are tried.
    """
    eps, error = torch.finfo(x.dtype).eps, error.nan_to_num(0.0, 0.0, 0.0)
    size = torch.maximum(x.abs(), (x - start).abs()).clamp_min(1e-5)
    found = torch.zeros_like(x[:, 0], dtype=torch.bool)
    for direction in directions:
        length = (direction.abs() / size).amax(dim=-1, keepdim=True)
        unit = torch.where(length > 0, direction / length, 0.0).nan_to_num(0.0, 0.0, 0.0)
        # The distance is well beyond the solution: with slow convergence, ``error`` is a quarter of the way to it.
        reach = (32 * (error.abs() / size).amax(dim=-1, keepdim=True)).clamp_min(eps**0.25)
        step = reach * unit
        here = (residual * _largest_one(step)).sum(dim=-1).abs()
        for sign in (1.0, -1.0):
            if bool((fell := _slope(problem, x, sign * step)[0] < -4 * here).any()):
                # At that distance there may be another basin. From a saddle the objective falls at once.
                slope, noise = _slope(problem, x, _NEARER * sign * step, noisy=True)
                found = found | (fell & (slope < -noise) & (slope < -here))
    return found


def _slope(
    problem: Problem, x: torch.Tensor, step: torch.Tensor, *, noisy: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the slope along ``step`` (batch, n) at x + step, relative to its largest term, and if wanted its rounding error."""
    unit = _largest_one(step)
    there = problem.residual(x + step)
    slope = (there * unit).sum(dim=-1)
    if not noisy:
        return slope, torch.zeros_like(slope)
    return slope, (residual_rounding(problem, x + step, there) * unit.abs()).sum(dim=-1)


def _largest_one(step: torch.Tensor) -> torch.Tensor:
    return step / step.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(step.dtype).tiny)
