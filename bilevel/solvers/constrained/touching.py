"""Feasible sets that are a single point, because constraints touch there: two balls with one common point, or a disk and its tangent.

No constraint qualification holds, and there may be no multipliers. So the point is found without the objective: it minimises the largest violation,

    min s   subject to   h(x) = 0,   c(x) ≤ s,   lower ≤ x ≤ upper,

which has an interior and multipliers. If the least s is zero, and belongs to a single x, then this x is the only feasible point.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from bilevel.solvers.constrained.active_set import measure, polish
from bilevel.solvers.constrained.program import Program
from bilevel.solvers.constrained.regularity import examine
from bilevel.solvers.interior_point import InteriorPoint

__all__ = ["only_point"]

# The least violation that counts as zero, in units of x.
_TOUCHING = 1e-10


def only_point(program: Program, x: torch.Tensor, these: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the only feasible points (K, n), searched from ``x`` (K, n), and where there is such a point among ``these`` (K,)."""
    parts = program.parts(x)
    highest = program.split(parts)[2].amax(-1, keepdim=True)
    search = _least_violation(program)
    answer = InteriorPoint().solve_program(search, torch.cat([x, highest + 1], dim=-1), None)
    point = polish(search, answer)
    at = measure(search, point.x, point.equality, point.inequality)
    findings, point = examine(search, point, at)
    unique = point.good & ~(findings.weak.any | findings.flat | findings.negative | findings.dependent)
    found, left = point.x[:, :-1], point.x[:, -1].abs()
    norms = program.split(at.rows[..., :-1])[2].norm(dim=-1)
    unit = torch.where(point.active, norms, torch.inf).amin(-1).clamp(max=1.0)
    return found, these & unique & (left <= _TOUCHING * at.size * unit)


def _least_violation(program: Program) -> Program:
    """Return the problem of the least s in the unknowns (x, s)."""
    p = program.equalities

    def of(parts: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return torch.cat([s.unsqueeze(-1), parts[:, 1 : 1 + p], parts[:, 1 + p :] - s.unsqueeze(-1)], dim=-1)

    def jacobian(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        parts, rows = program.jacobian(z[:, :-1])
        rows = torch.cat([torch.zeros_like(rows[:, :1]), rows[:, 1:]], dim=1)
        last = torch.zeros_like(rows[..., :1])
        last[:, 0], last[:, 1 + p :] = 1, -1
        return of(parts, z[:, -1]), torch.cat([rows, last], dim=-1)

    def hessian(z: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        inner = torch.cat([torch.zeros_like(weights[:, :1]), weights[:, 1:]], dim=-1)
        return torch.nn.functional.pad(program.hessian(z[:, :-1], inner), (0, 1, 0, 1))

    free = torch.full_like(program.lower[:, :1], torch.inf)
    return replace(
        program,
        lower=torch.cat([program.lower, -free], dim=-1),
        upper=torch.cat([program.upper, free], dim=-1),
        parts=lambda z: of(program.parts(z[:, :-1]), z[:, -1]),
        jacobian=jacobian,
        hessian=hessian,
        product=lambda z, v: torch.zeros_like(v),
        single=None,
    )
