"""Loggers: callbacks that write the numbers of a run to TensorBoard, Weights & Biases or MLflow.

Each is a callback of :func:`bilevel.minimize` and of :class:`bilevel.stochastic.StepOptions`. The package that it writes to is
imported when a logger is made, not before. A function of your own on :func:`numbers_of` serves any other place.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from os import PathLike, fspath
from typing import Any, TypeAlias

import torch

import bilevel
from bilevel.optional_packages import import_optional
from bilevel.stochastic import StepResult

__all__ = ["Logger", "MLflowLogger", "TensorBoardLogger", "WandbLogger", "numbers_of"]

Watched: TypeAlias = StepResult | bilevel.OuterRun | bilevel.OuterStep
"""What a callback receives, or a point of a history."""

_INSTALL = "install it as its own documentation says,"
_INSTALL = "install it as its own documentation says,"
_INSTALL = "install it as its own documentation says,"
_INSTALL = "install it as its own documentation says,"
_OF_STEP = (
    "inner_loss",
    "outer_loss",
    "hypergradient_norm",
    "inner_gradient_norm",
    "adjoint_residual_norm",
    "exact_residual_norm",
    "skipped",
)
_OF_POINT = (
    "value", "corrected_value", "value_error", "gradient_norm", "error_bound", "delta", "delta_prime", "inner_iterations",
    "linear_iterations", "step_size", "evaluations", "seconds",
)  # fmt: skip
_MAY_BE_UNKNOWN = ("error_bound", "step_size", "inner_gradient_norm", "adjoint_residual_norm", "exact_residual_norm")


def numbers_of(watched: Watched) -> tuple[int, dict[str, float]]:
    """Return the number of a step and its numbers by name; numbers that are not known are left out.

    Reading a :class:`bilevel.stochastic.StepResult` waits for its device, once.

    Parameters
    ----------
    watched
        What a callback receives, or a point of ``result.history``.

    Returns
    -------
    step
        The number of the step: ``step`` of a stochastic method, ``number`` of a point of :func:`bilevel.minimize`.
    numbers
        The fields of the :class:`bilevel.stochastic.StepResult`, or of the :class:`bilevel.OuterStep`, as floats.

    Raises
    ------
    bilevel.ArgumentError
        If ``watched`` is something else.

    Examples
    --------
    >>> import torch
    >>> from bilevel.stochastic import StepResult
    >>> from bilevel.loggers import numbers_of
    >>> step, numbers = numbers_of(StepResult(torch.tensor(0.5), torch.tensor(2.0), torch.tensor(1.0), torch.tensor(0.25), step=7))
    >>> step, numbers["inner_loss"], numbers["outer_loss"]
    (7, 0.5, 2.0)
    """
    point = watched.history[-1] if isinstance(watched, bilevel.OuterRun) else watched
    if isinstance(point, StepResult):
        step, found = point.step, {name: getattr(point, name) for name in _OF_STEP}
    elif isinstance(point, bilevel.OuterStep):
        step, found = point.number, {name: getattr(point, name) for name in _OF_POINT}
    else:
        raise bilevel.ArgumentError(
            f"numbers_of: expected a StepResult, an OuterRun or an OuterStep, got {watched!r}; pass what a callback receives"
        )
    numbers = _as_floats({name: value for name, value in found.items() if value is not None})
    return step, {k: value for k, value in numbers.items() if not (k in _MAY_BE_UNKNOWN and math.isnan(value))}


def _as_floats(found: dict[str, Any]) -> dict[str, float]:
    """Return the values as floats; those on a device in one transfer."""
    tensors = [value.detach().double().reshape(()) for value in found.values() if isinstance(value, torch.Tensor)]
    read = iter(torch.stack(tensors).tolist() if tensors else ())
    return {name: next(read) if isinstance(value, torch.Tensor) else float(value) for name, value in found.items()}


class Logger(ABC):
    """A callback that writes the numbers of each ``every``-th step; the loggers below say where to.

    In a run of several processes only the first writes.

    Parameters
    ----------
    prefix
        Before each name; ``"bilevel/"`` gives ``bilevel/outer_loss``.
    every
        Write the steps whose number is a multiple of this, and no others. Those between cost nothing.

    Raises
    ------
    bilevel.ArgumentError
        If a setting is out of its range.

    Examples
    --------
    >>> import torch, bilevel
    >>> from bilevel.loggers import Logger
    >>> class Printing(Logger):
    ...     def write(self, numbers, step):
    ...         print(step, {name: round(number, 2) for name, number in numbers.items() if name.endswith("value")})
    >>> class Nearest(bilevel.BilevelProblem):
    ...     def inner_objective(self, inner, outer, data):
    ...         return ((inner - outer) ** 2).sum()
    ...
    ...     def outer_objective(self, inner, outer, data):
    ...         return ((inner - data) ** 2).sum() + 1
    >>> zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    >>> result = bilevel.minimize(Nearest(), zero, one, init=zero, max_steps=2, callback=Printing(every=2, prefix="run/"))
    2 {'run/value': 1.0, 'run/corrected_value': 1.0}
    """

    def __init__(self, *, prefix: str = "bilevel/", every: int = 1) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise bilevel.ArgumentError(
                f"{type(self).__name__}: expected every to be an integer of at least 1, got {every!r}; write for example every=10"
            )
        self.prefix, self.every = prefix, every

    def __call__(self, watched: Watched) -> None:
        """Write the numbers of ``watched``, if its step is one to write."""
        point = watched.history[-1] if isinstance(watched, bilevel.OuterRun) else watched
        number = getattr(point, "step", getattr(point, "number", 0))
        if number % self.every == 0 and _is_first_process():
            step, numbers = numbers_of(point)
            self.write({f"{self.prefix}{name}": number for name, number in numbers.items()}, step)

    @abstractmethod
    def write(self, numbers: dict[str, float], step: int) -> None:
        """Write the numbers of one step."""


class TensorBoardLogger(Logger):
    """Write scalars for TensorBoard.

    Parameters
    ----------
    writer
        A directory, for which a ``torch.utils.tensorboard.SummaryWriter`` is made; or a writer of your own, which has
        ``add_scalar(name, number, step)``.
    prefix, every
        See :class:`Logger`.

    Raises
    ------
    bilevel.ArgumentError
        If a setting cannot be used, or ``writer`` is a directory and TensorBoard cannot be imported.

    Examples
    --------
    >>> from bilevel.loggers import TensorBoardLogger
    >>> class Writer:
    ...     def add_scalar(self, name, number, step):
    ...         print(step, name, number)
    >>> TensorBoardLogger(Writer()).write({"bilevel/outer_loss": 0.5}, 3)
    3 bilevel/outer_loss 0.5
    """

    def __init__(self, writer: Any, *, prefix: str = "bilevel/", every: int = 1) -> None:
        super().__init__(prefix=prefix, every=every)
        if isinstance(writer, (str, PathLike)):
            remedy = f"{_INSTALL} or pass a writer with add_scalar(name, number, step)"
            made = import_optional("torch.utils.tensorboard", "TensorBoardLogger", remedy)
            # Of several processes only the first writes; the others would leave empty files.
            writer = made.SummaryWriter(fspath(writer)) if _is_first_process() else None
        elif not callable(getattr(writer, "add_scalar", None)):
            raise bilevel.ArgumentError(
                f"TensorBoardLogger: expected a directory or a writer with add_scalar(name, number, step), got {writer!r}; "
                "write for example TensorBoardLogger('runs/first')"
            )
        self.writer: Any = writer

    def write(self, numbers: dict[str, float], step: int) -> None:
        """Write the numbers of one step as scalars."""
        for name, number in numbers.items():
            self.writer.add_scalar(name, number, step)


class WandbLogger(Logger):
    """Write to a run of Weights & Biases.

    The numbers have an axis of their own, ``bilevel/step``, so that what your program logs beside them keeps its order.

    Parameters
    ----------
    run
        What ``wandb.init(...)`` returned; None: the run that is active at the first number written.
    prefix, every
        See :class:`Logger`.

    Raises
    ------
    bilevel.ArgumentError
        If a setting cannot be used, or without ``run``, if wandb cannot be imported; on use, if no run is active.

    Examples
    --------
    >>> from bilevel.loggers import WandbLogger
    >>> class Run:
    ...     def define_metric(self, name, step_metric=None):
    ...         pass
    ...
    ...     def log(self, numbers):
    ...         print(numbers)
    >>> WandbLogger(Run()).write({"bilevel/outer_loss": 0.5}, 3)
    {'bilevel/step': 3, 'bilevel/outer_loss': 0.5}
    """

    def __init__(self, run: Any = None, *, prefix: str = "bilevel/", every: int = 1) -> None:
        super().__init__(prefix=prefix, every=every)
        self._wandb = None if run is not None else import_optional("wandb", "WandbLogger", f"{_INSTALL} or pass run=")
        if run is not None and not callable(getattr(run, "log", None)):
            raise bilevel.ArgumentError(
                f"WandbLogger: expected what wandb.init(...) returned, got {run!r}; pass that, or None"
            )
        self.run = run
        self._known: set[str] = set()

    def write(self, numbers: dict[str, float], step: int) -> None:
        """Write the numbers of one step to the run."""
        if self.run is None:
            self.run = self._wandb.run  # type: ignore[union-attr]
        if self.run is None:
            raise bilevel.ArgumentError(
                "WandbLogger: expected an active run of Weights & Biases, and there is none; call wandb.init(...) before the first step"
            )
        axis = f"{self.prefix}step"
        for name in sorted({*numbers} - self._known):
            self.run.define_metric(name, step_metric=axis)
            self._known.add(name)
        self.run.log({axis: step, **numbers})


class MLflowLogger(Logger):
    """Write to the active run of MLflow.

    Parameters
    ----------
    prefix, every
        See :class:`Logger`.

    Raises
    ------
    bilevel.ArgumentError
        If a setting cannot be used, or mlflow cannot be imported; on use, if no run is active.

    Examples
    --------
    >>> import mlflow  # doctest: +SKIP
    >>> from bilevel.loggers import MLflowLogger
    >>> with mlflow.start_run():  # doctest: +SKIP
    ...     result = bilevel.minimize(problem, outer, data, callback=MLflowLogger())
    """

    def __init__(self, *, prefix: str = "bilevel/", every: int = 1) -> None:
        super().__init__(prefix=prefix, every=every)
        self._mlflow = import_optional(
            "mlflow", "MLflowLogger", f"{_INSTALL} or write with a function of bilevel.loggers.numbers_of"
        )

    def write(self, numbers: dict[str, float], step: int) -> None:
        """Write the numbers of one step as metrics of the active run."""
        if self._mlflow.active_run() is None:  # mlflow would begin one, and leave it open
            raise bilevel.ArgumentError(
                "MLflowLogger: expected an active run of MLflow, and there is none; call mlflow.start_run() before the first step"
            )
        self._mlflow.log_metrics(numbers, step=step)


def _is_first_process() -> bool:
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
