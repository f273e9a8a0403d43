"""Random problems for ``defaults.py``: each family is a function, and a way to draw it around a solution that is chosen first.

Every function takes (z, θ, *data) with any leading axes: z (..., n) of unit scale, θ (..., p). The benchmark puts the unknowns on
scales of their own, x = scale · z, so that the condition numbers here are those after scaling.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

Tensor = torch.Tensor
Drawn = tuple[Tensor, tuple[Tensor, ...], Tensor]  # θ (K, p), data (K, ...), z* (K, n), all float64


@dataclass(frozen=True)
class Family:
    """One kind of random problem.

    Parameters
    ----------
    name, kind
        For the table; ``"argmin"``, ``"root"`` or ``"fixed_point"``.
    function
        (z, θ, *data) ↦ objective (...), residual (..., n) or image (..., n).
    draw
        (source, K, n, log10 of the condition number) ↦ θ, data, z*.
    sizes
        Least and largest n.
    positive
        Starts are multiples of z*, within its orthant, in place of z* plus a step.
    farthest
        The largest distance of a start, in units of z.
    several
        Whether there are other solutions, each of them right.
    """

    name: str
    kind: str
    function: Callable[..., Tensor]
    draw: Callable[[Source, int, int, float], Drawn]
    sizes: tuple[int, int] = (1, 12)
    positive: bool = False
    farthest: float = 1e6
    several: bool = False


class Source:
    """Random numbers in float64 from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def sign(self, *shape: int) -> Tensor:
        return torch.where(self.uniform(0, 1, *shape) < 0.5, -1.0, 1.0).double()

    def integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def solution(self, k: int, n: int) -> Tensor:
        """Numbers of either sign between 0.5 and 2 in size."""
        return self.sign(k, n) * self.uniform(0.5, 2.0, k, n)

    def spectrum(self, k: int, n: int, log_ratio: float) -> Tensor:
        """Numbers (K, n) between 10^−log_ratio and 1, both attained."""
        inside = self.uniform(0, 1, k, n)
        inside[:, 0] = 0.0
        if n > 1:
            inside[:, -1] = 1.0
        return 10 ** (-log_ratio * inside)

    def definite(self, k: int, n: int, log_ratio: float) -> Tensor:
        """Symmetric positive definite matrices (K, n, n) of condition 10^log_ratio and norm 1."""
        q = torch.linalg.qr(self.normal(k, n, n)).Q
        return (q * self.spectrum(k, n, log_ratio).unsqueeze(-2)) @ q.mT

    def matrix(self, k: int, rows: int, n: int, log_ratio: float) -> Tensor:
        """Matrices (K, rows, n) of condition 10^log_ratio and norm 1."""
        u, _, vh = torch.linalg.svd(self.normal(k, rows, n), full_matrices=False)
        return (u * self.spectrum(k, min(rows, n), log_ratio).unsqueeze(-2)) @ vh


def times(a: Tensor, x: Tensor) -> Tensor:
    """Return A x for A (..., m, n) and x (..., n)."""
    return (a * x.unsqueeze(-2)).sum(-1)


def bowl(q: Tensor, x: Tensor) -> Tensor:
    return 0.5 * (x * times(q, x)).sum(-1)


def slope(function: Callable[..., Tensor], z: Tensor, *args: Tensor) -> Tensor:
    z = z.detach().requires_grad_()
    return torch.autograd.grad(function(z, *args).sum(), z)[0]


def balanced(function: Callable[..., Tensor], z: Tensor, *data: Tensor) -> Tensor:
    """Return the linear term b with which ``function(z, 0, *data) + b·z`` is stationary at z."""
    return -slope(function, z, torch.zeros_like(z), *data)


# --- argmin ---


def smooth(z: Tensor, b: Tensor, q: Tensor, a: Tensor) -> Tensor:
    t = times(a, z)
    return bowl(q, z) + (F.softplus(t) + F.softplus(-t)).sum(-1) + (b * z).sum(-1)


def draw_smooth(s: Source, k: int, n: int, c: float) -> Drawn:
    z, data = s.solution(k, n), (s.definite(k, n, c), s.matrix(k, max(1, n // 2), n, 0.3))
    return balanced(smooth, z, *data), data, z


def quadratic(z: Tensor, b: Tensor, q: Tensor) -> Tensor:
    return bowl(q, z) + (b * z).sum(-1)


def draw_quadratic(s: Source, k: int, n: int, c: float) -> Drawn:
    z, q = s.solution(k, n), s.definite(k, n, c)
    return balanced(quadratic, z, q), (q,), z


def poisson(z: Tensor, theta: Tensor, x: Tensor) -> Tensor:
    eta = times(x, z)
    return (torch.exp(eta) - theta[..., 1:] * eta).sum(-1) + 0.5 * torch.exp(theta[..., 0]) * (z * z).sum(-1)


def draw_poisson(s: Source, k: int, n: int, c: float) -> Drawn:
    z, rows = s.solution(k, n), 2 * n + 4
    x = 2 * s.matrix(k, rows, n, c / 2)
    ridge = s.uniform(-6, -1, k, 1)
    # y with which z* is stationary: Xᵀ(exp(Xz*) − y) + ridge·z* = 0.
    y = torch.exp(times(x, z)) + times(torch.linalg.pinv(x).mT, ridge.exp() * z)
    return torch.cat([ridge, y], -1), (x,), z


def logistic(z: Tensor, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    fit = F.softplus(-y * times(x, z)).sum(-1)
    return fit + 0.5 * torch.exp(theta[..., 0]) * (z * z).sum(-1) + (theta[..., 1:] * z).sum(-1)


def draw_logistic(s: Source, k: int, n: int, c: float) -> Drawn:
    z, rows = s.solution(k, n), 2 * n + 6
    x, y = 3 * s.matrix(k, rows, n, c / 2), s.sign(k, rows)
    ridge = -s.uniform(0, 2.3 * min(c, 5.0), k, 1)
    b = -slope(logistic, z, torch.cat([ridge, torch.zeros(k, n).double()], -1), x, y)
    return torch.cat([ridge, b], -1), (x, y), z


def huber(z: Tensor, theta: Tensor, a: Tensor, t: Tensor) -> Tensor:
    """Huber's loss with threshold e^θ₀ and a small ridge, which alone curves it far away."""
    r, bend = times(a, z) - t, torch.exp(theta[..., :1])
    far = bend * (r.abs() - 0.5 * bend)
    loss = torch.where(r.abs() <= bend, 0.5 * r * r, far).sum(-1)
    return loss + 0.5e-3 * (z * z).sum(-1) + (theta[..., 1:] * z).sum(-1)


def draw_huber(s: Source, k: int, n: int, c: float) -> Drawn:
    z, rows = s.solution(k, n), 3 * n + 4
    a = s.matrix(k, rows, n, min(c, 3.0) / 2)
    off = s.uniform(-0.8, 0.8, k, rows)
    off[:, :3] = s.sign(k, 3) * s.uniform(2, 5, k, 3)
    t = times(a, z) - off
    b = -slope(huber, z, torch.zeros(k, n + 1).double(), a, t)
    return torch.cat([torch.zeros(k, 1).double(), b], -1), (a, t), z


def barrier(z: Tensor, b: Tensor, q: Tensor) -> Tensor:
    return bowl(q, z) - torch.log(z).sum(-1) + (b * z).sum(-1)


def draw_barrier(s: Source, k: int, n: int, c: float) -> Drawn:
    z, q = s.solution(k, n).abs(), 0.1 * s.definite(k, n, c)
    return balanced(barrier, z, q), (q,), z


def free_barrier(z: Tensor, b: Tensor) -> Tensor:
    return ((b * z) - torch.log(z)).sum(-1)


def draw_free_barrier(s: Source, k: int, n: int, c: float) -> Drawn:
    z = s.solution(k, n).abs()
    return 1 / z, (), z


def quartic(z: Tensor, b: Tensor, q: Tensor) -> Tensor:
    return 0.25 * (z**4).sum(-1) + bowl(q, z) + (b * z).sum(-1)


def draw_quartic(s: Source, k: int, n: int, c: float) -> Drawn:
    z, q = s.solution(k, n), s.definite(k, n, c)
    return balanced(quartic, z, q), (q,), z


def rosenbrock(z: Tensor, theta: Tensor) -> Tensor:
    steep = torch.exp(theta[..., -1])
    valley = ((z[..., 1:] - z[..., :-1] ** 2) ** 2).sum(-1)
    return steep * valley + ((theta[..., :-1] - z) ** 2).sum(-1)


def draw_rosenbrock(s: Source, k: int, n: int, c: float) -> Drawn:
    first = s.uniform(0.7, 1.2, k, 1)
    z = torch.cat([first ** (2**i) for i in range(n)], -1)
    return torch.cat([z, s.uniform(0, math.log(100), k, 1)], -1), (), z


def pair(z: Tensor, theta: Tensor) -> Tensor:
    ratio = (torch.exp(theta[..., 1:]) / z) ** 6
    return (4 * torch.exp(theta[..., :1]) * (ratio * ratio - ratio)).sum(-1)


def draw_pair(s: Source, k: int, n: int, c: float) -> Drawn:
    z = s.uniform(0.8, 1.6, k, n)
    return torch.cat([s.uniform(-1, 1, k, 1), torch.log(z / 2 ** (1 / 6))], -1), (), z


def triangle(z: Tensor, theta: Tensor) -> Tensor:
    """Three atoms at (0, 0), (u, 0) and (v, w)."""
    u, v, w = z.unbind(-1)
    squares = torch.stack([u * u, v * v + w * w, (u - v) ** 2 + w * w], -1)
    ratio = (torch.exp(2 * theta[..., 1:]) / squares) ** 3
    return (4 * torch.exp(theta[..., :1]) * (ratio * ratio - ratio)).sum(-1)


def draw_triangle(s: Source, k: int, n: int, c: float) -> Drawn:
    side = s.uniform(0.8, 1.6, k, 1)
    z = side * torch.tensor([1.0, 0.5, math.sqrt(3) / 2], dtype=torch.float64)
    sigma = torch.log(side / 2 ** (1 / 6)).expand(k, 3)
    return torch.cat([s.uniform(-1, 1, k, 1), sigma], -1), (), z


# --- root ---


def powers(z: Tensor, theta: Tensor, a: Tensor) -> Tensor:
    return times(a, z**3 + 0.3 * z) - theta


def cubes(z: Tensor, theta: Tensor) -> Tensor:
    return z**3 - theta


def exponential(z: Tensor, theta: Tensor, a: Tensor) -> Tensor:
    return times(a, torch.exp(z) + 0.3 * z) - theta


def coupled(z: Tensor, theta: Tensor, a: Tensor) -> Tensor:
    return z + 0.3 * torch.tanh(times(a, z)) + 0.1 * z**3 - theta


def drawn_root(function: Callable[..., Tensor], strength: float = 1.0) -> Callable[[Source, int, int, float], Drawn]:
    def draw(s: Source, k: int, n: int, c: float) -> Drawn:
        z = s.solution(k, n)
        data = () if function is cubes else (strength * s.matrix(k, n, n, c),)
        return function(z, torch.zeros_like(z), *data), data, z

    return draw


# --- fixed point ---


def linear(z: Tensor, theta: Tensor, m: Tensor) -> Tensor:
    return times(m, z) + theta


def network(z: Tensor, theta: Tensor, first: Tensor, second: Tensor, shift: Tensor) -> Tensor:
    return times(second, torch.tanh(times(first, z) + theta)) + shift


def rectified(z: Tensor, theta: Tensor, m: Tensor) -> Tensor:
    return torch.relu(times(m, z) + theta)


def shrinking(z: Tensor, theta: Tensor, q: Tensor) -> Tensor:
    """One step of proximal gradient descent (ISTA) for ½zᵀQz − b·z + e^θ₀‖z‖₁, of step 1/‖Q‖."""
    moved, limit = z - times(q, z) + theta[..., 1:], torch.exp(theta[..., :1])
    return torch.sign(moved) * torch.relu(moved.abs() - limit)


def boxed(z: Tensor, theta: Tensor, q: Tensor) -> Tensor:
    """One step of projected gradient descent over the box [−1, 1]."""
    return torch.clamp(z - times(q, z) + theta, -1.0, 1.0)


def boxed_cost(z: Tensor, theta: Tensor) -> Tensor:
    return torch.clamp(z - theta, -1.0, 1.0)


def shifted_down(z: Tensor, theta: Tensor) -> Tensor:
    return torch.relu(z - theta)


def onto_simplex(z: Tensor, theta: Tensor, q: Tensor) -> Tensor:
    """One step of projected gradient descent over the probability simplex."""
    moved = z - times(q, z) + theta
    ordered = torch.sort(moved, dim=-1, descending=True).values
    count = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype)
    level = (torch.cumsum(ordered, -1) - 1) / count  # largest at the number of entries that stay positive
    return torch.relu(moved - level.amax(-1, keepdim=True))


def contraction(s: Source, k: int, n: int, symmetric: bool) -> Tensor:
    """Matrices (K, n, n) whose norm, the rate of plain iteration or a bound on it, lies between 0.1 and 0.99."""
    rate = 1 - 10 ** s.uniform(-2, -0.05, k, 1, 1)
    m = s.definite(k, n, 1.0) if symmetric else s.matrix(k, n, n, 0.7)
    flips = s.sign(k, 1, 1)
    return rate * m * flips


def draw_linear(s: Source, k: int, n: int, c: float) -> Drawn:
    z, m = s.solution(k, n), contraction(s, k, n, symmetric=c % 1 < 0.5)
    return z - times(m, z), (m,), z


def draw_network(s: Source, k: int, n: int, c: float) -> Drawn:
    z, hidden = s.solution(k, n), n + 2
    first, second = s.matrix(k, hidden, n, 0.5), s.matrix(k, n, hidden, 0.5)
    second = second * (1 - 10 ** s.uniform(-2, -0.05, k, 1, 1))
    theta = 0.5 * s.normal(k, hidden)
    return theta, (first, second, z - times(second, torch.tanh(times(first, z) + theta))), z


def draw_rectified(s: Source, k: int, n: int, c: float) -> Drawn:
    before, m = s.solution(k, n), contraction(s, k, n, symmetric=c % 1 < 0.5)
    z = torch.relu(before)
    return before - times(m, z), (m,), z


def draw_shrinking(s: Source, k: int, n: int, c: float) -> Drawn:
    q, limit = s.definite(k, n, min(c, 3.0)), s.uniform(-4, -1, k, 1)
    z = s.solution(k, n) * (s.uniform(0, 1, k, n) < 0.5)
    # A subgradient in the interior off the support, so that the derivative exists.
    inside = torch.where(z == 0, s.uniform(-0.9, 0.9, k, n), torch.sign(z))
    return torch.cat([limit, times(q, z) + limit.exp() * inside], -1), (q,), z


def draw_boxed(s: Source, k: int, n: int, c: float) -> Drawn:
    q, z = s.definite(k, n, min(c, 3.0)), s.uniform(-1.5, 1.5, k, n)
    push = torch.where(z.abs() > 1, 0.1 * torch.sign(z), torch.zeros_like(z))
    z = z.clamp(-1, 1)
    return times(q, z) + push, (q,), z


def draw_boxed_cost(s: Source, k: int, n: int, c: float) -> Drawn:
    cost = s.sign(k, n) * 10 ** s.uniform(-2, 0, k, n)
    return cost, (), -torch.sign(cost)


def draw_shifted_down(s: Source, k: int, n: int, c: float) -> Drawn:
    return 10 ** s.uniform(-2, 0, k, n), (), torch.zeros(k, n).double()


def draw_onto_simplex(s: Source, k: int, n: int, c: float) -> Drawn:
    q = s.definite(k, n, min(c, 3.0))
    z = s.uniform(0.2, 1, k, n) * (s.uniform(0, 1, k, n) < 0.6)
    z[:, 0] = s.uniform(0.2, 1, k)
    z = z / z.sum(-1, keepdim=True)
    return times(q, z) + torch.where(z > 0, 0.0, -s.uniform(0.05, 0.5, k, n)), (q,), z


REGULAR = (
    Family("quadratic", "argmin", quadratic, draw_quadratic),
    Family("smooth convex", "argmin", smooth, draw_smooth),
    Family("Poisson", "argmin", poisson, draw_poisson),
    Family("logistic", "argmin", logistic, draw_logistic),
    Family("Huber", "argmin", huber, draw_huber),
    Family("barrier", "argmin", barrier, draw_barrier, positive=True),
    Family("free barrier", "argmin", free_barrier, draw_free_barrier, positive=True),
    Family("quartic", "argmin", quartic, draw_quartic),
    Family("Rosenbrock", "argmin", rosenbrock, draw_rosenbrock, sizes=(2, 4), several=True),
    Family("Lennard-Jones pair", "argmin", pair, draw_pair, sizes=(1, 4), positive=True, several=True),
    Family("Lennard-Jones triangle", "argmin", triangle, draw_triangle, sizes=(3, 3), positive=True, several=True),
    Family("cubes", "root", cubes, drawn_root(cubes)),
    Family("polynomial", "root", powers, drawn_root(powers)),
    Family("exponential", "root", exponential, drawn_root(exponential)),
    Family("coupled", "root", coupled, drawn_root(coupled, 2.0)),
    Family("linear map", "fixed_point", linear, draw_linear),
    Family("tanh network", "fixed_point", network, draw_network),
    Family("relu", "fixed_point", rectified, draw_rectified),
    Family("soft threshold", "fixed_point", shrinking, draw_shrinking),
    Family("box", "fixed_point", boxed, draw_boxed),
    Family("box, linear cost", "fixed_point", boxed_cost, draw_boxed_cost),
    Family("relu of a shift", "fixed_point", shifted_down, draw_shifted_down, farthest=1.0),
    Family("simplex", "fixed_point", onto_simplex, draw_onto_simplex, sizes=(2, 12)),
)
