"""The estimated error of a hypergradient, and the accuracy that the next solves need.

The estimate uses numbers that the solves produce anyway::

    ‖ĝ − g‖ ≲ c ( S ν ‖∇G‖ + β ν ‖ρ‖ )

Here ν is the largest ‖H⁻¹b‖/‖b‖ or ‖s‖²/sᵀHs observed, S the largest ‖Δĝ‖/‖Δφ‖, and β the largest ‖Bᵀq‖/‖q‖. If the inner solve
comes with an estimate of ‖φ − φ*‖, that takes the place of ν ‖∇G‖. The factor c > 1 is larger if S and β were observed on few outer variables, since
a single one may hide a change by chance, and if S was observed in few steps. The two terms are the shares of the two solves.

The estimate decides only if the caller allows estimates. Otherwise the certificate decides, and its parts correct the model where that was
too small. Where ĝ is followed product by product, c times the largest of its last changes replaces c β ν ‖ρ‖. A part of β ν ‖ρ‖ is added, as
changes may vanish by chance, or be small for a while.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bilevel.certificates.bound import Bound
from bilevel.problems.adaptive.iterate import Iterate, Objectives
from bilevel.problems.adaptive.quasi_newton import JointOperator
from bilevel.problems.adaptive.state import SearchState
from bilevel.reports import Basis
from bilevel.tolerance import Tolerance

__all__ = ["ErrorModel"]

# The relative residual of the first adjoint, before errors are known. Where ĝ is followed, no guess is added at the end, and the last changes of ĝ
# have to be as small.
_FIRST_ADJOINT, _FIRST_FOLLOWED = 0.4, 1 / 3
# The number of last changes of ĝ that estimate its error, and the part of the estimate by norms that is added.
_LAST, _CHANCE = 3, 0.25
# c = _SAFETY (1 + _DOUBT / numbers observed); for S, _SAFETY / steps observed is added.
_SAFETY, _DOUBT = 1.3, 3.0
# A solve aims a little below its share. One step of Newton's method reduces ∇G by no more than these factors.
_MARGIN, _MOST_REDUCTION, _FIRST_REDUCTION, _FIRST_FOLLOWED_REDUCTION = 0.9, 1e-4, 1e-2, 4e-2
# How often the certificate may contradict an estimate that was within the goal.
_MOST_CORRECTIONS = 12


@dataclass(eq=False)
class ErrorModel:
    """Estimates ‖ĝ − g‖ at an iterate, and plans the next solves.

    Parameters
    ----------
    tolerance
        The goal.
    known
        ν, S, β, and how often they were observed; it is changed.
    certify
        (φ, q, ĝ, corrected value) ↦ the certificate's bound. None: estimates decide.
    first
        ‖∇G‖ where the first round begins. Until S is known, the error there is taken to be ‖ĝ‖.
    corrections
        How often the certificate was computed.
    looked
        Whether this run has measured S; S may be zero.
    """

    tolerance: Tolerance
    known: SearchState
    certify: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Bound] | None = None
    first: float = math.nan
    corrections: int = 0
    looked: bool = False

    @property
    def exhausted(self) -> bool:
        """Whether the certificate has contradicted the estimate so often that rounding must be the cause."""
        return self.corrections > _MOST_CORRECTIONS

    def allowed(self, here: Iterate) -> float:
        """Return the largest ‖ĝ − g‖ that the goal allows."""
        return self.tolerance.allowed(float(here.gradient.norm()))

    def seen(self, here: Iterate) -> bool:
        """Whether S is known, or not needed."""
        return self.known.slope > 0 or self.looked or here.size == 0

    def adjoint_can_wait(self, here: Iterate) -> bool:
        """Whether φ has to move in any case, and ρ is small enough to measure S by that step."""
        return self.known.slope > 0 and self.inner_share(here) > max(self.allowed(here), self.linear_share(here))

    def inner_share(self, here: Iterate) -> float:
        """Return the part of the estimate that the inner solve causes. Before S is known, it is of the size of ĝ."""
        known = self.known
        # The error lies in softer directions than the step, where S may be larger. So one measurement is trusted less.
        caution = self.caution(here, known.numbers) + _SAFETY / max(1, known.looks)
        if not known.slope:
            if self.looked:
                return 0.0
            return caution * float(here.gradient.norm()) * here.size / self.first if self.first else 0.0
        error = known.nu * here.size if here.inner_error is None else here.inner_error
        return caution * known.inner_doubt * known.slope * error

    def linear_share(self, here: Iterate) -> float:
        """Return the part of the estimate that the linear solve causes."""
        known = self.known
        norms = known.pull * known.nu
        share = self.caution(here, known.pulls) * norms * here.left
        if len(here.changes) > 1:
            caution = self.caution(here, here.direct.numel() * len(here.changes))
            slack = norms * (_CHANCE * here.left + 4 * torch.finfo(here.x.dtype).eps * float(here.v.norm()))
            # After n products the last changes mean nothing, and the residual is a better measure.
            share = min(share, caution * max(here.changes[-_LAST:]) + slack)
        return known.linear_doubt * share

    def caution(self, here: Iterate, numbers: int) -> float:
        """Return c for a quantity that was observed on so many ``numbers``."""
        return _SAFETY * (1 + _DOUBT / max(1, numbers, here.direct.numel()))

    def adjoint_aim(self, here: Iterate) -> float:
        """Return the ‖ρ‖ that the linear solve has to reach."""
        share = self.linear_share(here)
        if not share > 0:
            return _FIRST_ADJOINT * float(here.v.norm())
        return here.left * self.linear_allowed(here) / share

    def linear_allowed(self, here: Iterate) -> float:
        """Return the largest :meth:`linear_share` allowed: half of the allowed error, the part that the inner share leaves, or 0.3 of that share."""
        allowed, inner = self.allowed(here), self.inner_share(here)
        return max(0.5 * _MARGIN * allowed, _MARGIN * (allowed - inner), 0.3 * inner)

    def followed_enough(self, here: Iterate, *, first: bool) -> bool:
        """Return whether the solve for an adjoint that is followed may end; ``first``: before errors are known."""
        if first:
            small = len(here.changes) > 2 and max(here.changes[-2:]) <= _FIRST_FOLLOWED * float(here.gradient.norm())
            return small and here.left <= _FIRST_FOLLOWED * float(here.v.norm())
        return self.linear_share(here) <= self.linear_allowed(here)

    def inner_aim(self, here: Iterate) -> float:
        """Return the ‖∇G‖ that the next step has to reach."""
        known, size = self.known, here.size
        share = self.inner_share(here)
        aim = size * 0.5 * _MARGIN * self.allowed(here) / share if share > 0 else size
        # The step leaves at least the part of ∇G that the quadratic model of G does not describe.
        bend = known.curvature * (known.nu * size) ** 2
        # If the adjoint's solve ends after any product, a step that was too short costs less.
        first = _FIRST_FOLLOWED_REDUCTION if isinstance(here.operator, JointOperator) else _FIRST_REDUCTION
        floor = _MOST_REDUCTION * size if known.slope else first * self.first
        return min(max(aim, bend, floor), 0.3 * size)

    def estimate(self, here: Iterate) -> Bound:
        """Return the estimate of ‖ĝ − g‖, infinite while S is unknown."""
        inner, linear = self.inner_share(here), self.linear_share(here)
        return Bound(inner + linear if self.seen(here) else math.inf, Basis.ESTIMATED, inner, linear)

    def judge(self, here: Iterate) -> Bound:
        """Return the bound that decides: the estimate, or the certificate if only a proof may decide and the estimate is within the goal."""
        estimate = self.estimate(here)
        inner, linear = estimate.inner_part, estimate.linear_part
        allowed = self.allowed(here)
        if self.certify is None or self.tolerance.estimates or estimate.value > allowed:
            return estimate
        self.corrections += 1
        proven = self.certify(here.x, here.q, here.gradient, here.corrected)
        if proven.basis is Basis.ESTIMATED or not math.isfinite(proven.value):
            # There is no bound: constants are missing, or they hold only nearer to the solution.
            self.known.inner_doubt *= 30
            self.known.linear_doubt *= 30
            return Bound(math.inf, proven.basis, inner, linear)
        if proven.value > allowed:
            if proven.value - proven.inner_part - proven.linear_part > 0.5 * allowed:
                self.corrections = _MOST_CORRECTIONS + 1  # rounding alone exceeds the allowed error
            self.known.inner_doubt *= max(1.2, proven.inner_part / inner if inner else 1.2)
            self.known.linear_doubt *= max(1.2, proven.linear_part / linear if linear else 1.2)
        return proven

    def measure(self, here: Iterate, there: Iterate, length: float) -> None:
        """Learn S from a step of the given length between two iterates with final adjoints."""
        change = float((there.gradient - here.gradient).norm())
        if not math.isfinite(change):
            return
        self.looked = True
        self.known.slope = max(self.known.slope, change / length)
        self.known.numbers += here.direct.numel()
        self.known.looks += 1

    def look_aside(
        self,
        here: Iterate,
        there: Iterate,
        objectives: Objectives,
        solve: Callable[[Iterate, torch.Tensor], torch.Tensor],
    ) -> None:
        """Learn S and β from ``there``, a point beside ``here``; ``solve`` returns H⁻¹ of a vector to some digits."""
        objectives.set_adjoint(there, here.q)
        turn = there.rho - here.rho  # with as much of ρ left as here, the difference is the step's alone
        if bool((turn != 0).any()):
            objectives.set_adjoint(there, here.q + solve(there, turn))
        self.see_pull(there)
        self.measure(here, there, float((there.x - here.x).norm()))

    def see_pull(self, here: Iterate) -> None:
        """Learn β from the adjoint at hand."""
        length = float(here.q.norm())
        if not length:
            return
        self.known.pulls += here.pulled.numel()
        self.known.pull = max(self.known.pull, float(here.pulled.norm()) / here.x.shape[0] / length)
