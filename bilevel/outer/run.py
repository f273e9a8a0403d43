"""A run of the outer loop: its points, what they cost, its checkpoints, and how it ends."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, TypeAlias

import torch
from torch.utils import _pytree as pytree

from bilevel.checksum import sealed, unsealed
from bilevel.errors import ArgumentError, SolveError
from bilevel.outer.methods import Evaluation, OuterMethod
from bilevel.outer.result import OuterResult, OuterStatus, OuterStep
from bilevel.outer.trail import PointHistory
from bilevel.problems.problem import BilevelProblem
from bilevel.problems.result import Hypergradient
from bilevel.pytree import as_real, moves, of_real
from bilevel.reports import Basis
from bilevel.tolerance import Tolerance

__all__ = ["OuterRun", "Policy", "follow"]

Policy: TypeAlias = "Tolerance | Callable[[int], Tolerance]"
FORMAT = 2


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
        elif callable(policy):
            self._policy = policy
        else:
            raise _no_tolerance(
                "tolerance to be a bilevel.Tolerance, or a function of the step's number that returns one", policy
            )
        self._leaves, self._structure = pytree.tree_flatten(outer)
        if not any(moves(leaf) for leaf in self._leaves):
            raise ArgumentError(
                f"minimize: expected outer to hold a floating-point or complex tensor, got {outer!r}; pass tensors to minimise over, such as "
                "dict(module.named_parameters()) of a module"
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
        """Return the hypergradient at ``outer``, to the accuracy that the policy asks for at the next point; None if a solve failed."""
        problem = self.problem
        asked = self._policy(len(self.history) + 1)
        if not isinstance(asked, Tolerance):
            raise _no_tolerance("the function given as tolerance to return a bilevel.Tolerance", asked)
        asked = _tightened(_until(asked, self._zero), tighter)
        problem.tolerance = asked
        init = self._init if self._evaluations == 0 else None
        self._evaluations += 1
        start = self._trail.start(outer) if problem.warm_start else None
        if start is not None:
            problem.begin_at(*start)
        result = self._hypergradient(outer, init)
        if start is not None and self._warm and (result is None or not _finite(result)):
            # A start that was extrapolated from the trail may lie outside an objective's domain. The last solution does not.
            problem.recall(self._warm)
            result = self._hypergradient(outer, init)
        if result is None:
            problem.recall(self._warm) if self._warm else problem.reset()
            return None
        # If no solve took a step, the solution is the extrapolated start itself, and tells the trail nothing new.
        if problem.warm_start and bool(result.report.iterations.any()):
            self._trail.add(outer, result.inner, result.adjoint)
        forward, backward = result.report.forward, result.report.backward
        self._spent[0] += int(forward.iterations.sum())
        self._spent[1] += int(backward.iterations.sum())
        bound = result.bound if asked.has_goal or self.bounds else None
        value, corrected = float(result.value), float(result.corrected_value)
        # Without bounds, the size of the first-order correction estimates the error of the value.
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
            # A subclass's own method may take θ from its parameters. Here θ is an argument.
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


def follow(
    run: OuterRun,
    max_steps: int,
    gradient_tolerance: float,
    callbacks: list[Callable[[OuterRun], Any]],
    on_failure: str,
    resume: dict[str, Any] | None,
) -> OuterResult:
    """Follow the method of ``run`` from point to point until the loop ends."""
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
            stop = not seen and _call_all(callbacks, run)
            seen = False
            if stop:
                return run._end(OuterStatus.STOPPED)
            error = here.record["error_bound"]
            if here.norm + (error if math.isfinite(error) else 0.0) <= gradient_tolerance:
                return run._end(OuterStatus.CONVERGED)
            if len(run.history) > max_steps:
                return run._end(OuterStatus.MAX_STEPS)
            run.failure = None
            memory = dict(run._memory)  # an interrupted step leaves what belongs to the present point
            there = run.method.advance(here, memory, run._evaluate)
            run._memory = memory
            if there is None:
                status = OuterStatus.NO_DECREASE if run.failure is None else OuterStatus.SOLVE_FAILED
                return _failed(run, status, on_failure)
            run._arrive(there)
    except KeyboardInterrupt:
        return run._end(OuterStatus.INTERRUPTED)


def _call_all(callbacks: list[Callable[[OuterRun], Any]], run: OuterRun) -> bool:
    """Call all ``callbacks``, and return whether one asks to stop. What they see of the present point has to stay as it is."""
    here = run._here
    assert here is not None
    shown = [*here.outer, *here.gradient, *(t for t in pytree.tree_leaves(here.inner) if isinstance(t, torch.Tensor))]
    shown = [t for t in shown if not t.is_inference()]
    versions = [t._version for t in shown]
    answers = [bool(call(run)) for call in callbacks]
    if versions != [t._version for t in shown]:
        raise ArgumentError(
            "minimize: expected callbacks to leave run.outer, run.gradient and run.inner as they are, and one of them was changed in place, so "
            "that values and gradients no longer belong to the point; copy a tensor before you change it, and keep outer variables within "
            "bounds by a function of them, such as torch.sigmoid or torch.nn.functional.softplus, in the problem's objectives"
        )
    return any(answers)


def _failed(run: OuterRun, status: OuterStatus, on_failure: str) -> OuterResult:
    result = run._end(status)
    if on_failure == "raise" and status is OuterStatus.SOLVE_FAILED:
        assert run.failure is not None
        raise run.failure
    if on_failure == "raise" and status is OuterStatus.NOT_FINITE:
        raise ArgumentError(f"{result.message} Lower the step size, or bound what the outer variables may become.")
    return result


def _no_tolerance(expected: str, got: object) -> ArgumentError:
    return ArgumentError(f"minimize: expected {expected}, got {got!r}; write for example bilevel.Tolerance(delta=1e-6)")


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
    """Return ``tolerance``; if its goal is relative, gradients below ``norm``, at which the loop ends, count as zero."""
    relative = tolerance.descent is not None or tolerance.relative
    return replace(tolerance, stationary=norm) if relative and norm > 0 and tolerance.stationary is None else tolerance


def _finite(result: Hypergradient) -> bool:
    leaves = (result.value, *(leaf for leaf in pytree.tree_leaves(result.grad) if leaf is not None))
    return all(bool(torch.isfinite(leaf).all()) for leaf in leaves)


def _copied(tree: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf, tree)
