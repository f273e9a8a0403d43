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
from bilevel.problems.adaptive.iterate import Iterate
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
        The adjoint (K, n) of the last call, or None.
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
    here, gradient, found = _solved(call, lower, upper, x, outer, checked)
    assert call.report is not None
    report = HypergradientReport(call.report, found.report)
    norm, solved = float(gradient.norm()), bool(report.converged.all())
    allowed, bound = tolerance.allowed(norm), Bound(math.nan, Basis.RESIDUAL)
    if solved and tolerance.estimates and math.isfinite(norm):
        near = before is not None and float((before - here.q).norm()) <= _NEAR * float(here.q.norm())
        measure = partial(_measure, lower=lower, upper=upper, outer=outer, here=here, gradient=gradient)
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
) -> tuple[Iterate, torch.Tensor, Adjoint]:
    """Return the point that the solves reach from x (K, n), ĝ (p,) there, and the result of the linear solve."""
    adjoints: list[Adjoint] = []
    tolerance = _default(call.settings.tolerance.strong_convexity)
    call.settings = replace(call.settings, tolerance=tolerance, on_adjoint=adjoints.append)
    needs_grad, count = outer.needs_grad, lower.batch
    tensors = [t.detach().requires_grad_(want) for t, want in zip(lower.tensors, needs_grad, strict=True)]
    memo = LinearizationCache()
    with torch.no_grad():
        solution = call.solve(Problem.of(lower.system, tensors, memo.look(tensors)), x.clone())
    memo.adopt(solution, tensors)
    chosen = [t for t, want in zip(tensors, needs_grad, strict=True) if want]
    with torch.enable_grad():
        point = solution.detach().requires_grad_(True)
        values = checked(point, *tensors)
    v, *direct = reverse_pass([values], [point, *chosen], [torch.full_like(values, 1 / count)], retain_graph=False)
    # The rule of implicit.Solve, for cotangents of the mean.
    linear = memo.linearize(lower.system, solution, tensors, needs_grad, call.compare)
    both, x = JointProduct(linear), solution.reshape(x.shape)
    q = call.solve_linear(
        linear.operator.T, v.reshape(x.shape), lower.batch_shape, both,
        lambda: pullbacks_of(both.pullback, tensors, needs_grad),
    ).reshape(x.shape)  # fmt: skip
    pulled = [part for part in both.pullback(-q) if part is not None]
    gradient = outer.slope([a + b for a, b in zip(direct, pulled, strict=True)])
    target = tolerance.inner(x.dtype)
    # One direction of change is measured. Another may change ĝ by √n times as much.
    error = math.sqrt(x.shape[1]) * float((target.rtol * x.abs() + target.atol).norm())
    found = adjoints[-1]
    here = Iterate(
        x, linear, linear.operator, found.residual, values.detach().reshape(-1), count * v.reshape(x.shape),
        count * gradient, count * q, count * found.rho, -count * outer.slope(pulled), inner_error=error,
    )  # fmt: skip
    return here, gradient, found


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


def _measure(
    known: SearchState,
    *,
    lower: Problem,
    upper: Problem,
    outer: OuterTensors,
    here: Iterate,
    gradient: torch.Tensor,
) -> None:
    """Learn from a step that moves all unknowns at once, by random signs, each by the same part of itself. ``gradient`` is ĝ (p,) at ``here``."""
    x, count, target = here.x, lower.batch, _default(None).inner(here.x.dtype)
    step = torch.finfo(x.dtype).eps ** (1 / 3) * irregular_signs(x) * (x.abs() + target.atol / target.rtol)
    there = lower.linearize(x + step, outer.needs_grad)
    if not isinstance(there.operator, HessianOperator):
        return  # outside the domain of G
    point, leaves = there.operator.point, there.leaves
    with torch.enable_grad():
        values = upper.system.outputs(upper.shaped(point), *leaves)
    # One pass gives the slopes of F − ⟨q, ∇G⟩: ρ, and ĝ with the adjoint of `here`.
    chosen = [leaf for leaf, want in zip(leaves, outer.needs_grad, strict=True) if want]
    mean = [torch.full_like(values, 1 / count), -here.q / count]
    rho, *parts = reverse_pass([values, there.residual], [point, *chosen], mean)
    turn = count * rho - here.rho
    if bool((turn != 0).any()):
        moved = solve_nearby(here.operator, turn)
        known.nu = math.sqrt(x.shape[1]) * float(moved.norm()) / float(turn.norm())
        pulled = [part for part in there.pullback(moved / count) if part is not None]
        parts = [a - b for a, b in zip(parts, pulled, strict=True)]
    change = float((outer.slope(parts) - gradient).norm())
    length = float(here.q.norm())
    if length:
        known.pull, known.pulls = float(here.pulled.norm()) / count / length, len(gradient)
    if math.isfinite(change):
        known.slope, known.numbers, known.looks = change / float(step.norm()), len(gradient), 1
