"""The networks of the few-shot literature."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

__all__ = ["conv_network", "mlp"]


def conv_network(ways: int, *, filters: int = 64, channels: int = 1, size: int = 28) -> nn.Sequential:
    """Return four blocks of 3 × 3 convolution with stride 2, batch norm by batch statistics and ReLU, and a linear head.

    Parameters
    ----------
    ways
        Number of outputs.
    filters
        Of each convolution.
    channels, size
        Of the square images that come in: (batch, channels, size, size).

    Returns
    -------
    torch.nn.Sequential
        Maps images (batch, channels, size, size) to scores (batch, ways).

    References
    ----------
    The network for Omniglot of Finn, Abbeel, Levine, ICML 2017, section A.1, which the iMAML paper takes over.

    Examples
    --------
    >>> import torch
    >>> conv_network(5)(torch.zeros(3, 1, 28, 28)).shape
    torch.Size([3, 5])
    """
    layers: list[nn.Module] = []
    for before in (channels, filters, filters, filters):
        layers += [
            nn.Conv2d(before, filters, 3, stride=2, padding=1),
            nn.BatchNorm2d(filters, track_running_stats=False),
            nn.ReLU(),
        ]
        size = (size + 1) // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(filters * size * size, ways))


def mlp(inputs: int = 1, outputs: int = 1, hidden: Sequence[int] = (40, 40)) -> nn.Sequential:
    """Return a network of linear layers with ReLU between them; the default is the network of sinusoid regression.

    Parameters
    ----------
    inputs, outputs
        The sizes of an input and of an output.
    hidden
        The sizes of the hidden layers.

    Returns
    -------
    torch.nn.Sequential
        Maps (batch, inputs) to (batch, outputs).

    Examples
    --------
    >>> sum(p.numel() for p in mlp().parameters())
    1761
    """
    widths = [inputs, *hidden, outputs]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
