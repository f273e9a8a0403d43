"""Example weights as a bilevel problem."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import bilevel
from bilevel.cleaning.weights import ExampleWeights, SigmoidWeights
from bilevel.setting_checks import check_number

__all__ = ["ExampleWeighting"]


class ExampleWeighting(bilevel.BilevelProblem):
    """min_θ of the trusted loss at argmin_φ mean_i w_i(θ) ℓ(f_φ(x_i), y_i) + ½ λ‖φ‖², with one θ_i for each training example.

    For :mod:`bilevel.stochastic`, with a classifier as inner module. The inner data are (inputs, labels, rows), ``rows`` being the
    numbers of the examples; the outer data are (inputs, labels).

    Parameters
    ----------
    weights
        How θ becomes weights.
    weight_decay
        λ ≥ 0.

    Raises
    ------
    ArgumentError
        If ``weight_decay`` is negative.

    References
    ----------
    Franceschi, Donini, Frasconi, Pontil, "Forward and reverse gradient-based hyperparameter optimization", ICML 2017, Section 5.1
    (data hyper-cleaning); Ren, Zeng, Yang, Urtasun, "Learning to reweight examples for robust deep learning", ICML 2018.

    Examples
    --------
    >>> import torch
    >>> from bilevel.cleaning import ExampleWeighting
    >>> model, logits = torch.nn.Linear(2, 2), torch.zeros(3)
    >>> data = (torch.zeros(3, 2), torch.tensor([0, 1, 0]), torch.arange(3))
    >>> with torch.no_grad():
    ...     _ = model.bias.zero_()
    ...     # each weight is 1/2 at first, and the loss of each example is ln 2
    ...     ExampleWeighting(weight_decay=0.0).inner_objective(model, logits, data)
    tensor(0.3466)
    """

    def __init__(self, weights: ExampleWeights | None = None, weight_decay: float = 5e-3) -> None:
        super().__init__()
        check_number("ExampleWeighting", "weight_decay", weight_decay, closed=True)
        self.weights = SigmoidWeights() if weights is None else weights
        self.weight_decay = weight_decay

    def inner_objective(self, inner: nn.Module, outer: torch.Tensor, data: Any) -> torch.Tensor:
        """Return the weighted training loss."""
        inputs, labels, rows = data
        losses = nn.functional.cross_entropy(inner(inputs), labels, reduction="none")
        squares = torch.stack([(parameter**2).sum() for parameter in inner.parameters()])
        return (self.weights.weights(outer, rows) * losses).mean() + 0.5 * self.weight_decay * squares.sum()

    def outer_objective(self, inner: nn.Module, outer: torch.Tensor, data: Any) -> torch.Tensor:
        """Return the mean loss of trusted examples."""
        inputs, labels = data
        return nn.functional.cross_entropy(inner(inputs), labels)
