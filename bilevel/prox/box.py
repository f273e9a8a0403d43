"""Bounds: the non-negative orthant and the box."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel.errors import ArgumentError
from bilevel.prox._base import (
    Manifold,
    Parameter,
    Term,
    as_parameter,
    broadcast_to,
    check_numbers,
    demand,
    detached,
    entry_numbers,
    no_value,
    readable,
)
from bilevel.prox._entries import Entries
from bilevel.prox._margins import least, relative, scale_of

__all__ = ["Box", "NonNegative"]


@dataclass(frozen=True, eq=False)
class NonNegative(Term):
    """The indicator function of x ≥ 0; its prox is max(x, 0).

    References
    ----------
    Parikh, Boyd, "Proximal Algorithms", Foundations and Trends in Optimization 1, 2014, section 6.2.4 (projection on a box).

    Examples
    --------
    >>> import torch
    >>> from bilevel import prox
    >>> prox.NonNegative().prox(torch.tensor([3.0, -0.5]))
    tensor([3., 0.])
    """

    separable = True

    def value(self, x: torch.Tensor) -> torch.Tensor:
        return no_value(x)

    def prox(self, v: torch.Tensor, step: Parameter = 1.0) -> torch.Tensor:
        return v.relu()

    def _entries(self, like: torch.Tensor) -> Entries:
        return Entries(lower=0.0)

    def manifold(self, x: torch.Tensor) -> Manifold:
        free = detached(x) > 0
        return Manifold(lambda y: torch.where(free, y, 0.0), free=free)

    def margin(self, x: torch.Tensor, slope: torch.Tensor, step: Parameter = 1.0) -> torch.Tensor:
        move = as_parameter(step, x) * slope
        return least(relative(torch.where(x > 0, x, move), scale_of(x, move)))

    def proven_zero(self, slope: torch.Tensor, move: torch.Tensor) -> torch.Tensor:
        return slope > move


@dataclass(frozen=True, eq=False)
class Box(Term):
    """The indicator function of lower ≤ x ≤ upper; its prox clips.

    Parameters
    ----------
    lower
        A number, or a tensor of a shape that expands to that of x. ``-inf`` (or None) is no bound.
    upper
        Likewise; ``inf`` (or None) is no bound. Where it equals ``lower``, x is fixed, and moves with ``lower``.

    Raises
    ------
    ArgumentError
        If a lower bound is above its upper bound, or if a bound is NaN.
    ShapeError
        On use, if the bounds do not expand to the shape of x.

    References
    ----------
    Parikh, Boyd, "Proximal Algorithms", Foundations and Trends in Optimization 1, 2014, section 6.2.4 (projection on a box).

    Examples
    --------
    >>> import torch
    >>> from bilevel import prox
    >>> prox.Box(-1.0, torch.tensor([1.0, 2.0])).prox(torch.tensor([3.0, -4.0]))
    tensor([ 1., -1.])
    """

    separable = True
    lower: Parameter | None = None
    upper: Parameter | None = None

    def __post_init__(self) -> None:
        like = torch.empty((), dtype=torch.float64)
        given = {name: side for name, side in (("lower", self.lower), ("upper", self.upper)) if side is not None}
        for name, side in given.items():
            check_numbers(self.where, name, side)
        sides = [as_parameter(side, like) for side in given.values()]
        if len(sides) < 2:
            return
        try:
            lower, upper = torch.broadcast_tensors(*sides)
        except RuntimeError:
            raise ArgumentError(
                f"{self.where}: expected bounds of one shape, got {tuple(sides[0].shape)} and {tuple(sides[1].shape)}; "
                "pass a number or one bound for each unknown"
            ) from None
        crossed = lower > upper
        if not (readable(lower) and readable(upper)):
            demand(self.where, "lower", "at most upper", crossed.any())
        elif bool(crossed.any()):
            low, high = lower[crossed].reshape(-1)[0].item(), upper[crossed].reshape(-1)[0].item()
            raise ArgumentError(f"{self.where}: expected lower <= upper, got {low:g} above {high:g}; exchange them")

    def _bounds(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        infinite = float("inf")
        lower = as_parameter(-infinite if self.lower is None else self.lower, x)
        upper = as_parameter(infinite if self.upper is None else self.upper, x)
        if not (readable(lower) and readable(upper)):
            lower = torch.where(lower > upper, float("nan"), lower)
        return broadcast_to(self.where, "lower", lower, x.shape), broadcast_to(self.where, "upper", upper, x.shape)

    def value(self, x: torch.Tensor) -> torch.Tensor:
        return no_value(x)

    def prox(self, v: torch.Tensor, step: Parameter = 1.0) -> torch.Tensor:
        return v.clamp(*self._bounds(v))

    def _entries(self, like: torch.Tensor) -> Entries:
        lower, upper = (None if side is None else entry_numbers(side, like) for side in (self.lower, self.upper))
        if isinstance(lower, torch.Tensor) or isinstance(upper, torch.Tensor):
            lower, upper = (detached(side).reshape(-1) for side in self._bounds(like))
        return Entries(lower=lower, upper=upper)

    def manifold(self, x: torch.Tensor) -> Manifold:
        lower, upper = self._bounds(x)
        x = detached(x)
        below, above = x <= detached(lower), x >= detached(upper)
        free = ~(below | above)

        def retract(y: torch.Tensor) -> torch.Tensor:
            return torch.where(below, lower, torch.where(above, upper, y))

        return Manifold(retract, free=free)

    def margin(self, x: torch.Tensor, slope: torch.Tensor, step: Parameter = 1.0) -> torch.Tensor:
        lower, upper = self._bounds(x)
        move = as_parameter(step, x) * slope
        below, above = x <= lower, x >= upper
        inside = torch.minimum(x - lower, upper - x)
        distance = torch.where(below, move, torch.where(above, -move, inside))
        return least(torch.where(below & above, float("inf"), relative(distance, scale_of(x, move))))
