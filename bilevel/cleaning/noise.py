"""Wrong labels on purpose, for demonstrations and tests."""

from __future__ import annotations

import enum

import torch

from bilevel.errors import ArgumentError

__all__ = ["Noise", "corrupt"]


class Noise(enum.Enum):
    """Which other label a corrupted example gets.

    Examples
    --------
    >>> import torch
    >>> from bilevel.cleaning import Noise, corrupt
    >>> labels, wrong = corrupt(torch.tensor([0, 1, 2, 2]), 0.5, noise=Noise.NEXT, classes=3)
    >>> (labels - torch.tensor([0, 1, 2, 2]))[wrong] % 3
    tensor([1, 1])
    """

    UNIFORM = "uniform"
    """Any other class, each as likely."""
    NEXT = "next"
    """The next class, and the first class for the last: one class is systematically taken for another."""


def corrupt(
    labels: torch.Tensor, share: float, *, seed: int = 0, classes: int | None = None, noise: Noise = Noise.UNIFORM
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give a ``share`` of the examples another label.

    Parameters
    ----------
    labels
        (n,), int64 class numbers from 0.
    share
        In [0, 1); ⌊share · n⌋ labels become wrong.
    seed
        Of the choice.
    classes
        How many classes there are; None: as many as the largest label says.
    noise
        Which other label.

    Returns
    -------
    tuple
        The labels (n,), and bool (n,): which of them are wrong.

    Raises
    ------
    DtypeError, ShapeError, ArgumentError
        If the labels or the share cannot be used.

    Examples
    --------
    >>> import torch
    >>> given, wrong = corrupt(torch.tensor([0, 1, 2, 0]), 0.5)
    >>> int(wrong.sum()), bool((given != torch.tensor([0, 1, 2, 0])).equal(wrong))
    (2, True)
    """
    if not 0.0 <= share < 1.0:
        raise ArgumentError(
            f"corrupt: expected share to be a number in [0, 1), got {share!r}; pass 0.2 to make 20 % wrong"
        )
    if not isinstance(noise, Noise):
        raise ArgumentError(
            f"corrupt: expected noise to be a bilevel.cleaning.Noise, got {noise!r}; pass Noise.UNIFORM or Noise.NEXT"
        )
    generator = torch.Generator().manual_seed(seed)
    count, classes = int(share * len(labels)), int(labels.max()) + 1 if classes is None else classes
    rows = torch.randperm(len(labels), generator=generator)[:count]
    wrong = torch.zeros(len(labels), dtype=torch.bool)
    wrong[rows] = True
    shift = torch.randint(1, max(classes, 2) if noise is Noise.UNIFORM else 2, (count,), generator=generator)
    given = labels.clone()
    given[rows] = (given[rows] + shift.to(given)) % classes
    return given, wrong.to(labels.device)
