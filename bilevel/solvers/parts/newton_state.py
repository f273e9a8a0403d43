"""An iterate of Newton's method, and a direction from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Direction", "NewtonState"]


@dataclass(frozen=True, eq=False)
class NewtonState:
    """An iterate.

    Parameters
    ----------
    x, residual
        (batch, n).
    merit
        The objective; ½ for equations, whose merit is relative to the residual before the step.
    magnitude
        The largest |merit| so far. It measures the rounding of the merit.
    last_norm
        ‖R‖ before the last step.
    definite
        Whether the Hessian of the last step was positive definite.
    factor
        Its Cholesky factor (batch, n, n), of a small argmin; the LU factors of a small root's Jacobian.
    last_x, last_merit, slope, t
        Of the last step of a small problem: its initial point, the merit and slope there, and the step length.
    jacobian, pivots
        Of the last step of a small root: the matrices, and the pivots of their LU factors. ``factor`` then holds these
        factors.
    """

    x: torch.Tensor
    residual: torch.Tensor
    merit: torch.Tensor
    magnitude: torch.Tensor
    last_norm: torch.Tensor
    definite: torch.Tensor
    factor: torch.Tensor | None = None
    last_x: torch.Tensor | None = None
    last_merit: torch.Tensor | None = None
    slope: torch.Tensor | None = None
    t: torch.Tensor | None = None
    jacobian: torch.Tensor | None = None
    pivots: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Direction:
    """d (batch, n), the slope (batch,) of the merit along it, whether ∂R was definite, or regular, and its factor."""

    d: torch.Tensor
    slope: torch.Tensor
    definite: torch.Tensor
    factor: torch.Tensor | None = None
    pivots: torch.Tensor | None = None
