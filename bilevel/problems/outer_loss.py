"""The outer losses at the inner solutions, as ordinary code in the caller's graph, and a look at whether they are a function of their arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bilevel._torch.double_backward import Repeatable
from bilevel._torch.graph_features import nodes, record_graph_features
from bilevel._torch.once_differentiable import once_only, refuse_once_only
from bilevel._torch.transforms import is_differentiated_again, saving_hooked, transforms_active, unhooked
from bilevel.equations.function_errors import explained
from bilevel.errors import DtypeError, ShapeError
from bilevel.layers.checks import SideEffectCheck, refused_by_torch
from bilevel.policy import OnFailure
from bilevel.problems.definition import Definition

__all__ = ["outer_losses"]


def outer_losses(problem: Definition, inner: Any, outer: Any, data: Any, on_failure: OnFailure) -> torch.Tensor:
    """Return F of every inner problem of ``problem`` at prepared ``data``, differentiable.

    Raises
    ------
    ShapeError
        If F is no scalar.
    DtypeError
        If F is complex or a whole number.
    StochasticObjectiveError
        If it draws random numbers or changes a tensor in place, and the policy is ``"raise"``; NaN under ``"nan"``.
    """
    where, objective = problem.numbering.where, problem.outer_objective

    def one(inner: Any, outer: Any, data: Any) -> torch.Tensor:
        given = {"data": data, "inner": inner, "outer": outer}
        with explained(where, "outer_objective", lambda: given), refused_by_torch(where, "outer_objective"):
            loss = objective(inner, outer, data)
        if isinstance(loss, torch.Tensor) and loss.ndim == 0 and not loss.is_floating_point():
            raise DtypeError(
                f"{where}: expected outer_objective to return a floating-point scalar tensor of shape (), got () {loss.dtype}; "
                "return .real of a complex number, and compute a loss in floating-point numbers"
            )
        if not isinstance(loss, torch.Tensor) or loss.ndim != 0:
            got = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise ShapeError(
                f"{where}: expected outer_objective to return a scalar tensor of shape (), got {got}; "
                "reduce it, for example with .mean()"
            )
        return loss

    def every() -> torch.Tensor:
        with Repeatable.around(objective):
            # Randomness would be refused by vmap in words about vmap; let it through to our own check.
            losses: torch.Tensor = problem.numbering.each(one, randomness="different")(inner, outer, data)
        return losses

    hooked = saving_hooked()
    watch = SideEffectCheck(where, objective, (inner, outer, data), every)
    given = [leaf for leaf in pytree.tree_leaves((inner, outer, data)) if isinstance(leaf, torch.Tensor)]
    if hooked:
        # A checkpoint takes it for granted that what is computed again saves what was saved first.
        with unhooked():
            record_graph_features(objective, nodes(every(), given))
    losses = every()
    graph = list(nodes(losses, given))
    if not hooked and record_graph_features(objective, graph):
        losses = every()
        graph = list(nodes(losses, given))
    if any(map(once_only, graph)):
        _refuse_again(where, losses, given)
    return losses * float("nan") if watch.ended(on_failure) else losses


def _refuse_again(where: str, losses: torch.Tensor, given: Sequence[torch.Tensor]) -> None:
    """Raise where the derivative of ``losses``, which hold what torch differentiates once only, may be differentiated again."""

    def refuse(slope: torch.Tensor | None = None) -> None:
        if is_differentiated_again((losses,)):
            refuse_once_only(where, "outer_objective", losses, given)

    if transforms_active():
        refuse()
    else:
        losses.register_hook(refuse)
