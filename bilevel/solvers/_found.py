"""Judged solutions of a batch of constrained problems."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel.reports import StatusMessages
from bilevel.solvers._implied import Weak

__all__ = ["Found"]


@dataclass(frozen=True, eq=False)
class Found:
    """Judged solutions. Every tensor has a leading batch axis.

    ``weak``: the constraints with multiplier zero, of problems where these alone may leave no derivative. ``lower`` (K, n): the points beside saddles
    at which the objective is lower.
    """

    x: torch.Tensor
    equality: torch.Tensor
    inequality: torch.Tensor
    status: torch.Tensor
    iterations: torch.Tensor
    degenerate: torch.Tensor
    words: StatusMessages
    solver: str
    weak: Weak | None = None
    lower: torch.Tensor | None = None

    def where(self, these: torch.Tensor, other: Found) -> Found:
        """Return these solutions for the problems ``these`` (K,), and the ``other`` ones for the rest; all of both iterations were needed."""
        rows = these.unsqueeze(-1)
        known = [(self.weak, these), (other.weak, ~these)]
        weak = [some.among(mask) for some, mask in known if some is not None]
        return Found(
            torch.where(rows, self.x, other.x),
            torch.where(rows, self.equality, other.equality),
            torch.where(rows, self.inequality, other.inequality),
            torch.where(these, self.status, other.status),
            self.iterations + torch.where(these, 0, other.iterations),
            torch.where(these, self.degenerate, other.degenerate),
            {**self.words, **other.words}, other.solver,
            weak[0].joined(weak[-1]) if weak else None,
            other.lower,
        )  # fmt: skip
