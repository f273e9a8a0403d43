"""The search: run the inner and the linear solve as far as the goal for the hypergradient needs, and no further.

One round, at φ with the adjoint q of the round before:

1. Linearise at φ. One joint pass gives H q and Bᵀq, and so the residual ρ = ∇F − H q and ĝ.
2. If ρ causes more than its share of the error, solve H d = ρ to the accuracy needed, set q ← q + d, and make a joint pass again. If G is
   quadratic and θ has few numbers, every product of this solve is a joint pass. Then ĝ is known after each, and the solve ends when ĝ hardly changes.
3. Stop if ‖ĝ − g‖ is small enough. Otherwise solve H s = ∇G to the accuracy needed, and set φ ← φ − s.

The inner solver begins, until Newton's method can take over. From there the linear solver does both solves, which costs √κ products where
descent costs κ gradients. No solve begins anew. One quasi-Newton step, from all gradients of the inner solver, precedes the first linearisation.
The products of one solve precondition the next (:mod:`bilevel.problems.adaptive.quasi_newton`). No solve verifies its residual by a product of its
own: decisions and reports use the joint passes and the gradient at the next φ. Each of these passes also tries a step that the
preconditioner proposes.

An error model tells the accuracy needed (:mod:`bilevel.problems.adaptive.error_model`). If only a proof may decide, the certificate
has the last word.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from bilevel.certificates.bound import Bound
from bilevel.equations.linearization import Linearization
from bilevel.equations.problem import Problem
from bilevel.linear._base import LinearSolver, solve_linear
from bilevel.linear._solution import LinearOutcome
from bilevel.linear.cg import CG
from bilevel.operators import HessianOperator, LinearOperator
from bilevel.problems.adaptive.error_model import ErrorModel
from bilevel.problems.adaptive.iterate import Iterate, Objectives
from bilevel.problems.adaptive.quasi_newton import JointOperator, RecordedOperator, RecordingProblem
from bilevel.problems.adaptive.state import GoalReport, SearchResult, SearchState
from bilevel.problems.definition import OuterTensors
from bilevel.reports import Basis, Status
from bilevel.solvers._base import InnerSolver
from bilevel.solvers._error import irregular_signs, rounding
from bilevel.solvers._judge import solve_inner
from bilevel.tolerance import Target, Tolerance

__all__ = ["Search"]

_MOST_ROUNDS = 60
# The inner solver begins, until its residual is this part of the first one. The whole search then costs least.
_CRUDE = 0.1
# The largest number of outer variables for which Bᵀp costs next to nothing beside H p. They may also be no more than a quarter of φ's.
_FEW = 8
# The relative residual of a solve that is needed for a difference only.
_ASIDE = 1e-2
# How often the inner solver continues after the linear solver or Newton's method failed, and the reduction of its residual each time. The last
# time it goes to full accuracy.
_MOST_STRETCHES, _STRETCH = 4, 1e-2
# Near a solution, a step of Newton's method leaves less of the residual than this part.
_PROGRESS = 0.7
# The failures that may not occur at a point nearer to a minimum.
_CURABLE = (Status.INDEFINITE, Status.SINGULAR, Status.NOT_FINITE, Status.BREAKDOWN, Status.DIVERGED)
_BAD = (Status.INDEFINITE, Status.NOT_FINITE, Status.SINGULAR, Status.DIVERGED, Status.BREAKDOWN)


class Search:
    """The search for φ, q and ĝ with ‖ĝ − g‖ as small as ``tolerance`` asks; :meth:`run` it.

    Parameters
    ----------
    lower, upper
        G and F.
    outer
        Which of the problems' tensors are θ.
    solver
        The inner solver. It begins a first call, and continues where Newton's method fails.
    linear_solver
        Returns the linear solver for an operator. Conjugate gradients without a preconditioner receive one.
    tolerance
        The goal.
    known
        The state of an earlier call, which is changed; None for a first call.
    certify
        (φ, q, ĝ, corrected value) ↦ the certificate's bound.
    outputs
        (φ, *tensors) ↦ F; it may also check F.
    """

    def __init__(
        self,
        lower: Problem,
        upper: Problem,
        outer: OuterTensors,
        solver: InnerSolver,
        linear_solver: Callable[[LinearOperator], LinearSolver],
        tolerance: Tolerance,
        known: SearchState | None,
        certify: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Bound],
        outputs: Callable[..., torch.Tensor],
    ) -> None:
        self.lower = RecordingProblem(lower.system, lower.tensors, replays=lower.replays)
        self.objectives = Objectives(self.lower, upper, outer, outputs)
        self.solver, self.choose = solver, linear_solver
        self.cold = known is None or known.slope == 0
        self.known = SearchState() if known is None else known
        self.model = ErrorModel(tolerance, self.known, certify)
        zeros = torch.zeros(lower.batch, dtype=torch.int64)
        self.inner_steps, self.linear_steps = zeros, zeros
        self._stretches = 0
        self._inner: Status | None = None  # the status of the inner solver, once it went to full accuracy

    def run(self, x: torch.Tensor, q: torch.Tensor | None) -> SearchResult:
        """Begin at φ = x (K, n) and the adjoint q (K, n), or None."""
        before = replace(self.known)
        self.known.discount()
        here = self._begin(x, q) if self.cold else self._enter(x, q)
        reason = self._impossible(here)
        rounds = 0
        bound = Bound(math.inf, Basis.ESTIMATED)
        while reason is None:
            rounds += 1
            stuck = False if self.model.adjoint_can_wait(here) else self._solve_adjoint(here)
            if isinstance(stuck, Status):
                there = self._hand_back(here, stuck)
                if isinstance(there, Status):
                    reason = there
                else:
                    here = there
                continue
            bound = self.model.judge(here)
            allowed = self.model.allowed(here)
            if bound.value <= allowed:
                reason = Status.CONVERGED
            elif rounds >= _MOST_ROUNDS or self.model.exhausted:
                reason = Status.STAGNATED
            elif self.model.seen(here) and not self.model.inner_share(here) > 0.5 * allowed:
                # The rest of the error comes from the linear solve. Continue it, unless rounding stops it.
                reason = Status.STAGNATED if stuck else None
            else:
                there = self._refine(here)
                if there is Status.STAGNATED and not self.model.seen(here) and self._look_aside(here):
                    continue
                if isinstance(there, Status):
                    reason = there
                    bound = self.model.judge(here)
                    if bound.value <= self.model.allowed(here):
                        reason = Status.CONVERGED
                    elif there in _CURABLE:
                        there = self._hand_back(here, there)
                        here, reason = (here, there) if isinstance(there, Status) else (there, None)
                else:
                    here = there
        self.known.age(before, stepped=bool(self.inner_steps.any()), solved=bool(self.linear_steps.any()))
        return self._end(here, bound, reason, rounds)

    # The rounds

    def _begin(self, x: torch.Tensor, q: torch.Tensor | None) -> Iterate:
        """Run the inner solver, then take one quasi-Newton step from its gradients. The step is undone if it makes ‖∇G‖ larger."""
        end, residual = self._descend(x)
        step, rest = self.known.secants.fit(residual)
        size = float(residual.norm())
        here = self._enter(end - step, q) if float(rest.norm()) < size else self._enter(end, q)
        if not here.size <= size:
            here = self._enter(end, q)
        self.model.first = size
        return here

    def _descend(self, x: torch.Tensor, reduction: float = _CRUDE) -> tuple[torch.Tensor, torch.Tensor]:
        """Let the inner solver reduce ‖∇G‖ by the factor ``reduction`` from x; return its last iterate, and ∇G there."""
        residual = self.lower.residual(x)
        size = float(residual.norm())
        if not size > 0 or not math.isfinite(size):
            return x, residual
        goal = Target(absolute=reduction * size / self.lower.batch**0.5, asked=True)
        outcome = solve_inner(self.solver, self.lower, x, goal)
        self.lower.tell(self.known.secants)
        self.inner_steps = self.inner_steps + outcome.iterations.cpu()
        return outcome.x, outcome.residual

    def _hand_back(self, here: Iterate, status: Status) -> Iterate | Status:
        """Let the inner solver continue after ``status`` stopped the other solves; return ``status`` if it has done so too often.

        The state is reset: it belongs to another region, in which G need not be convex.
        """
        if self._stretches >= _MOST_STRETCHES:
            return status
        self._stretches += 1
        self.known.reset()
        if self._stretches < _MOST_STRETCHES:
            x, _ = self._descend(here.x, _STRETCH)
        else:
            goal = Tolerance(strong_convexity=self.model.tolerance.strong_convexity).inner(here.x.dtype)
            outcome = solve_inner(self.solver, self.lower, here.x, replace(goal, asked=True))
            self.lower.tell(self.known.secants)
            self.inner_steps = self.inner_steps + outcome.iterations.cpu()
            failed = outcome.status[outcome.status != Status.CONVERGED]
            self._inner, x = Status(int(failed[0])) if len(failed) else Status.CONVERGED, outcome.x
        there = self._at(x)
        return status if self._impossible(there) else there

    def _enter(self, x: torch.Tensor, q: torch.Tensor | None) -> Iterate:
        here = self._at(x)
        if math.isnan(self.model.first):
            self.model.first = here.size
        return here if q is None else self._with(here, q)

    def _follow(self, before: Iterate, x: torch.Tensor) -> Iterate:
        """Return the iterate at x. Its adjoint is that of ``before``, plus a guess of the change that the new ∇F causes."""
        here = self._at(x)
        return self._with(here, before.q + self.known.secants.guess(here.v - before.v + before.rho))

    def _at(self, x: torch.Tensor) -> Iterate:
        here = self.objectives.at(x)
        here.operator = self._recorded(here.linear, here.direct.numel())
        return here

    def _recorded(self, linear: Linearization, outer: int) -> RecordedOperator:
        """Return H as an operator that keeps its products.

        With each product H p it computes Bᵀp too, if θ has few numbers (``outer``) and H seems constant. Following ĝ takes less caution, for which
        a single step shows too little of an H that changes.
        """
        few = (
            self.known.secants.constant
            and outer <= min(_FEW, linear.operator.size // 4)
            and linear.operator.batch == 1
            and isinstance(self.choose(linear.operator), CG)
        )
        if few and (linear.replayed is not None or isinstance(linear.operator, HessianOperator)):
            return JointOperator(linear.operator, lambda v: self.objectives.joint(linear, v))
        return RecordedOperator(linear.operator)

    def _with(self, here: Iterate, q: torch.Tensor) -> Iterate:
        """Set q, and with it ρ and Bᵀq."""
        if bool((q != 0).any()):
            self.objectives.set_adjoint(here, q)
            self.model.see_pull(here)
        return here

    def _solve_adjoint(self, here: Iterate) -> Status | bool:
        """Reduce ρ to its share of the error; return the status of a failure, or else whether rounding keeps ρ above its share."""
        if self.known.slope and self.model.inner_share(here) + self.model.linear_share(here) <= self.model.allowed(
            here
        ):
            return False
        if isinstance(here.operator, JointOperator):
            followed = self._follow_changes(here, here.operator)
            if followed is not None:
                return followed
        want, ahead = self.model.adjoint_aim(here), True
        for _ in range(_MOST_ROUNDS):
            left = here.left
            if left <= want or left == 0:
                return False
            outcome = self._linear(here, here.rho, want / left)
            self.linear_steps = self.linear_steps + outcome.iterations.cpu()
            bad = _worst(outcome.status)
            if bad is not None:
                return bad
            # The joint pass, which is needed anyway, shows whether the guess is good.
            step = outcome.x + self.known.secants.guess(outcome.residual) if ahead else outcome.x
            self._with(here, here.q + step)
            want = max(want, self.model.adjoint_aim(here)) if self.known.nu else want
            if here.left > 0.5 * left:  # no progress: the guess was bad, or rounding or the solver stops it
                if not ahead:
                    return here.left > 1.01 * want
                ahead = False
        return True

    def _follow_changes(self, here: Iterate, operator: JointOperator) -> Status | bool | None:
        """Improve the adjoint product by product, until ĝ changes by less than its share; return None where rounding ends this.

        After each product, ĝ is that of the best q in the span of all vectors multiplied so far. No pass verifies it. The last changes are the error
        that is left, up to a small factor (Golub & Strakoš, "Estimates in quadratic formulas", 1994).
        """
        first, digits = not self.known.pull, torch.finfo(here.x.dtype).eps
        ended: Status | bool | None = None
        for _ in range(max(100, 2 * operator.size)):
            if here.left == 0 or self.model.followed_enough(here, first=first):
                ended = False
                break
            outcome = self._linear(here, here.rho, digits, most=1)
            self.linear_steps = self.linear_steps + outcome.iterations.cpu()
            ended = _worst(outcome.status)
            if ended is not None:
                break
            # In the first solve the pairs are the inner solver's, and a preconditioner that changes on the way takes fewer products.
            if not first:
                operator.tell(self.known.secants)
            step, rest, pulled = operator.solve_on_span(here.rho)
            gained = float(torch.linalg.vecdot(step, here.rho).sum())
            if not gained > (digits**2) * float(torch.linalg.vecdot(here.q, here.v).sum().abs()):
                break
            here.q, here.rho, here.pulled = here.q + step, rest, here.pulled + pulled
            here.changes.append(float(pulled.norm()))
            self.model.see_pull(here)
        operator.tell(self.known.secants)
        return ended

    def _refine(self, here: Iterate) -> Iterate | Status:
        """Return the next iterate, by a step of Newton's method or by the inner solver."""
        size = here.size
        outcome = self._linear(here, here.residual, self.model.inner_aim(here) / size)
        self.inner_steps = self.inner_steps + outcome.iterations.cpu()
        bad = _worst(outcome.status)
        if bad in (Status.NOT_FINITE, Status.INDEFINITE, Status.SINGULAR):
            return bad
        promised = outcome.residual
        guess = self.known.secants.guess(promised)
        # The gradient at the next φ, which is needed anyway, shows whether the guess is good.
        for step in (outcome.x + guess, outcome.x) if bool((guess != 0).any()) else (outcome.x,):
            there = self._follow(here, here.x - step)
            if there.size <= _PROGRESS * size:
                break
        length = float(step.norm())
        if math.isfinite(there.size) and length > 0:
            # The part of ∇G at the next φ that neither the linear solve nor the guess left. A smaller part is rounding, or does not matter.
            bend = max(0.0, there.size - 2 * float(promised.norm())) / length**2
            self.known.curvature = max(self.known.curvature, bend)
        if not there.size <= _PROGRESS * size:
            # Either rounding is the limit, or φ is too far from the solution for Newton's method.
            if bool((here.residual.norm(dim=-1) <= 4 * rounding(self.lower, here.x, here.residual)).all()):
                return Status.STAGNATED
            moved, _ = self._descend(here.x)
            there = self._follow(here, moved)
            if not there.size <= _PROGRESS * size:
                return self._hand_back(here, Status.STAGNATED)
            length = float((moved - here.x).norm())
        self._see_slope(here, there, length)
        change = abs(float(here.corrected - there.corrected))
        self.known.value_bend = max(self.known.value_bend, change / (self.known.nu * size) ** 2)
        return there

    def _linear(self, here: Iterate, rhs: torch.Tensor, reduction: float, most: int | None = None) -> LinearOutcome:
        """Solve H x = ``rhs`` to the relative residual ``reduction``, or make ``most`` steps of CG, conjugate to all earlier steps."""
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
        # No verification: the joint pass gives the true residual for q, and the gradient at the next φ that for s.
        outcome = solve_linear(solver, here.operator, rest, Target(relative=relative, asked=True), verify=False)
        outcome = replace(outcome, x=known + outcome.x)
        if most is None:
            recorded.tell(self.known.secants)
        if size > 0:
            self.known.nu = max(self.known.nu, float(outcome.x.norm()) / size, self.known.secants.softest)
        return outcome

    def _see_slope(self, here: Iterate, there: Iterate, length: float) -> None:
        """Measure S from the change of ĝ that a step of ``length`` made, after the adjoint ``there`` is solved for."""
        if not length > 0:
            return
        self._solve_adjoint(there)
        # After a very short step, the rest of the adjoint's error changes ĝ more than the step does. Then :meth:`_look_aside` measures.
        if length > torch.finfo(here.x.dtype).eps ** 0.5 * (1 + float(here.x.norm())) or self.model.seen(here):
            self.model.measure(here, there, length)

    def _look_aside(self, here: Iterate) -> bool:
        """Measure S by a step aside, if φ is known to the last digits before any step could show S; return whether it was measured."""
        step = torch.finfo(here.x.dtype).eps ** (1 / 3) * (1 + here.x.abs()) * irregular_signs(here.x)

        def solve(there: Iterate, rhs: torch.Tensor) -> torch.Tensor:
            outcome = self._linear(there, rhs, _ASIDE)
            self.linear_steps = self.linear_steps + outcome.iterations.cpu()
            return outcome.x

        self.model.look_aside(here, self._at(here.x + step), self.objectives, solve)
        return self.model.looked

    def _impossible(self, here: Iterate) -> Status | None:
        finite = torch.isfinite(here.residual).all() & torch.isfinite(here.v).all() & torch.isfinite(here.values).all()
        return None if bool(finite) else Status.NOT_FINITE

    def _end(self, here: Iterate, bound: Bound, status: Status, rounds: int) -> SearchResult:
        report = GoalReport(
            self.model.tolerance, status, bound.value, self.model.allowed(here), bound.basis, rounds, here.gradient.dtype,
            self._inner,
        )  # fmt: skip
        distance = self.known.nu * here.size
        slack = self.known.value_bend * distance**2 + here.left * distance / max(1, here.x.shape[0])
        error = self.model.caution(here, self.known.numbers) * slack
        return SearchResult(here, here.gradient, self.inner_steps, self.linear_steps, bound, error, report, self.known)


def _worst(status: torch.Tensor) -> Status | None:
    """Return a failure among the statuses, or None."""
    for code in _BAD:
        if bool((status == code).any()):
            return code
    return None
