"""Weakly active constraints that are no matter of their own: others imply them to first order, or all leave no interior.

A constraint that is active with multiplier zero makes a derivative one-sided, because it may become active or inactive. If its gradient is a
combination of those of strictly active constraints, x cannot leave it unless an argument moves the constraints apart. It is then
counted as active, and the linear solve of a derivative finds out whether an argument does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from bilevel._torch.factorisations import eigh
from bilevel.solvers.constrained.active_set import Measures, Polished
from bilevel.solvers.constrained.program import Program

__all__ = ["Weak", "count_implied", "leave_no_interior", "with_strict_multipliers"]

# A share of a gradient below this, outside the span of others, is rounding.
_SPANNED = 1e-8
# The multiplier of an implied inequality: positive, so that it counts as active, and of no other effect, in float32 too.
_TOKEN = 1e-30
# Unit gradients cancel if this much is left of them: to say so, and to add their weights to multipliers.
_BALANCED, _EXACTLY = 1e-6, 1e-12
_MOST_PROBLEMS, _MOST_WEIGHTS = 64, 16


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

    def among(self, these: torch.Tensor) -> Weak:
        """Return the same of the problems ``these`` (K,), and none of the others."""
        rows = these.unsqueeze(-1)
        return Weak(self.inequality & rows, self.lower & rows, self.upper & rows)

    def joined(self, other: Weak) -> Weak:
        """Return the constraints that are in one of two."""
        return Weak(self.inequality | other.inequality, self.lower | other.lower, self.upper | other.upper)


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


def with_strict_multipliers(
    program: Program, point: Polished, at: Measures, weak: Weak, near: float
) -> tuple[Polished, Weak]:
    """Return ``point`` with positive multipliers for those of ``weak`` that have them, and the others of ``weak``.

    Where constraints leave no interior, as c <= 0 and -c <= 0, multipliers are not unique: any multiple of the weights of
    :func:`leave_no_interior` may be added. They make the constraints strictly active.
    """
    p, m, n = program.equalities, program.inequalities, program.size
    equality, inequality = point.equality.clone(), point.inequality.clone()
    slope, lower, upper = point.slope.clone(), point.at_lower.clone(), point.at_upper.clone()
    left = Weak(weak.inequality.clone(), weak.lower.clone(), weak.upper.clone())
    for number in weak.any.nonzero().reshape(-1).tolist()[:_MOST_PROBLEMS]:
        for _ in range(_MOST_WEIGHTS):
            flags = torch.cat([left.inequality[number], left.lower[number], left.upper[number]])
            weights = leave_no_interior(program, point.x, at, number, near, flags) if bool(flags.any()) else None
            if weights is None:
                break
            added = at.force[number] * weights.to(slope)
            of_equality, of_inequality, low, high = torch.split(added, [p, m, n, n])
            norms = at.rows[number, 1:].norm(dim=-1).clamp_min(1e-300)
            equality[number] += of_equality / norms[:p]
            inequality[number] += of_inequality / norms[p:]
            slope[number] += low - high
            lower[number] |= low > 0
            upper[number] |= (high > 0) & ~(low > 0)
            for part, of in ((left.inequality, of_inequality), (left.lower, low), (left.upper, high)):
                part[number] &= ~(of > 0)
    x = torch.where(lower, program.lower, torch.where(upper, program.upper, point.x))
    made = replace(
        point, x=x, equality=equality, inequality=inequality, slope=slope, at_lower=lower, at_upper=upper,
        active=point.active | (inequality > point.inequality),
    )  # fmt: skip
    return made, left


def leave_no_interior(
    program: Program, x: torch.Tensor, at: Measures, number: int, near: float, among: torch.Tensor | None = None
) -> torch.Tensor | None:
    """Return the weights of constraints that leave no interior at ``x`` of problem ``number``; None if they leave one.

    Mangasarian and Fromovitz: no direction keeps all equalities and decreases all active inequalities and bounds exactly if
    Jhᵀν + Jcᵀλ − μ_l + μ_u = 0 for some λ, μ ≥ 0 that are not all zero, for gradients of unit length. The weights are (ν, λ, μ_l, μ_u), of
    length p + m + 2n. They sum to one over λ and μ, or over those ``among`` them (m + 2n,), bool.
    """
    from scipy.optimize import nnls  # what is degenerate may take its time

    here, p = x[number], program.equalities
    _, h, c = program.split(at.parts[number : number + 1])
    _, jh, jc = program.split(at.rows[number : number + 1])
    gap = near * (1 + here.abs().amax())
    eye = torch.eye(len(here), dtype=here.dtype, device=here.device)
    rows = torch.cat([_unit(jh[0]), _unit(jc[0]), -eye, eye])
    distances = torch.cat([-c[0] / jc[0].norm(dim=-1), here - program.lower[number], program.upper[number] - here])
    active = torch.cat([torch.ones_like(h[0], dtype=torch.bool), distances <= gap])
    counted = active[p:] if among is None else active[p:] & among
    if not bool(counted.any()):
        return None
    # ν may have either sign. The last row asks for multipliers that are not all zero.
    asked = torch.cat([torch.zeros_like(h[0]), counted.to(here)])
    stacked = torch.cat([rows, asked.unsqueeze(-1)], dim=-1)
    stacked = torch.cat([stacked, -stacked[:p]])[torch.cat([active, active[:p]])].T
    right = torch.zeros(len(here) + 1, dtype=torch.float64)
    right[-1] = 1
    found, residual = nnls(stacked.double().cpu().numpy(), right.numpy())
    if not residual <= (_BALANCED if among is None else _EXACTLY):
        return None
    weights = torch.zeros(len(rows) + p, dtype=torch.float64)
    weights[torch.cat([active, active[:p]]).cpu()] = torch.from_numpy(found)
    weights[:p] -= weights[len(rows) :]
    return weights[: len(rows)].to(x.device)


def _unit(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-300)
