"""Whether a right-hand side that was not solved for lies outside the range of its matrix."""

from __future__ import annotations

import torch

from bilevel.linear._null_space import null_part
from bilevel.operators import LinearOperator

__all__ = ["outside_range"]

_MOST_STEPS = 1000


def outside_range(
    operator: LinearOperator, residual: torch.Tensor, threshold: torch.Tensor, these: torch.Tensor, doubt: float
) -> torch.Tensor:
    """Return where the part of b outside the range of A is proven to be above ``threshold``, of the problems ``these``.

    Least squares by conjugate gradients (CGLS) take what lies in the range away from r = b − A x, whatever x is. Where Aᵀr
    vanishes beside ‖A‖ ‖r‖ for an r that is left, r is a null vector of Aᵀ, and A is singular.

    Parameters
    ----------
    residual
        b − A x (batch, n).
    threshold
        (batch,).
    these
        Bool (batch,).
    doubt
        The part of ‖A‖ that is not told from zero.

    References
    ----------
    Björck, "Numerical Methods for Least Squares Problems", 1996, section 7.4.
    """
    most = min(2 * operator.size + 20, _MOST_STEPS)
    r, proven = null_part(operator.rmatvec, operator.matvec, residual, these, most, doubt)
    return proven & (r.norm(dim=-1) > threshold)
