"""What stands in for a certificate where none is known: for problems with constraints, whose errors the smooth theory does not bound."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from bilevel.certificates.bound import Bound
from bilevel.certificates.constants import Constants
from bilevel.errors import ArgumentError
from bilevel.reports import Basis

__all__ = ["Uncertified"]


@dataclass(frozen=True)
class Uncertified:
    """Has the bounds of a certificate, all unknown; nothing in it is certified.

    Parameters
    ----------
    where
        The problem's name, for messages.
    """

    where: str

    @property
    def bound(self) -> Bound:
        """Not known."""
        return Bound(math.nan, Basis.RESIDUAL)

    inner_bound = adjoint_bound = value_bound = bound

    @property
    def corrected_gradient(self) -> torch.Tensor:
        """Refused."""
        raise self._unknown("corrected_grad")

    @property
    def observed(self) -> Constants:
        """Refused."""
        raise self._unknown("observed_constants")

    @property
    def refined(self) -> torch.Tensor:
        """Refused."""
        raise self._unknown("refined()")

    def _unknown(self, name: str) -> ArgumentError:
        return ArgumentError(
            f"{self.where}: expected a problem without constraints for {name}, which is made of the derivatives of a smooth objective; use grad, "
            "which is that of the constrained problem at the solution found"
        )
