"""Goals of small problems: solve to full accuracy, which costs less there than a search for less, and estimate the error that is left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bilevel._torch.reverse import reverse_pass
from bilevel.certificates._point import Point
from bilevel.certificates.bound import Bound
from bilevel.equations.linearization import Linearization
from bilevel.equations.problem import Problem
from bilevel.layers.call import Adjoint, SolveSettings
from bilevel.linear.defaults import dense_fits
from bilevel.linear.exact import Exact, solve_nearby
from bilevel.problems.adaptive.driver import treat_goal
from bilevel.problems.adaptive.state import GoalReport
from bilevel.problems.hypergradient import Hypergradient, HypergradientReport
from bilevel.pytree import joined
from bilevel.reports import Basis, Status
from bilevel.solvers._error import irregular_signs
from bilevel.solvers.newton import Newton
from bilevel.tolerance import Tolerance

__all__ = ["decided", "full_accuracy_is_cheap"]

# The estimate stands for changes in any direction, and is made along one.
_SAFETY = 3.0
_ROUNDING = 64.0


def full_accuracy_is_cheap(settings: SolveSettings, start: Any, count: int | None) -> bool:
    """Return whether both solves, from the pytree ``start`` of ``count`` problems, are by factorisations, so that accuracy costs next to nothing."""
    solver, linear = settings.solver, settings.linear_solver
    if not (
        solver is None or (isinstance(solver, Newton) and solver.linear_solver is None and solver.max_steps is None)
    ):
        return False
    leaves = [leaf for leaf in pytree.tree_leaves(start) if isinstance(leaf, torch.Tensor)]
    if not (linear is None or isinstance(linear, Exact)) or not leaves or count == 0:
        return False
    return dense_fits(count or 1, sum(leaf.numel() for leaf in leaves) // (count or 1), leaves[0].dtype)


def decided(
    settings: SolveSettings, result: Hypergradient, point: Point, adjoint: Adjoint | None, lower: Problem
) -> Hypergradient:
    """Return ``result``, found at ``point`` to full accuracy, with what became of the goal of ``settings``; treat failure by its policy.

    ``lower`` is G of ``point``, replayed if it may be.
    """
    tolerance, report = settings.tolerance, result.report
    flat = joined(leaf for leaf in pytree.tree_leaves(result.grad) if leaf is not None)
    norm = float(flat.norm())
    allowed, solved = tolerance.allowed(norm), bool(report.converged.all())
    bound = Bound(math.nan, Basis.RESIDUAL)
    linear = None if adjoint is None else adjoint.linearization
    if solved and tolerance.estimates and adjoint is not None and linear is not None and math.isfinite(norm):
        error = _gradient_error(lower, point, linear, adjoint.report.residual_norm, flat)
        bound = Bound(error, Basis.ESTIMATED)
    met = bound.value <= allowed
    if solved and not met:
        bound = result.bound  # the certificate's, which costs much more
        met = bound.value <= allowed and (bound.basis is not Basis.ESTIMATED or tolerance.estimates)
    status = Status.CONVERGED if met else Status.STAGNATED if solved else _failure(report)
    goal = GoalReport(tolerance, status, bound.value, allowed, bound.basis, 1, flat.dtype)
    grad = result.grad
    if treat_goal(goal, report.forward, settings.on_failure):
        grad = pytree.tree_map(lambda leaf: None if leaf is None else torch.full_like(leaf, math.nan), grad)
    return replace(result, grad=grad, report=replace(report, goal=goal), _decided=bound)


def _failure(report: HypergradientReport) -> Status:
    """Return the status of the first problem whose solves failed."""
    forward, backward = report.forward, report.backward
    codes = torch.where(forward.converged, backward.status_code, forward.status_code)
    return Status(int(codes[~report.converged].reshape(-1)[0]))


def _gradient_error(
    lower: Problem, point: Point, linear: Linearization, residual_norm: torch.Tensor, gradient: torch.Tensor
) -> float:
    """Return an estimate of ‖ĝ − g‖ where every unknown is as accurate as by default: |φ − φ*| ≤ rtol·|φ| + atol.

    All unknowns are moved at once, by random signs, and the hypergradient there is compared with ĝ (p,). That costs a gradient of F, a linearisation
    of ∇G, and a solve with the factors at hand. A direction in which ĝ changes most can exceed the one tried by √n; the estimate allows for it.
    """
    x, q, needs_grad = point.x, point.q, point.needs_grad
    target, (count, n) = Tolerance().inner(x.dtype), x.shape
    eps = torch.finfo(x.dtype).eps
    share = eps ** (1 / 3)
    moved = x + (share / target.rtol) * irregular_signs(x) * (target.rtol * x.abs() + target.atol)
    slope, direct = _slopes(point.upper, moved, needs_grad)
    product, pulled = lower.linearize(moved, needs_grad).pull(q)
    change = slope - product
    step = solve_nearby(linear.operator, change)
    # A call differentiates with respect to data that require grad, too.
    pulled_back = [slope for slope, want in zip(linear.pullback(step), needs_grad, strict=True) if want]
    by_adjoint = _flat(pulled_back, gradient) / count
    found = (_flat(direct, gradient) - _flat(pulled, gradient)) / count - by_adjoint
    inner = (target.rtol / share) * math.sqrt(n) * float((found - gradient).norm())
    # How long BᵀH⁻¹ρ is for a ρ of length one, as it was for this one.
    size = float(change.norm())
    longest = float(by_adjoint.norm()) / size if size > 0 else 0.0
    outer = longest * count * math.sqrt(n) * float(residual_norm.norm())
    return _SAFETY * (inner + outer) + _ROUNDING * eps * float(gradient.norm())


def _slopes(upper: Problem, x: torch.Tensor, needs_grad: Sequence[bool]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return ∇_φ F (K, n) and the sums over the problems of ∇_θ F, at ``x`` (K, n)."""
    with torch.enable_grad():
        point = x.detach().requires_grad_(True)
        tensors = [
            t.detach().requires_grad_(True) if want else t for t, want in zip(upper.tensors, needs_grad, strict=True)
        ]
        values = upper.system.outputs(upper.shaped(point), *tensors)
        total = values.sum()
    theta = [t for t, want in zip(tensors, needs_grad, strict=True) if want]
    slope, *direct = reverse_pass([total], [point, *theta], [torch.ones_like(total)], retain_graph=False)
    return slope, direct


def _flat(parts: Sequence[torch.Tensor | None], like: torch.Tensor) -> torch.Tensor:
    found = [part for part in parts if part is not None]
    return joined(found).to(like) if found else torch.zeros_like(like)
