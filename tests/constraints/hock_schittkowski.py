"""The first thirty problems of Hock & Schittkowski, "Test Examples for Nonlinear Programming Codes", 1981, with their own starts and minima."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["PROBLEMS", "HockSchittkowski"]

INF = math.inf


@dataclass(frozen=True)
class HockSchittkowski:
    """min f subject to h = 0, g ≥ 0 and bounds, from ``start``; ``minimum`` is f there, and ``solution`` x where it is unique."""

    f: Callable[[torch.Tensor], torch.Tensor]
    start: tuple[float, ...]
    minimum: float
    solution: tuple[float, ...] | None = None
    h: Callable[[torch.Tensor], list[torch.Tensor]] | None = None
    g: Callable[[torch.Tensor], list[torch.Tensor]] | None = None
    lower: tuple[float, ...] | None = None
    upper: tuple[float, ...] | None = None


def rosenbrock(x: torch.Tensor) -> torch.Tensor:
    return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2


def _hs25(x: torch.Tensor) -> torch.Tensor:
    i = torch.arange(1, 100, dtype=x.dtype)
    u = 25 + (-50 * (0.01 * i).log()) ** (2 / 3)
    return ((-0.01 * i + torch.exp(-((u - x[1]) ** x[2]) / x[0])) ** 2).sum()


SQRT3, SQRT7 = math.sqrt(3), math.sqrt(7)
P = HockSchittkowski
PROBLEMS: dict[int, HockSchittkowski] = {
    1: P(rosenbrock, (-2, 1), 0.0, (1, 1), lower=(-INF, -1.5)),
    2: P(rosenbrock, (-2, 1), 0.0504261879, (1.2243707487, 1.5), lower=(-INF, 1.5)),
    3: P(lambda x: x[1] + 1e-5 * (x[1] - x[0]) ** 2, (10, 1), 0.0, (0, 0), lower=(-INF, 0)),
    4: P(lambda x: (x[0] + 1) ** 3 / 3 + x[1], (1.125, 0.125), 8 / 3, (1, 0), lower=(1, 0)),
    5: P(
        lambda x: torch.sin(x[0] + x[1]) + (x[0] - x[1]) ** 2 - 1.5 * x[0] + 2.5 * x[1] + 1,
        (0, 0), -SQRT3 / 2 - math.pi / 3, (-math.pi / 3 + 0.5, -math.pi / 3 - 0.5), lower=(-1.5, -3), upper=(4, 3),
    ),
    6: P(lambda x: (1 - x[0]) ** 2, (-1.2, 1), 0.0, (1, 1), h=lambda x: [10 * (x[1] - x[0] ** 2)]),
    7: P(
        lambda x: torch.log(1 + x[0] ** 2) - x[1], (2, 2), -SQRT3, (0, SQRT3),
        h=lambda x: [(1 + x[0] ** 2) ** 2 + x[1] ** 2 - 4],
    ),
    8: P(lambda x: 0 * x.sum() - 1, (2, 1), -1.0, h=lambda x: [x[0] ** 2 + x[1] ** 2 - 25, x[0] * x[1] - 9]),
    9: P(
        lambda x: torch.sin(math.pi * x[0] / 12) * torch.cos(math.pi * x[1] / 16), (0, 0), -0.5,
        h=lambda x: [4 * x[0] - 3 * x[1]],
    ),
    10: P(
        lambda x: x[0] - x[1], (-10, 10), -1.0, (0, 1),
        g=lambda x: [-3 * x[0] ** 2 + 2 * x[0] * x[1] - x[1] ** 2 + 1],
    ),
    11: P(
        lambda x: (x[0] - 5) ** 2 + x[1] ** 2 - 25, (4.9, 0.1), -8.498464223, g=lambda x: [-(x[0] ** 2) + x[1]],
    ),
    12: P(
        lambda x: 0.5 * x[0] ** 2 + x[1] ** 2 - x[0] * x[1] - 7 * x[0] - 7 * x[1], (0, 0), -30.0, (2, 3),
        g=lambda x: [25 - 4 * x[0] ** 2 - x[1] ** 2],
    ),
    13: P(lambda x: (x[0] - 2) ** 2 + x[1] ** 2, (-2, -2), 1.0, (1, 0), g=lambda x: [(1 - x[0]) ** 3 - x[1]], lower=(0, 0)),
    14: P(
        lambda x: (x[0] - 2) ** 2 + (x[1] - 1) ** 2, (2, 2), 9 - 2.875 * SQRT7, ((SQRT7 - 1) / 2, (SQRT7 + 1) / 4),
        h=lambda x: [x[0] - 2 * x[1] + 1], g=lambda x: [-0.25 * x[0] ** 2 - x[1] ** 2 + 1],
    ),
    15: P(
        rosenbrock, (-2, 1), 306.5, (0.5, 2), g=lambda x: [x[0] * x[1] - 1, x[0] + x[1] ** 2], upper=(0.5, INF),
    ),
    16: P(
        rosenbrock, (-2, 1), 0.25, (0.5, 0.25), g=lambda x: [x[0] + x[1] ** 2, x[0] ** 2 + x[1]],
        lower=(-0.5, -INF), upper=(0.5, 1),
    ),
    17: P(
        rosenbrock, (-2, 1), 1.0, (0, 0), g=lambda x: [x[1] ** 2 - x[0], x[0] ** 2 - x[1]],
        lower=(-0.5, -INF), upper=(0.5, 1),
    ),
    18: P(
        lambda x: 0.01 * x[0] ** 2 + x[1] ** 2, (2, 2), 5.0, (math.sqrt(250), math.sqrt(2.5)),
        g=lambda x: [x[0] * x[1] - 25, x[0] ** 2 + x[1] ** 2 - 25], lower=(2, 0), upper=(50, 50),
    ),
    19: P(
        lambda x: (x[0] - 10) ** 3 + (x[1] - 20) ** 3, (20.1, 5.84), -6961.81381, (14.095, 0.84296079),
        g=lambda x: [(x[0] - 5) ** 2 + (x[1] - 5) ** 2 - 100, -((x[1] - 5) ** 2) - (x[0] - 6) ** 2 + 82.81],
        lower=(13, 0), upper=(100, 100),
    ),
    20: P(
        rosenbrock, (-2, 1), 81.5 - 25 * SQRT3, (0.5, SQRT3 / 2),
        g=lambda x: [x[0] + x[1] ** 2, x[0] ** 2 + x[1], x[0] ** 2 + x[1] ** 2 - 1], lower=(-0.5, -INF), upper=(0.5, INF),
    ),
    21: P(
        lambda x: 0.01 * x[0] ** 2 + x[1] ** 2 - 100, (-1, -1), -99.96, (2, 0), g=lambda x: [10 * x[0] - x[1] - 10],
        lower=(2, -50), upper=(50, 50),
    ),
    22: P(
        lambda x: (x[0] - 2) ** 2 + (x[1] - 1) ** 2, (2, 2), 1.0, (1, 1), g=lambda x: [-x[0] - x[1] + 2, -(x[0] ** 2) + x[1]],
    ),
    23: P(
        lambda x: x[0] ** 2 + x[1] ** 2, (3, 1), 2.0, (1, 1),
        g=lambda x: [
            x[0] + x[1] - 1, x[0] ** 2 + x[1] ** 2 - 1, 9 * x[0] ** 2 + x[1] ** 2 - 9, x[0] ** 2 - x[1], x[1] ** 2 - x[0],
        ],
        lower=(-50, -50), upper=(50, 50),
    ),
    24: P(
        lambda x: ((x[0] - 3) ** 2 - 9) * x[1] ** 3 / (27 * SQRT3), (1, 0.5), -1.0, (3, SQRT3),
        g=lambda x: [x[0] / SQRT3 - x[1], x[0] + SQRT3 * x[1], -x[0] - SQRT3 * x[1] + 6], lower=(0, 0),
    ),
    25: P(_hs25, (100, 12.5, 3), 0.0, (50, 25, 1.5), lower=(0.1, 0, 0), upper=(100, 25.6, 5)),
    26: P(
        lambda x: (x[0] - x[1]) ** 2 + (x[1] - x[2]) ** 4, (-2.6, 2, 2), 0.0,
        h=lambda x: [(1 + x[1] ** 2) * x[0] + x[2] ** 4 - 3],
    ),
    27: P(
        lambda x: 0.01 * (x[0] - 1) ** 2 + (x[1] - x[0] ** 2) ** 2, (2, 2, 2), 0.04, (-1, 1, 0),
        h=lambda x: [x[0] + x[2] ** 2 + 1],
    ),
    28: P(
        lambda x: (x[0] + x[1]) ** 2 + (x[1] + x[2]) ** 2, (-4, 1, 1), 0.0, (0.5, -0.5, 0.5),
        h=lambda x: [x[0] + 2 * x[1] + 3 * x[2] - 1],
    ),
    29: P(lambda x: -x[0] * x[1] * x[2], (1, 1, 1), -16 * math.sqrt(2), g=lambda x: [-(x[0] ** 2) - 2 * x[1] ** 2 - 4 * x[2] ** 2 + 48]),
    30: P(
        lambda x: (x**2).sum(), (1, 1, 1), 1.0, (1, 0, 0), g=lambda x: [x[0] ** 2 + x[1] ** 2 - 1],
        lower=(1, -10, -10), upper=(10, 10, 10),
    ),
}  # fmt: skip
