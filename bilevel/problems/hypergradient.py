"""The hypergradient: how one call of :meth:`BilevelProblem.hypergradient` computes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bilevel.certificates._point import Point
from bilevel.certificates.bound import Bound
from bilevel.certificates.constants import Constants
from bilevel.layers.call import SolveCall
from bilevel.layers.inspector import Inspector
from bilevel.layers.settings import Adjoint, SolveSettings
from bilevel.layers.solution import Solution
from bilevel.problems.adaptive.direct import solve_directly
from bilevel.problems.adaptive.driver import solve_to_goal
from bilevel.problems.checks import CheckedObjective, check_captures, no_dependence
from bilevel.problems.definition import Definition, OuterTensors
from bilevel.problems.outer_loss import outer_losses
from bilevel.problems.result import Hypergradient, HypergradientReport, assemble, certificate_of, known_constants
from bilevel.problems.warm_start import WarmStart
from bilevel.pytree import as_real, copied, detached, differentiated, joined, moves, requiring_grad
from bilevel.reports import Basis

__all__ = ["HypergradientCall"]


@dataclass(frozen=True, eq=False)
class HypergradientCall:
    """One call: what to differentiate, with respect to what, and how.

    Parameters
    ----------
    problem
        The objectives.
    inspector
        Checks the inner objective.
    solve
        (settings, outer, prepared data, init) ↦ the inner solution, differentiable.
    settings
        Those of this call.
    outer, data
        θ, and what the objectives receive.
    """

    problem: Definition
    inspector: Inspector
    solve: Callable[[SolveSettings, Any, Any, Any], Solution[Any]]
    settings: SolveSettings
    outer: Any
    data: Any

    def at_accuracy(self, init: Any) -> Hypergradient:
        """Return the hypergradient of solves to the accuracies δ and δ′."""
        problem, settings, outer, data = self.problem, self.settings, self.outer, self.data
        where, policy = problem.numbering.where, settings.on_failure
        # Copies: what is computed from the result later is of θ as it is now.
        theta, needs_grad = requiring_grad(outer)
        adjoints: list[Adjoint] = []
        with torch.enable_grad():
            prepared = problem.prepared(theta, data, policy)
            solution = self.solve(replace(settings, on_adjoint=adjoints.append), theta, prepared, init)
            value = outer_losses(problem, solution.value, theta, prepared, policy).mean()
            if not value.requires_grad:
                raise no_dependence(where)
            poisoned = check_captures(where, value, needs_grad, (data, init), policy)
            found = torch.autograd.grad(value, needs_grad, allow_unused=True, materialize_grads=True)
        if poisoned:
            found = tuple(torch.full_like(gradient, float("nan")) for gradient in found)
        plain, inner = detached(theta), detached(solution.value)
        lower, upper, x = problem.flat_problems(inner, plain, data)
        outer_tensors = differentiated(plain, len(lower.tensors))
        flat = joined(problem.connected(found, inner, outer, data, policy))
        q, backward, corrected = torch.zeros_like(x), solution.report, value.detach()
        last = adjoints[-1] if adjoints else None
        if last is not None:
            if settings.on_adjoint is not None:
                settings.on_adjoint(last)
            q, backward = last.value * lower.batch, last.report  # the mean's cotangents are 1/K of each problem's own
            corrected = corrected - (q * last.residual).sum(dim=-1).mean()
        point = Point.at(lower, upper, x, q, outer_tensors)
        report = HypergradientReport(solution.report, backward)
        return assemble(problem, settings, plain, data, point, inner, value.detach(), corrected, flat, report)

    def to_goal(self, init: Any, warm: WarmStart, *, directly: bool) -> tuple[Hypergradient, WarmStart | None]:
        """Return a hypergradient as accurate as the goal asks: by a search, or ``directly`` by solves to full accuracy.

        The second result is what a next call may begin from, or None.
        """
        problem, policy = self.problem, self.settings.on_failure
        given = (self.data, init)
        outer, data = copied(self.outer), detached(self.data)
        lower, upper, x = problem.flat_problems(detached(init), outer, data)
        needs_grad = differentiated(outer, len(lower.tensors))
        known: list[Constants] = []

        def certify(x: torch.Tensor, q: torch.Tensor, flat: torch.Tensor, corrected: torch.Tensor) -> Bound:
            if not known:
                known.append(known_constants(problem, self.settings, outer, data))
            point = Point.at(lower, upper, x, q, needs_grad)
            certificate = certificate_of(problem, self.settings, lambda: known[0], point, flat, corrected)
            bound = certificate.bound
            known[0] = certificate.constants  # what quadratic objectives determine holds at every φ, and is found once
            return bound

        first, second, theta = lower, upper, OuterTensors(needs_grad)
        if problem.prepare is not None:
            first, second, theta = problem.prepared_problems(detached(init), outer, data, given, policy)
        checked = CheckedObjective(second, problem.outer_objective, given, policy)
        call = SolveCall(self.settings, self.inspector, problem.inner_objective, problem.where, True, x.dtype)
        if directly:
            found, report = solve_directly(call, first, second, x, warm.adjoint, theta, warm.known, certify, checked)
        else:
            begin = warm.adjoints(x)
            learned = warm.learned() if begin is not None else None
            found, report = solve_to_goal(call, first, second, x, begin, theta, learned, certify, checked)
        here = found.here
        inner = problem.numbering.unravel(upper.system.raveler, here.x)
        point = Point.at(lower, upper, here.x, here.q, needs_grad)
        parts = torch.split(
            found.gradient, [as_real(leaf).numel() for leaf in pytree.tree_leaves(outer) if moves(leaf)]
        )
        flat = torch.cat(problem.connected(parts, inner, outer, data, policy))
        value = here.values.mean()
        result = assemble(problem, self.settings, outer, data, point, inner, value, here.corrected, flat, report)
        error = found.value_error if self.settings.tolerance.estimates else None
        of_value = None if error is None else Bound(error, Basis.ESTIMATED)
        after = (
            WarmStart(inner=inner, adjoint=here.q / lower.batch, known=found.known) if found.finite else None
        )  # as for the mean's cotangents
        return replace(result, _decided=found.bound, _decided_value=of_value), after
