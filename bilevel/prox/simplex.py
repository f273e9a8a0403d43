"""The simplex and the L1 ball: sets on which single entries become zero and a sum is fixed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel.errors import ArgumentError, ShapeError
from bilevel.prox._base import (
    Manifold,
    Parameter,
    Term,
    as_parameter,
    check_positive,
    detached,
    no_value,
    positive_of,
    rounding,
)
from bilevel.prox._margins import least, relative, scale_of
from bilevel.prox._support import onto_sum, simplex_support

__all__ = ["L1Ball", "Simplex"]


@dataclass(frozen=True, eq=False)
class Simplex(Term):
    """The indicator function of {x ≥ 0, Σx = r}, along one axis.

    The other axes of x hold independent simplices. The projection sorts each of them.

    Parameters
    ----------
    radius
        r > 0: a number, a tensor of shape (), or one for each simplex.
    dim
        The axis of a simplex; the last one by default.

    Raises
    ------
    ArgumentError
        If a radius is not positive; on use, if x has no axis ``dim``.

    References
    ----------
    Duchi, Shalev-Shwartz, Singer and Chandra, Efficient projections onto the l1-ball, 2008.

    Examples
    --------
    >>> import torch
    >>> from bilevel import prox
    >>> prox.Simplex().prox(torch.tensor([1.0, 0.5, -1.0]))
    tensor([0.7500, 0.2500, 0.0000])
    """

    radius: Parameter = 1.0
    dim: int = -1

    def __post_init__(self) -> None:
        check_positive(self.where, "radius", self.radius)
        if isinstance(self.dim, bool) or not isinstance(self.dim, int):
            raise ArgumentError(f"{self.where}: expected dim to be an integer, got {self.dim!r}; pass the axis")

    def _rows(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x with the axis of the simplex last, (..., n), and the radii (..., 1)."""
        if not -x.ndim <= self.dim < x.ndim:
            raise ArgumentError(
                f"{self.where}: expected x with an axis {self.dim}, got the shape {tuple(x.shape)}; pass another dim"
            )
        if x.shape[self.dim] == 0:
            raise ShapeError(
                f"{self.where}: expected at least one entry along axis {self.dim}, got none; pass another dim, or leave the term out"
            )
        rows = x.movedim(self.dim, -1)
        return rows, positive_of(self.where, "radius", self.radius, x, rows.shape[:-1]).unsqueeze(-1)

    def value(self, x: torch.Tensor) -> torch.Tensor:
        return no_value(x)

    def prox(self, v: torch.Tensor, step: Parameter = 1.0) -> torch.Tensor:
        rows, radius = self._rows(v)
        made = onto_sum(rows, simplex_support(rows, radius), radius).relu()
        finite = rows.isfinite().all(-1, keepdim=True) & radius.isfinite()
        return torch.where(finite, made, float("nan")).movedim(-1, self.dim)

    def manifold(self, x: torch.Tensor) -> Manifold:
        rows, radius = self._rows(x)
        support = detached(rows) > 0
        return Manifold(lambda y: onto_sum(y.movedim(self.dim, -1), support, radius).movedim(-1, self.dim))

    def margin(self, x: torch.Tensor, slope: torch.Tensor, step: Parameter = 1.0) -> torch.Tensor:
        move = as_parameter(step, x) * slope
        rows, moves = self._rows(x)[0], move.movedim(self.dim, -1)
        support = rows > 0
        level = torch.where(support, moves, 0.0).sum(-1, keepdim=True) / support.sum(-1, keepdim=True).clamp(min=1)
        return least(relative(torch.where(support, rows, moves - level), scale_of(x, move)))


@dataclass(frozen=True, eq=False)
class L1Ball(Term):
    """The indicator function of {‖x‖₁ ≤ r}, over all entries of x.

    Parameters
    ----------
    radius
        r > 0: a number or a tensor of shape ().

    Raises
    ------
    ArgumentError
        If the radius is not positive.

    References
    ----------
    Duchi, Shalev-Shwartz, Singer and Chandra, Efficient projections onto the l1-ball, 2008.

    Examples
    --------
    >>> import torch
    >>> from bilevel import prox
    >>> prox.L1Ball(1.0).prox(torch.tensor([1.0, -0.5, 0.0]))
    tensor([ 0.7500, -0.2500,  0.0000])
    """

    radius: Parameter

    def __post_init__(self) -> None:
        check_positive(self.where, "radius", self.radius)

    def _radius(self, x: torch.Tensor) -> torch.Tensor:
        return positive_of(self.where, "radius", self.radius, x, ()).unsqueeze(-1)

    def _active(self, x: torch.Tensor) -> torch.Tensor:
        """Return whether x (n,) is on the boundary, up to rounding, of shape (1,)."""
        return x.abs().sum(-1, keepdim=True) >= (1 - rounding(x)) * detached(self._radius(x))

    def value(self, x: torch.Tensor) -> torch.Tensor:
        return no_value(x)

    def prox(self, v: torch.Tensor, step: Parameter = 1.0) -> torch.Tensor:
        if not v.numel():
            return v
        flat, radius = v.reshape(-1), self._radius(v)
        signs, sizes = detached(flat).sign(), flat.abs()
        outside = onto_sum(sizes, simplex_support(sizes, radius), radius).relu() * signs
        return torch.where(sizes.sum(-1, keepdim=True) <= radius, flat, outside).reshape(v.shape)

    def manifold(self, x: torch.Tensor) -> Manifold:
        flat, radius = detached(x).reshape(-1), self._radius(x)
        signs, active = flat.sign(), self._active(flat)

        def retract(y: torch.Tensor) -> torch.Tensor:
            rows = y.reshape(-1)
            return torch.where(active, onto_sum(signs * rows, signs != 0, radius) * signs, rows).reshape(y.shape)

        return Manifold(retract)

    def margin(self, x: torch.Tensor, slope: torch.Tensor, step: Parameter = 1.0) -> torch.Tensor:
        flat, move = x.reshape(-1), (as_parameter(step, x) * slope).reshape(-1)
        scale, support = scale_of(flat, move), flat != 0
        level = torch.where(support, -move * flat.sign(), 0.0).sum(-1, keepdim=True) / support.sum(-1, keepdim=True)
        on_boundary = torch.cat([torch.where(support, flat.abs(), level - move.abs()), level])
        inside = relative(self._radius(x) - flat.abs().sum(-1, keepdim=True), self._radius(x))
        return least(torch.where(self._active(flat), relative(on_boundary, scale), inside))
