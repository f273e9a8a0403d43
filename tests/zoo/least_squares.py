"""Public test problems of nonlinear least squares, from their standard starts, with the least sums of squares that are known.

Moré, Garbow, Hillstrom, "Testing unconstrained optimization software", ACM TOMS 7, 1981 (data and starts); Osborne 1972; Meyer & Roth 1972.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

F64 = torch.float64


@dataclass(frozen=True)
class Zoo:
    """Residuals (m,) of x (n,), a start, and the sums of squares at the minima that a search may end at."""

    residual: Callable[[torch.Tensor], torch.Tensor]
    start: tuple[float, ...]
    minima: tuple[float, ...]
    singular: bool = False  # whether the Hessian is, at the solution

    def init(self, dtype: torch.dtype = F64) -> torch.Tensor:
        return torch.tensor(self.start, dtype=dtype)


def numbers(x: torch.Tensor, first: int, last: int) -> torch.Tensor:
    return torch.arange(first, last + 1, dtype=x.dtype)


def data(x: torch.Tensor, values: str) -> torch.Tensor:
    return torch.tensor([float(value) for value in values.split()], dtype=x.dtype)


BARD = ".14 .18 .22 .25 .29 .32 .35 .39 .37 .58 .73 .96 1.34 2.10 4.39"
GAUSS = ".0009 .0044 .0175 .0540 .1295 .2420 .3521 .3989 .3521 .2420 .1295 .0540 .0175 .0044 .0009"
MEYER = "34780 28610 23650 19630 16370 13720 11540 9744 8261 7030 6005 5147 4427 3820 3307 2872"
KOWALIK = ".1957 .1947 .1735 .1600 .0844 .0627 .0456 .0342 .0323 .0235 .0246"
KOWALIK_U = "4 2 1 .5 .25 .167 .125 .1 .0833 .0714 .0625"
OSBORNE_1 = (
    ".844 .908 .932 .936 .925 .908 .881 .850 .818 .784 .751 .718 .685 .658 .628 .603 .580 .558 .538 .522 .506 .490 .478 .467 .457 .448 .438 "
    ".431 .424 .420 .414 .411 .406"
)
OSBORNE_2 = (
    "1.366 1.191 1.112 1.013 .991 .885 .831 .847 .786 .725 .746 .679 .608 .655 .616 .606 .602 .626 .651 .724 .649 .649 .694 .644 .624 .661 "
    ".612 .558 .533 .495 .500 .423 .395 .375 .372 .391 .396 .405 .428 .429 .523 .562 .607 .653 .672 .708 .633 .668 .645 .632 .591 .559 .597 "
    ".625 .739 .710 .729 .720 .636 .581 .428 .292 .162 .098 .054"
)


def rosenbrock(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])


def freudenstein_roth(x: torch.Tensor) -> torch.Tensor:
    a, b = x
    return torch.stack([-13 + a + ((5 - b) * b - 2) * b, -29 + a + ((b + 1) * b - 14) * b])


def powell_badly_scaled(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([1e4 * x[0] * x[1] - 1, torch.exp(-x[0]) + torch.exp(-x[1]) - 1.0001])


def brown_badly_scaled(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x[0] - 1e6, x[1] - 2e-6, x[0] * x[1] - 2])


def beale(x: torch.Tensor) -> torch.Tensor:
    return data(x, "1.5 2.25 2.625") - x[0] * (1 - x[1] ** numbers(x, 1, 3))


def jennrich_sampson(x: torch.Tensor) -> torch.Tensor:
    i = numbers(x, 1, 10)
    return 2 + 2 * i - (torch.exp(i * x[0]) + torch.exp(i * x[1]))


def helical_valley(x: torch.Tensor) -> torch.Tensor:
    angle = torch.atan2(x[1], x[0]) / (2 * torch.pi)
    return torch.stack([10 * (x[2] - 10 * angle), 10 * ((x[0] ** 2 + x[1] ** 2).sqrt() - 1), x[2]])


def bard(x: torch.Tensor) -> torch.Tensor:
    u = numbers(x, 1, 15)
    v = 16 - u
    return data(x, BARD) - (x[0] + u / (v * x[1] + torch.minimum(u, v) * x[2]))


def gaussian(x: torch.Tensor) -> torch.Tensor:
    t = (8 - numbers(x, 1, 15)) / 2
    return x[0] * torch.exp(-x[1] * (t - x[2]) ** 2 / 2) - data(x, GAUSS)


def meyer(x: torch.Tensor) -> torch.Tensor:
    return x[0] * torch.exp(x[1] / (45 + 5 * numbers(x, 1, 16) + x[2])) - data(x, MEYER)


def box(x: torch.Tensor) -> torch.Tensor:
    t = 0.1 * numbers(x, 1, 10)
    return torch.exp(-t * x[0]) - torch.exp(-t * x[1]) - x[2] * (torch.exp(-t) - torch.exp(-10 * t))


def powell_singular(x: torch.Tensor) -> torch.Tensor:
    a, b, c, d = x
    return torch.stack([a + 10 * b, 5**0.5 * (c - d), (b - 2 * c) ** 2, 10**0.5 * (a - d) ** 2])


def wood(x: torch.Tensor) -> torch.Tensor:
    a, b, c, d = x
    return torch.stack([10 * (b - a**2), 1 - a, 90**0.5 * (d - c**2), 1 - c, 10**0.5 * (b + d - 2), 10**-0.5 * (b - d)])


def kowalik_osborne(x: torch.Tensor) -> torch.Tensor:
    u = data(x, KOWALIK_U)
    return data(x, KOWALIK) - x[0] * (u**2 + u * x[1]) / (u**2 + u * x[2] + x[3])


def brown_dennis(x: torch.Tensor) -> torch.Tensor:
    t = numbers(x, 1, 20) / 5
    return (x[0] + t * x[1] - torch.exp(t)) ** 2 + (x[2] + x[3] * torch.sin(t) - torch.cos(t)) ** 2


def osborne_1(x: torch.Tensor) -> torch.Tensor:
    t = 10 * numbers(x, 0, 32)
    return data(x, OSBORNE_1) - (x[0] + x[1] * torch.exp(-t * x[3]) + x[2] * torch.exp(-t * x[4]))


def biggs(x: torch.Tensor) -> torch.Tensor:
    t = 0.1 * numbers(x, 1, 13)
    y = torch.exp(-t) - 5 * torch.exp(-10 * t) + 3 * torch.exp(-4 * t)
    return x[2] * torch.exp(-t * x[0]) - x[3] * torch.exp(-t * x[1]) + x[5] * torch.exp(-t * x[4]) - y


def osborne_2(x: torch.Tensor) -> torch.Tensor:
    t = numbers(x, 0, 64) / 10
    peaks = sum(x[k] * torch.exp(-((t - x[k + 7]) ** 2) * x[k + 4]) for k in (1, 2, 3))
    return data(x, OSBORNE_2) - (x[0] * torch.exp(-t * x[4]) + peaks)


def watson(x: torch.Tensor) -> torch.Tensor:
    t, j = (numbers(x, 1, 29) / 29).unsqueeze(-1), numbers(x, 0, len(x) - 1)
    slope = (j[1:] * x[1:] * t ** (j[1:] - 1)).sum(-1)
    return torch.cat([slope - (x * t**j).sum(-1) ** 2 - 1, x[:1], (x[1] - x[0] ** 2 - 1).reshape(1)])


def trigonometric(x: torch.Tensor) -> torch.Tensor:
    n = len(x)
    return n - torch.cos(x).sum() + numbers(x, 1, n) * (1 - torch.cos(x)) - torch.sin(x)


def brown_almost_linear(x: torch.Tensor) -> torch.Tensor:
    n = len(x)
    return torch.cat([x[:-1] + x.sum() - (n + 1), (x.prod() - 1).reshape(1)])


def broyden_tridiagonal(x: torch.Tensor) -> torch.Tensor:
    around = torch.nn.functional.pad(x, (1, 1))
    return (3 - 2 * x) * x - around[:-2] - 2 * around[2:] + 1


def penalty(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([1e-5**0.5 * (x - 1), ((x**2).sum() - 0.25).reshape(1)])


def linear_full_rank(x: torch.Tensor) -> torch.Tensor:
    m, n = 20, len(x)
    shared = 2 / m * x.sum() + 1
    return torch.cat([x, x.new_zeros(m - n)]) - shared


ZOO: dict[str, Zoo] = {
    "Rosenbrock": Zoo(rosenbrock, (-1.2, 1.0), (0.0,)),
    "Freudenstein and Roth": Zoo(freudenstein_roth, (0.5, -2.0), (0.0, 48.98425)),
    "Powell badly scaled": Zoo(powell_badly_scaled, (0.0, 1.0), (0.0,)),
    "Brown badly scaled": Zoo(brown_badly_scaled, (1.0, 1.0), (0.0,)),
    "Beale": Zoo(beale, (1.0, 1.0), (0.0,)),
    "Jennrich and Sampson": Zoo(jennrich_sampson, (0.3, 0.4), (124.3622,)),
    "helical valley": Zoo(helical_valley, (-1.0, 0.0, 0.0), (0.0,)),
    "Bard": Zoo(bard, (1.0, 1.0, 1.0), (8.214877e-3,)),
    "Gaussian": Zoo(gaussian, (0.4, 1.0, 0.0), (1.127933e-8,)),
    "Meyer": Zoo(meyer, (0.02, 4000.0, 250.0), (87.94586,)),
    "Box": Zoo(box, (0.0, 10.0, 20.0), (0.0,)),
    "Powell singular": Zoo(powell_singular, (3.0, -1.0, 0.0, 1.0), (0.0,), singular=True),
    "Wood": Zoo(wood, (-3.0, -1.0, -3.0, -1.0), (0.0,)),
    "Kowalik and Osborne": Zoo(kowalik_osborne, (0.25, 0.39, 0.415, 0.39), (3.075056e-4,)),
    "Brown and Dennis": Zoo(brown_dennis, (25.0, 5.0, -5.0, -1.0), (85822.2,)),
    "Osborne 1": Zoo(osborne_1, (0.5, 1.5, -1.0, 0.01, 0.02), (5.464895e-5,)),
    "Biggs": Zoo(biggs, (1.0, 2.0, 1.0, 1.0, 1.0, 1.0), (0.0, 5.655650e-3)),
    "Osborne 2": Zoo(osborne_2, (1.3, 0.65, 0.65, 0.7, 0.6, 3.0, 5.0, 7.0, 2.0, 4.5, 5.5), (4.013774e-2,)),
    "Watson 6": Zoo(watson, (0.0,) * 6, (2.287670e-3,)),
    "Watson 9": Zoo(watson, (0.0,) * 9, (1.399760e-6,)),
    "trigonometric": Zoo(trigonometric, (0.1,) * 10, (0.0, 2.795056e-5)),
    "Brown almost linear": Zoo(brown_almost_linear, (0.5,) * 10, (0.0, 1.0)),
    "Broyden tridiagonal": Zoo(broyden_tridiagonal, (-1.0,) * 10, (0.0,)),
    "penalty I": Zoo(penalty, (1.0, 2.0, 3.0, 4.0), (2.249978e-5,)),
    "linear, full rank": Zoo(linear_full_rank, (1.0,) * 10, (10.0,)),
}
