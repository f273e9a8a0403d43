"""The references of one check, and what each comparison may be off by: derived from dtype, residuals and step."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bilevel.testing._unrolling import Unrolled, unrolled
from bilevel.testing.comparisons import Allowance
from bilevel.testing.references import Adjoint, Reference

__all__ = ["Evidence"]

# Units of rounding that a sum of many products may be off by.
_UNITS = 64.0
# A relative change small enough for a first-order estimate, and large enough to be seen in float64 and in float32.
_NUDGE = 1e-5


@dataclass(frozen=True, eq=False)
class Evidence:
    """The references: dense at the solution returned and at the exact one, and unrolled."""

    reference: Reference
    found: list[torch.Tensor]
    exact: list[torch.Tensor]
    at_found: list[torch.Tensor]
    at_exact: list[torch.Tensor]
    direct: list[torch.Tensor]
    found_adjoints: list[Adjoint]
    exact_adjoints: list[Adjoint]
    norms: list[list[tuple[float, float]]]  # of each problem, for each tensor
    value: float

    @staticmethod
    def of(reference: Reference, found: list[torch.Tensor]) -> Evidence:
        """Compute everything but the unrolled gradients for the solution ``found``, one vector for each problem."""
        exact = [reference.polished(x, number) for number, x in enumerate(found)]
        at_found, direct, found_adjoints = reference.dense(found)
        at_exact, _, exact_adjoints = reference.dense(exact)
        norms = [
            reference.cross_norms(number, x, adjoint)
            for number, (x, adjoint) in enumerate(zip(found, found_adjoints, strict=True))
        ]
        with torch.no_grad():
            value = float(reference.scalar(exact, reference.points))
        return Evidence(
            reference, found, exact, at_found, at_exact, direct, found_adjoints, exact_adjoints, norms, value
        )

    @functools.cached_property
    def unrolled(self) -> Unrolled:
        """The gradients through an iteration from the exact solution."""
        return unrolled(self.reference, self.exact, self.exact_adjoints)

    @functools.cached_property
    def perturbed(self) -> tuple[list[torch.Tensor], list[torch.Tensor], list[Adjoint]]:
        """The solution returned with every entry moved by the share ``_NUDGE``, and the dense gradients and adjoints there."""
        generator = torch.Generator().manual_seed(0)
        signs = [torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1 for x in self.found]
        rows = [x * (1 + _NUDGE * sign) for x, sign in zip(self.found, signs, strict=True)]
        gradients, _, adjoints = self.reference.dense(rows)
        return rows, gradients, adjoints

    def sensitivity(self, place: int) -> float:
        """Return how much a tensor's gradient changes by a relative change of x.

        To evaluate a function in floating point is to evaluate it exactly at arguments rounded a few times, so that this much of u
        is rounding; it matters where a gradient vanishes at the solution and its parts do not.
        """
        return float((self.perturbed[1][place] - self.at_found[place]).norm()) / _NUDGE

    def wobble(self, place: int) -> float:
        """Return how much a tensor's dense gradient moves by the rounding of the exact solution, which is found to u κ ‖x‖."""
        kappa = max((_norm(a.matrix) * _inverse_norm(a.matrix) for a in self.exact_adjoints), default=1.0)
        return _UNITS * self.reference.eps * max(kappa, 1.0) * self.sensitivity(place)

    @property
    def distance(self) -> float:
        """‖x − x*‖ / ‖x*‖, the largest over the batch."""
        pairs = zip(self.found, self.exact, strict=True)
        return max((float((x - y).norm() / max(float(y.norm()), 1e-300)) for x, y in pairs if x.numel()), default=0.0)

    def natural(self, place: int) -> float:
        """Return the size that the gradient has if nothing cancels, or c changes by as much of itself as θ does."""
        through = sum(
            norms[place][0] * float(a.q.norm()) for norms, a in zip(self.norms, self.found_adjoints, strict=True)
        )
        carried = sum(float(a.rhs.norm() * x.norm()) for a, x in zip(self.found_adjoints, self.exact, strict=True))
        return max(through + float(self.direct[place].norm()), self._elastic(place, carried))

    @property
    def terms(self) -> float:
        """Σ |dc/dθ · θ|, the size of the terms of which c is the sum."""
        pairs = zip(self.at_exact, self.reference.points, strict=True)
        return sum(float((gradient * point).abs().sum()) for gradient, point in pairs)

    def _elastic(self, place: int, size: float) -> float:
        """Return the derivative of something of ``size`` that changes by as much of itself as θ does."""
        length = float(self.reference.points[place].norm())
        return size / length if length else 0.0

    def allow(self, place: int, eps: float, residuals: torch.Tensor) -> Allowance:
        """Return what a reverse derivative may be off by, at the solution returned."""
        unit = _UNITS * eps
        rounding, linear = unit * (float(self.direct[place].norm()) + self.sensitivity(place)), 0.0
        for norms, adjoint, left in zip(self.norms, self.found_adjoints, residuals.tolist(), strict=True):
            cross, through = norms[place]
            q = float(adjoint.q.norm())
            rounding += unit * (through * (float(adjoint.rhs.norm()) + _norm(adjoint.matrix) * q) + cross * q)
            linear += through * left
        return Allowance(rounding, linear)

    def allow_forward(
        self, place: int, direction: torch.Tensor, tangents: Sequence[torch.Tensor], eps: float, residuals: torch.Tensor
    ) -> tuple[Allowance, float]:
        """Return what a forward derivative may be off by, and its natural size."""
        unit, length = _UNITS * eps, float(direction.norm())
        scalar = self.reference.subject.problem is not None
        if scalar:
            rounding = unit * (float(self.direct[place].norm()) + self.sensitivity(place)) * length
            natural = self._elastic(
                place, sum(float(a.rhs.norm() * x.norm()) for a, x in zip(self.found_adjoints, self.exact, strict=True))
            )
        else:
            rows, _, adjoints = self.perturbed
            moved = torch.cat(self.reference.dense_tangents(rows, place, direction, adjoints))
            rounding = unit * float((moved - torch.cat(list(tangents))).norm()) / _NUDGE
            natural = self._elastic(place, sum(float(x.norm()) for x in self.exact))
        natural, linear = natural * length, 0.0
        for norms, adjoint, tangent, left in zip(
            self.norms, self.found_adjoints, tangents, residuals.tolist(), strict=True
        ):
            w = float(tangent.norm())
            # How an error of the linear system's residual reaches what is compared: through v J⁻¹, or J⁻¹ itself.
            reach = float(adjoint.q.norm()) if scalar else _inverse_norm(adjoint.matrix)
            rounding += unit * reach * (norms[place][0] * length + _norm(adjoint.matrix) * w)
            rounding += unit * w * (float(adjoint.rhs.norm()) if scalar else 1.0)
            linear += reach * left
            natural = max(natural, norms[place][0] * length * reach)
        return Allowance(rounding, linear), natural


def _norm(matrix: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.nan_to_num(), 2)) if matrix.numel() else 0.0


def _inverse_norm(matrix: torch.Tensor) -> float:
    if not matrix.numel():
        return 0.0
    least = float(torch.linalg.svdvals(matrix.nan_to_num())[-1])
    return 1 / least if least > 0 else math.inf
