"""Weakly active constraints that are no matter of their own: others imply them to first order, or all leave no interior.

A constraint that is active with multiplier zero makes a derivative one-sided, because it may become active or inactive. If its gradient is a
combination of those of strictly active constraints, x cannot leave it unless an argument moves the constraints apart. It is then
counted as active, and the linear solve of a derivative finds out whether an argument does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from bilevel._torch.factorisations import eigh
from bilevel.solvers._active_set import Measures, Polished
from bilevel.solvers._program import Program

__all__ = ["Weak", "count_implied", "leave_no_interior"]

# A share of a gradient below this, outside the span of others, is rounding.
_SPANNED = 1e-8
# The multiplier of an implied inequality: positive, so that it counts as active, and of no other effect, in float32 too.
_TOKEN = 1e-30


@dataclass(frozen=True, eq=False)
class Weak:
    """Which constraints are active, or nearly, with multiplier zero: inequalities (K, m), lower and upper bounds (K, n)."""

    inequality: torch.Tensor
    lower: torch.Tensor
    upper: torch.Tensor

    @property
    def any(self) -> torch.Tensor:
        """Whether a problem has one (K,)."""
        return self.inequality.any(-1) | self.lower.any(-1) | self.upper.any(-1)


def count_implied(program: Program, point: Polished, at: Measures, weak: Weak) -> tuple[Polished, Weak]:
    """Return ``point`` with the implied ones of ``weak`` active, and the others of ``weak``."""
    _, jh, jc = program.split(at.rows)
    held = (point.at_lower & ~weak.lower) | (point.at_upper & ~weak.upper) | program.fixed
    free = (~held).to(point.x)
    strict = point.active & ~weak.inequality
    tangent = _tangent(torch.cat([jh, jc * strict.unsqueeze(-1)], dim=1) * free.unsqueeze(1), free)
    # The parts of gradients that the strict constraints leave free; bounds have unit vectors.
    left = (jc * free.unsqueeze(1)) @ tangent
    inequality = weak.inequality & (left.norm(dim=-1) <= _SPANNED * jc.norm(dim=-1)) & (jc != 0).any(-1)
    still = tangent.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt() <= _SPANNED
    lower, upper = weak.lower & still, weak.upper & still & ~(weak.lower & still)
    x = torch.where(lower, program.lower, torch.where(upper, program.upper, point.x))
    made = replace(
        point,
        x=x,
        inequality=torch.where(inequality, point.inequality.clamp_min(_TOKEN), point.inequality),
        active=point.active | inequality,
        at_lower=point.at_lower | lower,
        at_upper=point.at_upper | upper,
    )
    return made, Weak(weak.inequality & ~inequality, weak.lower & ~lower, weak.upper & ~still)


def _tangent(rows: torch.Tensor, free: torch.Tensor) -> torch.Tensor:
    """Return the projection (K, n, n) onto what ``rows`` (K, r, n) leave of the ``free`` unknowns."""
    norms = rows.norm(dim=-1, keepdim=True)
    unit = rows / torch.where(norms > 0, norms, torch.ones_like(norms))
    values, vectors = eigh(unit.mT @ unit)
    outside = (values <= _SPANNED * values.amax(-1, keepdim=True).clamp_min(1.0)).to(rows)
    return vectors @ (outside.unsqueeze(-1) * vectors.mT) * free.unsqueeze(1) * free.unsqueeze(2)


def leave_no_interior(program: Program, x: torch.Tensor, at: Measures, number: int, near: float) -> torch.Tensor | None:
    """Return the weights of constraints that leave no interior at ``x`` of problem ``number``; None if they leave one.

    Mangasarian and Fromovitz: no direction keeps all equalities and decreases all active inequalities and bounds exactly if
    Jhᵀν + Jcᵀλ − μ_l + μ_u = 0 for some λ, μ ≥ 0 that are not all zero. The weights are (ν, λ, μ_l, μ_u), of length p + m + 2n.
    """
    from scipy.optimize import nnls  # a message may take its time

    here = x[number]
    _, h, c = (part[number] if part.ndim > 1 else part for part in program.split(at.parts))
    _, jh, jc = (part[number] if part.ndim > 2 else part for part in program.split(at.rows))
    gap = near * (1 + here.abs().amax())
    norms = jc.norm(dim=-1).clamp_min(1e-300)
    eye = torch.eye(len(here), dtype=here.dtype, device=here.device)
    rows = torch.cat([_unit(jh), _unit(jc), -eye, eye])
    near_low, near_high = here - program.lower[number] <= gap, program.upper[number] - here <= gap
    active = torch.cat([torch.ones_like(h, dtype=torch.bool), c / norms > -gap, near_low, near_high])
    p = len(h)
    # ν may have either sign. The last row asks for multipliers that are not all zero.
    matrix = torch.cat([rows, -rows[:p]])
    chosen = torch.cat([active, active[:p]])
    ones = torch.ones(len(matrix), 1, dtype=here.dtype, device=here.device)
    ones[:p], ones[len(rows) :] = 0, 0
    stacked = torch.cat([matrix, ones], dim=1)[chosen].T
    right = torch.zeros(len(here) + 1, dtype=torch.float64)
    right[-1] = 1
    if not bool(active[p:].any()):
        return None
    found, residual = nnls(stacked.double().cpu().numpy(), right.numpy())
    if residual > 1e-6:
        return None
    weights = torch.zeros(len(matrix), dtype=torch.float64)
    weights[chosen.cpu()] = torch.from_numpy(found)
    weights[:p] -= weights[len(rows) :]
    return weights[: len(rows)]


def _unit(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-300)
