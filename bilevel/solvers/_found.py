"""Judged solutions of a batch of constrained problems."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from bilevel.reports import StatusMessages
from bilevel.solvers._base import merge
from bilevel.solvers._implied import Weak

__all__ = ["Found"]


@dataclass(frozen=True, eq=False)
class Found:
    """Judged solutions. Every tensor has a leading batch axis.

    ``weak``: the active constraints with multiplier zero, for the problems whose derivative may not exist because of these alone. ``lower`` (K, n):
    points beside saddles at which the objective is lower.
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

    def then(self, these: torch.Tensor, other: Found) -> Found:
        """Return the ``other`` solutions, found afterwards, for the problems ``these`` (K,), and these ones for the rest."""
        known = [(self.weak, ~these), (other.weak, these)]
        weak = [some.among(mask) for some, mask in known if some is not None]
        other = replace(
            other,
            iterations=self.iterations + other.iterations,
            words={**self.words, **other.words},
            weak=weak[0].joined(weak[-1]) if weak else None,
        )
        return merge(these, other, self)
