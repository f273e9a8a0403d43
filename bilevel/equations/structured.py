"""Problems with proximal terms, bounds and constraints, for the one differentiation rule.

The rule (:mod:`bilevel.implicit`) needs a smooth system R(z, θ) = 0 near the solution z. A :class:`StructuredSystem` is such a system: the
gradient of a smooth local model at z, whose derivatives are those of the solution. The local model holds near z only. A structured system
therefore has its own solution method (:meth:`StructuredSystem.find`), and judges the result by the optimality conditions of the whole problem.

A layer carries a :class:`Structure`. In each call it turns the system of the objective alone into a structured system, whose unknown z may
be longer than x: x comes first, multipliers follow.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch.utils import _pytree as pytree

from bilevel.equations.problem import Problem
from bilevel.equations.system import ArgminSystem, Level, System
from bilevel.operators import LinearOperator
from bilevel.pytree import Raveler
from bilevel.tolerance import Target

__all__ = ["LocalModel", "Parts", "Structure", "StructuredSystem", "flat_raveler", "objective_of"]


class Parts(NamedTuple):
    """The parts of a solution z.

    Attributes
    ----------
    x
        (n,): the unknown of the objective.
    multipliers
        A pytree of tensors, differentiable, or None.
    active
        A pytree of boolean tensors, or None.
    """

    x: torch.Tensor
    multipliers: Any = None
    active: Any = None


@dataclass(frozen=True, eq=False, kw_only=True)
class StructuredSystem(System):
    """R(z, θ) = 0, smooth near the solution z, which :meth:`find` computes without R.

    ``raveler`` describes z. ``function`` is the user's objective, as in ``ordinary``.

    Parameters
    ----------
    ordinary
        The system of the objective alone, in x. It has the same levels and mode.
    """

    #: What the user gave besides the objective. An examination of the whole comes after that of the objective, and finds fault with this.
    besides: ClassVar[str] = "the structure"

    ordinary: System

    @property
    def has_kinks(self) -> bool:
        return True

    @property
    def examined(self) -> str:
        return self.besides

    def begun(self, z: torch.Tensor, multipliers: Mapping[str, Any]) -> torch.Tensor:
        """Return the start ``z`` of one problem with the multipliers of an earlier solution in it, where there are such."""
        return z

    @abstractmethod
    def find(self, problem: Problem, init: torch.Tensor, target: Target, solver: Any) -> Any:
        """Return the solutions z (batch, N), judged: an :class:`bilevel.solvers._outcome.InnerOutcome`.

        Parameters
        ----------
        problem
            This system with its tensors. :func:`objective_of` makes the problem of the objective alone of it.
        init
            Where the search begins (batch, N).
        target
            The accuracy that is asked for.
        solver
            The inner solver that the user chose, or None.
        """

    def parts(self, z: torch.Tensor, *tensors: torch.Tensor) -> Parts:
        """Take one problem's solution ``z`` (N,) apart into x, multipliers and the active set, differentiably; the default is x alone."""
        return Parts(z[: self.ordinary.raveler.size])

    def in_x(self) -> System:
        """Return a system of the same solution whose unknown is x alone, for what is estimated of the errors of a hypergradient."""
        return self

    def linear_solver(self, operator: LinearOperator) -> Any:
        """Return the linear solver for derivatives where the user chose none; None for the usual choice."""
        return None

    def lift(self, size: int, batched: tuple[bool, ...]) -> System:
        return replace(self, levels=(*self.levels, Level(size, batched)), ordinary=self.ordinary.lift(size, batched))

    def at_levels(self, levels: tuple[Level, ...]) -> System:
        return replace(self, levels=levels, ordinary=self.ordinary.at_levels(levels))

    def in_dtype(self, dtype: torch.dtype) -> System:
        return replace(self, raveler=self.raveler.in_dtype(dtype), ordinary=self.ordinary.in_dtype(dtype))

    def for_gradients(self) -> System:
        return replace(self, ordinary=self.ordinary.for_gradients())

    def for_second_derivatives(self) -> System:
        return replace(self, ordinary=self.ordinary.for_second_derivatives())


@dataclass(frozen=True, eq=False, kw_only=True)
class LocalModel(StructuredSystem, ArgminSystem):
    """R = ∇_z Φ of a smooth local model Φ(z, θ), with a symmetric Jacobian. Its Hessian may be indefinite: see ``minimizes``."""

    @abstractmethod
    def model(self, z: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        """Return Φ () of one problem at ``z`` (N,), differentiable by any transform."""

    def output(self, flat: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        return self.model(flat, *tensors)


@dataclass(frozen=True, eq=False, kw_only=True)
class Structure(ABC):
    """What a layer's problem has besides its objective."""

    @property
    def functions(self) -> tuple[Any, ...]:
        """The user's functions and values in it, which are inspected as the objective is."""
        return ()

    @abstractmethod
    def attach(
        self, ordinary: System, init: torch.Tensor, tensors: Sequence[torch.Tensor]
    ) -> tuple[StructuredSystem, torch.Tensor]:
        """Return the structured system of a call, and where its search begins (N,).

        Parameters
        ----------
        ordinary
            The system of the objective alone.
        init
            x (n,), where the user begins. It may belong to a transform.
        tensors
            θ.
        """


def flat_raveler(size: int, like: Raveler) -> Raveler:
    """Return the structure of an unknown that is one vector (size,), in dtype and device ``like`` another."""
    leaf = pytree.tree_structure(0)
    return Raveler(leaf, (torch.Size([size]),), (like.dtype,), like.dtype, like.device)


def objective_of(problem: Problem) -> Problem:
    """Return the problem of the objective alone, in x, of a structured ``problem``."""
    system = problem.system
    assert isinstance(system, StructuredSystem)
    known = problem.objective
    return Problem(system.ordinary, problem.tensors) if known is None else known
