"""Bilevel problems: an outer loss at the argmin of an inner objective, and its hypergradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.utils import _pytree as pytree

from bilevel._torch.transforms import transforms_active, unhooked
from bilevel.certificates.constants import Constants
from bilevel.equations.structured import Structure
from bilevel.equations.system import ArgminSystem
from bilevel.errors import ArgumentError
from bilevel.layers.constraint_structure import ConstraintStructure
from bilevel.layers.constraints import Constraints
from bilevel.layers.differentiation import Differentiation
from bilevel.layers.layer import Layer
from bilevel.layers.modules import FunctionalModule
from bilevel.layers.proximal import Proximal
from bilevel.layers.settings import Adjoint, Setting, SolveSettings
from bilevel.layers.solution import Solution
from bilevel.linear._base import LinearSolver, LinearSolverLike
from bilevel.policy import OnFailure
from bilevel.problems.adaptive.direct import full_accuracy_is_cheap
from bilevel.problems.adaptive.driver import attach_gradient, needs_gradient
from bilevel.problems.batching import BatchSpec
from bilevel.problems.checks import (
    check_connection,
    check_dependence,
    check_goal,
    check_outer,
    refuse_inference_mode,
)
from bilevel.problems.definition import Definition
from bilevel.problems.hypergradient import HypergradientCall
from bilevel.problems.outer_loss import outer_losses
from bilevel.problems.result import Hypergradient
from bilevel.problems.warm_start import WarmStart
from bilevel.pytree import detached, moves
from bilevel.solvers._base import InnerSolver, InnerSolverLike
from bilevel.solvers._given import GivenAnswer
from bilevel.tolerance import Tolerance

__all__ = ["BilevelProblem"]

T = TypeVar("T")


class BilevelProblem(torch.nn.Module, ABC):
    """min_θ F(φ*(θ), θ) with φ*(θ) = argmin_φ G(φ, θ): override the two objectives.

    Calling the problem gives the outer loss, differentiable with respect to ``outer``. The problem is an ordinary module.
    It keeps the last inner solution and adjoint as the initial guesses of the next solves.

    ``solver``, ``linear_solver``, ``tolerance``, ``on_failure`` and ``warm_start`` are attributes, and may be set between
    calls. A call and all of its derivatives use the settings that were in force when it was made.

    Parameters
    ----------
    solver
        An inner solver, or a function (objective, init, outer, data) -> inner. None: chosen from the size.
    linear_solver
        A linear solver, or a function (operator, rhs) -> x. None: chosen from the size.
    tolerance
        δ and δ′.
    on_failure
        ``"raise"``, ``"warn"``, ``"nan"`` or ``"ignore"``, forward and backward.
    batch_dims
        None: one inner problem. Otherwise the axis of each tensor of ``data`` that numbers K inner problems, as ``in_dims``
        of ``torch.func.vmap``; None for a tensor that all share. The K problems share ``outer``, and are solved and
        differentiated as one batch. The outer loss is their mean. Inner variables then have a leading axis K.
    warm_start
        Whether a call without ``init`` begins at the last solution, and the linear solve at the last adjoint. The initial
        guess changes the work, not the accuracy.
    differentiation
        The way the inner solution is differentiated: :class:`bilevel.Implicit` by default. The others have no known error
        bound.
    static
        Whether you vouch for the inner objective, and for ``inner_prox`` or ``inner_constraints``: see :func:`bilevel.argmin`.

    Raises
    ------
    ArgumentError
        If a setting cannot be used.

    Examples
    --------
    >>> import torch, bilevel
    >>> class Ridge(bilevel.BilevelProblem):
    ...     def inner_objective(self, inner, outer, data):
    ...         X, y, _, _ = data
    ...         return ((X @ inner - y) ** 2).sum() + outer.exp() * (inner**2).sum()
    ...     def outer_objective(self, inner, outer, data):
    ...         _, _, X, y = data
    ...         return ((X @ inner - y) ** 2).mean()
    >>> t = lambda *rows: torch.tensor(rows, dtype=torch.float64)
    >>> data = (t([1.0, 0.0], [0.0, 2.0]), t(1.0, 2.0), t([1.0, 1.0]), t(1.5))
    >>> problem = Ridge(tolerance=bilevel.Tolerance(strong_convexity=2.0))
    >>> result = problem.hypergradient(torch.tensor(0.0, dtype=torch.float64), data, init=t(0.0, 0.0))
    >>> round(result.value.item(), 6), round(result.grad.item(), 6)
    (0.04, 0.164)
    >>> result.certified, result.error_bound < 1e-10
    (True, True)
    """

    solver = Setting[InnerSolver | None]()
    linear_solver = Setting[LinearSolver | None]()
    on_failure = Setting[OnFailure]()
    tolerance = Setting[Tolerance]()
    """The accuracy asked for."""

    if TYPE_CHECKING:
        __call__: Callable[..., torch.Tensor]  # torch says that a module returns Any

    def __init__(
        self,
        *,
        solver: InnerSolverLike | None = None,
        linear_solver: LinearSolverLike | None = None,
        tolerance: Tolerance | None = None,
        on_failure: OnFailure = "raise",
        batch_dims: Any = None,
        warm_start: bool = True,
        differentiation: Differentiation | None = None,
        static: bool = False,
    ) -> None:
        super().__init__()
        self.batch_dims = batch_dims
        self.warm_start = warm_start
        self._structure: Structure | None = None
        if type(self).inner_prox is not BilevelProblem.inner_prox:
            self._structure = Proximal(given=self._inner_prox, written=lambda: self.inner_prox)
        if type(self).inner_constraints is not BilevelProblem.inner_constraints:
            if self._structure is not None:
                raise ArgumentError(
                    f"{self.where}: expected inner_prox or inner_constraints, got both; write both as one term, "
                    "bilevel.prox.Custom, or the term as constraints: an L1 norm is s * (p + q).sum() for x = p - q, with lower=0"
                )
            self._structure = ConstraintStructure(
                constraints=self._inner_constraints, written=lambda: self.inner_constraints
            )
        self._layer = Layer(
            ArgminSystem,
            self._inner_objective,
            structure=self._structure,
            solver=solver,
            linear_solver=linear_solver,
            tolerance=tolerance,
            on_failure=on_failure,
            where=self.where,
            written=self._written,
            differentiation=differentiation,
            static=static,
        )
        self._warm = WarmStart()
        self._connected_for: frozenset[tuple[bool, ...]] = frozenset()

    @property
    def where(self) -> str:
        """The name used in messages."""
        return f"`{type(self).__name__}`"

    @property
    def inner_layer(self) -> Layer:
        """The inner problem as a layer of (init, outer, data), with the settings of this problem."""
        return self._layer

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(getattr(type(self), name, None), Setting):
            object.__setattr__(self, name, value)  # a solver that is a module is a setting, and no part of this one
        else:
            super().__setattr__(name, value)

    @property
    def _settings(self) -> SolveSettings:
        return self._layer._settings

    @_settings.setter
    def _settings(self, settings: SolveSettings) -> None:
        self._layer._settings = settings

    @property
    def _numbering(self) -> BatchSpec:
        return BatchSpec(self.batch_dims, self._layer.where)

    @property
    def _definition(self) -> Definition:
        prepare = None if type(self).prepare is BilevelProblem.prepare else self.prepare
        return Definition(
            self._numbering, self.inner_objective, self.outer_objective, self._inner_of_given, self._outer_of_given,
            prepare, self._structure, self.constants,
        )  # fmt: skip

    @property
    def _remembered(self) -> WarmStart:
        return self._warm if self.warm_start else WarmStart()

    def memory(self) -> dict[str, Any]:
        """Return the state of the warm starts: the last inner solution and adjoint, and the search state of goals.

        With it a run can be resumed bit for bit. The tensors are copies, and all of it can be loaded without running code.
        """
        return self._warm.state_dict()

    def recall(self, state: dict[str, Any]) -> None:
        """Restore the state that :meth:`memory` returned."""
        self._warm = WarmStart.of(state)

    def begin_at(self, inner: Any, adjoint: Any) -> None:
        """Warm-start the next call from ``inner`` and ``adjoint``, as a :class:`Hypergradient` holds them.

        Nothing is done where the derivative depends on the start: see :class:`bilevel.Unrolled`.
        """
        if self._settings.start_matters:
            return
        flat = self._numbering.ravel(adjoint)
        # As for the mean's cotangents.
        self._warm = replace(self._warm, inner=inner, adjoint=flat / max(1, len(flat)))

    @abstractmethod
    def inner_objective(self, inner: Any, outer: Any, data: Any, /) -> torch.Tensor:
        """Return G(φ, θ), a scalar tensor, for one problem."""

    @abstractmethod
    def outer_objective(self, inner: Any, outer: Any, data: Any, /) -> torch.Tensor:
        """Return F(φ, θ), a scalar tensor, for one problem."""

    def inner_prox(self, outer: Any, data: Any, /) -> Any:
        """Return the proximal term g of the inner problem min_φ G(φ, θ) + g(φ; θ), or None. Override it for a problem with a term.

        Return a term of :mod:`bilevel.prox`, or a pytree of terms like the inner variables, with None for a tensor without one.
        It may depend on ``outer`` and ``data``: strengths and bounds are differentiated too. Errors of hypergradients are then
        estimated, and never certified.
        """
        return None

    def inner_constraints(self, outer: Any, data: Any, /) -> Constraints | None:
        """Return the bounds and constraints on φ, or None. Override it for a problem with constraints.

        ``equality`` and ``inequality`` of the :class:`~bilevel.Constraints` are functions of (inner, outer, data). Bounds are
        values, or functions of (outer, data). All may depend on ``outer``. Errors of hypergradients are then unknown.
        """
        return None

    def objective_arguments(self, outer: Any, data: Any, /) -> tuple[Any, Any]:
        """Return (outer, data) for the two objectives, given the arguments of a call of the problem.

        Override it together with :meth:`forward` in a problem that owns its outer variables.
        """
        return outer, data

    def prepare(self, outer: Any, data: Any, /) -> Any:
        """Return the data that the objectives receive in place of ``data``; by default ``data``.

        It is called once a call, and not at every evaluation. A result that depends on ``outer``, such as a kernel matrix, is
        differentiated too. Error bounds include it, and prepare the data again, so that random numbers are refused. It cannot be
        combined with ``batch_dims``.
        """
        return data

    def initial(self, outer: Any, data: Any, /) -> Any:
        """Return the initial guess of the first inner solve. Override it, or pass ``init``."""
        raise ArgumentError(
            f"{self._layer.where}: expected init to be given for the first solve, and it was not; pass init=..., or "
            "override initial(outer, data)"
        )

    def tolerance_of(self, outer: Any, data: Any, /) -> Tolerance:
        """Return the accuracy that this call asks for.

        The default is the problem's tolerance, with δ′ meant for each problem's own adjoint. The mean over K problems gives
        each problem 1/K of its right-hand side. Override it if δ and δ′ are meant for other quantities than φ and q.
        """
        given = self._settings.tolerance
        if isinstance(given.delta_prime, (int, float)) and (count := self._numbering.count(data)):
            return replace(given, delta_prime=given.delta_prime / count)
        return given

    def constants(self, outer: Any, data: Any, /) -> Constants:
        """Return the known constants of G and F (see :class:`Constants`). Override it to get certified bounds."""
        return Constants()

    def forward(self, outer: Any, data: Any, *, init: Any = None) -> torch.Tensor:
        """Return the outer loss F(φ*(θ), θ), differentiable with respect to every tensor of ``outer``.

        Parameters
        ----------
        outer
            θ: a tensor or a pytree.
        data
            The pytree that the objectives receive.
        init
            The initial guess of the inner solve, a pytree or an ``nn.Module``. None: the last solution if its shapes fit, else :meth:`initial`.

        Raises
        ------
        SolveError
            If the inner solve failed and the policy is ``"raise"``.
        StochasticObjectiveError, CapturedTensorError, ArgumentError
            If an objective is random, changes its arguments, captures a tensor that would receive no gradient, or does not
            depend on ``outer`` (policy ``"raise"``).
        TransformError, ArgumentError
            If the tolerance is a goal for the hypergradient, and more than one first ``backward`` to ``outer`` is asked for.

        Notes
        -----
        A goal, ``Tolerance(hypergradient=...)``, is met in this forward pass, for the gradient that ``backward`` then returns. This holds for one
        ``backward`` or ``torch.autograd.grad``. Under ``torch.no_grad`` there is no gradient, and the inner solve goes as far as the dtype allows.
        """
        self._numbering.checked_count(data)
        settings = self._settings_of(outer, data)
        tolerance, policy = settings.tolerance, settings.on_failure
        check_goal(self.where, settings, structured=self._structure is not None)
        if tolerance.has_goal and torch.is_grad_enabled() and needs_gradient(self.where, tolerance, outer, data):
            with unhooked():
                result = self._with_goal(settings, outer, data, init)
            return attach_gradient(result, outer)
        problem = self._definition
        prepared = problem.prepared(outer, data, policy)
        solution = self._solve(settings, outer, prepared, init)
        loss = outer_losses(problem, solution.value, outer, prepared, policy).mean()
        theta = [leaf for leaf in pytree.tree_leaves(outer) if isinstance(leaf, torch.Tensor)]
        poisoned = check_dependence(self.where, loss, theta, policy)
        among = tuple(leaf.requires_grad for leaf in theta if moves(leaf))
        if torch.is_grad_enabled() and any(among) and among not in self._connected_for and not transforms_active():
            with unhooked():
                cut = problem.disconnected(solution.value, outer, data, among)
            poisoned |= bool(check_connection(self.where, outer, cut, policy))
            if not cut or policy in ("warn", "ignore"):
                # Once: what leads to what is a property of the objectives, and costs an evaluation of both.
                self._connected_for |= {among}
        return loss * float("nan") if poisoned else loss

    def solve(
        self, outer: Any, data: Any, *, init: Any = None, inspect: bool = True, tolerance: Tolerance | None = None
    ) -> Solution[Any]:
        """Return φ*(θ), differentiable, with the report of the inner solve.

        Parameters
        ----------
        outer, data, init
            See :meth:`forward`.
        inspect
            Whether the objective is first checked for faults that make gradients wrong: random numbers, captured tensors, wrong
            shapes. This costs two gradients of one problem. Of several calls with the same objective, one check is enough.
        tolerance
            The accuracy; None: :meth:`tolerance_of` for this ``outer`` and ``data``. A call that is a part of a mean takes that
            of the whole mean.
        """
        settings = self._settings_of(outer, data, tolerance, inspect=inspect)
        return self._solve(settings, outer, self._definition.prepared(outer, data, settings.on_failure), init)

    def _settings_of(
        self, outer: Any, data: Any, tolerance: Tolerance | None = None, *, inspect: bool = True
    ) -> SolveSettings:
        """Return the settings of a call: what is set later does not change them."""
        asked = self.tolerance_of(outer, data) if tolerance is None else tolerance
        begin, keep = (self._warm.adjoint, self._keep_adjoint) if self.warm_start else (None, None)
        return replace(self._settings, tolerance=asked, inspect=inspect, adjoint_start=begin, on_adjoint=keep)

    def _keep_adjoint(self, adjoint: Adjoint) -> None:
        self._warm = replace(self._warm, adjoint=adjoint.value)

    def _solve(self, settings: SolveSettings, outer: Any, data: Any, init: Any) -> Solution[Any]:
        numbering = self._numbering
        count = numbering.count(data)
        start = self._start(outer, data, count, init)
        if count is not None:
            numbering.check_start(start, count)
        # Multipliers go with the inner solution that they are of.
        known = self._warm.multipliers if init is None and self.warm_start else {}

        def solve(begin: tuple[Any, Any], outer: Any, data: Any) -> Solution[Any]:
            chosen = replace(settings, multiplier_start=begin[1]) if begin[1] else settings
            return self._layer.solve_with(chosen, begin[0], outer, data)

        solution = numbering.each(solve)((start, known), outer, data)
        if self.warm_start:
            # Where the derivative depends on the start, the next call begins there too.
            unrolled = settings.start_matters and not isinstance(settings.solver, GivenAnswer)
            last = detached(start if unrolled else solution.value)
            multipliers = _of_constraints(solution.multipliers)
            # What a transform outside maps or differentiates is not this problem's own solution to go on from.
            if not transforms_active() and all(bool(torch.isfinite(leaf).all()) for leaf in pytree.tree_leaves(last)):
                self._warm = replace(self._warm, inner=last, multipliers=multipliers)
        return solution

    def hypergradient(self, outer: T, data: Any, *, init: Any = None, at: Any = None) -> Hypergradient[T]:
        """Return the outer value, its gradient with respect to ``outer``, the adjoint, and the reports of both solves.

        Parameters
        ----------
        outer, data, init
            See :meth:`forward`.
        at
            An inner solution that you already have, in the structure of ``init``. One residual checks it, and no inner solve is
            made. See :meth:`Layer.at`.

        Returns
        -------
        Hypergradient
            Detached tensors.

        Raises
        ------
        SolveError
            If a solve failed and the policy is ``"raise"``.
        StochasticObjectiveError, CapturedTensorError, ArgumentError
            As in :meth:`forward`, and if no graph leads to one of the tensors of ``outer`` (policy ``"raise"``).
        TransformError
            Inside a transform of ``torch.func``: there a call of the problem is to be differentiated.
        """
        where = self.where
        self._numbering.checked_count(data)
        settings = self._settings_of(outer, data)
        check_goal(where, settings, structured=self._structure is not None)
        refuse_inference_mode(f"{where}.hypergradient")
        check_outer(where, outer)
        if at is not None:
            settings, init = self._settings_at(settings), detached(at)
        if settings.tolerance.has_goal:
            return self._with_goal(settings, outer, data, init)
        return self._hypergradient_call(settings, outer, data).at_accuracy(init)

    def _with_goal(self, settings: SolveSettings, outer: Any, data: Any, init: Any) -> Hypergradient:
        """Return a hypergradient as accurate as the goal asks: by solves to full accuracy where these cost less than a search."""
        count = self._numbering.count(data)
        start = self._start(outer, data, count, init)
        warm, call = self._remembered, self._hypergradient_call(settings, outer, data)
        result, after = call.to_goal(start, warm, directly=full_accuracy_is_cheap(settings, start, count))
        if self.warm_start and after is not None:
            self._warm = after
        return result

    def _hypergradient_call(self, settings: SolveSettings, outer: Any, data: Any) -> HypergradientCall:
        return HypergradientCall(self._definition, self._layer.inspector, self._solve, settings, outer, data)

    def _settings_at(self, settings: SolveSettings) -> SolveSettings:
        """Return the settings of a call that differentiates at an answer given."""
        if settings.tolerance.has_goal:
            raise ArgumentError(
                f"{self.where}: expected Tolerance(delta=..., delta_prime=...) where the inner solution is given, got the goal "
                f"{settings.tolerance!r}, which needs solves of its own; leave `at` out, or the goal"
            )
        return replace(settings, solver=GivenAnswer(settings.solver))

    def reset(self) -> None:
        """Forget the last inner solution and adjoint."""
        self._warm = WarmStart()

    def extra_repr(self) -> str:
        return f"solver={self.solver!r}, linear_solver={self.linear_solver!r}, tolerance={self.tolerance!r}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # Called by .to(), .double() and their like: what the next solve begins from follows, as buffers do.
        warm = self._warm
        inner = None if warm.inner is None else pytree.tree_map(fn, warm.inner)
        self._warm = WarmStart(inner=inner, adjoint=None if warm.adjoint is None else fn(warm.adjoint))
        return super()._apply(fn, recurse)

    def _inner_of_given(self, inner: Any, outer: Any, data: Any) -> torch.Tensor:
        return self.inner_objective(inner, outer, self.prepare(outer, data))

    def _outer_of_given(self, inner: Any, outer: Any, data: Any) -> torch.Tensor:
        return self.outer_objective(inner, outer, self.prepare(outer, data))

    def _written(self) -> Callable[..., Any]:
        return self.inner_objective

    def _inner_objective(self, inner: Any, outer: Any, data: Any) -> torch.Tensor:
        return self.inner_objective(inner, outer, data)

    def _inner_prox(self, outer: Any, data: Any) -> Any:
        return self.inner_prox(outer, data)

    def _inner_constraints(self, outer: Any, data: Any) -> Constraints | None:
        return self.inner_constraints(outer, data)

    def _start(self, outer: Any, data: Any, count: int | None, init: Any) -> Any:
        if init is not None:
            return FunctionalModule.of(init, self.where) if isinstance(init, torch.nn.Module) else init
        warm = self._remembered
        fits = warm.fits(count)
        if fits and type(self).initial is BilevelProblem.initial:
            return warm.inner
        cold = detached(FunctionalModule.of(self.initial(outer, data), self.where))
        last = warm.inner_like(cold) if fits else None
        return cold if last is None else last


def _of_constraints(multipliers: Any) -> dict[str, Any]:
    """Return the multipliers of equations and inequalities; those of bounds follow from x."""
    names = ("equality", "inequality")
    found = {name: getattr(multipliers, name, None) for name in names}
    return {name: detached(part) for name, part in found.items() if part is not None}
