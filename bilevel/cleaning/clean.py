"""From data to weights, flagged rows and accuracies in one call."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from bilevel import stochastic
from bilevel.cleaning.models import linear
from bilevel.cleaning.problem import ExampleWeighting
from bilevel.cleaning.settings import CleaningSettings
from bilevel.cleaning.training import Examples, accuracy, initial_model, predict, train_classifier
from bilevel.errors import ArgumentError, DtypeError, ShapeError

__all__ = ["Accuracies", "Cleaned", "clean"]


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

    Examples
    --------
    >>> import torch
    >>> from bilevel.cleaning import CleaningSettings, clean, corrupt
    >>> x = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    >>> y = (x[:, 0] > 0).long()
    >>> given, _ = corrupt(y[:100], 0.2)
    >>> parts = {"training": (x[:100], given), "trusted": (x[100:150], y[100:150]), "test": (x[150:], y[150:])}
    >>> accuracies = clean(**parts, settings=CleaningSettings(steps=100, training_steps=50)).accuracies
    >>> round(accuracies.untrusted, 2), round(accuracies.cleaned, 2)
    (0.91, 0.95)
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

    Examples
    --------
    >>> import torch
    >>> from bilevel.cleaning import CleaningSettings, clean, corrupt
    >>> x = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    >>> y = (x[:, 0] > 0).long()
    >>> given, wrong = corrupt(y[:40], 0.2)
    >>> found = clean((x[:40], given), (x[40:], y[40:]), settings=CleaningSettings(steps=100, training_steps=50))
    >>> tuple(found.weights.shape), int(wrong[found.order[:5]].sum())  # of the five most suspicious
    ((40,), 5)
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
    flagged = weights < settings.threshold * settings.weights.neutral
    train = partial(train_classifier, make, settings=settings)
    model = train(training, trusted=trusted, weights=torch.where(flagged, torch.zeros_like(weights), weights))
    accuracies = Accuracies(math.nan, math.nan, math.nan)
    if test is not None:
        models = train(training, trusted=trusted), model, train(trusted)
        accuracies = Accuracies(*(accuracy(each, test) for each in models))
    return Cleaned(
        weights=weights,
        flagged=flagged,
        order=weights.argsort(),
        suggested=predict(model, training[0]),
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
    method = settings.make_method(problem, initial_model(make, settings, training[0]), logits)
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
