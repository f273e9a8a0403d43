"""Checks of the outer objective: faults that would make a hypergradient wrong or zero without an error.

The layer checks the inner objective (:func:`bilevel.layers.checks.inspect_function`). The outer objective is ordinary torch code in the
caller's graph. It may close over what an ordinary loss may, but it has to be a function of φ and θ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bilevel._torch.graph_features import nodes, reaches_another_leaf, record_graph_features
from bilevel._torch.transforms import carries_gradient, transforms_active
from bilevel.equations.problem import Problem
from bilevel.errors import ArgumentError, TransformError
from bilevel.layers.checks import SideEffectCheck, captured_error, refused_by_torch
from bilevel.layers.differentiation import Implicit
from bilevel.layers.settings import SolveSettings
from bilevel.policy import OnFailure, handle_misuse
from bilevel.pytree import moves, moving

__all__ = [
    "CheckedObjective",
    "check_captures",
    "check_connection",
    "check_dependence",
    "check_goal",
    "check_outer",
    "disconnected",
    "no_dependence",
    "refuse_inference_mode",
]


class CheckedObjective:
    """F of flat tensors, looked at where it is first evaluated: that tells whether it is a function of φ and θ alone.

    Parameters
    ----------
    problem
        F as a batch of flat problems.
    objective
        The user's function in it.
    given
        What the caller passed to it: its tensors are no captures, whatever they require.
    on_failure
        What becomes of a finding.
    """

    def __init__(self, problem: Problem, objective: Callable[..., Any], given: Any, on_failure: OnFailure) -> None:
        self.poisoned = False  # whether the gradient is to be NaN
        self._problem, self._objective, self._given, self._policy = problem, objective, given, on_failure
        self._looked = False

    def __call__(self, point: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        """Return F of the batch, as :meth:`bilevel.equations.system.System.outputs` does."""
        outputs, where = self._problem.system.outputs, self._problem.where
        if self._looked:
            return outputs(point, *tensors)
        self._looked = True
        watch = SideEffectCheck(where, self._objective, (point, tensors), lambda: outputs(point, *tensors))
        with refused_by_torch(where, "outer_objective"):
            values = outputs(point, *tensors)
        if record_graph_features(self._objective, nodes(values)):
            values = outputs(point, *tensors)
        self.poisoned = watch.ended(self._policy)
        if not values.requires_grad:
            self.poisoned |= handle_misuse(no_dependence(where), self._policy)
        self.poisoned |= check_captures(where, values, (point, *tensors), self._given, self._policy)
        return values


def check_outer(where: str, outer: Any) -> None:
    """Raise where :meth:`BilevelProblem.hypergradient` has nothing to differentiate, or is called inside a transform."""
    if transforms_active():
        raise TransformError(
            f"{where}: expected no transform of torch.func around hypergradient(...), because its result is detached, "
            "got one; transform a call of the problem instead, as in torch.func.grad(problem)(outer, data) or "
            "torch.func.vmap(torch.func.grad(problem))(outer, data), or by torch.func.functional_call where outer is the problem's own parameters"
        )
    if not any(moving(outer)):
        raise ArgumentError(
            f"{where}: expected outer to hold a floating-point or complex tensor, got {outer!r}; pass tensors to "
            "differentiate with respect to"
        )


def check_goal(where: str, settings: SolveSettings, *, structured: bool) -> None:
    """Raise where the tolerance is a goal, and the inner problem or its differentiation allows none."""
    tolerance, differentiation = settings.tolerance, settings.differentiation
    if tolerance.has_goal and not isinstance(differentiation, Implicit):
        raise ArgumentError(
            f"{where}: expected differentiation=bilevel.Implicit() with a goal for the hypergradient, got {differentiation}; "
            "leave one of them out"
        )
    if tolerance.has_goal and structured:
        raise ArgumentError(
            f"{where}: expected Tolerance(rtol=...) or δ and δ′ with inner_prox or inner_constraints, got the goal {tolerance!r}; errors "
            "of such a hypergradient are not bounded, and solves go as far as the tolerance says: leave the goal out"
        )


def check_dependence(where: str, loss: torch.Tensor, outer: Iterable[torch.Tensor], on_failure: OnFailure) -> bool:
    """Find a loss that nothing of ``outer`` is in, though it is being differentiated; return whether it is to be NaN."""
    if not torch.is_grad_enabled() or carries_gradient(loss) or not any(carries_gradient(leaf) for leaf in outer):
        return False
    return handle_misuse(no_dependence(where), on_failure)


def no_dependence(where: str) -> ArgumentError:
    """Return the error for an outer loss without a graph to ``outer``."""
    return ArgumentError(
        f"{where}: expected the outer loss to depend on outer, directly or through the inner solution, and no graph leads "
        "there; check that both objectives use their arguments"
    )


def check_captures(
    where: str, loss: torch.Tensor, outer: Sequence[torch.Tensor], given: Any, on_failure: OnFailure
) -> bool:
    """Find tensors that require grad in the outer objective's closure; return whether the gradient is to be NaN.

    Parameters
    ----------
    loss
        F with its graph.
    outer
        The leaves that it is differentiated with respect to.
    given
        What else the objective was given: its tensors are no captures, whatever they require.
    """
    known = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, torch.Tensor)]
    if not reaches_another_leaf(loss, (*outer, *known)):
        return False
    return handle_misuse(captured_error(where, "outer_objective", "requires grad"), on_failure)


def check_connection(where: str, outer: Any, cut: Sequence[int], on_failure: OnFailure) -> list[int]:
    """Find tensors of ``outer`` that no objective uses, numbered in ``cut``; return those whose gradient is to be NaN."""
    if not cut:
        return []
    names = ["outer" + pytree.keystr(path) for path, leaf in pytree.tree_flatten_with_path(outer)[0] if moves(leaf)]
    error = ArgumentError(
        f"{where}: expected every tensor of outer to reach an objective, and no graph leads to "
        f"{', '.join(names[number] for number in cut)}, whose gradient is zero whatever the data; leave it out of outer, or look "
        "for .detach(), .item() or torch.no_grad on its way"
    )
    return list(cut) if handle_misuse(error, on_failure) else []


def disconnected(
    lower: Problem, upper: Problem, x: torch.Tensor, needs_grad: Sequence[bool], among: Sequence[bool]
) -> list[int]:
    """Return which of the ``among`` of the ``needs_grad`` tensors no graph of ∇_φ G or F leads to, numbered among the wanted."""
    reached = [False] * sum(needs_grad)
    for problem in (lower, upper):
        with torch.enable_grad():
            point = x.detach().requires_grad_(True)
            leaves = [
                t.detach().requires_grad_(True) if w else t for t, w in zip(problem.tensors, needs_grad, strict=True)
            ]
            shaped = point.reshape(*problem.system.batch_shape, problem.size)
            if problem is lower:
                made = problem.system.plain_residual(shaped, leaves, graph=True)
            else:
                made = problem.system.outputs(shaped, *leaves)
        if made.requires_grad:
            chosen = [leaf for leaf, want in zip(leaves, needs_grad, strict=True) if want]
            slopes = torch.autograd.grad(made.sum(), chosen, allow_unused=True)
            reached = [seen or slope is not None for seen, slope in zip(reached, slopes, strict=True)]
    return [number for number, (seen, asked) in enumerate(zip(reached, among, strict=True)) if asked and not seen]


def refuse_inference_mode(where: str) -> None:
    """Raise :class:`ArgumentError` in ``torch.inference_mode``."""
    if torch.is_inference_mode_enabled():
        raise ArgumentError(
            f"{where}: expected to be called outside torch.inference_mode, in which torch records no derivatives; leave the with block or "
            "the decorator out, or take torch.no_grad"
        )
