"""Whether a right-hand side that was not solved for lies outside the range of its matrix."""

from __future__ import annotations

import torch

from bilevel.operators import LinearOperator

__all__ = ["outside_range"]

_MOST_STEPS = 1000
_BASIS_NUMBERS = 2**25


def outside_range(
    operator: LinearOperator, residual: torch.Tensor, threshold: torch.Tensor, these: torch.Tensor, doubt: float
) -> torch.Tensor:
    """Return where the part of b outside the range of A is proven to be above ``threshold``, of the problems ``these``.

    Least squares by conjugate gradients (CGLS) take what lies in the range away from r = b − A x, whatever x is. Where Aᵀr
    vanishes beside ‖A‖ ‖r‖ for an r that is left, r is a null vector of Aᵀ, and A is singular. The vectors Aᵀr are kept orthogonal to all
    former ones, as far as memory goes, so that rounding costs no steps.

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
    these = these & torch.isfinite(residual).all(dim=-1)
    r = torch.where(these.unsqueeze(-1), residual, 0.0)
    proven, active = torch.zeros_like(these), these
    s = operator.rmatvec(r)
    slope, p, square = s.norm(dim=-1), s, torch.linalg.vecdot(s, s)
    largest = torch.zeros_like(square)  # a lower bound of ‖A‖
    basis: list[torch.Tensor] = []
    for _ in range(min(2 * operator.size + 20, _MOST_STEPS)):
        q = operator.matvec(p)
        largest = torch.fmax(largest, q.norm(dim=-1) / p.norm(dim=-1))
        left = r.norm(dim=-1)
        vanished = ~(slope > doubt * largest * left)
        proven = proven | (active & vanished & (left > threshold))
        active = active & ~vanished & (left > threshold) & (square > 0)
        if not bool(active.any()):
            break
        alpha = torch.where(active, square / torch.linalg.vecdot(q, q), 0.0).unsqueeze(-1)
        r = r - alpha * q
        if len(basis) * s.numel() < _BASIS_NUMBERS:
            basis.append(torch.where(active.unsqueeze(-1), s / square.sqrt().unsqueeze(-1), 0.0))
        s = operator.rmatvec(r)
        slope, kept = s.norm(dim=-1), torch.stack(basis, 1)  # (batch, steps, n)
        s = s - (kept.mT @ (kept @ s.unsqueeze(-1))).squeeze(-1)
        fresh = torch.linalg.vecdot(s, s)
        p = s + torch.where(active, fresh / square, 0.0).unsqueeze(-1) * p
        square = fresh
    return proven
