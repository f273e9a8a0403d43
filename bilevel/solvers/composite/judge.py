"""The judge of composite problems f + g. It alternates proximal gradient steps with Newton's method on the manifold, and decides the status.

By default, a problem has converged when the Newton step on its manifold and the prox step are at most rtol·|x| + atol
in each unknown. Only the prox step can leave the manifold. With δ asked, the norm of an element e of ∂(f + g)(x)
decides: ‖e‖ ≤ μ δ. If f + g is strongly convex with μ, this proves ‖x − x*‖ ≤ ‖e‖/μ for any step size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from bilevel.errors import ArgumentError
from bilevel.reports import Basis, Status, StatusMessages
from bilevel.solvers._base import CallableSolver, Goal, InnerSolver, length, merge, threshold_for
from bilevel.solvers.composite.beside_threshold import falls_beside_threshold
from bilevel.solvers.composite.manifold_newton import Known, Polished, assess, polish, prox_step, reached
from bilevel.solvers.composite.problem import Composite, Iterate
from bilevel.solvers.composite.proof import CompositeProof
from bilevel.solvers.composite.reduced import ReducedSolver
from bilevel.solvers.composite.working_set import solve_sparse
from bilevel.solvers.judging.error import residual_rounding
from bilevel.solvers.judging.judge import solve_inner
from bilevel.solvers.judging.outcome import InnerOutcome, nothing_to_solve
from bilevel.solvers.newton import Newton
from bilevel.solvers.proximal_gradient import MAX_STEPS, ProximalGradient, descend, first_step
from bilevel.tolerance import Target, Tolerance

__all__ = ["solve_composite", "solve_fixed_point"]

# The number of proximal gradient steps before the first trial of Newton's method. It doubles before each further trial.
_FIRST_STEPS = 4
# The same for fixed points, for which Newton's method cannot detect a bad initial guess.
_FIRST_FIXED_STEPS = 64
_MOST_ROUNDS = 8
# A point is degenerate if its margin is at most this many times the relative error of x, or this many roundings.
_DEGENERATE, _LEAST_ERROR = 10.0, 16.0

_MESSAGES: StatusMessages = {
    Status.DIVERGED: (
        "moved away without end, and the objective fell all the way: it seems to have no minimum",
        "add a term that grows with x, such as a small ridge, bound what x can become, or start elsewhere",
    ),
    Status.INDEFINITE: (
        "ended at a saddle or a maximum: the objective falls along a direction that the terms leave free, or that a term at its threshold does",
        "start elsewhere, or add regularisation",
    ),
    Status.MAX_STEPS: (
        Status.MAX_STEPS.meaning,
        "raise max_steps, start nearer the solution, loosen the tolerance, or rescale the unknowns",
    ),
    Status.DEGENERATE: (
        "met a solution at which a proximal term is just at its threshold: its derivative is one-sided",
        "change the arguments a little, each by another amount, for example a strength, a bound or the costs of a transport plan by a relative "
        "1e-3, or pass on_failure='ignore' to take the derivative of one side",
    ),
}


def solve_composite(
    composite: Composite, init: torch.Tensor, target: Target, solver: InnerSolver | None
) -> InnerOutcome:
    """Solve min f + g from ``init`` (batch, n) with the solver that the user chose, or None, and judge the answer."""
    chosen = _chosen(composite, solver)
    if init.numel() == 0:
        return nothing_to_solve(init, _basis(target), chosen.name)
    if isinstance(chosen, CallableSolver):
        goal = Goal(composite.objective, init, target)
        given = chosen.solve(composite.objective, init, goal).x
        start = first_step(composite, _inside(composite, given))
        step = descend(ProximalGradient(), composite, start, torch.zeros_like(start.step), 2)[1]
        at, subgradient = prox_step(composite, replace(start, step=step))
        run = _Run.begin(composite, start, target).after(at, subgradient, torch.ones_like(start.step, dtype=torch.bool))
        found = polish(composite, at, subgradient, run.target, run.pending, 0)
        run = run.judged(found, torch.where(found.done, int(Status.CONVERGED), int(Status.NOT_CONVERGED)))
        return run.outcome(chosen.name)
    assert isinstance(chosen, ProximalGradient)
    if chosen == ProximalGradient() and not target.silent:
        settled = _sparse(composite, init, target)
        if settled is not None:
            return settled.outcome(chosen.name)
    run = _Run.begin(composite, first_step(composite, _inside(composite, init)), target)
    return _alternate(run, chosen, target).outcome(chosen.name)


def _sparse(composite: Composite, init: torch.Tensor, target: Target) -> _Run | None:
    """Return the run of the working-set method if it applies to this problem and solves it, else None."""
    if composite.separable is None:
        return None
    found = solve_sparse(composite, init)
    if found is None:
        return None
    at, known = found.at, Known(found.reduced, found.distance.unsqueeze(-1))
    everyone = torch.ones_like(at.value, dtype=torch.bool)
    seen = assess(composite, at, everyone, known, found.move)
    run = _Run.begin(composite, at, target, seen.move)
    rounds = torch.full_like(run.iterations, found.rounds)
    # If a prox step does not move the fixed unknowns of a separable term, −∇f lies in ∂g there. The gradient on the
    # manifold is then an element of ∂(f + g).
    if bool(((seen.move == 0) | found.reduced.free).all()) and bool(reached(seen, at, seen.slope, run.target)):
        converged = torch.full_like(run.status, Status.CONVERGED)
        return replace(
            run, subgradient=seen.slope, error=seen.newton, status=converged, iterations=rounds,
            found=Polished(at, seen.slope, seen, everyone, rounds),
        )  # fmt: skip
    at, subgradient = prox_step(composite, at)
    run = run.after(at, subgradient, everyone, rounds)
    run = run.polished(polish(composite, at, subgradient, run.target, everyone, known=known))
    return None if bool(run.pending.any()) else run


def _alternate(run: _Run, solver: ProximalGradient, target: Target) -> _Run:
    """Alternate proximal gradient steps and Newton steps until every problem has ended or the steps are spent."""
    composite, budget = run.composite, solver.max_steps or MAX_STEPS
    alone, origin = target.silent and solver.max_steps is not None, run.at.x
    wide = torch.finfo(run.at.x.dtype).bits >= 32
    polishing = solver.polish and not alone and wide
    most, taken, chunk = (30 if polishing else 0), 0, (_FIRST_STEPS if polishing else budget)
    threshold = torch.zeros_like(run.threshold) if alone else run.threshold
    for _ in range(budget):
        pending = run.pending
        asked = torch.where(pending, threshold, torch.inf)
        steps = min(chunk, budget - taken)
        solution, step = descend(solver, composite, run.at, asked, steps, origin)
        taken += steps
        at, subgradient = prox_step(composite, composite.at(solution.x, step))
        run = run.after(at, subgradient, pending, solution.iterations)
        lost = pending & ((solution.status == Status.DIVERGED) | (solution.status == Status.NOT_FINITE))
        lost = lost | (pending & ~torch.isfinite(run.at.value))
        if bool(lost.any()):
            away = solution.status == Status.DIVERGED
            run = run.ended(lost, torch.where(away, int(Status.DIVERGED), int(Status.NOT_FINITE)))
        if alone or not wide:
            break
        found = polish(composite, run.at, run.subgradient, run.target, run.pending, most)
        run = run.polished(found)
        ended = (solution.status == Status.CONVERGED) | (solution.status == Status.LINE_SEARCH_FAILED)
        run = run.given_up(found, ended) if polishing else run
        if taken >= budget or not bool(run.pending.any()):
            break
        chunk = 2 * chunk
        threshold = torch.where(run.pending & ended, 0.1 * threshold, threshold) if not polishing else threshold
        if not polishing and bool((threshold < 1e-6 * run.threshold).all()):
            break
    return run.spent(solver, target)


def _chosen(composite: Composite, solver: InnerSolver | None) -> InnerSolver:
    if solver is None:
        return ProximalGradient()
    if isinstance(solver, (ProximalGradient, CallableSolver)):
        return solver
    raise ArgumentError(
        f"{composite.objective.where}: expected solver to be bilevel.ProximalGradient or a function where there is a proximal term, got "
        f"{solver.name}, which only minimises smooth functions; leave solver out, or pass bilevel.ProximalGradient(...)"
    )


def _inside(composite: Composite, init: torch.Tensor) -> Iterate:
    """Return the iterate at the point of the domain of g that is nearest to ``init``."""
    least = _least(init)
    return composite.at(composite.prox(init, least), torch.zeros_like(least))


def _least(init: torch.Tensor) -> torch.Tensor:
    """Return a step size (batch,) so small that a prox only moves ``init`` into the domain of g."""
    return init.new_full(init.shape[:1], torch.finfo(init.dtype).tiny ** 0.5)


def _basis(target: Target) -> Basis:
    return Basis.RESIDUAL if target.strong_convexity is None else Basis.CERTIFIED


@dataclass(frozen=True, eq=False)
class _Run:
    """The state of a batch.

    Parameters
    ----------
    target
        The accuracy that decides: the one asked for, or that of the dtype if no accuracy is asked.
    threshold
        The norm (batch,) at which proximal gradient steps may end.
    at, subgradient, error
        The iterates, elements of ∂(f + g) there, and the next Newton steps, if known (batch, n).
    status, iterations
        int64 (batch,); RUNNING for problems that have not ended.
    found
        The last assessment.
    """

    composite: Composite
    target: Target
    threshold: torch.Tensor
    at: Iterate
    subgradient: torch.Tensor
    error: torch.Tensor
    status: torch.Tensor
    iterations: torch.Tensor
    found: Polished | None = None

    @staticmethod
    def begin(composite: Composite, start: Iterate, target: Target, move: torch.Tensor | None = None) -> _Run:
        """Return a run at ``start``; ``move``: the prox step from there, if known."""
        if target.silent:
            silent = Tolerance(strong_convexity=target.strong_convexity).inner(start.x.dtype)
            target = replace(silent, silent=True)
        move = composite.step(start.x, start.slope, start.step) - start.x if move is None else move
        scale = torch.maximum(length(start.slope), length(move) / start.step).nan_to_num()
        threshold = threshold_for(target, scale)
        if not target.rtol and target.relative:  # half precision: the residual decides
            target = replace(target, absolute=0.0)
        zeros = torch.zeros(scale.shape, dtype=torch.int64, device=scale.device)
        unknown = torch.full_like(start.x, torch.nan)
        return _Run(
            composite, target, threshold, start, torch.full_like(start.x, torch.inf), unknown,
            torch.full_like(zeros, Status.RUNNING), zeros,
        )  # fmt: skip

    @property
    def pending(self) -> torch.Tensor:
        """The problems that have not ended, bool (batch,)."""
        return self.status == Status.RUNNING

    def after(
        self, at: Iterate, subgradient: torch.Tensor, these: torch.Tensor, steps: torch.Tensor | None = None
    ) -> _Run:
        """Return the run with new iterates of ``these`` problems."""
        iterations = self.iterations if steps is None else self.iterations + torch.where(these, steps, 0)
        subgradient = torch.where(these.unsqueeze(-1), subgradient, self.subgradient)
        return replace(self, at=merge(these, at, self.at), subgradient=subgradient, iterations=iterations)

    def ended(self, these: torch.Tensor, status: torch.Tensor) -> _Run:
        """Return the run with ``status`` (batch,) for ``these`` problems."""
        return replace(self, status=torch.where(these, status, self.status))

    def polished(self, found: Polished) -> _Run:
        """Return the run after Newton's method."""
        these = self.pending
        moved = self.after(found.at, found.subgradient, these, found.iterations)
        error = torch.where(these.unsqueeze(-1), found.assessment.newton, self.error)
        done = torch.full_like(self.status, Status.CONVERGED)
        return replace(moved, error=error, found=found).ended(these & found.done, done)

    def judged(self, found: Polished, status: torch.Tensor) -> _Run:
        """Return the run with a final status for every problem that has not ended."""
        these = self.pending
        return self.polished(found).ended(these, status)

    def given_up(self, found: Polished, ended: torch.Tensor) -> _Run:
        """Return the run with a status for the problems that neither method improves."""
        these = self.pending & ended
        if not bool(these.any()):
            return self
        noise = residual_rounding(self.composite.objective, self.at.x, self.at.slope)
        x, step = self.at.x, self.at.step.unsqueeze(-1)
        # A solution near zero is a small difference of x and s ∇f, so its error is their rounding.
        most = torch.maximum(x.abs(), step * self.at.slope.abs()).amax(dim=-1, keepdim=True)
        coarse = found.assessment.newton.abs() <= self.target.coarse_rtol * most + self.target.atol
        still = found.assessment.move.abs() <= step * noise + 16 * torch.finfo(x.dtype).eps * most
        rounded = (found.assessment.slope.abs() <= 30 * noise).all(dim=-1)
        fine = found.assessment.usable & rounded & coarse.all(dim=-1) & still.all(dim=-1)
        status = torch.where(fine, int(Status.CONVERGED), int(Status.STAGNATED))
        status = torch.where(found.assessment.indefinite, int(Status.INDEFINITE), status)
        return self.ended(these, status)

    def spent(self, solver: ProximalGradient, target: Target) -> _Run:
        """Return the run with a status for the problems whose steps are spent."""
        these = self.pending
        reached = these & (length(self.subgradient) <= self.threshold)
        if self.target.rtol:
            reached = torch.zeros_like(reached)
        budget = solver.max_steps is not None and not target.asked
        status = torch.full_like(self.status, Status.BUDGET_SPENT if budget else Status.MAX_STEPS)
        return self.ended(these, torch.where(reached, int(Status.CONVERGED), status))

    def outcome(self, name: str) -> InnerOutcome:
        """Return the outcome of the run."""
        at, target, composite = self.at, self.target, self.composite
        norm = length(self.subgradient)
        good = self.status == Status.CONVERGED
        threshold = torch.where(good & (target.rtol > 0), torch.maximum(self.threshold, norm), self.threshold)
        reduced = None if self.found is None else self.found.assessment.reduced
        serves = reduced is not None and bool(reduced.sound.all()) and reduced.same_free(composite, at.x)
        # The residual of the local model, as everything that is computed from a residual expects.
        known = self.found is not None and (self.found.at.x is at.x or torch.equal(self.found.at.x, at.x))
        slope = self.found.assessment.slope if known and self.found is not None else torch.zeros_like(at.x)
        status, degenerate = self.status, self._degenerate()
        if degenerate is not None and bool(degenerate.any()):
            status = torch.where(
                falls_beside_threshold(composite, at, good & degenerate), int(Status.INDEFINITE), status
            )
        return InnerOutcome(
            at.x, status, self.iterations, norm, threshold, torch.full_like(norm, torch.nan), Basis.RESIDUAL, slope,
            solver=name, degenerate=degenerate, words=_MESSAGES,
            linear_solver=ReducedSolver(reduced) if serves and reduced is not None else None,
            prove=CompositeProof(composite, at, norm, self.error, target),
        )  # fmt: skip

    def _degenerate(self) -> torch.Tensor | None:
        """Return where the distance of x to a point without a derivative is at most its error."""
        if self.composite.margin is None:
            return None
        x, eps = self.at.x, torch.finfo(self.at.x.dtype).eps
        size = x.abs().amax(dim=-1).clamp_min(torch.finfo(x.dtype).tiny)
        # If no Newton step estimates the error, the accuracy asked replaces it.
        error = (self.error.abs().amax(dim=-1) / size).nan_to_num(self.target.rtol or eps ** (2 / 3), 0.0)
        return self.composite.margin(x, self.at.slope, self.at.step) <= _DEGENERATE * error.clamp_min(
            _LEAST_ERROR * eps
        )


def solve_fixed_point(
    composite: Composite, init: torch.Tensor, target: Target, solver: InnerSolver | None
) -> InnerOutcome:
    """Solve x = prox_{sg}(x − s∇f(x)), z = (x, s) (batch, n + 1), for a term that is known by its prox alone.

    It begins with proximal gradient steps. Newton's method on the equation follows, and the usual judge decides.
    """
    chosen = _chosen(composite, solver)
    if init.shape[0] == 0 or init.shape[-1] == 1:
        return nothing_to_solve(init, _basis(target), chosen.name)
    x = init[:, :-1]
    if isinstance(chosen, CallableSolver):
        x = chosen.solve(composite.objective, x, Goal(composite.objective, x, target)).x
    at = first_step(composite, _inside(composite, x))
    descent = chosen if isinstance(chosen, ProximalGradient) else ProximalGradient()
    budget, taken, chunk = descent.max_steps or MAX_STEPS, 0, _FIRST_FIXED_STEPS
    alone = target.silent and descent.max_steps is not None
    chunk = budget if alone else 0 if isinstance(chosen, CallableSolver) else chunk
    threshold = (1e-13 if at.x.dtype == torch.float64 else 1e-6) * length(at.slope)
    while True:
        steps = min(chunk, budget - taken)
        solution, step = descend(descent, composite, at, threshold, steps)
        taken += steps
        at = composite.at(solution.x, step)
        z = torch.cat([at.x, step.unsqueeze(-1)], dim=-1)
        outcome = solve_inner(Newton(max_steps=0 if alone else 30), composite.model, z, target)
        short = torch.full_like(outcome.status, Status.BUDGET_SPENT if descent.max_steps else Status.MAX_STEPS)
        failed = ~((outcome.status == Status.CONVERGED) | (solution.status == Status.DIVERGED))
        if not bool(failed.any()) or taken >= budget or chunk == 0 or bool((solution.status == Status.DIVERGED).any()):
            break
        chunk = 4 * chunk
    status = torch.where(solution.status == Status.DIVERGED, int(Status.DIVERGED), outcome.status)
    status = torch.where(outcome.status == Status.BUDGET_SPENT, short, status)
    return replace(
        outcome,
        status=status,
        iterations=outcome.iterations + solution.iterations,
        solver=chosen.name,
        words=_MESSAGES,
    )
