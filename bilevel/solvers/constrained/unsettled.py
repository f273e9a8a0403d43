"""Points where a search ended and Newton's polish found no solution: are they solutions all the same, and if not, why.

The tolerances of a search refer to a scale that it chose at its start. A start far away, a kink, or an objective that falls ever more slowly
can make it end elsewhere than at a solution.
"""

from __future__ import annotations

import torch

from bilevel.solvers.constrained.active_set import measure
from bilevel.solvers.constrained.program import Answer, Program, pulled_back

__all__ = ["is_settled", "kinked_part"]

# A point is a solution if what is left of the slope, in shares of the forces, and of the constraints, in shares of x, is below these.
_BALANCED, _MET = 1e-5, 1e-6
# A kink is looked for up to this share of the size of x away, down to rounding. Its gradient jumps by a share of its size.
_AROUND, _HALVINGS, _JUMP = 1e-2, 45, 1e-3
_MOST_PARTS = 3


def is_settled(program: Program, answer: Answer) -> torch.Tensor:
    """Return where the answer meets the KKT conditions, with the forces and the size of x there as units (K,)."""
    x = program.inside(answer.x)
    at = measure(program, x, answer.equality, answer.inequality)
    gradient, jh, jc = program.split(at.rows)
    c = program.split(at.parts)[2]
    slope = gradient + pulled_back(jh, answer.equality) + pulled_back(jc, answer.inequality)
    size, force = at.size.unsqueeze(-1), at.force.unsqueeze(-1)
    low, high = x - program.lower <= _BALANCED * size, program.upper - x <= _BALANCED * size
    left = torch.where((low & (slope > 0)) | (high & (slope < 0)) | program.fixed, 0.0, slope.abs())
    # A multiplier of a constraint that is not active balances nothing.
    idle = (answer.inequality * at.norms / force) * (-c / (at.norms * size)).clamp_min(0)
    balanced = (left <= _BALANCED * force).all(-1) & (idle <= _BALANCED).all(-1)
    norms = torch.cat([jh.norm(dim=-1), at.norms], dim=-1).clamp_min(1e-300)
    _, h, c = program.split(at.parts)
    met = torch.cat([h.abs(), c.clamp_min(0)], dim=-1) <= _MET * size * torch.maximum(norms, torch.ones_like(norms))
    return balanced & met.all(-1)


def kinked_part(program: Program, x: torch.Tensor, these: torch.Tensor) -> torch.Tensor:
    """Return which part of (f, h, c) has a gradient that jumps beside ``x``, int64 (K,); −1 where none has, or not among ``these``."""
    found = torch.full((len(x),), -1, dtype=torch.int64, device=x.device)
    if not bool(these.any()):
        return found
    places = torch.arange(x.shape[-1], dtype=x.dtype, device=x.device)
    step = _AROUND * (1 + x.abs().amax(-1, keepdim=True)) * torch.cos(1 + places * places)
    first, last = program.jacobian(x - step)[1], program.jacobian(x + step)[1]
    scale = (first.norm(dim=-1) + last.norm(dim=-1)).clamp_min(1e-300)
    change = ((last - first).norm(dim=-1) / scale).nan_to_num(0.0, 0.0, 0.0)
    for part in change.topk(min(_MOST_PARTS, change.shape[-1])).indices.unbind(-1):
        jump = _jump(program, x, step, part)
        fresh = these & (found < 0) & (jump > _JUMP)
        found = torch.where(fresh, part, found)
    return found


def _jump(program: Program, x: torch.Tensor, step: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Return the relative change (K,) of a part's gradient that remains when the way from x − step to x + step is halved again and again."""
    numbers = torch.arange(len(x), device=x.device)

    def gradient(at: torch.Tensor) -> torch.Tensor:
        return program.jacobian(x + at.unsqueeze(-1) * step)[1][numbers, part]

    low, high = -torch.ones_like(x[:, 0]), torch.ones_like(x[:, 0])
    below, above = gradient(low), gradient(high)
    scale = below.norm(dim=-1) + above.norm(dim=-1)
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        there = gradient(middle)
        upper = ((above - there).norm(dim=-1) >= (there - below).norm(dim=-1)).unsqueeze(-1)
        below, above = torch.where(upper, there, below), torch.where(upper, above, there)
        low, high = torch.where(upper[:, 0], middle, low), torch.where(upper[:, 0], high, middle)
    return ((above - below).norm(dim=-1) / scale.clamp_min(1e-300)).nan_to_num(0.0, 0.0, 0.0)
