"""The settings of one call of a layer: a frozen value that the call and all of its derivatives use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, NamedTuple, TypeVar, overload

import torch

from bilevel.equations.linearization import Linearization
from bilevel.errors import ArgumentError
from bilevel.layers.differentiation import Differentiation, Implicit, Unrolled, check_differentiation
from bilevel.linear._base import LinearSolver, as_linear_solver
from bilevel.policy import POLICIES, OnFailure, check_policy
from bilevel.replay import ReplayCache
from bilevel.reports import SolveReport, StatusMessages
from bilevel.solvers._base import InnerSolver, as_inner_solver
from bilevel.solvers.judging.given_answer import GivenAnswer
from bilevel.tolerance import Tolerance

__all__ = ["Adjoint", "Setting", "SolveSettings"]

T = TypeVar("T")


class Adjoint(NamedTuple):
    """The result of the linear solve of a call's first derivative.

    Attributes
    ----------
    value
        q (batch, n).
    report
        What the linear solve reported.
    residual
        ∇_x G (batch, n) at the solution of the call.
    linearization
        That of ∇_x G at the solution, where there is one.
    rho
        The residual of the linear solve (batch, n).
    replays
        The recorded evaluations that the call used, or None.
    """

    value: torch.Tensor
    report: SolveReport
    residual: torch.Tensor
    linearization: Linearization | None
    rho: torch.Tensor
    replays: ReplayCache | None


@dataclass(frozen=True, kw_only=True, eq=False)
class SolveSettings:
    """The settings of one call. Its solves and all of its derivatives use them, even if the layer's settings change later.

    Parameters
    ----------
    solver, linear_solver
        None: chosen from the size. Functions are wrapped.
    tolerance
        δ and δ′.
    on_failure
        The policy.
    inspect
        Whether the function is checked first. An earlier call with the same function may have done it.
    adjoint_start
        The initial guess of the linear solve of the first derivative, (batch, n). It is ignored if its shape does not fit.
    multiplier_start
        ``equality`` and ``inequality``: the multipliers of a solution for nearby arguments, from which the search begins.
    backward_messages
        An application's messages for the failures of its linear systems, in place of the general ones.
    differentiation
        How the solution is differentiated.
    on_adjoint
        Receives the adjoint of the first derivative. Several backward passes call it several times.

    Raises
    ------
    ArgumentError
        If a setting cannot be used.
    """

    solver: InnerSolver | None = None
    linear_solver: LinearSolver | None = None
    tolerance: Tolerance
    on_failure: OnFailure
    inspect: bool = True
    adjoint_start: torch.Tensor | None = None
    multiplier_start: Mapping[str, Any] = field(default_factory=dict)
    backward_messages: StatusMessages = field(default_factory=dict)
    differentiation: Differentiation = field(default_factory=Implicit)
    on_adjoint: Callable[[Adjoint], None] | None = None

    def __post_init__(self) -> None:
        # A call makes its settings of the layer's by replacement: what is already checked is not checked again.
        if self.solver is not None and not isinstance(self.solver, InnerSolver):
            object.__setattr__(self, "solver", as_inner_solver(self.solver))
        if self.linear_solver is not None and not isinstance(self.linear_solver, LinearSolver):
            object.__setattr__(self, "linear_solver", as_linear_solver(self.linear_solver))
        if not isinstance(self.tolerance, Tolerance):
            raise ArgumentError(f"expected tolerance to be a bilevel.Tolerance, got {self.tolerance!r}; wrap it in one")
        if self.on_failure not in POLICIES:
            check_policy(self.on_failure)
        if not isinstance(self.differentiation, Differentiation):
            object.__setattr__(self, "differentiation", check_differentiation(self.differentiation))

    @property
    def start_matters(self) -> bool:
        """Whether the call depends on where it begins, so that no warm start may replace that.

        It does where the answer is given, and where all steps to an accuracy are differentiated.
        """
        by_path = isinstance(self.differentiation, Unrolled) and self.tolerance.delta is not None
        return by_path or isinstance(self.solver, GivenAnswer)


class Setting(Generic[T]):
    """One of the :class:`SolveSettings` of a layer or a problem, as an attribute that may be set between calls.

    A call uses the settings that are in force when it is made.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, owner: None, kind: type) -> Setting[T]: ...
    @overload
    def __get__(self, owner: Any, kind: type) -> T: ...
    def __get__(self, owner: Any, kind: type) -> Setting[T] | T:
        if owner is None:
            return self
        value: T = getattr(owner._settings, self._name)
        return value

    def __set__(self, owner: Any, value: Any) -> None:
        owner._settings = replace(owner._settings, **{self._name: value})
