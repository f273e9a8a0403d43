"""Conjugate gradients for a single problem, with Python numbers in place of one-element tensors.

Operations on one-element tensors cost as much as those on short vectors, and dominate a step if products are cheap. The
steps are those of :class:`bilevel.CG`, which handles everything but ordinary steps and convergence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from bilevel.operators import LinearOperator

__all__ = ["SingleProblemState", "run_single"]


@dataclass(frozen=True, eq=False)
class SingleProblemState:
    """The state of a run. Vectors are (1, n).

    Parameters
    ----------
    steps
        The number of steps taken.
    x, r
        The iterate and its recursive residual.
    p, rr, largest
        The next direction, rᵀr and the largest quotient pᵀAp / pᵀp so far.
    product
        A p, if it was made.
    residual
        The true residual if the problem is solved. None: the run continues from the state above.
    """

    steps: int
    x: torch.Tensor
    r: torch.Tensor
    p: torch.Tensor
    rr: float
    largest: float
    product: torch.Tensor | None = None
    residual: torch.Tensor | None = None


def run_single(
    operator: LinearOperator,
    rhs: torch.Tensor,
    x: torch.Tensor,
    r: torch.Tensor,
    threshold: float,
    goal: float,
    tiny: float,
    most: int,
    *,
    verify: bool,
) -> SingleProblemState:
    """Take at most ``most`` steps from x with residual r, both (1, n), until something ends the run.

    Parameters
    ----------
    operator, rhs
        A and b (1, n).
    threshold, goal
        The norm of the true residual to reach, and the squared norm of the recursive residual at which it is computed.
    tiny
        The share of the largest quotient that counts as rounding.
    verify
        False: trust the recursive residual.
    """
    b, x, r = rhs.squeeze(0), x.squeeze(0), r.squeeze(0)
    p, rr, largest, step = r, float(torch.dot(r, r)), 0.0, 0
    product: torch.Tensor | None = None
    while step < most:
        product = operator.matvec(_row(p))
        Ap = product.squeeze(0)
        curvature, size = float(torch.dot(p, Ap)), float(torch.dot(p, p))
        if not size > 0:
            break
        quotient = curvature / size
        largest = max(largest, quotient) if step else float(Ap.norm()) / math.sqrt(size)
        if not quotient > tiny * largest:
            break
        alpha = rr / curvature
        moved, rest = torch.add(x, p, alpha=alpha), torch.sub(r, Ap, alpha=alpha)
        fresh = float(torch.dot(rest, rest))
        if not fresh > goal:
            true = b - operator.matvec(_row(moved)).squeeze(0) if verify else rest
            if float(true.norm()) <= threshold:
                return SingleProblemState(step + 1, _row(moved), _row(rest), _row(p), fresh, largest, None, _row(true))
            break
        x, r, p = moved, rest, torch.add(rest, p, alpha=fresh / rr)
        rr, product, step = fresh, None, step + 1
    return SingleProblemState(step, _row(x), _row(r), _row(p), rr, largest, product)


def _row(v: torch.Tensor) -> torch.Tensor:
    return v.unsqueeze(0)  # (1, n)
