"""A weight for each of several losses: useful auxiliary tasks gain theirs, harmful ones lose it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import bilevel
from bilevel.learnable._base import Learnable, Loss, check_loss, number, require_pair

__all__ = ["LossWeights"]


class LossWeights(Learnable):
    """Learn the weights of auxiliary losses: G = ℓ + Σ_k e^{θ_k} ℓ_k + ½ λ‖φ‖², for a model that F judges by ℓ alone.

    Targets are what the losses take. Where each task has outputs of its own, let the model return one tensor (n, all outputs), and let each
    loss take its columns.

    Parameters
    ----------
    auxiliary
        K functions (outputs, targets) ↦ losses of any shape, of which the mean is taken.
    loss
        The main one, whose weight is 1, and the validation loss; as for :class:`Learnable`.
    initial
        The weight of each auxiliary loss at first.
    weight_decay
        See :class:`Learnable`.
    dtype, device
        Of the parameters (K,).

    Raises
    ------
    ArgumentError
        If there is no auxiliary loss, or a setting cannot be used.

    References
    ----------
    Navon, Achituve, Maron, Chechik, Fetaya, "Auxiliary learning by implicit differentiation", ICLR 2021.

    Examples
    --------
    >>> import torch
    >>> from bilevel import stochastic
    >>> from bilevel.learnable import LossWeights
    >>> square = lambda outputs, target: (outputs - target) ** 2
    >>> weights = LossWeights([lambda outputs, target: square(outputs, 3.0)], loss=square)  # the auxiliary task asks for 3
    >>> model, data = torch.nn.Linear(1, 1), (torch.zeros(1, 1), torch.ones(1, 1))  # the main task asks for 1
    >>> sgd = lambda tensors: torch.optim.SGD(tensors, lr=0.5)
    >>> method = stochastic.ImplicitStep(weights.objectives, model, weights, outer_optimizer=sgd)
    >>> for _ in range(100):
    ...     _ = method.step(data, data)
    >>> print(f"the weight fell from 1 to {weights().item():.2f}")
    the weight fell from 1 to 0.04
    """

    def __init__(
        self,
        auxiliary: Sequence[Loss],
        *,
        loss: Loss | None = None,
        initial: float = 1.0,
        weight_decay: float = 0.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(loss=loss, weight_decay=weight_decay)
        if not isinstance(auxiliary, (tuple, list)) or not auxiliary:
            raise bilevel.ArgumentError(
                f"LossWeights: expected auxiliary to be functions (outputs, targets) -> losses, got {auxiliary!r}; pass a list of at least one"
            )
        self.auxiliary = tuple(auxiliary)
        for place, one in enumerate(auxiliary):
            check_loss("LossWeights", f"auxiliary[{place}]", one)
        start = torch.full(
            (len(self.auxiliary),), number("LossWeights", "initial", initial), dtype=dtype, device=device
        )
        self.logarithms = nn.Parameter(start.log())

    def forward(self) -> torch.Tensor:
        """Return the weights (K,)."""
        return self.logarithms.exp()

    def training_loss(self, outputs: torch.Tensor, data: Any) -> torch.Tensor:
        """Return the main loss with the weighted auxiliary ones."""
        targets = require_pair(self.where, data)[1]
        losses = torch.stack([self.checked_losses(loss(outputs, targets)).mean() for loss in self.auxiliary])
        return super().training_loss(outputs, data) + self() @ losses
