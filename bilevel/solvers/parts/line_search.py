"""A line search for a batch. Every problem has its own bracket, and all are evaluated together."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel.equations.problem import Problem

__all__ = ["LineSearchResult", "line_search"]

_DECREASE = 0.1  # δ of Hager & Zhang: the required share of the predicted decrease
_CURVATURE = 0.9  # σ: the allowed share of the initial slope
_MOST_TRIALS = 40


@dataclass(frozen=True, eq=False)
class LineSearchResult:
    """The result of a line search: t (batch,), G, ∇G (batch, n), where it failed (batch,) bool, and where G fell at every trial."""

    x: torch.Tensor
    value: torch.Tensor
    gradient: torch.Tensor
    failed: torch.Tensor
    endless: torch.Tensor


def line_search(
    problem: Problem,
    x: torch.Tensor,
    d: torch.Tensor,
    value: torch.Tensor,
    slope: torch.Tensor,
    first: torch.Tensor,
    noise: torch.Tensor,
    threshold: torch.Tensor,
    active: torch.Tensor,
) -> LineSearchResult:
    """Find, per problem, t with the strong Wolfe conditions or Hager & Zhang's approximate ones.

    With φ(t) = G(x + t d), a step is taken where

    * φ(t) ≤ φ(0) + δ t φ′(0) and |φ′(t)| ≤ σ |φ′(0)|, or
    * φ(t) ≤ φ(0) + ε and σ φ′(0) ≤ φ′(t) ≤ (2δ − 1) φ′(0), which rounding of φ does not spoil, or
    * φ(t) ≤ φ(0) + ε and the gradient's norm is at or below ``threshold``.

    Until then the bracket is cut by the secant of the slopes, by a parabola, or in half. The slope is negative at its
    lower end, and not at its upper end. Each trial costs one evaluation of the batch. A problem that has a step, or is
    not ``active``, does not move.

    Parameters
    ----------
    problem
        An argmin.
    x, d
        (batch, n): the point and a direction with slope φ′(0) < 0.
    value, slope
        φ(0) and φ′(0), (batch,).
    first
        The first t tried (batch,).
    noise
        ε (batch,): the rounding error of φ.
    threshold
        The gradient norm that ends the solve (batch,).
    active
        (batch,) bool.

    References
    ----------
    Nocedal & Wright, "Numerical Optimization", 2006, algorithms 3.5 and 3.6; Hager & Zhang, "A new conjugate
    gradient method with guaranteed descent and an efficient line search", SIAM J. Optim. 2005 (conditions T1
    and T2).
    """
    low, low_value, low_slope = torch.zeros_like(slope), value, slope
    high = high_value = high_slope = torch.full_like(slope, float("inf"))
    t = first
    pending = active
    for trial in range(_MOST_TRIALS):
        point = torch.where(active.unsqueeze(-1), x + t.unsqueeze(-1) * d, x)
        found, gradient = problem.value_and_residual(point)
        turned = (gradient * d).sum(dim=-1)
        wolfe = (found <= value + _DECREASE * t * slope) & (turned.abs() <= -_CURVATURE * slope)  # False for NaN
        pending = pending & ~wolfe
        if not bool(pending.any()):
            return LineSearchResult(point, found, gradient, pending, pending)
        near = found <= value + noise
        approximate = near & (turned >= _CURVATURE * slope) & (turned <= (2 * _DECREASE - 1) * slope)
        ended = near & (gradient.norm(dim=-1) <= threshold)
        pending = pending & ~(approximate | ended)
        if not bool(pending.any()):
            return LineSearchResult(point, found, gradient, pending, pending)
        descends = pending & near & (turned < 0)
        rises = pending & ~descends
        low, low_value = torch.where(descends, t, low), torch.where(descends, found, low_value)
        low_slope = torch.where(descends, turned, low_slope)
        high, high_value = torch.where(rises, t, high), torch.where(rises, found, high_value)
        high_slope = torch.where(rises, turned, high_slope)
        inside = _inside(low, low_value, low_slope, high, high_value, high_slope, halve=trial % 3 == 2)
        beyond = t * torch.clamp((slope / (slope - turned)).nan_to_num(posinf=10.0, neginf=10.0), min=2.0, max=10.0)
        beyond = torch.where(turned > slope, beyond, 10 * t)
        t = torch.where(pending, torch.where(torch.isfinite(high), inside, beyond), t)
    # A step that descends but misses the curvature condition is still used.
    rescued = pending & (low > 0)
    t = torch.where(rescued, low, t)
    point = torch.where(active.unsqueeze(-1), x + t.unsqueeze(-1) * d, x)
    found, gradient = problem.value_and_residual(point)
    return LineSearchResult(point, found, gradient, pending & ~rescued, rescued & (high == torch.inf))


def _inside(
    low: torch.Tensor,
    low_value: torch.Tensor,
    low_slope: torch.Tensor,
    high: torch.Tensor,
    high_value: torch.Tensor,
    high_slope: torch.Tensor,
    *,
    halve: bool,
) -> torch.Tensor:
    """Return a point inside the bracket: by a secant or a parabola, or sometimes the midpoint."""
    width = high - low
    if halve:
        return low + 0.5 * width
    secant = -low_slope / (high_slope - low_slope)
    parabola = -low_slope * width / (2 * (high_value - low_value - low_slope * width))
    share = torch.where(high_slope > 0, secant, parabola)
    # Outside the objective's domain, it is only known that the step was too long.
    share = torch.where(torch.isfinite(high_value) & torch.isfinite(share), share, torch.full_like(share, 0.1))
    return low + width * torch.clamp(share, min=0.05, max=0.95)
