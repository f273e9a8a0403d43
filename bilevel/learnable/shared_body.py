"""A representation that many tasks share, each with a head of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import bilevel
from bilevel.learnable._base import Learnable, Loss, number, require_module, require_pair, whole

__all__ = ["SharedBody", "TaskHeads"]


class TaskHeads(nn.Module):
    """A linear layer for each of T tasks: the inner variables of :class:`SharedBody`.

    Parameters
    ----------
    tasks, features, outputs
        T, d and c. The weights are zero at first.
    dtype, device
        Of the parameters, weight (T, d, c) and bias (T, 1, c).

    Examples
    --------
    >>> import torch
    >>> from bilevel.learnable import TaskHeads
    >>> TaskHeads(3, 8, 5)(torch.zeros(3, 10, 8)).shape
    torch.Size([3, 10, 5])
    """

    def __init__(
        self,
        tasks: int,
        features: int,
        outputs: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for name, count in (("tasks", tasks), ("features", features), ("outputs", outputs)):
            whole("TaskHeads", name, count)
        self.weight = nn.Parameter(torch.zeros(tasks, features, outputs, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(tasks, 1, outputs, dtype=dtype, device=device))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return the outputs (T, n, c) of features (T, n, d)."""
        if features.ndim != 3 or len(features) != len(self.weight) or features.shape[2] != self.weight.shape[1]:
            raise bilevel.ShapeError(
                f"TaskHeads: expected features {(len(self.weight), 'n', self.weight.shape[1])}, got {tuple(features.shape)}; make "
                "TaskHeads(tasks, features, outputs) of the body's features, and pass data with an axis for as many tasks"
            )
        return torch.baddbmm(self.bias, features, self.weight)


class SharedBody(Learnable):
    """Learn a representation h_θ: G = mean_t [mean_i ℓ(W_tᵀ h_θ(x_ti), y_ti) + ½ λ‖W_t‖²], and F is the loss of other examples of the same tasks.

    The parameters of the body are the outer variables, those of :class:`TaskHeads` the inner ones. Data are inputs (T, n, ...) and targets
    (T, n, ...), with an axis for the tasks. :meth:`fit` makes heads for tasks that were not seen.

    Parameters
    ----------
    body
        A module that maps inputs (m, ...) to features (m, d).
    loss
        (outputs (T·n, c), targets (T·n, ...)) ↦ one loss for each example. None: cross-entropy.
    weight_decay
        λ > 0 of the heads.

    Raises
    ------
    ArgumentError
        If a setting cannot be used.

    References
    ----------
    Franceschi, Frasconi, Salzo, Grazzi, Pontil, "Bilevel programming for hyperparameter optimization and meta-learning", ICML 2018,
    Section 4 (hyper-representation).

    Examples
    --------
    >>> import torch
    >>> from bilevel.learnable import SharedBody
    >>> body = SharedBody(torch.nn.Linear(4, 3))
    >>> heads = body.fit(torch.randn(2, 10, 4), torch.arange(10).expand(2, 10) % 5, outputs=5)
    >>> heads(body(torch.zeros(2, 7, 4))).shape  # two new tasks with seven examples each
    torch.Size([2, 7, 5])
    """

    def __init__(self, body: nn.Module, *, loss: Loss | None = None, weight_decay: float = 1e-2) -> None:
        super().__init__(loss=loss, weight_decay=number("SharedBody", "weight_decay", weight_decay))
        self.body = require_module("SharedBody", "body", body)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the features (T, n, d) of inputs (T, n, ...)."""
        if inputs.ndim < 3:
            raise bilevel.ShapeError(
                f"SharedBody: expected inputs (tasks, n, ...), got {tuple(inputs.shape)}; stack the inputs of the tasks, or pass inputs[None] "
                "of a single one"
            )
        features: torch.Tensor = self.body(inputs.flatten(0, 1))
        if features.ndim != 2:
            raise bilevel.ShapeError(
                f"SharedBody: expected the body to return features (m, d), got {tuple(features.shape)}; let it end in torch.nn.Flatten()"
            )
        return features.unflatten(0, inputs.shape[:2])

    def outputs(self, model: nn.Module, data: Any) -> torch.Tensor:
        """Return the outputs (T, n, c) of the heads."""
        outputs: torch.Tensor = model(self(require_pair(self.where, data)[0]))
        return outputs

    def training_loss(self, outputs: torch.Tensor, data: Any) -> torch.Tensor:
        """Return the mean loss over tasks and examples."""
        targets = require_pair(self.where, data)[1]
        if targets.shape[:2] != outputs.shape[:2]:
            raise bilevel.ShapeError(
                f"SharedBody: expected targets (tasks, n, ...) = {(*outputs.shape[:2], '...')}, got {tuple(targets.shape)}; stack those of the "
                "tasks as the inputs are"
            )
        return self.losses(outputs.flatten(0, 1), targets.flatten(0, 1)).mean()

    def penalty(self, model: nn.Module) -> torch.Tensor:
        """Return the mean over the tasks of ½ λ‖W_t‖²."""
        first = next(model.parameters())
        return super().penalty(model) / len(first)

    def validation_loss(self, model: nn.Module, data: Any) -> torch.Tensor:
        """Return the mean loss of held-out examples of all tasks."""
        return self.training_loss(self.outputs(model, data), data)

    def fit(self, inputs: torch.Tensor, targets: torch.Tensor, *, outputs: int) -> TaskHeads:
        """Return the best heads on this body for new tasks.

        Parameters
        ----------
        inputs, targets
            (T, n, ...): the examples that each task has.
        outputs
            c, such as the number of classes.
        """
        with torch.no_grad():
            features = self(inputs)
        heads = TaskHeads(len(features), features.shape[-1], outputs, dtype=features.dtype, device=features.device)
        start = {name: p.detach() for name, p in heads.named_parameters()}
        solve = bilevel.argmin(self._loss_of_heads, solver=bilevel.Newton(), tolerance=bilevel.Tolerance(delta=1e-3))
        found = torch.vmap(solve)(start, features, targets)
        heads.load_state_dict(found)
        return heads

    def _loss_of_heads(
        self, head: dict[str, torch.Tensor], features: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        squares = sum((p**2).sum() for p in head.values())
        return self.losses(features @ head["weight"] + head["bias"], targets).mean() + 0.5 * self.weight_decay * squares
