"""The Euclidean ball and the second-order cone: sets with a curved boundary, on which vectors are shortened."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel.errors import ShapeError
from bilevel.prox._base import (
    Manifold,
    Parameter,
    Term,
    as_parameter,
    broadcast_to,
    check_finite,
    check_positive,
    detached,
    no_value,
    positive_of,
    rounding,
)
from bilevel.prox._margins import largest, least, relative, scale_of

__all__ = ["L2Ball", "SecondOrderCone"]


@dataclass(frozen=True, eq=False)
class L2Ball(Term):
    """The indicator function of {‖x − c‖₂ ≤ r}, over all entries of x.

    Parameters
    ----------
    radius
        r > 0: a number or a tensor of shape ().
    centre
        c: a number, or a tensor of a shape that expands to that of x.

    Raises
    ------
    ArgumentError
        If the radius is not positive, or the centre is not finite.
    ShapeError
        On use, if the centre does not expand to the shape of x.

    References
    ----------
    Parikh, Boyd, "Proximal Algorithms", Foundations and Trends in Optimization 1, 2014, section 6.5.1 (projection on the ball of a norm).

    Examples
    --------
    >>> import torch
    >>> from bilevel import prox
    >>> prox.L2Ball(1.0).prox(torch.tensor([3.0, 4.0]))
    tensor([0.6000, 0.8000])
    """

    radius: Parameter
    centre: Parameter = 0.0

    def __post_init__(self) -> None:
        check_positive(self.where, "radius", self.radius)
        check_finite(self.where, "centre", self.centre)

    def _radius(self, x: torch.Tensor) -> torch.Tensor:
        return positive_of(self.where, "radius", self.radius, x, ())

    def _centre(self, x: torch.Tensor) -> torch.Tensor:
        return broadcast_to(self.where, "centre", as_parameter(self.centre, x), x.shape)

    def _active(self, x: torch.Tensor) -> torch.Tensor:
        """Return whether x is on the boundary, up to rounding."""
        x, radius, centre = detached(x), detached(self._radius(x)), detached(self._centre(x))
        return _norm((x - centre).reshape(-1)) >= radius - rounding(x) * (radius + largest(centre))

    def value(self, x: torch.Tensor) -> torch.Tensor:
        return no_value(x)

    def prox(self, v: torch.Tensor, step: Parameter = 1.0) -> torch.Tensor:
        radius, centre = self._radius(v), self._centre(v)
        away = v - centre
        norm = _norm(away.reshape(-1))
        inside = norm <= radius
        return torch.where(inside, v, centre + away * (radius / torch.where(inside, 1.0, norm)))

    def manifold(self, x: torch.Tensor) -> Manifold:
        radius, centre, active = self._radius(x), self._centre(x), self._active(x)

        def retract(y: torch.Tensor) -> torch.Tensor:
            away = y - centre
            norm = torch.where(active, _norm(away.reshape(-1)), 1.0)
            return torch.where(active, centre + away * (radius / norm), y)

        return Manifold(retract)

    def margin(self, x: torch.Tensor, slope: torch.Tensor, step: Parameter = 1.0) -> torch.Tensor:
        away, move = x - self._centre(x), as_parameter(step, x) * slope
        norm = _norm(away.reshape(-1))
        outward = relative(-(move * away).sum(), norm)
        inside = relative(self._radius(x) - norm, self._radius(x))
        return least(torch.where(self._active(x), relative(outward, scale_of(away, move)), inside))


@dataclass(frozen=True, eq=False)
class SecondOrderCone(Term):
    """The indicator function of {(t, u): ‖u‖₂ ≤ t}, with t the first entry along the last axis of x.

    The other axes of x hold independent cones.

    References
    ----------
    Parikh and Boyd, Proximal algorithms, 2014, section 6.3.2.

    Examples
    --------
    >>> import torch
    >>> from bilevel import prox
    >>> prox.SecondOrderCone().prox(torch.tensor([0.0, 3.0, 4.0]))
    tensor([2.5000, 1.5000, 2.0000])
    """

    def _parts(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return t (..., 1), u (..., n − 1) and ‖u‖ (..., 1)."""
        if x.ndim == 0 or x.shape[-1] == 0:
            raise ShapeError(
                f"{self.where}: expected x (..., n) with n at least 1, got the shape {tuple(x.shape)}; leave the term out for an empty x"
            )
        head, tail = x[..., :1], x[..., 1:]
        return head, tail, _norm(tail).unsqueeze(-1)

    def _faces(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return whether x is the apex, and whether it is elsewhere on the boundary, of shape (..., 1)."""
        x = detached(x)
        head, _, norm = self._parts(x)
        apex = (x == 0).all(-1, keepdim=True)
        return apex, ~apex & ((head - norm).abs() <= rounding(x[..., :1]) * x.shape[-1] ** 0.5 * head.abs())

    def value(self, x: torch.Tensor) -> torch.Tensor:
        return no_value(x)

    def prox(self, v: torch.Tensor, step: Parameter = 1.0) -> torch.Tensor:
        head, _, norm = self._parts(v)
        made = torch.where(norm <= head, v, _onto_boundary(v))
        return torch.where((norm <= -head) & ~(norm <= head), torch.zeros_like(v), made)

    def manifold(self, x: torch.Tensor) -> Manifold:
        apex, boundary = self._faces(x)

        def retract(y: torch.Tensor) -> torch.Tensor:
            return torch.where(apex, torch.zeros_like(y), torch.where(boundary, _onto_boundary(y), y))

        return Manifold(retract)

    def margin(self, x: torch.Tensor, slope: torch.Tensor, step: Parameter = 1.0) -> torch.Tensor:
        move = as_parameter(step, x) * slope
        apex, boundary = self._faces(x)
        head, _, norm = self._parts(x)
        outward, _, sideways = self._parts(move)
        on_boundary = torch.minimum(outward, head)
        distance = torch.where(apex, outward - sideways, torch.where(boundary, on_boundary, head - norm))
        return least(relative(distance, scale_of(x, move)))


def _norm(x: torch.Tensor) -> torch.Tensor:
    """Return the Euclidean norm along the last axis, with derivative 0 where it is 0."""
    if not x.shape[-1]:
        return x.sum(-1)
    scale = detached(x).abs().amax(-1)
    scale = torch.where(scale > 0, scale, 1.0)
    squares = (x / scale.unsqueeze(-1)).square().sum(-1)
    empty = squares == 0
    return torch.where(empty, 0.0, torch.where(empty, 1.0, squares).sqrt()) * scale


def _onto_boundary(y: torch.Tensor) -> torch.Tensor:
    """Return ((t + ‖u‖)/2) (1, u/‖u‖) for y = (t, u) along the last axis, the nearest point on the boundary of the cone."""
    head, tail = y[..., :1], y[..., 1:]
    norm = _norm(tail).unsqueeze(-1)
    size = 0.5 * (head + norm)
    return torch.cat([size, size * (tail / torch.where(norm > 0, norm, 1.0))], -1)
