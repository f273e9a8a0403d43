"""The outer loop: it moves θ, warm-starts both solves, and sets their accuracy by a policy.

The loop, its state and its checkpoints are one idea: a run. The methods that choose a step are in :mod:`bilevel.outer.methods`.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch.utils import _pytree as pytree

from bilevel.checksum import sealed, unsealed
from bilevel.errors import ArgumentError, SolveError
from bilevel.outer.methods import HOAG, Evaluation, OuterMethod, TorchOuter
from bilevel.outer.result import OuterResult, OuterStatus, OuterStep
from bilevel.outer.trail import PointHistory
from bilevel.problems.hypergradient import Hypergradient
from bilevel.problems.problem import BilevelProblem
from bilevel.pytree import as_real, moves, of_real
from bilevel.reports import Basis
from bilevel.setting_checks import check_steps
from bilevel.tolerance import Tolerance

__all__ = ["OuterRun", "minimize"]

Policy: TypeAlias = "Tolerance | Callable[[int], Tolerance]"
FORMAT = 2
OuterTree = TypeVar("OuterTree")


def minimize(
    problem: BilevelProblem,
    outer: OuterTree,
    data: Any,
    *,
    optimizer: OuterMethod | Callable[..., torch.optim.Optimizer] | None = None,
    tolerance: Policy | None = None,
    max_steps: int = 100,
    gradient_tolerance: float = 0.0,
    init: Any = None,
    callback: Callable[[OuterRun], Any] | Sequence[Callable[[OuterRun], Any]] | None = None,
    bounds: bool = False,
    on_failure: Literal["raise", "stop"] = "raise",
    resume: dict[str, Any] | None = None,
) -> OuterResult[OuterTree]:
    """Minimise F(φ*(θ), θ) over θ.

    Parameters
    ----------
    problem
        The problem. Its warm starts are used.
    outer
        The initial θ: a tensor or a pytree. Leaves that are neither floating-point nor complex tensors stay as they are.
        Parameters of the problem itself, such as ``tuning.outer`` of a :class:`HyperparameterOptimization`, are set to each
        point, and hold the last one at the end. Other tensors are not changed.
    data
        As for :meth:`BilevelProblem.hypergradient`.
    optimizer
        The outer method: :class:`HOAG` (the default), :class:`MAID`, or a function of a list of parameters that returns a
        ``torch.optim`` optimiser, such as ``lambda parameters: torch.optim.Adam(parameters, lr=0.1)``.
    tolerance
        A :class:`Tolerance` for all steps, or a function of the number of the step, counted from 1, such as
        :class:`ExponentialSchedule`. None: the problem's own. ``Tolerance(descent=0.5)`` asks for a descent direction, and
        no more.
    max_steps
        The largest number of steps in θ.
    gradient_tolerance
        The loop ends when ‖ĝ‖, plus its error bound if one is known, is at most this. Goals relative to the gradient stop
        there too: see ``stationary`` of :class:`Tolerance`.
    init
        The initial guess of the first inner solve.
    callback
        A function of the :class:`OuterRun`, or a sequence of them, called at every point. The loop ends if one returns
        True.
    bounds
        Whether the error bound of every hypergradient is computed. A goal computes it in any case.
    on_failure
        The policy for a failed solve and for a value that is not finite, if a shorter step does not help: ``"raise"``, or
        ``"stop"`` with a status. HOAG and MAID shorten a step on which a solve fails.
    resume
        The ``state`` of a result, or of a run in a callback. The loop continues from it, bit for bit as if it had not
        stopped.

    Returns
    -------
    OuterResult
        The last point. After ``KeyboardInterrupt`` its status is ``INTERRUPTED``.

    Raises
    ------
    SolveError
        If a solve failed under ``on_failure="raise"``.
    ArgumentError
        If a setting cannot be used.

    Examples
    --------
    >>> import torch, bilevel
    >>> class Ridge(bilevel.BilevelProblem):
    ...     def inner_objective(self, inner, outer, data):
    ...         return ((inner - data) ** 2).sum() + outer.exp() * (inner**2).sum()
    ...     def outer_objective(self, inner, outer, data):
    ...         return ((inner - 0.8 * data) ** 2).sum()
    >>> data = torch.tensor([1.0, 2.0], dtype=torch.float64)
    >>> result = bilevel.minimize(
    ...     Ridge(), torch.zeros((), dtype=torch.float64), data, init=torch.zeros_like(data), gradient_tolerance=1e-6
    ... )
    >>> round(result.outer.exp().item(), 4), result.status.name  # 1 / (1 + e^θ) = 0.8
    (0.25, 'CONVERGED')
    """
    check_steps("minimize", "max_steps", max_steps, least=0)
    if on_failure not in ("raise", "stop"):
        raise ArgumentError(f"minimize: expected on_failure to be 'raise' or 'stop', got {on_failure!r}; pass one")
    if not isinstance(problem, BilevelProblem):
        raise ArgumentError(f"minimize: expected problem to be a bilevel.BilevelProblem, got {problem!r}; subclass it")
    method = _as_method(optimizer)
    callbacks = [callback] if callable(callback) else list(callback or ())
    run = OuterRun(problem, outer, data, method, tolerance, gradient_tolerance, bounds, init)
    with _kept(problem, "tolerance"):
        return _loop(run, max_steps, gradient_tolerance, callbacks, on_failure, resume)


class OuterRun:
    """A run of :func:`bilevel.minimize`, for its callbacks.

    Attributes
    ----------
    history
        The points so far; the last one is the current point.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        outer: Any,
        data: Any,
        method: OuterMethod,
        policy: Policy | None,
        gradient_tolerance: float,
        bounds: bool,
        init: Any,
    ) -> None:
        self.problem, self.data, self.method, self.bounds = problem, data, method, bounds
        self._zero = gradient_tolerance
        own = problem.tolerance
        self._policy: Callable[[int], Tolerance]
        if policy is None or isinstance(policy, Tolerance):
            fixed = own if policy is None else policy
            self._policy = lambda k: fixed
        else:
            self._policy = policy
        self._leaves, self._structure = pytree.tree_flatten(outer)
        if not any(moves(leaf) for leaf in self._leaves):
            raise ArgumentError(
                f"minimize: expected outer to hold a floating-point or complex tensor, got {outer!r}; pass tensors to minimise over"
            )
        parameters = {id(parameter) for parameter in problem.parameters()}
        self._own = [leaf if id(leaf) in parameters else None for leaf in self._leaves if moves(leaf)]
        self._init = init
        self.history: list[OuterStep] = []
        self._memory: dict[str, Any] = {}
        self._here: Evaluation | None = None
        self._warm: dict[str, Any] = {}
        self._trail = PointHistory()
        self._spent = [0, 0]
        self._evaluations = 0
        self._seconds, self._began = 0.0, time.perf_counter()
        self.failure: SolveError | None = None

    @property
    def outer(self) -> Any:
        """θ, the pytree that was given."""
        assert self._here is not None
        return self._tree(self._here.outer)

    @property
    def inner(self) -> Any:
        """φ at ``outer``."""
        assert self._here is not None
        return self._here.inner

    @property
    def gradient(self) -> Any:
        """ĝ at ``outer``, in the same pytree; None at leaves that do not move."""
        assert self._here is not None
        parts = iter(self._here.gradient)
        filled = [of_real(next(parts), leaf) if moves(leaf) else None for leaf in self._leaves]
        return pytree.tree_unflatten(filled, self._structure)

    @property
    def value(self) -> float:
        """The corrected outer value at ``outer``."""
        assert self._here is not None
        return self._here.corrected

    def state_dict(self) -> dict[str, Any]:
        """Return the state that resumes the run, in types that ``torch.load(..., weights_only=True)`` reads."""
        here = self._here
        assert here is not None
        record = {**here.record, "basis": int(here.record["basis"])}
        state: dict[str, Any] = _copied(
            {
                "format": FORMAT,
                "outer": list(here.outer),
                "value": here.value,
                "corrected": here.corrected,
                "slack": here.slack,
                "gradient": list(here.gradient),
                "inner": here.inner,
                "record": record,
                "optimizer": type(self.method).__name__,
                "method": self._memory,
                "problem": self._warm,
                "trail": self._trail.state_dict(),
                "spent": list(self._spent),
                "evaluations": self._evaluations,
                "seconds": self._elapsed,
                "history": [{**asdict(step), "basis": int(step.basis)} for step in self.history],
            }
        )
        return sealed(state)

    def _load(self, state: dict[str, Any]) -> None:
        state = unsealed(
            _copied(state), what="minimize: expected resume", form=FORMAT,
            remedy="pass result.state, or run.state_dict(), as it was saved",
        )  # fmt: skip
        if state["optimizer"] != type(self.method).__name__:
            raise ArgumentError(
                f"minimize: expected the state of a run by {type(self.method).__name__}, got one by {state['optimizer']}; resume with the "
                "optimizer that the run began with"
            )
        shapes = [as_real(leaf).shape for leaf in self._leaves if moves(leaf)]
        if [x.shape for x in state["outer"]] != shapes:
            raise ArgumentError(
                f"minimize: expected the state of a run over tensors of shapes {[tuple(shape) for shape in shapes]}, got "
                f"{[tuple(x.shape) for x in state['outer']]}; resume with the outer variables that the run began with"
            )
        record = {**state["record"], "basis": Basis(state["record"]["basis"])}
        self._here = Evaluation(
            tuple(state["outer"]), state["value"], state["corrected"], state["slack"], tuple(state["gradient"]),
            state["inner"], record,
        )  # fmt: skip
        self._memory, self._warm = state["method"], state["problem"]
        self._trail = PointHistory.of(state["trail"])
        self._follow()
        self._spent, self._evaluations = list(state["spent"]), state["evaluations"]
        self._seconds = state["seconds"]
        self.history = [OuterStep(**{**step, "basis": Basis(step["basis"])}) for step in state["history"]]
        self.problem.recall(self._warm)

    @property
    def _elapsed(self) -> float:
        return self._seconds + time.perf_counter() - self._began

    def _tree(self, outer: tuple[torch.Tensor, ...]) -> Any:
        parts = iter(outer)
        filled = [of_real(next(parts), leaf) if moves(leaf) else leaf for leaf in self._leaves]
        return pytree.tree_unflatten(filled, self._structure)

    def _evaluate(self, outer: tuple[torch.Tensor, ...], *, tighter: float = 1.0) -> Evaluation | None:
        """Return the hypergradient at ``outer``, as the policy has it for the next point; None, and why, if a solve failed."""
        problem = self.problem
        asked = _tightened(_until(self._policy(len(self.history) + 1), self._zero), tighter)
        problem.tolerance = asked
        init = self._init if self._evaluations == 0 else None
        self._evaluations += 1
        start = self._trail.start(outer) if problem.warm_start else None
        if start is not None:
            problem.begin_at(*start)
        result = self._hypergradient(outer, init)
        if start is not None and self._warm and (result is None or not _finite(result)):
            # The trail may point out of an objective's domain, where the present point does not.
            problem.recall(self._warm)
            result = self._hypergradient(outer, init)
        if result is None:
            problem.recall(self._warm) if self._warm else problem.reset()
            return None
        if problem.warm_start and bool(result.report.iterations.any()):  # what no solve has moved is but extrapolated
            self._trail.add(outer, result.inner, result.adjoint)
        forward, backward = result.report.forward, result.report.backward
        self._spent[0] += int(forward.iterations.sum())
        self._spent[1] += int(backward.iterations.sum())
        bound = result.bound if asked.has_goal or self.bounds else None
        value, corrected = float(result.value), float(result.corrected_value)
        # Without bounds, the first-order correction itself is what is known of the errors of values.
        slack = abs(value - corrected)
        if asked.has_goal or self.bounds:
            slack = result.value_bound.value
        numbers = (asked.delta, asked.delta_prime)
        reached = (float(forward.residual_norm.max()), float(backward.residual_norm.max()))
        shown = [float(n) if isinstance(n, (int, float)) else r for n, r in zip(numbers, reached, strict=True)]
        record = {
            "error_bound": math.nan if bound is None else bound.value,
            "basis": Basis.RESIDUAL if bound is None else bound.basis,
            "delta": shown[0],
            "delta_prime": shown[1],
        }
        gradient = tuple(as_real(leaf) for leaf in pytree.tree_leaves(result.grad) if leaf is not None)
        return Evaluation(outer, value, corrected, slack, gradient, result.inner, record)

    def _hypergradient(self, outer: tuple[torch.Tensor, ...], init: Any) -> Hypergradient | None:
        try:
            # A subclass may take θ from itself; here it is what moves.
            return BilevelProblem.hypergradient(self.problem, self._tree(outer), self.data, init=init)
        except SolveError as error:
            self.failure = error
            return None

    def _arrive(self, here: Evaluation) -> None:
        """Make ``here`` the present point, and file it."""
        self._here, self._warm = here, self.problem.memory()
        self._follow()
        self.history.append(
            OuterStep(
                number=len(self.history) + 1,
                value=here.value,
                corrected_value=here.corrected,
                value_error=here.slack,
                gradient_norm=here.norm,
                inner_iterations=self._spent[0],
                linear_iterations=self._spent[1],
                step_size=self._memory.pop("taken", math.nan),
                evaluations=self._evaluations,
                seconds=self._elapsed,
                **here.record,
            )
        )
        self._spent = [0, 0]

    def _follow(self) -> None:
        """Set the problem's own parameters, where θ is those, to the present point."""
        assert self._here is not None
        with torch.no_grad():
            for parameter, value in zip(self._own, self._here.outer, strict=True):
                if parameter is not None:
                    parameter.copy_(of_real(value, parameter))

    def _end(self, status: OuterStatus) -> OuterResult:
        here = self._here
        assert here is not None
        step = self.history[-1]
        error = f" ± {step.error_bound:.2g} ({step.basis.name.lower()})" if math.isfinite(step.error_bound) else ""
        message = (
            f"minimize: after {step.number - 1} steps the outer value is {here.corrected:.6g} and the hypergradient's norm "
            f"{here.norm:.3g}{error}; it ended because {status.value}."
        )
        if not status.success and self.failure is not None:
            message += f" The last failed solve said: {self.failure}"
        return OuterResult(
            self.outer, here.inner, here.corrected, tuple(self.history), status, message, self.state_dict()
        )  # fmt: skip


def _loop(
    run: OuterRun,
    max_steps: int,
    gradient_tolerance: float,
    callbacks: list[Callable[[OuterRun], Any]],
    on_failure: str,
    resume: dict[str, Any] | None,
) -> OuterResult:
    seen = resume is not None
    if resume is not None:
        run._load(resume)
    else:
        first = run._evaluate(tuple(as_real(leaf).detach().clone() for leaf in run._leaves if moves(leaf)))
        if first is None:
            assert run.failure is not None
            raise run.failure
        run._memory = run.method.begin(first)
        run._arrive(first)
    try:
        while True:
            here = run._here
            assert here is not None
            if not here.finite:
                return _failed(run, OuterStatus.NOT_FINITE, on_failure)
            # Callbacks saw the point of a resumed run before. Every callback is called, even if an earlier one asks to stop.
            answers = [] if seen else [call(run) for call in callbacks]
            seen = False
            if any(bool(answer) for answer in answers):
                return run._end(OuterStatus.STOPPED)
            error = here.record["error_bound"]
            if here.norm + (error if math.isfinite(error) else 0.0) <= gradient_tolerance:
                return run._end(OuterStatus.CONVERGED)
            if len(run.history) > max_steps:
                return run._end(OuterStatus.MAX_STEPS)
            run.failure = None
            there = run.method.advance(here, run._memory, run._evaluate)
            if there is None:
                status = OuterStatus.NO_DECREASE if run.failure is None else OuterStatus.SOLVE_FAILED
                return _failed(run, status, on_failure)
            run._arrive(there)
    except KeyboardInterrupt:
        return run._end(OuterStatus.INTERRUPTED)


def _failed(run: OuterRun, status: OuterStatus, on_failure: str) -> OuterResult:
    result = run._end(status)
    if on_failure == "raise" and status is OuterStatus.SOLVE_FAILED:
        assert run.failure is not None
        raise run.failure
    if on_failure == "raise" and status is OuterStatus.NOT_FINITE:
        raise ArgumentError(f"{result.message} Lower the step size, or bound what the outer variables may become.")
    return result


def _as_method(optimizer: OuterMethod | Callable[..., torch.optim.Optimizer] | None) -> OuterMethod:
    if optimizer is None:
        return HOAG()
    if isinstance(optimizer, OuterMethod):
        return optimizer
    if callable(optimizer) and not isinstance(optimizer, type):
        return TorchOuter(optimizer)
    raise ArgumentError(
        f"minimize: expected optimizer to be HOAG(), MAID(), or a function of a list of parameters that returns a torch.optim "
        f"optimiser, got {optimizer!r}; write for example lambda parameters: torch.optim.Adam(parameters, lr=0.1)"
    )


def _tightened(tolerance: Tolerance, by: float) -> Tolerance:
    """Return ``tolerance`` with the errors that it allows divided by ``by``."""
    if by == 1.0:
        return tolerance
    if tolerance.descent is not None:
        return replace(tolerance, descent=1 - (1 - tolerance.descent) / by, stationary=None)
    if tolerance.hypergradient is not None:
        return replace(tolerance, hypergradient=tolerance.hypergradient / by, stationary=None)
    delta, delta_prime = tolerance.delta, tolerance.delta_prime
    return replace(
        tolerance,
        delta=delta / by if isinstance(delta, (int, float)) else delta,
        delta_prime=delta_prime / by if isinstance(delta_prime, (int, float)) else delta_prime,
    )


def _until(tolerance: Tolerance, norm: float) -> Tolerance:
    """Return ``tolerance`` with ``norm``, at which the loop ends, counted as zero where its goal is relative."""
    relative = tolerance.descent is not None or tolerance.relative
    return replace(tolerance, stationary=norm) if relative and norm > 0 and tolerance.stationary is None else tolerance


def _finite(result: Hypergradient) -> bool:
    leaves = (result.value, *(leaf for leaf in pytree.tree_leaves(result.grad) if leaf is not None))
    return all(bool(torch.isfinite(leaf).all()) for leaf in leaves)


def _copied(tree: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf, tree)


@contextlib.contextmanager
def _kept(problem: BilevelProblem, name: str) -> Iterator[None]:
    before = getattr(problem, name)
    try:
        yield
    finally:
        setattr(problem, name, before)
