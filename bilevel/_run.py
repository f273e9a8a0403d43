"""One call's solves, forward and in every derivative: each is judged, reported, and treated as the caller's policy says."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from bilevel._choice import default_linear_solver, default_solver
from bilevel._inspection import Look, on_trust
from bilevel._problem import Problem
from bilevel._replay import Tapes
from bilevel._straight import Memory
from bilevel._wording import words_of
from bilevel.errors import BilevelError
from bilevel.linear._base import LinearOutcome, solve_linear
from bilevel.linear.exact import lend
from bilevel.operators import LinearOperator
from bilevel.reports import Pass, SolveReport, Words, active_recordings, enforce, misuse
from bilevel.solvers._base import InnerOutcome, solve_inner

if TYPE_CHECKING:
    from bilevel._layer import Layer

__all__ = ["Adjoint", "Run"]


class Adjoint:
    """The adjoint of the last first derivative, kept by those who start the next linear solve from it.

    Attributes
    ----------
    warm
        Whether to start from it.
    value
        q (batch, n), or None.
    report
        What the linear solve reported.
    residual
        ∇_x G (batch, n) at the solution that the adjoint belongs to.
    """

    def __init__(self) -> None:
        self.warm = False
        self.value: torch.Tensor | None = None
        self.report: SolveReport | None = None
        self.residual: torch.Tensor | None = None

    def start(self, like: torch.Tensor) -> torch.Tensor | None:
        """Return where to begin a solve for the right-hand side ``like``, or None."""
        kept = self.value
        if not self.warm or kept is None or kept.shape != like.shape or not bool(torch.isfinite(kept).all()):
            return None
        return kept.to(like)


class Run:
    """One call of a layer: solves, judges, reports and applies the policy, forward and in every derivative."""

    def __init__(self, layer: Layer, where: str, watched: bool, dtype: torch.dtype) -> None:
        self.layer = layer
        self.where = where
        self.watched = watched
        self.dtype = dtype  # what accuracies are of that nobody asked for
        self.recordings = active_recordings()
        self.report: SolveReport | None = None
        self.spoiled = False
        self.lost: torch.Tensor | None = None  # (*batch,) bool: whose derivatives the policy wants to be NaN
        self.factor: torch.Tensor | None = None
        self.one_step = False  # whether that is of the Hessians at init, and a step with them was the last

    def inspect(self, problem: Problem, init: torch.Tensor, memory: Memory[Tapes]) -> Look | None:
        """Look for what would make gradients wrong, at ``init`` (batch, n); return what came of it, if there was nothing."""
        if not problem.batch:
            return None
        try:
            if self.layer.inspects:
                return self.layer.look(problem, init, memory, captures=self.watched)
        except BilevelError as error:
            # Wrong shapes, and tensors of a vmap outside, cannot be gone on with.
            if isinstance(error, ValueError) or error.__cause__ is not None:
                raise
            self.spoiled = misuse(error, self.layer.on_failure)
        return None

    def solve(self, problem: Problem, init: torch.Tensor) -> torch.Tensor:
        """Return x (*batch, n), inspected, solved for, judged, reported and treated as the policy says."""
        layer = self.layer
        seen = self.inspect(problem, init, layer.looked)
        trusted = seen is not None and seen.found is None
        tapes = None if seen is None else seen.tapes
        if problem.batch and not layer.inspects:
            tapes = layer.recall(problem, init, captures=self.watched)
        problem = problem.replayed_from(tapes)
        solver = layer.solver or default_solver(problem)
        target = layer.tolerance.inner(self.dtype)
        with on_trust(init.device, lambda: self.inspect(problem, init, Memory())) if trusted else nullcontext():
            outcome = solve_inner(solver, problem, init, target)
        axes = problem.system.batch_shape
        self.one_step = outcome.factor is not None and bool((outcome.iterations <= 1).all())
        self.factor, layer.adjoint.residual = outcome.factor, outcome.residual if layer.adjoint.warm else None
        self.report = _report(
            Pass.FORWARD, self.where, solver.name, outcome, axes, words_of(solver, problem, init, outcome)
        )
        self.lost = ~self.report.success if layer.on_failure == "nan" else None
        x = outcome.x.reshape(*axes, problem.size)
        return enforce(self.report, x, layer.on_failure, self.recordings, silent_budget=target.silent)

    def solve_linear(
        self,
        operator: LinearOperator,
        rhs: torch.Tensor,
        axes: tuple[int, ...],
        product: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Return A⁻¹ rhs (*axes, n), solved for, judged, reported and treated as the policy says.

        ``product``, v ↦ A v for the first answer, is there for the adjoint of a first derivative alone.
        """
        layer = self.layer
        if self.factor is not None:
            lend(operator, self.factor, exact=self.one_step)
        kept = layer.adjoint if product is not None else None
        target, direction = layer.tolerance.linear(self.dtype), Pass.BACKWARD
        if self.report is None:  # a linear layer's own solve
            target, direction = layer.tolerance.inner(self.dtype), Pass.FORWARD
        solver = layer.linear_solver or default_linear_solver(operator)
        reported = self.report is None or self.recordings or active_recordings() or (kept is not None and kept.warm)
        begun = None if kept is None else kept.start(rhs)
        outcome = solve_linear(solver, operator, rhs, target, begun, product=product, seen=bool(reported))
        report = _report(direction, self.where, solver.name, outcome, axes, layer.backward_words)
        self.report = self.report or report
        if kept is not None and kept.warm:
            kept.value, kept.report = outcome.x, report
        shaped = outcome.x.reshape(*axes, operator.size)
        shaped = enforce(report, shaped, layer.on_failure, self.recordings, silent_budget=target.silent)
        if self.lost is None:
            return shaped
        # A quadratic's matrices are the same at a NaN: without this, what has failed would get a finite derivative.
        # Axes that a transform has added since stand in front of those of the forward pass.
        return torch.where(self.lost.unsqueeze(-1), torch.full_like(shaped, float("nan")), shaped)


def _report(
    direction: Pass,
    where: str,
    solver: str,
    outcome: InnerOutcome | LinearOutcome,
    axes: tuple[int, ...],
    words: Words,
) -> SolveReport:
    def shaped(numbers: torch.Tensor) -> torch.Tensor:
        return numbers if numbers.shape == axes else numbers.reshape(axes)

    return SolveReport(
        direction,
        where,
        solver,
        shaped(outcome.status),
        shaped(outcome.iterations),
        shaped(outcome.residual_norm),
        shaped(outcome.threshold),
        shaped(outcome.error_bound),
        outcome.basis,
        shaped(outcome.scale) if isinstance(outcome, LinearOutcome) else torch.full(axes, float("nan")),
        words,
    )
