"""The maximum norm: a term that makes the largest entries equal."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel.prox._base import Manifold, Parameter, Term, as_parameter, check_nonnegative, detached, strength_of
from bilevel.prox._margins import largest, least, relative
from bilevel.prox._support import simplex_support

__all__ = ["LInf"]


@dataclass(frozen=True, eq=False)
class LInf(Term):
    """``g(x) = s max_j |x_j|``, over all entries of x.

    Parameters
    ----------
    strength
        s ≥ 0: a number or a tensor of shape ().

    Raises
    ------
    ArgumentError
        If the strength is negative or not finite.

    References
    ----------
    Parikh and Boyd, Proximal algorithms, 2014, section 6.5.2 (by Moreau's decomposition and the L1 ball).

    Examples
    --------
    >>> import torch
    >>> from bilevel import prox
    >>> prox.LInf(1.0).prox(torch.tensor([3.0, -2.5, 1.0]))
    tensor([ 2.2500, -2.2500,  1.0000])
    """

    strength: Parameter

    def __post_init__(self) -> None:
        check_nonnegative(self.where, "strength", self.strength)

    def _strength(self, x: torch.Tensor) -> torch.Tensor:
        return strength_of(self.where, self.strength, x, ())

    def value(self, x: torch.Tensor) -> torch.Tensor:
        return self._strength(x) * largest(x)

    def prox(self, v: torch.Tensor, step: Parameter = 1.0) -> torch.Tensor:
        if not v.numel():
            return v
        threshold = as_parameter(step, v) * self._strength(v)
        sizes = v.abs().reshape(-1)
        signs = detached(v).sign()
        tied = simplex_support(sizes, threshold.unsqueeze(-1)).reshape(v.shape)
        level = (torch.where(tied, v.abs(), 0.0).sum() - threshold) / tied.sum().clamp(min=1)
        clipped = torch.where(tied, signs * level, v)
        clipped = torch.where(level <= 0, torch.zeros_like(v), clipped)
        clipped = torch.where(v.isfinite().all() & threshold.isfinite(), clipped, float("nan"))
        return torch.where(threshold == 0, v, clipped)

    def manifold(self, x: torch.Tensor) -> Manifold:
        strength, x = self._strength(x), detached(x)
        signs = torch.where(x.abs() == largest(x), x.sign(), 0.0)
        tied = signs != 0
        count = tied.sum().clamp(min=1)
        smooth, zero = detached(strength) == 0, ~tied.any()

        def level(y: torch.Tensor) -> torch.Tensor:
            return (signs * y).sum() / count

        def retract(y: torch.Tensor) -> torch.Tensor:
            made = torch.where(zero, torch.zeros_like(y), torch.where(tied, signs * level(y), y))
            return torch.where(smooth, y, made)

        return Manifold(retract, lambda y: strength * level(y))

    def margin(self, x: torch.Tensor, slope: torch.Tensor, step: Parameter = 1.0) -> torch.Tensor:
        strength, size = self._strength(x), largest(x)
        safe = torch.where(strength == 0, 1.0, strength)
        tied = x.abs() == size
        # −∇f(x)/s is a convex combination of the ±e_j of the largest entries: each weight has to be positive.
        weights = -slope * x.sign() / safe * tied.sum()
        away = torch.where(tied, weights, relative(size - x.abs(), size))
        margins = torch.where(size == 0, 1 - slope.abs().sum() / safe, away)
        return least(torch.where(strength == 0, float("inf"), margins))
