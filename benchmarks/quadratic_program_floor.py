"""The least code that solves a batch of dense quadratic programs and differentiates it: Mehrotra's method, no checks, no polish.

It is the floor of ``quadratic_programs.py``: min ½ xᵀQx + qᵀx, Gx ≤ h, to residuals of 1e-9, and the KKT derivative at where it ends.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["Floor"]

_TOLERANCE, _MOST_STEPS = 1e-9, 30


class Floor(torch.autograd.Function):
    """x(Q, q, G, h)."""

    @staticmethod
    def forward(ctx: Any, Q: torch.Tensor, q: torch.Tensor, G: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        x, s, z = _solve(Q, q, G, h)
        ctx.save_for_backward(Q, G, x, s, z)
        return x

    @staticmethod
    def backward(ctx: Any, cotangent: torch.Tensor) -> tuple[torch.Tensor, ...]:
        Q, G, x, s, z = ctx.saved_tensors
        weights = z / s
        factor = torch.linalg.cholesky_ex(torch.baddbmm(Q, G.mT, G * weights.unsqueeze(-1)))[0]
        dx = torch.cholesky_solve(-cotangent.unsqueeze(-1), factor).squeeze(-1)
        dz = weights * _times(G, dx)
        dQ = 0.5 * (_outer(dx, x) + _outer(x, dx))
        return dQ, dx, _outer(dz, x) + _outer(z, dx), -dz


def _times(matrix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.bmm(x.unsqueeze(1), matrix.mT).squeeze(1)


def _pulled(matrix: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return torch.bmm(z.unsqueeze(1), matrix).squeeze(1)


def _outer(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return y.unsqueeze(-1) * x.unsqueeze(-2)


def _positive(v: torch.Tensor) -> torch.Tensor:
    least = v.amin(-1, keepdim=True)
    return torch.where(least > 0, v, v - least + 1)


def _solve(Q: torch.Tensor, q: torch.Tensor, G: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, ...]:
    factor = torch.linalg.cholesky_ex(torch.baddbmm(Q, G.mT, G))[0]
    x = torch.cholesky_solve((_pulled(G, h) - q).unsqueeze(-1), factor).squeeze(-1)
    s = h - _times(G, x)
    s, z = _positive(s), _positive(-s)

    def newton(excess: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        shift = weights * primal - excess / s
        dx = torch.cholesky_solve(-(dual + _pulled(G, shift)).unsqueeze(-1), factor).squeeze(-1)
        dz = weights * _times(G, dx) + shift
        return dx, -(excess + s * dz) / z, dz

    def longest(ds: torch.Tensor, dz: torch.Tensor, share: float) -> torch.Tensor:
        return 1 / (torch.maximum((-ds / s).amax(-1, True), (-dz / z).amax(-1, True)) / share).clamp_min(1.0)

    for _ in range(_MOST_STEPS):
        dual, primal = _times(Q, x) + q + _pulled(G, z), _times(G, x) + s - h
        products = s * z
        mean = products.mean(-1, True)
        live = torch.maximum(torch.maximum(dual.abs().amax(-1, True), primal.abs().amax(-1, True)), mean) > _TOLERANCE
        if not bool(live.any()):
            break
        weights = z / s
        factor = torch.linalg.cholesky_ex(torch.baddbmm(Q, G.mT, G * weights.unsqueeze(-1)))[0]
        _, ds, dz = newton(products)
        length = longest(ds, dz, 1.0)
        after = ((s + length * ds) * (z + length * dz)).mean(-1, True)
        dx, ds, dz = newton(products + ds * dz - (after / mean) ** 3 * mean)
        length = torch.where(live, longest(ds, dz, 0.99), 0.0)
        x, s, z = x + length * dx, s + length * ds, z + length * dz
    return x, s, z
