"""Null vectors of matrices known by their products, found by conjugate gradients.

Solve A y = A g for a random g. Then g − y tends to the projection of g onto the null space of A::

    u₀ = g,   u_k = g − y_k with y_k in the range of Aᵀ,   u_k → P g

‖u_k‖ falls monotonically, and the residual is A u_k. So ‖A u_k‖ / (‖A‖ ‖u_k‖) bounds the smallest singular value of A
at every step, without another product. The run ends when the bound is at rounding level (A is singular), or when u_k
has nearly vanished (A is regular).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from bilevel.operators import LinearOperator

__all__ = ["NullSpace", "find_null_space", "known_null_space", "null_part", "without_null_part"]

_BASIS_NUMBERS = 2**25
_MOST_RESTARTS = 4
# In one of a hundred cases, the part of a random g along a given direction is below this share of its expectation.
_SHARE = 0.01
_MEMO = "null space"

Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class NullSpace:
    """The matrices of a batch that are singular to working precision, with a null vector of each.

    Parameters
    ----------
    singular
        Bool (batch,).
    vector
        (batch, n): a random element of the null space, of norm one; zero where A is not known to be singular.
    """

    singular: torch.Tensor
    vector: torch.Tensor


def known_null_space(operator: LinearOperator) -> NullSpace | None:
    """Return the earlier result of :func:`find_null_space` for ``operator``, or None."""
    found: NullSpace | None = operator.distinct.memo.get(_MEMO)
    return found


def find_null_space(operator: LinearOperator, max_steps: int) -> NullSpace:
    """Return which matrices of ``operator`` are singular. The operator keeps the result.

    A step costs one product if A is positive semidefinite, else two. A matrix that is undecided after ``max_steps``
    counts as regular. A matrix of condition number below 1e10 (float64), or 1e4 (float32), is never called singular.
    """
    known = known_null_space(operator)
    if known is not None:
        return known
    base = operator.distinct
    start = _normal(20, base.size).to(base.device)
    start = start.to(base.dtype).expand(base.batch, base.size)
    every = torch.ones(base.batch, dtype=torch.bool, device=base.device)
    least = _SHARE / base.size**0.5
    vector, singular = _null_part_of(base, start, every, max_steps, least)
    if bool(singular.any()):
        vector = torch.where(singular.unsqueeze(-1), vector, 0.0)
        singular = singular & _has_cancelled(base, vector)
        size = vector.norm(dim=-1, keepdim=True)
        vector = torch.where(singular.unsqueeze(-1) & (size > 0), vector / size, 0.0)
    found = NullSpace(singular, torch.where(singular.unsqueeze(-1), vector, 0.0))
    base.memo[_MEMO] = found
    return found


def without_null_part(
    operator: LinearOperator, x: torch.Tensor, these: torch.Tensor, max_steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x (batch, n) without its part in the null space of A, for ``these`` problems (batch,), and where x has changed.

    The result lies in the range of Aᵀ. If x is a solution, the result is the minimum-norm solution.
    """
    found = known_null_space(operator)
    assert found is not None
    eps, vector = torch.finfo(x.dtype).eps, found.vector.repeat(operator.repeats, 1)
    # The null vector is random. An x orthogonal to it is therefore orthogonal to the null space.
    along = torch.linalg.vecdot(vector, x).abs()
    these = these & (along > eps**0.5 * x.norm(dim=-1) / x.shape[-1] ** 0.5)
    if not bool(these.any()):
        return x, these
    part, _ = _null_part_of(operator, x, these, max_steps, 0.0)
    return torch.where(these.unsqueeze(-1), x - part, x), these


def rounded_zero(size: int, dtype: torch.dtype) -> float:
    """Return the share of ‖A‖ up to which a singular value of a matrix of order ``size`` counts as zero."""
    eps = torch.finfo(dtype).eps
    return min(max(size, 32) * eps, eps**0.7)


def null_part(
    matvec: Product,
    rmatvec: Product | None,
    start: torch.Tensor,
    these: torch.Tensor,
    max_steps: int,
    doubt: float,
    least: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return u (batch, n), an approximate projection of ``start`` onto the null space of A, and where u is a null vector.

    Parameters
    ----------
    matvec, rmatvec
        Products with A and Aᵀ. Without Aᵀ, A is assumed to be symmetric positive semidefinite. A problem ends undecided
        if it is not.
    start
        (batch, n).
    these
        Bool (batch,): the problems to examine.
    max_steps
        The most steps.
    doubt
        u is a null vector where ‖A u‖ ≤ ``doubt`` ‖A‖ ‖u‖.
    least
        A problem ends without a null vector where ‖u‖ ≤ ``least`` ‖start‖.

    References
    ----------
    Björck, "Numerical Methods for Least Squares Problems", 1996, section 7.4; Hestenes & Stiefel 1952, theorem 6:3, on the fall of ‖u_k‖.
    """
    gradient: Product = (lambda r: r) if rmatvec is None else rmatvec
    these = these & torch.isfinite(start).all(dim=-1)
    u = torch.where(these.unsqueeze(-1), start, 0.0)
    r = matvec(u)
    begun, size = u.norm(dim=-1), torch.zeros_like(start[..., 0])
    active, found = these & (begun > 0), torch.zeros_like(these)
    # A u = 0 from the beginning, as for A = 0.
    none = active & (r.norm(dim=-1) == 0)
    found, active = found | none, active & ~none
    run = _Run(gradient(r))
    restarts = 0
    for _ in range(max_steps):
        if not bool(active.any()):
            break
        q = matvec(run.p)
        steep = torch.linalg.vecdot(run.p, run.p)
        size = torch.where(active, torch.fmax(size, q.norm(dim=-1) / steep.sqrt()), size)
        curvature = torch.linalg.vecdot(q, run.p if rmatvec is None else q)
        sound = active & (curvature > 0) & torch.isfinite(curvature) & (run.square > 0)
        alpha = torch.where(sound, run.square / curvature, 0.0).unsqueeze(-1)
        u, r = u - alpha * run.p, r - alpha * q
        length = u.norm(dim=-1)
        active = active & ~(length <= least * begun)
        claimed = active & (r.norm(dim=-1) <= doubt * size * length)
        lost = run.step(gradient(r), sound)
        if bool((claimed | (active & (lost | ~sound))).any()):
            # The recurrence has drifted from A u, or has no directions left. The run restarts from the true product.
            r = matvec(u)
            proven = active & (r.norm(dim=-1) <= doubt * size * length)
            found, active = found | proven, active & ~proven
            restarts += 1
            if restarts > _MOST_RESTARTS:
                break
            run = _Run(gradient(r))
    return u, found


class _Run:
    """The directions p of conjugate gradients. Their gradients s are kept orthogonal to all former ones that memory holds."""

    def __init__(self, s: torch.Tensor) -> None:
        self.p, self.square = s, torch.linalg.vecdot(s, s)
        self._basis: list[torch.Tensor] = []
        self._s = s

    def step(self, s: torch.Tensor, sound: torch.Tensor) -> torch.Tensor:
        """Continue with the gradient ``s`` (batch, n), and return where it is not orthogonal to the former ones because it is only rounding."""
        length = self.square.sqrt().unsqueeze(-1)
        if (len(self._basis) + 1) * s.numel() < _BASIS_NUMBERS:
            self._basis.append(torch.where(sound.unsqueeze(-1) & (length > 0), self._s / length, 0.0))
        before = s.norm(dim=-1)
        kept = torch.stack(self._basis, 1)  # (batch, steps, n)
        s = s - (kept.mT @ (kept @ s.unsqueeze(-1))).squeeze(-1)
        fresh = torch.linalg.vecdot(s, s)
        self.p = s + torch.where(sound & (self.square > 0), fresh / self.square, 0.0).unsqueeze(-1) * self.p
        self._s, self.square = s, fresh
        return fresh.sqrt() < 0.5 * before


def _null_part_of(
    operator: LinearOperator, start: torch.Tensor, these: torch.Tensor, max_steps: int, least: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return :func:`null_part` with the products that suit the matrix. A symmetric matrix is first assumed to be semidefinite."""
    doubt = rounded_zero(operator.size, operator.dtype)
    u, found = start, torch.zeros_like(these)
    if operator.symmetric:
        u, found = null_part(operator.matvec, None, start, these, max_steps, doubt, least)
        these = these & ~found & ~(u.norm(dim=-1) <= least * start.norm(dim=-1))
        if operator.distinct.expect_definite or not bool(these.any()):
            return u, found
    rest, more = null_part(
        operator.matvec, operator.rmatvec, torch.where(these.unsqueeze(-1), u, 0.0), these, max_steps, doubt, least
    )
    return torch.where(these.unsqueeze(-1), rest, u), found | more


def _normal(seed: int, size: int) -> torch.Tensor:
    """Return normal random numbers (size,) in float64. numpy draws them, because an older vmap around this call refuses torch's generator."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(size))


def _has_cancelled(operator: LinearOperator, u: torch.Tensor) -> torch.Tensor:
    """Return where A u is small because terms cancel, and not because of the units of the unknowns. It costs at most two products.

    If the entries of u are multiplied by random numbers, the terms no longer cancel. A column of zeros is a null vector
    too: A u is then exactly zero.
    """
    eps = torch.finfo(u.dtype).eps
    factors = _normal(21, u.shape[-1]).to(u)
    cancelled = operator.matvec(u).norm(dim=-1) <= eps**0.5 * operator.matvec(factors * u).norm(dim=-1)
    if bool(cancelled.all()):
        return cancelled
    bare = torch.where(u.abs() > eps**0.5 * u.abs().amax(-1, keepdim=True), u, 0.0)
    return cancelled | (operator.matvec(bare) == 0).all(dim=-1)
