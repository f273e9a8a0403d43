"""Known constants of the objectives: strong convexity and Lipschitz constants."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import TypeAlias

import torch

from bilevel.errors import ArgumentError

__all__ = ["Constant", "Constants", "ObservedConstants"]

Constant: TypeAlias = "float | torch.Tensor | None"
"""A number, one for each problem of a batch (K,), or None where it is not known."""


@dataclass(frozen=True, kw_only=True)
class Constants:
    """The known constants of a bilevel problem; None if unknown. For a batch, a number that holds for all, or a tensor (K,).

    They hold in φ, in Euclidean and spectral norms, on a convex set. The set contains the returned φ, the true φ*, and the
    iterates of Newton's method from φ, which make the bounds tight.

    Parameters
    ----------
    strong_convexity
        μ: a lower bound of the eigenvalues of H = ∇²_φφ G.
    outer_smoothness
        L_F: Lipschitz constant of ∇_φ F.
    hessian_lipschitz
        L_H: of H.
    cross_lipschitz
        L_B: of B = ∂_θ∇_φ G.
    outer_cross_lipschitz
        L_θF: of ∇_θ F; 0 if F does not depend on θ directly.
    cross_norm
        ‖B‖, an upper bound at the returned φ, for problems too large to find it: λ for a proximal term (λ/2)‖φ − θ‖². Elsewhere it
        is taken to be larger by L_B times the distance.
    convex
        Whether G is convex in φ, so that a minimum with positive curvature is the only one. Without that, and without μ, bounds speak of
        the minimum that Newton–Kantorovich proves to be near the returned φ.
    failure_probability
        The probability that any of these is wrong, as for an eigenvalue found by randomised Lanczos; 0 for what is known.

    Raises
    ------
    ArgumentError
        If a number cannot be such a constant.

    Examples
    --------
    >>> Constants(strong_convexity=0.1, hessian_lipschitz=0.0).with_mu(0.5).strong_convexity
    0.1
    """

    strong_convexity: Constant = None
    outer_smoothness: Constant = None
    hessian_lipschitz: Constant = None
    cross_lipschitz: Constant = None
    outer_cross_lipschitz: Constant = None
    cross_norm: Constant = None
    convex: bool = False
    failure_probability: float = 0.0

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if value is None or isinstance(value, bool):
                continue
            least = value.min() if isinstance(value, torch.Tensor) and value.numel() else value
            number = float(least)
            fits = number > 0 if item.name == "strong_convexity" else number >= 0
            if not fits or not math.isfinite(number):
                sign = "> 0" if item.name == "strong_convexity" else ">= 0"
                raise ArgumentError(
                    f"Constants: expected {item.name} {sign} and finite, got {value!r}; leave out what is not known"
                )

    def without(self, *names: str) -> Constants:
        """Return these constants with those of the ``names`` unknown."""
        return replace(self, **dict.fromkeys(names))  # type: ignore[arg-type]

    def with_mu(self, mu: float | None) -> Constants:
        """Return these constants with μ filled in where it is missing."""
        return self if self.strong_convexity is not None else replace(self, strong_convexity=mu)


@dataclass(frozen=True, kw_only=True)
class ObservedConstants(Constants):
    """Constants that were measured. They are not checked: they may be what no true constant can be, such as a negative curvature."""

    def __post_init__(self) -> None:
        pass
