"""How the outer variables, one number for each training example, become weights of losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

__all__ = ["ExampleWeights", "SigmoidWeights", "SimplexWeights"]


class ExampleWeights(ABC):
    """Weights of the training examples as a function of the outer variables.

    Examples
    --------
    >>> import torch
    >>> from bilevel.cleaning import ExampleWeights
    >>> class SoftplusWeights(ExampleWeights):
    ...     def weights(self, logits, rows):
    ...         return torch.nn.functional.softplus(logits[rows])
    ...     @property
    ...     def neutral(self):
    ...         return 0.6931
    >>> SoftplusWeights().weights(torch.zeros(3), torch.tensor([0, 2]))
    tensor([0.6931, 0.6931])
    """

    @abstractmethod
    def weights(self, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return the weights (b,) of the examples ``rows`` (b,), of the outer variables (n,)."""

    @property
    @abstractmethod
    def neutral(self) -> float:
        """The weight that all examples have at first, where the outer variables are zero."""


@dataclass(frozen=True)
class SigmoidWeights(ExampleWeights):
    """w_i = σ(θ_i) in (0, 1): each example by itself. A total weight that falls is as strong a regularisation as one that rises is weak.

    Examples
    --------
    >>> import torch
    >>> SigmoidWeights().weights(torch.tensor([0.0, 100.0]), torch.tensor([0, 1]))
    tensor([0.5000, 1.0000])
    """

    def weights(self, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return σ(θ) of the examples ``rows``."""
        return logits[rows].sigmoid()

    @property
    def neutral(self) -> float:
        """The weight of every example at first, σ(0) = 0.5."""
        return 0.5


@dataclass(frozen=True)
class SimplexWeights(ExampleWeights):
    """w = n · softmax(θ): the weights have mean one, so that the strength of other terms in the loss stays what it is.

    Examples
    --------
    >>> import torch
    >>> SimplexWeights().weights(torch.tensor([0.0, 0.0, 200.0]), torch.tensor([1, 2]))
    tensor([0., 3.])
    """

    def weights(self, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return n · softmax(θ) of the examples ``rows``."""
        return len(logits) * logits.softmax(0)[rows]

    @property
    def neutral(self) -> float:
        """The weight of every example at first, n · softmax(0) = 1."""
        return 1.0
