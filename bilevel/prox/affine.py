"""The affine set and the half-space."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel._torch.factorisations import inverse, svdvals
from bilevel._torch.transforms import outside_autocast
from bilevel.errors import ArgumentError, ShapeError
from bilevel.prox._base import (
    Manifold,
    Parameter,
    Term,
    as_parameter,
    broadcast_to,
    check_finite,
    detached,
    no_value,
    readable,
    rounding,
)
from bilevel.prox._margins import least, relative, scale_of

__all__ = ["AffineSet", "HalfSpace"]

# The second pass removes the rounding that large entries, or a matrix of large condition number, leave.
_PASSES = 2


@dataclass(frozen=True, eq=False)
class AffineSet(Term):
    """The indicator function of {x: A x = b}, with x as one vector of n entries.

    The projection inverts A Aᵀ, and refines its result once.

    Parameters
    ----------
    A
        (m, n), m ≤ n, with linearly independent rows.
    b
        (m,), or a number.

    Raises
    ------
    ArgumentError
        If the rows of A are linearly dependent, or if a number is not finite.
    ShapeError
        If the shapes do not fit each other, or, on use, x.

    References
    ----------
    Gould, Hribar and Nocedal, On the solution of equality constrained quadratic programming problems, 2001 (the refinement).

    Examples
    --------
    >>> import torch
    >>> from bilevel import prox
    >>> prox.AffineSet(torch.tensor([[1.0, 1.0]]), 1.0).prox(torch.tensor([2.0, 1.0]))
    tensor([1., 0.])
    """

    A: torch.Tensor
    b: Parameter

    def __post_init__(self) -> None:
        if not isinstance(self.A, torch.Tensor) or self.A.ndim != 2:
            raise ShapeError(
                f"{self.where}: expected A to be a tensor of shape (m, n), got {_shape(self.A)}; for one equation write a[None, :]"
            )
        check_finite(self.where, "A", self.A)
        check_finite(self.where, "b", self.b)
        rows, columns = self.A.shape
        broadcast_to(self.where, "b", as_parameter(self.b, self.A), (rows,))
        if not readable(self.A) or not rows:
            return
        values = svdvals(detached(self.A).double())
        limit = max(rows, columns) * torch.finfo(self.A.dtype).eps if self.A.is_floating_point() else 1e-14
        if rows > columns or bool(values[-1] <= limit * values[0]):
            raise ArgumentError(
                f"{self.where}: expected A with linearly independent rows, got {rows} rows in {columns} unknowns of "
                f"which some depend on others; leave out the dependent rows"
            )

    def _system(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.A.shape[1] != x.numel():
            raise ShapeError(
                f"{self.where}: expected A with {x.numel()} columns, one for each entry of x {tuple(x.shape)}, got "
                f"{self.A.shape[1]}; exchange its axes with A.mT, or leave out columns"
            )
        A = as_parameter(self.A, x)
        return A, as_parameter(self.b, x).expand(A.shape[:1])

    def value(self, x: torch.Tensor) -> torch.Tensor:
        return no_value(x)

    @outside_autocast
    def prox(self, v: torch.Tensor, step: Parameter = 1.0) -> torch.Tensor:
        A, b = self._system(v)
        x, gram = v.reshape(-1), inverse(A @ A.mT)
        for _ in range(_PASSES):
            x = x - A.mT @ (gram @ (A @ x - b))
        return x.reshape(v.shape)

    def manifold(self, x: torch.Tensor) -> Manifold:
        return Manifold(self.prox)

    def margin(self, x: torch.Tensor, slope: torch.Tensor, step: Parameter = 1.0) -> torch.Tensor:
        return x.new_ones(())


@dataclass(frozen=True, eq=False)
class HalfSpace(Term):
    """The indicator function of {x: aᵀx ≤ b}.

    Parameters
    ----------
    a
        The normal vector, of the shape of x, not zero.
    b
        A number or a tensor of shape ().

    Raises
    ------
    ArgumentError
        If ``a`` is zero, or if a number is not finite.
    ShapeError
        If ``b`` is not one number; on use, if ``a`` has not the shape of x.

    References
    ----------
    Parikh, Boyd, "Proximal Algorithms", Foundations and Trends in Optimization 1, 2014, section 6.2.2 (projection on a half-space).

    Examples
    --------
    >>> import torch
    >>> from bilevel import prox
    >>> prox.HalfSpace(torch.tensor([1.0, 1.0]), 1.0).prox(torch.tensor([2.0, 1.0]))
    tensor([1., 0.])
    """

    a: torch.Tensor
    b: Parameter

    def __post_init__(self) -> None:
        if not isinstance(self.a, torch.Tensor):
            raise ArgumentError(
                f"{self.where}: expected a to be a tensor of the shape of x, got {self.a!r}; write for example torch.ones_like(x)"
            )
        check_finite(self.where, "a", self.a)
        check_finite(self.where, "b", self.b)
        broadcast_to(self.where, "b", as_parameter(self.b, self.a), ())
        if readable(self.a) and not bool((detached(self.a) != 0).any()):
            raise ArgumentError(f"{self.where}: expected a that is not zero, got zeros only; pass a normal vector")

    def _system(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.a.shape != x.shape:
            raise ShapeError(
                f"{self.where}: expected a, the normal vector, to have the shape of x, {tuple(x.shape)}, got {_shape(self.a)}; "
                "reshape it"
            )
        return as_parameter(self.a, x), as_parameter(self.b, x)

    def _active(self, x: torch.Tensor) -> torch.Tensor:
        """Return whether x is on the boundary, up to rounding."""
        a, b = (detached(part) for part in self._system(x))
        x = detached(x)
        return (a * x).sum() >= b - rounding(x) * ((a * x).abs().sum() + b.abs())

    def value(self, x: torch.Tensor) -> torch.Tensor:
        return no_value(x)

    def prox(self, v: torch.Tensor, step: Parameter = 1.0) -> torch.Tensor:
        a, b = self._system(v)
        return torch.where((a * v).sum() <= b, v, _onto_plane(v, a, b))

    def manifold(self, x: torch.Tensor) -> Manifold:
        a, b = self._system(x)
        active = self._active(x)
        return Manifold(lambda y: torch.where(active, _onto_plane(y, a, b), y))

    def margin(self, x: torch.Tensor, slope: torch.Tensor, step: Parameter = 1.0) -> torch.Tensor:
        a, b = self._system(x)
        length = a.square().sum().sqrt()
        move = as_parameter(step, x) * slope
        distance = torch.where(self._active(x), -(move * a).sum(), b - (a * x).sum()) / length
        return least(relative(distance, scale_of(x, move)))


def _onto_plane(y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    squares = a.square().sum()
    for _ in range(_PASSES):
        y = y - a * (((a * y).sum() - b) / squares)
    return y


def _shape(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, torch.Tensor) else repr(value)
