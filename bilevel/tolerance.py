"""The accuracies asked for: δ of the inner solution and δ′ of the linear solve."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import torch

from bilevel.errors import ArgumentError
from bilevel.setting_checks import check_steps

__all__ = ["AUTO", "Auto", "Target", "Tolerance", "auto_relative"]


class Auto(enum.Enum):
    """The accuracy that a :class:`bilevel.Tolerance` has by default: chosen from the dtype."""

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


# atol as a part of rtol: an unknown of 1e-6 is still found to nine digits in float64, to three in float32.
_ABSOLUTE = 1e-5


@dataclass(frozen=True, kw_only=True)
class Target:
    """The aim of one solve: stop when ‖residual‖ ≤ max(absolute, relative · scale).

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
    smoothness
        L, when known: a Lipschitz constant of the gradient of the smooth part.
    rtol, atol
        Of an inner solve: the error allowed in each unknown is rtol·|x| + atol. Zero where the residual alone decides.
    coarse_rtol
        Likewise, where the residual is down to its rounding.
    blind_rtol
        The most that the rounding of x may change x, seen through the equations: beyond it nothing is known of the solution.
    """

    absolute: float = 0.0
    relative: float = 0.0
    asked: bool = False
    silent: bool = False
    strong_convexity: float | None = None
    smoothness: float | None = None
    rtol: float = 0.0
    atol: float = 0.0
    coarse_rtol: float = 0.0
    blind_rtol: float = 0.0

    @property
    def error(self) -> float:
        """The error in x that :attr:`absolute` stands for: δ."""
        return self.absolute / (self.strong_convexity or 1.0)


@dataclass(frozen=True)
class Tolerance:
    """The accuracy of the inner solution (δ) and of the linear solve (δ′).

    If μ (``strong_convexity``) is known, the solves stop when ‖∇_φ G‖ ≤ μ δ and ‖v − H q‖ ≤ μ δ′. This proves ‖φ − φ*‖ ≤ δ
    and, at that φ, ‖q − H⁻¹v‖ ≤ δ′ (theory: C1, C2). If μ is unknown, μ = 1 is used, and reports say that the accuracy is
    only residual-based.

    Parameters
    ----------
    delta
        δ, in the units of the inner variable: a positive number. :data:`AUTO`: the estimated error of each unknown has to
        be at most rtol·abs(x) + atol, or as small as rounding allows. None: run for ``max_steps``; no accuracy check, no
        warning.
    delta_prime
        δ′, in the units of the adjoint, with the same choices. A right-hand side smaller than one is solved to δ′
        *relative* to its norm, so that a small incoming gradient is never taken for zero.
    strong_convexity
        μ > 0: a lower bound on the eigenvalues of the inner Hessian near the solution. For a root, a lower bound on the
        smallest singular value of the Jacobian; for a fixed point of a contraction with factor c, 1 − c. The library does
        not verify it: bounds derived from it are reported as certified.
    hypergradient
        A goal in place of δ and δ′, for :meth:`BilevelProblem.hypergradient` and the loss of a :class:`BilevelProblem`.
        Both solves continue until ‖ĝ − g‖ ≤ ``hypergradient``, and no further.
    relative
        Whether the goal is relative to the true hypergradient: ‖ĝ − g‖ ≤ ``hypergradient`` · ‖g‖.
    descent
        Another goal, η in (0, 1): ‖ĝ − g‖ ≤ (1 − η) ‖ĝ‖, which makes −ĝ a descent direction, ⟨ĝ, g⟩ ≥ η ‖ĝ‖².
    stationary
        A norm that counts as zero, beside ``descent`` or a relative ``hypergradient``. The goal is also met if ‖ĝ‖ + ‖ĝ −
        g‖ ≤ ``stationary``, which proves ‖g‖ ≤ ``stationary``. :func:`bilevel.minimize` sets it to its
        ``gradient_tolerance``.
    rtol
        The accuracy of the inner solution relative to each unknown, in place of δ if the size of x is not known beforehand.
        The estimated error of every unknown has to be at most rtol · abs(x) + atol, with atol = 1e-5 · rtol. The estimate
        is the next Newton step. If the residual is down to its rounding, the error has to be at most rtol times the size
        that the equations give the unknown. None: two thirds of the digits of the dtype, eps**(2/3), which is 3.7e-11 in
        float64 and 2.4e-5 in float32. This default is not a promise: where rounding is the limit, up to 0.1 · eps**(1/3) is
        accepted. In half precision the residual decides.
    estimates
        Whether an *estimate* of ‖ĝ − g‖ may decide that a goal is met. If not, a proven bound has to, which needs known
        constants (see :class:`Constants`).
    smoothness
        L > 0: a Lipschitz constant of ∇f, for a layer or problem with a proximal term beside f. With ``strong_convexity`` it proves which
        entries of the solution are zero (``report.proven_zero``). A quadratic f needs neither: both constants are then found and proven.
    bound_products
        The largest number of Hessian-vector products that a bound of the hypergradient's error may cost.

    Raises
    ------
    ArgumentError
        If a number is not positive and finite, or a goal is given beside numbers that it would choose.

    References
    ----------
    δ and δ′ are those of Algorithm 2 of Rajeswaran, Finn, Kakade, Levine, "Meta-Learning with Implicit
    Gradients", NeurIPS 2019.

    Examples
    --------
    >>> Tolerance(delta=1e-6, delta_prime=1e-8, strong_convexity=0.1)
    Tolerance(delta=1e-06, delta_prime=1e-08, strong_convexity=0.1)
    >>> Tolerance(rtol=1e-4)
    Tolerance(rtol=0.0001, delta_prime=AUTO)
    >>> Tolerance(hypergradient=1e-3, relative=True, estimates=True)
    Tolerance(hypergradient=0.001, relative=True, estimates=True)
    """

    delta: float | Auto | None = AUTO
    delta_prime: float | Auto | None = AUTO
    strong_convexity: float | None = None
    hypergradient: float | None = None
    relative: bool = False
    descent: float | None = None
    stationary: float | None = None
    estimates: bool = False
    bound_products: int = 1000
    rtol: float | None = None
    smoothness: float | None = None

    def __post_init__(self) -> None:
        numbers = ("delta", "delta_prime", "strong_convexity", "hypergradient", "descent", "stationary", "rtol")
        for name in (*numbers, "smoothness"):
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
                    "to ask for no accuracy and spend the solver's iteration budget"
                )
        if self.rtol is not None and not (self.delta is AUTO and not self.has_goal):
            raise ArgumentError(
                f"Tolerance: expected one accuracy of the inner solution, got rtol={self.rtol!r} beside delta or a goal; give rtol "
                "alone for an error relative to each unknown, or delta for an absolute one"
            )
        check_steps("Tolerance", "bound_products", self.bound_products, least=0)
        self._check_goal()

    def __repr__(self) -> str:
        settings = {name: getattr(self, name) for name in ("delta", "delta_prime", "strong_convexity")}
        if self.has_goal:  # which chooses δ and δ′
            del settings["delta"], settings["delta_prime"]
            settings = {name: value for name, value in settings.items() if value is not None}
            for name in ("hypergradient", "relative", "descent", "stationary", "estimates"):
                if getattr(self, name):
                    settings[name] = getattr(self, name)
        elif self.strong_convexity is None:
            del settings["strong_convexity"]
        if self.rtol is not None:
            settings = {"rtol": self.rtol, **{name: value for name, value in settings.items() if name != "delta"}}
        if self.smoothness is not None:
            settings["smoothness"] = self.smoothness
        if self.bound_products != type(self).bound_products:
            settings["bound_products"] = self.bound_products
        return f"Tolerance({', '.join(f'{name}={value!r}' for name, value in settings.items())})"

    @cached_property
    def has_goal(self) -> bool:
        """Whether δ and δ′ are chosen so that the hypergradient reaches an accuracy."""
        return self.hypergradient is not None or self.descent is not None

    def allowed(self, norm: float) -> float:
        """Return the error ‖ĝ − g‖ that the goal allows a hypergradient ĝ of ``norm``.

        A goal relative to ‖g‖ ≥ ‖ĝ‖ − ‖ĝ − g‖ is met where ‖ĝ − g‖ ≤ t/(1 + t) ‖ĝ‖, which can be checked; and any goal where
        ‖ĝ − g‖ ≤ ``stationary`` − ‖ĝ‖.

        Examples
        --------
        >>> round(Tolerance(hypergradient=0.25, relative=True).allowed(5.0), 6), Tolerance(descent=0.5).allowed(5.0)
        (1.0, 2.5)
        >>> Tolerance(descent=0.5, stationary=1e-3).allowed(1e-4)
        0.0009
        """
        enough = 0.0 if self.stationary is None else self.stationary - norm
        if self.descent is not None:
            return max((1 - self.descent) * norm, enough)
        if self.hypergradient is None:
            return math.inf
        if self.relative:
            return max(norm * self.hypergradient / (1 + self.hypergradient), enough)
        return self.hypergradient

    def _check_goal(self) -> None:
        if self.hypergradient is not None and self.descent is not None:
            raise ArgumentError(
                "Tolerance: expected one goal, got hypergradient and descent; give the accuracy wanted, or descent alone "
                "to stop as soon as a descent direction is certain"
            )
        if self.descent is not None and self.descent >= 1:
            raise ArgumentError(f"Tolerance: expected descent in (0, 1), got {self.descent}; pass for example 0.5")
        if self.relative and self.hypergradient is None:
            raise ArgumentError("Tolerance: expected hypergradient with relative=True, got none; pass for example 1e-3")
        if self.stationary is not None and self.descent is None and not self.relative:
            raise ArgumentError(
                "Tolerance: expected descent, or hypergradient with relative=True, beside stationary, got neither; leave "
                "stationary out, or set relative=True: it loosens relative goals where the gradient is small"
            )
        if not self.has_goal and self.estimates:
            raise ArgumentError(
                "Tolerance: expected hypergradient or descent with estimates=True, got neither; it says what may decide "
                "that such a goal is met"
            )
        if self.has_goal and not (self.delta is AUTO and self.delta_prime is AUTO):
            raise ArgumentError(
                f"Tolerance: expected a goal or δ and δ′, got both (delta={self.delta!r}, delta_prime="
                f"{self.delta_prime!r}); leave delta and delta_prime out, the goal chooses them"
            )

    def inner(self, dtype: torch.dtype) -> Target:
        """Return what the inner solve aims for in ``dtype``."""
        # Half precision has no factorisations to estimate an error with: there the residual decides.
        if not isinstance(self.delta, Auto) or torch.finfo(dtype).bits < 32:
            return self._target(self.delta, dtype)
        eps, rtol, asked = float(torch.finfo(dtype).eps), self.rtol, self.rtol is not None
        rtol = eps ** (2 / 3) if rtol is None else rtol
        return Target(
            relative=max(0.1 * rtol, auto_relative(dtype)) if asked else auto_relative(dtype),
            asked=asked,
            strong_convexity=self.strong_convexity,
            smoothness=self.smoothness,
            rtol=rtol,
            atol=_ABSOLUTE * rtol,
            coarse_rtol=rtol if asked else 0.1 * eps ** (1 / 3),
            blind_rtol=max(rtol, eps**0.25),
        )

    def linear(self, dtype: torch.dtype) -> Target:
        """Return what the linear solve aims for in ``dtype``."""
        return self._target(self.delta_prime, dtype)

    def _target(self, accuracy: float | Auto | None, dtype: torch.dtype) -> Target:
        mu, smoothness = self.strong_convexity, self.smoothness
        if accuracy is None:
            return Target(strong_convexity=mu, smoothness=smoothness, silent=True)
        if isinstance(accuracy, Auto):
            return Target(strong_convexity=mu, smoothness=smoothness, relative=auto_relative(dtype))
        absolute = accuracy * (1.0 if mu is None else mu)
        return Target(strong_convexity=mu, smoothness=smoothness, absolute=absolute, asked=True)
