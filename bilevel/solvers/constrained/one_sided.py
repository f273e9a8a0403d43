"""Whether a derivative of a loss exists where that of the solution is one-sided.

A constraint that is active with multiplier zero may become active or inactive. Each choice has an adjoint d, K d = v, with its own KKT matrix K.
If one d solves the systems of all choices, the loss has one derivative: its slope along every piece of the solution is the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel.solvers.constrained.found import Found
from bilevel.solvers.constrained.implied import Weak
from bilevel.solvers.constrained.program import Program

__all__ = ["Sides"]

_SAME = 1e-8


@dataclass(frozen=True, eq=False)
class Sides:
    """The constraints with multiplier zero at solutions, and the KKT matrices there.

    Parameters
    ----------
    weak
        Which constraints are active with multiplier zero, of problems in which each choice has a solution nearby. Others have none here.
    held
        Which unknowns the derivative keeps on a bound (K, n).
    rows, hessian
        The gradients of the equalities and inequalities (K, p + m, n), and ∇² of the Lagrangian (K, n, n).
    counted
        Which equalities and inequalities the derivative counts as active (K, p + m).
    """

    weak: Weak
    held: torch.Tensor
    rows: torch.Tensor
    hessian: torch.Tensor
    counted: torch.Tensor

    @staticmethod
    def at(program: Program, found: Found, held: torch.Tensor) -> Sides:
        """Return the sides of ``found`` solutions of ``program``."""
        assert found.weak is not None
        weights = torch.cat([torch.ones_like(found.x[:, :1]), found.equality, found.inequality], dim=-1)
        counted = torch.cat([torch.ones_like(found.equality, dtype=torch.bool), found.inequality > 0], dim=-1)
        return Sides(found.weak, held, program.jacobian(found.x)[1][:, 1:], program.hessian(found.x, weights), counted)

    def differ(self, adjoints: torch.Tensor) -> torch.Tensor:
        """Return for which ``adjoints`` d (repeats · K, n + p + m) the derivatives of the choices differ, bool (repeats · K,)."""
        count, n = self.held.shape
        d = adjoints.reshape(-1, count, adjoints.shape[-1]).to(self.hessian)
        p = d.shape[-1] - n - self.weak.inequality.shape[-1]
        same = max(_SAME, 64 * torch.finfo(adjoints.dtype).eps)
        # The adjoint of an unknown on a bound is its cotangent; that of a constraint which is not counted is minus its cotangent.
        dx, pushed = d[..., :n] * ~self.held, d[..., n:] * self.counted
        force, forces = (
            self._pulled(self.hessian, self.rows, dx, pushed),
            self._pulled(self.hessian.abs(), self.rows.abs(), dx.abs(), pushed.abs()),
        )
        cotangent = torch.where(self.held, d[..., :n], force)
        largest = torch.maximum(forces, cotangent.abs()).amax(-1, keepdim=True)
        # A bound that holds must need no force, and one that does not must not be crossed. Likewise for inequalities.
        bound = self.weak.lower | self.weak.upper
        held, loose = bound & self.held, bound & ~self.held
        differ = (held & ((cotangent - force).abs() > same * largest)).any(-1)
        differ = differ | (loose & (dx.abs() > same * dx.abs().amax(-1, keepdim=True))).any(-1)
        gradients = self.rows[:, p:]
        met = (gradients @ dx.unsqueeze(-1)).squeeze(-1)
        most = (gradients.abs() @ dx.abs().unsqueeze(-1)).squeeze(-1)
        weight = d[..., n + p :].abs() * gradients.norm(dim=-1)
        moved = self.weak.inequality & ((met.abs() > same * most) | (weight > same * largest))
        return (differ | moved.any(-1) | ~self.weak.any | ~torch.isfinite(d).all(-1)).reshape(-1)

    @staticmethod
    def _pulled(hessian: torch.Tensor, rows: torch.Tensor, dx: torch.Tensor, pushed: torch.Tensor) -> torch.Tensor:
        """Return H dx + Jᵀ dν (repeats, K, n)."""
        return (hessian @ dx.unsqueeze(-1)).squeeze(-1) + (rows.mT @ pushed.unsqueeze(-1)).squeeze(-1)
