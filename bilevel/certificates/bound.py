"""A bound with what it rests on: proof, proof up to a stated probability, or estimate; never blurred."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bilevel.reports import Basis

__all__ = ["Bound"]


@dataclass(frozen=True)
class Bound:
    """An error bound, why it holds, and the parts that the two solves contribute.

    Parameters
    ----------
    value
        A bound on a norm of the error, or an estimate of it; NaN if it is unknown.
    basis
        Why :attr:`value` holds: proven, probable, or estimated.
    inner_part
        The part that shrinks with the inner residual ‖∇_φ G‖.
    linear_part
        The part that shrinks with the residual of the linear solve, ‖v − H q‖. The rest of the value is rounding. The two parts
        are bounds of their own, and their sum may exceed the value.
    failure_probability
        For :attr:`~bilevel.reports.Basis.PROBABILISTIC`, the probability that the bound is too small.

    Examples
    --------
    >>> Bound(2e-6, Basis.CERTIFIED, inner_part=1.5e-6, linear_part=5e-7)
    Bound(value=2e-06, basis=<Basis.CERTIFIED: 0>, inner_part=1.5e-06, linear_part=5e-07, failure_probability=0.0)
    >>> print(Bound(2e-6, Basis.CERTIFIED, inner_part=1.5e-6, linear_part=5e-7))
    at most 2e-06 (certified; from the inner solve 1.5e-06, from the linear solve 5e-07)
    """

    value: float
    basis: Basis
    inner_part: float = math.nan
    linear_part: float = math.nan
    failure_probability: float = 0.0

    @property
    def certified(self) -> bool:
        """Whether the value is proven."""
        return self.basis is Basis.CERTIFIED

    def __str__(self) -> str:
        if math.isnan(self.value) or self.basis is Basis.RESIDUAL:
            return "not known"
        parts = [
            f"from the {name} solve {part:.2g}"
            for name, part in (("inner", self.inner_part), ("linear", self.linear_part))
            if math.isfinite(part) and part > 0
        ]
        verb, what = {
            Basis.CERTIFIED: ("at most", "certified"),
            Basis.PROBABILISTIC: ("at most", f"with probability 1 - {self.failure_probability:.1g}"),
        }.get(self.basis, ("about", "estimated"))
        return f"{verb} {self.value:.2g} ({'; '.join([what, ', '.join(parts)] if parts else [what])})"
