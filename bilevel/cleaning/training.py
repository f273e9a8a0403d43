"""Train classifiers on weighted examples, the same way for every choice of examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import nn

from bilevel.cleaning.settings import CleaningSettings, InnerOptimizer

__all__ = ["Examples", "accuracy", "initial_model", "predict", "train_classifier"]

Examples: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Inputs (n, ...) and int64 labels (n,)."""


def initial_model(make: Callable[[], nn.Module], settings: CleaningSettings, inputs: torch.Tensor) -> nn.Module:
    """Return a new model, the same at every call, without touching the generator of others."""
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model = make()
    return model.to(inputs.device, inputs.dtype)


def train_classifier(
    make: Callable[[], nn.Module],
    examples: Examples,
    *,
    settings: CleaningSettings,
    weights: torch.Tensor | None = None,
    trusted: Examples | None = None,
) -> nn.Module:
    """Return a new model that minimises Σ w_i ℓ(f(x_i), y_i) / Σ w_i + ½ λ‖φ‖², by ``settings.training_steps`` steps of Adam.

    Parameters
    ----------
    make
        Makes the model.
    examples
        Inputs (n, ...) and labels (n,).
    settings
        Steps, weight decay and seed.
    weights
        (n,), at least 0; None: all alike.
    trusted
        Examples of the neutral weight that are added if ``settings.include_trusted``.
    """
    model = initial_model(make, settings, examples[0])
    inputs, labels = examples
    neutral = settings.weights.neutral
    if weights is None:
        weights = inputs.new_full((len(labels),), neutral)
    if settings.include_trusted and trusted is not None:
        inputs, labels = torch.cat([inputs, trusted[0]]), torch.cat([labels, trusted[1]])
        weights = torch.cat([weights, weights.new_full((len(trusted[1]),), neutral)])
    share = weights / weights.mean().clamp(min=torch.finfo(weights.dtype).tiny)  # all weights may be zero
    optimizer = InnerOptimizer(model.parameters())
    for _ in range(settings.training_steps):
        optimizer.zero_grad()
        losses = nn.functional.cross_entropy(model(inputs), labels, reduction="none")
        squares = torch.stack([(parameter**2).sum() for parameter in model.parameters()]).sum()
        ((share * losses).mean() + 0.5 * settings.weight_decay * squares).backward()
        optimizer.step()
    return model.eval()


def predict(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Return the class (n,) with the highest score."""
    with torch.no_grad():
        predicted: torch.Tensor = model(inputs).argmax(-1)
    return predicted


def accuracy(model: nn.Module, examples: Examples) -> float:
    """Return the share of ``examples`` whose label the model predicts."""
    return float((predict(model, examples[0]) == examples[1]).double().mean())
