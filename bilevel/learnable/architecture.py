"""Which operation each place of a network has."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import bilevel
from bilevel.learnable._base import Learnable, Loss, require_module, require_pair, whole

__all__ = ["Architecture", "MixedOperation"]


class MixedOperation(nn.Module):
    """A weighted sum of operations, Σ_k w_k f_k(x): a place of a network whose :class:`Architecture` is learned.

    Parameters
    ----------
    operations
        K modules whose outputs have one shape.

    Raises
    ------
    ArgumentError
        If there is no operation.

    Examples
    --------
    >>> import torch
    >>> from bilevel.learnable import MixedOperation
    >>> mixed = MixedOperation([torch.nn.Identity(), torch.nn.ReLU()])
    >>> mixed(torch.tensor([-1.0, 1.0]), torch.tensor([0.25, 0.75]))
    tensor([-0.2500,  1.0000])
    """

    def __init__(self, operations: Sequence[nn.Module]) -> None:
        super().__init__()
        if not isinstance(operations, (tuple, list, nn.ModuleList)) or not len(operations):
            got = "none" if isinstance(operations, (tuple, list, nn.ModuleList)) else type(operations).__name__
            raise bilevel.ArgumentError(
                f"MixedOperation: expected at least one operation, got {got}; pass a list of modules"
            )
        for place, one in enumerate(operations):
            require_module("MixedOperation", f"operations[{place}]", one)
        self.operations = nn.ModuleList(operations)

    def forward(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return the sum of the operations on ``x`` with ``weights`` (K,)."""
        if not isinstance(weights, torch.Tensor) or weights.shape != (len(self.operations),):
            got = tuple(weights.shape) if isinstance(weights, torch.Tensor) else type(weights).__name__
            raise bilevel.ShapeError(
                f"MixedOperation: expected weights ({len(self.operations)},), one for each operation, got {got}; pass the row "
                "of Architecture()() that belongs to this place"
            )
        outputs = [operation(x) for operation in self.operations]
        if len({output.shape for output in outputs}) != 1:
            raise bilevel.ShapeError(
                f"MixedOperation: expected operations whose outputs have one shape, got {[tuple(output.shape) for output in outputs]}; pad "
                "convolutions, or add a layer that maps to the same shape"
            )
        return torch.stack([w * output for w, output in zip(weights, outputs, strict=True)]).sum(0)


class Architecture(Learnable):
    """Learn the operations of a network, relaxed to weights: softmax(θ_e) mixes the K operations of place e.

    The model is called as ``model(inputs, weights)``, with weights (places, K): let it pass row e to the :class:`MixedOperation` of place e.
    :meth:`chosen` is the operation with the largest weight at each place. Train the network that has these alone anew: its weights were
    trained beside the others.

    Parameters
    ----------
    places, operations
        The number of places, and K.
    loss, weight_decay
        See :class:`Learnable`.
    dtype, device
        Of the parameters (places, K). They are zero at first.

    Raises
    ------
    ArgumentError
        If ``places`` or ``operations`` is not a positive int, or a setting cannot be used.

    References
    ----------
    Liu, Simonyan, Yang, "DARTS: Differentiable architecture search", ICLR 2019.

    Examples
    --------
    >>> import torch
    >>> from bilevel.learnable import Architecture
    >>> architecture = Architecture(2, 4)
    >>> architecture().sum(1).tolist()
    [1.0, 1.0]
    >>> with torch.no_grad():
    ...     architecture.logits[1, 3] = 1.0
    >>> architecture.chosen()
    [0, 3]
    """

    def __init__(
        self,
        places: int,
        operations: int,
        *,
        loss: Loss | None = None,
        weight_decay: float = 0.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(loss=loss, weight_decay=weight_decay)
        for name, count in (("places", places), ("operations", operations)):
            whole("Architecture", name, count)
        self.logits = nn.Parameter(torch.zeros(places, operations, dtype=dtype, device=device))

    def forward(self) -> torch.Tensor:
        """Return the weights (places, K); each row sums to 1."""
        return self.logits.softmax(1)

    def chosen(self) -> list[int]:
        """Return the number of the operation with the largest weight at each place."""
        return [int(number) for number in self.logits.argmax(1)]

    def outputs(self, model: nn.Module, data: Any) -> torch.Tensor:
        """Return what the mixed model says of the training inputs."""
        inputs, _ = require_pair(self.where, data)
        try:
            inspect.signature(model.forward).bind(None, None)
        except TypeError:
            raise bilevel.ArgumentError(
                f"Architecture: expected a model that is called as model(inputs, weights), got {type(model).__name__}, which is not; give its "
                "forward the weights (places, K), and pass row e to the MixedOperation of place e"
            ) from None
        outputs: torch.Tensor = model(inputs, self())
        return outputs

    def validation_loss(self, model: nn.Module, data: Any) -> torch.Tensor:
        """Return the mean loss of the mixed model on held-out data."""
        return self.losses(self.outputs(model, data), data[1]).mean()
