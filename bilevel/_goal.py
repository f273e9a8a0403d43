"""Take the inner and the linear solve as far as a wanted accuracy of the hypergradient needs, and no further.

One round, at φ with an adjoint q from the round before:

1. linearise at φ; one joint pass gives H q and Bᵀq, and so the residual ρ = ∇F − H q and ĝ;
2. if ρ accounts for more than its share of the error, solve H d = ρ as far as it should go, q ← q + d, and a joint pass again. Where G is
   quadratic and θ few numbers every product of that solve is a joint pass, ĝ is known after each, and it ends on the changes of ĝ;
3. stop if ‖ĝ − g‖ is small enough; else solve H s = ∇G, as far as it should go, and φ ← φ − s.

The inner solver makes the first stretch alone, to where Newton's method can take over; from there the linear solver does both solves,
which costs √κ where descent costs κ, and neither is ever begun again. Between the two lies a step to where the solver's gradients, all of them
together, point for a quadratic G: the linearisation, which has to be made, may as well be made there. What one solve learns of H⁻¹
preconditions the next (:mod:`bilevel._secants`). No solve verifies its residual by a product of its own: what is decided and reported
rests on the joint passes and on the gradient at the next φ. As these come anyway, each also tries a step that the preconditioner guesses.

How far is far enough is read off a running model of the error, from numbers that the rounds have produced anyway::

    ‖ĝ − g‖ ≲ c ( S ν ‖∇G‖ + β ν ‖ρ‖ )

with ν the largest ‖H⁻¹b‖/‖b‖ or ‖s‖²/sᵀHs, S the largest ‖Δĝ‖/‖Δφ‖ and β the largest ‖Bᵀq‖/‖q‖ seen, and c > 1, the larger the fewer numbers
S and β were seen on (a single outer variable may hide a change by chance) and the fewer steps S was seen in. The halves of the sum are the shares
of the two solves. The model plans. It decides only if the caller allows estimates; otherwise the certificate does, and its parts correct the
model where it was too hopeful. Where ĝ is followed, c times the largest of its last changes stands for c β ν ‖ρ‖, and a part of β ν ‖ρ‖
beside it, as changes may vanish by chance, or be small for a while.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from bilevel._knowledge import GoalReport, Knowledge, Reached
from bilevel._problem import Linearization, Problem
from bilevel._secants import JointOperator, RecordedOperator, WatchedProblem
from bilevel.certificates.bound import Bound
from bilevel.linear._base import LinearOutcome, LinearSolver, solve_linear
from bilevel.linear.cg import CG
from bilevel.operators import HessianOperator, LinearOperator
from bilevel.reports import Basis, Status
from bilevel.solvers._base import InnerSolver, rounding, solve_inner
from bilevel.tolerance import Target, Tolerance

__all__ = ["Search"]

_MOST_ROUNDS = 60
# The inner solver's own stretch: a tenth of the first residual is where Newton's method takes over at the least cost.
_CRUDE = 0.1
# The first adjoint, before anything is known of errors: relative residual. Where ĝ is followed, no guess is added at the end,
# and the last changes of ĝ have to be as small.
_FIRST_ADJOINT, _FIRST_FOLLOWED = 0.4, 1 / 3
# So few numbers θ, and no more than a quarter of φ's, that Bᵀp costs next to nothing beside H p.
_FEW = 8
# From how many of the last changes of ĝ its error is read off, and how much of the model by norms is added: they may vanish by chance.
_LAST, _CHANCE = 3, 0.25
# c = _SAFETY (1 + _DOUBT / numbers seen), and 1 / steps seen more for S.
_SAFETY, _DOUBT = 1.3, 3.0
# A solve aims a little below its share, and one step of Newton's method promises no more than this reduction.
_MARGIN, _MOST_REDUCTION, _FIRST_REDUCTION, _FIRST_FOLLOWED_REDUCTION = 0.9, 1e-4, 1e-2, 4e-2
# A step that leaves more of the residual than this was no step of Newton's method near a solution.
_PROGRESS = 0.7
# How often an estimate that was within the goal may be corrected by a certificate that is not.
_MOST_CORRECTIONS = 12
_BAD = (Status.INDEFINITE, Status.NOT_FINITE, Status.SINGULAR, Status.DIVERGED, Status.BREAKDOWN)


@dataclass(eq=False)
class _Here:
    """G and F linearised at one φ, with the adjoint so far."""

    x: torch.Tensor
    linear: Linearization
    operator: LinearOperator
    residual: torch.Tensor
    values: torch.Tensor
    v: torch.Tensor
    direct: torch.Tensor
    q: torch.Tensor
    rho: torch.Tensor
    pulled: torch.Tensor
    changes: list[float] = field(default_factory=list)  # of ĝ, by each of the last products, where it was followed

    @property
    def size(self) -> float:
        """‖∇G‖ of the whole batch."""
        return float(self.residual.norm())

    @property
    def left(self) -> float:
        """‖ρ‖ of the whole batch."""
        return float(self.rho.norm())

    @property
    def corrected(self) -> torch.Tensor:
        """F − qᵀ∇G, the mean over the problems."""
        return self.values.mean() - torch.linalg.vecdot(self.q, self.residual).mean()

    @property
    def gradient(self) -> torch.Tensor:
        """ĝ, the mean over the problems (p,)."""
        return (self.direct - self.pulled) / self.x.shape[0]


class Search:
    """Return φ, q and ĝ with ‖ĝ − g‖ as small as ``tolerance`` asks, by :meth:`run`.

    Parameters
    ----------
    lower, upper
        G and F.
    wanted
        Which of the problems' tensors are θ.
    solver
        Makes the first stretch, and goes on where Newton's method does not work.
    linear_solver
        Chooses the linear solver for an operator; conjugate gradients without a preconditioner are given one.
    tolerance
        The goal.
    known
        From an earlier call; it is changed. None for a first call, whose first stretch is the inner solver's.
    certify
        (φ, q, ĝ, corrected value) ↦ the certificate's bound.
    outputs
        (φ, *tensors) ↦ F, for a caller who looks at what it does; that of ``upper`` by default.
    """

    def __init__(
        self,
        lower: Problem,
        upper: Problem,
        wanted: Sequence[bool],
        solver: InnerSolver,
        linear_solver: Callable[[LinearOperator], LinearSolver],
        tolerance: Tolerance,
        known: Knowledge | None,
        certify: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Bound],
        outputs: Callable[..., torch.Tensor] | None = None,
    ) -> None:
        self.lower = WatchedProblem(lower.system, lower.tensors)
        self.upper, self.wanted = upper, list(wanted)
        self.outputs = outputs or upper.system.outputs
        self.solver, self.choose, self.tolerance, self.certify = solver, linear_solver, tolerance, certify
        self.cold = known is None or known.slope == 0
        self.known = Knowledge() if known is None else known
        # ‖∇G‖ where the inner solver ended, or the first round begins: the error there is taken for ‖g‖ until S is known
        self.first = math.nan
        self.corrections = 0
        self.looked = False  # whether a step of this run has shown how ĝ changes, be it not at all
        zeros = torch.zeros(lower.batch, dtype=torch.int64)
        self.inner_steps, self.linear_steps = zeros, zeros

    def run(self, x: torch.Tensor, q: torch.Tensor | None) -> Reached:
        """Begin at φ = x (K, n) and the adjoint q (K, n), or None."""
        before = replace(self.known)
        self.known.fade()
        here = self._begin(x, q) if self.cold else self._enter(x, q)
        reason = self._impossible(here)
        rounds = 0
        bound = Bound(math.inf, Basis.ESTIMATED)
        while reason is None:
            rounds += 1
            stuck = False if self._spoiled(here) else self._solve_adjoint(here)
            if isinstance(stuck, Status):
                reason = stuck
                break
            bound = self._judge(here)
            allowed = self._allowed(here)
            if bound.value <= allowed:
                reason = Status.CONVERGED
            elif rounds >= _MOST_ROUNDS or self.corrections > _MOST_CORRECTIONS:
                reason = Status.STAGNATED
            elif self._seen(here) and not self._inner_share(here) > 0.5 * allowed:
                # What is left is the linear residual's: go on with that, unless rounding keeps it up.
                reason = Status.STAGNATED if stuck else None
            else:
                there = self._refine(here)
                if there is Status.STAGNATED and not self._seen(here) and self._look_aside(here):
                    continue
                if isinstance(there, Status):
                    reason = there
                    bound = self._judge(here)
                    reason = Status.CONVERGED if bound.value <= self._allowed(here) else reason
                else:
                    here = there
        self.known.age(before, stepped=bool(self.inner_steps.any()), solved=bool(self.linear_steps.any()))
        return self._end(here, bound, reason, rounds)

    # The rounds

    def _begin(self, x: torch.Tensor, q: torch.Tensor | None) -> _Here:
        """Let the inner solver make its stretch, and take the step beyond it that its gradients point to: the next pass tells its worth."""
        end, residual = self._descend(x)
        step, rest = self.known.secants.fit(residual)
        size = float(residual.norm())
        here = self._enter(end - step, q) if float(rest.norm()) < size else self._enter(end, q)
        if not here.size <= size:
            here = self._enter(end, q)
        self.first = size
        return here

    def _descend(self, x: torch.Tensor, reduction: float = _CRUDE) -> tuple[torch.Tensor, torch.Tensor]:
        """Let the inner solver reduce ‖∇G‖ by ``reduction`` from x; return where it ended, and ∇G there."""
        residual = self.lower.residual(x)
        size = float(residual.norm())
        if not size > 0 or not math.isfinite(size):
            return x, residual
        goal = Target(absolute=reduction * size / self.lower.batch**0.5, asked=True)
        outcome = solve_inner(self.solver, self.lower, x, goal)
        self.lower.tell(self.known.secants)
        self.inner_steps = self.inner_steps + outcome.iterations.cpu()
        return outcome.x, outcome.residual

    def _enter(self, x: torch.Tensor, q: torch.Tensor | None) -> _Here:
        here = self._at(x)
        if math.isnan(self.first):
            self.first = here.size
        return here if q is None else self._with(here, q)

    def _follow(self, before: _Here, x: torch.Tensor) -> _Here:
        """Return the linearisation at x, with the adjoint from before and a guess of what ∇F's change makes of it."""
        here = self._at(x)
        return self._with(here, before.q + self.known.secants.guess(here.v - before.v + before.rho))

    def _at(self, x: torch.Tensor) -> _Here:
        linear = self.lower.linearize(x, self.wanted)
        values, v, direct = self._slopes(x)
        return _Here(
            x, linear, self._recorded(linear, direct.numel()), linear.residual.detach(), values, v, direct,
            torch.zeros_like(x), v, torch.zeros_like(direct),
        )  # fmt: skip

    def _recorded(self, linear: Linearization, outer: int) -> RecordedOperator:
        """Return H, which makes Bᵀp too beside its products where θ is ``outer`` numbers, and they are few, and H looks constant.

        What a single step shows of an H that changes is too little for the lesser caution that goes with it.
        """
        few = (
            self.known.secants.constant
            and outer <= min(_FEW, linear.operator.size // 4)
            and linear.operator.batch == 1
            and isinstance(self.choose(linear.operator), CG)
        )
        if few and isinstance(linear.operator, HessianOperator):
            return JointOperator(linear.operator, lambda v: self._joint(linear, v))
        return RecordedOperator(linear.operator)

    def _with(self, here: _Here, q: torch.Tensor) -> _Here:
        """Set q, and with it ρ and Bᵀq: one pass of ⟨∇G, q⟩ gives H q and Bᵀq both."""
        here.q, here.changes = q, []
        if not bool((q != 0).any()):
            return here
        product, here.pulled = self._joint(here.linear, q)
        here.rho = here.v - product
        self._see_pull(here)
        return here

    def _see_pull(self, here: _Here) -> None:
        self.known.pulls += here.pulled.numel()
        self.known.pull = max(self.known.pull, float(here.pulled.norm()) / here.x.shape[0] / float(here.q.norm()))

    def _solve_adjoint(self, here: _Here) -> Status | bool:
        """Bring ρ down to its share of the error; return what stopped that, or whether rounding keeps it above its share."""
        if self.known.slope and self._inner_share(here) + self._linear_share(here) <= self._allowed(here):
            return False
        if isinstance(here.operator, JointOperator):
            followed = self._follow_changes(here, here.operator)
            if followed is not None:
                return followed
        want, ahead = self._adjoint_aim(here), True
        for _ in range(_MOST_ROUNDS):
            left = here.left
            if left <= want or left == 0:
                return False
            outcome = self._linear(here, here.rho, want / left)
            self.linear_steps = self.linear_steps + outcome.iterations.cpu()
            bad = _worst(outcome.status)
            if bad is not None:
                return bad
            # The joint pass tells what the guess is worth, and comes anyway.
            step = outcome.x + self.known.secants.guess(outcome.residual) if ahead else outcome.x
            self._with(here, here.q + step)
            want = max(want, self._adjoint_aim(here)) if self.known.nu else want
            if here.left > 0.5 * left:  # no progress: a bad guess, rounding, or a solver without one
                if not ahead:
                    return here.left > 1.01 * want
                ahead = False
        return True

    def _follow_changes(self, here: _Here, operator: JointOperator) -> Status | bool | None:
        """Go on with the adjoint product by product, as long as ĝ changes by more than its share; None where rounding ends that.

        A product more tells what ĝ is for the best q on the span of them all, and no pass is needed to verify it. The last
        changes are what is left, up to a small factor (Golub & Strakoš, "Estimates in quadratic formulas", 1994).
        """
        first, digits = not self.known.pull, torch.finfo(here.x.dtype).eps
        ended: Status | bool | None = None
        for _ in range(max(100, 2 * operator.size)):
            if here.left == 0 or self._followed_enough(here, first=first):
                ended = False
                break
            outcome = self._linear(here, here.rho, digits, most=1)
            self.linear_steps = self.linear_steps + outcome.iterations.cpu()
            ended = _worst(outcome.status)
            if ended is not None:
                break
            # The first time, of the inner solver's differences, a preconditioner that changes on the way makes less.
            if not first:
                operator.tell(self.known.secants)
            step, rest, pulled = operator.solve_on_span(here.rho)
            gained = float(torch.linalg.vecdot(step, here.rho).sum())
            if not gained > (digits**2) * float(torch.linalg.vecdot(here.q, here.v).sum().abs()):
                break
            here.q, here.rho, here.pulled = here.q + step, rest, here.pulled + pulled
            here.changes.append(float(pulled.norm()))
            self._see_pull(here)
        operator.tell(self.known.secants)
        return ended

    def _followed_enough(self, here: _Here, *, first: bool) -> bool:
        if first:
            small = len(here.changes) > 2 and max(here.changes[-2:]) <= _FIRST_FOLLOWED * float(here.gradient.norm())
            return small and here.left <= _FIRST_FOLLOWED * float(here.v.norm())
        return self._linear_share(here) <= self._linear_allowed(here)

    def _refine(self, here: _Here) -> _Here | Status:
        """Return the next φ, by a step of Newton's method solved for as far as it should be, or by the inner solver."""
        size = here.size
        outcome = self._linear(here, here.residual, self._inner_aim(here) / size)
        self.inner_steps = self.inner_steps + outcome.iterations.cpu()
        bad = _worst(outcome.status)
        if bad in (Status.NOT_FINITE, Status.INDEFINITE, Status.SINGULAR):
            return bad
        promised = outcome.residual
        guess = self.known.secants.guess(promised)
        # The gradient at the next φ tells what the guess is worth, and is wanted anyway.
        for step in (outcome.x + guess, outcome.x) if bool((guess != 0).any()) else (outcome.x,):
            there = self._follow(here, here.x - step)
            if there.size <= _PROGRESS * size:
                break
        length = float(step.norm())
        if math.isfinite(there.size) and length > 0:
            # What is not the linear solve's, nor the guess's; below that it is rounding, or too small to matter.
            bend = max(0.0, there.size - 2 * float(promised.norm())) / length**2
            self.known.curvature = max(self.known.curvature, bend)
        if not there.size <= _PROGRESS * size:
            # At the end of the dtype's digits, or too far away for Newton's method.
            if bool((here.residual.norm(dim=-1) <= 4 * rounding(self.lower, here.x, here.residual)).all()):
                return Status.STAGNATED
            moved, _ = self._descend(here.x)
            there = self._follow(here, moved)
            if not there.size <= _PROGRESS * size:
                return Status.STAGNATED
            length = float((moved - here.x).norm())
        self._see_slope(here, there, length)
        change = abs(float(here.corrected - there.corrected))
        self.known.value_bend = max(self.known.value_bend, change / (self.known.nu * size) ** 2)
        return there

    def _linear(self, here: _Here, rhs: torch.Tensor, reduction: float, most: int | None = None) -> LinearOutcome:
        """Solve H x = ``rhs`` to ``reduction`` of it, or by the ``most`` steps of conjugate gradients, conjugate to all before."""
        solver, recorded, secants = self.choose(here.operator), here.operator, self.known.secants
        assert isinstance(recorded, RecordedOperator)
        if isinstance(solver, CG):
            solver = solver if most is None else replace(solver, max_steps=most)
            if solver.preconditioner is None:
                guided = secants if most is None else (lambda r: recorded.conjugate(secants(r)))
                solver = replace(solver, preconditioner=guided)
        known, rest = recorded.on_span(rhs) if isinstance(solver, CG) else (torch.zeros_like(rhs), rhs)
        size, left = float(rhs.norm()), float(rest.norm())
        relative = (
            1.0 if left <= reduction * size else max(min(reduction * size / left, 0.9), torch.finfo(rhs.dtype).eps)
        )
        # Of q the joint pass tells the true residual, and of s the gradient at the next φ.
        outcome = solve_linear(solver, here.operator, rest, Target(relative=relative, asked=True), verify=False)
        outcome = replace(outcome, x=known + outcome.x)
        if most is None:
            recorded.tell(self.known.secants)
        if size > 0:
            self.known.nu = max(self.known.nu, float(outcome.x.norm()) / size, self.known.secants.softest)
        return outcome

    # What the error is made of

    def _caution(self, here: _Here, numbers: int) -> float:
        return _SAFETY * (1 + _DOUBT / max(1, numbers, here.direct.numel()))

    def _inner_share(self, here: _Here) -> float:
        """Return the model's part of the inner residual; before S is known, the error is taken to be of the size of ĝ."""
        known = self.known
        # What a step leaves lies in softer directions than the step, where S may be larger: one look is not enough to trust.
        caution = self._caution(here, known.numbers) + _SAFETY / max(1, known.looks)
        if not known.slope:
            if self.looked:
                return 0.0
            return caution * float(here.gradient.norm()) * here.size / self.first if self.first else 0.0
        return caution * known.inner_doubt * known.slope * known.nu * here.size

    def _linear_share(self, here: _Here) -> float:
        known = self.known
        norms = known.pull * known.nu
        share = self._caution(here, known.pulls) * norms * here.left
        if len(here.changes) > 1:
            caution = self._caution(here, here.direct.numel() * len(here.changes))
            slack = norms * (_CHANCE * here.left + 4 * torch.finfo(here.x.dtype).eps * float(here.v.norm()))
            # Of a problem whose products are exhausted the last changes say nothing, and the residual all.
            share = min(share, caution * max(here.changes[-_LAST:]) + slack)
        return known.linear_doubt * share

    def _allowed(self, here: _Here) -> float:
        return self.tolerance.allowed(float(here.gradient.norm()))

    def _spoiled(self, here: _Here) -> bool:
        """Whether φ has to move in any case, and ρ does not hide yet what that does to ĝ: the adjoint can wait."""
        return self.known.slope > 0 and self._inner_share(here) > max(self._allowed(here), self._linear_share(here))

    def _adjoint_aim(self, here: _Here) -> float:
        """Return the ‖ρ‖ to reach: half of what is allowed, what the inner residual leaves of it, or would spoil anyway."""
        share = self._linear_share(here)
        if not share > 0:
            return _FIRST_ADJOINT * float(here.v.norm())
        return here.left * self._linear_allowed(here) / share

    def _linear_allowed(self, here: _Here) -> float:
        allowed, inner = self._allowed(here), self._inner_share(here)
        return max(0.5 * _MARGIN * allowed, _MARGIN * (allowed - inner), 0.3 * inner)

    def _inner_aim(self, here: _Here) -> float:
        """Return the ‖∇G‖ that a step is to lead to."""
        known, size = self.known, here.size
        share = self._inner_share(here)
        aim = size * 0.5 * _MARGIN * self._allowed(here) / share if share > 0 else size
        # What G bends off its quadratic model along the step is left in any case.
        bend = known.curvature * (known.nu * size) ** 2
        # Where the adjoint that follows a step is ended to the product, a step that was too short costs less.
        first = _FIRST_FOLLOWED_REDUCTION if isinstance(here.operator, JointOperator) else _FIRST_REDUCTION
        floor = _MOST_REDUCTION * size if known.slope else first * self.first
        return min(max(aim, bend, floor), 0.3 * size)

    def _judge(self, here: _Here) -> Bound:
        inner, linear = self._inner_share(here), self._linear_share(here)
        estimate = Bound(inner + linear if self._seen(here) else math.inf, Basis.ESTIMATED, inner, linear)
        allowed = self._allowed(here)
        if self.tolerance.estimates or estimate.value > allowed:
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

    def _see_slope(self, here: _Here, there: _Here, length: float) -> None:
        """Measure S once the adjoint there is as good as it is going to be: the change of ĝ that the step made."""
        if not length > 0:
            return
        self._solve_adjoint(there)
        # By a step in the last half of the digits the rest of the adjoint's error changes ĝ more than the step does: look aside for that.
        if length > torch.finfo(here.x.dtype).eps ** 0.5 * (1 + float(here.x.norm())) or self._seen(here):
            self._measure(here, there, length)

    def _seen(self, here: _Here) -> bool:
        """Whether it is known what ∇G's norm does to ĝ."""
        return self.known.slope > 0 or self.looked or here.size == 0

    def _look_aside(self, here: _Here) -> bool:
        """Measure S by a step that leads nowhere, where φ came to the last digits before a step could show it."""
        generator = torch.Generator().manual_seed(0)
        signs = (torch.randint(0, 2, here.x.shape, generator=generator) * 2 - 1).to(here.x)
        step = torch.finfo(here.x.dtype).eps ** (1 / 3) * (1 + here.x.abs()) * signs
        there = self._with(self._at(here.x + step), here.q)
        turn = there.rho - here.rho  # with as much of ρ left as here, the difference is the step's alone
        if bool((turn != 0).any()):
            outcome = self._linear(there, turn, _FIRST_REDUCTION)
            self.linear_steps = self.linear_steps + outcome.iterations.cpu()
            self._with(there, here.q + outcome.x)
        self._measure(here, there, float(step.norm()))
        return self.looked

    def _measure(self, here: _Here, there: _Here, length: float) -> None:
        change = float((there.gradient - here.gradient).norm())
        if not math.isfinite(change):
            return
        self.looked = True
        self.known.slope = max(self.known.slope, change / length)
        self.known.numbers += here.direct.numel()
        self.known.looks += 1

    def _impossible(self, here: _Here) -> Status | None:
        finite = torch.isfinite(here.residual).all() & torch.isfinite(here.v).all() & torch.isfinite(here.values).all()
        return None if bool(finite) else Status.NOT_FINITE

    def _end(self, here: _Here, bound: Bound, status: Status, rounds: int) -> Reached:
        report = GoalReport(self.tolerance, status, bound.value, self._allowed(here), bound.basis, rounds)
        distance = self.known.nu * here.size
        slack = self.known.value_bend * distance**2 + here.left * distance / max(1, here.x.shape[0])
        return Reached(
            here.x, here.q, here.residual, here.v, here.rho, here.gradient, here.values, self.lower.system.batch_shape,
            self.inner_steps, self.linear_steps,
            bound, self._caution(here, self.known.numbers) * slack, report, self.known,
        )  # fmt: skip

    # Passes

    def _slopes(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return F (K,), ∇_φF (K, n) and the sum of the problems' ∇_θF (p,): one pass."""
        upper = self.upper
        with torch.enable_grad():
            point = x.detach().requires_grad_(True)
            leaves = [
                t.detach().requires_grad_(True) if w else t for t, w in zip(upper.tensors, self.wanted, strict=True)
            ]
            values = self.outputs(point.reshape(*upper.system.batch_shape, upper.size), *leaves)
            chosen = [leaf for leaf, w in zip(leaves, self.wanted, strict=True) if w]
            if not values.requires_grad:
                return (
                    values.detach().reshape(-1),
                    torch.zeros_like(x),
                    torch.cat([c.detach().reshape(-1) for c in chosen]) * 0,
                )
            slopes = torch.autograd.grad(values.sum(), [point, *chosen], allow_unused=True, materialize_grads=True)
        return values.detach().reshape(-1), slopes[0], torch.cat([part.reshape(-1) for part in slopes[1:]]).to(x)

    def _joint(self, linear: Linearization, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return H q (K, n) and the sum of the problems' Bᵀq (p,): one pass."""
        product, parts = linear.pull(q)
        return product, self._flat(parts)

    def _flat(self, parts: Sequence[torch.Tensor | None]) -> torch.Tensor:
        return torch.cat([part.reshape(-1) for part in parts if part is not None])


def _worst(status: torch.Tensor) -> Status | None:
    """Return a failure among the statuses that no further step makes good, or None."""
    for code in _BAD:
        if bool((status == code).any()):
            return code
    return None
