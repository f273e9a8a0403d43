"""Equilibria of games and saddle points as a differentiable layer: ``bilevel.equilibrium``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch

from bilevel.equations.equilibrium import (
    BoundState,
    EquilibriumSystem,
    Players,
    bound_state,
    check_players,
    player_at_fault,
)
from bilevel.equations.player_bounds import PlayerBounds
from bilevel.equations.player_terms import PlayerTerms
from bilevel.equations.problem import Problem
from bilevel.equations.system import System
from bilevel.errors import ArgumentError
from bilevel.layers.call import SolveCall
from bilevel.layers.differentiation import Differentiation
from bilevel.layers.layer import Layer
from bilevel.layers.settings import SolveSettings
from bilevel.layers.solution import Solution
from bilevel.linear._base import LinearSolverLike
from bilevel.policy import OnFailure
from bilevel.prox import Term
from bilevel.reports import Status, StatusMessages
from bilevel.solvers._base import InnerSolver, InnerSolverLike
from bilevel.solvers._outcome import InnerOutcome
from bilevel.tolerance import Tolerance

__all__ = ["EquilibriumLayer", "equilibrium"]

T = TypeVar("T")

# How the search of a game with bounds or terms may fail.
_SHORT_OF_ONE = (Status.SINGULAR, Status.LINE_SEARCH_FAILED, Status.MAX_STEPS, Status.DIVERGED)
_NO_EQUILIBRIUM = (
    "where a player's unknowns can grow without end there may be no equilibrium: bound them on both sides, or add a strictly convex term such as "
    "1e-3 * (x**2).sum() to each objective, with the x of its own player; else start elsewhere"
)


def equilibrium(
    objectives: Sequence[Callable[..., torch.Tensor]],
    *,
    lower: Sequence[Any] | Callable[..., Sequence[Any]] | torch.Tensor | float | None = None,
    upper: Sequence[Any] | Callable[..., Sequence[Any]] | torch.Tensor | float | None = None,
    prox: Sequence[Any] | Callable[..., Sequence[Any]] | Term | None = None,
    solver: InnerSolverLike | None = None,
    linear_solver: LinearSolverLike | None = None,
    tolerance: Tolerance | None = None,
    on_failure: OnFailure = "raise",
    differentiation: Differentiation | None = None,
) -> EquilibriumLayer:
    """Turn objectives into the layer x*(θ) with x_i* = argmin_{x_i} f_i(x_1*, …, x_i, …, x_N*, θ) for each player i.

    It solves the stacked first-order conditions ∇_{x_i} f_i = 0, and checks at the answer that each player's own Hessian is positive
    semi-definite along the directions that bounds and terms leave free. Where one is not, the answer is no equilibrium: the status is
    ``INDEFINITE``, and the message names the player. A saddle point min_x max_y f(x, y) is the equilibrium of the objectives f and −f.

    Parameters
    ----------
    objectives
        f_i: functions of ``(x_1, ..., x_N, *args, **kwargs)`` that return a scalar tensor, twice differentiable. The players are counted from 0.
    lower, upper
        Bounds: a list with an entry for each player. An entry is None, a number, a tensor, a pytree of tensors like x_i, or a function of the
        arguments that returns one. One number bounds all players, and one function of the arguments may return the whole list. The conditions
        are then those of a variational inequality. Where an unknown is on its bound and its slope ∂f_i/∂x_i is zero, the derivative is
        one-sided, and refused as ``DEGENERATE``.
    prox
        Proximal terms: a list with an entry for each player. An entry is None, a term of :mod:`bilevel.prox`, a pytree of terms like x_i, or a
        function of the arguments that returns one. One term serves all players, and one function may return the whole list. Player i
        then minimises f_i + g_i. A player has bounds or a term; :class:`bilevel.prox.Box` has both in one. Where a term is at its threshold,
        the derivative is refused as ``DEGENERATE``.
    solver
        An inner solver for the residual, by default Newton's method. With bounds or terms it is the semismooth one; where it fails, a path of
        solutions is followed from a game that ``init`` solves. Or a function ``(objectives, init, *args, **kwargs)`` -> x, where
        ``objectives`` maps the tuple x to the tuple of values.
    linear_solver, tolerance, on_failure
        See :func:`bilevel.root`.
    differentiation
        See :func:`bilevel.root`. With bounds or terms it is :class:`bilevel.Implicit`, and others are refused.

    Returns
    -------
    EquilibriumLayer
        A function of ``(init, *args, **kwargs)``; ``init`` is a tuple with a tensor, or a pytree of tensors, for each player. It returns the
        same.

    Raises
    ------
    ArgumentError
        If a setting cannot be used.

    References
    ----------
    Facchinei & Kanzow, "Generalized Nash equilibrium problems", Annals of Operations Research 175, 2010; Herings & Peeters, "Homotopy methods to
    compute equilibria in game theory", Economic Theory 42, 2010 (paths).

    Examples
    --------
    Two firms choose their outputs at the price 1 − x − y, with unit costs c (Cournot); x = (1 − 2 c_0 + c_1) / 3:

    >>> import torch, bilevel
    >>> duopoly = bilevel.equilibrium([lambda x, y, c: -x * (1 - x - y - c[0]), lambda x, y, c: -y * (1 - x - y - c[1])])
    >>> c = torch.tensor([0.1, 0.4], dtype=torch.float64, requires_grad=True)
    >>> zero = torch.zeros((), dtype=torch.float64)
    >>> x, y = duopoly((zero, zero), c)
    >>> round(x.item(), 6), round(y.item(), 6)
    (0.4, 0.1)
    >>> x.backward()
    >>> c.grad
    tensor([-0.6667,  0.3333], dtype=torch.float64)

    The first firm can make 0.25 at most:

    >>> capped = bilevel.equilibrium(duopoly.objectives, lower=[0.0, 0.0], upper=[lambda c: 0.25, None])
    >>> x, y = capped((zero, zero), c)
    >>> round(x.item(), 6), round(y.item(), 6)
    (0.25, 0.175)

    A zero-sum game in mixed strategies. The derivative of its value by A is x yᵀ:

    >>> simplex = bilevel.prox.Simplex()
    >>> game = bilevel.equilibrium([lambda x, y, A: x @ A @ y, lambda x, y, A: -(x @ A @ y)], prox=[simplex, simplex])
    >>> A = torch.tensor([[2.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    >>> start = torch.tensor([0.5, 0.5], dtype=torch.float64)
    >>> [strategy.tolist() for strategy in map(lambda s: s.round(decimals=6), game((start, start), A))]
    [[0.4, 0.6], [0.4, 0.6]]
    """
    if callable(objectives) or not isinstance(objectives, (list, tuple)) or not objectives:
        raise ArgumentError(
            f"equilibrium: expected a list of objectives, one for each player, got {objectives!r}; write bilevel.equilibrium([f_1, f_2]), and "
            "bilevel.argmin(f) for a single one"
        )
    wrong = next((f for f in objectives if not callable(f)), None)
    if wrong is not None:
        raise ArgumentError(
            f"equilibrium: expected objectives to be functions of (x_1, ..., x_N, *args), got {wrong!r}; pass functions"
        )
    low, high = (PlayerBounds.of(name, given, len(objectives)) for name, given in (("lower", lower), ("upper", upper)))
    terms = PlayerTerms.of("prox", prox, len(objectives))
    sides = [side.entries for side in (low, high) if side is not None]
    for player, term in enumerate(() if terms is None else terms.entries):
        if term is not None and any(entries[player] is not None for entries in sides):
            raise ArgumentError(
                f"equilibrium: expected bounds or a term for player {player}, got both; write the bounds as bilevel.prox.Box, or the term as part "
                "of a term of your own, bilevel.prox.Custom"
            )
    return EquilibriumLayer(
        Players(tuple(objectives), low, high, terms),
        solver=solver,
        linear_solver=linear_solver,
        tolerance=tolerance,
        on_failure=on_failure,
        differentiation=differentiation,
    )


class EquilibriumLayer(Layer):
    """A differentiable equilibrium: a function of ``(init, *args, **kwargs)``. Made by :func:`equilibrium`."""

    def __init__(
        self,
        players: Players,
        *,
        solver: InnerSolverLike | None,
        linear_solver: LinearSolverLike | None,
        tolerance: Tolerance | None,
        on_failure: OnFailure,
        differentiation: Differentiation | None = None,
    ) -> None:
        if tolerance is not None and getattr(tolerance, "has_goal", False):
            raise ArgumentError(
                f"equilibrium: expected Tolerance(delta=..., delta_prime=...), got {tolerance!r}; a layer has no outer loss: write a "
                "bilevel.BilevelProblem"
            )
        super().__init__(
            EquilibriumSystem,
            players,
            solver=solver,
            linear_solver=linear_solver,
            tolerance=tolerance,
            on_failure=on_failure,
            differentiation=differentiation,
        )
        names = ", ".join(getattr(f, "__name__", type(f).__name__) for f in players.objectives)
        self.where = f"`equilibrium` layer `{names}`"
        # Whoever decides whether evaluations may be replayed, or closures reach a gradient, looks at functions.
        bounds = [side.functions for side in (players.lower, players.upper, players.terms) if side is not None]
        self.written = lambda: _joined((*players.objectives, *(f for functions in bounds for f in functions)))

    @property
    def objectives(self) -> tuple[Callable[..., torch.Tensor], ...]:
        """The players' objectives."""
        assert isinstance(self.function, Players)
        return self.function.objectives

    def conditions(self, players: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the pytree (∇_{x_1} f_1, …, ∇_{x_N} f_N), which vanishes at an equilibrium."""
        assert isinstance(self.function, Players)
        slopes = []
        for i, objective in enumerate(self.function.objectives):

            def own(part: Any, i: int = i, objective: Callable[..., torch.Tensor] = objective) -> torch.Tensor:
                return objective(*players[:i], part, *players[i + 1 :], *args, **kwargs)

            slopes.append(torch.func.grad(own)(players[i]))
        return tuple(slopes)

    def _solution(
        self,
        settings: SolveSettings,
        init: T,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        value_only: bool = False,
    ) -> Solution[T]:
        assert isinstance(self.function, Players)
        check_players(self.where, self.function.objectives, init)
        if self.function.terms is not None:
            self.function.terms(
                self.where, tuple(cast("tuple[Any, ...]", init)), args, kwargs
            )  # the parameters' values are checked here
        return super()._solution(settings, init, args, kwargs)

    def _call(self, settings: SolveSettings, system: System, watched: bool) -> SolveCall:
        call = super()._call(settings, system, watched)
        return _EquilibriumCall(settings, self.inspector, call.written, system.where, watched, call.dtype)


class _EquilibriumCall(SolveCall):
    """A call that checks the second-order conditions of each player at the answer."""

    def reviewed(
        self, solver: InnerSolver, problem: Problem, init: torch.Tensor, outcome: InnerOutcome
    ) -> tuple[InnerOutcome, StatusMessages]:
        """Return the outcome with ``Status.INDEFINITE`` where a player could do better nearby, and the words that name the first such player."""
        state = bound_state(problem, outcome.x)
        if state is not None:
            outcome = self._within(problem, outcome, state)
        player = player_at_fault(problem, outcome.x, outcome.status == Status.CONVERGED)
        fault = player >= 0
        outcome = replace(outcome, status=torch.where(fault, int(Status.INDEFINITE), outcome.status))
        words = dict(super().reviewed(solver, problem, init, outcome)[1])
        if state is not None:
            remedy = _NO_EQUILIBRIUM if self.settings.solver is None else f"leave solver= out; {_NO_EQUILIBRIUM}"
            words.update({status: (words.get(status, (status.meaning,))[0], remedy) for status in _SHORT_OF_ONE})
        if not bool(fault.any()):
            return outcome, words
        first = int(player[int(fault.nonzero()[0])])
        words[Status.INDEFINITE] = (
            f"ended where the objective of player {first} has negative curvature in that player's own unknowns, which is no equilibrium",
            "start elsewhere, or check the sign of that objective, as each player minimises; if any stationary point will do, state the "
            "first-order conditions as a bilevel.root",
        )
        return outcome, words

    def _within(self, problem: Problem, outcome: InnerOutcome, state: BoundState) -> InnerOutcome:
        """Return the outcome with x exactly within its bounds, and note where no derivative exists."""
        flags = state.degenerate.any(-1)
        if bool(flags.any()):
            first = int(flags.nonzero()[0])
            place = int(state.degenerate[first].nonzero()[0])
            self.degenerate = flags.reshape(problem.system.batch_shape)
            self.messages = {
                Status.DEGENERATE: (
                    f"found no derivative: unknown {place} is on its bound with a zero slope, where the derivative is one-sided",
                    "move the bound, or differentiate at arguments where the unknown is clearly on the bound or off it",
                )
            }
        kinks = state.at_kink.any(-1)
        if bool(kinks.any()):
            lost = kinks.reshape(problem.system.batch_shape)
            self.degenerate = lost if self.degenerate is None else self.degenerate | lost
            self.messages = {
                Status.DEGENERATE: (
                    "found no derivative: a player's proximal term is just at its threshold, where the derivative is one-sided",
                    "change the arguments a little, for example a strength by a relative 1e-3, or pass on_failure='ignore' to take the derivative of "
                    "one side",
                ),
                **self.messages,
            }
        crossed = (state.lower > state.upper).any(-1)
        status = torch.where(crossed, int(Status.INFEASIBLE), outcome.status)
        x = torch.where((outcome.status == Status.CONVERGED).unsqueeze(-1), state.landed, outcome.x)
        words = dict(outcome.words)
        if bool(crossed.any()):
            words[Status.INFEASIBLE] = (
                "got a lower bound above the upper bound of the same unknown",
                "check lower and upper, which are to be in order for every unknown",
            )
        return replace(outcome, x=x, status=status, words=words)


def _joined(objectives: tuple[Callable[..., Any], ...]) -> Callable[..., Any]:
    def both() -> tuple[Any, ...]:
        return objectives

    return both
