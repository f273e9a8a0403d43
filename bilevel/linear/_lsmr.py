"""LSMR for a batch: AᵀA x = d, and A x = b with d = Aᵀ b, by products with A and Aᵀ, with a mask for each problem.

Golub–Kahan bidiagonalisation begun with d (upper bidiagonal: "Bidiag 2" of Paige & Saunders, "LSQR", ACM TOMS 8, 1982), with the update of Fong
& Saunders, "LSMR: an iterative algorithm for sparse least-squares problems", SIAM J. Sci. Comput. 33, 2011. The bidiagonal matrix is the
triangular factor that LSMR makes of its own, so that the iterates are the same; beginning with d takes right-hand sides of the normal equations
that are no Aᵀ b of a known b. ‖d − AᵀA x‖ decreases at each step, and x stays in the range of Aᵀ: it tends to the solution of minimum norm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

__all__ = ["Kept", "NormalRun", "lsmr"]

Product = Callable[[torch.Tensor], torch.Tensor]


class NormalRun(NamedTuple):
    """x (batch, n), A x (batch, m) by the recurrence, ‖d − AᵀA x‖ (batch,) by the recurrence, and steps int64 (batch,)."""

    x: torch.Tensor
    image: torch.Tensor
    left: torch.Tensor
    steps: torch.Tensor


def lsmr(
    matvec: Product,
    rmatvec: Product,
    normal_rhs: torch.Tensor,
    accuracy: torch.Tensor,
    max_steps: int | torch.Tensor,
    rhs: torch.Tensor | None = None,
    threshold: torch.Tensor | None = None,
) -> NormalRun:
    """Solve AᵀA x = d until ‖d − AᵀA x‖ ≤ ``accuracy``, or ‖b − A x‖ ≤ ``threshold``.

    A step costs two products. Former right vectors are kept, up to 256 MiB, and each new one is made orthogonal to
    them.

    Parameters
    ----------
    matvec, rmatvec
        v (batch, n) ↦ A v (batch, m), and u (batch, m) ↦ Aᵀ u (batch, n).
    normal_rhs
        d (batch, n).
    accuracy
        (batch,). 0: spend the steps. Infinite: leave the problem out.
    max_steps
        The largest number of steps: one number, or one per problem (batch,).
    rhs, threshold
        b (batch, m) and (batch,), where b is known.
    """
    tiny, eps = torch.finfo(normal_rhs.dtype).tiny, torch.finfo(normal_rhs.dtype).eps

    def unit(vector: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        return vector / torch.where(norm > tiny, norm, torch.inf).unsqueeze(-1)

    left = normal_rhs.norm(dim=-1)
    zeta_bar = left
    goal = torch.maximum(accuracy, 0.01 * eps * left)
    limit = torch.as_tensor(max_steps, device=left.device).expand(left.shape)
    steps = torch.zeros(left.shape, dtype=torch.int64, device=left.device)
    active = torch.isfinite(left) & (left > goal) & (left > tiny) & (limit > 0)
    v = unit(normal_rhs, left)
    kept = Kept(v)
    x, h, h_bar = torch.zeros_like(v), v, torch.zeros_like(v)
    rho_before = rho_bar_before = c_bar = torch.ones_like(left)
    s_bar = theta = size = torch.zeros_like(left)
    p: torch.Tensor | None = None
    image = image_h = image_h_bar = None
    shrink = s_bar.unsqueeze(-1)  # θ/ρ of the last step
    for _ in range(int(limit.max()) if len(left) else 0):
        if not bool(active.any()):
            break
        steps = steps + active
        # ρ p = A v − θ p, and then θ v = Aᵀ p − ρ v.
        product = matvec(v)
        if p is None or image is None or image_h is None or image_h_bar is None:
            p, image, image_h, image_h_bar = (torch.zeros_like(product) for _ in range(4))
            image_h = product
        else:
            image_h = product - shrink * image_h
        p = product - theta.unsqueeze(-1) * p
        rho = p.norm(dim=-1)
        size = torch.maximum(size, torch.where(active, rho, 0.0))
        p = unit(p, rho)
        v = kept.orthogonal(rmatvec(p) - rho.unsqueeze(-1) * v)
        theta = v.norm(dim=-1)
        theta = torch.where(theta > 8 * eps * size, theta, 0.0)  # below this, the Krylov space is exhausted
        v = unit(v, theta)
        kept.add(v)
        theta_bar = s_bar * rho
        rho_bar = torch.hypot(c_bar * rho, theta)
        c_bar, s_bar = _quotient(c_bar * rho, rho_bar), _quotient(theta, rho_bar)
        zeta, zeta_bar = c_bar * zeta_bar, -s_bar * zeta_bar
        back = _quotient(theta_bar * rho, rho_before * rho_bar_before).unsqueeze(-1)
        h_bar, image_h_bar = h - back * h_bar, image_h - back * image_h_bar
        step = _quotient(zeta, rho * rho_bar).unsqueeze(-1)
        moved = x + step * h_bar
        # A direction that A maps to zero adds only rounding.
        sound = active & torch.isfinite(moved).all(dim=-1) & (rho > 8 * eps * size)
        x = torch.where(sound.unsqueeze(-1), moved, x)
        image = torch.where(sound.unsqueeze(-1), image + step * image_h_bar, image)
        shrink = _quotient(theta, rho).unsqueeze(-1)
        h = v - shrink * h
        rho_before, rho_bar_before = rho, rho_bar
        left = torch.where(sound, zeta_bar.abs(), left)
        active = sound & (left > goal) & (theta > tiny) & (steps < limit)
        if rhs is not None and threshold is not None:
            active = active & ((rhs - image).norm(dim=-1) > threshold)
    if image is None:
        image = torch.zeros_like(matvec(x))
    return NormalRun(x, image, left, steps)


def _quotient(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a / torch.where(b == 0, torch.inf, b)


_BASIS_BYTES = 2**28


class Kept:
    """The former vectors of a run, to which new ones are made orthogonal. If memory is short, only the latest."""

    def __init__(self, first: torch.Tensor) -> None:
        self._room = max(2, _BASIS_BYTES // max(1, first.numel() * first.element_size()))
        self._vectors = first.new_zeros(len(first), min(self._room, 8), first.shape[-1])  # (batch, kept, n)
        self._count = 0
        self.add(first)

    def add(self, vector: torch.Tensor) -> None:
        """Keep ``vector`` (batch, n), of norm one or zero."""
        width = self._vectors.shape[1]
        if self._count == width and width < self._room:
            grown = self._vectors.new_zeros(len(vector), min(self._room, 2 * width), vector.shape[-1])
            grown[:, :width] = self._vectors
            self._vectors = grown
        self._vectors[:, self._count % self._vectors.shape[1]] = torch.nan_to_num(vector)
        self._count += 1

    def orthogonal(self, vector: torch.Tensor) -> torch.Tensor:
        """Return ``vector`` (batch, n) without its parts along those kept."""
        known = self._vectors[:, : self._count]
        # Row by row, so that the rounding of a problem does not depend on its place in the batch.
        weights = (known * vector.unsqueeze(-2)).sum(-1, keepdim=True)  # (batch, kept, 1)
        return vector - (weights * known).sum(-2)
