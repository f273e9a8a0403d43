"""The projection on a simplex, in the form that its support gives it: affine, with a support found by sorting."""

from __future__ import annotations

import torch

from bilevel.prox._base import detached

__all__ = ["onto_sum", "simplex_support"]


def simplex_support(v: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Return where the projection of v (..., n) on {x ≥ 0, Σx = radius} is positive; ``radius`` (..., 1)."""
    v, radius = detached(v), detached(radius)
    falling = v.sort(dim=-1, descending=True).values
    count = torch.arange(1, v.shape[-1] + 1, dtype=v.dtype, device=v.device)
    levels = (falling.cumsum(-1) - radius) / count
    last = (falling > levels).sum(-1, keepdim=True).clamp(min=1)
    level = levels.gather(-1, last - 1)
    return (v > level) | (v == falling[..., :1])


def onto_sum(y: torch.Tensor, support: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Return the projection of y (..., n) on {x = 0 off the support, Σx = radius (..., 1)}.

    The second pass removes the rounding that large entries leave.
    """
    count = support.sum(-1, keepdim=True).clamp(min=1)
    x = torch.where(support, y, 0.0)
    for _ in range(2):
        x = torch.where(support, x - (x.sum(-1, keepdim=True) - radius) / count, 0.0)
    return x
