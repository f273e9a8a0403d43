"""What is said of the error of a hypergradient whose inner problem has proximal terms: estimates, and no bounds.

The local model of such a problem is smooth, and its Newton steps estimate errors as they do of any other. But it does not see other
manifolds, so that no constant of it, given or proven by its structure, bounds the distance to the solution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from bilevel.certificates._certificate import Certificate
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
    """Of a term that is known by its prox alone: nothing is said of errors."""

    @property
    def bound(self) -> Bound:
        return _NOTHING

    inner_bound = adjoint_bound = value_bound = bound

    @property
    def corrected_gradient(self) -> torch.Tensor:
        raise ArgumentError(
            f"{self.where}: expected inner_prox to return a term that names its manifold, for a correction of the gradient, got one that is "
            "known by its prox alone; take a term of bilevel.prox, or use grad"
        )
