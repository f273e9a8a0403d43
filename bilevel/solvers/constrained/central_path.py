"""Newton's method on the central path: λ_i c_i = −τ, and likewise for the bounds, to the accuracy of the arithmetic."""

from __future__ import annotations

import torch

from bilevel.solvers.constrained.active_set import measure
from bilevel.solvers.constrained.kkt import solve_symmetric
from bilevel.solvers.constrained.program import Answer, Program, pulled_back

__all__ = ["centred"]

_MOST_STEPS = 30


def centred(program: Program, answer: Answer, smoothing: float) -> tuple[Answer, torch.Tensor, torch.Tensor]:
    """Return the answer moved onto the central path of parameter τ, its last step in x (K, n), and where that is small (K,)."""
    x, equality = answer.x, answer.equality
    inequality = answer.inequality.clamp_min(torch.finfo(x.dtype).tiny ** 0.5)
    n, p = x.shape[-1], equality.shape[-1]
    free = (~program.fixed).to(x)
    step = torch.full_like(x, torch.inf)
    for _ in range(_MOST_STEPS):
        at = measure(program, x, equality, inequality)
        gradient, jh, jc = program.split(at.rows)
        _, h, c = program.split(at.parts)
        low, high = 1 / (x - program.lower), 1 / (program.upper - x)
        low, high = low * free.where(torch.isfinite(low), 0 * x), high * free.where(torch.isfinite(high), 0 * x)
        low, high = low.nan_to_num(0.0, 0.0, 0.0), high.nan_to_num(0.0, 0.0, 0.0)
        slope = gradient + pulled_back(jh, equality) + pulled_back(jc, inequality) - smoothing * (low - high)
        hessian = at.hessian + torch.diag_embed(smoothing * (low**2 + high**2))
        hessian = hessian * free.unsqueeze(1) * free.unsqueeze(2) + torch.diag_embed(1 - free)
        rows = torch.cat([jh, jc], dim=1) * free.unsqueeze(1)
        corner = torch.diag_embed(torch.cat([torch.zeros_like(h), -smoothing / inequality**2], dim=-1))
        matrix = torch.cat([torch.cat([hessian, rows.mT], dim=-1), torch.cat([rows, corner], dim=-1)], dim=1)
        right = -torch.cat([slope * free, h, c + smoothing / inequality], dim=-1)
        found = solve_symmetric(matrix, right)
        step, push = found[:, :n], found[:, n + p :]
        # Stay in the interior: multipliers and slacks keep at least a tenth of their values.
        falling = torch.cat([-push / inequality, -step * low, step * high, torch.zeros_like(step[:, :1])], dim=-1)
        length = (0.9 / falling.amax(-1).clamp_min(0.9)).unsqueeze(-1)
        x, equality = x + length * step, equality + length * found[:, n : n + p]
        inequality = inequality + length * push
        if bool((step.abs().amax(-1) <= 1e-14 * at.size).all()):
            break
    small = step.abs().amax(-1) <= 1e-8 * (1 + x.abs().amax(-1))
    return Answer(x, equality, inequality, answer.status, answer.iterations), step, small
