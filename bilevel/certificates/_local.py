"""Error estimates, without bounds, of a hypergradient whose inner problem has proximal terms.

The local model of such a problem is smooth, and its Newton steps estimate errors as for any smooth problem. It holds on
one manifold alone. Its constants, given or proven, therefore do not bound the distance to the solution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from bilevel.certificates._certificate import Certificate
from bilevel.certificates._point import Point
from bilevel.certificates.bound import Bound
from bilevel.certificates.constants import Constants
from bilevel.errors import ArgumentError
from bilevel.reports import Basis

__all__ = ["LocalCertificate", "NoCertificate"]

_NOTHING = Bound(math.nan, Basis.RESIDUAL)


@dataclass(frozen=True, eq=False)
class LocalCertificate(Certificate):
    """Estimates at a point whose objective is a local model."""

    @cached_property
    def constants(self) -> Constants:
        return Constants()

    @cached_property
    def _believed(self) -> tuple[Constants, bool]:
        return Constants(), False


@dataclass(frozen=True, eq=False)
class NoCertificate(Certificate):
    """No error estimate: for constraints, terms that are known by their prox alone, and derivatives that are not implicit."""

    @property
    def bound(self) -> Bound:
        return _NOTHING

    inner_bound = adjoint_bound = value_bound = bound

    @property
    def corrected_gradient(self) -> torch.Tensor:
        raise self._unknown("a correction of the gradient")

    @property
    def refined(self) -> Point:
        raise self._unknown("a refined point")

    @property
    def observed(self) -> Constants:
        raise self._unknown("the constants that are observed")

    def _unknown(self, what: str) -> ArgumentError:
        return ArgumentError(
            f"{self.where}: expected an inner problem without constraints, and an inner_prox that returns a term that names its manifold, for "
            f"{what}; use grad, or take a term of bilevel.prox in place of one that is known by its prox alone"
        )
