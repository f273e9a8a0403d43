"""Robust losses for :func:`bilevel.least_squares`: a large residual counts for less than its square.

A loss ρ turns ½ Σ r² into Σ c(r) with c(r) = ½ s² ρ((r/s)²) and s the scale of an inlier, as in ``scipy.optimize.least_squares``. Each is
quadratic for small residuals: c(r) = ½ r² + O(r⁴). The scales are numbers, or tensors of shape () or of the residual vector's length (m,). They
may require grad and be vmapped: pass ``loss=lambda *args: bilevel.robust.Huber(...)`` to make a scale one of the layer's arguments.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TypeAlias

import torch

from bilevel._torch.reverse import grad
from bilevel.setting_checks import check_number

__all__ = ["Cauchy", "Huber", "RobustLoss", "SoftL1"]

Scale: TypeAlias = float | torch.Tensor

# The least curvature of a Gauss–Newton model, as a part of the weight ρ′: outliers of Huber's loss have none of their own.
_LEAST_CURVATURE = 0.01


class RobustLoss(ABC):
    """A loss c(r) of each residual. Subclasses are frozen dataclasses with one method, ``cost``.

    Examples
    --------
    >>> import torch
    >>> from dataclasses import dataclass
    >>> from bilevel.robust import RobustLoss
    >>> @dataclass(frozen=True)
    ... class LogCosh(RobustLoss):
    ...     def cost(self, residual):
    ...         return residual.cosh().log()
    >>> LogCosh().slope(torch.tensor([0.0, 1.0]))  # tanh
    tensor([0.0000, 0.7616])
    """

    @abstractmethod
    def cost(self, residual: torch.Tensor) -> torch.Tensor:
        """Return c(r), entry by entry, of the residuals (m,); c is even, c(0) = 0, and c(r) = ½ r² to leading order at 0."""

    def slope(self, residual: torch.Tensor) -> torch.Tensor:
        """Return c′(r) (m,)."""
        return grad(lambda r: self.cost(r).sum(), residual)[0]

    def curvature(self, residual: torch.Tensor) -> torch.Tensor:
        """Return c″(r) (m,)."""
        return grad(lambda r: self.slope(r).sum(), residual)[0]

    def weighted(self, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return √w and c′(r)/√w (m,): with J the residual's Jacobian, (√w J)ᵀ c′(r)/√w is the gradient, and (√w J)ᵀ(√w J) a model of the Hessian.

        w is c″(r), and at least a hundredth of the weight c′(r)/r, so that the model is positive where c is concave.
        """
        slope, curvature = self.slope(residual), self.curvature(residual)
        weight = torch.where(residual == 0, curvature, slope / torch.where(residual == 0, 1.0, residual))
        root = torch.maximum(curvature, _LEAST_CURVATURE * weight).clamp_min(torch.finfo(slope.dtype).tiny).sqrt()
        return root, slope / root


@dataclass(frozen=True)
class Huber(RobustLoss):
    """c(r) = ½ r² for abs(r) ≤ δ, and δ (abs(r) − ½ δ) beyond: quadratic, then linear.

    Parameters
    ----------
    delta
        δ > 0: where the quadratic part ends, in units of the residual. A number, or a tensor () or (m,).

    Raises
    ------
    ArgumentError
        If ``delta`` is a number that is not positive.

    References
    ----------
    Huber, "Robust estimation of a location parameter", Annals of Mathematical Statistics 35, 1964; ``loss="huber", f_scale=delta`` of scipy.

    Examples
    --------
    >>> import torch, bilevel
    >>> y = torch.tensor([0.0, 0.1, -0.1, 100.0], dtype=torch.float64)
    >>> location = bilevel.least_squares(lambda m, y: y - m, loss=Huber(1.0))
    >>> location(torch.zeros((), dtype=torch.float64), y)  # the mean of the three, and a pull of δ/3
    tensor(0.3333, dtype=torch.float64)
    """

    delta: Scale = 1.0

    def __post_init__(self) -> None:
        _check("Huber", "delta", self.delta)

    def cost(self, residual: torch.Tensor) -> torch.Tensor:
        """Return ½ r², or δ (abs(r) − ½ δ) beyond δ, entry by entry."""
        size = residual.abs()
        inside = size <= self.delta
        # Each branch sees numbers of its own domain alone, so that no derivative of the other is made.
        quadratic = torch.where(inside, residual, 0.0)
        linear = self.delta * (torch.where(inside, self.delta, size) - 0.5 * self.delta)
        return torch.where(inside, 0.5 * quadratic**2, linear)


@dataclass(frozen=True)
class SoftL1(RobustLoss):
    """c(r) = s² (√(1 + (r/s)²) − 1): a smooth form of abs(r).

    Parameters
    ----------
    scale
        s > 0: the size of residual near which the quadratic turns into a line. A number, or a tensor () or (m,).

    Raises
    ------
    ArgumentError
        If ``scale`` is a number that is not positive.

    References
    ----------
    ``loss="soft_l1", f_scale=scale`` of ``scipy.optimize.least_squares``; Charbonnier et al., ICIP 1994.

    Examples
    --------
    >>> import torch
    >>> SoftL1(1.0).cost(torch.tensor([0.0, 1.0]))
    tensor([0.0000, 0.4142])
    """

    scale: Scale = 1.0

    def __post_init__(self) -> None:
        _check("SoftL1", "scale", self.scale)

    def cost(self, residual: torch.Tensor) -> torch.Tensor:
        """Return s² (√(1 + (r/s)²) − 1), entry by entry."""
        z = (residual / self.scale) ** 2
        # r² / (1 + √(1 + z)) is s² (√(1 + z) − 1) without cancellation.
        return residual**2 / (1 + (1 + z).sqrt())


@dataclass(frozen=True)
class Cauchy(RobustLoss):
    """c(r) = ½ s² log(1 + (r/s)²): the influence of a residual beyond s decreases.

    It is not convex: the answer may depend on the start.

    Parameters
    ----------
    scale
        s > 0: the size of the residual with the largest influence. A number, or a tensor () or (m,).

    Raises
    ------
    ArgumentError
        If ``scale`` is a number that is not positive.

    References
    ----------
    ``loss="cauchy", f_scale=scale`` of ``scipy.optimize.least_squares``; Holland & Welsch, Communications in Statistics A6, 1977.

    Examples
    --------
    >>> import torch
    >>> Cauchy(1.0).cost(torch.tensor([0.0, 1.0]))
    tensor([0.0000, 0.3466])
    """

    scale: Scale = 1.0

    def __post_init__(self) -> None:
        _check("Cauchy", "scale", self.scale)

    def cost(self, residual: torch.Tensor) -> torch.Tensor:
        """Return ½ s² log(1 + (r/s)²), entry by entry."""
        return 0.5 * self.scale**2 * torch.log1p((residual / self.scale) ** 2)


def _check(where: str, name: str, scale: Scale) -> None:
    # The numbers in a tensor may be a transform's, which nobody can look at.
    if not isinstance(scale, torch.Tensor):
        check_number(where, name, scale)
