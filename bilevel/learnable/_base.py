"""What all learnable parts of a training have in common: the two losses, made of a few parts."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import nn

import bilevel
from bilevel.stochastic import OutputLoss

__all__ = ["Learnable", "Loss", "check_loss", "cross_entropies", "number", "require_module", "require_pair", "whole"]

Loss: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(outputs, targets) ↦ one loss for each example, of any shape, such as (n,)."""


def cross_entropies(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy (n,) of scores (n, classes) and int64 labels (n,)."""
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


class Learnable(nn.Module):
    """What is learned about the training of a model: its parameters are the outer variables θ, the model's are the inner ones.

    The training loss is G = ``training_loss(outputs(model, data), data)`` + ``penalty(model)``, and the validation loss is F =
    ``validation_loss(model, data)``. Subclasses override the parts that θ is in. Data are pairs (inputs, targets) if a subclass says no other.

    Parameters
    ----------
    loss
        (outputs, targets) ↦ one loss for each example. None: cross-entropy of scores (n, classes) and int64 labels (n,).
    weight_decay
        λ ≥ 0 of ½ λ‖φ‖², which is part of the training loss.

    Raises
    ------
    ArgumentError
        If ``weight_decay`` is negative, or ``loss`` is no function.

    Examples
    --------
    >>> import torch
    >>> from bilevel.learnable import Learnable
    >>> class Temperature(Learnable):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.scale = torch.nn.Parameter(torch.zeros(()))
    ...     def training_loss(self, outputs, data):
    ...         return super().training_loss(self.scale * outputs, data)
    >>> inner_objective, outer_objective = (learned := Temperature()).objectives
    >>> data = torch.ones(3, 2), torch.tensor([0, 1, 1])
    >>> inner_objective(torch.nn.Linear(2, 2), learned, data)  # all scores are zero: ln 2
    tensor(0.6931, grad_fn=<AddBackward0>)
    """

    def __init__(self, *, loss: Loss | None = None, weight_decay: float = 0.0) -> None:
        super().__init__()
        if loss is not None:
            check_loss(self.where, "loss", loss)
        number(self.where, "weight_decay", weight_decay, zero=True)
        self.loss, self.weight_decay = cross_entropies if loss is None else loss, weight_decay

    @property
    def where(self) -> str:
        """The name of the class, for messages."""
        return type(self).__name__

    def outputs(self, model: nn.Module, data: Any) -> torch.Tensor:
        """Return what the model says of the training inputs."""
        outputs: torch.Tensor = model(require_pair(self.where, data)[0])
        return outputs

    def losses(self, outputs: torch.Tensor, targets: Any) -> torch.Tensor:
        """Return the loss of each example, of any shape."""
        return self.checked_losses(self.loss(outputs, targets))

    def checked_losses(self, found: Any) -> torch.Tensor:
        """Return what a loss returned, or raise unless it is a floating-point tensor."""
        if not isinstance(found, torch.Tensor) or not found.is_floating_point():
            got = found.dtype if isinstance(found, torch.Tensor) else type(found).__name__
            raise bilevel.DtypeError(
                f"{self.where}: expected loss(outputs, targets) to return a floating-point tensor of losses, got {got}; return differentiable "
                "losses, as torch.nn.functional.cross_entropy does"
            )
        return found

    def training_loss(self, outputs: torch.Tensor, data: Any) -> torch.Tensor:
        """Return the loss () of the training outputs, without the penalty."""
        return self.losses(outputs, require_pair(self.where, data)[1]).mean()

    def penalty(self, model: nn.Module) -> torch.Tensor:
        """Return ½ λ‖φ‖², of shape ()."""
        squares = [(parameter**2).sum() for parameter in model.parameters() if parameter.requires_grad]
        return 0.5 * self.weight_decay * torch.stack(squares).sum()

    def validation_loss(self, model: nn.Module, data: Any) -> torch.Tensor:
        """Return the mean loss () of a model on held-out data."""
        inputs, targets = require_pair(self.where, data)
        return self.losses(model(inputs), targets).mean()

    @property
    def objectives(self) -> tuple[OutputLoss, Callable[[Any, Any, Any], torch.Tensor]]:
        """The pair (G, F) for the methods of :mod:`bilevel.stochastic`, with the model as ``inner`` and this module as ``outer``."""

        def outputs(model: Any, learned: Any, data: Any) -> torch.Tensor:
            if not isinstance(model, nn.Module) or not isinstance(learned, Learnable):
                raise bilevel.ArgumentError(
                    f"{self.where}: expected the model as inner and the {self.where} as outer, both as modules, got {type(model).__name__} and "
                    f"{type(learned).__name__}; write for example ImplicitStep(learned.objectives, model, learned)"
                )
            return learned.outputs(model, data)

        inner = OutputLoss(
            outputs=outputs,
            loss=lambda outputs, learned, data: learned.training_loss(outputs, data),
            penalty=lambda model, learned: learned.penalty(model),
        )
        return inner, lambda model, learned, data: learned.validation_loss(model, data)


def check_loss(where: str, name: str, loss: Any) -> None:
    """Raise unless ``loss`` is a function of (outputs, targets)."""
    fits = callable(loss)
    if fits:
        try:
            inspect.signature(loss).bind(None, None)
        except TypeError:
            fits = False
        except ValueError:  # a function without a signature
            pass
    if not fits:
        raise bilevel.ArgumentError(
            f"{where}: expected {name} to be a function (outputs, targets) -> losses, got {loss!r}; pass that"
            + (", or None for cross-entropy" if name == "loss" else "")
        )


def require_module(where: str, name: str, given: Any) -> nn.Module:
    """Return ``given``, or raise unless it is a module."""
    if not isinstance(given, nn.Module):
        raise bilevel.ArgumentError(
            f"{where}: expected {name} to be a torch.nn.Module, got {given!r}; pass an instance, such as torch.nn.Linear(4, 3)"
        )
    return given


def require_pair(where: str, data: Any) -> tuple[Any, Any]:
    """Return the inputs and targets that ``data`` begin with, or raise."""
    if not isinstance(data, (tuple, list)) or len(data) < 2:
        got = f"{len(data)} entries" if isinstance(data, (tuple, list)) else type(data).__name__
        raise bilevel.ArgumentError(
            f"{where}: expected data to be (inputs, targets), got {got}; pass a tuple of tensors"
        )
    return data[0], data[1]


def number(where: str, name: str, value: float, *, zero: bool = False) -> float:
    """Return ``value``, or raise unless it is a finite number > 0, or ≥ 0 with ``zero``."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or value < 0 or (value == 0 and not zero):
        raise bilevel.ArgumentError(
            f"{where}: expected {name} to be a number {'>=' if zero else '>'} 0, got {value!r}; pass for example 0.001"
        )
    return value


def whole(where: str, name: str, value: int, remedy: str = "pass one") -> int:
    """Return ``value``, or raise unless it is an int > 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise bilevel.ArgumentError(f"{where}: expected {name} to be an int > 0, got {value!r}; {remedy}")
    return value
