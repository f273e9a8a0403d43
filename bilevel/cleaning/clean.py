"""From data to weights, flagged rows and accuracies in one call."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn

from bilevel import CG, stochastic
from bilevel.cleaning.models import linear
from bilevel.cleaning.problem import ExampleWeighting
from bilevel.cleaning.weights import ExampleWeights, SigmoidWeights
from bilevel.errors import ArgumentError, DtypeError, ShapeError
from bilevel.setting_checks import check_number, check_steps

__all__ = ["Accuracies", "Cleaned", "CleaningSettings", "clean"]

Examples: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Inputs (n, ...) and int64 labels (n,)."""

MethodMaker: TypeAlias = Callable[[Any, nn.Module, torch.Tensor], stochastic.StochasticMethod]

_INNER = partial(torch.optim.Adam, lr=0.02)


def default_method(problem: Any, inner: nn.Module, outer: torch.Tensor) -> stochastic.StochasticMethod:
    """Return the method that ``clean`` uses: one Adam step, five steps of conjugate gradients from the last adjoint, one Adam step."""
    return stochastic.ImplicitStep(
        problem, inner, outer, inner_steps=1, linear_solver=CG(max_steps=5), inner_optimizer=_INNER,
        outer_optimizer=partial(torch.optim.Adam, lr=0.1),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CleaningSettings:
    """How weights are learned and models are trained.

    Parameters
    ----------
    weights
        How the outer variables become weights.
    steps
        Outer steps.
    batch_size
        Examples in a minibatch of each level; None: all.
    weight_decay
        λ of ½ λ‖φ‖² in the training loss.
    training_steps
        Adam steps of the classifiers that accuracies are measured with, on the whole training set.
    threshold
        An example is flagged where its weight is below this share of what it was at first.
    include_trusted
        Train the classifiers that accuracies are measured with on the trusted examples too.
    make_method
        (problem, model, outer variables) ↦ a method of :mod:`bilevel.stochastic`.
    seed
        Of the initial parameters and of minibatches.

    Raises
    ------
    ArgumentError
        If a setting is out of its range.

    Examples
    --------
    >>> from bilevel.cleaning import CleaningSettings
    >>> CleaningSettings(steps=20, threshold=0.9).steps
    20
    """

    weights: ExampleWeights = field(default_factory=SigmoidWeights)
    steps: int = 150
    batch_size: int | None = None
    weight_decay: float = 5e-3
    training_steps: int = 300
    threshold: float = 1.0
    include_trusted: bool = False
    make_method: MethodMaker = default_method
    seed: int = 0

    def __post_init__(self) -> None:
        check_steps("CleaningSettings", "steps", self.steps)
        check_steps("CleaningSettings", "batch_size", self.batch_size, optional=True)
        check_steps("CleaningSettings", "training_steps", self.training_steps)
        check_number("CleaningSettings", "weight_decay", self.weight_decay, closed=True)
        check_number("CleaningSettings", "threshold", self.threshold)
        if not isinstance(self.weights, ExampleWeights):
            raise ArgumentError(
                f"CleaningSettings: expected weights to be ExampleWeights, got {self.weights!r}; pass SigmoidWeights() or SimplexWeights()"
            )


@dataclass(frozen=True)
class Accuracies:
    """Shares of test examples that classifiers trained from the same initial parameters label rightly; NaN without a test set.

    Parameters
    ----------
    untrusted
        Trained on the training set with the labels as given.
    cleaned
        Trained with the weights found, without the flagged examples.
    trusted_only
        Trained on the trusted examples alone: a cleaning that is no better has found nothing that they did not say by themselves.
    """

    untrusted: float
    cleaned: float
    trusted_only: float


@dataclass(frozen=True, eq=False)
class Cleaned:
    """What :func:`clean` found.

    Parameters
    ----------
    weights
        (n,), of the training examples.
    flagged
        Bool (n,): which are taken for wrong.
    order
        int64 (n,): rows from the most suspicious on.
    suggested
        int64 (n,): what the cleaned classifier says of each training example.
    accuracies
        On the test set.
    model
        The classifier trained with the weights, without the flagged examples.
    outer_losses
        (steps,): the trusted loss before each step.
    """

    weights: torch.Tensor
    flagged: torch.Tensor
    order: torch.Tensor
    suggested: torch.Tensor
    accuracies: Accuracies
    model: nn.Module
    outer_losses: torch.Tensor

    def precision_and_recall(self, wrong: torch.Tensor) -> tuple[float, float]:
        """Return the share of the flagged that are wrong, and the share of the wrong that are flagged; ``wrong`` is bool (n,)."""
        hits = float((self.flagged & wrong).sum())
        flagged, total = float(self.flagged.sum()), float(wrong.sum())
        return hits / flagged if flagged else math.nan, hits / total if total else math.nan


def clean(
    training: Examples,
    trusted: Examples,
    *,
    test: Examples | None = None,
    make_model: Callable[[], nn.Module] | None = None,
    settings: CleaningSettings | None = None,
    on_step: Callable[[int, stochastic.StepResult], None] | None = None,
) -> Cleaned:
    """Learn a weight for each training example, and flag those whose weight fell.

    Parameters
    ----------
    training
        Inputs (n, ...) and labels (n,), some of which may be wrong.
    trusted
        Inputs and labels of a small set that is right.
    test
        A set for the accuracies; it takes no part in the weights.
    make_model
        Makes a classifier: a module from inputs to scores (n, classes). By default a linear one of the flattened inputs.
    settings
        See :class:`CleaningSettings`.
    on_step
        Called with the number of each outer step and its result.

    Returns
    -------
    Cleaned
        Weights, flagged rows, suggested labels, accuracies and the final classifier.

    Raises
    ------
    ShapeError, DtypeError, ArgumentError
        If examples or settings cannot be used.

    Examples
    --------
    >>> import torch
    >>> from bilevel.cleaning import CleaningSettings, clean, corrupt
    >>> inputs = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    >>> labels = (inputs[:, 0] > 0).long()
    >>> given, wrong = corrupt(labels[:40], 0.2)
    >>> settings = CleaningSettings(steps=100, training_steps=50)
    >>> found = clean((inputs[:40], given), (inputs[40:], labels[40:]), settings=settings)
    >>> int(found.flagged.sum()), int(wrong.sum())
    (9, 8)
    """
    settings = CleaningSettings() if settings is None else settings
    for name, examples in (("training", training), ("trusted", trusted), ("test", test)):
        if examples is not None:
            _check(name, examples)
    classes = 1 + max(int(labels.max()) for _, labels in (training, trusted))
    make = make_model if make_model is not None else partial(_flat_linear, training[0], classes)
    logits = torch.zeros(len(training[1]), dtype=training[0].dtype, device=training[0].device)
    losses = _learn(logits, training, trusted, make, settings, on_step)
    rows = torch.arange(len(logits), device=logits.device)
    weights = settings.weights.weights(logits.detach(), rows)
    ones = torch.full_like(weights, settings.weights.neutral)
    flagged = weights < settings.threshold * settings.weights.neutral
    model = _trained(make, training, torch.where(flagged, torch.zeros_like(weights), weights), trusted, settings)
    accuracies = Accuracies(math.nan, math.nan, math.nan)
    if test is not None:
        untrusted = _trained(make, training, ones, trusted, settings)
        alone = _trained(
            make,
            trusted,
            torch.full_like(trusted[0].new_empty(len(trusted[1])), settings.weights.neutral),
            None,
            settings,
        )
        accuracies = Accuracies(*(_accuracy(each, test) for each in (untrusted, model, alone)))
    return Cleaned(
        weights=weights,
        flagged=flagged,
        order=weights.argsort(),
        suggested=_predicted(model, training[0]),
        accuracies=accuracies,
        model=model,
        outer_losses=losses,
    )


def _learn(
    logits: torch.Tensor,
    training: Examples,
    trusted: Examples,
    make: Callable[[], nn.Module],
    settings: CleaningSettings,
    on_step: Callable[[int, stochastic.StepResult], None] | None,
) -> torch.Tensor:
    """Move ``logits`` in place, and return the trusted losses on the way."""
    problem = ExampleWeighting(settings.weights, settings.weight_decay)
    method = settings.make_method(problem, _made(make, settings, training[0]), logits)
    rows = torch.arange(len(logits), device=logits.device)
    lower: Any = (*training, rows)
    upper: Any = trusted
    if settings.batch_size is not None:
        lower = stochastic.Minibatches(lower, settings.batch_size, seed=settings.seed)
        upper = stochastic.Minibatches(upper, settings.batch_size, seed=settings.seed + 1)
    losses = []
    for step in range(settings.steps):
        result = method.step(lower, upper)
        losses.append(result.outer_loss)
        if on_step is not None:
            on_step(step + 1, result)
    return torch.stack(losses)


def _made(make: Callable[[], nn.Module], settings: CleaningSettings, inputs: torch.Tensor) -> nn.Module:
    """Return a new model, the same at every call, without touching the generator of others."""
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model = make()
    return model.to(inputs.device, inputs.dtype)


def _trained(
    make: Callable[[], nn.Module],
    examples: Examples,
    weights: torch.Tensor,
    trusted: Examples | None,
    settings: CleaningSettings,
) -> nn.Module:
    """Return a new model trained on weighted examples, and on the trusted ones if they are included."""
    model = _made(make, settings, examples[0])
    inputs, labels = examples
    if settings.include_trusted and trusted is not None:
        inputs, labels = torch.cat([inputs, trusted[0]]), torch.cat([labels, trusted[1]])
        weights = torch.cat([weights, weights.new_full((len(trusted[1]),), settings.weights.neutral)])
    share = weights / weights.mean().clamp(min=torch.finfo(weights.dtype).tiny)  # all may be flagged
    optimizer = _INNER(model.parameters())
    for _ in range(settings.training_steps):
        optimizer.zero_grad()
        losses = nn.functional.cross_entropy(model(inputs), labels, reduction="none")
        squares = torch.stack([(parameter**2).sum() for parameter in model.parameters()]).sum()
        ((share * losses).mean() + 0.5 * settings.weight_decay * squares).backward()
        optimizer.step()
    return model.eval()


def _predicted(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(inputs).argmax(-1)


def _accuracy(model: nn.Module, examples: Examples) -> float:
    return float((_predicted(model, examples[0]) == examples[1]).double().mean())


def _flat_linear(inputs: torch.Tensor, classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), linear(inputs[0].numel(), classes))


def _check(name: str, examples: Any) -> None:
    if not (isinstance(examples, tuple) and len(examples) == 2 and all(isinstance(t, torch.Tensor) for t in examples)):
        raise ArgumentError(
            f"clean: expected {name} to be a pair of tensors (inputs, labels), got {type(examples).__name__}; pass that"
        )
    inputs, labels = examples
    if not inputs.is_floating_point() or labels.dtype != torch.int64:
        raise DtypeError(
            f"clean: expected {name} to be floating-point inputs and int64 labels, got {inputs.dtype} and {labels.dtype}; convert them "
            "with .float() and .long()"
        )
    if labels.ndim != 1 or len(inputs) != len(labels) or not len(labels):
        raise ShapeError(
            f"clean: expected {name} to be inputs (n, ...) and labels (n,) with n > 0, got {tuple(inputs.shape)} and "
            f"{tuple(labels.shape)}; pass one label for each input"
        )
    if int(labels.min()) < 0 or not bool(torch.isfinite(inputs).all()):
        raise ArgumentError(
            f"clean: expected {name} to have finite inputs and labels from 0 on, and it has not; drop or fill these rows"
        )
