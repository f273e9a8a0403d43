"""Error bounds, proven or estimated, of one returned hypergradient. They are computed when they are first read."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch

from bilevel.certificates._bounds import Split
from bilevel.certificates._errors import Errors, Spectral, errors_at, number, through
from bilevel.certificates._point import Point
from bilevel.certificates._quadratic import completed
from bilevel.certificates._route import Route
from bilevel.certificates.bound import Bound
from bilevel.certificates.constants import Constants
from bilevel.certificates.lanczos import affordable, cross_norm, lanczos_spectrum
from bilevel.certificates.refuting import contradicted, observed, refuted
from bilevel.errors import ConstantsError
from bilevel.policy import OnFailure, handle_misuse
from bilevel.reports import Basis

__all__ = ["Certificate"]

# The largest number of Newton steps to a better point for a bound, and the relative remainder at which they stop.
_MOST_REFINEMENTS = 6
_SMALL = 0.05
# In an estimate a point stands for the solution if Newton's next step is this much shorter; and the largest number of steps.
_CONTRACTION, _MOST_STEPS = 0.1, 30
# The largest number of products for a bound of a spectrum, and the probability that the bound is wrong, for each problem.
_MOST_PRODUCTS = 200
_PROBABILITY = 1e-6


@dataclass(frozen=True, eq=False)
class Certificate:
    """Bounds of the errors of the returned (φ, q, ĝ, corrected value).

    Parameters
    ----------
    point
        The objectives at (φ, q), in the dtype of the problem.
    gradient
        The returned ĝ (p,), the mean over the problems of a batch.
    corrected_value
        The returned corrected value.
    given
        Returns the constants that the user gave; called when they are needed.
    where, on_failure
        The problem's name, and the policy for a constant that is refuted.
    products
        The largest number of products for a tight bound, if H is too large to be factorised.
    """

    point: Point
    gradient: torch.Tensor
    corrected_value: torch.Tensor
    given: Callable[[], Constants]
    where: str = "certificate"
    on_failure: OnFailure = "raise"
    products: int = 0

    @cached_property
    def exact(self) -> Point:
        """The point in float64, in which the certificate is computed; the point itself if float64 is not possible."""
        point = self.point
        if point.x.dtype == torch.float64:
            return point
        try:
            double = torch.float64
            wide = Point.at(
                point.lower.to(double), point.upper.to(double), point.x.double(), point.q.double(), point.needs_grad
            )
            # Move every number by a unit in float64's last place. If a result does not change, the objective rounds to another
            # dtype inside, and float64 is not possible.
            other = wide.perturbed(0)
            pairs = ((wide.inner.residual, other.inner.residual), (wide.inner.v, other.inner.v), (wide.hq, other.hq))
            moved = all(bool((a != b).any()) or not bool((a != 0).any()) for a, b in pairs)
            moved = moved and wide.gradient.dtype == torch.float64
        except (RuntimeError, TypeError):  # a constant of another dtype inside, or a device without float64
            return point
        return wide if moved else point

    @cached_property
    def observed(self) -> Constants:
        """The observed value of each constant on the way from φ to a better point: a bound from the other side."""
        exact = self.exact
        return observed(exact, self.refined.inner if exact.inner.factorable else exact.inner.descended())

    @cached_property
    def _believed(self) -> tuple[Constants, bool]:
        """The given constants without the refuted ones, and whether the policy asks for NaN."""
        given = self.given()
        wrong = refuted(given, self.observed) if _any(given) else {}
        if not wrong:
            return given, False
        error = ConstantsError(
            f"{self.where}: expected constants that hold near the solution, got {'; '.join(wrong.values())}; correct "
            "them, or leave out what is not known: the error is then estimated"
        )
        return given.without(*wrong), handle_misuse(error, self.on_failure)

    @cached_property
    def constants(self) -> Constants:
        """The known constants: given, or proven by the degrees of the objectives in φ."""
        exact = self.exact
        return completed(exact.lower, exact.upper, exact.x, exact.needs_grad, self._believed[0])

    @cached_property
    def _curvature(self) -> torch.Tensor | None:
        """A lower bound (K,) of H's eigenvalues by Lanczos, if it is needed and no other is known."""
        exact, known = self.exact, self._believed[0]
        if exact.inner.factorable or known.hessian_lipschitz is None or known.strong_convexity is not None:
            return None
        operator = exact.inner.linear.operator
        steps = affordable(operator.batch, operator.size, _MOST_PRODUCTS)
        if steps < 2:
            return None
        return lanczos_spectrum(operator, failure_probability=_PROBABILITY, max_steps=steps).least

    @cached_property
    def _measured_cross_norm(self) -> torch.Tensor | None:
        """An upper bound (K,) of ‖B‖ by Lanczos, if it is needed and no other is known."""
        known, others = self.constants, self._without_cross_norm.adjoint
        needed = None not in (known.cross_lipschitz, known.outer_cross_lipschitz) and _finite(others)
        if not needed or known.cross_norm is not None or self.exact.inner.cross_norm is not None:
            return None
        return cross_norm(self.exact.inner, _PROBABILITY)

    @cached_property
    def _spectral(self) -> Spectral:
        """The known norms of H and B at φ beside the constants, including ‖B‖ if H is not formed."""
        known, norm_b = self.constants.cross_norm, self._measured_cross_norm
        if not self.exact.inner.factorable:
            if known is not None:
                norm_b = number(known, self.exact.x[:, 0])
            elif norm_b is None:
                norm_b = self.exact.inner.cross_norm
        return replace(self._without_b, cross_norm=norm_b)

    @cached_property
    def _without_b(self) -> Spectral:
        return Spectral(self._curvature)

    def _probability(self, *measured: torch.Tensor | None) -> float:
        """Return the probability that a constant is wrong that was given, or of these that were found by Lanczos runs."""
        runs = sum(found is not None for found in measured)
        return self.constants.failure_probability + runs * self.exact.lower.batch * _PROBABILITY

    @cached_property
    def refined(self) -> Point:
        """A Newton step and an adjoint further."""
        return self.exact.refined()

    @cached_property
    def _without_cross_norm(self) -> Errors:
        return errors_at(self.exact, self.constants, self._without_b)

    @cached_property
    def direct(self) -> Errors:
        """The bounds that take no solve beyond those made: the formulas at (φ, q) itself."""
        if self._spectral.cross_norm is None:
            return self._without_cross_norm
        return errors_at(self.exact, self.constants, self._spectral)

    @cached_property
    def _refined_errors(self) -> Errors:
        return self._at(self.refined)

    def _at(self, better: Point) -> Errors:
        """Return the bounds at a better point."""
        known, spectral = self._spectral.at_point(self.constants, self.exact, better)
        return errors_at(better, known, spectral)

    @cached_property
    def _route(self) -> Route:
        return Route(self.exact, self.constants, self._without_b, self.products)

    @cached_property
    def _found(self) -> tuple[Errors, torch.Tensor]:
        """Every bound of each problem (K,), the smaller of the direct one and that by way of better points, and where two contradict each other."""
        if not self.exact.inner.factorable:
            best = self._route.follow(self.direct, self._spectral, gradient=True)
            return best, self._route.contradicted
        best, at = self.direct, self.refined
        # Newton's way from a φ that no minimum is proven to be near may end at another.
        near = torch.isfinite(best.inner.value) | self.constants.convex
        wrong = torch.zeros_like(near)
        for _ in range(_MOST_REFINEMENTS):
            there = self._refined_errors if at is self.refined else self._at(at)
            wrong = wrong | contradicted(self.exact, at, self.direct, there)
            round_about = through(self.exact, at, there).where(near)
            closer = bool((round_about.gradient.value < best.gradient.value).any())
            best = best.better(round_about)
            # Once what is left to bound is small beside the distance to it, a further step has nothing to tighten.
            if not closer or bool((there.gradient.value <= _SMALL * best.gradient.value).all()):
                break
            at = at.refined()
        return best, wrong

    @cached_property
    def _checked(self) -> tuple[Errors, bool]:
        return self._without_contradictions(*self._found)

    @property
    def errors(self) -> Errors:
        """Every bound of each problem (K,); infinite where two of them contradict each other, and ``on_failure`` does not raise."""
        return self._checked[0]

    def _without_contradictions(self, best: Errors, wrong: torch.Tensor) -> tuple[Errors, bool]:
        """Return ``best`` without the bounds of problems in which two contradict each other, and whether the policy asks for NaN."""
        poisoned = False
        if not bool(wrong.any()):
            return best, poisoned
        if _any(self._believed[0]):
            of = f" in problem {int(wrong.nonzero()[0, 0])}" if len(wrong) > 1 else ""
            error = ConstantsError(
                f"{self.where}: expected constants that hold as far as the solution, got bounds by them at two points{of} that contradict each "
                "other; correct the constants, or leave out what is not known: the error is then estimated"
            )
            poisoned = handle_misuse(error, self.on_failure)
        return best.where(~wrong), poisoned

    @cached_property
    def _others_checked(self) -> tuple[Errors, bool]:
        """The bounds of all but the hypergradient, for which ‖B‖ need not be found."""
        if self.exact.inner.factorable:
            return self._checked
        best = self._route.follow(self._without_cross_norm, self._without_b, gradient=False)
        return self._without_contradictions(best, self._route.contradicted)

    @property
    def _others(self) -> Errors:
        return self._others_checked[0]

    @property
    def _better(self) -> tuple[Point, Errors] | None:
        """A point whose hypergradient is better, with the bounds there, once :attr:`errors` are known."""
        if self.exact.inner.factorable:
            return self.refined, self._refined_errors
        return None if self._route.there is None else (self._route.at, self._route.there)

    @cached_property
    def _compared(self) -> tuple[Point, torch.Tensor]:
        """The point that estimates compare with, and in which problems (K,) Newton's method has come near enough to the solution there.

        It is the refined one, or a later one where that is not near enough.
        """
        at, better = self.exact, self.refined
        noise = at.rounding.residual
        for _ in range(_MOST_STEPS):
            near = better.inner.newton_contraction(at.inner, noise) <= _CONTRACTION
            if not bool((~near & (better.x != at.x).any(-1)).any()):
                break  # those that are left no longer move
            at, better = better, better.refined(noise)
        return better, near

    @property
    def compared(self) -> Point:
        """The point that estimates compare with."""
        return self._compared[0]

    @cached_property
    def estimates(self) -> Errors:
        """The distances to a point whose own errors are of second order, per problem (K,) (C5); infinite where none was found."""
        compared, near = self._compared
        zero = torch.zeros_like(self.exact.x[:, 0])
        nothing = Split(zero, zero, zero)
        return through(self.exact, compared, Errors(nothing, nothing, nothing, nothing)).where(near)

    @property
    def inner_bound(self) -> Bound:
        """Of ‖φ − φ*‖, the largest of any problem's."""
        return self._worst(self._others.inner, lambda: self.estimates.inner)

    @property
    def adjoint_bound(self) -> Bound:
        """Of ‖q − q*‖, the largest of any problem's."""
        return self._worst(self._others.adjoint, lambda: self.estimates.adjoint)

    @property
    def value_bound(self) -> Bound:
        """Of the corrected value's error, the mean over the problems."""
        rounding = abs(float(self.exact.corrected_value.mean()) - float(self.corrected_value))
        return self._mean(
            self._others.value, rounding, lambda: self.estimates.value, self._probability(self._curvature)
        )

    @property
    def bound(self) -> Bound:
        """Of ‖ĝ − g‖, ĝ and g being the means over the problems."""
        exact, given = self.exact, self.gradient.to(self.exact.x)
        rounding = float((given - exact.gradient.mean(0)).norm())
        if self._believed[1] or self._checked[1]:
            return _NOTHING
        if not _finite(self.errors.gradient):
            estimated = self.estimates.gradient
            mean = float((given - self.compared.gradient.mean(0)).norm())
            if not _finite(estimated):
                return _NOTHING
            return Bound(mean, Basis.ESTIMATED, float(estimated.inner.mean()), float(estimated.linear.mean()))
        probability = self._probability(self._curvature, self._measured_cross_norm)
        bound = self._mean(self.errors.gradient, rounding, lambda: self.estimates.gradient, probability)
        better = self._better
        if better is not None and _finite(better[1].gradient) and _finite(self.errors.inner):
            # Errors of several problems cancel in their mean, which the mean of their sizes does not see.
            distance = float((given - better[0].gradient.mean(0)).norm())
            together = distance + float(better[1].gradient.value.mean())
            if together < bound.value:
                bound = Bound(together, bound.basis, bound.inner_part, bound.linear_part, bound.failure_probability)
        return bound

    @property
    def corrected_gradient(self) -> torch.Tensor:
        """g̃ (p,): the hypergradient at the refined point, whose error is of second order."""
        return self.refined.gradient.mean(0).to(self.gradient)

    def _worst(self, bound: Split, estimate: Callable[[], Split]) -> Bound:
        probability = self._probability(self._curvature)
        basis = Basis.PROBABILISTIC if probability else Basis.CERTIFIED
        if not _finite(bound):
            bound, basis, probability = estimate(), Basis.ESTIMATED, 0.0
        if self._believed[1] or self._others_checked[1] or not _finite(bound):
            return _NOTHING
        if not bound.value.numel():
            return Bound(0.0, basis, 0.0, 0.0, probability)
        which = int(bound.value.nan_to_num(nan=math.inf).argmax())
        return Bound(
            float(bound.value[which]), basis, float(bound.inner[which]), float(bound.linear[which]), probability
        )

    def _mean(self, bound: Split, rounding: float, estimate: Callable[[], Split], probability: float) -> Bound:
        basis = Basis.PROBABILISTIC if probability else Basis.CERTIFIED
        if not _finite(bound):
            bound, basis, probability = estimate(), Basis.ESTIMATED, 0.0
        if self._believed[1] or self._others_checked[1] or not _finite(bound):
            return _NOTHING
        value, inner, linear = (float(part.mean()) for part in (bound.value, bound.inner, bound.linear))
        return Bound(value + rounding, basis, inner, linear, probability)


_NOTHING = Bound(math.nan, Basis.RESIDUAL)


def _any(given: Constants) -> bool:
    return any(getattr(given, item.name) is not None for item in fields(given) if item.default is None)


def _finite(bound: Split) -> bool:
    return bool(torch.isfinite(bound.value).all())
