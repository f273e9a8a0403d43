"""The L1 norm and the elastic net: terms that make single entries zero."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel.prox._base import (
    Manifold,
    Parameter,
    Term,
    as_parameter,
    check_nonnegative,
    detached,
    entry_numbers,
    strength_of,
)
from bilevel.prox._entries import Entries
from bilevel.prox._margins import largest, least, relative

__all__ = ["L1", "ElasticNet"]


@dataclass(frozen=True, eq=False)
class L1(Term):
    """``g(x) = Σ_j s_j |x_j|``, the Lasso's term; its prox is soft thresholding.

    Parameters
    ----------
    strength
        s ≥ 0: a number or a tensor of shape (), or one for each unknown, of a shape that expands to that of x.

    Raises
    ------
    ArgumentError
        If a strength is negative or not finite.
    ShapeError
        On use, if the strengths do not expand to the shape of x.

    References
    ----------
    Parikh and Boyd, Proximal algorithms, 2014, section 6.5.2.

    Examples
    --------
    >>> import torch
    >>> from bilevel import prox
    >>> prox.L1(1.0).prox(torch.tensor([3.0, -0.5, -2.0]))
    tensor([ 2.,  0., -1.])
    """

    separable = True
    strength: Parameter

    def __post_init__(self) -> None:
        check_nonnegative(self.where, "strength", self.strength)

    def _strength(self, x: torch.Tensor) -> torch.Tensor:
        return strength_of(self.where, self.strength, x, x.shape)

    def value(self, x: torch.Tensor) -> torch.Tensor:
        return (self._strength(x) * x.abs()).sum()

    def prox(self, v: torch.Tensor, step: Parameter = 1.0) -> torch.Tensor:
        return _shrink(v, as_parameter(step, v) * self._strength(v))

    def _entries(self, like: torch.Tensor) -> Entries:
        return Entries(l1=entry_numbers(self.strength, like))

    def manifold(self, x: torch.Tensor) -> Manifold:
        return _same_signs(x, self._strength(x))

    def margin(self, x: torch.Tensor, slope: torch.Tensor, step: Parameter = 1.0) -> torch.Tensor:
        return _margin(x, slope, self._strength(x))

    def proven_zero(self, slope: torch.Tensor, move: torch.Tensor) -> torch.Tensor:
        return slope.abs() + move < self._strength(slope)


@dataclass(frozen=True, eq=False)
class ElasticNet(Term):
    """``g(x) = Σ_j s_j |x_j| + ½ r_j x_j²``.

    scikit-learn's ``alpha`` and ``l1_ratio`` are s = alpha · l1_ratio and r = alpha · (1 − l1_ratio).

    Parameters
    ----------
    l1
        s ≥ 0: a number or a tensor of shape (), or one for each unknown, of a shape that expands to that of x.
    l2
        r ≥ 0, likewise.

    Raises
    ------
    ArgumentError
        If a strength is negative or not finite.
    ShapeError
        On use, if the strengths do not expand to the shape of x.

    References
    ----------
    Zou and Hastie, Regularization and variable selection via the elastic net, 2005.

    Examples
    --------
    >>> import torch
    >>> from bilevel import prox
    >>> prox.ElasticNet(1.0, 1.0).prox(torch.tensor([3.0, -0.5, -2.0]))
    tensor([ 1.0000,  0.0000, -0.5000])
    """

    separable = True
    l1: Parameter
    l2: Parameter

    def __post_init__(self) -> None:
        check_nonnegative(self.where, "l1", self.l1)
        check_nonnegative(self.where, "l2", self.l2)

    def _strengths(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return strength_of(self.where, self.l1, x, x.shape), strength_of(self.where, self.l2, x, x.shape)

    def value(self, x: torch.Tensor) -> torch.Tensor:
        l1, l2 = self._strengths(x)
        return (l1 * x.abs() + 0.5 * l2 * x * x).sum()

    def prox(self, v: torch.Tensor, step: Parameter = 1.0) -> torch.Tensor:
        l1, l2 = self._strengths(v)
        step = as_parameter(step, v)
        return _shrink(v, step * l1) / (1 + step * l2)

    def _entries(self, like: torch.Tensor) -> Entries:
        return Entries(l1=entry_numbers(self.l1, like), l2=entry_numbers(self.l2, like))

    def manifold(self, x: torch.Tensor) -> Manifold:
        l1, l2 = self._strengths(x)
        lasso = _same_signs(x, l1)
        return Manifold(lasso.retract, lambda y: lasso.value(y) + 0.5 * (l2 * y * y).sum(), lasso.free)

    def margin(self, x: torch.Tensor, slope: torch.Tensor, step: Parameter = 1.0) -> torch.Tensor:
        return _margin(x, slope, self._strengths(x)[0])

    def proven_zero(self, slope: torch.Tensor, move: torch.Tensor) -> torch.Tensor:
        return slope.abs() + move < self._strengths(slope)[0]

    def convexity(self, x: torch.Tensor) -> torch.Tensor:
        return self._strengths(x)[1]


def _shrink(v: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Return sign(v) max(|v| − threshold, 0)."""
    return v - v.clamp(-threshold, threshold)


def _same_signs(x: torch.Tensor, strength: torch.Tensor) -> Manifold:
    """Return the manifold of the vectors with the zeros and the signs of x, and Σ s|x| on it."""
    x = detached(x)
    free = (x != 0) | (detached(strength) == 0)

    def value(y: torch.Tensor) -> torch.Tensor:
        return (strength * x.sign() * y).sum()

    return Manifold(lambda y: torch.where(free, y, 0.0), value, free)


def _margin(x: torch.Tensor, slope: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    smooth = strength == 0
    at_zero = 1 - slope.abs() / torch.where(smooth, 1.0, strength)
    margins = torch.where(x == 0, at_zero, relative(x.abs(), largest(x)))
    return least(torch.where(smooth, float("inf"), margins))
