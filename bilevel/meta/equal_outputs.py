"""A last layer whose outputs begin equal in every task: θ has the same row for each.

The classes of a task are numbered at random, so that no output can know beforehand which class it is for. Rows that differ are what
adaptation has to undo. With equal rows, all predictions are equal before adaptation, and its result does not depend on the numbering. Such a θ
also serves tasks with another number of classes.

The idea is that of Ye, Chao, "How to train your MAML to excel in few-shot classification", ICLR 2022, section 5. There one row is
learned and copied. Here the rows stay copies of each other, because the meta-gradient is projected, so that the learner needs no other
parameters.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

__all__ = ["equalize", "equalize_gradients", "fitted", "last_layer", "with_outputs"]


def last_layer(model: nn.Sequential) -> nn.Linear:
    """Return the layer of ``model`` that has an output for each class.

    Examples
    --------
    >>> last_layer(nn.Sequential(nn.ReLU(), nn.Linear(4, 3))).out_features
    3
    """
    layer = model[-1]
    assert isinstance(layer, nn.Linear)
    return layer


@torch.no_grad()
def equalize(layer: nn.Linear) -> None:
    """Give all outputs of ``layer`` the mean row and the mean bias.

    Examples
    --------
    >>> layer = nn.Linear(4, 3)
    >>> equalize(layer)
    >>> round(layer(torch.ones(1, 4)).std().item(), 6)  # of the three outputs
    0.0
    """
    for parameter in layer.parameters():
        parameter.copy_(parameter.mean(0).expand_as(parameter))


@torch.no_grad()
def equalize_gradients(layer: nn.Linear) -> None:
    """Replace the gradient of each output of ``layer`` by their mean: the projection onto equal outputs.

    Examples
    --------
    >>> layer = nn.Linear(1, 2)
    >>> layer(torch.ones(1, 1))[0, 0].backward()
    >>> equalize_gradients(layer)
    >>> layer.bias.grad.tolist()
    [0.5, 0.5]
    """
    for parameter in layer.parameters():
        if parameter.grad is not None:
            parameter.grad.copy_(parameter.grad.mean(0).expand_as(parameter))


@torch.no_grad()
def with_outputs(model: nn.Sequential, outputs: int) -> nn.Sequential:
    """Return a copy of ``model`` with another number of equal outputs: those of its last layer.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(4, 3))
    >>> equalize(model[-1])
    >>> with_outputs(model, 7)(torch.zeros(2, 4)).shape
    torch.Size([2, 7])
    """
    made = copy.deepcopy(model)
    layer = last_layer(made)
    layer.out_features = outputs
    for name, parameter in list(layer.named_parameters()):
        row = parameter[:1].expand(outputs, *parameter.shape[1:])
        setattr(layer, name, nn.Parameter(row.clone()))
    return made


def fitted(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return ``rows`` (outputs, ...), or where ``like`` has another number of outputs, the first row so many times.

    Examples
    --------
    >>> fitted(torch.tensor([5.0, 5.0]), torch.zeros(3)).tolist()
    [5.0, 5.0, 5.0]
    """
    return rows if rows.shape == like.shape else rows[:1].expand_as(like)
