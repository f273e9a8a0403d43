"""A layer: it checks what it is given, and applies the differentiation rule (:mod:`bilevel.implicit`) to the solves of a call.

The solves and their failures are in :class:`~bilevel.layers.call.SolveCall`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch.utils import _pytree as pytree

from bilevel._torch.empty_batches import EmptyBatch, apply_rule
from bilevel._torch.transforms import (
    autocast_to,
    carries_gradient,
    differentiating,
    eager,
    transforms_active,
    without_gradient,
)
from bilevel.equations.function_errors import explained
from bilevel.equations.structured import Structure, StructuredSystem
from bilevel.equations.system import FixedPointSystem, System
from bilevel.errors import (
    ArgumentError,
    DtypeError,
)
from bilevel.implicit import ImplicitContext, Solve
from bilevel.layers.arguments import check_captures, init_gradient_error, nan_of, refuse_forward_twice
from bilevel.layers.call import SolveCall
from bilevel.layers.differentiation import BySteps, Differentiation, begin_of, solver_for, step_of
from bilevel.layers.inspector import Inspector
from bilevel.layers.modules import STATE, FunctionalModule, ModuleFunction, check_module
from bilevel.layers.settings import Setting, SolveSettings
from bilevel.layers.solution import Solution
from bilevel.linear._base import LinearSolver, LinearSolverLike
from bilevel.policy import OnFailure, handle_misuse
from bilevel.pytree import Raveler, flatten_arguments
from bilevel.reports import StatusMessages
from bilevel.setting_checks import refuse_nested
from bilevel.solvers._base import InnerSolver, InnerSolverLike
from bilevel.solvers.judging.given_answer import GivenAnswer
from bilevel.tolerance import Tolerance

__all__ = ["Layer"]

T = TypeVar("T")


def _without_graph(leaf: Any) -> Any:
    return without_gradient(leaf) if isinstance(leaf, torch.Tensor) else leaf


def _first_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` of two outputs, the second auxiliary, as one of the first."""

    @functools.wraps(function, updated=())
    def first(*args: Any, **kwargs: Any) -> Any:
        made = function(*args, **kwargs)
        if not isinstance(made, tuple) or len(made) != 2:
            raise ArgumentError(
                f"a layer with has_aux=True: expected the function to return a pair (value, aux), got {type(made).__name__}; return two things, or "
                "leave has_aux out"
            )
        return made[0]

    return first


def _last_or(last: Any, init: Any) -> Any:
    """Return the last solution, if it is of the structure and shapes of ``init`` and finite; else ``init``."""
    if last is None:
        return init
    (old, structure), (new, wanted) = pytree.tree_flatten(last), pytree.tree_flatten(init)
    if structure != wanted or any(not isinstance(b, torch.Tensor) for b in new):
        return init
    same = all(
        a.shape == b.shape and a.dtype == b.dtype and a.device == b.device for a, b in zip(old, new, strict=True)
    )
    return last if same and all(bool(torch.isfinite(a).all()) for a in old) else init


class Layer:
    """A differentiable solve: a function of ``(init, *args, **kwargs)``. Made by :func:`argmin`, :func:`root`, :func:`fixed_point`.

    Settings may be changed between calls. All derivatives of a call use the settings that the call was made with.
    """

    solver = Setting[InnerSolver | None]()
    linear_solver = Setting[LinearSolver | None]()
    tolerance = Setting[Tolerance]()
    on_failure = Setting[OnFailure]()
    backward_messages = Setting[StatusMessages]()
    differentiation = Setting[Differentiation]()

    def __init__(
        self,
        kind: type[System],
        function: Callable[..., Any],
        *,
        solver: InnerSolverLike | None,
        linear_solver: LinearSolverLike | None,
        tolerance: Tolerance | None,
        on_failure: OnFailure,
        where: str | None = None,
        written: Callable[[], Callable[..., Any]] | None = None,
        structure: Structure | None = None,
        differentiation: Differentiation | None = None,
        has_aux: bool = False,
        prepare: Callable[..., Any] | None = None,
        warm_start: bool = False,
        static: bool = False,
    ) -> None:
        noun = kind.noun
        if not callable(function):
            raise ArgumentError(
                f"bilevel layer: expected {noun} to be a function of (x, *args, **kwargs), got {function!r}; pass one, as in "
                f"bilevel.{kind.label}(f)(x, *args)"
            )
        if prepare is not None and not callable(prepare):
            raise ArgumentError(
                f"bilevel layer: expected prepare to be a function of the arguments that returns those of {noun}, got {prepare!r}; "
                f"write for example prepare=lambda X: (X.mT @ X,)"
            )
        self.kind = kind
        self.structure = structure
        self.module = ModuleFunction(function) if isinstance(function, torch.nn.Module) else None
        self.whole = self.module or function  # with auxiliary output
        self.function = _first_of(self.whole) if has_aux else self.whole
        self.has_aux, self.prepare, self.warm_start = has_aux, prepare, warm_start
        self.last: Any = None  # the last solution: the next initial guess, if warm_start
        self._settings = SolveSettings(tolerance=Tolerance() if tolerance is None else tolerance, on_failure=on_failure)
        self.solver, self.linear_solver, self.differentiation = solver, linear_solver, differentiation
        self.written = written  # the user's function, if ``function`` wraps it
        self.inspector = Inspector(static=static)
        functools.update_wrapper(self, function, updated=())
        self.where = where or f"`{kind.label}` layer `{getattr(function, '__name__', type(function).__name__)}`"

    @property
    def minimizes(self) -> bool:
        """Whether the function is an objective to minimise."""
        return self.kind.minimizes

    @property
    def is_fixed_point(self) -> bool:
        """Whether the function is a mapping whose fixed point is sought."""
        return issubclass(self.kind, FixedPointSystem)

    def __repr__(self) -> str:
        return f"<{self.where}, solver={self.solver!r}, linear_solver={self.linear_solver!r}, {self.tolerance!r}>"

    @eager
    def __call__(self, init: T, *args: Any, **kwargs: Any) -> T:
        r"""Return x, the same pytree as ``init``, differentiable with respect to every tensor in args and kwargs.

        Parameters
        ----------
        init
            The initial guess: a tensor, or a pytree of tensors, of floating-point or complex dtype. No gradient flows to it. A
            complex number counts as two unknowns, its real and its imaginary part.
        args, kwargs
            The pytrees that the function receives. Every floating-point or complex tensor in them can be differentiated.
            Gradients of complex tensors follow torch's convention, ∂L/∂Re z + i ∂L/∂Im z.

        Raises
        ------
        SolveError
            If the solve, or in a backward pass the linear solve, did not reach the tolerance (policy ``"raise"``).
        DtypeError, ShapeError
            If ``init`` cannot be an unknown, or the function returns the wrong shapes.
        CapturedTensorError, InitGradientError, StochasticObjectiveError
            If a gradient would silently be wrong or missing (policy ``"raise"``).
        TransformError
            If two nested forward-mode transforms meet here: torch would return zero.
        """
        return self._returned(self._around(self._settings, init, args, kwargs, value_only=True))

    def _returned(self, solution: Solution[T]) -> T:
        """Return x, or (x, aux) with ``has_aux``."""
        return cast(T, (solution.value, solution.aux)) if self.has_aux else solution.value

    @eager
    def solve(self, init: T, *args: Any, **kwargs: Any) -> Solution[T]:
        """Return a :class:`Solution`: the result of calling the layer, with the report of the forward solve."""
        return self._around(self._settings, init, args, kwargs)

    @eager
    def at(self, x: T, *args: Any, **kwargs: Any) -> T:
        """Return ``x``, a solution that you already have, differentiable like the layer's own solutions; with ``has_aux``, (x, aux).

        One residual checks ``x``, and up to 128 unknowns (32 of a ``root`` or ``fixed_point``) Newton's next step too: a residual
        does not see an error in directions of small curvature. With no accuracy asked ``x`` may be off by about 1 %; with
        ``Tolerance(delta=...)`` or ``rtol``
        it has to meet that accuracy. Derivatives are those of the implicit function at ``x``; with another ``differentiation``, those of steps of
        the layer's solver from ``x``. With proximal terms, bounds or
        constraints the layer solves from ``x``, because it needs the active set; it returns its own solution, and ``x`` fails if it is more than
        about 1 % away.

        Parameters
        ----------
        x
            The solution, a tensor or a pytree of tensors, from your own optimiser, scikit-learn or another program.
        args, kwargs
            As in a call of the layer.

        Raises
        ------
        SolveError
            If ``x`` is no solution (policy ``"raise"``).

        Examples
        --------
        >>> import torch, bilevel
        >>> layer = bilevel.argmin(lambda x, a: ((x - a) ** 4).sum() + ((x - a) ** 2).sum())
        >>> a = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> x = layer.at(torch.tensor([1.0, 2.0]), a)
        >>> x.sum().backward()
        >>> a.grad
        tensor([1., 1.])
        """
        settings = replace(self._settings, solver=GivenAnswer(self._settings.solver))
        return self._returned(self._around(settings, pytree.tree_map(_without_graph, x), args, kwargs))

    @eager
    def solve_with(self, settings: SolveSettings, init: T, *args: Any) -> Solution[T]:
        """Return the result of :meth:`solve` with ``settings`` in place of the layer's own."""
        return self._solution(settings, init, args, {})

    def _around(
        self,
        settings: SolveSettings,
        init: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        value_only: bool = False,
    ) -> Solution[Any]:
        """Prepare the arguments, choose the initial guess, solve, and evaluate the auxiliary output."""
        if self.prepare is not None:
            with explained(self.where, "prepare", lambda: {"args": args, "kwargs": kwargs}):
                prepared = self.prepare(*args, **kwargs)
            args, kwargs = prepared if isinstance(prepared, tuple) else (prepared,), {}
        if self.module is not None:
            check_module(self.module.module, self.where)
            kwargs = {**kwargs, STATE: self.module.state()}
        init = FunctionalModule.of(init, self.where) if isinstance(init, torch.nn.Module) else init
        warm = self.warm_start and not transforms_active() and not settings.start_matters
        if warm:
            init = _last_or(self.last, init)
        solution = self._solution(settings, init, args, kwargs, value_only=value_only)
        if warm:
            self.last = pytree.tree_map(_without_graph, solution.value)
        if not self.has_aux:
            return solution
        return replace(solution, aux=self.whole(solution.value, *args, **kwargs)[1])

    def _solution(
        self,
        settings: SolveSettings,
        init: T,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        value_only: bool = False,
    ) -> Solution[T]:
        raveler = Raveler.of(init, self.where)
        given = raveler.ravel(init)
        ordinary, tensors = self._system(raveler, args, kwargs)
        watched, inside, poisoned = torch.is_grad_enabled(), differentiating(), False
        way = settings.differentiation
        if inside and not isinstance(way, BySteps):
            refuse_forward_twice(self.where, tensors)
        system, flat = ordinary, given.detach()
        empty = EmptyBatch.around((flat, *tensors)) if transforms_active() else None
        if empty is not None:
            return self._solution_of_none(settings, ordinary, raveler, empty, tensors)
        if self.structure is not None:
            system, flat = self.structure.attach(ordinary, flat, tensors)
            if settings.multiplier_start:
                flat = system.begun(flat, settings.multiplier_start)
        if (watched or inside or transforms_active()) and carries_gradient(given):
            poisoned = handle_misuse(init_gradient_error(self.where), settings.on_failure)
        if inside:
            poisoned |= check_captures(ordinary, given, tensors, settings.on_failure)
            if system is not ordinary and not poisoned:
                poisoned = check_captures(system, flat, tensors, settings.on_failure)
        call = self._call(settings, system, watched)
        if isinstance(way, BySteps):
            x = self._by_steps(way, call, system, flat, tensors)
        else:
            context = ImplicitContext(system, call.solve, call.solve_linear, followed=watched, compare=call.compare)
            x = Solve.apply(context, flat, *tensors)
        if poisoned or call.poisoned:
            x = x * nan_of(ordinary, init, tensors)
        assert call.report is not None
        if not isinstance(system, StructuredSystem):
            return Solution(raveler.unravel(x), call.report)
        if value_only:  # multipliers of bounds take a gradient
            return Solution(raveler.unravel(x[: raveler.size]), call.report)
        parts = system.parts(x, *tensors)
        return Solution(raveler.unravel(parts.x), call.report, parts.multipliers, parts.active)

    def _solution_of_none(
        self,
        settings: SolveSettings,
        ordinary: System,
        raveler: Raveler,
        empty: EmptyBatch,
        tensors: list[torch.Tensor],
    ) -> Solution[Any]:
        """Return the solutions of a batch of no problems. Their derivatives are empty, or zero."""
        system, (flat, *ones) = ordinary, empty.ones()
        if self.structure is not None:
            system, flat = self.structure.attach(ordinary, flat, ones)
        call = self._call(settings, system, watched=False)
        context = ImplicitContext(system, call.solve, call.solve_linear)
        x = apply_rule(functools.partial(Solve.apply, context), empty.without_problems(flat), *tensors)
        assert call.report is not None
        solution = Solution(raveler.unravel(x[: raveler.size]), call.report)
        if not isinstance(system, StructuredSystem):
            return solution
        multipliers, active = empty.without_problems(system.parts(flat, *ones)[1:])
        return replace(solution, multipliers=multipliers, active=active)

    def _by_steps(
        self, way: BySteps, call: SolveCall, system: System, flat: torch.Tensor, tensors: list[torch.Tensor]
    ) -> torch.Tensor:
        """Return x (n,), differentiable through steps of the solver. The solve itself is not differentiated."""
        solver = solver_for(way, system, call.settings.solver)
        call.settings = replace(call.settings, solver=solver)
        cut = [without_gradient(tensor) for tensor in tensors]
        answer = without_gradient(Solve.apply(ImplicitContext(system, call.solve, call.solve_linear), flat, *cut))
        assert call.report is not None
        begin, taken = begin_of(way, solver, flat, answer, call.report.iterations)
        if not taken.most and (call.watched or differentiating()) and any(map(carries_gradient, tensors)):
            raise ArgumentError(
                f"{self.where}: expected steps to differentiate for {way}, got none, as the initial guess is a solution already, and the "
                "derivative would be zero; differentiate by Implicit() or Truncated(steps), or begin elsewhere"
            )
        # A failed problem's answer may be NaN, and so is its derivative.
        return way.path(step_of(system, solver, tensors), begin, answer, taken) * (1 + 0 * answer)

    def _call(self, settings: SolveSettings, system: System, watched: bool) -> SolveCall:
        written = self.function if self.written is None else self.written()
        functions = () if self.structure is None else self.structure.functions
        dtype = (system.ordinary if isinstance(system, StructuredSystem) else system).raveler.coarsest
        return SolveCall(settings, self.inspector, written, system.where, watched, dtype, functions)

    def _system(
        self, raveler: Raveler, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[System, list[torch.Tensor]]:
        """Return the system to solve, and the tensors that it depends on, after checks."""
        tensors, arguments = flatten_arguments(args, kwargs)
        if raveler.device.type == "meta":
            raise DtypeError(
                f"{self.where}: expected tensors that hold numbers, got one on the device meta, which keeps shapes alone; make the tensors on "
                "another device, for example torch.zeros(3, device='cpu')"
            )
        for tensor, name in zip(tensors, arguments.names, strict=True):
            if tensor.dtype.is_floating_point and tensor.device != raveler.device:
                raise DtypeError(
                    f"{self.where}: expected a tensor on init's device, {raveler.device}, at {name}, got {tensor.device}; move it, or init"
                )
            refuse_nested(tensor, self.where, name)
            if tensor.layout not in (torch.strided, torch.sparse_coo):
                raise DtypeError(
                    f"{self.where}: expected a dense tensor or a sparse one of coordinates at {name}, as torch.func takes no other, got "
                    f"{str(tensor.layout).removeprefix('torch.')}; convert it with .to_sparse_coo() or .to_dense()"
                )
        precision = autocast_to(raveler.device)
        where = self.where
        if precision is not None:
            where += f" under autocast to {str(precision).removeprefix('torch.')}"
        return self.kind(where, self.function, raveler, arguments, autocast=precision), tensors
