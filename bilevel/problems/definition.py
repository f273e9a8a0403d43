"""A bilevel problem as one call sees it: its functions, and its objectives as batches of flat problems."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from bilevel._torch.reverse import reverse_pass
from bilevel.certificates.constants import Constants
from bilevel.equations.function_errors import explained
from bilevel.equations.problem import Problem
from bilevel.equations.structured import Structure
from bilevel.errors import ArgumentError
from bilevel.layers.checks import SideEffectCheck
from bilevel.policy import OnFailure
from bilevel.problems.batching import BatchSpec
from bilevel.problems.checks import check_captures, check_connection, disconnected
from bilevel.pytree import detached, differentiated, flatten_arguments, joined, requiring_grad, usable

__all__ = ["Definition", "OuterTensors"]

Objective = Callable[[Any, Any, Any], torch.Tensor]


@dataclass(frozen=True, eq=False)
class OuterTensors:
    """θ among the tensors of a flat problem.

    Parameters
    ----------
    needs_grad
        Which of the problem's tensors are θ, or are computed from θ.
    computed, leaves
        These tensors, and θ, if a preparation has computed some of them; ``leaves`` is empty if the tensors are θ.
    """

    needs_grad: tuple[bool, ...]
    computed: Sequence[torch.Tensor] = ()
    leaves: Sequence[torch.Tensor] = ()

    def slope(self, parts: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """Return the derivative with respect to θ (p,), given those with respect to the tensors that need one; None stands for another tensor."""
        wanted = [part for part in parts if part is not None]
        return joined(reverse_pass(self.computed, self.leaves, wanted) if self.leaves else wanted)


@dataclass(frozen=True, eq=False)
class Definition:
    """The functions that a user overrides.

    Parameters
    ----------
    numbering
        Which axes of the data number inner problems.
    inner_objective, outer_objective
        G and F, functions of (inner, outer, data). With ``prepare``, of the prepared data.
    inner_of_given, outer_of_given
        The same with the preparation inside, as functions of the data of the call.
    prepare
        (outer, data) ↦ the data that the objectives receive; None: they receive ``data``.
    structure
        A proximal term or constraints of the inner problem, or None.
    constants
        (outer, data) ↦ the known constants of G and F.
    """

    numbering: BatchSpec
    inner_objective: Objective
    outer_objective: Objective
    inner_of_given: Objective
    outer_of_given: Objective
    prepare: Callable[[Any, Any], Any] | None
    structure: Structure | None
    constants: Callable[[Any, Any], Constants]

    @property
    def where(self) -> str:
        """The problem's name, for messages."""
        return self.numbering.where

    def prepared(self, outer: Any, data: Any, on_failure: OnFailure) -> Any:
        """Return the data that the objectives receive.

        Raises
        ------
        StochasticObjectiveError
            If ``prepare`` draws random numbers or changes a tensor in place, and the policy is ``"raise"``; NaN under ``"nan"``.
        """
        data = tree_map_only(torch.Tensor, usable, data) if torch.is_grad_enabled() else data
        if self.prepare is None:
            return data
        if self.numbering.dims is not None:
            raise ArgumentError(
                f"{self.where}: expected prepare or batch_dims, got both; prepare each problem's data before the call, or in the objectives"
            )
        prepare = functools.partial(self.prepare, outer, data)
        watch = SideEffectCheck(self.where, self.prepare, (outer, data), prepare, "prepare")
        with explained(self.where, "prepare", lambda: {"data": data, "outer": outer}):
            made = prepare()
        # An error bound prepares the data again, and has to come to the same.
        poisoned = watch.ended(on_failure)
        return tree_map_only(torch.Tensor, lambda leaf: leaf * float("nan"), made) if poisoned else made

    def flat_problems(self, inner: Any, outer: Any, data: Any) -> tuple[Problem, Problem, torch.Tensor]:
        """Return G and F as batches of flat problems, and ``inner`` (K, n). ``data`` is not prepared."""
        whole = self.prepare is None
        inner_objective = self.inner_objective if whole else self.inner_of_given
        outer_objective = self.outer_objective if whole else self.outer_of_given
        return self.numbering.problems(inner_objective, outer_objective, inner, outer, data, self.structure)

    def prepared_problems(
        self, inner: Any, outer: Any, data: Any, given: Any, on_failure: OnFailure
    ) -> tuple[Problem, Problem, OuterTensors]:
        """Return G and F of prepared data as flat problems, and θ among their tensors.

        ``given`` is what the caller passed: its tensors are no captures.
        """
        theta, leaves = requiring_grad(outer)
        with torch.enable_grad():
            prepared = self.prepared(theta, data, on_failure)
            lower, upper, _ = self.numbering.problems(
                self.inner_objective, self.outer_objective, inner, theta, prepared
            )
            tensors = flatten_arguments((theta, prepared), {})[0]
        for tensor in tensors:
            check_captures(self.where, tensor, leaves, given, on_failure)
        needs_grad = tuple([tensor.requires_grad for tensor in tensors])
        return lower, upper, OuterTensors(needs_grad, [t for t in tensors if t.requires_grad], leaves)

    def connected(
        self, parts: Sequence[torch.Tensor], inner: Any, outer: Any, data: Any, policy: OnFailure
    ) -> list[torch.Tensor]:
        """Return the gradients of the tensors of ``outer``; treat those that are zero because no objective uses the tensor."""
        # A gradient that is not zero came from somewhere.
        zero = [bool((part == 0).all()) and part.numel() > 0 for part in parts]
        if not any(zero):
            return list(parts)
        cut = check_connection(self.where, outer, self.disconnected(inner, outer, data, zero), policy)
        return [torch.full_like(part, float("nan")) if number in cut else part for number, part in enumerate(parts)]

    def disconnected(self, inner: Any, outer: Any, data: Any, among: Sequence[bool]) -> list[int]:
        """Return which floating-point tensors of ``outer``, of those ``among``, no objective's graph leads to."""
        plain, at = detached(outer), detached(inner)
        lower, upper, x = self.flat_problems(at, plain, data)
        return disconnected(lower, upper, x, differentiated(plain, len(lower.tensors)), among)
