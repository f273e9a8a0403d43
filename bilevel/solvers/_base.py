"""The contract of inner solvers, and the loop that handles masks and limits.

A solver sees a :class:`~bilevel.equations.problem.Problem` (a batch of flat problems), a start (batch, n) and a
:class:`Goal`. An iterative method passes its step function to :func:`iterate`. :mod:`bilevel.solvers.judging.judge` judges the
results of all methods, and of a user's function, in the same way.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from typing import Any, Protocol, TypeAlias, TypeVar, cast

import torch
from torch.linalg import vector_norm

from bilevel.equations.cases import cases_of
from bilevel.equations.linearization import Linearization
from bilevel.equations.problem import Problem
from bilevel.errors import ArgumentError
from bilevel.pytree import ravel_like
from bilevel.reports import Status
from bilevel.tolerance import Target

__all__ = [
    "CallableSolver",
    "Goal",
    "InnerSolution",
    "InnerSolver",
    "InnerSolverLike",
    "all_finite",
    "as_inner_solver",
    "is_lone",
    "is_one_of",
    "iterate",
    "length",
    "merge",
    "threshold_for",
]


@dataclass(frozen=True, eq=False)
class Goal:
    """The rule by which a solver stops: ‖R(x)‖ ≤ :attr:`threshold`.

    The judge checks the answer. It may ask for a smaller threshold. See the example of :class:`InnerSolver`.

    Parameters
    ----------
    problem
        The problem that is solved.
    init
        The initial guess (batch, n).
    target
        The accuracy that is asked for.
    given
        The threshold (batch,) that the judge asks for; None: the first one, which is measured at ``init``.
    origin
        The initial guess (batch, n) of the whole search; None: ``init``.
    """

    problem: Problem
    init: torch.Tensor
    target: Target
    given: torch.Tensor | None = None
    origin: torch.Tensor | None = None
    # The scale at init, once it was measured.
    _measured: list[torch.Tensor] = field(default_factory=list, init=False, repr=False)

    @property
    def starting_point(self) -> torch.Tensor:
        """Where the whole search began (batch, n)."""
        return self.init if self.origin is None else self.origin

    @property
    def scale(self) -> torch.Tensor:
        """Return max(‖R(init)‖, ‖∂R · init‖), (batch,).

        The second term estimates the residual at zero. It gives a warm start, whose first residual is already small,
        the same threshold as a cold start.
        """
        if not self._measured:
            self._measured.append(self._scale_of(self.problem.linearize(self.init)))
        return self._measured[0]

    @cached_property
    def threshold(self) -> torch.Tensor:
        """The residual norm to reach, (batch,); 0 to spend the budget."""
        if self.given is not None:
            return self.given
        if self.target.relative == 0:
            return self.init.new_full((self.init.shape[0],), self.target.absolute)
        return threshold_for(self.target, self.scale)

    def measure(self, linearization: Linearization) -> None:
        """Measure :attr:`scale` from a linearisation at ``init``, if it is needed. A solver that linearises there anyway calls this."""
        if self.target.relative and self.given is None and not self._measured:
            self._measured.append(self._scale_of(linearization))

    def _scale_of(self, linearization: Linearization) -> torch.Tensor:
        first = length(linearization.residual.detach())
        if not bool((self.init == 0).all()):
            first = torch.maximum(first, length(linearization.operator.matvec(self.init)))
        return torch.nan_to_num(first)


@dataclass(frozen=True, eq=False)
class InnerSolution:
    """The result of an inner solver; see the example of :class:`InnerSolver`.

    Parameters
    ----------
    x
        (batch, n), the last finite iterate of each problem.
    iterations
        int64 (batch,).
    status
        int64 (batch,): the status as far as the solver knows it; ``Status.NOT_CONVERGED`` if it does not.
    residual
        R(x) (batch, n), if the solver knows it at exactly this ``x``.
    value
        G(x) (batch,) of an argmin, if the solver knows it at exactly this ``x``.
    factor
        Cholesky factors (batch, n, n) of Hessians near ``x``, if the solver has them. A later linear solve may use
        them.
    error
        x − x* (batch, n) to first order, if the solver knows it; NaN for problems without an estimate.
    slow
        Bool (batch,): a method of quadratic convergence converged only linearly, as it does at a degenerate solution.
    """

    x: torch.Tensor
    iterations: torch.Tensor
    status: torch.Tensor
    residual: torch.Tensor | None = None
    value: torch.Tensor | None = None
    factor: torch.Tensor | None = None
    error: torch.Tensor | None = None
    slow: torch.Tensor | None = None


class InnerSolver(ABC):
    """A solver of a batch of problems. Subclasses are frozen dataclasses of settings with one method, ``solve``.

    Examples
    --------
    >>> import torch, bilevel
    >>> class Gradient(bilevel.InnerSolver):
    ...     def solve(self, problem, init, goal):
    ...         x, steps = init, torch.zeros(len(init), dtype=torch.int64)
    ...         while (problem.residual(x).norm(dim=1) > goal.threshold).any():
    ...             x, steps = x - 0.25 * problem.residual(x), steps + 1
    ...         return bilevel.InnerSolution(x, steps, torch.full_like(steps, int(bilevel.Status.NOT_CONVERGED)))
    >>> layer = bilevel.argmin(lambda x, a: ((x - a) ** 2).sum(), solver=Gradient())
    >>> layer(torch.zeros(2), torch.tensor([1.0, 3.0]))
    tensor([1.0000, 3.0000])
    """

    @property
    def is_confined(self) -> bool:
        """Whether the search stays between bounds, so that it cannot diverge."""
        return False

    @property
    def has_budget(self) -> bool:
        """Whether the caller chose a number of steps. Spending it is then no failure."""
        return getattr(self, "max_steps", None) is not None

    @property
    def name(self) -> str:
        """The name used in messages and reports."""
        return type(self).__name__

    def resumed(self, taken: int) -> InnerSolver | None:
        """Return the solver with the rest of its budget after ``taken`` steps; None if nothing is left."""
        budget: int | None = getattr(self, "max_steps", None)
        if budget is None:
            return self
        return self.with_max_steps(budget - taken) if budget > taken else None

    def with_max_steps(self, max_steps: int) -> InnerSolver:
        """Return the same solver with another budget."""
        if is_dataclass(self) and any(item.name == "max_steps" for item in fields(self)):
            return replace(self, max_steps=max_steps)
        made: Any = copy.copy(self)
        made.max_steps = max_steps
        return cast("InnerSolver", made)

    @abstractmethod
    def solve(self, problem: Problem, init: torch.Tensor, goal: Goal) -> InnerSolution:
        """Solve from ``init`` (batch, n) until ``goal.threshold`` is met or the steps are spent."""


@dataclass(frozen=True)
class CallableSolver(InnerSolver):
    """A user's function (objective, init, *args, **kwargs) ↦ x as an inner solver, called for one problem at a time."""

    function: Callable[..., Any]

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    def answers(self, problem: Problem, init: torch.Tensor) -> Iterator[Any]:
        """Yield the function's result for each problem."""
        for case in cases_of(problem, init):
            with torch.enable_grad():  # a user's solver may call backward
                found = self.function(case.function, case.init, *case.args, **case.kwargs)
            yield found

    def solve(self, problem: Problem, init: torch.Tensor, goal: Goal) -> InnerSolution:
        raveler, what = problem.system.raveler, f"solver {self.name}"
        rows = [ravel_like(found, raveler, problem.where, what).detach() for found in self.answers(problem, init)]
        x = torch.stack(rows).to(init) if rows else init
        unknown = torch.zeros(init.shape[0], dtype=torch.int64, device=init.device)
        return InnerSolution(x, unknown, torch.full_like(unknown, Status.NOT_CONVERGED))


InnerSolverLike: TypeAlias = InnerSolver | Callable[..., Any]


def as_inner_solver(solver: InnerSolverLike) -> InnerSolver:
    """Return ``solver`` as an :class:`InnerSolver`; a function (objective, init, *args, **kwargs) -> x is wrapped."""
    if isinstance(solver, InnerSolver):
        return solver
    if isinstance(solver, type):
        raise ArgumentError(
            f"expected solver to be an instance, got the class {solver.__name__}; write {solver.__name__}(...), or "
            "bilevel.TorchOptimizer(cls, max_steps=...) for a class of torch.optim"
        )
    if callable(solver):
        return CallableSolver(solver)
    raise ArgumentError(
        f"expected solver to be an InnerSolver or a function (objective, init, *args, **kwargs) -> x, got {solver!r}; "
        "for example bilevel.LBFGS()"
    )


class State(Protocol):
    """The state of a step function: a dataclass of tensors with a leading batch axis, among them x and R(x)."""

    @property
    def x(self) -> torch.Tensor: ...

    @property
    def residual(self) -> torch.Tensor: ...


S = TypeVar("S", bound=State)
T = TypeVar("T")

# A run diverges if its residual exceeds the first one by this factor.
_DIVERGED = 1e10


def iterate(
    state: S,
    step: Callable[[S, torch.Tensor], tuple[S, torch.Tensor | None]],
    goal: Goal,
    max_steps: int,
    *,
    descends: bool = False,
) -> tuple[InnerSolution, S]:
    """Apply ``step`` until every problem has ended. This loop handles masks, limits, finiteness checks and statuses.

    Parameters
    ----------
    state
        A dataclass whose tensor fields have a leading batch axis; fields that are not tensors are taken from the
        newest state as they are.
    step
        (state, active (batch,) bool) ↦ (new state, verdict). The verdict is None, or int64 (batch,) with
        ``Status.RUNNING`` for problems that continue. Any other status ends the problem at its *old* state.
    goal
        When to stop.
    max_steps
        The limit.
    descends
        Whether each step lowers a merit function. If not, a growing residual is a sign of divergence.

    Returns
    -------
    The solution, in which a problem that met a NaN keeps its last finite iterate, and the final state.
    """
    threshold = goal.threshold
    norm = length(state.residual)
    # If the first residual is already below the threshold, it says nothing about scales.
    limit = torch.full_like(norm, torch.inf) if descends else _DIVERGED * torch.maximum(norm, threshold)
    # A single problem's usual step is told by two numbers of Python's, which cost less than tensors of one number.
    lone = is_lone(norm)
    least, most = (float(threshold), float(limit)) if lone else (0.0, 0.0)
    largest = torch.finfo(norm.dtype).max ** 0.5  # the squares of larger ones overflow
    huge = float(norm) > largest if lone else bool((norm > largest).any())
    running = torch.full(norm.shape, int(Status.RUNNING), dtype=torch.int64, device=norm.device)
    status, active = running, (norm > threshold) & (norm < torch.inf)
    everyone = anyone = bool(active.all())
    if not everyone:
        status = torch.where(torch.isfinite(norm), running, torch.full_like(running, Status.NOT_FINITE))
        status = torch.where(norm <= threshold, torch.full_like(running, Status.CONVERGED), status)
        active = status == Status.RUNNING
        anyone = bool(active.any())
    iterations = torch.zeros_like(status)
    together = 0  # steps that all of the batch took
    for _ in range(max_steps):
        if not anyone:
            break
        before = status
        new, verdict = step(state, active)
        norm = length(new.residual) if huge else vector_norm(new.residual, dim=-1)
        if lone and verdict is None and least < float(norm) <= most and math.isfinite(float(new.x.sum())):
            state = new
            together += 1
            continue
        usual = (norm > threshold) & (norm <= limit)
        usual = usual if everyone else usual | ~active
        whole = all_finite(new.x)
        if verdict is None and bool(usual.all() & whole):
            # No problem ends at this step, so the statuses do not change.
            state = new if everyone else merge(active, new, state)
        elif everyone and verdict is None and bool((norm <= threshold).all() & whole):
            state, status, anyone = new, torch.full_like(running, Status.CONVERGED), False
            together += 1
            break
        else:
            outcome = torch.where(norm <= threshold, torch.full_like(running, Status.CONVERGED), running)
            outcome = torch.where(norm > limit, torch.full_like(running, Status.DIVERGED), outcome)
            if verdict is not None:
                outcome = torch.where(verdict != Status.RUNNING, verdict, outcome)
            broken = ~(torch.isfinite(norm) & torch.isfinite(new.x).all(dim=-1))
            lost = broken & (outcome != Status.DIVERGED)
            outcome = torch.where(lost, torch.full_like(running, Status.NOT_FINITE), outcome)
            ended_badly = broken if verdict is None else broken | (verdict != Status.RUNNING)
            state = merge(active & ~ended_badly, new, state)
            status = torch.where(active, outcome, status)
        if everyone:
            together += 1
        else:
            iterations = iterations + active
        if status is not before:
            active = status == Status.RUNNING
            everyone, anyone = bool(active.all()), bool(active.any())
    iterations = iterations + together
    if anyone:
        status = torch.where(status == Status.RUNNING, torch.full_like(status, Status.MAX_STEPS), status)
    return InnerSolution(state.x, iterations, status, state.residual, getattr(state, "value", None)), state


def threshold_for(target: Target, scale: torch.Tensor) -> torch.Tensor:
    """Return the residual norm to reach, per problem, for the scales given (batch,)."""
    return torch.clamp(target.relative * scale, min=target.absolute)


def merge(these: torch.Tensor, new: T, old: T) -> T:
    """Return a dataclass with the tensors of ``new`` for ``these`` problems (batch,), and those of ``old`` for the others."""
    if bool(these.all()):
        return new
    changes = {}
    for item in fields(new):  # type: ignore[arg-type]  # a type variable cannot say "dataclass"
        fresh, before = getattr(new, item.name), getattr(old, item.name)
        if isinstance(fresh, torch.Tensor) and before is not None:
            changes[item.name] = torch.where(these.reshape(-1, *[1] * (fresh.ndim - 1)), fresh, before)
    return replace(new, **changes)  # type: ignore[type-var]


def length(v: torch.Tensor) -> torch.Tensor:
    """Return ‖v‖ (batch,) of v (batch, n), even if the squares of entries underflow or overflow."""
    plain = vector_norm(v, dim=-1)
    least = 1e3 * torch.finfo(v.dtype).tiny ** 0.5
    if is_lone(plain) and least <= float(plain) < math.inf:
        return plain
    if not v.shape[-1] or bool(((plain >= least) & (plain < torch.inf)).all()):
        return plain
    largest = v.abs().amax(dim=-1, keepdim=True)
    scaled = largest.squeeze(-1) * (v / largest).norm(dim=-1)
    beyond = ((plain < least) | (plain == torch.inf)) & (largest.squeeze(-1) > 0) & (largest.squeeze(-1) < torch.inf)
    return torch.where(beyond, scaled, plain)


def is_lone(numbers: torch.Tensor) -> bool:
    """Return whether ``numbers`` (batch,) belong to a single problem on the CPU. Python numbers are then cheaper than tensors."""
    return numbers.shape[0] == 1 and numbers.device.type == "cpu"


def all_finite(numbers: torch.Tensor) -> torch.Tensor:
    """Return whether all numbers and their sum are finite, () bool. It takes fewer operations than ``isfinite``."""
    total = numbers.sum()
    return total - total == 0


def is_one_of(codes: torch.Tensor, statuses: Iterable[Status]) -> torch.Tensor:
    """Return where ``codes`` are among ``statuses``, bool of the same shape."""
    found = torch.zeros_like(codes, dtype=torch.bool)
    for status in statuses:
        found = found | (codes == status)
    return found
