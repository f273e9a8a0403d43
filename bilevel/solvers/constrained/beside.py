"""Whether a first-order point of a constrained problem is a minimum, and if not, a lower point beside it."""

from __future__ import annotations

import torch

from bilevel.solvers.constrained.active_set import Measures, Polished
from bilevel.solvers.constrained.critical import critical_directions, lowered
from bilevel.solvers.constrained.implied import Weak
from bilevel.solvers.constrained.program import Program
from bilevel.solvers.constrained.restoration import damped

__all__ = ["lower_points", "lower_points_in_bounds"]

_MOST_PROBLEMS = 64
# Newton steps back to the constraints after a step along their tangents.
_STEPS_BACK, _DAMPING = 3, 1e-10
_ROUNDING = 16.0


def lower_points(
    program: Program, point: Polished, at: Measures, weak: Weak, these: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return feasible points (K, n) lower than ``point``, where there are such points beside it along critical directions (K,).

    Parameters
    ----------
    program, point, at
        Problems, points that meet their first-order conditions, and what was measured there.
    weak
        Which constraints are active with multiplier zero.
    these
        The problems whose directions may fall (K,).
    """
    held = (point.at_lower & ~weak.lower) | (point.at_upper & ~weak.upper) | program.fixed
    strict = point.active & ~weak.inequality
    _, jh, jc = program.split(at.rows)
    eye = torch.eye(program.size, dtype=point.x.dtype, device=point.x.device)
    directions: list[list[torch.Tensor]] = [[] for _ in point.x]
    for k in these.nonzero().reshape(-1).tolist()[:_MOST_PROBLEMS]:
        kept = torch.cat([jh[k], jc[k, strict[k]], eye[held[k]]])
        entered = torch.cat([jc[k, weak.inequality[k]], -eye[weak.lower[k]], eye[weak.upper[k]]])
        directions[k] = critical_directions(at.hessian[k], kept, entered)

    def evaluate(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = torch.where(held, point.x, program.inside(x))
        for _ in range(0 if program.only_bounds else _STEPS_BACK):
            parts, rows = program.jacobian(x)
            left = _broken(program, parts, strict)
            rows = rows[:, 1:] * ((left != 0).unsqueeze(-1) & ~held.unsqueeze(1))
            x = program.inside(
                x + damped(rows, (rows.mT @ left.unsqueeze(-1)).squeeze(-1), torch.full_like(left[:, 0], _DAMPING))
            )
        parts = program.parts(x)
        value, left = parts[:, 0], _broken(program, parts, strict)
        noise = _ROUNDING * torch.finfo(x.dtype).eps * (value.abs() + at.force * at.size)
        multipliers = torch.cat([point.equality, point.inequality], dim=-1)
        return x, value, noise + 2 * (multipliers * left).abs().sum(-1)

    return lowered(evaluate, point.x, directions)


def _broken(program: Program, parts: torch.Tensor, strict: torch.Tensor) -> torch.Tensor:
    """Return h, c of the ``strict`` inequalities and max(c, 0) of the others (K, p + m)."""
    _, h, c = program.split(parts)
    return torch.cat([h, torch.where(strict, c, c.clamp_min(0))], dim=-1)


def lower_points_in_bounds(
    program: Program, x: torch.Tensor, slope: torch.Tensor, weak: Weak, these: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same for many unknowns with bounds alone, along one direction: that into all bounds with multiplier zero."""
    inwards = (weak.lower.to(x) - weak.upper.to(x)) * these.unsqueeze(-1)

    def evaluate(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = program.inside(x)
        value = program.parts(x)[:, 0]
        return x, value, _ROUNDING * torch.finfo(x.dtype).eps * (value.abs() + (slope * x).abs().sum(-1))

    return lowered(evaluate, x, [[row] for row in inwards])
