"""A few learned examples that train a model as a large data set does."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import bilevel
from bilevel.learnable._base import Learnable, Loss

__all__ = ["DistilledData"]


class DistilledData(Learnable):
    """Learn the inputs of a small training set: G = mean_j ℓ(f_φ(θ_j), y_j) + ½ λ‖φ‖², and F is the loss on real data.

    The inner objective takes no data: pass None as the inner batch. The model is warm-started from step to step. The examples found then
    train any convex model, for its solution does not depend on the start. A network that is to be trained anew with them needs examples that are
    learned from fresh starts: train it by :meth:`LearningRates.trained` on ``distilled()``.

    Parameters
    ----------
    inputs
        What to begin from: floating-point (m, ...), such as a real example of each class. They are copied.
    targets
        (m, ...), fixed; of a dtype that ``loss`` takes, such as int64 labels (m,).
    loss, weight_decay
        See :class:`Learnable`.

    Raises
    ------
    ShapeError, DtypeError
        If there is not one target for each input, or inputs are not floating-point.

    References
    ----------
    Wang, Zhu, Torralba, Efros, "Dataset distillation", 2018; Vicol, Lorraine, Pedregosa, Duvenaud, Grosse, "On implicit bias in
    overparameterized bilevel optimization", ICML 2022 (what a warm start does to the examples found).

    Examples
    --------
    >>> import torch
    >>> from bilevel import stochastic
    >>> from bilevel.learnable import DistilledData
    >>> real = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]]), torch.tensor([0, 0, 1, 1])
    >>> distilled = DistilledData(torch.tensor([[0.1], [-0.1]]), torch.tensor([0, 1]), weight_decay=0.1)  # on the wrong sides
    >>> model = torch.nn.Linear(1, 2)
    >>> method = stochastic.ImplicitStep(distilled.objectives, model, distilled, inner_steps=20)
    >>> for _ in range(200):
    ...     _ = method.step(None, real)
    >>> int((model(real[0]).argmax(1) == real[1]).sum())
    4
    """

    def __init__(
        self, inputs: torch.Tensor, targets: torch.Tensor, *, loss: Loss | None = None, weight_decay: float = 0.0
    ) -> None:
        super().__init__(loss=loss, weight_decay=weight_decay)
        if not isinstance(inputs, torch.Tensor) or not isinstance(targets, torch.Tensor):
            raise bilevel.ArgumentError(
                f"DistilledData: expected inputs and targets to be tensors, got {type(inputs).__name__} and {type(targets).__name__}; pass "
                "torch.tensor(...) of them"
            )
        if not inputs.is_floating_point():
            raise bilevel.DtypeError(
                f"DistilledData: expected floating-point inputs, got {inputs.dtype}; convert them with .float()"
            )
        if not (inputs.ndim and targets.ndim and len(inputs) == len(targets) and len(inputs)):
            raise bilevel.ShapeError(
                f"DistilledData: expected inputs (m, ...) and targets (m, ...) with m > 0, got {tuple(inputs.shape)} and "
                f"{tuple(targets.shape)}; pass one target for each input"
            )
        self.inputs = nn.Parameter(inputs.detach().clone())
        self.targets: torch.Tensor
        self.register_buffer("targets", targets.detach().clone())

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the examples: inputs (m, ...) and targets (m, ...)."""
        return self.inputs, self.targets

    def outputs(self, model: nn.Module, data: Any) -> torch.Tensor:
        """Return what the model says of the learned inputs."""
        outputs: torch.Tensor = model(self.inputs)
        return outputs

    def training_loss(self, outputs: torch.Tensor, data: Any) -> torch.Tensor:
        """Return the mean loss of the learned examples."""
        return super().training_loss(outputs, self())
