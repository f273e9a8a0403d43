"""Newton directions by products alone: conjugate gradients that stop early, or at negative curvature."""

from __future__ import annotations

import torch

from bilevel.operators import LinearOperator

__all__ = ["truncated_cg"]


def truncated_cg(
    operator: LinearOperator,
    gradient: torch.Tensor,
    relative: torch.Tensor,
    max_steps: int,
    active: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimise ½ dᵀHd + gᵀd inexactly: stop when ‖Hd + g‖ ≤ ``relative`` ‖g‖ or dᵀHd ≤ 0.

    One product for each step; four vectors of memory.

    Parameters
    ----------
    operator
        H, (batch, n, n), symmetric.
    gradient
        g (batch, n).
    relative
        (batch,).
    max_steps
        The most products.
    active
        (batch,) bool: the others get zero.

    Returns
    -------
    direction
        (batch, n), a descent direction. If the first curvature is not positive, it is −g scaled by the size of that
        curvature. If a later one is not, it is the direction so far.
    definite
        (batch,) bool: no curvature was negative beyond rounding.

    References
    ----------
    Nocedal & Wright, "Numerical Optimization", 2006, algorithm 7.1; Martens, "Deep learning via Hessian-free
    optimization", ICML 2010.
    """
    norm = gradient.norm(dim=-1, keepdim=True)
    running = active & torch.isfinite(norm.squeeze(-1)) & (norm.squeeze(-1) > 0)
    # In units of ‖g‖, squares of very small and very large gradients neither underflow nor overflow.
    residual = torch.where(running.unsqueeze(-1), -gradient / norm, torch.zeros_like(gradient))
    direction = torch.zeros_like(residual)
    search = residual
    rr = (residual * residual).sum(dim=-1)
    definite = torch.ones_like(running)
    largest = torch.zeros_like(rr)  # the largest ‖Hp‖ / ‖p‖: it estimates ‖H‖ for the rounding of pᵀHp
    rounding = 1e3 * torch.finfo(rr.dtype).eps
    for count in range(max_steps):
        product = operator.matvec(search)
        curvature = (search * product).sum(dim=-1)
        negative = running & ~(curvature > 0)
        if count == 0:
            steepest = torch.where(curvature < 0, -rr / curvature, torch.ones_like(rr))
            direction = torch.where(negative.unsqueeze(-1), steepest.unsqueeze(-1) * search, direction)
        length = (search * search).sum(dim=-1)
        largest = torch.maximum(largest, torch.where(running, product.norm(dim=-1) / length.sqrt(), largest))
        definite = definite & ~(running & (curvature < -rounding * largest * length))
        running = running & ~negative
        alpha = torch.where(running, rr / curvature, torch.zeros_like(rr)).unsqueeze(-1)
        direction = direction + alpha * search
        residual = torch.where(running.unsqueeze(-1), residual - alpha * product, residual)
        fresh = (residual * residual).sum(dim=-1)
        running = running & ~(fresh.sqrt() <= relative)
        if not bool(running.any()):
            break
        beta = torch.where(running, fresh / rr, torch.zeros_like(rr)).unsqueeze(-1)
        search = residual + beta * search
        rr = fresh
    return direction * norm, definite
