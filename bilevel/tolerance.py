"""The accuracies asked for: δ of the inner solution and δ′ of the linear solve."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Final

import torch

from bilevel.errors import ArgumentError

__all__ = ["AUTO", "Auto", "Target", "Tolerance", "auto_relative"]


class Auto(enum.Enum):
    """The type of :data:`AUTO`."""

    AUTO = "auto"

    def __repr__(self) -> str:
        return "AUTO"


AUTO: Final = Auto.AUTO
"""Choose from the dtype: the accuracy that well-posed problems reach in that dtype, with a margin."""


def auto_relative(dtype: torch.dtype) -> float:
    """Return the relative residual that :data:`AUTO` stands for, eps^(3/4) of the dtype.

    Two thirds of the digits would leave accuracy unused; all of them can rarely be reached. In float64
    it is 1.8e-12, in float32 6.4e-6.

    Examples
    --------
    >>> import torch
    >>> f"{auto_relative(torch.float64):.1e}"
    '1.8e-12'
    """
    return float(torch.finfo(dtype).eps ** 0.75)


@dataclass(frozen=True, kw_only=True)
class Target:
    """What one solve aims for: stop when ‖residual‖ ≤ max(absolute, relative · scale).

    Parameters
    ----------
    absolute
        Absolute bound on the residual norm; 0 for none.
    relative
        Bound relative to a scale that the solver's loop measures: for a linear system ‖b‖; for an inner
        problem the larger of the first residual and ‖Hx‖, which do not depend on how the objective is scaled.
    asked
        Whether a person asked for this accuracy. Spending a step budget short of an accuracy that nobody
        asked for is not a failure.
    silent
        Whether the caller said that the budget alone is meant (``None`` as tolerance).
    strong_convexity
        μ, when known: turns residuals into error bounds.
    """

    absolute: float = 0.0
    relative: float = 0.0
    asked: bool = False
    silent: bool = False
    strong_convexity: float | None = None

    def threshold(self, scale: torch.Tensor) -> torch.Tensor:
        """Return the residual norm to reach, per problem, for the scales given (batch,)."""
        return torch.clamp(self.relative * scale, min=self.absolute)


@dataclass(frozen=True)
class Tolerance:
    """The accuracy wanted of the inner solution (δ) and of the linear solve (δ′).

    With μ (``strong_convexity``) known, the solves stop when ‖∇_φ G‖ ≤ μ δ and ‖v − H q‖ ≤ μ δ′, which proves
    ‖φ − φ*‖ ≤ δ and, at that φ, ‖q − H⁻¹v‖ ≤ δ′ (theory: C1, C2). With μ unknown the same is done with
    μ = 1, and reports say that the accuracy is only residual-based.

    Parameters
    ----------
    delta
        δ, in the units of the inner variable: a positive number, :data:`AUTO` (from the dtype: a relative
        residual of eps^(3/4)), or None: no accuracy is asked, the solver's step budget is what is meant.
    delta_prime
        δ′, in the units of the adjoint, likewise. A right-hand side smaller than one is solved to
        δ′ *relative* to its norm, so that a small incoming gradient is never mistaken for zero.
    strong_convexity
        μ > 0: a lower bound on the eigenvalues of the inner Hessian near the solution. For a root, a bound on the
        least singular value of the Jacobian; for a fixed point of a contraction with factor c, 1 − c. It is
        taken at its word: bounds derived from it are reported as certified.

    Raises
    ------
    ArgumentError
        If a number is not positive and finite.

    References
    ----------
    δ and δ′ are those of Algorithm 2 of Rajeswaran, Finn, Kakade, Levine, "Meta-Learning with Implicit
    Gradients", NeurIPS 2019.

    Examples
    --------
    >>> Tolerance(delta=1e-6, delta_prime=1e-8, strong_convexity=0.1)
    Tolerance(delta=1e-06, delta_prime=1e-08, strong_convexity=0.1)
    """

    delta: float | Auto | None = AUTO
    delta_prime: float | Auto | None = AUTO
    strong_convexity: float | None = None

    def __post_init__(self) -> None:
        for name in ("delta", "delta_prime", "strong_convexity"):
            number = getattr(self, name)
            if number is None or number is AUTO:
                continue
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                raise ArgumentError(
                    f"Tolerance: expected {name} to be a number or None, got {type(number).__name__}; "
                    "pass a Python float"
                )
            if not (math.isfinite(number) and number > 0):
                raise ArgumentError(
                    f"Tolerance: expected {name} > 0 and finite, got {number}; pass a positive number, or None "
                    "to ask for no accuracy and spend the solver's step budget"
                )

    def inner(self, dtype: torch.dtype) -> Target:
        """Return what the inner solve aims for in ``dtype``."""
        return self._target(self.delta, dtype)

    def linear(self, dtype: torch.dtype) -> Target:
        """Return what the linear solve aims for in ``dtype``."""
        return self._target(self.delta_prime, dtype)

    def _target(self, wanted: float | Auto | None, dtype: torch.dtype) -> Target:
        mu = self.strong_convexity
        if wanted is None:
            return Target(silent=True, strong_convexity=mu)
        if isinstance(wanted, Auto):
            return Target(relative=auto_relative(dtype), strong_convexity=mu)
        return Target(absolute=wanted * (1.0 if mu is None else mu), asked=True, strong_convexity=mu)
