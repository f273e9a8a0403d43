"""A goal for the hypergradient of one problem: its solvers and policies bound to the search, and the gradient it promises."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bilevel._torch.transforms import transforms_active
from bilevel.certificates.bound import Bound
from bilevel.equations.problem import Problem
from bilevel.errors import ArgumentError, BilevelError, SolveError, SolveWarning, TransformError
from bilevel.layers.call import SolveSettings
from bilevel.layers.checks import Inspection
from bilevel.layers.randomness import CheckAfter
from bilevel.linear.defaults import default_linear_solver
from bilevel.policy import OnFailure, apply_policy, handle_misuse
from bilevel.problems.adaptive.search import Search
from bilevel.problems.adaptive.state import GoalReport, SearchResult, SearchState
from bilevel.problems.checks import CheckedObjective
from bilevel.problems.hypergradient import Hypergradient
from bilevel.pytree import moves
from bilevel.reports import Basis, Pass, SolveReport, Status
from bilevel.solvers.defaults import default_solvers
from bilevel.tolerance import Tolerance

__all__ = ["GoalResult", "attach_gradient", "needs_gradient", "solve_to_goal", "treat_goal"]


@dataclass(frozen=True, eq=False)
class GoalResult:
    """What a search found, and the two solves in the form of any solve's report."""

    found: SearchResult
    forward: SolveReport
    backward: SolveReport

    @property
    def goal(self) -> GoalReport:
        """What became of the goal."""
        return self.found.report

    @property
    def finite(self) -> bool:
        """Whether φ and q are fit to begin from."""
        return bool(torch.isfinite(self.found.x).all() & torch.isfinite(self.found.q).all())


def solve_to_goal(
    settings: SolveSettings,
    inspect: Callable[..., Inspection],
    lower: Problem,
    upper: Problem,
    x: torch.Tensor,
    q: torch.Tensor | None,
    needs_grad: Sequence[bool],
    known: SearchState | None,
    certify: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Bound],
    look: CheckedObjective,
) -> GoalResult:
    """Search from (x, q) with the solvers of ``settings`` for what its tolerance asks, and treat failure as its policy says.

    ``inspect`` inspects G, and with ``again=True`` even where it has before. ``look`` is F of ``upper``, which it looks at.

    Raises
    ------
    SolveError
        If the goal was not met and the policy is ``"raise"``.
    ArgumentError
        If it takes a proof, and none can be had.
    StochasticObjectiveError, CapturedTensorError, ArgumentError
        If an objective is no function of its arguments alone, or F depends on none of them (policy ``"raise"``).
    """
    poisoned = False

    def inspected(*, again: bool = False) -> tuple[torch.Tensor, torch.Tensor] | None:
        nonlocal poisoned
        try:
            return inspect(again=again).found if lower.batch else None
        except BilevelError as error:
            if isinstance(error, ValueError) or error.__cause__ is not None:
                raise
            poisoned = handle_misuse(error, settings.on_failure)
            return None

    first = inspected()
    trusted = first is None and not poisoned and lower.batch > 0
    solver = settings.solver or default_solvers(lower)[0]
    linear = settings.linear_solver
    search = Search(
        lower, upper, needs_grad, solver, (lambda operator: default_linear_solver(operator) if linear is None else linear),
        settings.tolerance, known, certify, look,
    )  # fmt: skip
    if lower.batch == 1 and first is not None:
        search.lower.remember(x, first[0].reshape(1), first[1].reshape(x.shape))
    with CheckAfter(x.device, lambda: inspected(again=True)) if trusted else nullcontext():
        found = search.run(x, q)
    linear_name = "its default" if linear is None else linear.name
    # A batch's means hand each problem 1/K of its right-hand side: reports speak of that system, as everywhere.
    forward = _report(Pass.FORWARD, lower.where, solver.name, found, found.residual, found.inner_steps)
    backward = _report(
        Pass.BACKWARD, lower.where, linear_name, found, found.rho / max(1, lower.batch), found.linear_steps
    )
    return _treated(settings.on_failure, GoalResult(found, forward, backward), poisoned or look.poisoned)


def _treated(on_failure: OnFailure, sought: GoalResult, poisoned: bool) -> GoalResult:
    """File the reports, and raise, warn or spoil the gradient where the goal was not met."""
    for report in (sought.forward, sought.backward):
        apply_policy(report, report.residual_norm.unsqueeze(-1), "ignore")
    found = sought.found
    if treat_goal(sought.goal, sought.forward, on_failure) or poisoned:
        found = replace(found, gradient=torch.full_like(found.gradient, float("nan")))
    return replace(sought, found=found)


def treat_goal(goal: GoalReport, forward: SolveReport, on_failure: OnFailure) -> bool:
    """Raise or warn where ``goal`` was not met, as the policy says; return whether the gradient is to be NaN."""
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
    direction: Pass, where: str, solver: str, found: SearchResult, residual: torch.Tensor, steps: torch.Tensor
) -> SolveReport:
    axes = found.axes
    norm = residual.norm(dim=-1).reshape(axes)
    unknown = torch.full_like(norm, float("nan"))
    status = torch.full(axes, int(found.report.status), dtype=torch.int64)
    return SolveReport(
        direction, where, solver, status, steps.reshape(axes), norm, torch.zeros_like(norm), unknown,
        Basis.RESIDUAL, found.v.norm(dim=-1).reshape(axes) if direction is Pass.BACKWARD else unknown,
    )  # fmt: skip


class _Promised(torch.autograd.Function):
    """The outer loss, with gradients that were found together with it."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, gradients: list[torch.Tensor], *leaves: torch.Tensor) -> torch.Tensor:
        """Return ``value``; ``leaves`` are what ``gradients`` belong to."""
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: torch.Tensor) -> tuple[Any, ...]:
        """Return the gradients times the cotangent; refuse to be differentiated itself, which would give zero."""
        if torch.is_grad_enabled():
            raise TransformError(
                "the loss of a problem with a goal: expected a first derivative, and create_graph=True asks for more; a goal is a "
                "promise about the hypergradient alone: pass Tolerance(delta=..., delta_prime=...) for second derivatives"
            )
        return (None, None, *(cotangent.to(gradient) * gradient for gradient in ctx.saved_tensors))


def needs_gradient(where: str, tolerance: Tolerance, outer: Any, data: Any) -> bool:
    """Return whether a tensor of ``outer`` wants the gradient of a loss that is computed to ``tolerance``, which has a goal.

    Raises
    ------
    TransformError, ArgumentError
        If more is wanted than that gradient: inside a transform, or of ``data``.
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
