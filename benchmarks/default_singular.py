"""Random problems without a regular solution for ``defaults.py``: each has to be named, and none may be a plain success.

There is no solution, or a continuum of them, or one with a singular Jacobian, or the search begins where the gradient is zero
by symmetry or by convention only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from default_problems import Drawn, Family, Source, Tensor, bowl, times
from torch.nn import functional as F


def squares(z: Tensor, theta: Tensor, a: Tensor) -> Tensor:
    r = times(a, z) - theta
    return 0.5 * (r * r).sum(-1)


def free_unknown(z: Tensor, theta: Tensor) -> Tensor:
    return ((z[..., 0] - theta[..., 0]) ** 2) + 0.0 * (theta * z).sum(-1)


def flat_minimum(z: Tensor, theta: Tensor) -> Tensor:
    return ((z - theta) ** 4).sum(-1)


def constant(z: Tensor, theta: Tensor) -> Tensor:
    return theta.sum(-1) + 0.0 * z.sum(-1)


def decaying(z: Tensor, theta: Tensor) -> Tensor:
    return torch.exp(-theta * z).sum(-1)


def separable(z: Tensor, theta: Tensor, x: Tensor) -> Tensor:
    return F.softplus(-times(x, z) * theta).sum(-1)


def concave(z: Tensor, theta: Tensor, q: Tensor) -> Tensor:
    return (theta * z).sum(-1) - bowl(q, z)


def slanted(z: Tensor, theta: Tensor) -> Tensor:
    return (theta * z).sum(-1)


def wells(z: Tensor, theta: Tensor) -> Tensor:
    return ((z * z - theta) ** 2).sum(-1)


def kinked(z: Tensor, theta: Tensor) -> Tensor:
    return ((z.abs() - theta) ** 2 + 0.1 * z * z).sum(-1)


def above_zero(z: Tensor, theta: Tensor) -> Tensor:
    return z * z + theta


def towards_zero(z: Tensor, theta: Tensor) -> Tensor:
    return theta * torch.exp(-z)


def double_root(z: Tensor, theta: Tensor) -> Tensor:
    return (z - theta) ** 2


def affine(z: Tensor, theta: Tensor, a: Tensor) -> Tensor:
    return times(a, z) - theta


def drift(z: Tensor, theta: Tensor) -> Tensor:
    return z + theta


def slow_drift(z: Tensor, theta: Tensor) -> Tensor:
    return z + theta / (1 + z * z)


def identity(z: Tensor, theta: Tensor) -> Tensor:
    return z + 0.0 * theta


def descent(z: Tensor, theta: Tensor, q: Tensor) -> Tensor:
    return z - times(q, z) + theta


def hyperbola(z: Tensor, theta: Tensor) -> Tensor:
    return torch.sqrt(z * z + theta)


def none(k: int, n: int) -> Tensor:
    return torch.full((k, n), float("nan"), dtype=torch.float64)


def positive(s: Source, k: int, n: int, c: float) -> Drawn:
    return s.uniform(0.5, 2, k, n), (), none(k, n)


def at_theta(s: Source, k: int, n: int, c: float) -> Drawn:
    z = s.solution(k, n)
    return z, (), z


def deficient(s: Source, k: int, n: int, symmetric: bool) -> Tensor:
    """Matrices (K, n, n) of rank n − 1 or less."""
    q = torch.linalg.qr(s.normal(k, n, n)).Q
    values = s.spectrum(k, n, 1.0)
    values[:, : s.integer(1, n - 1)] = 0
    other = q if symmetric else torch.linalg.qr(s.normal(k, n, n)).Q
    return (q * values.unsqueeze(-2)) @ other.mT


def consistent(symmetric: bool) -> Callable[[Source, int, int, float], Drawn]:
    def draw(s: Source, k: int, n: int, c: float) -> Drawn:
        a = deficient(s, k, n, symmetric)
        return times(a, s.solution(k, n)), (a,), none(k, n)

    return draw


def inconsistent(s: Source, k: int, n: int, c: float) -> Drawn:
    return s.solution(k, n), (deficient(s, k, n, False),), none(k, n)


def draw_separable(s: Source, k: int, n: int, c: float) -> Drawn:
    x, direction = s.normal(k, 2 * n + 4, n), s.solution(k, n)
    x = x * torch.sign(times(x, direction)).unsqueeze(-1)
    return torch.ones(k, 2 * n + 4, dtype=torch.float64), (x,), none(k, n)


def draw_concave(s: Source, k: int, n: int, c: float) -> Drawn:
    return s.solution(k, n), (s.definite(k, n, 1.0),), none(k, n)


def draw_wells(s: Source, k: int, n: int, c: float) -> Drawn:
    theta = s.uniform(0.5, 2, k, n)
    return theta, (), theta.sqrt()


def draw_kinked(s: Source, k: int, n: int, c: float) -> Drawn:
    theta = s.uniform(0.5, 2, k, n)
    return theta, (), theta / 1.1


# From their symmetric point the last two have right answers beside it, each as good as the other.
SINGULAR = (
    Family("rank-deficient squares", "argmin", squares, inconsistent, sizes=(2, 10)),
    Family("free unknown", "argmin", free_unknown, positive, sizes=(2, 6)),
    Family("flat minimum", "argmin", flat_minimum, at_theta, sizes=(1, 6)),
    Family("constant", "argmin", constant, positive, sizes=(1, 6)),
    Family("decaying", "argmin", decaying, positive, sizes=(1, 6)),
    Family("separable logistic", "argmin", separable, draw_separable, sizes=(1, 6)),
    Family("concave", "argmin", concave, draw_concave, sizes=(1, 6)),
    Family("slanted", "argmin", slanted, positive, sizes=(1, 6)),
    Family("maximum at the start", "argmin", wells, draw_wells, sizes=(1, 6), several=True, farthest=0.0),
    Family("kink at the start", "argmin", kinked, draw_kinked, sizes=(1, 6), several=True, farthest=0.0),
    Family("no root", "root", above_zero, positive, sizes=(1, 6)),
    Family("root at infinity", "root", towards_zero, positive, sizes=(1, 6)),
    Family("double root", "root", double_root, at_theta, sizes=(1, 6)),
    Family("rank-deficient root", "root", affine, consistent(False), sizes=(2, 10)),
    Family("inconsistent root", "root", affine, inconsistent, sizes=(2, 10)),
    Family("drift", "fixed_point", drift, positive, sizes=(1, 6)),
    Family("slow drift", "fixed_point", slow_drift, positive, sizes=(1, 6)),
    Family("identity", "fixed_point", identity, positive, sizes=(1, 6)),
    Family("line of fixed points", "fixed_point", descent, consistent(True), sizes=(2, 8)),
    Family("hyperbola", "fixed_point", hyperbola, positive, sizes=(1, 6)),
)
