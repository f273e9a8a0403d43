"""Goals of small problems: solve to full accuracy, which costs less there than a search for less, and estimate the error that is left.

The solves are those of a layer, without the layer: G is a flat problem already, and nothing outside waits for a graph. The error model is that of
the search. What a search learns from its steps is measured here by one step aside, which costs a gradient of F and a linearisation of ∇G. A
problem with a warm start keeps the result for its next calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bilevel._torch.reverse import reverse_pass
from bilevel._torch.transforms import eager, isolated
from bilevel.certificates.bound import Bound
from bilevel.equations.linearization import JointProduct
from bilevel.equations.linearization_cache import LinearizationCache
from bilevel.equations.problem import Problem
from bilevel.equations.pullbacks import pullbacks_of
from bilevel.layers.call import SolveCall
from bilevel.layers.settings import Adjoint, SolveSettings
from bilevel.linear.defaults import dense_fits
from bilevel.linear.exact import Exact, solve_nearby
from bilevel.operators import HessianOperator
from bilevel.problems.adaptive.driver import treat_goal
from bilevel.problems.adaptive.error_model import ErrorModel
from bilevel.problems.adaptive.iterate import Iterate, Objectives
from bilevel.problems.adaptive.state import GoalReport, SearchResult, SearchState
from bilevel.problems.checks import CheckedObjective
from bilevel.problems.definition import OuterTensors
from bilevel.problems.result import HypergradientReport
from bilevel.reports import Basis, Status
from bilevel.solvers._error import irregular_signs
from bilevel.solvers.newton import Newton
from bilevel.tolerance import Tolerance

__all__ = ["full_accuracy_is_cheap", "solve_directly"]

_ROUNDING = 64.0
# The largest change of the adjoint from one call to the next for which the measurements of the one hold in the other.
_NEAR = 0.5


def full_accuracy_is_cheap(settings: SolveSettings, start: Any, count: int | None) -> bool:
    """Return whether both solves factorise matrices, so that accuracy costs next to nothing; ``start`` is the pytree of ``count`` initial guesses."""
    solver, linear = settings.solver, settings.linear_solver
    if not (
        solver is None or (isinstance(solver, Newton) and solver.linear_solver is None and solver.max_steps is None)
    ):
        return False
    leaves = [leaf for leaf in pytree.tree_leaves(start) if isinstance(leaf, torch.Tensor)]
    if not (linear is None or isinstance(linear, Exact)) or not leaves or count == 0:
        return False
    return dense_fits(count or 1, sum(leaf.numel() for leaf in leaves) // (count or 1), leaves[0].dtype)


@lru_cache(maxsize=16)
def _default(strong_convexity: float | None) -> Tolerance:
    return Tolerance(strong_convexity=strong_convexity, bound_products=0)


@eager
@isolated
def solve_directly(
    call: SolveCall,
    lower: Problem,
    upper: Problem,
    x: torch.Tensor,
    before: torch.Tensor | None,
    outer: OuterTensors,
    known: SearchState | None,
    certify: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Bound],
    checked: CheckedObjective,
) -> tuple[SearchResult, HypergradientReport]:
    """Solve from x (K, n) to full accuracy with the solvers of ``call``, and decide whether its goal is met; treat failure by its policy.

    Parameters
    ----------
    call
        It checks G, and holds the settings.
    lower, upper
        G and F.
    x
        The initial guess (K, n).
    before
        The adjoint (K, n) of the last call, for the mean over the problems, or None.
    outer
        Which of the problems' tensors are θ.
    known
        What was measured until then.
    certify
        (φ, q, ĝ, corrected value) ↦ the certificate's bound, which decides where the estimate does not suffice.
    checked
        F of ``upper``, checked when it is first evaluated.

    Raises
    ------
    SolveError, ArgumentError, StochasticObjectiveError, CapturedTensorError
        As :func:`~bilevel.problems.adaptive.driver.solve_to_goal` does.
    """
    tolerance, policy = call.settings.tolerance, call.settings.on_failure
    here, found = _solved(call, lower, upper, x, outer, checked)
    gradient = here.gradient
    assert call.report is not None
    report, norm = HypergradientReport(call.report, found.report), float(gradient.norm())
    # Status.CONVERGED is 0, and what solves nearly always report.
    solved = not bool((call.report.status_code | found.report.status_code).any()) or bool(report.converged.all())
    allowed, bound = tolerance.allowed(norm), Bound(math.nan, Basis.RESIDUAL)
    if solved and tolerance.estimates and math.isfinite(norm):
        q, near = found.value, False
        if before is not None and before.shape == q.shape:
            near = float(torch.dist(before.to(q), q)) <= _NEAR * float(q.norm())
        measure = partial(_measure, lower=lower, upper=upper, outer=outer, here=here)
        bound, known = _estimated(tolerance, here, measure, known if near else None, norm)
    met = bound.value <= allowed
    if solved and not met:
        bound = certify(here.x, here.q, gradient, here.corrected)  # which costs much more
        met = bound.value <= allowed and (bound.basis is not Basis.ESTIMATED or tolerance.estimates)
    status = Status.CONVERGED if met else Status.STAGNATED if solved else _failure(report)
    goal = GoalReport(tolerance, status, bound.value, allowed, bound.basis, 1, gradient.dtype)
    if treat_goal(goal, report.forward, policy) or call.poisoned or checked.poisoned:
        gradient = torch.full_like(gradient, math.nan)
    steps = report.forward.iterations, report.backward.iterations
    return SearchResult(here, gradient, *steps, bound, None, goal, known), replace(report, goal=goal)


def _failure(report: HypergradientReport) -> Status:
    """Return the status of the first problem whose solves failed."""
    forward, backward = report.forward, report.backward
    codes = torch.where(forward.converged, backward.status_code, forward.status_code)
    return Status(int(codes[~report.converged].reshape(-1)[0]))


def _solved(
    call: SolveCall, lower: Problem, upper: Problem, x: torch.Tensor, outer: OuterTensors, checked: CheckedObjective
) -> tuple[Iterate, Adjoint]:
    """Return the point that the solves reach from x (K, n), and the result of the linear solve."""
    adjoints: list[Adjoint] = []
    tolerance = _default(call.settings.tolerance.strong_convexity)
    call.settings = replace(call.settings, tolerance=tolerance, on_adjoint=adjoints.append)
    needs_grad, count, memo = outer.needs_grad, lower.batch, LinearizationCache()
    with torch.no_grad():
        solution = call.solve(Problem(lower.system, lower.tensors, memo.look(needs_grad)), x.clone())
    memo.adopt(solution, lower.tensors)
    x = solution.reshape(x.shape)
    values, v, direct = Objectives(lower, upper, outer, checked).slopes(x)
    # The rule of implicit.Solve, for the mean over the problems.
    linear = memo.linearize(lower.system, solution, lower.tensors, needs_grad, call.compare)
    both = JointProduct(linear)
    q = call.solve_linear(
        linear.operator.T, v if count == 1 else v / count, lower.batch_shape, both,
        lambda: pullbacks_of(both.pullback, lower.tensors, needs_grad),
    )  # fmt: skip
    pulled = -outer.slope(both.pullback(-q.reshape(x.shape)))
    found, target = adjoints[-1], tolerance.inner(x.dtype)
    # One direction of change is measured. Another may change ĝ by √n times as much.
    size = math.sqrt(x.shape[1])
    error = size * (target.rtol * float(x.norm()) + target.atol * math.sqrt(x.numel()))
    q, rho, pulled = (t if count == 1 else count * t for t in (found.value, found.rho, pulled))
    here = Iterate(x, linear, linear.operator, found.residual, values, v, direct, q, rho, pulled, inner_error=error)
    return here, found


def _estimated(
    tolerance: Tolerance,
    here: Iterate,
    measure: Callable[[SearchState], None],
    known: SearchState | None,
    norm: float,
) -> tuple[Bound, SearchState]:
    """Return the estimate of ‖ĝ − g‖ at ``here``, where ‖ĝ‖ is ``norm``, and what is known then.

    What is ``known`` from calls before counts a quarter more with each call. It is measured again once that is too much for the goal.
    """
    rounding = _ROUNDING * torch.finfo(here.x.dtype).eps * norm
    if known is not None and known.slope:
        known, older = replace(known), known
        known.age(older, stepped=False, solved=False)
        bound = ErrorModel(tolerance, known).estimate(here)
        if bound.value + rounding <= tolerance.allowed(norm):
            return replace(bound, value=bound.value + rounding), known
    known = SearchState()
    measure(known)
    bound = ErrorModel(tolerance, known, looked=known.looks > 0).estimate(here)
    return replace(bound, value=bound.value + rounding), known


def _measure(known: SearchState, *, lower: Problem, upper: Problem, outer: OuterTensors, here: Iterate) -> None:
    """Learn from a step that moves all unknowns at once, by random signs, each by the same part of itself."""
    x, count, target = here.x, lower.batch, _default(None).inner(here.x.dtype)
    step = torch.finfo(x.dtype).eps ** (1 / 3) * irregular_signs(x) * (x.abs() + target.atol / target.rtol)
    there = lower.linearize(x + step, outer.needs_grad)
    if not isinstance(there.operator, HessianOperator):
        return  # outside the domain of G
    point, leaves = there.operator.point, there.leaves
    with torch.enable_grad():
        values = upper.system.outputs(upper.shaped(point), *leaves)
    # One pass gives the slopes of the sum of F − ⟨q, ∇G⟩: ρ, and ĝ with the adjoint of `here`.
    chosen = [leaf for leaf, want in zip(leaves, outer.needs_grad, strict=True) if want]
    rho, *parts = reverse_pass([values, there.residual], [point, *chosen], [torch.ones_like(values), -here.q])
    turn = rho - here.rho
    if bool((turn != 0).any()):
        moved = solve_nearby(here.operator, turn)
        known.nu = math.sqrt(x.shape[1]) * float(moved.norm()) / float(turn.norm())
        pulled = (part for part in there.pullback(moved) if part is not None)
        parts = [a - b for a, b in zip(parts, pulled, strict=True)]
    change = float((outer.slope(parts) - here.direct + here.pulled).norm()) / count
    length, numbers = float(here.q.norm()), here.direct.numel()
    if length:
        known.pull, known.pulls = float(here.pulled.norm()) / count / length, numbers
    if math.isfinite(change):
        known.slope, known.numbers, known.looks = change / float(step.norm()), numbers, 1
