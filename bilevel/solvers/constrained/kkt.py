"""The Newton direction of the barrier problem, with the inertia of a minimum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bilevel._torch.factorisations import eigh, eigvalsh, solve
from bilevel.solvers.constrained.program import Program, pulled_back
from bilevel.solvers.parts.shifted import grown, try_cholesky

__all__ = ["Direction", "newton_direction", "solve_symmetric"]

_MOST_SHIFTS = 30
# The weight of JᵀJ in the augmented Hessian, relative to the sizes of both, and δ_c.
_AUGMENT, _DUAL_SHIFT = 1e2, 1e-10
# Eigenvalues below this share of the largest count as zero.
_SINGULAR = 1e-12


@dataclass(frozen=True, eq=False)
class Direction:
    """A step of every problem, all with a leading batch axis.

    ``slope`` is the derivative of the barrier objective along the direction. ``curvature`` is the quadratic form of the
    barrier problem's Hessian. ``shift`` is δ. ``again`` returns the direction for other values of (h, c + s).
    """

    x: torch.Tensor
    slack: torch.Tensor
    equality: torch.Tensor
    inequality: torch.Tensor
    lower: torch.Tensor
    upper: torch.Tensor
    slope: torch.Tensor
    curvature: torch.Tensor
    shift: torch.Tensor
    again: Callable[[torch.Tensor, torch.Tensor], Direction]


def newton_direction(
    program: Program,
    parts: torch.Tensor,
    rows: torch.Tensor,
    hessian: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    slack: torch.Tensor,
    equality: torch.Tensor,
    inequality: torch.Tensor,
    lower: torch.Tensor,
    upper: torch.Tensor,
    barrier: torch.Tensor,
    shift: torch.Tensor,
) -> Direction:
    """Return the primal–dual Newton direction. Slacks and the multipliers of inequalities and bounds are eliminated."""
    gradient, jh, jc = program.split(rows)
    _, h, c = program.split(parts)
    fixed = program.lower >= program.upper
    free = (~fixed).to(gradient)
    jh, jc = jh * free.unsqueeze(1), jc * free.unsqueeze(1)
    mu = barrier.unsqueeze(-1)
    sigma_s = inequality / slack
    sigma_x = lower / low + upper / high
    hessian = 0.5 * (hessian + hessian.mT) * free.unsqueeze(1) * free.unsqueeze(2)
    matrix = hessian + jc.mT @ (sigma_s.unsqueeze(-1) * jc) + torch.diag_embed(sigma_x * free + (1 - free))
    there_low, there_high = torch.isfinite(low) & ~fixed, torch.isfinite(high) & ~fixed
    zero = torch.zeros_like(low)
    push = torch.where(there_low, mu / low, zero) - torch.where(there_high, mu / high, zero)
    system = _System(matrix.nan_to_num(0.0, 0.0, 0.0), jh.nan_to_num(0.0, 0.0, 0.0), shift)

    def direction(h_now: torch.Tensor, c_now: torch.Tensor) -> Direction:
        # c_now stands for c + s.
        dual = gradient + pulled_back(jh, equality) - push + pulled_back(jc, mu / slack + sigma_s * c_now)
        dx, dy = system.solve(-dual * free, -h_now)
        dx = dx * free
        pushed = (jc @ dx.unsqueeze(-1)).squeeze(-1)
        ds = -c_now - pushed
        dl = mu / slack - inequality + sigma_s * (c_now + pushed)
        d_lower = torch.where(there_low, mu / low - lower - lower / low * dx, zero)
        d_upper = torch.where(there_high, mu / high - upper + upper / high * dx, zero)
        slope = ((gradient - push) * dx).sum(-1) - (mu * ds / slack).sum(-1)
        quadratic = (dx * ((hessian @ dx.unsqueeze(-1)).squeeze(-1) + (sigma_x + system.shift.unsqueeze(-1)) * dx)).sum(
            -1
        )
        quadratic = quadratic + (sigma_s * ds**2).sum(-1)
        return Direction(dx, ds, dy, dl, d_lower, d_upper, slope, quadratic, system.shift, direction)

    return direction(h, c + slack)


class _System:
    """[[M + δI, Jᵀ], [J, −δ_c]] with the smallest tried δ ≥ 0 for which M + δI is positive definite on the null space of J.

    M + δI + ρJᵀJ, which has the same solutions, is factorised by Cholesky. For large ρ it is positive definite exactly
    if the inertia is right.
    """

    def __init__(self, matrix: torch.Tensor, rows: torch.Tensor, last: torch.Tensor) -> None:
        self.rows, self.p = rows, rows.shape[1]
        n = matrix.shape[-1]
        eye = torch.eye(n, dtype=matrix.dtype, device=matrix.device)
        size = matrix.diagonal(dim1=-2, dim2=-1).abs().amax(-1).clamp_min(1e-8)
        gram = rows.mT @ rows
        weight = size / gram.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(1e-12) if self.p else torch.zeros_like(size)
        self.shift = torch.zeros_like(last)
        # Nearly active bounds make entries of Σ huge. Curvature is measured relative to the other entries.
        weight = _AUGMENT * weight.clamp_max(1e8)
        factor, failed = _factor(matrix, gram, weight, self.shift, eye)
        for count in range(_MOST_SHIFTS):
            if not bool(failed.any()):
                break
            if count == 0 and self.p:
                right = _inertia_is_right(matrix, rows, failed)
                heavier = torch.where(failed & right, 1e4 * weight, weight)
                weight = torch.where(failed, heavier, weight)
            keeps = failed & (right if count == 0 and self.p else torch.zeros_like(failed))
            self.shift = torch.where(failed & ~keeps, grown(self.shift, last), self.shift)
            again, still = _factor(matrix, gram, weight, self.shift, eye)
            factor = torch.where(failed[:, None, None], again, factor)
            failed = failed & still
        self.weight, self.factor = weight, torch.where(failed[:, None, None], eye, factor)
        if self.p:
            self.inverse_rows = torch.cholesky_solve(rows.mT, self.factor)  # (K, n, p)
            schur = rows @ self.inverse_rows
            least = _DUAL_SHIFT * schur.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(1e-30)
            unit = torch.eye(self.p, dtype=matrix.dtype, device=matrix.device)
            self.schur, bad = torch.linalg.cholesky_ex(schur + least[:, None, None] * unit)
            if bool((bad != 0).any()):
                stronger, _ = torch.linalg.cholesky_ex(schur + 1e6 * least[:, None, None] * unit)
                self.schur = torch.where((bad != 0)[:, None, None], stronger, self.schur)

    def solve(self, dual: torch.Tensor, primal: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (dx, dν) for the right-hand sides ``dual`` (K, n) and ``primal`` (K, p)."""
        right = dual
        if self.p:
            right = dual + self.weight.unsqueeze(-1) * pulled_back(self.rows, primal)
        solved = torch.cholesky_solve(right.unsqueeze(-1), self.factor)
        if not self.p:
            return solved.squeeze(-1), primal
        lagrange = torch.cholesky_solve(self.rows @ solved - primal.unsqueeze(-1), self.schur)
        return (solved - self.inverse_rows @ lagrange).squeeze(-1), lagrange.squeeze(-1)


def _factor(
    matrix: torch.Tensor, gram: torch.Tensor, weight: torch.Tensor, shift: torch.Tensor, eye: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return try_cholesky(matrix + weight[:, None, None] * gram + shift[:, None, None] * eye)


def _inertia_is_right(matrix: torch.Tensor, rows: torch.Tensor, these: torch.Tensor) -> torch.Tensor:
    """Return for which of ``these`` problems [[M, Jᵀ], [J, 0]] has n positive and p negative eigenvalues."""
    p = rows.shape[1]
    zero = torch.zeros(len(rows), p, p, dtype=rows.dtype, device=rows.device)
    whole = torch.cat([torch.cat([matrix, rows.mT], dim=-1), torch.cat([rows, zero], dim=-1)], dim=1)
    found = torch.zeros_like(these)
    values = eigvalsh(whole[these])
    found[these] = ((values < 0).sum(-1) == p) & (values.abs().amin(-1) > 1e-12 * values.abs().amax(-1))
    return found


def solve_symmetric(matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return x (K, N) with ``matrix`` x = ``right``, for symmetric matrices (K, N, N); of minimum norm where one is singular."""
    scale = matrix.abs().amax(-1).clamp_min(1e-300).rsqrt()
    scaled = scale.unsqueeze(-1) * matrix * scale.unsqueeze(-2)
    rhs = scale * right
    made = solve(scaled, rhs.unsqueeze(-1)).squeeze(-1)
    off = ((scaled @ made.unsqueeze(-1)).squeeze(-1) - rhs).abs().amax(-1)
    unsound = ~(made.abs().amax(-1) <= 1e9 * rhs.abs().amax(-1)) | ~(off <= 1e-6 * rhs.abs().amax(-1))
    if bool(unsound.any()):
        values, vectors = eigh(scaled)
        kept = values.abs() > _SINGULAR * values.abs().amax(-1, keepdim=True)
        inverse = torch.where(kept, 1 / values, torch.zeros_like(values))
        least = (vectors @ (inverse * (vectors.mT @ rhs.unsqueeze(-1)).squeeze(-1)).unsqueeze(-1)).squeeze(-1)
        made = torch.where(unsound.unsqueeze(-1), least, made)
    return scale * made
