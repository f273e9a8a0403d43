"""Outer methods: HOAG, MAID, and any optimiser of torch."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from bilevel.errors import ArgumentError
from bilevel.setting_checks import check_number, check_steps

__all__ = ["HOAG", "MAID", "Evaluation", "Evaluator", "OuterMethod", "TorchOuter"]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The outer loss and its hypergradient at one θ.

    Parameters
    ----------
    outer
        The floating-point tensors of θ.
    value, corrected, slack
        F, its corrected value, and a bound or an estimate of the error of the corrected value.
    gradient
        ĝ, one tensor for each of ``outer``.
    inner
        φ.
    record
        Other entries of the history.
    """

    outer: tuple[torch.Tensor, ...]
    value: float
    corrected: float
    slack: float
    gradient: tuple[torch.Tensor, ...]
    inner: Any
    record: dict[str, Any]

    @property
    def norm(self) -> float:
        """‖ĝ‖."""
        return math.sqrt(sum(float((g.double() ** 2).sum()) for g in self.gradient))

    @property
    def finite(self) -> bool:
        """Whether the value and the gradient are numbers."""
        return math.isfinite(self.corrected) and math.isfinite(self.norm)

    def moved(self, step: float) -> tuple[torch.Tensor, ...]:
        """Return θ − step · ĝ."""
        return tuple(x - step * g for x, g in zip(self.outer, self.gradient, strict=True))


class Evaluator(Protocol):
    """The evaluation that a method calls at a trial θ."""

    def __call__(self, outer: tuple[torch.Tensor, ...], *, tighter: float = 1.0) -> Evaluation | None:
        """Return the evaluation at ``outer``, or None if a solve failed. The errors allowed are divided by ``tighter``."""


class OuterMethod(ABC):
    """The choice of the next outer variables. Subclasses are frozen dataclasses of settings.

    The state that changes from step to step is a dict, which a checkpoint holds.

    Examples
    --------
    >>> import torch, bilevel
    >>> class Halving(bilevel.OuterMethod):
    ...     def begin(self, here):
    ...         return {"step": 1.0}
    ...     def advance(self, here, memory, evaluate):
    ...         memory["step"] /= 2
    ...         return evaluate(here.outer - memory["step"] * here.gradient)
    >>> Halving().begin(None)
    {'step': 1.0}
    """

    def begin(self, here: Evaluation) -> dict[str, Any]:
        """Return the initial state of the method, given the first point."""
        return {}

    @abstractmethod
    def advance(self, here: Evaluation, memory: dict[str, Any], evaluate: Evaluator) -> Evaluation | None:
        """Return the next point and update ``memory``; None if there is no next point."""


def _trials(method: HOAG | MAID, memory: dict[str, Any]) -> range:
    # The first step is a guess without θ's units: five times as many halvings find units down to 1e-30.
    return range(method.max_trials * (1 if "taken" in memory or method.step is not None else 5))


def _first_step(here: Evaluation, step: float | None) -> float:
    # As HOAG begins: a step as long as if every outer variable moved by about one.
    size = sum(x.numel() for x in here.outer)
    return step if step is not None else math.sqrt(size) / max(here.norm, 1e-300)


@dataclass(frozen=True, kw_only=True)
class HOAG(OuterMethod):
    """Descend along −ĝ with an adaptive step. A step is accepted if the value does not rise beyond the errors of the two values.

    The test is F(θ⁺) ≤ F(θ) − ``decrease`` · α ‖ĝ‖² + e + e⁺, with corrected values F and their errors e. If it fails, α is
    multiplied by ``shrink`` and the step is tried again *from θ*. (The released code steps again from the rejected point.)
    After an accepted step α is multiplied by ``grow``.

    Parameters
    ----------
    step
        The first α; None: √p/‖ĝ‖, which moves the p outer variables by about one.
    grow, shrink
        The factors of α after an accepted and after a rejected step.
    decrease
        The required share of the decrease that the slope predicts.
    max_trials
        The largest number of trial steps before the loop ends. Until a step is accepted it is five times as many if ``step`` is None.

    Raises
    ------
    ArgumentError
        If a setting is out of its range.

    References
    ----------
    Pedregosa, "Hyperparameter optimization with approximate gradient", ICML 2016.

    Examples
    --------
    >>> HOAG(step=0.5)
    HOAG(step=0.5, grow=1.3, shrink=0.5, decrease=0.1, max_trials=20)
    """

    step: float | None = None
    grow: float = 1.3
    shrink: float = 0.5
    decrease: float = 0.1
    max_trials: int = 20

    def __post_init__(self) -> None:
        _check_search(self)

    def begin(self, here: Evaluation) -> dict[str, Any]:
        """Return the first step size."""
        return {"step": _first_step(here, self.step)}

    def advance(self, here: Evaluation, memory: dict[str, Any], evaluate: Evaluator) -> Evaluation | None:
        """Try steps from ``here`` until one counts."""
        for _ in _trials(self, memory):
            step = memory["step"]
            there = evaluate(here.moved(step))
            promised = self.decrease * step * here.norm**2
            if (
                there is not None
                and there.finite
                and there.corrected <= here.corrected - promised + here.slack + there.slack
            ):
                memory["taken"], memory["step"] = step, self.grow * step
                return there
            memory["step"] = self.shrink * step
        return None


@dataclass(frozen=True, kw_only=True)
class MAID(OuterMethod):
    """Descend along −ĝ with adaptive accuracy. A step is accepted only if the decrease exceeds the errors of the values.

    The test is F(θ⁺) + e⁺ ≤ F(θ) − e − ``decrease`` · α ‖ĝ‖², with corrected values, whose errors e are of second order
    (C4). If it fails, α is usually multiplied by ``shrink``. If the errors exceed the predicted fall (1 − ``decrease``) α
    ‖ĝ‖², a shorter step cannot decide either, and both points are solved more accurately. Use it with
    ``Tolerance(descent=0.5)``, which makes −ĝ a descent direction: then an acceptable step exists.

    Parameters
    ----------
    step
        The first α; None: √p/‖ĝ‖, which moves the p outer variables by about one.
    grow, shrink
        The factors of α after an accepted and after a rejected step.
    decrease
        The required share of the decrease that the slope predicts.
    tighten
        The divisor of the allowed errors if they are too large to decide.
    max_trials
        The largest number of trial steps before the loop ends. Until a step is accepted it is five times as many if ``step`` is None.

    Raises
    ------
    ArgumentError
        If a setting is out of its range.

    References
    ----------
    Salehi, Mukherjee, Roberts, Ehrhardt, "An adaptively inexact first-order method for bilevel optimization with application to hyperparameter
    learning", 2023; with their bound on the value replaced by the corrected value's.

    Examples
    --------
    >>> MAID().decrease
    0.1
    """

    step: float | None = None
    grow: float = 1.3
    shrink: float = 0.5
    decrease: float = 0.1
    tighten: float = 10.0
    max_trials: int = 20

    def __post_init__(self) -> None:
        _check_search(self)
        check_number("MAID", "tighten", self.tighten, above=1.0)

    def begin(self, here: Evaluation) -> dict[str, Any]:
        """Return the first step size."""
        return {"step": _first_step(here, self.step)}

    def advance(self, here: Evaluation, memory: dict[str, Any], evaluate: Evaluator) -> Evaluation | None:
        """Try steps from ``here`` until one is certain to descend."""
        tighter = 1.0
        for _ in _trials(self, memory):
            step = memory["step"]
            there = evaluate(here.moved(step), tighter=tighter)
            if there is None or not there.finite:
                memory["step"] = self.shrink * step
                continue
            promised, fall = self.decrease * step * here.norm**2, here.corrected - there.corrected
            doubt = here.slack + there.slack
            if fall - doubt >= promised:
                memory["taken"], memory["step"] = step, self.grow * step
                return there
            if fall + doubt < promised or not doubt > (1 - self.decrease) * step * here.norm**2:
                # It descends too little however exact the values, or a shorter step would be certain: that costs one evaluation, and
                # exacter values cost two.
                memory["step"] = self.shrink * step
                continue
            tighter *= self.tighten
            more = evaluate(here.outer, tighter=tighter)
            if more is None or not more.finite:
                return None
            here = more
        return None


@dataclass(frozen=True)
class TorchOuter(OuterMethod):
    """Any optimiser of ``torch.optim``, for :func:`bilevel.minimize`: a function of a list of parameters that returns one.

    Parameters
    ----------
    factory
        parameters ↦ optimiser.
    """

    factory: Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]

    def begin(self, here: Evaluation) -> dict[str, Any]:
        """Return the optimiser's state, in which its parameters are θ."""
        return {"optimizer": self._made(here.outer)[1].state_dict()}

    def advance(self, here: Evaluation, memory: dict[str, Any], evaluate: Evaluator) -> Evaluation | None:
        """Make one step of the optimiser; one that calls its closure again evaluates there."""
        parameters, optimizer = self._made(here.outer)
        optimizer.load_state_dict(copy.deepcopy(memory["optimizer"]))  # which keeps the tensors that it is given
        latest, failed = here, False

        def closure() -> float:
            nonlocal latest, failed
            point = tuple(parameter.detach().clone() for parameter in parameters)
            if not all(torch.equal(a, b) for a, b in zip(point, latest.outer, strict=True)):
                found = evaluate(point)
                failed = failed or found is None
                latest = latest if found is None else found
            for parameter, gradient in zip(parameters, latest.gradient, strict=True):
                parameter.grad = gradient.clone()
            return latest.corrected if not failed else math.nan

        optimizer.step(closure)
        if failed:
            return None
        memory["optimizer"] = optimizer.state_dict()
        point = tuple(parameter.detach().clone() for parameter in parameters)
        if all(torch.equal(a, b) for a, b in zip(point, latest.outer, strict=True)) and latest is not here:
            return latest
        return evaluate(point)

    def _made(self, outer: tuple[torch.Tensor, ...]) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
        parameters = [torch.nn.Parameter(x.clone()) for x in outer]
        optimizer = self.factory(parameters)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ArgumentError(
                "minimize: expected optimizer to be HOAG(), MAID(), or a function of a list of parameters that returns a "
                f"torch.optim optimiser, got one that returns {optimizer!r}; write for example "
                "lambda parameters: torch.optim.Adam(parameters, lr=0.1)"
            )
        return parameters, optimizer


def _check_search(method: HOAG | MAID) -> None:
    name = type(method).__name__
    if method.step is not None:
        check_number(name, "step", method.step)
    check_number(name, "grow", method.grow, above=1.0, closed=True)
    check_number(name, "shrink", method.shrink, below=1.0)
    check_number(name, "decrease", method.decrease, below=1.0)
    check_steps(name, "max_trials", method.max_trials)
