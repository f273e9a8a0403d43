"""Goals of small problems: solve to full accuracy, which costs less there than a search for less, and estimate the error that is left.

The solves are those of any hypergradient. The error model is that of the search. What a search learns from its steps is measured here by one
step aside, which costs a gradient of F and a linearisation of ∇G. A problem with a warm start keeps the result for its next calls.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bilevel.certificates._point import Point
from bilevel.certificates.bound import Bound
from bilevel.layers.settings import Adjoint, SolveSettings
from bilevel.linear.defaults import dense_fits
from bilevel.linear.exact import Exact, solve_nearby
from bilevel.problems.adaptive.driver import treat_goal
from bilevel.problems.adaptive.error_model import ErrorModel
from bilevel.problems.adaptive.iterate import Iterate, Objectives
from bilevel.problems.adaptive.state import GoalReport, SearchState
from bilevel.problems.result import Hypergradient, HypergradientReport
from bilevel.pytree import joined
from bilevel.reports import Basis, Status
from bilevel.solvers._error import irregular_signs
from bilevel.solvers.newton import Newton
from bilevel.tolerance import Tolerance

__all__ = ["decided", "full_accuracy", "full_accuracy_is_cheap"]

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


def full_accuracy(settings: SolveSettings) -> SolveSettings:
    """Return ``settings`` with the default accuracy in place of the goal."""
    return replace(settings, tolerance=_default(settings.tolerance.strong_convexity))


@lru_cache(maxsize=16)
def _default(strong_convexity: float | None) -> Tolerance:
    return Tolerance(strong_convexity=strong_convexity, bound_products=0)


def decided(
    settings: SolveSettings,
    result: Hypergradient,
    point: Point,
    adjoint: Adjoint | None,
    before: torch.Tensor | None,
    known: SearchState | None,
) -> tuple[Hypergradient, SearchState | None]:
    """Return ``result``, found at ``point`` to full accuracy, with the outcome of the goal of ``settings``; treat failure by its policy.

    ``before`` is the adjoint (K, n) of the last call, and ``known`` what was measured until then. The second result is what is known now.
    """
    tolerance, report = settings.tolerance, result.report
    flat = joined(leaf for leaf in pytree.tree_leaves(result.grad) if leaf is not None)
    norm = float(flat.norm())
    allowed, solved = tolerance.allowed(norm), bool(report.converged.all())
    bound = Bound(math.nan, Basis.RESIDUAL)
    linear = None if adjoint is None else adjoint.linearization
    if solved and tolerance.estimates and adjoint is not None and linear is not None and math.isfinite(norm):
        here = _iterate(point, adjoint, flat)
        near = before is not None and float((before - point.q).norm()) <= _NEAR * float(point.q.norm())
        bound, known = _estimated(tolerance, point, adjoint, here, known if near else None, norm)
    met = bound.value <= allowed
    if solved and not met:
        bound = result.bound  # the certificate's, which costs much more
        met = bound.value <= allowed and (bound.basis is not Basis.ESTIMATED or tolerance.estimates)
    status = Status.CONVERGED if met else Status.STAGNATED if solved else _failure(report)
    goal = GoalReport(tolerance, status, bound.value, allowed, bound.basis, 1, flat.dtype)
    grad = result.grad
    if treat_goal(goal, report.forward, settings.on_failure):
        grad = pytree.tree_map(lambda leaf: None if leaf is None else torch.full_like(leaf, math.nan), grad)
    return replace(result, grad=grad, report=replace(report, goal=goal), _decided=bound), known


def _failure(report: HypergradientReport) -> Status:
    """Return the status of the first problem whose solves failed."""
    forward, backward = report.forward, report.backward
    codes = torch.where(forward.converged, backward.status_code, forward.status_code)
    return Status(int(codes[~report.converged].reshape(-1)[0]))


def _iterate(point: Point, adjoint: Adjoint, gradient: torch.Tensor) -> Iterate:
    """Return the point that the solves reached, where the hypergradient is ``gradient`` (p,)."""
    assert adjoint.linearization is not None
    x, linear, count = point.x, adjoint.linearization, len(point.x)
    target, zeros = _default(None).inner(x.dtype), torch.zeros_like(x)
    # One direction of change is measured. Another may change ĝ by √n times as much.
    error = math.sqrt(x.shape[1]) * float((target.rtol * x.abs() + target.atol).norm())
    direct = count * gradient
    return Iterate(
        x, linear, linear.operator, adjoint.residual, zeros[:, 0], zeros, direct, point.q, count * adjoint.rho,
        torch.zeros_like(direct), inner_error=error,
    )  # fmt: skip


def _estimated(
    tolerance: Tolerance, point: Point, adjoint: Adjoint, here: Iterate, known: SearchState | None, norm: float
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
    model = ErrorModel(tolerance, known)
    _measure(model, point, adjoint, here)
    bound = model.estimate(here)
    return replace(bound, value=bound.value + rounding), known


def _measure(model: ErrorModel, point: Point, adjoint: Adjoint, here: Iterate) -> None:
    """Let ``model`` learn from a step that moves all unknowns at once, by random signs, each by the same part of itself."""
    x, target = point.x, _default(None).inner(point.x.dtype)
    step = torch.finfo(x.dtype).eps ** (1 / 3) * irregular_signs(x) * (x.abs() + target.atol / target.rtol)
    objectives = Objectives(
        point.lower.replayed_from(adjoint.replays), point.upper, point.needs_grad, point.upper.system.outputs
    )

    def solve(there: Iterate, rhs: torch.Tensor) -> torch.Tensor:
        found = solve_nearby(here.operator, rhs)
        model.known.nu = math.sqrt(x.shape[1]) * float(found.norm()) / float(rhs.norm())
        return found

    model.look_aside(here, objectives.at(x + step), objectives, solve)
