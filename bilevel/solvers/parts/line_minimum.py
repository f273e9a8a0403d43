"""The minimum along a direction, for steps that had to be shortened much: at a kink, or a bend, that is sharp beside the step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel.equations.problem import Problem

__all__ = ["LinePoint", "line_minimum"]

# The share of the first slope that may be left. More leaves the search on the wall of a valley, from where the Hessian does not show it.
_SLOPE_LEFT = 0.1
_MOST_TRIALS = 60


@dataclass(frozen=True, eq=False)
class LinePoint:
    """The points x (batch, n) at the steps t (batch,), with G (batch,) and ∇G (batch, n)."""

    x: torch.Tensor
    value: torch.Tensor
    residual: torch.Tensor
    t: torch.Tensor


def line_minimum(
    problem: Problem, x: torch.Tensor, d: torch.Tensor, slope: torch.Tensor, first: LinePoint, these: torch.Tensor
) -> LinePoint:
    """Go on from ``first`` until at most a tenth of the slope φ′(0) is left, φ(t) = G(x + t d). Only ``these`` (batch,) move.

    Newton's steps zigzag between the walls of a valley whose floor is a bend narrower than the steps, as that of a softplus far
    from it. Sufficient decrease alone lets them. At the floor the Hessian shows the bend, and the next step follows the valley.

    The bracket is cut by the secant of the slopes and in half in turn. Each trial costs one evaluation of the batch.

    Parameters
    ----------
    problem, x, d, slope
        An argmin, the points (batch, n) and directions (batch, n) where the steps began, and φ′(0) < 0, (batch,).
    first
        Steps with sufficient decrease.
    these
        (batch,) bool.

    Returns
    -------
    The lowest points that were tried, ``first`` among them.
    """
    best, t, value, residual = first, first.t, first.value, first.residual
    low, low_slope, low_value = torch.zeros_like(t), slope, torch.full_like(t, torch.inf)
    high = high_slope = torch.full_like(t, torch.inf)
    for trial in range(_MOST_TRIALS):
        turned = (residual * d).sum(dim=-1)
        lower = these & (value <= best.value)
        if bool(lower.any()):
            rows = lower.unsqueeze(-1)
            best = LinePoint(
                torch.where(rows, x + t.unsqueeze(-1) * d, best.x), torch.where(lower, value, best.value),
                torch.where(rows, residual, best.residual), torch.where(lower, t, best.t),
            )  # fmt: skip
        these = these & ~((turned.abs() <= -_SLOPE_LEFT * slope) & lower)
        if not bool(these.any()):
            break
        falls = these & (turned < 0) & (value <= low_value)
        rises = these & ~falls
        low, low_value = torch.where(falls, t, low), torch.where(falls, value, low_value)
        low_slope = torch.where(falls, turned, low_slope)
        high, high_slope = torch.where(rises, t, high), torch.where(rises, turned, high_slope)
        secant = (-low_slope / (high_slope - low_slope)).nan_to_num(0.5, 0.5, 0.5).clamp(0.05, 0.95)
        inside = low + (high - low) * (0.5 if trial % 2 else secant)
        t = torch.where(these, torch.where(torch.isfinite(high), inside, 2 * t), t)
        value, residual = problem.value_and_residual(torch.where(these.unsqueeze(-1), x + t.unsqueeze(-1) * d, best.x))
    return best
