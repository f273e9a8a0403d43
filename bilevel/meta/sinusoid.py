"""Sinusoid regression: the standard small problem of meta-learning."""

from __future__ import annotations

import math

import torch

import bilevel
from bilevel.meta.seeds import seeded
from bilevel.meta.tasks import Tasks

__all__ = ["SinusoidSampler"]


class SinusoidSampler:
    """Draw tasks y = a sin(x + p) with a uniform in [0.1, 5], p in [0, π] and x in [−5, 5].

    Parameters
    ----------
    shots, queries
        Points to adapt on, and to be judged on.
    seed
        Of the draws.
    device, dtype
        Of the tensors returned.

    References
    ----------
    Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", ICML 2017, section 5.1.

    Examples
    --------
    >>> SinusoidSampler(shots=10, queries=5).sample(3).support_x.shape
    torch.Size([3, 10, 1])
    """

    def __init__(
        self,
        *,
        shots: int = 10,
        queries: int = 10,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if shots < 1 or queries < 1:
            raise bilevel.ArgumentError(
                f"SinusoidSampler: expected shots and queries of at least 1, got {shots} and {queries}; write for example shots=10, queries=10"
            )
        self.shots, self.queries = shots, queries
        self.device, self.dtype = device, dtype
        self.generator = seeded("SinusoidSampler: ", seed)

    def sample(self, tasks: int, *, rank: int = 0, world: int = 1) -> Tasks:
        """Return every ``world``-th of ``tasks`` tasks from number ``rank``; tensors (T, points, 1)."""
        numbers = torch.rand(tasks, 2 + self.shots + self.queries, generator=self.generator, dtype=torch.float64)
        numbers = numbers[rank::world]
        amplitude, phase = 0.1 + 4.9 * numbers[:, :1], math.pi * numbers[:, 1:2]
        x = 10 * numbers[:, 2:] - 5
        y = amplitude * torch.sin(x + phase)
        x, y = (t.unsqueeze(-1).to(device=self.device, dtype=self.dtype) for t in (x, y))
        return Tasks(x[:, : self.shots], y[:, : self.shots], x[:, self.shots :], y[:, self.shots :])
