"""Which linear solves of a layer look for free directions."""

from __future__ import annotations

from collections.abc import Hashable

import torch

from bilevel.operators import LinearOperator
from bilevel.reports import Status

__all__ = ["Examinations"]


class Examinations:
    """Counts the linear solves of a layer and says which of them examine their matrices for free directions.

    An examination costs about as many products as the solve, so a layer whose matrices are regular must not pay for it in every call. Solves number
    1, 2, 4, 8, ... with matrices of one size examine. Once a layer has met a singular matrix, every solve does.
    """

    def __init__(self) -> None:
        self._counts: dict[Hashable, int] = {}
        self._singular: set[Hashable] = set()

    def is_due(self, operator: LinearOperator) -> bool:
        """Count one solve, and return whether it is to examine its matrices."""
        if operator.positive_definite:
            return False
        key = _key(operator)
        count = self._counts[key] = self._counts.get(key, 0) + 1
        return key in self._singular or count & (count - 1) == 0

    def learn(self, operator: LinearOperator, status: torch.Tensor) -> None:
        """Remember that a solve with matrices of this size met a singular one, if ``status`` (batch,) says so."""
        if bool((status == Status.MINIMUM_NORM).any()):
            self._singular.add(_key(operator))


def _key(operator: LinearOperator) -> Hashable:
    return operator.size, operator.dtype, operator.symmetric
