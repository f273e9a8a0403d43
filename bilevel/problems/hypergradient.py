"""The hypergradient: how one call of :meth:`BilevelProblem.hypergradient` computes it, and what its error bounds are computed from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bilevel.certificates._certificate import Certificate
from bilevel.certificates._local import LocalCertificate, NoCertificate
from bilevel.certificates._point import Point
from bilevel.certificates.bound import Bound
from bilevel.certificates.constants import Constants
from bilevel.errors import ArgumentError
from bilevel.layers.call import SolveCall
from bilevel.layers.differentiation import Implicit
from bilevel.layers.inspector import Inspector
from bilevel.layers.settings import Adjoint, SolveSettings
from bilevel.layers.solution import Solution
from bilevel.problems.adaptive.direct import decided, full_accuracy
from bilevel.problems.adaptive.driver import solve_to_goal
from bilevel.problems.adaptive.state import SearchState
from bilevel.problems.checks import CheckedObjective, check_captures, no_dependence
from bilevel.problems.definition import Definition, copied, detached, differentiated
from bilevel.problems.result import Hypergradient, HypergradientReport, assemble
from bilevel.problems.warm_start import WarmStart
from bilevel.pytree import as_real, joined, moves, moving
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

    def at_accuracy(self, init: Any) -> tuple[Hypergradient, Point, Adjoint | None]:
        """Return the hypergradient of solves to the accuracies δ and δ′, where it is of, and what the linear solve found.

        The latter is None where F does not depend on φ.
        """
        problem, settings, outer, data = self.problem, self.settings, self.outer, self.data
        where, policy = problem.where, settings.on_failure
        # Copies: what is computed from the result later is of θ as it is now.
        leaves, structure = pytree.tree_flatten(copied(outer))
        needs_grad = [leaf.requires_grad_(True) for leaf, move in zip(leaves, moving(leaves), strict=True) if move]
        theta = pytree.tree_unflatten(leaves, structure)
        adjoints: list[Adjoint] = []
        with torch.enable_grad():
            prepared = problem.prepared(theta, data)
            solution = self.solve(replace(settings, on_adjoint=adjoints.append), theta, prepared, init)
            value = problem.outer_losses(solution.value, theta, prepared, policy).mean()
            if not value.requires_grad:
                raise no_dependence(where)
            poisoned = check_captures(where, value, needs_grad, (data, init), policy)
            found = torch.autograd.grad(value, needs_grad, allow_unused=True, materialize_grads=True)
        if poisoned:
            found = tuple(torch.full_like(gradient, float("nan")) for gradient in found)
        plain, inner = detached(theta), detached(solution.value)
        lower, upper, x = problem.flat_problems(inner, plain, data)
        flat = joined(problem.connected(found, inner, outer, data, policy))
        q, backward, corrected = torch.zeros_like(x), solution.report, value.detach()
        last = adjoints[-1] if adjoints else None
        if last is not None:
            if settings.on_adjoint is not None:
                settings.on_adjoint(last)
            q, backward = last.value * lower.batch, last.report  # the mean's cotangents are 1/K of each problem's own
            corrected = corrected - (q * last.residual).sum(dim=-1).mean()
        point = Point.at(lower, upper, x, q, differentiated(plain, lower))
        report = HypergradientReport(solution.report, backward)
        result = self._assembled(plain, data, point, value.detach(), corrected, flat, report)
        return result, point, last

    def to_goal_directly(self, init: Any, warm: WarmStart) -> tuple[Hypergradient, SearchState | None]:
        """Return a hypergradient of solves to full accuracy, with the outcome of the goal, and what was measured for it."""
        accurate = replace(self, settings=full_accuracy(self.settings))
        result, point, adjoint = accurate.at_accuracy(init)
        if adjoint is not None and self.problem.prepare is not None:
            # The replays are of G after the preparation, which G of `point` contains.
            adjoint = adjoint._replace(replays=None)
        return decided(self.settings, result, point, adjoint, warm.adjoints(point.x), warm.known)

    def to_goal(self, init: Any, warm: WarmStart) -> tuple[Hypergradient, WarmStart | None]:
        """Return a hypergradient as accurate as the goal asks: both solves go as far as that needs.

        The second result is what a next call may begin from, or None.
        """
        problem, tolerance, policy = self.problem, self.settings.tolerance, self.settings.on_failure
        given = (self.data, init)
        outer, data = copied(self.outer), detached(self.data)
        lower, upper, x = problem.flat_problems(detached(init), outer, data)
        needs_grad = differentiated(outer, lower)
        known: list[Constants] = []

        def certify(x: torch.Tensor, q: torch.Tensor, flat: torch.Tensor, corrected: torch.Tensor) -> Bound:
            if not known:
                known.append(_constants(problem, self.settings, outer, data))
            point = Point.at(lower, upper, x, q, needs_grad)
            certificate = _certificate(problem, self.settings, lambda: known[0], point, flat, corrected)
            bound = certificate.bound
            known[0] = certificate.constants  # what quadratic objectives determine holds at every φ, and is found once
            return bound

        begin = warm.adjoints(x)
        learned = warm.learned() if begin is not None else None
        checked = CheckedObjective(upper, problem.outer_objective, given, policy)
        call = SolveCall(self.settings, self.inspector, problem.inner_objective, problem.where, True, x.dtype)
        found, report = solve_to_goal(call, lower, upper, x, begin, needs_grad, learned, certify, checked)
        here = found.here
        inner = problem.numbering.unravel(upper.system.raveler, here.x)
        point = Point.at(lower, upper, here.x, here.q, needs_grad)
        parts = torch.split(
            found.gradient, [as_real(leaf).numel() for leaf in pytree.tree_leaves(outer) if moves(leaf)]
        )
        flat = torch.cat(problem.connected(parts, inner, outer, data, policy))
        result = self._assembled(outer, data, point, here.values.mean(), here.corrected, flat, report)
        of_value = Bound(found.value_error, Basis.ESTIMATED) if tolerance.estimates else None
        after = (
            WarmStart(inner=inner, adjoint=here.q / lower.batch, known=found.known) if found.finite else None
        )  # as for the mean's cotangents
        return replace(result, _decided=found.bound, _decided_value=of_value), after

    def _assembled(
        self,
        outer: Any,
        data: Any,
        point: Point,
        value: torch.Tensor,
        corrected: torch.Tensor,
        flat: torch.Tensor,
        report: HypergradientReport,
    ) -> Hypergradient:
        """Return what was found at ``point``, ĝ being ``flat`` (p,), with what its bounds are computed from."""
        problem, settings = self.problem, self.settings
        tensors = [leaf for leaf in pytree.tree_leaves(data) if isinstance(leaf, torch.Tensor)]
        versions = [(tensor, tensor._version) for tensor in tensors if not tensor.is_inference()]

        def constants() -> Constants:
            if any(tensor._version != version for tensor, version in versions):
                raise ArgumentError(
                    f"{problem.where}: expected data to be unchanged since the hypergradient was computed, and a tensor in them was changed "
                    "in place, so that no bound can be computed; read the bound before you change data, or pass a copy of data"
                )
            return _constants(problem, settings, outer, data)

        certify = partial(_certificate, problem, settings, constants)
        unravel = partial(problem.numbering.unravel, point.upper.system.raveler)
        return assemble(outer, point, value, corrected, flat, report, certify, unravel)


# Functions, because a result that held the call would hold the graph of its outer variables.
def _constants(problem: Definition, settings: SolveSettings, outer: Any, data: Any) -> Constants:
    return problem.constants(outer, data).with_mu(settings.tolerance.strong_convexity)


def _certificate(
    problem: Definition,
    settings: SolveSettings,
    constants: Callable[[], Constants],
    at: Point,
    flat: torch.Tensor,
    corrected: torch.Tensor,
) -> Certificate:
    kind = Certificate
    if not isinstance(settings.differentiation, Implicit):
        kind = NoCertificate
    elif problem.structure is not None:
        kind = LocalCertificate if at.lower.system.symmetric else NoCertificate
    products = 0 if settings.tolerance.has_goal else settings.tolerance.bound_products
    return kind(at, flat, corrected, constants, problem.where, settings.on_failure, products)
