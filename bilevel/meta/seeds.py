"""Seeds that torch's generators can take."""

from __future__ import annotations

import torch

import bilevel

__all__ = ["check_seed", "seeded"]

_MOST = 2**62  # torch takes 64 bits, and runs count on from a seed


def check_seed(where: str, seed: int) -> None:
    """Raise :class:`bilevel.ArgumentError` unless ``seed`` is a whole number that a generator can be seeded with."""
    if isinstance(seed, bool) or not isinstance(seed, int) or abs(seed) > _MOST:
        raise bilevel.ArgumentError(
            f"{where}expected seed to be a whole number from -2^62 to 2^62, got {seed!r}; pass for example 0"
        )


def seeded(where: str, seed: int) -> torch.Generator:
    """Return a generator that begins at ``seed``.

    Raises
    ------
    bilevel.ArgumentError
        If ``seed`` is no whole number, or too long for one.

    Examples
    --------
    >>> seeded("Sampler: ", 3).initial_seed()
    3
    """
    check_seed(where, seed)
    return torch.Generator().manual_seed(seed)
