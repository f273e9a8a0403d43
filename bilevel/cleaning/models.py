"""Three small classifiers; ``clean`` takes any function that makes a module."""

from __future__ import annotations

from torch import nn

from bilevel.setting_checks import check_steps

__all__ = ["convolutional", "linear", "mlp"]


def linear(features: int, classes: int) -> nn.Module:
    """Return a linear classifier of inputs (n, features).

    Parameters
    ----------
    features
        The number of features of an input.
    classes
        The number of classes.

    Returns
    -------
    torch.nn.Module
        Maps inputs (n, features) to scores (n, classes).

    Examples
    --------
    >>> import torch
    >>> linear(4, 3)(torch.zeros(2, 4)).shape
    torch.Size([2, 3])
    """
    return nn.Linear(features, classes)


def mlp(features: int, classes: int, *, width: int = 64) -> nn.Module:
    """Return a classifier with one hidden layer and ReLU.

    Parameters
    ----------
    features
        The number of features of an input.
    classes
        The number of classes.
    width
        The number of hidden units.

    Returns
    -------
    torch.nn.Module
        Maps inputs (n, features) to scores (n, classes).

    Raises
    ------
    ArgumentError
        If ``width`` is not a positive int.

    Examples
    --------
    >>> import torch
    >>> mlp(4, 3, width=8)(torch.zeros(2, 4)).shape
    torch.Size([2, 3])
    """
    check_steps("mlp", "width", width)
    return nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Linear(width, classes))


def convolutional(channels: int, size: int, classes: int, *, width: int = 16) -> nn.Module:
    """Return a classifier of square images: two convolutions and a linear layer.

    Parameters
    ----------
    channels
        The number of channels of an image.
    size
        The height and the width of an image.
    classes
        The number of classes.
    width
        The number of filters of the first convolution; the second has twice as many.

    Returns
    -------
    torch.nn.Module
        Maps images (n, channels, size, size) to scores (n, classes).

    Raises
    ------
    ArgumentError
        If ``width`` is not a positive int.

    Examples
    --------
    >>> import torch
    >>> convolutional(1, 8, 3)(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 3])
    """
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
