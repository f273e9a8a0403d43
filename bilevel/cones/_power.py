"""The power cone. Its projection solves one scalar equation, of which Newton's steps carry the derivatives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from bilevel.cones._cone import Cone
from bilevel.cones._scalar_root import scalar_root
from bilevel.setting_checks import check_number

__all__ = ["Power"]

_REACH = 300.0  # in u: beyond it one of the three numbers is nothing beside the others


@dataclass(frozen=True)
class Power(Cone):
    """{(x, y, z): x^α y^{1−α} ≥ abs(z), x ≥ 0, y ≥ 0}: powers, p-norms and geometric means.

    Its dual is {(u, v, w): (u/α)^α (v/(1−α))^{1−α} ≥ abs(w), u ≥ 0, v ≥ 0}. Derivatives are exact up to the seventh order.

    Parameters
    ----------
    exponent
        α, between 0 and 1.

    Raises
    ------
    ArgumentError
        If the exponent is not between 0 and 1.

    References
    ----------
    Hien, "Differential properties of Euclidean projection onto power cone", Mathematical Methods of Operations Research 82, 2015.

    Examples
    --------
    >>> import torch
    >>> from bilevel import cones
    >>> cones.Power(0.5).project(torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64)).round(decimals=4)
    tensor([1.3333, 1.3333, 1.3333], dtype=torch.float64)
    """

    exponent: float

    def __post_init__(self) -> None:
        check_number("cones.Power", "exponent", self.exponent, below=1.0)

    @property
    def rows(self) -> int:
        return 3

    def _mean(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return x^α y^{1−α}, zero where one of the two is not positive."""
        both = (x > 0) & (y > 0)
        x, y = torch.where(both, x, 1.0), torch.where(both, y, 1.0)
        return torch.where(both, x**self.exponent * y ** (1 - self.exponent), 0.0)

    def _regions(self, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return whether v is in the cone, in its polar cone, and elsewhere in the plane z = 0."""
        x, y, z = v.unbind(-1)
        a = self.exponent
        inside = (x >= 0) & (y >= 0) & (self._mean(x, y) >= z.abs())
        polar = (x <= 0) & (y <= 0) & (self._mean(-x / a, -y / (1 - a)) >= z.abs()) & ~inside
        return inside, polar, (z == 0) & ~inside & ~polar

    def project(self, v: torch.Tensor) -> torch.Tensor:
        inside, polar, plane = self._regions(v)
        elsewhere = (inside | polar | plane).unsqueeze(-1)
        made = self._onto_boundary(torch.where(elsewhere, v.new_tensor([1.0, 1.0, 2.0]), v))
        made = torch.where(plane.unsqueeze(-1), torch.where(v > 0, v, 0.0), made)
        made = torch.where(polar.unsqueeze(-1), torch.zeros_like(v), made)
        return torch.where(inside.unsqueeze(-1), v, made)

    def edges(self, v: torch.Tensor) -> torch.Tensor:
        inside, polar, _ = self._regions(v)
        x, y, z = v.unbind(-1)
        a, slack = self.exponent, self.project(v)
        size, multiplier = slack.norm(dim=-1), (slack - v).norm(dim=-1)
        # In the plane z = 0 outside of the cones the projection is not twice differentiable, or not once.
        on_boundary = torch.stack([torch.minimum(size, z.abs()), -torch.minimum(multiplier, z.abs())], -1)
        within = torch.minimum(torch.minimum(x, y), self._mean(x, y) - z.abs())
        beyond = torch.minimum(torch.minimum(-x, -y), self._mean(-x / a, -y / (1 - a)) - z.abs())
        made = torch.where(polar.unsqueeze(-1), -beyond.unsqueeze(-1), on_boundary)
        return torch.where(inside.unsqueeze(-1), within.unsqueeze(-1), made)

    def _parts(
        self, u: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the point with |z'| = r = |z| σ(u), log(x^α y^{1−α}/r) and its slope in u.

        The conditions of optimality give x' = ½ (x + √(x² + 4α r (|z| − r))), and y' likewise with 1 − α. In u neither r nor |z| − r cancels.
        """
        x, y, z = v.unbind(-1)
        a, up, down = self.exponent, torch.sigmoid(u), torch.sigmoid(-u)
        found, value, slope = [], torch.nn.functional.softplus(-u) - torch.log(z.abs()), -down
        for start, weight in ((x, a), (y, 1 - a)):
            product = 4 * weight * z * z * up * down
            root = (start * start + product).sqrt()
            # Without cancellation where x < 0.
            below = 0.5 * product / torch.where(start > 0, 1.0, root - start)
            part = torch.where(start > 0, 0.5 * (start + root), below)
            found.append(part)
            value = value + weight * torch.log(part)
            slope = slope + weight * product * (down - up) / (4 * root * part)
        return found[0], found[1], z.abs() * up, value, slope

    def _equation(self, u: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        *_, value, slope = self._parts(u, v)
        return -value, -slope

    def _onto_boundary(self, v: torch.Tensor) -> torch.Tensor:
        u = scalar_root(self._equation, _interval, v)
        x, y, r, *_ = self._parts(u, v)
        return torch.stack([x, y, torch.where(v[..., 2] < 0, -r, r)], -1)

    def of_clarabel(self, clarabel: Any) -> Any:
        return clarabel.PowerConeT(self.exponent)


def _interval(v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    reach = torch.full_like(v[..., 0], _REACH)
    return -reach, reach
