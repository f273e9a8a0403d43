"""How wrong a hypergradient is on the way, as far as the rounds of a search have shown, and how far its next solves should go.

What is read off numbers that the rounds have produced anyway::

    ‖ĝ − g‖ ≲ c ( S ν ‖∇G‖ + β ν ‖ρ‖ )

with ν the largest ‖H⁻¹b‖/‖b‖ or ‖s‖²/sᵀHs, S the largest ‖Δĝ‖/‖Δφ‖ and β the largest ‖Bᵀq‖/‖q‖ seen, and c > 1, the larger the fewer numbers
S and β were seen on (a single outer variable may hide a change by chance) and the fewer steps S was seen in. The halves of the sum are the shares
of the two solves. The model plans. It decides only if the caller allows estimates; otherwise the certificate does, and its parts correct the
model where it was too hopeful. Where ĝ is followed, c times the largest of its last changes stands for c β ν ‖ρ‖, and a part of β ν ‖ρ‖
beside it, as changes may vanish by chance, or be small for a while.
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

# The first adjoint, before anything is known of errors: relative residual. Where ĝ is followed, no guess is added at the end,
# and the last changes of ĝ have to be as small.
_FIRST_ADJOINT, _FIRST_FOLLOWED = 0.4, 1 / 3
# From how many of the last changes of ĝ its error is read off, and how much of the model by norms is added: they may vanish by chance.
_LAST, _CHANCE = 3, 0.25
# c = _SAFETY (1 + _DOUBT / numbers seen), and 1 / steps seen more for S.
_SAFETY, _DOUBT = 1.3, 3.0
# A solve aims a little below its share, and one step of Newton's method promises no more than this reduction.
_MARGIN, _MOST_REDUCTION, _FIRST_REDUCTION, _FIRST_FOLLOWED_REDUCTION = 0.9, 1e-4, 1e-2, 4e-2
# How often an estimate that was within the goal may be corrected by a certificate that is not.
_MOST_CORRECTIONS = 12


@dataclass(eq=False)
class ErrorModel:
    """What ‖ĝ − g‖ is taken for at a point.

    Parameters
    ----------
    tolerance
        The goal.
    known
        ν, S, β and how far they are trusted; it is changed.
    certify
        (φ, q, ĝ, corrected value) ↦ the certificate's bound. None: estimates decide.
    first
        ‖∇G‖ where the inner solver ended, or the first round begins: the error there is taken for ‖g‖ until S is known.
    corrections
        How often the certificate was asked.
    looked
        Whether a step of this run has shown how ĝ changes, be it not at all.
    """

    tolerance: Tolerance
    known: SearchState
    certify: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Bound] | None = None
    first: float = math.nan
    corrections: int = 0
    looked: bool = False

    @property
    def exhausted(self) -> bool:
        """Whether the certificate has contradicted the model so often that rounding must be the cause."""
        return self.corrections > _MOST_CORRECTIONS

    def allowed(self, here: Iterate) -> float:
        """Return what ‖ĝ − g‖ may be."""
        return self.tolerance.allowed(float(here.gradient.norm()))

    def seen(self, here: Iterate) -> bool:
        """Whether it is known what ∇G's norm does to ĝ."""
        return self.known.slope > 0 or self.looked or here.size == 0

    def poisoned(self, here: Iterate) -> bool:
        """Whether φ has to move in any case, and ρ does not hide yet what that does to ĝ: the adjoint can wait."""
        return self.known.slope > 0 and self.inner_share(here) > max(self.allowed(here), self.linear_share(here))

    def inner_share(self, here: Iterate) -> float:
        """Return the model's part of the inner residual; before S is known, the error is taken to be of the size of ĝ."""
        known = self.known
        # What a step leaves lies in softer directions than the step, where S may be larger: one look is not enough to trust.
        caution = self.caution(here, known.numbers) + _SAFETY / max(1, known.looks)
        if not known.slope:
            if self.looked:
                return 0.0
            return caution * float(here.gradient.norm()) * here.size / self.first if self.first else 0.0
        error = known.nu * here.size if here.inner_error is None else here.inner_error
        return caution * known.inner_doubt * known.slope * error

    def linear_share(self, here: Iterate) -> float:
        """Return the model's part of the adjoint's residual."""
        known = self.known
        norms = known.pull * known.nu
        share = self.caution(here, known.pulls) * norms * here.left
        if len(here.changes) > 1:
            caution = self.caution(here, here.direct.numel() * len(here.changes))
            slack = norms * (_CHANCE * here.left + 4 * torch.finfo(here.x.dtype).eps * float(here.v.norm()))
            # Of a problem whose products are exhausted the last changes say nothing, and the residual all.
            share = min(share, caution * max(here.changes[-_LAST:]) + slack)
        return known.linear_doubt * share

    def caution(self, here: Iterate, numbers: int) -> float:
        """Return c for what was seen on so many ``numbers``."""
        return _SAFETY * (1 + _DOUBT / max(1, numbers, here.direct.numel()))

    def adjoint_aim(self, here: Iterate) -> float:
        """Return the ‖ρ‖ to reach: half of what is allowed, what the inner residual leaves of it, or would spoil anyway."""
        share = self.linear_share(here)
        if not share > 0:
            return _FIRST_ADJOINT * float(here.v.norm())
        return here.left * self.linear_allowed(here) / share

    def linear_allowed(self, here: Iterate) -> float:
        """Return how large :meth:`linear_share` may be."""
        allowed, inner = self.allowed(here), self.inner_share(here)
        return max(0.5 * _MARGIN * allowed, _MARGIN * (allowed - inner), 0.3 * inner)

    def followed_enough(self, here: Iterate, *, first: bool) -> bool:
        """Return whether an adjoint that is followed need not go on; ``first`` while nothing is known of errors."""
        if first:
            small = len(here.changes) > 2 and max(here.changes[-2:]) <= _FIRST_FOLLOWED * float(here.gradient.norm())
            return small and here.left <= _FIRST_FOLLOWED * float(here.v.norm())
        return self.linear_share(here) <= self.linear_allowed(here)

    def inner_aim(self, here: Iterate) -> float:
        """Return the ‖∇G‖ that a step is to lead to."""
        known, size = self.known, here.size
        share = self.inner_share(here)
        aim = size * 0.5 * _MARGIN * self.allowed(here) / share if share > 0 else size
        # What G bends off its quadratic model along the step is left in any case.
        bend = known.curvature * (known.nu * size) ** 2
        # Where the adjoint that follows a step is ended to the product, a step that was too short costs less.
        first = _FIRST_FOLLOWED_REDUCTION if isinstance(here.operator, JointOperator) else _FIRST_REDUCTION
        floor = _MOST_REDUCTION * size if known.slope else first * self.first
        return min(max(aim, bend, floor), 0.3 * size)

    def estimate(self, here: Iterate) -> Bound:
        """Return the estimate of ‖ĝ − g‖, infinite while S is unknown."""
        inner, linear = self.inner_share(here), self.linear_share(here)
        return Bound(inner + linear if self.seen(here) else math.inf, Basis.ESTIMATED, inner, linear)

    def judge(self, here: Iterate) -> Bound:
        """Return the bound that decides: the model's, or the certificate's where that has to and may be within the goal."""
        estimate = self.estimate(here)
        inner, linear = estimate.inner_part, estimate.linear_part
        allowed = self.allowed(here)
        if self.certify is None or self.tolerance.estimates or estimate.value > allowed:
            return estimate
        self.corrections += 1
        proven = self.certify(here.x, here.q, here.gradient, here.corrected)
        if proven.basis is Basis.ESTIMATED or not math.isfinite(proven.value):
            # No bound: constants are missing, or hold only nearer to the solution. The caller tells the two apart.
            self.known.inner_doubt *= 30
            self.known.linear_doubt *= 30
            return Bound(math.inf, proven.basis, inner, linear)
        if proven.value > allowed:
            if proven.value - proven.inner_part - proven.linear_part > 0.5 * allowed:
                self.corrections = _MOST_CORRECTIONS + 1  # rounding alone is above what is allowed
            self.known.inner_doubt *= max(1.2, proven.inner_part / inner if inner else 1.2)
            self.known.linear_doubt *= max(1.2, proven.linear_part / linear if linear else 1.2)
        return proven

    def measure(self, here: Iterate, there: Iterate, length: float) -> None:
        """Learn S from a step of the given length between two points whose adjoints are as good as they are going to be."""
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
