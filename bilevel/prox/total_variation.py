"""Total variation along a line: a term that makes neighbouring entries equal."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel.errors import ShapeError
from bilevel.prox._base import Manifold, Parameter, Term, as_parameter, check_nonnegative, detached, strength_of
from bilevel.prox._batched import batched
from bilevel.prox._margins import largest, least, relative
from bilevel.prox._taut_string import jumps, segment_means

__all__ = ["TotalVariation1D"]


@dataclass(frozen=True, eq=False)
class TotalVariation1D(Term):
    """``g(x) = s Σ_i |x_{i+1} − x_i|``, along the last axis of x.

    The other axes of x hold independent signals. The prox is exact: equal neighbours are equal to the last bit.

    Parameters
    ----------
    strength
        s ≥ 0: a number, a tensor of shape (), or one for each signal.

    Raises
    ------
    ArgumentError
        If a strength is negative or not finite.
    ShapeError
        On use, if x is a number.

    References
    ----------
    Davies and Kovac, Local extremes, runs, strings and multiresolution, 2001; Hintermüller, Ito and Kunisch, The primal-dual
    active set strategy as a semismooth Newton method, 2003.

    Examples
    --------
    >>> import torch
    >>> from bilevel import prox
    >>> prox.TotalVariation1D(1.0).prox(torch.tensor([0.0, 1.0, 5.0, 6.0]))
    tensor([1., 1., 5., 5.])
    """

    strength: Parameter

    def __post_init__(self) -> None:
        check_nonnegative(self.where, "strength", self.strength)

    def _strength(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim == 0 or not x.shape[-1]:
            raise ShapeError(
                f"{self.where}: expected x (..., n) with n at least 1, got the shape {tuple(x.shape)}; pass a vector, or leave the term out"
            )
        return strength_of(self.where, self.strength, x, x.shape[:-1]).unsqueeze(-1)

    def value(self, x: torch.Tensor) -> torch.Tensor:
        return (self._strength(x) * x.diff(dim=-1).abs()).sum()

    def prox(self, v: torch.Tensor, step: Parameter = 1.0) -> torch.Tensor:
        threshold = as_parameter(step, v) * self._strength(v)
        (signs,) = batched(jumps, v, threshold)
        return segment_means(v, threshold, signs)

    def manifold(self, x: torch.Tensor) -> Manifold:
        strength = self._strength(x)
        signs = detached(x).diff(dim=-1).sign()
        smooth = detached(strength) == 0

        def retract(y: torch.Tensor) -> torch.Tensor:
            return torch.where(smooth, y, segment_means(y, torch.zeros_like(strength), signs))

        return Manifold(retract, lambda y: (strength * signs * y.diff(dim=-1)).sum())

    def margin(self, x: torch.Tensor, slope: torch.Tensor, step: Parameter = 1.0) -> torch.Tensor:
        strength = self._strength(x)
        steps = x.diff(dim=-1)
        dual = slope.cumsum(-1)[..., :-1].abs() / torch.where(strength == 0, 1.0, strength)
        margins = torch.where(steps == 0, 1 - dual, relative(steps.abs(), largest(x)))
        return least(torch.where(strength == 0, float("inf"), margins))
