"""A returned inner point and adjoint, (φ, q), with the results there and their rounding errors.

The certificate of a float32 solve is computed in float64: the problem's tensors are exact numbers, and are converted.

The rounding error of a result is measured in two ways. First, the same numbers are evaluated in float32 and in float64. The difference is float32's
rounding, and float64's in proportion. Second, every number is moved by a unit in its last place. The larger change, times a margin, counts as the
rounding error.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch

from bilevel.certificates._inner_point import InnerPoint
from bilevel.equations.perturbation import perturbed, perturbed_copies
from bilevel.equations.problem import Problem

__all__ = ["Point", "Rounding"]

# The margin of a measured change, and the largest number of numbers in the copies of a problem that measure it.
_MARGIN = 8.0
# The share of ‖q‖ ‖rounding of ∇G‖ that the rounding of a value has at least: the product is reached if all of it points along q.
_VALUE_SHARE = 0.25
_SCATTERED_NUMBERS = 2**22


@dataclass(frozen=True, eq=False)
class Rounding:
    """The rounding errors of the results of a :class:`Point`, per problem (K,)."""

    residual: torch.Tensor
    rho: torch.Tensor
    gradient: torch.Tensor
    value: torch.Tensor

    def larger(self, other: Rounding) -> Rounding:
        """Return the larger of each."""
        return Rounding(*map(torch.maximum, self._parts(), other._parts()))

    def times(self, factor: float) -> Rounding:
        """Return each error times ``factor``."""
        return Rounding(*(factor * part for part in self._parts()))

    def largest_of(self, draws: int) -> Rounding:
        """Return the largest of each error over ``draws`` copies (draws · K,); one that is not finite says nothing."""
        known = (part.nan_to_num(nan=0.0, posinf=0.0) for part in self._parts())
        return Rounding(*(part.reshape(draws, -1).amax(0) for part in known))

    def _parts(self) -> tuple[torch.Tensor, ...]:
        return tuple(getattr(self, item.name) for item in fields(self))


@dataclass(frozen=True, eq=False)
class Point:
    """The results at φ with the adjoint q, per problem of a batch of K. Another adjoint at the same φ shares :attr:`inner`.

    Parameters
    ----------
    inner
        φ, and everything there that does not depend on q.
    q
        (K, n).
    """

    inner: InnerPoint
    q: torch.Tensor

    @staticmethod
    def at(lower: Problem, upper: Problem, x: torch.Tensor, q: torch.Tensor, needs_grad: tuple[bool, ...]) -> Point:
        """Return the point x, q (K, n) of the objectives ``lower``, G, and ``upper``, F: see :class:`InnerPoint`."""
        return Point(InnerPoint(lower, upper, x, needs_grad), q)

    @property
    def x(self) -> torch.Tensor:
        """The inner solution φ (K, n)."""
        return self.inner.x

    @property
    def lower(self) -> Problem:
        """The inner objective G."""
        return self.inner.lower

    @property
    def upper(self) -> Problem:
        """The outer objective F."""
        return self.inner.upper

    @property
    def needs_grad(self) -> tuple[bool, ...]:
        """Which tensors make up θ."""
        return self.inner.needs_grad

    @cached_property
    def hq(self) -> torch.Tensor:
        """The product H q (K, n) of the inner Hessian with the adjoint."""
        return self.inner.linear.operator.matvec(self.q)

    @cached_property
    def rho(self) -> torch.Tensor:
        """The residual of the linear system, ρ = v − H q (K, n), with v = ∇_φ F."""
        return self.inner.v - self.hq

    @cached_property
    def corrected_value(self) -> torch.Tensor:
        """F − qᵀ∇_φ G (K,)."""
        return self.upper.value(self.x) - (self.q * self.inner.residual).sum(-1)

    @cached_property
    def gradient(self) -> torch.Tensor:
        """ĝ = ∇_θ F − Bᵀ q of each problem (K, p)."""
        return self.inner.gradient(self.q)

    def with_q(self, q: torch.Tensor) -> Point:
        """Return the point with another adjoint at the same φ."""
        return Point(self.inner, q)

    def refined(self, noise: torch.Tensor | None = None) -> Point:
        """Return φ⁺ = φ − H⁻¹∇G with the adjoint there, q⁺ = q + H(φ⁺)⁻¹ρ(φ⁺): two solves.

        If the step makes ‖∇G‖ larger, it is halved until it does not; φ is kept if no halving helps. ``noise`` (K,) is the
        rounding error of ∇G, if it is known.
        """
        noise = self.rounding.residual if noise is None else noise
        moved = Point(self.inner.stepped(self.inner.solve(self.inner.residual), noise), self.q)
        return moved.with_q(self.q + moved.inner.solve(moved.rho).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))

    def perturbed(self, seed: int) -> Point:
        """Return the point with every number moved by a unit in its last place, with random signs."""
        lower, (x, q) = perturbed(self.lower, seed, self.x, self.q)
        return Point.at(lower, Problem(self.upper.system, lower.tensors), x, q, self.needs_grad)

    @cached_property
    def rounding(self) -> Rounding:
        """The measured rounding error of each result in this dtype."""
        inner, eps = self.inner, self.inner.eps
        sizes = Rounding(
            eps * (inner.linear.operator.matvec(self.x).norm(dim=-1) + inner.residual.norm(dim=-1)),
            eps * (inner.v.norm(dim=-1) + self.hq.norm(dim=-1)),
            eps * self.gradient.norm(dim=-1),
            eps * self.corrected_value.abs(),
        )
        worst = sizes.larger(self._apart(self.perturbed(0)))
        if self.x.dtype != torch.float64:
            return self._least(worst.larger(self._apart(self.perturbed(1))))
        try:
            worst = worst.larger(self._float32_rounding())
        except (RuntimeError, TypeError, ValueError):
            # No evaluation in float32, for a constant of another dtype inside, or no copies.
            worst = worst.larger(self._apart(self.perturbed(1)))
        return self._least(worst)

    def _least(self, worst: Rounding) -> Rounding:
        """Return the rounding to count with, where the draws showed ``worst``."""
        # A value is one number, and few draws of one number may all be small. It holds qᵀ∇G, and with it the rounding of ∇G.
        least = _VALUE_SHARE * self.q.norm(dim=-1) * worst.residual
        return replace(worst, value=torch.maximum(worst.value, least)).times(_MARGIN)

    def _float32_rounding(self) -> Rounding:
        """Return the rounding errors in float32, scaled to float64's unit."""
        numbers = sum(t.numel() for t in self.lower.tensors if t.dtype.is_floating_point)
        # With few numbers a single draw may happen to change little, so several are made.
        draws = max(1, min(6, 64 // max(1, self.lower.size), _SCATTERED_NUMBERS // max(1, numbers)))
        lower, (x, q) = perturbed_copies(self.lower, 2, draws, self.x, self.q)
        upper = Problem(replace(self.upper.system, levels=lower.system.levels), lower.tensors)
        wide = Point.at(lower, upper, x, q, self.needs_grad)
        single = torch.float32
        narrow = Point.at(lower.to(single), upper.to(single), x.to(single), q.to(single), self.needs_grad)
        apart = wide._apart(narrow).times(self.inner.eps / torch.finfo(single).eps)
        return apart.largest_of(draws)  # beyond float32's range nothing is told

    def _apart(self, other: Point) -> Rounding:
        return Rounding(
            (other.inner.residual - self.inner.residual).norm(dim=-1),
            (other.rho - self.rho).norm(dim=-1),
            (other.gradient - self.gradient).norm(dim=-1),
            (other.corrected_value - self.corrected_value).abs(),
        )
