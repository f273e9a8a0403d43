"""Meta-training with checkpoints that go on bit for bit, and evaluation on unseen tasks."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bilevel
from bilevel.checksum import sealed, unsealed
from bilevel.meta.equal_outputs import equalize_gradients, fitted, last_layer, with_outputs
from bilevel.meta.imaml import IMAML
from bilevel.meta.processes import Processes
from bilevel.meta.recipe import Recipe, Setup, set_up
from bilevel.meta.sampler import Sampler
from bilevel.meta.tasks import Tasks

__all__ = ["Score", "StepRecord", "Trainer", "evaluate", "read_checkpoint", "trained"]

FORMAT = 4
"""Version of the checkpoint's layout."""

_TASKS_AT_ONCE = 25


@dataclass(frozen=True)
class Score:
    """The mean accuracy over tasks with its 95 % confidence interval.

    Parameters
    ----------
    mean, half_width
        The interval is mean ± half_width, 1.96 standard errors.
    tasks
        How many.
    """

    mean: float
    half_width: float
    tasks: int

    @staticmethod
    def of(accuracies: torch.Tensor) -> Score:
        """Return the score of tasks with these ``accuracies`` (T,)."""
        values = accuracies.double()
        spread = float(values.std()) if len(values) > 1 else math.nan
        return Score(float(values.mean()), 1.96 * spread / math.sqrt(len(values)), len(values))


@dataclass(frozen=True)
class StepRecord:
    """One meta-step; means over its tasks.

    Parameters
    ----------
    step, seconds
        The number of the step, from 1, and the training time up to its end, summed over sessions.
    loss, accuracy
        On the query examples.
    inner_residual, linear_residual
        ‖∇G‖ where adaptation ended, and ‖∇L − (∇²L̂ + λI) q‖ relative to ‖∇L‖ of each task.
    failed
        Tasks whose linear solve met negative curvature or was not finite.
    gradient_norm
        The norm of the meta-gradient before clipping.
    tasks_per_second
        The speed of this step.
    lam
        λ, or the mean of several.
    """

    step: int
    seconds: float
    loss: float
    accuracy: float
    inner_residual: float
    linear_residual: float
    failed: int
    gradient_norm: float
    tasks_per_second: float
    lam: float


class Trainer:
    """Meta-train an :class:`bilevel.IMAML` by Adam.

    Parameters
    ----------
    data
        What :func:`bilevel.meta.recipe.set_up` takes.
    recipe
        How to train.
    here
        This process among those of the run; they share the tasks of every meta-step.

    Raises
    ------
    bilevel.ArgumentError
        If the tasks of a meta-step cannot be shared evenly between the processes, or the data cannot be used.
    """

    def __init__(self, data: str, recipe: Recipe, here: Processes) -> None:
        if recipe.tasks_per_step % here.world:
            raise bilevel.ArgumentError(
                f"expected tasks-per-step to be a multiple of the {here.world} processes, which share them evenly, got "
                f"{recipe.tasks_per_step}; pass --tasks-per-step {here.world}, or start another number of processes"
            )
        self.data, self.recipe, self.here = data, recipe, here
        self.setup: Setup = set_up(data, recipe, here.device)
        self.learner: IMAML = recipe.learner(self.setup.model, self.setup.loss).to(here.device)
        self._module: nn.Module = self.learner
        if here.world > 1:
            self._module = nn.parallel.DistributedDataParallel(self.learner)
        self.optimizer = torch.optim.Adam(self.learner.parameters(), lr=recipe.outer_lr)
        # What is measured: the learner itself, or one whose parameters are the running mean of its own, with ``ways`` outputs.
        self.averaged: IMAML = self.learner
        model, outputs = self.setup.model, last_layer(self.setup.model).out_features
        if recipe.average or outputs != recipe.ways:
            model = copy.deepcopy(model) if outputs == recipe.ways else with_outputs(model, recipe.ways)
            self.averaged = recipe.learner(model, self.setup.loss).to(here.device)
        self.step = 0
        self.seconds = 0.0
        self.history: list[StepRecord] = []
        self.validations: list[tuple[int, Score]] = []

    def train(
        self,
        *,
        steps: int | None = None,
        seconds: float | None = None,
        stopped: Callable[[], bool] = lambda: False,
        on_step: Callable[[StepRecord], None] = lambda record: None,
        on_validation: Callable[[int, Score], None] = lambda step, score: None,
    ) -> None:
        """Train until so many meta-steps, or seconds of training, have been made in all, or ``stopped()`` says so.

        With ``decay_steps`` of the recipe it ends there at the latest, where the step of Adam is 0.
        Every ``validate_every`` meta-steps the learner is validated on unseen tasks; the time of that does not count.
        """
        decayed = self.recipe.decay_steps or math.inf
        while True:
            if self._owes_validation():
                on_validation(self.step, self.validate())
            over = stopped() or (seconds is not None and self.seconds >= seconds)
            if self.step >= min(decayed, math.inf if steps is None else steps) or self.here.any(over):
                return
            on_step(self.train_step())

    def _owes_validation(self) -> bool:
        """Return whether a validation belongs after this step and has not been made, also by a run that was killed before it and then resumed."""
        validated = self.validations[-1][0] if self.validations else 0
        return self.step > validated and self.step % self.recipe.validate_every == 0

    def train_step(self) -> StepRecord:
        """Make one meta-step: Algorithm 1, lines 3 to 8."""
        begun = time.perf_counter()
        recipe, here = self.recipe, self.here
        tasks = self.setup.training.sample(recipe.tasks_per_step, rank=here.rank, world=here.world)
        with bilevel.record() as reports:
            with torch.autocast(here.device.type, dtype=torch.bfloat16, enabled=recipe.amp):
                loss, predictions = self._module(tasks, predictions=True)
            self.optimizer.zero_grad()
            loss.backward()
        if recipe.equal_outputs:
            equalize_gradients(last_layer(self.setup.model))
        norm = nn.utils.clip_grad_norm_(self.learner.parameters(), recipe.clip)
        finite = bool(torch.isfinite(norm))
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.outer_step(self.step)
        if finite:  # a step to NaN would end the run; the record counts it as failed
            self.optimizer.step()
        self.step += 1
        self._average()
        taken = time.perf_counter() - begun
        self.seconds += taken
        forward = [r for r in reports if r.direction is bilevel.Pass.FORWARD]
        backward = [r for r in reports if r.direction is bilevel.Pass.BACKWARD]
        sums = here.sum(
            [
                float(loss.detach()),
                float(accuracies(predictions, tasks.query_y).mean()),
                float(torch.cat([r.residual_norm.reshape(-1) for r in forward]).mean()),
                float(torch.cat([relative_residual(r) for r in backward]).mean()),
            ]
        )
        failures = here.sum([float(sum(int((~r.success).sum()) for r in backward)) if finite else len(predictions)])
        means = [value / here.world for value in sums]
        lam = torch.stack([value.detach().mean() for value in _values(self.learner.lam)]).mean()
        record = StepRecord(
            self.step, self.seconds, means[0], means[1], means[2], means[3], int(failures[0]), float(norm),
            recipe.tasks_per_step / taken, float(lam),
        )  # fmt: skip
        self.history.append(record)
        return record

    @torch.no_grad()
    def _average(self) -> None:
        """Move the averaged parameters towards the learner's; the first steps average over all steps so far."""
        if self.averaged is self.learner:
            return
        share = max(1 - self.recipe.average, 1 / self.step)
        for mean, value in zip(self.averaged.parameters(), self.learner.parameters(), strict=True):
            mean.lerp_(fitted(value, mean), share)

    def validate(self) -> Score:
        """Return the score on the same unseen tasks each time, and keep it."""
        score = evaluate(self.averaged, self.setup.validation(), self.recipe.validation_tasks)
        self.validations.append((self.step, score))
        return score

    def state(self) -> dict[str, Any]:
        """Return everything that a run needs to go on, in types that can be loaded without running code."""
        return sealed(
            {
                "format": FORMAT,
                "data": self.data,
                "recipe": asdict(self.recipe),
                "learner": self.learner.state_dict(),
                "averaged": self.averaged.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "generator": self.setup.training.generator.get_state(),
                "random": torch.get_rng_state(),
                "step": self.step,
                "seconds": self.seconds,
                "history": [asdict(record) for record in self.history],
                "validations": [(step, asdict(score)) for step, score in self.validations],
            }
        )

    def load(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self.learner.load_state_dict(state["learner"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.setup.training.generator.set_state(state["generator"].cpu())
        torch.set_rng_state(state["random"].cpu())
        self.step, self.seconds = state["step"], state["seconds"]
        self.history = [StepRecord(**record) for record in state["history"]]
        self.validations = [(step, Score(**score)) for step, score in state["validations"]]

    def save(self, path: Path) -> None:
        """Write a checkpoint, whole or not at all; only the leading process does."""
        if not self.here.leads:
            return
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            torch.save(self.state(), partial)
            os.replace(partial, path)
        except (OSError, RuntimeError) as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise bilevel.ArgumentError(
                f"the checkpoint {path} cannot be written ({error}); free space, or pass another --output"
            ) from error


def read_checkpoint(path: Path) -> tuple[dict[str, Any], Recipe]:
    """Return a checkpoint's state and recipe.

    Raises
    ------
    bilevel.ArgumentError
        If it cannot be read, or is not one of ours.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's readers warn of what they find odd in damaged files
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise bilevel.ArgumentError(
            f"the checkpoint {path} does not exist; check the path, or train first with `bilevel imaml`"
        ) from None
    except Exception as error:  # torch's readers raise whatever the bytes lead them to
        raise bilevel.ArgumentError(
            f"{path} is not a checkpoint of `bilevel imaml` that can be read ({type(error).__name__}); {_ANOTHER}"
        ) from error
    state = unsealed(state, what=f"expected the checkpoint {path}", form=FORMAT, remedy=_ANOTHER)
    try:
        return state, Recipe(**state["recipe"])
    except (KeyError, TypeError) as error:  # a state of something else that has a checksum
        raise bilevel.ArgumentError(f"{path} is not a checkpoint of `bilevel imaml`; {_ANOTHER}") from error


def trained(state: dict[str, Any], recipe: Recipe, setup: Setup, ways: int) -> IMAML:
    """Return the averaged learner of a checkpoint's ``state``, for tasks of so many classes.

    Raises
    ------
    bilevel.ArgumentError
        If its outputs are not equal, and there are not ``ways`` of them.
    """
    if ways != recipe.ways and not recipe.equal_outputs:
        raise bilevel.ArgumentError(
            f"expected ways to be {recipe.ways}, as in training, got {ways}; leave --ways out, or train with --equal-outputs"
        )
    if ways < 2:
        raise bilevel.ArgumentError(f"expected ways to be a whole number >= 2, got {ways}; pass for example --ways 5")
    model = setup.model if last_layer(setup.model).out_features == ways else with_outputs(setup.model, ways)
    learner = recipe.learner(model, setup.loss)
    wanted = learner.state_dict()
    learner.load_state_dict({name: fitted(value, wanted[name]) for name, value in state["averaged"].items()})
    return learner


_ANOTHER = "pass another one, or begin anew"


def evaluate(
    learner: IMAML,
    sampler: Sampler,
    tasks: int,
    on_batch: Callable[[int], None] = lambda count: None,
) -> Score:
    """Adapt ``learner`` to tasks from ``sampler`` and score it on their query examples.

    Parameters
    ----------
    learner
        What to evaluate; it is not changed.
    sampler, tasks
        Where tasks come from, and how many.
    on_batch
        Called with the number of tasks done after each batch of them.
    """
    found: list[torch.Tensor] = []
    for begin in range(0, tasks, _TASKS_AT_ONCE):
        batch: Tasks = sampler.sample(min(_TASKS_AT_ONCE, tasks - begin))
        adapted = learner.adapt((batch.support_x, batch.support_y))
        with torch.no_grad():
            predictions = learner.predict(adapted, batch.query_x)
        found.append(accuracies(predictions, batch.query_y).cpu())
        on_batch(begin + len(found[-1]))
    return Score.of(torch.cat(found))


def accuracies(predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the accuracy of each task (T,) from outputs (T, queries, ways) and labels (T, queries)."""
    return (predictions.argmax(dim=-1) == targets).double().mean(dim=-1)


def relative_residual(report: bilevel.SolveReport) -> torch.Tensor:
    """Return the residuals of a linear solve (T,) relative to its right-hand sides."""
    return (report.residual_norm / report.scale).reshape(-1)


def _values(lam: Any) -> list[torch.Tensor]:
    return list(lam.values()) if isinstance(lam, dict) else [lam]
