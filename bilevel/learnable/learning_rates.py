"""Learning rates for each tensor of a model, by differentiating the descent that they make."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.func import functional_call

import bilevel
from bilevel.learnable._base import Learnable, Loss, number, require_module, require_pair, whole

__all__ = ["LearningRates"]


class LearningRates(Learnable):
    """Learn the rate e^{θ_p} of each tensor p of a model: F at the parameters after K steps φ_p ← φ_p − e^{θ_p} ∇_p G from a start.

    A minimiser does not depend on the rate that led to it. So this part is learned by unrolling: calling the module trains the model and
    returns F, which ordinary ``backward()`` differentiates. Descent is deterministic, on all of the training data, and memory grows with K.

    The parameters that ``model`` has when it is called are the start, and they get gradients as well: an optimiser of both learns a start
    and its rates, as Meta-SGD does. So do training data that require grad, such as those of :class:`DistilledData`.

    Parameters
    ----------
    model
        Whose parameters are to be trained; those that do not require grad stay as they are.
    initial
        The rate at first.
    steps
        K.
    loss, weight_decay
        See :class:`Learnable`.

    Raises
    ------
    ArgumentError
        If the model has no parameter that requires grad, or a setting is out of its range.

    References
    ----------
    Maclaurin, Duvenaud, Adams, "Gradient-based hyperparameter optimization through reversible learning", ICML 2015; Li, Zhou, Chen, Li,
    "Meta-SGD: Learning to learn quickly for few-shot learning", 2017.

    Examples
    --------
    >>> import torch
    >>> from bilevel.learnable import LearningRates
    >>> model, data = torch.nn.Linear(1, 1, bias=False), (torch.ones(1, 1), torch.full((1, 1), 2.0))
    >>> rates = LearningRates(model, initial=0.1, steps=1, loss=lambda outputs, targets: 0.5 * (outputs - targets) ** 2)
    >>> optimizer = torch.optim.SGD(rates.parameters(), lr=0.2)
    >>> for _ in range(200):
    ...     optimizer.zero_grad()
    ...     rates(model, data, data).backward()
    ...     optimizer.step()
    >>> {name: round(rate.item(), 2) for name, rate in rates.rates.items()}  # one step of 1 minimises ½ (w − 2)²
    {'weight': 1.0}
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        initial: float = 0.1,
        steps: int = 20,
        loss: Loss | None = None,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(loss=loss, weight_decay=weight_decay)
        moving = {
            name: p for name, p in require_module("LearningRates", "model", model).named_parameters() if p.requires_grad
        }
        if not moving:
            raise bilevel.ArgumentError(
                "LearningRates: expected the model to have a parameter that requires grad, and it has none; unfreeze one"
            )
        whole("LearningRates", "steps", steps)
        number("LearningRates", "initial", initial)
        self.steps, self._names = steps, tuple(moving)
        self.logarithms = nn.ParameterList(p.detach().new_tensor(initial).log() for p in moving.values())

    @property
    def rates(self) -> dict[str, torch.Tensor]:
        """The rate of each tensor by name, of shape ()."""
        return {name: logarithm.exp() for name, logarithm in zip(self._names, self.logarithms, strict=True)}

    def trained(self, model: nn.Module, training: Any) -> dict[str, torch.Tensor]:
        """Return the parameters after K steps on ``training``, for ``torch.func.functional_call``; the model stays as it is."""
        moving = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if tuple(moving) != self._names:
            raise bilevel.ArgumentError(
                f"LearningRates: expected a model with the parameters {', '.join(self._names)}, got {', '.join(moving) or 'none'}; make "
                "LearningRates(model) of the model that is trained"
            )
        # Steps of rate 1 in y, φ = start + √rate · y, are steps of the rate in φ.
        roots = {name: (logarithm / 2).exp() for name, logarithm in zip(self._names, self.logarithms, strict=True)}

        def objective(y: Any, roots: Any, start: Any, inputs: Any, targets: Any) -> torch.Tensor:
            parameters = {name: start[name] + roots[name] * y[name] for name in y}
            outputs = functional_call(model, parameters, (inputs,))
            squares = torch.stack([(p**2).sum() for p in parameters.values()])
            return self.losses(outputs, targets).mean() + 0.5 * self.weight_decay * squares.sum()

        descent = bilevel.argmin(
            objective,
            solver=bilevel.GradientDescent(lr=1.0, max_steps=self.steps),
            tolerance=bilevel.Tolerance(delta=None),
            differentiation=bilevel.Unrolled(),
        )
        zeros = {name: torch.zeros_like(p) for name, p in moving.items()}
        y = descent(zeros, roots, moving, *require_pair(self.where, training))
        return {name: moving[name] + roots[name] * y[name] for name in moving}

    def forward(self, model: nn.Module, training: Any, validation: Any) -> torch.Tensor:
        """Return the validation loss () after K steps on ``training``; both are pairs (inputs, targets)."""
        inputs, targets = require_pair(self.where, validation)
        return self.losses(functional_call(model, self.trained(model, training), (inputs,)), targets).mean()
