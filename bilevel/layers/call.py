"""The solves of one call of a layer, forward and in every derivative: check, solve, judge, report, apply the policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from bilevel.equations.linearization import JointProduct
from bilevel.equations.problem import Problem
from bilevel.equations.pullbacks import Pullback
from bilevel.equations.structured import StructuredSystem, objective_of
from bilevel.errors import BilevelError, StochasticObjectiveError
from bilevel.layers.inspector import Inspection, Inspector
from bilevel.layers.messages import autocast_messages, derivative_messages, failure_messages
from bilevel.layers.randomness import CheckAfter
from bilevel.layers.settings import Adjoint, SolveSettings
from bilevel.linear._base import LinearSolver, solve_linear
from bilevel.linear._free_directions import (
    changes_free_directions,
    unsure_derivative_messages,
    without_derivative,
)
from bilevel.linear._solution import LinearOutcome
from bilevel.linear.defaults import default_linear_solver
from bilevel.linear.exact import offer_factor
from bilevel.operators import LinearOperator
from bilevel.policy import apply_policy, handle_misuse
from bilevel.recording import ACTIVE
from bilevel.replay import ReplayCache
from bilevel.reports import Pass, Proof, SolveReport, Status, StatusMessages
from bilevel.solvers._base import InnerSolver
from bilevel.solvers._error import rounding
from bilevel.solvers._given import GivenAnswer, check_answer, compared
from bilevel.solvers._judge import solve_inner
from bilevel.solvers._one_sided import Sides
from bilevel.solvers._outcome import InnerOutcome
from bilevel.solvers.defaults import default_solvers
from bilevel.tolerance import auto_relative

__all__ = ["SolveCall"]

# Two evaluations of R may differ by this many times its rounding.
_MORE_THAN_ROUNDING = 8.0
_RESIDUALS = {True: "a gradient", False: "a residual"}


class SolveCall:
    """One call of a layer: solves, judges, reports and applies the policy, forward and in every derivative.

    Parameters
    ----------
    settings
        The settings of the call.
    inspector
        Checks the function.
    written
        The function as the user wrote it.
    where
        The layer's name, for messages.
    watched
        Whether gradients are enabled.
    dtype
        The dtype that default accuracies refer to.
    functions
        The user's functions besides ``written``: those of a structure.
    """

    def __init__(
        self,
        settings: SolveSettings,
        inspector: Inspector,
        written: Callable[..., Any],
        where: str,
        watched: bool,
        dtype: torch.dtype,
        functions: tuple[Any, ...] = (),
    ) -> None:
        self.settings, self.inspector, self.where = settings, inspector, where
        self.written, self.functions = written, functions
        self.watched = watched
        self.dtype = dtype
        self.noun = ""  # what an unstructured problem's function is
        self.recordings = tuple(ACTIVE.stack)
        self.report: SolveReport | None = None
        self.replays: ReplayCache | None = None
        self.poisoned = False
        self.nan_mask: torch.Tensor | None = None  # (*batch,) bool: whose derivatives the policy wants to be NaN
        self.residual: torch.Tensor | None = None  # at the solution (batch, n), for who wants the adjoint
        self.found: tuple[torch.Tensor, torch.Tensor] | None = None  # R at x (batch, n), and the norm asked for
        self.factor: torch.Tensor | None = None
        self.one_step = False  # whether that is of the Hessians at init, and a step with them was the last
        self.last_rhs: torch.Tensor | None = None  # of this call's linear solves
        self.largest: torch.Tensor | None = None  # (batch,): the norm of the largest before that
        self.degenerate: torch.Tensor | None = None  # (*batch,) bool: whose derivative does not exist, or is one-sided
        self.sides: Sides | None = None  # for which losses it exists all the same
        self.messages: StatusMessages = {}  # of the forward solve
        self.reduced: LinearSolver | None = None  # made of what the forward solve has factorised
        self.system: StructuredSystem | None = None
        self.coarse: StatusMessages = {}  # for the rounding of autocast

    def inspect(
        self, problem: Problem, init: torch.Tensor, written: Any = None, *, again: bool = False
    ) -> Inspection | None:
        """Check for faults that make gradients wrong, at ``init`` (batch, n); return the result, or None after a fault."""
        if not problem.batch:
            return None
        try:
            if self.settings.inspect:
                written = self.written if written is None else written
                return self.inspector.inspect_once(problem, init, written, captures=self.watched, again=again)
        except BilevelError as error:
            # Wrong shapes and dtypes, and tensors of a vmap outside, cannot be gone on with.
            if isinstance(error, (ValueError, TypeError)) or error.__cause__ is not None:
                raise
            self.poisoned = handle_misuse(error, self.settings.on_failure)
        return None

    def solve(self, problem: Problem, init: torch.Tensor) -> torch.Tensor:
        """Return x (*batch, n): check the function, solve, judge, report and apply the policy."""
        if isinstance(problem.system, StructuredSystem):
            return self._find(problem, problem.system, init)
        self.noun = problem.system.noun
        settings = self.settings
        seen = self.inspect(problem, init)
        trusted = seen is not None and seen.found is None
        replays = None if seen is None else seen.replays
        if problem.batch and not settings.inspect:
            replays = self.inspector.reuse_inspection(problem, init, self.written, captures=self.watched)
        self.replays = replays
        problem = problem.replayed_from(replays)
        solver, others = (settings.solver, ()) if settings.solver is not None else default_solvers(problem)
        target = settings.tolerance.inner(self.dtype)
        with CheckAfter(init.device, lambda: self.inspect(problem, init, again=True)) if trusted else nullcontext():
            if isinstance(solver, GivenAnswer):
                outcome = check_answer(problem, init, target)
            else:
                outcome = solve_inner(solver, problem, init, target, others)
        outcome, messages = self.reviewed(solver, problem, init, outcome)
        return self._reported(problem, outcome, {**messages, **outcome.words}, silent=target.silent)

    def _find(self, problem: Problem, system: StructuredSystem, init: torch.Tensor) -> torch.Tensor:
        """Do the same for a structured system, which has its own solution method."""
        settings, self.system = self.settings, system
        objective = objective_of(problem)
        x, everything = init[:, : objective.size], (self.written, *self.functions)
        looks = self.inspect(objective, x), self.inspect(problem, init, everything)
        trusted = any(seen is not None and seen.found is None for seen in looks)
        replays = [None if seen is None else seen.replays for seen in looks]
        if problem.batch and not settings.inspect:
            replays = [
                self.inspector.reuse_inspection(objective, x, self.written, captures=self.watched),
                self.inspector.reuse_inspection(problem, init, everything, captures=self.watched),
            ]
        problem = problem.replayed_from(replays[1], objective.replayed_from(replays[0]))

        def again() -> None:
            self.inspect(objective, x, again=True)
            self.inspect(problem, init, everything, again=True)

        target = settings.tolerance.inner(self.dtype)
        with CheckAfter(init.device, again) if trusted else nullcontext():
            given = isinstance(settings.solver, GivenAnswer)
            outcome = system.find(problem, init, target, None if given else settings.solver)
            outcome = compared(outcome, x) if given else outcome
        if outcome.degenerate is not None:
            self.degenerate = outcome.degenerate.reshape(system.batch_shape)
        self.messages, self.reduced, self.sides = outcome.words, outcome.linear_solver, outcome.sides
        return self._reported(problem, outcome, self.messages, silent=target.silent)

    def _reported(
        self, problem: Problem, outcome: InnerOutcome, words: StatusMessages, *, silent: bool
    ) -> torch.Tensor:
        settings, system, axes = self.settings, problem.system, problem.batch_shape
        if system.autocast is not None:
            self.coarse = autocast_messages(system.autocast)
        self.one_step = outcome.factor is not None and (outcome.exact or bool((outcome.iterations <= 1).all()))
        if self.watched and not isinstance(system, StructuredSystem):
            self.found = outcome.residual, outcome.threshold
        self.factor = outcome.factor
        if settings.on_adjoint is not None:
            ordinary = system.ordinary if isinstance(system, StructuredSystem) else system
            self.residual = outcome.residual[:, : ordinary.raveler.size]
        self.report = _report_of(Pass.FORWARD, self.where, outcome.solver, outcome, axes, {**words, **self.coarse})
        x = outcome.x.reshape(*axes, problem.size)
        if _all_converged(outcome):
            return self._filed(self.report, x)
        self.nan_mask = ~self.report.success if settings.on_failure == "nan" else _without_solution(self.report)
        return apply_policy(self.report, x, settings.on_failure, self.recordings, silent_budget=silent)

    def _filed(self, report: SolveReport, x: torch.Tensor) -> torch.Tensor:
        """Return ``x`` of a solve in which all problems converged. Inside :func:`bilevel.record`, add the report."""
        recorded = self.recordings or ACTIVE.stack
        return apply_policy(report, x, self.settings.on_failure, self.recordings) if recorded else x

    def reviewed(
        self, solver: InnerSolver, problem: Problem, init: torch.Tensor, outcome: InnerOutcome
    ) -> tuple[InnerOutcome, StatusMessages]:
        """Return the outcome of an inner solve and its messages. Override it for a kind of problem that can tell more about a solution."""
        return outcome, {} if _all_converged(outcome) else failure_messages(solver, problem, init, outcome)

    def compare(self, problem: Problem, x: torch.Tensor, residual: torch.Tensor) -> None:
        """Compare ``residual``, R(x) (batch, n) in a derivative, with R at the same x in the forward pass.

        They differ by more than rounding if the function depends on a thing that has changed since, such as an attribute of an
        object.

        Raises
        ------
        StochasticObjectiveError
            If they do (policy ``"raise"``).
        """
        before, threshold = (None, None) if self.found is None else self.found
        if before is None or threshold is None or before.shape != residual.shape or torch.equal(before, residual):
            return
        changed = (residual - before).norm(dim=-1)
        eps = torch.finfo(x.dtype).eps
        # Below this threshold, a solution solves the changed problem too.
        doubtful = changed > eps**0.5 * before.norm(dim=-1) + threshold
        if bool(doubtful.any()):
            doubtful = doubtful & (changed > _MORE_THAN_ROUNDING * rounding(problem, x, residual))
        if not bool(doubtful.any()):
            return
        first = int(doubtful.nonzero()[0])
        error = StochasticObjectiveError(
            f"{self.where}: expected {problem.system.noun} to be the same function in a derivative as in the call, and at the solution "
            f"{_RESIDUALS[problem.minimizes]} of norm {float(before[first].norm()):.3g} became one of {float(residual[first].norm()):.3g}; the "
            "function uses an object that has changed: pass that object as an argument, or take the derivative before it changes"
        )
        if handle_misuse(error, self.settings.on_failure):
            lost = doubtful.reshape(problem.batch_shape)
            self.nan_mask = lost if self.nan_mask is None else self.nan_mask | lost

    def solve_linear(
        self,
        operator: LinearOperator,
        rhs: torch.Tensor,
        axes: tuple[int, ...],
        product: Callable[[torch.Tensor], torch.Tensor] | None = None,
        pullbacks: Callable[[], Sequence[Pullback]] = tuple,
        unsure: Sequence[Pullback] = (),
        reverse: bool = False,
    ) -> torch.Tensor:
        """Return A⁻¹ rhs (*axes, n): solve, judge, report and apply the policy.

        ``product``, v ↦ A v, is passed for the adjoint of a first derivative that is not differentiated again. ``reverse``: it is the adjoint of
        one that may be. ``pullbacks`` are made for any adjoint with a singular A: they tell whether the derivative exists. ``unsure`` are pullbacks
        to arguments that a transform computes: if one of them does not vanish, the report says that the derivative may not exist.
        """
        settings = self.settings
        if self.factor is not None:
            offer_factor(operator, self.factor, exact=self.one_step)
        on_adjoint = settings.on_adjoint if product is not None else None
        target, direction = settings.tolerance.linear(self.dtype), Pass.BACKWARD
        if self.report is None:  # a linear layer's own solve
            target, direction = settings.tolerance.inner(self.dtype), Pass.FORWARD
        solver = settings.linear_solver or self._own_solver(operator) or default_linear_solver(operator)
        reported = self.report is None or self.recordings or ACTIVE.stack or on_adjoint is not None
        begun = None if product is None else self._start(rhs)
        noise, name = self._noise(rhs), solver.name
        examinations = self.inspector.examinations
        known = target.silent or target.strong_convexity is not None or solver.knows_null_space
        examine = not known and examinations.is_due(operator)
        outcome = solve_linear(
            solver, operator, rhs, target, begun, product=product, seen=bool(reported), noise=noise, examine=examine
        )
        words: StatusMessages = {**settings.backward_messages, **self.coarse}
        if not _all_converged(outcome):
            examinations.learn(operator, outcome.status)
            outcome, words = without_derivative(operator, outcome, pullbacks, words)
            if unsure and bool(changes_free_directions(operator, outcome.status, unsure).any()):
                words = {**unsure_derivative_messages(), **words}
            if direction is Pass.BACKWARD:
                words = {**derivative_messages(outcome.status, rhs, self.noun, symmetric=operator.symmetric), **words}
        outcome, words = self._one_sided(operator, outcome, words, axes, reverse or product is not None)
        report = _report_of(direction, self.where, name, outcome, axes, words)
        self.report = self.report or report
        if on_adjoint is not None and self.residual is not None:
            on_adjoint(self._adjoint(self.residual, outcome, report, product))
        shaped = outcome.x.reshape(*axes, operator.size)
        if _all_converged(outcome):
            shaped = self._filed(report, shaped)
        else:
            shaped = apply_policy(report, shaped, settings.on_failure, self.recordings, silent_budget=target.silent)
        if self.nan_mask is None:
            return shaped
        # A quadratic has the same matrix at a NaN. Without this, a failed problem would get a finite derivative.
        # Axes that a transform has added since precede those of the forward pass.
        return torch.where(self.nan_mask.unsqueeze(-1), torch.full_like(shaped, float("nan")), shaped)

    def _adjoint(self, residual: torch.Tensor, outcome: LinearOutcome, report: SolveReport, product: Any) -> Adjoint:
        size = residual.shape[-1]  # of the unknown alone, without multipliers
        linearization = product.linearization if isinstance(product, JointProduct) else None
        x, rho = outcome.x[:, :size], outcome.residual[:, :size]
        return Adjoint(x, report, residual, linearization, rho, self.replays)

    def _own_solver(self, operator: LinearOperator) -> LinearSolver | None:
        """Return a structured system's own linear solver for derivatives, or None."""
        if self.system is None:
            return None
        if self.reduced is not None and self.reduced.serves(operator):
            return self.reduced
        return self.system.linear_solver(operator)

    def _start(self, rhs: torch.Tensor) -> torch.Tensor | None:
        """Return the initial guess of the linear solve for the right-hand side ``rhs`` (batch, n), or None."""
        kept = self.settings.adjoint_start
        fits = kept is not None and kept.shape == rhs.shape and bool(torch.isfinite(kept).all())
        return kept.to(rhs) if kept is not None and fits else None

    def _one_sided(
        self,
        operator: LinearOperator,
        outcome: LinearOutcome,
        words: StatusMessages,
        axes: tuple[int, ...],
        first: bool,
    ) -> tuple[LinearOutcome, StatusMessages]:
        """Return ``outcome`` with ``Status.DEGENERATE`` for the problems whose derivative does not exist or is one-sided."""
        if self.degenerate is None or Status.DEGENERATE not in self.messages:
            return outcome, words
        if _all_converged(outcome) and not bool(self.degenerate.any()):
            return outcome, words
        these = self.degenerate.expand(axes).reshape(outcome.status.shape)
        these = these & self.depends_on_side(operator, outcome.x, first=first)
        # Constraints with dependent gradients make the matrix singular if an argument moves them apart.
        these = these | (outcome.status == Status.SINGULAR)
        if not bool(these.any()):
            return outcome, words
        status = torch.where(these, int(Status.DEGENERATE), outcome.status)
        return replace(outcome, status=status), {**words, **self.messages}

    def depends_on_side(self, operator: LinearOperator, x: torch.Tensor, *, first: bool) -> torch.Tensor:
        """Return which solutions x (batch, n) of linear systems with ``operator`` at a degenerate solution differ from side to side, (batch,) bool.

        ``first``: it is the adjoint of a first derivative. Override it for a kind of problem that can tell.
        """
        if first and self.sides is not None:
            return self.sides.differ(x)
        return torch.ones(len(x), dtype=torch.bool, device=x.device)

    def _noise(self, rhs: torch.Tensor) -> torch.Tensor | None:
        """Return the rounding (batch,) that earlier, larger right-hand sides have left in this one; None for the first."""
        last, self.last_rhs = self.last_rhs, rhs.detach()
        if last is None:
            return None
        norm = last.norm(dim=-1).nan_to_num(0.0, 0.0)
        # Axes that a transform has added stand in front of those of the problem.
        fits = self.largest is not None and len(norm) % max(1, len(self.largest)) == 0
        if self.largest is not None and fits and len(norm):
            self.largest = torch.maximum(self.largest, norm.reshape(-1, len(self.largest)).amax(0))
        else:
            self.largest = norm
        if not len(rhs) or len(rhs) % max(1, len(self.largest)):
            return None
        return auto_relative(self.dtype) * self.largest.repeat(len(rhs) // len(self.largest))


def _without_solution(report: SolveReport) -> torch.Tensor | None:
    """Return which problems have no solution to differentiate, or None if all have one."""
    none = (report.status_code == Status.INFEASIBLE) | (report.status_code == Status.UNBOUNDED)
    return none if bool(none.any()) else None


def _report_of(
    direction: Pass,
    where: str,
    solver: str,
    outcome: InnerOutcome | LinearOutcome,
    axes: tuple[int, ...],
    words: StatusMessages,
) -> SolveReport:
    """Return the report of ``outcome``, a solve in ``direction``, with its tensors in the shape ``axes``."""
    status, iterations, norm = outcome.status, outcome.iterations, outcome.residual_norm
    threshold, bound = outcome.threshold, outcome.error_bound
    scale = outcome.scale if isinstance(outcome, LinearOutcome) else torch.full(status.shape, float("nan"))
    if status.shape != axes:
        status, iterations, norm = status.reshape(axes), iterations.reshape(axes), norm.reshape(axes)
        threshold, bound, scale = threshold.reshape(axes), bound.reshape(axes), scale.reshape(axes)
    report = SolveReport(
        direction, where, solver, status, iterations, norm, threshold, bound, outcome.basis, scale, words
    )
    if not isinstance(outcome, InnerOutcome) or outcome.prove is None:
        return report
    return report.with_proof(partial(_shaped_proof, outcome.prove, axes))


def _shaped_proof(prove: Callable[[], Proof], axes: tuple[int, ...]) -> Proof:
    proof = prove()
    entries = (e if e is None else e.reshape(*axes, e.shape[-1]) for e in (proof.proven_zero, proof.proven_nonzero))
    return Proof(proof.error_bound.reshape(axes), proof.basis, *entries)


def _all_converged(outcome: InnerOutcome | LinearOutcome) -> bool:
    return not bool(outcome.status.any())  # Status.CONVERGED is 0
