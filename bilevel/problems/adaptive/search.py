"""Take the inner and the linear solve as far as a wanted accuracy of the hypergradient needs, and no further.

One round, at φ with an adjoint q from the round before:

1. linearise at φ; one joint pass gives H q and Bᵀq, and so the residual ρ = ∇F − H q and ĝ;
2. if ρ accounts for more than its share of the error, solve H d = ρ as far as it should go, q ← q + d, and a joint pass again. Where G is
   quadratic and θ few numbers every product of that solve is a joint pass, ĝ is known after each, and it ends on the changes of ĝ;
3. stop if ‖ĝ − g‖ is small enough; else solve H s = ∇G, as far as it should go, and φ ← φ − s.

The inner solver makes the first stretch alone, to where Newton's method can take over; from there the linear solver does both solves,
which costs √κ where descent costs κ, and neither is ever begun again. Between the two lies a step to where the solver's gradients, all of them
together, point for a quadratic G: the linearisation, which has to be made, may as well be made there. What one solve learns of H⁻¹
preconditions the next (:mod:`bilevel.problems.adaptive.quasi_newton`). No solve verifies its residual by a product of its own. Decisions and reports
rest on the joint passes and on the gradient at the next φ. Each of these passes also tries a step that the preconditioner guesses.

How far is far enough a running model of the error tells (:mod:`bilevel.problems.adaptive.error_model`), and where it may not decide, the certificate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from bilevel.certificates.bound import Bound
from bilevel.equations.linearization import Linearization
from bilevel.equations.problem import Problem
from bilevel.linear._base import LinearSolver, solve_linear
from bilevel.linear._solution import LinearOutcome
from bilevel.linear.cg import CG
from bilevel.operators import HessianOperator, LinearOperator
from bilevel.problems.adaptive.error_model import ErrorModel, Iterate
from bilevel.problems.adaptive.quasi_newton import JointOperator, RecordedOperator, RecordingProblem
from bilevel.problems.adaptive.state import GoalReport, SearchResult, SearchState
from bilevel.reports import Basis, Status
from bilevel.solvers._base import InnerSolver
from bilevel.solvers._error import rounding
from bilevel.solvers._judge import solve_inner
from bilevel.tolerance import Target, Tolerance

__all__ = ["Search"]

_MOST_ROUNDS = 60
# The inner solver's own stretch: a tenth of the first residual is where Newton's method takes over at the least cost.
_CRUDE = 0.1
# So few numbers θ, and no more than a quarter of φ's, that Bᵀp costs next to nothing beside H p.
_FEW = 8
# How far H is solved for where only a difference is wanted.
_ASIDE = 1e-2
# How often the inner solver goes on where the linear solver or Newton's method cannot, and how far but for the last time: then to full accuracy.
_MOST_STRETCHES, _STRETCH = 4, 1e-2
# A step that leaves more of the residual than this was no step of Newton's method near a solution.
_PROGRESS = 0.7
# What a point nearer to a minimum may cure.
_CURABLE = (Status.INDEFINITE, Status.SINGULAR, Status.NOT_FINITE, Status.BREAKDOWN, Status.DIVERGED)
_BAD = (Status.INDEFINITE, Status.NOT_FINITE, Status.SINGULAR, Status.DIVERGED, Status.BREAKDOWN)


class Search:
    """Return φ, q and ĝ with ‖ĝ − g‖ as small as ``tolerance`` asks, by :meth:`run`.

    Parameters
    ----------
    lower, upper
        G and F.
    needs_grad
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
        needs_grad: Sequence[bool],
        solver: InnerSolver,
        linear_solver: Callable[[LinearOperator], LinearSolver],
        tolerance: Tolerance,
        known: SearchState | None,
        certify: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Bound],
        outputs: Callable[..., torch.Tensor] | None = None,
    ) -> None:
        self.lower = RecordingProblem(lower.system, lower.tensors)
        self.upper, self.needs_grad = upper, list(needs_grad)
        self.outputs = outputs or upper.system.outputs
        self.solver, self.choose = solver, linear_solver
        self.cold = known is None or known.slope == 0
        self.known = SearchState() if known is None else known
        self.model = ErrorModel(tolerance, self.known, certify)
        zeros = torch.zeros(lower.batch, dtype=torch.int64)
        self.inner_steps, self.linear_steps = zeros, zeros
        self._stretches = 0
        self._inner: Status | None = None  # how the inner solver ended, once it went to full accuracy

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
            stuck = False if self.model.poisoned(here) else self._solve_adjoint(here)
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
                # What is left is the linear residual's: go on with that, unless rounding keeps it up.
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
        """Let the inner solver make its stretch, and take the step beyond it that its gradients point to: the next pass tells its worth."""
        end, residual = self._descend(x)
        step, rest = self.known.secants.fit(residual)
        size = float(residual.norm())
        here = self._enter(end - step, q) if float(rest.norm()) < size else self._enter(end, q)
        if not here.size <= size:
            here = self._enter(end, q)
        self.model.first = size
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

    def _hand_back(self, here: Iterate, status: Status) -> Iterate | Status:
        """Let the inner solver go on where ``status`` stopped the other solves, at last to full accuracy; return ``status`` once it has.

        What was learned before belongs to another region, in which G need not even be convex.
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
        """Return the linearisation at x, with the adjoint from before and a guess of what ∇F's change makes of it."""
        here = self._at(x)
        return self._with(here, before.q + self.known.secants.guess(here.v - before.v + before.rho))

    def _at(self, x: torch.Tensor) -> Iterate:
        linear = self.lower.linearize(x, self.needs_grad)
        values, v, direct = self._slopes(x)
        return Iterate(
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

    def _with(self, here: Iterate, q: torch.Tensor) -> Iterate:
        """Set q, and with it ρ and Bᵀq: one pass of ⟨∇G, q⟩ gives H q and Bᵀq both."""
        here.q, here.changes = q, []
        if not bool((q != 0).any()):
            return here
        product, here.pulled = self._joint(here.linear, q)
        here.rho = here.v - product
        self.model.see_pull(here)
        return here

    def _solve_adjoint(self, here: Iterate) -> Status | bool:
        """Bring ρ down to its share of the error; return what stopped that, or whether rounding keeps it above its share."""
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
            # The joint pass tells what the guess is worth, and comes anyway.
            step = outcome.x + self.known.secants.guess(outcome.residual) if ahead else outcome.x
            self._with(here, here.q + step)
            want = max(want, self.model.adjoint_aim(here)) if self.known.nu else want
            if here.left > 0.5 * left:  # no progress: a bad guess, rounding, or a solver without one
                if not ahead:
                    return here.left > 1.01 * want
                ahead = False
        return True

    def _follow_changes(self, here: Iterate, operator: JointOperator) -> Status | bool | None:
        """Go on with the adjoint product by product, as long as ĝ changes by more than its share; None where rounding ends that.

        A product more tells what ĝ is for the best q on the span of them all, and no pass is needed to verify it. The last
        changes are what is left, up to a small factor (Golub & Strakoš, "Estimates in quadratic formulas", 1994).
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
            # The first time, of the inner solver's differences, a preconditioner that changes on the way makes less.
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
        """Return the next φ, by a step of Newton's method solved for as far as it should be, or by the inner solver."""
        size = here.size
        outcome = self._linear(here, here.residual, self.model.inner_aim(here) / size)
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
                return self._hand_back(here, Status.STAGNATED)
            length = float((moved - here.x).norm())
        self._see_slope(here, there, length)
        change = abs(float(here.corrected - there.corrected))
        self.known.value_bend = max(self.known.value_bend, change / (self.known.nu * size) ** 2)
        return there

    def _linear(self, here: Iterate, rhs: torch.Tensor, reduction: float, most: int | None = None) -> LinearOutcome:
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

    def _see_slope(self, here: Iterate, there: Iterate, length: float) -> None:
        """Measure S once the adjoint there is as good as it is going to be: the change of ĝ that the step made."""
        if not length > 0:
            return
        self._solve_adjoint(there)
        # By a step in the last half of the digits the rest of the adjoint's error changes ĝ more than the step does: look aside for that.
        if length > torch.finfo(here.x.dtype).eps ** 0.5 * (1 + float(here.x.norm())) or self.model.seen(here):
            self.model.measure(here, there, length)

    def _look_aside(self, here: Iterate) -> bool:
        """Measure S by a step that leads nowhere, where φ came to the last digits before a step could show it."""
        generator = torch.Generator().manual_seed(0)
        signs = (torch.randint(0, 2, here.x.shape, generator=generator) * 2 - 1).to(here.x)
        step = torch.finfo(here.x.dtype).eps ** (1 / 3) * (1 + here.x.abs()) * signs
        there = self._with(self._at(here.x + step), here.q)
        turn = there.rho - here.rho  # with as much of ρ left as here, the difference is the step's alone
        if bool((turn != 0).any()):
            outcome = self._linear(there, turn, _ASIDE)
            self.linear_steps = self.linear_steps + outcome.iterations.cpu()
            self._with(there, here.q + outcome.x)
        self.model.measure(here, there, float(step.norm()))
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
        return SearchResult(
            here.x, here.q, here.residual, here.v, here.rho, here.gradient, here.values, self.lower.system.batch_shape,
            self.inner_steps, self.linear_steps,
            bound, self.model.caution(here, self.known.numbers) * slack, report, self.known,
        )  # fmt: skip

    # Passes

    def _slopes(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return F (K,), ∇_φF (K, n) and the sum of the problems' ∇_θF (p,): one pass."""
        upper = self.upper
        with torch.enable_grad():
            point = x.detach().requires_grad_(True)
            leaves = [
                t.detach().requires_grad_(True) if w else t for t, w in zip(upper.tensors, self.needs_grad, strict=True)
            ]
            values = self.outputs(point.reshape(*upper.system.batch_shape, upper.size), *leaves)
            chosen = [leaf for leaf, w in zip(leaves, self.needs_grad, strict=True) if w]
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
