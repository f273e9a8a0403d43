"""Goals for the hypergradient: run the search with a call's settings, report it, treat its failure, and attach the gradient to the loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bilevel._torch.transforms import transforms_active
from bilevel.certificates.bound import Bound
from bilevel.equations.problem import Problem
from bilevel.errors import ArgumentError, SolveError, SolveWarning, TransformError
from bilevel.layers.call import SolveCall
from bilevel.layers.randomness import CheckAfter
from bilevel.linear.defaults import default_linear_solver
from bilevel.policy import OnFailure, apply_policy
from bilevel.problems.adaptive.search import Search
from bilevel.problems.adaptive.state import GoalReport, SearchResult, SearchState
from bilevel.problems.checks import CheckedObjective
from bilevel.problems.definition import OuterTensors
from bilevel.problems.result import Hypergradient, HypergradientReport
from bilevel.pytree import moves
from bilevel.reports import Basis, Pass, SolveReport, Status
from bilevel.solvers.defaults import default_solvers
from bilevel.tolerance import Tolerance

__all__ = ["attach_gradient", "needs_gradient", "solve_to_goal", "treat_goal"]


def solve_to_goal(
    call: SolveCall,
    lower: Problem,
    upper: Problem,
    x: torch.Tensor,
    q: torch.Tensor | None,
    outer: OuterTensors,
    known: SearchState | None,
    certify: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Bound],
    checked: CheckedObjective,
) -> tuple[SearchResult, HypergradientReport]:
    """Search from (x, q) for the goal of the call's tolerance, with its solvers; treat failure by its policy.

    Parameters
    ----------
    call
        It checks G, and holds the settings.
    lower, upper, outer, known, certify
        See :class:`~bilevel.problems.adaptive.search.Search`.
    x, q
        The initial guesses (K, n); q may be None.
    checked
        F of ``upper``, checked when it is first evaluated.

    Raises
    ------
    SolveError
        If the goal was not met and the policy is ``"raise"``.
    ArgumentError
        If the goal asks for a proof, and the constants for one are not known.
    StochasticObjectiveError, CapturedTensorError, ArgumentError
        If an objective is random or captures a tensor, or F depends on none of its arguments (policy ``"raise"``).
    """
    settings = call.settings
    seen = call.inspect(lower, x)
    lower = lower.replayed_from(None if seen is None else seen.replays)
    solver, linear = settings.solver or default_solvers(lower)[0], settings.linear_solver
    search = Search(
        lower, upper, outer, solver, (lambda operator: default_linear_solver(operator) if linear is None else linear),
        settings.tolerance, known, certify, checked,
    )  # fmt: skip
    if lower.batch == 1 and seen is not None and seen.found is not None:
        value, slope = seen.found
        search.lower.remember(x, value.reshape(1), slope.reshape(x.shape))
    trusted = seen is not None and seen.found is None
    with CheckAfter(x.device, lambda: call.inspect(lower, x, again=True)) if trusted else nullcontext():
        found = search.run(x, q)
    forward = _report(Pass.FORWARD, lower, solver.name, found, found.here.residual, found.inner_steps)
    # The mean over a batch hands each problem 1/K of its right-hand side. The report is of that system.
    name, rho = "its default" if linear is None else linear.name, found.here.rho / max(1, lower.batch)
    backward = _report(Pass.BACKWARD, lower, name, found, rho, found.linear_steps)
    for report in (forward, backward):
        apply_policy(report, report.residual_norm.unsqueeze(-1), "ignore", call.recordings)
    if treat_goal(found.report, forward, settings.on_failure) or call.poisoned or checked.poisoned:
        found = replace(found, gradient=torch.full_like(found.gradient, float("nan")))
    return found, HypergradientReport(forward, backward, found.report)


def treat_goal(goal: GoalReport, forward: SolveReport, on_failure: OnFailure) -> bool:
    """Apply the policy to a ``goal`` that was not met; return whether the gradient is to be NaN."""
    if goal.met:
        return False
    if goal.basis is Basis.ESTIMATED and not goal.tolerance.estimates and goal.status is Status.STAGNATED:
        raise ArgumentError(
            f"{forward.where}: expected constants that prove an error bound for {goal.tolerance!r}, and none is known; "
            "override constants(outer, data) (strong_convexity at least, and Lipschitz constants unless the objectives "
            "are quadratic in inner), or let an estimate decide with estimates=True"
        )
    sentence = f"{forward.where}: {goal.message}"
    if on_failure == "raise":
        raise SolveError(sentence, forward)
    if on_failure == "warn":
        warnings.warn(sentence, SolveWarning, stacklevel=2)
    return on_failure == "nan"


def _report(
    direction: Pass, lower: Problem, solver: str, found: SearchResult, residual: torch.Tensor, steps: torch.Tensor
) -> SolveReport:
    axes = lower.system.batch_shape
    norm = residual.norm(dim=-1).reshape(axes)
    unknown = torch.full_like(norm, float("nan"))
    status = torch.full(axes, int(found.report.status), dtype=torch.int64)
    return SolveReport(
        direction, lower.where, solver, status, steps.reshape(axes), norm, torch.zeros_like(norm), unknown,
        Basis.RESIDUAL, found.here.v.norm(dim=-1).reshape(axes) if direction is Pass.BACKWARD else unknown,
    )  # fmt: skip


class _Promised(torch.autograd.Function):
    """The outer loss, with gradients that were computed together with it."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, gradients: list[torch.Tensor], *leaves: torch.Tensor) -> torch.Tensor:
        """Return ``value``. The ``gradients`` are those of the ``leaves``."""
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: torch.Tensor) -> tuple[Any, ...]:
        """Return the gradients times the cotangent. Refuse a second derivative, which would be zero."""
        if torch.is_grad_enabled():
            raise TransformError(
                "the loss of a problem with a goal: expected a first derivative, and create_graph=True asks for more; a goal is a "
                "promise about the hypergradient alone: pass Tolerance(delta=..., delta_prime=...) for second derivatives"
            )
        return (None, None, *(cotangent.to(gradient) * gradient for gradient in ctx.saved_tensors))


def needs_gradient(where: str, tolerance: Tolerance, outer: Any, data: Any) -> bool:
    """Return whether a tensor of ``outer`` requires grad, for a loss whose ``tolerance`` has a goal.

    Raises
    ------
    TransformError, ArgumentError
        Inside a transform, or if ``data`` requires grad. A goal is a promise about the first gradient of ``outer`` alone.
    """
    call = f"{tolerance!r} holds for hypergradient(...) and for the first backward of the loss"
    if transforms_active():
        raise TransformError(
            f"{where}: expected no transform of torch.func around a problem with a goal, and there is one; {call}; "
            "inside a transform pass Tolerance(delta=..., delta_prime=...)"
        )
    if any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(data)):
        raise ArgumentError(
            f"{where}: expected data not to require grad for a problem with a goal, and it does; {call} to outer; "
            "put what is to be differentiated into outer, or pass Tolerance(delta=..., delta_prime=...)"
        )
    return any(leaf.requires_grad for leaf in pytree.tree_leaves(outer) if moves(leaf))


def attach_gradient(result: Hypergradient, outer: Any) -> torch.Tensor:
    """Return the outer loss of ``result``, with its gradients for the tensors of ``outer``."""
    gradients = [leaf for leaf in pytree.tree_leaves(result.grad) if leaf is not None]
    leaves = [leaf for leaf in pytree.tree_leaves(outer) if moves(leaf)]
    loss: torch.Tensor = _Promised.apply(result.value, gradients, *leaves)
    return loss
