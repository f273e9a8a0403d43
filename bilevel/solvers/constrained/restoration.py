"""Feasibility restoration: minimise ½‖h‖² + ½‖max(c, 0)‖² within the bounds, by projected Levenberg–Marquardt steps."""

from __future__ import annotations

from dataclasses import replace

import torch

from bilevel.reports import Status
from bilevel.solvers._base import is_one_of
from bilevel.solvers.constrained.program import Answer, Program

__all__ = ["damped", "restore", "with_feasibility"]

_MAX_STEPS = 200
_FEASIBLE = 1e-9
_FIRST_DAMPING, _LEAST_DAMPING, _MOST_DAMPING = 1e-3, 1e-12, 1e12
_STATIONARY = 1e-7


def restore(
    program: Program, x: torch.Tensor, these: torch.Tensor, reduction: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return x (K, n) with a smaller violation, where it is small enough (K,), and where it cannot be reduced (K,).

    Parameters
    ----------
    program
        The constraints.
    x
        Where to begin (K, n).
    these
        Which problems (K,).
    reduction
        The share of the first violation that is small enough.
    """
    x = program.inside(x)
    residual, rows = _residual(program, x)
    first = residual.norm(dim=-1)
    # In float32 a feasible point may be violated by the rounding of its constraints.
    least = max(_FEASIBLE, 32 * torch.finfo(first.dtype).eps)
    enough = torch.maximum(reduction * first, torch.full_like(first, least))
    damping = torch.full_like(first, _FIRST_DAMPING)
    stationary = torch.zeros_like(these)
    for _ in range(_MAX_STEPS):
        norm = residual.norm(dim=-1)
        open_ = these & (norm > enough) & ~stationary
        if not bool(open_.any()):
            break
        slope = (rows.mT @ residual.unsqueeze(-1)).squeeze(-1)
        held = ((x <= program.lower) & (slope > 0)) | ((x >= program.upper) & (slope < 0)) | program.fixed
        free = (~held).to(x)
        slope = slope * free
        size = rows.norm(dim=(-2, -1)).clamp_min(1e-30)
        stationary = stationary | (open_ & (slope.norm(dim=-1) <= _STATIONARY * size * norm))
        step = damped(rows * free.unsqueeze(1), slope, damping)
        moved = program.inside(x + step * free)
        after, fresh = _residual(program, moved)
        better = open_ & (after.norm(dim=-1) < norm * (1 - 1e-10))
        barely = open_ & ~better & (damping >= _MOST_DAMPING)
        stationary = stationary | barely
        damping = torch.where(better, damping / 10, damping * 10).clamp(_LEAST_DAMPING, 10 * _MOST_DAMPING)
        mask = better.unsqueeze(-1)
        x, residual = torch.where(mask, moved, x), torch.where(mask, after, residual)
        rows = torch.where(mask.unsqueeze(-1), fresh, rows)
    norm = residual.norm(dim=-1)
    feasible = these & (norm <= enough)
    return x, feasible, these & stationary & ~feasible


def with_feasibility(program: Program, answer: Answer, start: torch.Tensor) -> Answer:
    """Return the answer with infeasible problems told from unsolved ones, and the ray of infeasibility as their multipliers.

    ``start`` (K, n) is where the search for a feasible point of unsolved problems begins.
    """
    short = is_one_of(answer.status, (Status.STAGNATED, Status.MAX_STEPS, Status.NOT_CONVERGED))
    infeasible = answer.status == Status.INFEASIBLE
    if not bool((short | infeasible).any()):
        return answer
    here, _, stationary = restore(program, start, short, 0.0)
    found = short & stationary
    infeasible = infeasible | found
    x = torch.where(found.unsqueeze(-1), here, answer.x)
    _, h, c = program.split(program.parts(x))
    ray = torch.cat([h, c.clamp_min(0)], dim=-1)
    ray = ray / ray.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(ray.dtype).tiny)
    mask, p = infeasible.unsqueeze(-1), h.shape[-1]
    return replace(
        answer,
        x=x,
        status=torch.where(infeasible, int(Status.INFEASIBLE), answer.status),
        equality=torch.where(mask, ray[:, :p], answer.equality),
        inequality=torch.where(mask, ray[:, p:], answer.inequality),
    )


def _residual(program: Program, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (h, max(c, 0)) (K, p + m) and its Jacobian."""
    parts, rows = program.jacobian(x)
    _, h, c = program.split(parts)
    _, jh, jc = program.split(rows)
    violated = (c > 0).unsqueeze(-1)
    residual = torch.cat([h, c.clamp_min(0)], dim=-1)
    return residual.nan_to_num(1e150, 1e150, -1e150), torch.cat([jh, jc * violated], dim=1).nan_to_num(0.0, 0.0, 0.0)


def damped(rows: torch.Tensor, slope: torch.Tensor, damping: torch.Tensor) -> torch.Tensor:
    """Return −(JᵀJ + damping · D)⁻¹ slope (K, n), D the largest diagonal entry of JᵀJ."""
    gram = rows.mT @ rows
    size = gram.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(1e-30)
    eye = torch.eye(rows.shape[-1], dtype=rows.dtype, device=rows.device)
    factor, _ = torch.linalg.cholesky_ex(gram + (damping.clamp_min(1e-14) * size)[:, None, None] * eye)
    return -torch.cholesky_solve(slope.unsqueeze(-1), factor).squeeze(-1).nan_to_num(0.0, 0.0, 0.0)
