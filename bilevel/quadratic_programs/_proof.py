"""Proven bounds of the distance ‖x − x*‖ of a computed point of a strictly convex quadratic program to its solution.

Write all inequalities that are not at infinity as Cx ≤ d, with slacks s = d − Cx and multipliers λ ≥ 0, and let r = Qx + q + Aᵀν + Cᵀλ and
Q ⪰ m I. There are two proofs. Both count the rounding of every number that they use.

*By the active set.* Let J hold the rows of A and the active rows of C, and let σ > 0 bound its singular values from below. x_E minimises the
objective where these rows are equations. With p, the residual of these equations::

    ‖x − x_E‖ ≤ e = ‖p‖/σ + (‖r‖ + ‖Q‖ ‖p‖/σ) / m        ‖(ν, λ) − (ν, λ)_E‖ ≤ (‖r‖ + ‖Q‖ e) / σ

If each active multiplier is larger than its bound allows it to change, and each other slack larger than ‖C_i‖ e, then x_E = x*.

*By the gap.* For a feasible x, (x − x*)ᵀQ(x − x*) ≤ ‖r‖ ‖x − x*‖ + λᵀs, hence::

    ‖x − x*‖ ≤ (‖r‖ + √(‖r‖² + 4 m λᵀs)) / (2 m)

A point that rounding has left outside is first moved inside: by d, which moves the violated rows back, and by the least solution e of
A e = b − A(x + d). It is not computed, as ‖e‖ ≤ ‖b − A(x + d)‖/σ is enough.

An unknown with two equal bounds is a number, and takes no part.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from bilevel._torch.definite import least_eigenvalue
from bilevel._torch.factorisations import pinv
from bilevel.quadratic_programs._program import Program
from bilevel.solvers.programs.dense_program import mv, tmv

__all__ = ["distance_bound"]

# Up to this many numbers in a program's matrices a proof is made.
_MOST_NUMBERS = 2**24


def distance_bound(program: Program, point: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
    """Return proven upper bounds of ‖x − x*‖ (B,); infinite where there is none.

    Parameters
    ----------
    program
        The programs, in float64.
    point
        x, ν, λ, μ_l, μ_u (B, n + p + m + 2n).
    active
        (B, m + 2n) bool. A wrong guess costs the tighter of the two proofs.
    """
    n, p, m = program.sizes.n, program.sizes.p, program.sizes.m
    if len(point) * (p + m + 2 * n) * (p + m + 2 * n) > _MOST_NUMBERS:
        return point.new_full((len(point),), torch.inf)
    proof = _Proof(program, point, active)
    bound = torch.minimum(proof.by_active_set(), proof.by_gap())
    return torch.where(torch.isnan(bound), torch.inf, bound)


@dataclass(frozen=True, eq=False)
class _Proof:
    """The numbers of the proofs; those called ``…_noise`` bound the rounding of the numbers before them."""

    program: Program
    point: torch.Tensor
    active: torch.Tensor

    @cached_property
    def eps(self) -> float:
        """What the rounding of a sum of products is at most, relative to the sum of their sizes."""
        # The unit of rounding is half of torch's eps. The rows of two bounds have one entry each.
        sizes = self.program.sizes
        return 0.55 * (sizes.n + sizes.p + sizes.m + 8) * torch.finfo(self.point.dtype).eps

    @cached_property
    def free(self) -> torch.Tensor:
        """(B, n): one for unknowns whose bounds differ."""
        return (~self.program.fixed).to(self.point)

    @cached_property
    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """C (B, m + 2n, n), zero for inequalities at infinity and those of fixed unknowns, and which rows are left."""
        program = self.program
        fixed = torch.cat([torch.zeros_like(program.h, dtype=torch.bool), program.fixed, program.fixed], -1)
        present = program.present & ~fixed
        eye = torch.eye(program.sizes.n, dtype=self.point.dtype, device=self.point.device).expand_as(program.Q)
        return torch.cat([program.G, -eye, eye], 1) * present.unsqueeze(-1), present

    @cached_property
    def inside(self) -> torch.Tensor:
        """X (B, n)."""
        return self.point[:, : self.program.sizes.n]

    @cached_property
    def multipliers(self) -> torch.Tensor:
        """λ (B, m + 2n), none of them negative."""
        return self.point[:, self.program.sizes.n + self.program.sizes.p :].clamp_min(0.0) * self.rows[1]

    @cached_property
    def lengths(self) -> torch.Tensor:
        """Upper bounds of ‖C_i‖ (B, m + 2n), over the free unknowns."""
        return (self.rows[0] * self.free.unsqueeze(1)).norm(dim=-1) * (1 + self.eps)

    @cached_property
    def curvature(self) -> torch.Tensor:
        """M (B,), for unknowns that are not fixed."""
        keep = self.free
        Q = 0.5 * (self.program.Q + self.program.Q.mT)
        noise = torch.finfo(Q.dtype).eps * Q.norm(dim=(-2, -1))
        # Elsewhere the diagonal is large enough not to matter.
        other = torch.diag_embed((1 - keep) * Q.diagonal(dim1=-2, dim2=-1).abs().amax(-1, keepdim=True).clamp_min(1.0))
        return least_eigenvalue(Q * keep.unsqueeze(1) * keep.unsqueeze(2) + other, noise)

    @cached_property
    def steepness(self) -> torch.Tensor:
        """An upper bound of ‖Q‖ (B,)."""
        return self.program.Q.norm(dim=(-2, -1)) * (1 + self.eps)

    @cached_property
    def stationarity(self) -> torch.Tensor:
        """An upper bound of ‖r‖ (B,), over the free unknowns."""
        program, x, lam = self.program, self.inside, self.multipliers
        nu, C = self.point[:, program.sizes.n : program.sizes.n + program.sizes.p], self.rows[0]
        Q = 0.5 * (program.Q + program.Q.mT)
        r = mv(Q, x) + program.q + tmv(program.A, nu) + tmv(C, lam)
        size = mv(Q.abs(), x.abs()) + program.q.abs() + tmv(program.A.abs(), nu.abs()) + tmv(C.abs(), lam)
        return ((r.abs() + self.eps * size) * self.free).norm(dim=-1) * (1 + self.eps)

    @cached_property
    def slacks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """S (B, m + 2n), infinite for rows that are left out, and its rounding."""
        program, (C, present) = self.program, self.rows
        sides = torch.cat([program.h, -program.lower, program.upper], -1)
        sides = torch.where(present, sides, 0.0)
        noise = self.eps * (sides.abs() + mv(C.abs(), self.inside.abs()))
        return torch.where(present, sides - mv(C, self.inside), torch.inf), noise

    @cached_property
    def equations(self) -> torch.Tensor:
        """Upper bounds (B, p) of the entries of |Ax − b|."""
        program = self.program
        size = mv(program.A.abs(), self.inside.abs()) + program.b.abs()
        return (mv(program.A, self.inside) - program.b).abs() + self.eps * size

    @cached_property
    def settled(self) -> torch.Tensor:
        """(B,) bool: fixed unknowns are exactly at their bounds."""
        return ((self.inside == self.program.lower) | (self.free > 0)).all(-1)

    def _independence(self, J: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
        """Return a lower bound σ (B,) of the singular values of the ``used`` rows of J (B, k, n); zero where they may be dependent."""
        if not J.shape[1]:
            return J.new_full((len(J),), torch.inf)
        J = J * used.unsqueeze(-1) * self.free.unsqueeze(1)
        gram = J @ J.mT
        gram = 0.5 * (gram + gram.mT)
        largest = gram.diagonal(dim1=-2, dim2=-1).amax(-1)
        gram = gram + torch.diag_embed(torch.where(used, 0.0, largest.unsqueeze(-1)))
        noise = self.eps * (J * J).sum((-2, -1))
        return least_eigenvalue(gram, noise).clamp_min(0.0).sqrt() * (1 - self.eps)

    def by_active_set(self) -> torch.Tensor:
        """Return the bounds (B,) of the first proof; infinite or NaN where it fails."""
        C, present = self.rows
        active = self.active & present
        slack, noise = self.slacks
        p = torch.cat([self.equations, torch.where(active, slack.abs() + noise, 0.0)], -1).norm(dim=-1)
        used = torch.cat([torch.ones_like(self.equations, dtype=torch.bool), active], -1)
        sigma, m = self._independence(torch.cat([self.program.A, C], 1), used), self.curvature
        off = torch.where(p == 0, 0.0, p / sigma)
        # Multipliers of other rows are not part of x_E's conditions.
        beside = (self.lengths * torch.where(active, 0.0, self.multipliers)).sum(-1)
        r = self.stationarity + beside
        e = (off + (r + self.steepness * off) / m) * (1 + self.eps)
        change = ((r + self.steepness * e) / sigma * (1 + self.eps)).unsqueeze(-1)
        positive = (~active | (self.multipliers > change)).all(-1)
        feasible = (active | (slack - noise > self.lengths * e.unsqueeze(-1) * (1 + self.eps))).all(-1)
        proven = (m > 0) & (sigma > 0) & positive & feasible & self.settled
        return torch.where(proven, e, torch.inf)

    def by_gap(self) -> torch.Tensor:
        """Return the bounds (B,) of the second proof; infinite or NaN where it fails."""
        slack, noise = self.slacks
        m, (C, present) = self.curvature, self.rows
        step, off = self._way_inside()
        moved = step.norm(dim=-1) + off
        change, beside = mv(C, step), self.eps * mv(C.abs(), step.abs()) + self.lengths * off.unsqueeze(-1)
        feasible = (~present | (slack - noise - change - beside >= 0)).all(-1)
        gap = (self.multipliers * torch.where(present, slack + noise - change + beside, 0.0)).sum(-1).clamp_min(0.0)
        r = self.stationarity + self.steepness * moved
        bound = (moved + (r + (r * r + 4 * m * gap).sqrt()) / (2 * m)) * (1 + self.eps)
        return torch.where((m > 0) & feasible & self.settled, bound, torch.inf)

    def _way_inside(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a step d (B, n), and a bound of the length (B,) of a further one, that together lead to a feasible point."""
        slack, noise = self.slacks
        (C, present), A = self.rows, self.program.A
        zero = torch.zeros_like(self.inside)
        equations = torch.ones_like(self.equations, dtype=torch.bool)
        sigma = self._independence(A, equations)
        short = self.equations.norm(dim=-1)
        off = torch.where(short == 0, 0.0, short / sigma)
        lack = (noise - slack + self.lengths * off.unsqueeze(-1)).clamp_min(0.0)
        outside = present & (lack > 0)
        if not bool(outside.any()):
            return zero, off
        # Rows near their sides must not be left on the way.
        worst = torch.where(outside, lack, 0.0).amax(-1, keepdim=True)
        near = present & (slack <= 1e3 * self.lengths * worst)
        J = torch.cat([A, C * near.unsqueeze(-1)], 1) * self.free.unsqueeze(1)
        want = torch.cat([torch.zeros_like(self.equations), torch.where(near, -2 * lack - 0.1 * worst, 0.0)], -1)
        step = mv(pinv(J, rtol=1e-10), want) * self.free
        left = self.equations + mv(A, step).abs() + self.eps * mv(A.abs(), step.abs())
        left = left.norm(dim=-1)
        return step, torch.where(left == 0, 0.0, left / sigma) * (1 + self.eps)
