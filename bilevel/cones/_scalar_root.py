"""The root of one scalar equation for each problem, with derivatives: bisection, which no derivative sees, and Newton's steps, which carry them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bilevel.prox._batched import batched

__all__ = ["scalar_root"]

_BISECTIONS = 56
_NEWTON = 3  # each step doubles the order up to which derivatives are exact: 1, 3, 7


def scalar_root(
    equation: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    interval: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    v: torch.Tensor,
) -> torch.Tensor:
    """Return the root u (...) of an equation that increases in u. Its derivatives in ``v`` are exact up to the seventh order.

    Parameters
    ----------
    equation
        (u, v) ↦ the value and its slope in u, both up to one positive factor.
    interval
        v ↦ numbers below and above the root.
    v
        (..., k).
    """

    def bisected(v: torch.Tensor) -> tuple[torch.Tensor]:
        low, high = interval(v)
        for _ in range(_BISECTIONS):
            middle = 0.5 * (low + high)
            below = equation(middle, v)[0] < 0
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (0.5 * (low + high),)

    (u,) = batched(bisected, v)
    for _ in range(_NEWTON):
        value, slope = equation(u, v)
        step = value / slope
        # At a piece's edge, as near as rounding, the equation may be flat and its value noise.
        u = u - torch.where(step.abs() < 1, step, 0.0)
    return u
