"""Proofs about the solution of min f + g: its distance from what was computed, and which of its entries are zero.

Let e be an element of ∂(f + g)(x), and μ the strong convexity of f + g. Then ‖x − x*‖ ≤ ‖e‖/μ. The user declares μ; or f is proven to be a quadratic,
and a Cholesky factorisation of its Hessian plus the convexity of g proves one. The distance bounds how far ∇f(x*) is from ∇f(x): by the declared
Lipschitz constant of ∇f, or by the rows of the Hessian of a quadratic. Where this leaves −∇f(x*) inside ∂g(0), an entry of x* is zero. Where an entry
of x is larger than the distance, that of x* is not zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from bilevel._torch.definite import least_eigenvalue
from bilevel.equations.degrees import degree_of
from bilevel.reports import Basis, Proof
from bilevel.solvers.composite.problem import Composite, Iterate
from bilevel.solvers.judging.error import residual_rounding, rounding
from bilevel.tolerance import Target

__all__ = ["CompositeProof"]

# Up to this many numbers the Hessians are formed.
_MOST_NUMBERS = 2**24


@dataclass(eq=False)
class CompositeProof:
    """What is proven of the solution near ``at``, called when a report is asked for it.

    Parameters
    ----------
    composite
        f + g.
    at
        The computed points, with ∇f there.
    subgradient_norm
        ‖e‖ (batch,).
    newton
        The next Newton steps (batch, n), NaN where they are not known. Their lengths are the estimate where nothing is proven.
    target
        Holds the constants that the user declares.
    """

    composite: Composite
    at: Iterate
    subgradient_norm: torch.Tensor
    newton: torch.Tensor
    target: Target

    def __post_init__(self) -> None:
        tensors = self.composite.objective.tensors
        self._versions = [-1 if t.is_inference() else t._version for t in tensors]

    def __call__(self) -> Proof:
        x, unknown = self.at.x, torch.full_like(self.subgradient_norm, torch.nan)
        if self._changed():
            return Proof(unknown, Basis.RESIDUAL)
        distance = self._distance()
        none = torch.zeros_like(x, dtype=torch.bool)
        if not bool(torch.isfinite(distance).any()):
            estimate = self.newton.norm(dim=-1)
            known = bool(torch.isfinite(estimate).any())
            return Proof(estimate, Basis.ESTIMATED if known else Basis.RESIDUAL, none, none)
        assert self.composite.proven_nonzero is not None and self.composite.proven_zero is not None
        nonzero = self.composite.proven_nonzero(x, distance)
        move = self._moves(distance)
        zero = none if move is None else self.composite.proven_zero(self.at.slope, move)
        return Proof(
            torch.where(torch.isfinite(distance), distance, unknown), Basis.CERTIFIED, zero & ~nonzero, nonzero
        )

    def _changed(self) -> bool:
        """Return whether f or g is another function than in the solve."""
        objective, x, step = self.composite.objective, self.at.x, self.at.step.unsqueeze(-1)
        if any(t.is_inference() or t._version != v for t, v in zip(objective.tensors, self._versions, strict=True)):
            return True
        # Something else than the arguments may have changed. A prox step is at most as long as any subgradient allows.
        slope, eps = objective.residual(x), torch.finfo(x.dtype).eps
        noise = residual_rounding(objective, x, slope)
        moved = self.composite.step(x, slope, self.at.step) - x
        allowed = step * (self.subgradient_norm.unsqueeze(-1) + noise.norm(dim=-1, keepdim=True))
        allowed = allowed + 16 * eps * (x.abs() + step * slope.abs()).amax(-1, keepdim=True)
        same = ((slope - self.at.slope).abs() <= noise) & (moved.abs() <= allowed)
        return not bool((same | ~torch.isfinite(x)).all())

    def _distance(self) -> torch.Tensor:
        """Return a proven bound of ‖x − x*‖ (batch,); infinite where there is none."""
        mu = self.target.strong_convexity
        objective, x = self.composite.objective, self.at.x
        curvature = self._curvature() if mu is None else x.new_full(x.shape[:1], mu)
        if curvature is None or not bool((curvature > 0).any()):
            return torch.full_like(self.subgradient_norm, torch.inf)
        bound = (self.subgradient_norm + rounding(objective, x, self.at.slope)) / curvature
        return torch.where((curvature > 0) & torch.isfinite(bound), bound, torch.inf)

    def _curvature(self) -> torch.Tensor | None:
        """Return a proven μ (batch,) of f + g; None if f is not proven to be a quadratic."""
        if self._hessian is None:
            return None
        assert self.composite.convexity is not None
        return least_eigenvalue(self._hessian + torch.diag_embed(self.composite.convexity(self.at.x)), self._noise)

    @cached_property
    def _hessian(self) -> torch.Tensor | None:
        """The Hessian (batch, n, n) of a quadratic f; None if f is not proven to be one."""
        objective, x = self.composite.objective, self.at.x
        if objective.batch * objective.size**2 > _MOST_NUMBERS or torch.finfo(x.dtype).bits < 32:
            return None
        if degree_of(objective, x, [False] * len(objective.tensors)).whole > 2:
            return None
        made = objective.linearize_dense(x).operator.dense()
        return 0.5 * (made + made.mT)

    @property
    def _noise(self) -> torch.Tensor:
        """What rounding may make of the Hessian (batch,)."""
        assert self._hessian is not None
        n = self._hessian.shape[-1]
        return (16 + n) * torch.finfo(self._hessian.dtype).eps * self._hessian.norm(dim=(-2, -1))

    def _moves(self, distance: torch.Tensor) -> torch.Tensor | None:
        """Return bounds (batch, n) of the entries of |∇f(x*) − ∇f(x)|, rounding included; None where no constant is known."""
        objective, x, e = self.composite.objective, self.at.x, distance.unsqueeze(-1)
        constants = []
        if self.target.smoothness is not None:
            constants.append(torch.full_like(x, self.target.smoothness))
        if self._hessian is not None:
            constants.append(self._hessian.norm(dim=-1) + self._noise.unsqueeze(-1))
        if not constants:
            return None
        move = torch.stack(constants).amin(0) * e + residual_rounding(objective, x, self.at.slope)
        # The strengths are compared with this in floating point.
        return (move + 4 * torch.finfo(x.dtype).eps * (self.at.slope.abs() + move)).nan_to_num(nan=torch.inf)
