"""A weight for each training example: wrong labels lose theirs, rare classes gain."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import bilevel
from bilevel.learnable._base import Learnable, Loss, whole

__all__ = ["ExampleWeights"]


class ExampleWeights(Learnable):
    """Learn a weight w_i = 2 σ(θ_i) for each training example: G = mean_i w_i ℓ_i + ½ λ‖φ‖².

    All weights are 1 at first, and stay in (0, 2). Training data are (inputs, targets, rows), with the numbers of the examples in
    ``rows``. For wrong labels, :func:`bilevel.cleaning.clean` is one call that does all of it.

    Parameters
    ----------
    count
        The number of training examples.
    loss, weight_decay
        See :class:`Learnable`.
    dtype, device
        Of the parameters (count,).

    Raises
    ------
    ArgumentError
        If ``count`` is not a positive int, or a setting cannot be used.

    References
    ----------
    Ren, Zeng, Yang, Urtasun, "Learning to reweight examples for robust deep learning", ICML 2018; Franceschi, Donini, Frasconi, Pontil,
    "Forward and reverse gradient-based hyperparameter optimization", ICML 2017, Section 5.1.

    Examples
    --------
    >>> import torch
    >>> from bilevel import stochastic
    >>> from bilevel.learnable import ExampleWeights
    >>> x, y = torch.tensor([[1.0], [2.0], [-1.0], [-2.0]]), torch.tensor([1, 1, 0, 1])  # the last label is wrong
    >>> weights, _ = ExampleWeights(4, weight_decay=0.1), torch.manual_seed(0)
    >>> method = stochastic.ImplicitStep(weights.objectives, torch.nn.Linear(1, 2), weights)
    >>> for _ in range(200):
    ...     _ = method.step((x, y, torch.arange(4)), (x[:3], y[:3]))
    >>> weights()[3] < 0.5 < weights()[0]
    tensor(True)
    >>> len(weights())
    4
    """

    def __init__(
        self,
        count: int,
        *,
        loss: Loss | None = None,
        weight_decay: float = 0.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(loss=loss, weight_decay=weight_decay)
        whole("ExampleWeights", "count", count, "pass len(targets)")
        self.logits = nn.Parameter(torch.zeros(count, dtype=dtype, device=device))

    def forward(self, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Return the weights (b,) of the examples ``rows`` (b,), or of all."""
        return 2 * (self.logits if rows is None else self.logits.index_select(0, rows)).sigmoid()

    def outputs(self, model: nn.Module, data: Any) -> torch.Tensor:
        """Return what the model says of the training inputs."""
        if not isinstance(data, (tuple, list)) or len(data) != 3:
            got = f"{len(data)} entries" if isinstance(data, (tuple, list)) else type(data).__name__
            raise bilevel.ArgumentError(
                f"ExampleWeights: expected training data (inputs, targets, rows), got {got}; add "
                "torch.arange(len(targets)), and take minibatches of all three"
            )
        return super().outputs(model, data)

    def training_loss(self, outputs: torch.Tensor, data: Any) -> torch.Tensor:
        """Return the weighted mean of the losses."""
        losses, weights = self.losses(outputs, data[1]), self(data[2])
        if losses.shape != weights.shape:
            raise bilevel.ShapeError(
                f"ExampleWeights: expected one loss for each example, of shape {tuple(weights.shape)}, got {tuple(losses.shape)}; let loss "
                'return that, as cross_entropy(outputs, targets, reduction="none") does'
            )
        return (weights * losses).mean()
