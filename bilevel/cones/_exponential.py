"""The exponential cone. Its projection solves one scalar equation, of which Newton's steps carry the derivatives.

On the boundary, v = a p(ρ) + c d(ρ) with p = (ρ, 1, e^ρ) on the boundary of the cone, its normal d = (e^ρ, (1 − ρ) e^ρ, −1) on that of the polar
cone, and a, c ≥ 0. With v = (r, s, t) and g = ρ² − ρ + 1 the first two equations give a = ((ρ − 1) r + s)/g and c e^ρ = (r − ρ s)/g. The third is
h(ρ) = a e^ρ − c − t = 0, where h increases on the interval on which a and c are positive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from bilevel.cones._cone import Cone
from bilevel.cones._scalar_root import scalar_root

__all__ = ["Exponential"]

_REACH = 1000.0  # beyond it e^ρ is nothing beside the other numbers


@dataclass(frozen=True)
class Exponential(Cone):
    """The closure of {(x, y, z): y > 0, y e^{x/y} ≤ z}: exponentials, logarithms and entropies.

    Its dual is the closure of {(u, v, w): u < 0, −u e^{v/u} ≤ e w}. Derivatives are exact up to the seventh order.

    References
    ----------
    Friberg, "Projection onto the exponential cone: a univariate root-finding problem", Optimization Methods and Software 38, 2023.

    Examples
    --------
    >>> import torch
    >>> from bilevel import cones
    >>> cones.Exponential().project(torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)).round(decimals=4)
    tensor([0.4263, 0.7517, 1.3254], dtype=torch.float64)
    """

    @property
    def rows(self) -> int:
        return 3

    def project(self, v: torch.Tensor) -> torch.Tensor:
        inside, polar, face = _regions(v)
        elsewhere = (inside | polar | face).unsqueeze(-1)
        safe = v.new_tensor([1.0, 1.0, 0.0])  # on none of the other pieces
        made = _onto_boundary(torch.where(elsewhere, safe, v))
        r, _, t = v.unbind(-1)
        flat = torch.stack([r, torch.zeros_like(r), torch.where(t > 0, t, 0.0)], -1)
        made = torch.where(face.unsqueeze(-1), flat, made)
        made = torch.where(polar.unsqueeze(-1), torch.zeros_like(v), made)
        return torch.where(inside.unsqueeze(-1), v, made)

    def edges(self, v: torch.Tensor) -> torch.Tensor:
        inside, polar, face = _regions(v)
        r, s, t = v.unbind(-1)
        slack = self.project(v)
        size, multiplier = slack.norm(dim=-1), (slack - v).norm(dim=-1)
        # Where y → 0 with x < 0, the boundary bends into the face y = 0.
        near = torch.where(slack[..., 0] < 0, torch.minimum(size, slack[..., 1]), size)
        on_boundary = torch.stack([near, -multiplier, near], -1)
        y, u = torch.where(s > 0, s, 1.0), torch.where(r > 0, r, 1.0)
        # On the lines s = 0 of the cone and r = 0 of the polar cone they end at faces.
        within = torch.minimum(s, t - torch.where(inside & (s > 0), y * torch.exp(r / y), 0.0))
        beyond = torch.minimum(r, -t - torch.where(polar & (r > 0), u * torch.exp(s / u - 1), 0.0))
        made = torch.where(face.unsqueeze(-1), torch.stack([-r, s, t], -1), on_boundary)
        made = torch.where(polar.unsqueeze(-1), -beyond.unsqueeze(-1), made)
        return torch.where(inside.unsqueeze(-1), within.unsqueeze(-1), made)

    def of_clarabel(self, clarabel: Any) -> Any:
        return clarabel.ExponentialConeT()


def _regions(v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return whether v is in the cone, in its polar cone, and elsewhere behind the face y = 0."""
    r, s, t = v.unbind(-1)
    y, u = torch.where(s > 0, s, 1.0), torch.where(r > 0, r, 1.0)
    inside = torch.where(s > 0, y * torch.exp(r / y) <= t, (s == 0) & (r <= 0) & (t >= 0))
    polar = torch.where(r > 0, u * torch.exp(s / u - 1) <= -t, (r == 0) & (s <= 0) & (t <= 0))
    return inside, polar & ~inside, (r <= 0) & (s <= 0) & ~inside & ~polar


def _equation(rho: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return h and its slope at ρ, both times e^−|ρ|."""
    r, s, t = v.unbind(-1)
    shift = rho.detach().abs()  # a factor, which a derivative of the root does not see
    g, slope = rho * rho - rho + 1, 2 * rho - 1
    a, c = ((rho - 1) * r + s) / g, (r - rho * s) / g
    up, down = torch.exp(rho - shift), torch.exp(-rho - shift)
    h = a * up - c * down - t * torch.exp(-shift)
    return h, (a + (r - a * slope) / g) * up + (c + (s + c * slope) / g) * down


def _interval(v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ends of the interval on which a and c are positive, where ρ (...) is."""
    r, s, _ = v.unbind(-1)
    infinite = torch.full_like(r, torch.inf)
    low = torch.where(r > 0, 1 - s / torch.where(r > 0, r, 1.0), -infinite)
    high = torch.where(s > 0, r / torch.where(s > 0, s, 1.0), infinite)
    return torch.maximum(low, high.clamp(max=0.0) - _REACH), torch.minimum(high, low.clamp(min=0.0) + _REACH)


def _onto_boundary(v: torch.Tensor) -> torch.Tensor:
    rho = scalar_root(_equation, _interval, v)
    scale = rho.detach().clamp(min=0.0)
    small = torch.exp(-scale)
    p = torch.stack([rho * small, torch.ones_like(rho) * small, torch.exp(rho - scale)], -1)
    return (v * p).sum(-1, keepdim=True) / (p * p).sum(-1, keepdim=True) * p
