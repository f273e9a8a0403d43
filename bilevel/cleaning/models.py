"""Three small classifiers; ``clean`` takes any function that makes a module."""

from __future__ import annotations

from torch import nn

from bilevel.setting_checks import check_steps

__all__ = ["convolutional", "linear", "mlp"]


def linear(features: int, classes: int) -> nn.Module:
    """Return a linear classifier of inputs (n, features)."""
    return nn.Linear(features, classes)


def mlp(features: int, classes: int, *, width: int = 64) -> nn.Module:
    """Return a network with one hidden layer of inputs (n, features)."""
    check_steps("mlp", "width", width)
    return nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Linear(width, classes))


def convolutional(channels: int, size: int, classes: int, *, width: int = 16) -> nn.Module:
    """Return two convolutions and a linear layer, of square images (n, channels, size, size)."""
    check_steps("convolutional", "width", width)
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * (size // 2) ** 2, classes),
    )
