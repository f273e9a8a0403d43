"""The engine of all stochastic methods: variables, optimisers, updates, averages, and what resumes a run."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypeAlias

import torch
from torch.optim import Optimizer

from bilevel.errors import ArgumentError, NonFiniteError
from bilevel.layers.randomness import GeneratorStates
from bilevel.problems.checks import refuse_inference_mode
from bilevel.problems.problem import BilevelProblem
from bilevel.reports import Status
from bilevel.stochastic._batches import BatchSource
from bilevel.stochastic._diagnosis import cause_of_nonfinite, check_objective
from bilevel.stochastic._lists import Tensors, clone, norm
from bilevel.stochastic._optimizers import OptimizerLike, check_holds, descend, learning_rate, made_optimizer
from bilevel.stochastic._options import StepOptions, StepResult
from bilevel.stochastic._oracle import Objective, Oracle
from bilevel.stochastic._scaling import LossScale
from bilevel.stochastic._state import load_method_state, method_state, overwrite
from bilevel.stochastic._variables import Point, Variables, check_memory

__all__ = ["Auxiliary", "Directions", "Problem", "StochasticMethod"]

Problem: TypeAlias = BilevelProblem | tuple[Objective, Objective]
"""A bilevel problem, or the pair (inner_objective, outer_objective) of functions (inner, outer, data) ↦ loss ()."""


@dataclass(frozen=True, eq=False)
class Directions:
    """The update directions of a step, to be subtracted from the variables, and the losses.

    ``inner`` and ``adjoint`` are None where the method has moved these variables already, or has none.
    """

    outer: Tensors
    inner_loss: torch.Tensor
    outer_loss: torch.Tensor
    inner: Tensors | None = None
    adjoint: Tensors | None = None
    inner_gradient_norm: torch.Tensor | None = None
    adjoint_residual_norm: torch.Tensor | None = None
    exact_residual_norm: torch.Tensor | None = None
    linear_status: Status | None = None


@dataclass(frozen=True, eq=False)
class Auxiliary:
    """Variables that a method has besides inner and outer, with their optimiser."""

    tensors: Tensors
    optimizer: Optimizer


_FIXED = frozenset({"inner", "outer", "options"})


class _SkippedError(Exception):
    """An update was not finite and is left out."""


class StochasticMethod(ABC):
    """A bilevel method on minibatches, in the manner of ``torch.optim``: make it once, and call ``step`` in a loop.

    Variables are updated in place. Each objective receives ``inner`` and ``outer`` as they were given: a module is called as
    ``inner(x)``, a pytree is indexed as ``inner["w"]``. Objectives are means over the examples of ``data``.

    Parameters
    ----------
    problem
        A :class:`bilevel.BilevelProblem`, or a pair (inner_objective, outer_objective) of functions (inner, outer, data) ↦ loss ().
        Of a problem, only the two objectives are used.
    inner, outer
        φ and θ. A module, whose parameters that require grad are the variables; or a pytree of tensors, of which the leaf tensors that
        require grad are. Of a pytree in which none does, all floating-point tensors are, and are made to require grad.
    inner_optimizer, outer_optimizer
        A class of ``torch.optim``, a function of a list of tensors that makes an optimiser, or an optimiser made over the variables. By
        default SGD(lr=0.1) for the inner and Adam(lr=0.01) for the outer variables.
    options
        Clipping, averages, mixed precision, processes; see :class:`StepOptions`.

    Attributes
    ----------
    inner, outer
        As they were given.
    inner_optimizer, outer_optimizer
        Learning-rate schedulers of torch work on them.

    Raises
    ------
    ArgumentError, DtypeError
        If the problem, a variable or an optimiser cannot be used.
    """

    _STATE: ClassVar[tuple[str, ...]] = ()
    """The attributes that a resumed run needs: numbers, tensors and containers of them."""

    def __init__(
        self,
        problem: Problem,
        inner: Any,
        outer: Any,
        *,
        inner_optimizer: OptimizerLike | None = None,
        outer_optimizer: OptimizerLike | None = None,
        options: StepOptions | None = None,
    ) -> None:
        where = self.where = type(self).__name__
        self.options = StepOptions() if options is None else options
        if not isinstance(self.options, StepOptions):
            raise ArgumentError(
                f"{where}: expected options to be bilevel.stochastic.StepOptions(...), got {self.options!r}; pass that"
            )
        refuse_inference_mode(where)
        self._inner, self._outer = Variables(inner, "inner", where), Variables(outer, "outer", where)
        if {id(t) for t in self._inner.tensors} & {id(t) for t in self._outer.tensors}:
            raise ArgumentError(
                f"{where}: expected inner and outer to share no tensor, and they do; give each tensor to one of them"
            )
        check_memory(self._inner, self._outer, where)
        self.inner, self.outer = inner, outer
        self.inner_optimizer = made_optimizer(
            inner_optimizer, self._inner.tensors, "inner", where, partial(torch.optim.SGD, lr=0.1)
        )
        self.outer_optimizer = made_optimizer(
            outer_optimizer, self._outer.tensors, "outer", where, partial(torch.optim.Adam, lr=0.01)
        )
        self._oracle = Oracle(*_objectives(problem, where), self._inner, self._outer, self.options, where)
        self._auxiliary: dict[str, Auxiliary] = {}
        self._scale = LossScale(self.options.grad_scaler)
        self._generator = torch.Generator().manual_seed(self.options.seed)
        self._average = None if self.options.ema_decay is None else clone(self._variables)
        self.steps = 0

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FIXED and name in self.__dict__:
            raise ArgumentError(
                f"{self.where}: expected {name} to stay as it was given, as the optimisers and memories belong to it; change values in place, by "
                "load_state_dict or copy_, or make the method anew"
            )
        super().__setattr__(name, value)

    @property
    def passes(self) -> dict[str, int]:
        """How many forward and reverse passes have been made, over each part of a minibatch."""
        return dict(self._oracle.passes)

    @abstractmethod
    def _directions(self, inner: BatchSource, outer: BatchSource) -> Directions:
        """Return the directions of one step; move what has to move before they are known by :meth:`_move_inner` and :meth:`_move`."""

    def _prepare(self) -> None:  # noqa: B027
        """Do what a method has to do before each step."""

    def _finish(self) -> None:  # noqa: B027
        """Do what a method has to do after each step that was not skipped."""

    def step(self, inner_batch: Any, outer_batch: Any) -> StepResult:
        """Make one step, and return what was found.

        Parameters
        ----------
        inner_batch, outer_batch
            What the objectives receive as ``data``; or a :class:`Batch` or :class:`Microbatches` of it. An iterator (an object with
            ``__next__``, such as :class:`Minibatches`) hands out the next batch wherever the method wants an independent one.

        Raises
        ------
        NonFiniteError
            If a direction is not finite, and ``on_nonfinite`` is ``"raise"``.
        ShapeError, ArgumentError, CapturedTensorError
            If an objective or a batch cannot be used.
        """
        sources = (
            BatchSource(inner_batch, f"{self.where}.step, inner_batch", self.options.accumulate),
            BatchSource(outer_batch, f"{self.where}.step, outer_batch", self.options.accumulate),
        )
        refuse_inference_mode(f"{self.where}.step")
        try:
            with torch.enable_grad(), self._oracle.caller_autocast():
                result = self._step(*sources)
        except NonFiniteError as error:
            cause = cause_of_nonfinite((self._inner, self._outer), sources)
            if cause is None:
                raise
            raise NonFiniteError(f"{self.where}, step {self.steps + 1}: expected finite numbers; {cause}") from error
        callback = self.options.callback
        for call in (callback,) if callable(callback) else callback:
            call(result)
        return result

    def _step(self, *sources: BatchSource) -> StepResult:
        for variables, optimizer in ((self._inner, self.inner_optimizer), (self._outer, self.outer_optimizer)):
            variables.check()
            check_holds(optimizer, variables.tensors, variables.what, self.where)
        self._prepare()
        try:
            found = self._directions(*sources)
            norms = self._apply(found, *sources)
        except _SkippedError:
            nan = torch.full((), float("nan"), device=self._inner.tensors[0].device)
            return StepResult(nan, nan, nan, nan, step=self.steps, skipped=True)
        self._scale.grow()
        self._update_average()
        self.steps += 1
        self._finish()
        return self._result(found, norms)

    # What methods are written with.

    def _move_inner(self, direction: Tensors) -> None:
        """Let the inner optimiser make one step along −direction."""
        self._require_finite("inner direction", direction)
        descend(self.inner_optimizer, self._inner.tensors, direction, self.options.inner_max_norm)

    def _move(self, name: str, direction: Tensors) -> None:
        """Let the optimiser of an auxiliary variable make one step."""
        self._require_finite(f"{name} direction", direction)
        auxiliary = self._auxiliary[name]
        descend(auxiliary.optimizer, auxiliary.tensors, direction, self.options.adjoint_max_norm)

    def _inner_steps(self, source: BatchSource, count: int) -> None:
        """Make ``count`` steps of the inner optimiser on G."""
        for _ in range(count):
            self._move_inner(self._oracle.inner_gradient(source.draw())[1])

    def _random_numbers(self) -> GeneratorStates:
        """Return the states of torch's generators, so that a later evaluation can draw the same numbers: ``.again()``."""
        return GeneratorStates(self._inner.tensors[0].device)

    def _here(self) -> Point:
        """Return a copy of the variables as they are now."""
        return Point.of(clone(self._inner.tensors), clone(self._outer.tensors))

    def _require_finite(self, what: str, *lists: Sequence[torch.Tensor]) -> None:
        """Raise, or leave the step, where a tensor is not finite: before it reaches a variable or a memory."""
        policy = self.options.on_nonfinite
        if policy == "ignore" and not self._scale.enabled:
            return
        # A sum is one pass over memory, where torch.isfinite makes several. It can overflow, so that it is not the last word.
        self._check_totals(what, [tensor.detach().sum() for tensors in lists for tensor in tensors], *lists)

    def _check_totals(self, what: str, totals: Sequence[torch.Tensor], *lists: Sequence[torch.Tensor]) -> None:
        """As :meth:`_require_finite`, of numbers that are finite only if all tensors are."""
        policy = self.options.on_nonfinite
        if policy == "ignore" and not self._scale.enabled:
            return
        if all(math.isfinite(total) for total in torch.stack([total.float() for total in totals]).tolist()):
            return
        if all(bool(torch.isfinite(tensor).all()) for tensors in lists for tensor in tensors):
            return
        if self._scale.enabled:
            self._scale.shrink()
            raise _SkippedError
        if policy == "skip":
            raise _SkippedError
        raise NonFiniteError(
            f"{self.where}, step {self.steps + 1}: expected a finite {what}, and it is not; lower the learning rates, clip with "
            "StepOptions(max_norm=..., inner_max_norm=...), or pass StepOptions(on_nonfinite='skip')"
        )

    @property
    def _rate(self) -> Any:
        return learning_rate(self.inner_optimizer)

    @property
    def _variables(self) -> Tensors:
        return [*self._inner.tensors, *self._outer.tensors]

    # Updates.

    def _apply(self, found: Directions, inner: BatchSource, outer: BatchSource) -> dict[str, torch.Tensor]:
        """Let the optimisers subtract the directions, and return the norms; a method that then goes on overrides this."""
        directions = {"inner direction": found.inner, "adjoint direction": found.adjoint, "hypergradient": found.outer}
        given = {what: direction for what, direction in directions.items() if direction is not None}
        norms = {what: norm(direction) for what, direction in given.items()}
        losses = [found.inner_loss, found.outer_loss]  # of no example is NaN, with a gradient of zero
        self._check_totals("loss, " + " and ".join(given), [*norms.values(), *losses], losses, *given.values())
        options = self.options
        if found.inner is not None:
            size = norms["inner direction"]
            descend(self.inner_optimizer, self._inner.tensors, found.inner, options.inner_max_norm, size)
        if found.adjoint is not None:
            adjoint, size = self._auxiliary["adjoint"], norms["adjoint direction"]
            descend(adjoint.optimizer, adjoint.tensors, found.adjoint, options.adjoint_max_norm, size)
        descend(self.outer_optimizer, self._outer.tensors, found.outer, options.max_norm, norms["hypergradient"])
        return norms

    def _result(self, found: Directions, norms: dict[str, torch.Tensor]) -> StepResult:
        inner = norms.get("inner direction", torch.full_like(found.inner_loss, float("nan")))
        residual = found.adjoint_residual_norm
        return StepResult(
            inner_loss=found.inner_loss,
            outer_loss=found.outer_loss,
            hypergradient_norm=norms["hypergradient"],
            inner_gradient_norm=inner if found.inner_gradient_norm is None else found.inner_gradient_norm,
            adjoint_residual_norm=norms.get("adjoint direction") if residual is None else residual,
            exact_residual_norm=found.exact_residual_norm,
            linear_status=found.linear_status,
            step=self.steps,
        )

    # Averages.

    def _update_average(self) -> None:
        decay = self.options.ema_decay
        if self._average is not None and decay is not None:
            with torch.no_grad():
                for mean, tensor in zip(self._average, self._variables, strict=True):
                    mean.lerp_(tensor, 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Give the inner and outer variables their moving averages for the length of a ``with`` block.

        Raises
        ------
        ArgumentError
            If ``StepOptions(ema_decay=...)`` was not set.
        """
        if self._average is None:
            raise ArgumentError(
                f"{self.where}.averaged: expected moving averages to be kept, and they are not; pass options=StepOptions(ema_decay=0.999)"
            )
        kept = clone(self._variables)
        overwrite(self._variables, self._average)
        try:
            yield
        finally:
            overwrite(self._variables, kept)

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Return copies of all that a resumed run needs: variables, buffers, optimisers, memories and generators.

        The generators are the method's own and torch's, from which dropout draws. The state can be saved by ``torch.save`` and read with
        ``weights_only=True``. Schedulers and batches have their own states.
        """
        return method_state(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict` of the same method on the same problem, bit for bit.

        This sets torch's generators too, so call it last before the first step: what draws random numbers in between moves them.

        Raises
        ------
        ArgumentError
            If the state is of another method, of other variables or optimisers, or of another version.
        """
        load_method_state(self, state)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(inner: {sum(t.numel() for t in self._inner.tensors)} numbers by "
            f"{type(self.inner_optimizer).__name__}, outer: {sum(t.numel() for t in self._outer.tensors)} by "
            f"{type(self.outer_optimizer).__name__}, steps={self.steps})"
        )


def _objectives(problem: Any, where: str) -> tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]:
    if isinstance(problem, BilevelProblem):
        if problem.batch_dims is not None:
            raise ArgumentError(
                f"{where}: expected a problem with one inner problem, got batch_dims={problem.batch_dims!r}; sum the inner objectives of "
                "several problems in one objective instead"
            )
        problem = problem.inner_objective, problem.outer_objective
    if isinstance(problem, (tuple, list)) and len(problem) == 2 and all(callable(one) for one in problem):
        for name, function in zip(("inner_objective", "outer_objective"), problem, strict=True):
            check_objective(where, name, function)
        return problem[0], problem[1]
    raise ArgumentError(
        f"{where}: expected problem to be a bilevel.BilevelProblem or a pair of functions (inner_objective, outer_objective), got "
        f"{problem!r}; pass one of them"
    )
