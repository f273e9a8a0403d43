"""What is proven, or estimated, of one returned hypergradient; computed when first asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from bilevel.certificates._bounds import Split
from bilevel.certificates._errors import Errors, errors_at, through
from bilevel.certificates._point import Point, in_float64
from bilevel.certificates._quadratic import completed
from bilevel.certificates.bound import Bound
from bilevel.certificates.constants import Constants
from bilevel.reports import Basis

__all__ = ["Certificate"]

# Newton steps that a bound by way of a better point may take, and what is left beside it when that is enough.
_MOST_REFINEMENTS = 6
_SMALL = 0.05


@dataclass(frozen=True, eq=False)
class Certificate:
    """Bounds of the errors of (φ, q, ĝ, corrected value) as they were returned.

    Parameters
    ----------
    point
        The objectives at (φ, q), in the dtype of the problem.
    gradient
        ĝ (p,), the mean over the problems of a batch, as it was returned.
    corrected_value
        As it was returned.
    given
        What is known of the problem; called when it is needed.
    """

    point: Point
    gradient: torch.Tensor
    corrected_value: torch.Tensor
    given: Callable[[], Constants]

    @cached_property
    def exact(self) -> Point:
        """The point in float64, in which the certificate is computed; as it is where that cannot be had."""
        point = self.point
        if point.x.dtype == torch.float64:
            return point
        try:
            wide = Point(
                in_float64(point.lower), in_float64(point.upper), point.x.double(), point.q.double(), point.wanted
            )
            # Evaluates everything that a certificate rests on, at numbers moved by a unit in float64's last place. Where none of
            # it moves, the objectives round to another dtype inside.
            moved = bool((wide.nudged(0).residual != wide.residual).any() | (wide.nudged(0).rho != wide.rho).any())
            moved = moved and wide.gradient.dtype == torch.float64
        except (RuntimeError, TypeError):  # a constant of another dtype inside, or a device without float64
            return point
        return wide if moved else point

    @cached_property
    def constants(self) -> Constants:
        """What is known of the problem, given or found."""
        exact = self.exact
        return completed(exact.lower, exact.upper, exact.x, exact.wanted, self.given())

    @cached_property
    def refined(self) -> Point:
        """A Newton step and an adjoint further."""
        return self.exact.refined()

    @cached_property
    def direct(self) -> Errors:
        """The bounds that take no solve beyond those made: the formulas at (φ, q) itself."""
        return errors_at(self.exact, self.constants)

    @cached_property
    def _refined_errors(self) -> Errors:
        return errors_at(self.refined, self.constants)

    @cached_property
    def errors(self) -> Errors:
        """Every bound of each problem (K,): the smaller of the direct one and, where H is factorised, of the way round."""
        if not self.exact.factorable:
            return self.direct
        best, at = self.direct, self.refined
        for _ in range(_MOST_REFINEMENTS):
            there = errors_at(at, self.constants)
            round_about = through(self.exact, at, there)
            closer = bool((round_about.gradient.value < best.gradient.value).any())
            best = best.better(round_about)
            # Once what is left to bound is small beside the distance to it, a further step has nothing to tighten.
            if not closer or bool((there.gradient.value <= _SMALL * best.gradient.value).all()):
                break
            at = at.refined()
        return best

    @cached_property
    def estimates(self) -> Errors:
        """The distances to the refined point, whose own errors are of second order, per problem (K,) (C5)."""
        zero = torch.zeros_like(self.exact.x[:, 0])
        nothing = Split(zero, zero, zero)
        return through(self.exact, self.refined, Errors(nothing, nothing, nothing, nothing))

    @property
    def inner_bound(self) -> Bound:
        """Of ‖φ − φ*‖, the largest of any problem's."""
        return self._worst(self.errors.inner, lambda: self.estimates.inner)

    @property
    def adjoint_bound(self) -> Bound:
        """Of ‖q − q*‖, the largest of any problem's."""
        return self._worst(self.errors.adjoint, lambda: self.estimates.adjoint)

    @property
    def value_bound(self) -> Bound:
        """Of the corrected value's error, the mean over the problems."""
        rounding = abs(float(self.exact.corrected_value.mean()) - float(self.corrected_value))
        return self._mean(self.errors.value, rounding, lambda: self.estimates.value)

    @property
    def bound(self) -> Bound:
        """Of ‖ĝ − g‖, ĝ and g being the means over the problems."""
        exact, given = self.exact, self.gradient.to(self.exact.x)
        rounding = float((given - exact.gradient.mean(0)).norm())
        if not _finite(self.errors.gradient):
            estimated = self.estimates.gradient
            mean = float((given - self.refined.gradient.mean(0)).norm())
            return Bound(mean, Basis.ESTIMATED, float(estimated.inner.mean()), float(estimated.linear.mean()))
        bound = self._mean(self.errors.gradient, rounding, lambda: self.estimates.gradient)
        if exact.factorable and _finite(self._refined_errors.gradient):
            # Errors of several problems cancel in their mean, which the mean of their sizes does not see.
            distance = float((given - self.refined.gradient.mean(0)).norm())
            together = distance + float(self._refined_errors.gradient.value.mean())
            if together < bound.value:
                bound = Bound(together, bound.basis, bound.inner_part, bound.linear_part, bound.failure_probability)
        return bound

    @property
    def corrected_gradient(self) -> torch.Tensor:
        """g̃ (p,): the hypergradient at the refined point, whose error is of second order."""
        return self.refined.gradient.mean(0).to(self.gradient)

    @property
    def _basis(self) -> tuple[Basis, float]:
        probability = self.constants.failure_probability
        return (Basis.PROBABILISTIC if probability > 0 else Basis.CERTIFIED), probability

    def _worst(self, bound: Split, estimate: Callable[[], Split]) -> Bound:
        basis, probability = self._basis
        if not _finite(bound):
            bound, basis, probability = estimate(), Basis.ESTIMATED, 0.0
        if not bound.value.numel():
            return Bound(0.0, basis, 0.0, 0.0, probability)
        which = int(bound.value.nan_to_num(nan=math.inf).argmax())
        return Bound(
            float(bound.value[which]), basis, float(bound.inner[which]), float(bound.linear[which]), probability
        )

    def _mean(self, bound: Split, rounding: float, estimate: Callable[[], Split]) -> Bound:
        basis, probability = self._basis
        if not _finite(bound):
            bound, basis, probability = estimate(), Basis.ESTIMATED, 0.0
        value, inner, linear = (float(part.mean()) for part in (bound.value, bound.inner, bound.linear))
        return Bound(value + rounding, basis, inner, linear, probability)


def _finite(bound: Split) -> bool:
    return bool(torch.isfinite(bound.value).all())
