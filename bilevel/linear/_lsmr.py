"""LSMR for a batch: min ‖A x − b‖² + δ²‖x‖² by products with A and Aᵀ, with a mask for each problem.

Golub–Kahan bidiagonalisation with two QR factorisations updated at each step, after Fong & Saunders, "LSMR: an iterative algorithm for sparse
least-squares problems", SIAM J. Sci. Comput. 33, 2011, algorithm LSMR with damping (section 4). ‖Aᵀ(b − A x) − δ² x‖ decreases at each step, and
from zero x stays in the range of Aᵀ: it tends to the solution of minimum norm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

__all__ = ["LeastSquaresRun", "lsmr"]

Product = Callable[[torch.Tensor], torch.Tensor]


class LeastSquaresRun(NamedTuple):
    """x (batch, n), steps int64 (batch,), and whether the recurrence says that the accuracy was reached, (batch,) bool."""

    x: torch.Tensor
    steps: torch.Tensor
    reached: torch.Tensor


def lsmr(
    matvec: Product,
    rmatvec: Product,
    rhs: torch.Tensor,
    like: torch.Tensor,
    accuracy: torch.Tensor,
    max_steps: int,
    damping: torch.Tensor | None = None,
) -> LeastSquaresRun:
    """Minimise ‖A x − b‖² + δ²‖x‖² until ‖Aᵀ(b − A x) − δ² x‖ ≤ ``accuracy``.

    Two products for each step; former right vectors are kept, up to 256 MiB, and each new one is made orthogonal to them.

    Parameters
    ----------
    matvec, rmatvec
        v (batch, n) ↦ A v (batch, m), and u (batch, m) ↦ Aᵀ u (batch, n).
    rhs
        b (batch, m).
    like
        A tensor of the shape (batch, n) and dtype of x.
    accuracy
        (batch,): the norm of the normal equations' residual to reach; 0 to spend the steps, infinite for a problem to be left out.
    max_steps
        The most steps.
    damping
        δ (batch,); zero if None.
    """
    delta = torch.zeros_like(accuracy) if damping is None else damping
    tiny, eps = torch.finfo(rhs.dtype).tiny, torch.finfo(rhs.dtype).eps

    def unit(vector: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        return vector / torch.where(norm > tiny, norm, torch.inf).unsqueeze(-1)

    beta = rhs.norm(dim=-1)
    u = unit(rhs, beta)
    v = rmatvec(u)
    alpha = v.norm(dim=-1)
    v = unit(v, alpha)
    kept = _Kept(v)
    zeta_bar, alpha_bar = alpha * beta, alpha
    rho = rho_bar = c_bar = torch.ones_like(alpha)
    s_bar = torch.zeros_like(alpha)
    x, h, h_bar = torch.zeros_like(like), v, torch.zeros_like(like)
    left = zeta_bar
    goal = torch.maximum(accuracy, 0.01 * eps * left)
    active = torch.isfinite(left) & (left > goal) & (left > tiny)
    steps = torch.zeros(len(rhs), dtype=torch.int64, device=rhs.device)
    for _ in range(max_steps):
        if not bool(active.any()):
            break
        steps = steps + active
        # The next vectors of the bidiagonalisation: β u = A v − α u, α v = Aᵀ u − β v.
        u = matvec(v) - alpha.unsqueeze(-1) * u
        beta = u.norm(dim=-1)
        u = unit(u, beta)
        v = kept.orthogonal(rmatvec(u) - beta.unsqueeze(-1) * v)
        alpha = v.norm(dim=-1)
        v = unit(v, alpha)
        kept.add(v)
        # Rotations: of the damping, of the lower bidiagonal matrix, and of its triangular factor's transpose.
        alpha_hat = torch.hypot(alpha_bar, delta)
        rho_before, rho = rho, torch.hypot(alpha_hat, beta)
        c, s = _quotient(alpha_hat, rho), _quotient(beta, rho)
        theta, alpha_bar = s * alpha, c * alpha
        rho_bar_before, theta_bar = rho_bar, s_bar * rho
        rho_bar = torch.hypot(c_bar * rho, theta)
        c_bar, s_bar = _quotient(c_bar * rho, rho_bar), _quotient(theta, rho_bar)
        zeta, zeta_bar = c_bar * zeta_bar, -s_bar * zeta_bar
        h_bar = h - _quotient(theta_bar * rho, rho_before * rho_bar_before).unsqueeze(-1) * h_bar
        moved = x + _quotient(zeta, rho * rho_bar).unsqueeze(-1) * h_bar
        x = torch.where(active.unsqueeze(-1) & torch.isfinite(moved), moved, x)
        h = v - _quotient(theta, rho).unsqueeze(-1) * h
        left = torch.where(active, zeta_bar.abs(), left)
        active = active & (left > goal) & (alpha > tiny) & torch.isfinite(left)
    return LeastSquaresRun(x, steps, left <= goal)


def _quotient(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a / torch.where(b == 0, torch.inf, b)


_BASIS_BYTES = 2**28


class _Kept:
    """The former right vectors, to which new ones are made orthogonal; the latest where memory is short."""

    def __init__(self, first: torch.Tensor) -> None:
        self._room = max(2, _BASIS_BYTES // max(1, first.numel() * first.element_size()))
        self._vectors = first.new_zeros(len(first), min(self._room, 8), first.shape[-1])  # (batch, kept, n)
        self._count = 0
        self.add(first)

    def add(self, vector: torch.Tensor) -> None:
        width = self._vectors.shape[1]
        if self._count == width and width < self._room:
            grown = self._vectors.new_zeros(len(vector), min(self._room, 2 * width), vector.shape[-1])
            grown[:, :width] = self._vectors
            self._vectors = grown
        self._vectors[:, self._count % self._vectors.shape[1]] = vector
        self._count += 1

    def orthogonal(self, vector: torch.Tensor) -> torch.Tensor:
        known = self._vectors[:, : self._count]
        weights = known @ vector.unsqueeze(-1)  # (batch, kept, 1)
        return torch.baddbmm(vector.unsqueeze(-1), known.mT, weights, alpha=-1).squeeze(-1)
