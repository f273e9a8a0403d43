"""Certificates that a program has no feasible point, or that its objective has no lower bound. Both are themselves solutions of programs.

Infeasible: the violation ½‖Ax − b‖² + ½‖t‖², Gx − t ≤ h, lower ≤ x ≤ upper, has a minimum. Its multipliers ν = Ax − b, λ = t, μ fulfil
Aᵀν + Gᵀλ − μ_l + μ_u = 0 and bᵀν + hᵀλ − lᵀμ_l + uᵀμ_u = −‖Ax − b‖² − ‖t‖²: a Farkas ray, unless the minimum is zero.

Unbounded: the projection d of −q on {Qd = 0, Ad = 0, Gd ≤ 0, the signs that bounds allow} has qᵀd = −‖d‖².
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

from bilevel.quadratic_programs._program import Program
from bilevel.solvers.programs.dense_program import mv, tmv

__all__ = ["infeasibility_rays", "unboundedness_rays"]

_PROOF = 1e-8  # what may be left of an equation that a ray has to fulfil, relative to its terms

Solve: TypeAlias = Callable[[Program], torch.Tensor]
"""Solves programs that have a solution: returns x (B, n)."""


def _finite(bound: torch.Tensor, other: float = 0.0) -> torch.Tensor:
    return torch.where(torch.isfinite(bound), bound, other)


def infeasibility_rays(program: Program, solve: Solve) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rays (B, n + p + m + 2n), zero in x and with a value of −1, and whether each is a proof."""
    n, m = program.sizes.n, program.sizes.m
    B, like = len(program.q), program.q
    rows_of = torch.isfinite(program.h)
    Q = like.new_zeros(B, n + m, n + m)
    # Equations and rows are normalised, so that no one of them outweighs the others by its units.
    length_A = program.A.norm(dim=-1).clamp_min(1e-300) if program.sizes.p else program.b
    length_G = program.G.norm(dim=-1)
    length_G = torch.where(length_G > 0, length_G, 1.0)
    A, b = (program.A / length_A.unsqueeze(-1), program.b / length_A) if program.sizes.p else (program.A, program.b)
    if program.sizes.p:
        zero = ~program.A.ne(0).any(-1)
        A, b = torch.where(zero.unsqueeze(-1), 0.0, A), torch.where(zero, program.b, b)
        length_A = torch.where(zero, 1.0, length_A)
    Q[:, :n, :n] = torch.bmm(A.mT, A)
    Q[:, n:, n:] = torch.eye(m, dtype=like.dtype, device=like.device)
    q = torch.cat([-tmv(A, b), like.new_zeros(B, m)], -1)
    G = torch.where(rows_of.unsqueeze(-1), program.G / length_G.unsqueeze(-1), 0.0)
    t = torch.diag_embed(rows_of.to(like.dtype))
    h = torch.where(rows_of, program.h / length_G, 1.0)
    inf = like.new_full((B, m), float("inf"))
    violation = Program(
        Q, q, like.new_zeros(B, 0, n + m), like.new_zeros(B, 0), torch.cat([G, -t], -1), torch.where(rows_of, h, inf),
        torch.cat([program.lower, -inf], -1), torch.cat([program.upper, inf], -1), torch.float64,
    )  # fmt: skip
    x = solve(violation)[:, :n]
    lam = (mv(G, x) - torch.where(rows_of, h, 0.0)).clamp_min(0)
    nu = (mv(A, x) - b) / length_A
    # μ takes up what is left of the stationarity, as far as the bounds allow.
    lam = torch.where(rows_of, lam, 0.0) / length_G
    held = tmv(program.A, nu) + tmv(program.G, lam)
    low = torch.where(torch.isfinite(program.lower), held.clamp_min(0), 0.0)
    up = torch.where(torch.isfinite(program.upper), (-held).clamp_min(0), 0.0)
    left = (held - low + up).abs().amax(-1)
    terms = tmv(program.A.abs(), nu.abs()) + tmv(program.G.abs(), lam)
    lower, upper, h = _finite(program.lower), _finite(program.upper), _finite(program.h)
    products = [program.b * nu, h * lam, -lower * low, upper * up]
    value = torch.cat(products, -1).sum(-1)
    sizes = torch.cat(products, -1).abs().sum(-1)
    reach = torch.maximum(terms.amax(-1) * x.abs().amax(-1), sizes)
    proven = (value < -_PROOF * reach) & (left <= _PROOF * terms.amax(-1)) & (value < 0)
    ray = torch.cat([torch.zeros_like(x), nu, lam, low, up], -1) / -value.clamp_max(-1e-300).unsqueeze(-1)
    return ray, proven


def unboundedness_rays(program: Program, solve: Solve) -> tuple[torch.Tensor, torch.Tensor]:
    """Return directions (B, n + p + m + 2n), zero but in x and with qᵀd = −1, and whether each is a proof."""
    n, p, m = program.sizes.n, program.sizes.p, program.sizes.m
    B, like = len(program.q), program.q
    size = program.q.norm(dim=-1, keepdim=True)
    q = program.q / size.clamp_min(1e-300)
    rows_of = torch.isfinite(program.h)
    A = torch.cat([program.Q, program.A], -2)
    A = A / A.norm(dim=-1, keepdim=True).clamp_min(1e-300)
    G = torch.where(rows_of.unsqueeze(-1), program.G, 0.0)
    G = G / G.norm(dim=-1, keepdim=True).clamp_min(1e-300)
    eye = torch.eye(n, dtype=like.dtype, device=like.device).expand(B, n, n)
    inf = torch.full_like(program.q, float("inf"))
    h = torch.where(rows_of, 0.0, float("inf")).to(like.dtype)
    below, above = torch.isfinite(program.lower), torch.isfinite(program.upper)
    projection = Program(
        eye, q, A, like.new_zeros(B, n + p), G, h, torch.where(below, 0.0, -inf), torch.where(above, 0.0, inf), torch.float64
    )  # fmt: skip
    direction = solve(projection)
    norm = direction.abs().amax(-1)
    falls = (q * direction).sum(-1)
    left = mv(A, direction).abs().amax(-1)
    outside = torch.cat([mv(G, direction), -direction * below, direction * above], -1).clamp_min(0).amax(-1)
    proven = (falls < -1e-6 * norm) & (torch.maximum(left, outside) <= _PROOF * norm) & (norm > 1e-6)
    ray = direction / (-falls.clamp_max(-1e-300).unsqueeze(-1) * size.clamp_min(1e-300))
    return torch.cat([ray, like.new_zeros(B, p + m + 2 * n)], -1), proven
