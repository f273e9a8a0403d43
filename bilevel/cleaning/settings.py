"""How weights are learned and models are trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn

from bilevel import CG, stochastic
from bilevel.cleaning.weights import ExampleWeights, SigmoidWeights
from bilevel.errors import ArgumentError
from bilevel.setting_checks import check_number, check_steps

__all__ = ["CleaningSettings", "InnerOptimizer"]

MethodMaker: TypeAlias = Callable[[Any, nn.Module, torch.Tensor], stochastic.StochasticMethod]

InnerOptimizer = partial(torch.optim.Adam, lr=0.02)
"""The optimiser of the classifier's parameters."""


def default_method(problem: Any, inner: nn.Module, outer: torch.Tensor) -> stochastic.StochasticMethod:
    """Return the method that ``clean`` uses: one Adam step, five steps of conjugate gradients from the last adjoint, one Adam step."""
    return stochastic.ImplicitStep(
        problem, inner, outer, inner_steps=1, linear_solver=CG(max_steps=5), inner_optimizer=InnerOptimizer,
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
        The number of outer steps.
    batch_size
        Examples in a minibatch of each level; None: all.
    weight_decay
        λ of ½ λ‖φ‖² in the training loss.
    training_steps
        Adam steps of the classifiers that accuracies are measured with, on the whole training set.
    threshold
        An example is flagged if its weight is below this share of its initial weight.
    include_trusted
        Whether the classifiers that accuracies are measured with are trained on the trusted examples too.
    make_method
        (problem, model, outer variables) ↦ a method of :mod:`bilevel.stochastic`.
    seed
        The seed of the initial parameters and of minibatches.

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
