"""Relative sizes for the margins of terms: of an empty set, of x together with a step, and the least of some."""

from __future__ import annotations

import torch

__all__ = ["least", "relative", "scale_of"]


def scale_of(x: torch.Tensor, move: torch.Tensor) -> torch.Tensor:
    """Return max|x| + max|move|, of shape (): the size that a margin in units of x is compared with."""
    return largest(x) + largest(move)


def largest(x: torch.Tensor) -> torch.Tensor:
    """Return max|x|, of shape (); 0 for an empty x."""
    return x.abs().max() if x.numel() else x.new_zeros(())


def relative(distance: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return distance / scale; 0 where both are 0."""
    empty = scale == 0
    return torch.where(empty, torch.zeros_like(distance), distance / torch.where(empty, 1.0, scale))


def least(*margins: torch.Tensor) -> torch.Tensor:
    """Return the least of all entries, of shape (), at most 1; a margin that does not count is ``inf``. NaN where one is NaN."""
    parts = [part.min() for part in margins if part.numel()] or [margins[0].new_ones(())]
    return (parts[0] if len(parts) == 1 else torch.stack(parts).min()).clamp(max=1.0)
