"""Whether an unsolved right-hand side lies outside the range of its matrix."""

from __future__ import annotations

import torch

from bilevel.linear._null_space import null_part
from bilevel.operators import LinearOperator

__all__ = ["outside_range"]

_MOST_STEPS = 1000


def outside_range(
    operator: LinearOperator, residual: torch.Tensor, threshold: torch.Tensor, these: torch.Tensor, doubt: float
) -> torch.Tensor:
    """Return for which of ``these`` problems the part of b outside the range of A is proven to exceed ``threshold``.

    Conjugate gradients for least squares (CGLS) remove the part of r = b − A x in the range, for any x. If Aᵀr is
    negligible beside ‖A‖ ‖r‖ for the remaining r, then r is a null vector of Aᵀ, and A is singular.

    Parameters
    ----------
    residual
        b − A x (batch, n).
    threshold
        (batch,).
    these
        Bool (batch,).
    doubt
        The share of ‖A‖ that cannot be distinguished from zero.

    References
    ----------
    Björck, "Numerical Methods for Least Squares Problems", 1996, section 7.4.
    """
    most = min(2 * operator.size + 20, _MOST_STEPS)
    r, proven = null_part(operator.rmatvec, operator.matvec, residual, these, most, doubt)
    return proven & (r.norm(dim=-1) > threshold)
