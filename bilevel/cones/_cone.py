"""The contract of a cone, and the cones of vectors: zero, nonnegative, second-order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from bilevel.errors import ArgumentError
from bilevel.prox.ball import SecondOrderCone
from bilevel.setting_checks import check_steps

__all__ = ["Cone", "Nonnegative", "SecondOrder", "Zero"]


class Cone(ABC):
    """A closed convex cone K of vectors along the last axis, one factor of the cone of a program. The other axes hold independent vectors.

    The projection v ↦ Π(v) splits v into s = Π(v) in K and y = Π(v) − v in the dual cone, with sᵀy = 0. It has derivatives of several orders
    wherever :meth:`edges` are not zero.

    Examples
    --------
    >>> import torch
    >>> from bilevel import cones
    >>> cones.SecondOrder(3).project(torch.tensor([0.0, 3.0, 4.0]))
    tensor([2.5000, 1.5000, 2.0000])
    """

    @property
    @abstractmethod
    def rows(self) -> int:
        """The number of rows of A x + s = b that the cone takes."""

    @abstractmethod
    def project(self, v: torch.Tensor) -> torch.Tensor:
        """Return Π(v) (..., rows), the nearest vector in the cone."""

    @abstractmethod
    def edges(self, v: torch.Tensor) -> torch.Tensor:
        """Return numbers (..., r) whose signs tell the smooth piece of Π that v is on: Π has a kink at v where one of them is zero."""

    def smoothed(self, v: torch.Tensor, smoothing: float) -> torch.Tensor:
        """Return the s (..., rows) with s − v in the dual cone and s ∘ (s − v) = τ e: a point of the central path in place of Π(v).

        Raises
        ------
        ArgumentError
            If the cone is not symmetric: it has no product ∘.
        """
        raise ArgumentError(
            f"`cone_program`: expected symmetric cones with smoothing, got {self!r}, which has no smoothed projection; leave smoothing out"
        )

    def copies(self) -> tuple[Cone, int]:
        """Return a cone and a number of copies of it whose product is this cone."""
        return self, 1

    @abstractmethod
    def of_clarabel(self, clarabel: Any) -> Any:
        """Return the cone in Clarabel's words; ``clarabel`` is the module."""


@dataclass(frozen=True)
class _Sized(Cone):
    """A cone that exists in every dimension of at least ``least``."""

    size: int

    least: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_steps(f"cones.{type(self).__name__}", "size", self.size, least=self.least)

    @property
    def rows(self) -> int:
        return self.size


@dataclass(frozen=True)
class Zero(_Sized):
    """{0}ᵏ: the rows are equations.

    Parameters
    ----------
    size
        k.

    Raises
    ------
    ArgumentError
        If the size is not an integer of at least 0.

    Examples
    --------
    >>> import torch
    >>> from bilevel import cones
    >>> cones.Zero(2).project(torch.tensor([1.0, -2.0]))
    tensor([0., 0.])
    """

    def project(self, v: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(v)

    def edges(self, v: torch.Tensor) -> torch.Tensor:
        return v[..., :0]

    def smoothed(self, v: torch.Tensor, smoothing: float) -> torch.Tensor:
        return torch.zeros_like(v)

    def copies(self) -> tuple[Cone, int]:
        return Zero(1), self.size

    def of_clarabel(self, clarabel: Any) -> Any:
        return clarabel.ZeroConeT(self.size)


@dataclass(frozen=True)
class Nonnegative(_Sized):
    """{s ∈ Rᵏ: s ≥ 0}: the rows are inequalities A x ≤ b.

    Parameters
    ----------
    size
        k.

    Raises
    ------
    ArgumentError
        If the size is not an integer of at least 0.

    Examples
    --------
    >>> import torch
    >>> from bilevel import cones
    >>> cones.Nonnegative(2).project(torch.tensor([1.0, -2.0]))
    tensor([1., 0.])
    """

    def project(self, v: torch.Tensor) -> torch.Tensor:
        return torch.where(v > 0, v, 0.0)

    def edges(self, v: torch.Tensor) -> torch.Tensor:
        return v

    def smoothed(self, v: torch.Tensor, smoothing: float) -> torch.Tensor:
        return 0.5 * (v + (v * v + 4 * smoothing).sqrt())

    def copies(self) -> tuple[Cone, int]:
        return Nonnegative(1), self.size

    def of_clarabel(self, clarabel: Any) -> Any:
        return clarabel.NonnegativeConeT(self.size)


@dataclass(frozen=True)
class SecondOrder(_Sized):
    """{(t, u) ∈ R × Rᵏ⁻¹: ‖u‖₂ ≤ t}.

    Parameters
    ----------
    size
        k, at least 1.

    Raises
    ------
    ArgumentError
        If the size is not an integer of at least 1.

    References
    ----------
    Fukushima, Luo and Tseng, "Smoothing functions for second-order-cone complementarity problems", SIAM J. Optim. 12, 2002.

    Examples
    --------
    >>> import torch
    >>> from bilevel import cones
    >>> cones.SecondOrder(3).project(torch.tensor([0.0, 3.0, 4.0]))
    tensor([2.5000, 1.5000, 2.0000])
    """

    least: ClassVar[int] = 1

    def project(self, v: torch.Tensor) -> torch.Tensor:
        return SecondOrderCone().prox(v)

    def edges(self, v: torch.Tensor) -> torch.Tensor:
        head, length = v[..., :1], v[..., 1:].norm(dim=-1, keepdim=True)
        return torch.cat([head - length, head + length], -1)

    def smoothed(self, v: torch.Tensor, smoothing: float) -> torch.Tensor:
        # (λ + √(λ² + 4τ))/2 of the spectral values λ = t ± ‖u‖, written by t and ‖u‖² alone, in which it is smooth at u = 0 too.
        head, tail = v[..., :1], v[..., 1:]
        t, r = head * head, (tail * tail).sum(-1, keepdim=True)
        product = (t - r) ** 2 + 8 * smoothing * (t + r) + 16 * smoothing**2
        roots = (2 * (t + r) + 8 * smoothing + 2 * product.sqrt()).sqrt()  # √(λ₁² + 4τ) + √(λ₂² + 4τ)
        return torch.cat([0.5 * head + 0.25 * roots, (0.5 + head / roots) * tail], -1)

    def copies(self) -> tuple[Cone, int]:
        return (Nonnegative(1) if self.size == 1 else self), 1

    def of_clarabel(self, clarabel: Any) -> Any:
        return clarabel.NonnegativeConeT(1) if self.size == 1 else clarabel.SecondOrderConeT(self.size)
