"""Each method is its paper's pseudo-code: iterates agree step for step with plain torch on the same random minibatches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

import bilevel
from bilevel import stochastic
from tests.stochastic.problems import Quadratic

INNER, OUTER = 0.15, 0.07  # the two learning rates
STEPS = 9
SLOW = partial(torch.optim.SGD, lr=INNER)
Vector = torch.Tensor
Rows = Iterator[torch.Tensor]


class Sums(Quadratic):
    """The derivatives of the finite sums, written out."""

    def g_z(self, i: Vector, z: Vector, x: Vector) -> Vector:
        return self.A[i].mean(0) @ z + self.C[i].mean(0) @ x + self.a[i].mean(0)

    def g_x(self, i: Vector, z: Vector) -> Vector:
        return self.C[i].mean(0).T @ z

    def h(self, i: Vector, q: Vector) -> Vector:
        return self.A[i].mean(0) @ q

    def b(self, i: Vector, q: Vector) -> Vector:
        return self.C[i].mean(0).T @ q

    def f_z(self, j: Vector, z: Vector) -> Vector:
        return (self.E[j].mT @ (self.E[j] @ z - self.e[j]).unsqueeze(-1)).squeeze(-1).mean(0)

    def f_x(self, j: Vector, x: Vector) -> Vector:
        return self.D[j].mean(0) @ x + self.d[j].mean(0)

    def series(self, i: Vector, j: Vector, z: Vector, x: Vector, terms: int, rate: float) -> Vector:
        """The hypergradient with a Neumann series on one minibatch of each level."""
        r = self.f_z(j, z)
        q = rate * r
        for _ in range(terms):
            r = r - rate * self.h(i, r)
            q = q + rate * r
        return self.f_x(j, x) - self.b(i, q)


def random_rows(seed: int) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(8, (3,), generator=generator)


# The pseudo-codes: generators of (φ, θ) after each step.


def soba(p: Sums, z: Vector, x: Vector, i: Rows, j: Rows, weight: float = 1.0) -> Iterator[tuple[Vector, Vector]]:
    q, mean = torch.zeros_like(z), None
    while True:
        a, c = next(i), next(j)
        new = p.f_x(c, x) - p.b(a, q)
        mean = new if mean is None else (1 - weight) * mean + weight * new
        z, q = z - INNER * p.g_z(a, z, x), q - INNER * (p.h(a, q) - p.f_z(c, z))
        x = x - OUTER * mean
        yield z, x


def saba(p: Sums, z: Vector, x: Vector, i: Rows, j: Rows) -> Iterator[tuple[Vector, Vector]]:
    q, lower, upper = torch.zeros_like(z), {}, {}

    def saga(memory: dict[int, Vector], key: int, new: Vector) -> Vector:
        if key in memory:
            found = new - memory[key] + torch.stack(list(memory.values())).mean(0)
            memory[key] = new
            return found
        memory[key] = new
        return torch.stack(list(memory.values())).mean(0)

    while True:
        a, c = next(i), next(j)
        low = saga(lower, int(a), torch.cat([p.g_z(a, z, x), p.h(a, q), p.b(a, q)]))
        up = saga(upper, int(c), torch.cat([p.f_z(c, z), p.f_x(c, x)]))
        z, q = z - INNER * low[:5], q - INNER * (low[5:10] - up[:5])
        x = x - OUTER * (up[5:] - low[10:])
        yield z, x


def srba(
    p: Sums, z: Vector, x: Vector, i: Rows, j: Rows, period: int, radius: float
) -> Iterator[tuple[Vector, Vector]]:
    def direction(a: Vector, c: Vector, z: Vector, q: Vector, x: Vector) -> Vector:
        return torch.cat([p.g_z(a, z, x), p.h(a, q) - p.f_z(c, z), p.f_x(c, x) - p.b(a, q)])

    u, before, step = (z, torch.zeros_like(z), x), (z, z, x), 0
    while True:
        if step % period == 0:
            d = direction(p.all, p.all, *u)
        else:
            a, c = next(i), next(j)
            d = d + direction(a, c, *u) - direction(a, c, *before)
        before = u
        q = u[1] - INNER * d[5:10]
        u = (u[0] - INNER * d[:5], q * min(1.0, radius / float(q.norm())), u[2] - OUTER * d[10:])
        step += 1
        yield u[0], u[2]


def amigo(p: Sums, z: Vector, x: Vector, i: Rows, j: Rows) -> Iterator[tuple[Vector, Vector]]:
    q = torch.zeros_like(z)
    while True:
        for _ in range(3):
            z = z - INNER * p.g_z(next(i), z, x)
        for _ in range(4):
            a, c = next(i), next(j)
            q = q - INNER * (p.h(a, q) - p.f_z(c, z))
        x = x - OUTER * (p.f_x(c, x) - p.b(a, q))
        yield z, x


def implicit(p: Sums, z: Vector, x: Vector, i: Rows, j: Rows, exact: bool = False) -> Iterator[tuple[Vector, Vector]]:
    q = torch.zeros_like(z)
    while True:
        for _ in range(3):
            z = z - INNER * p.g_z(next(i), z, x)
        a, c = next(i), next(j)
        if exact:
            q = torch.linalg.solve(p.A[a].mean(0), p.f_z(c, z))
        else:
            for _ in range(4):
                q = q - INNER * (p.h(a, q) - p.f_z(c, z))
        x = x - OUTER * (p.f_x(c, x) - p.b(a, q))
        yield z, x


def stocbio(p: Sums, z: Vector, x: Vector, i: Rows, j: Rows, terms: int) -> Iterator[tuple[Vector, Vector]]:
    while True:
        for _ in range(3):
            z = z - INNER * p.g_z(next(i), z, x)
        a, c = next(i), next(j)
        r = p.f_z(c, z)
        q = INNER * r
        for term in range(terms):
            factor = next(i) if term else a
            r = r - INNER * p.h(factor, r)
            q = q + INNER * r
        x = x - OUTER * (p.f_x(c, x) - p.b(a, q))
        yield z, x


def ttsa(p: Sums, z: Vector, x: Vector, i: Rows, j: Rows, inner_steps: int) -> Iterator[tuple[Vector, Vector]]:
    generator = torch.Generator().manual_seed(0)
    while True:
        for _ in range(inner_steps):
            z = z - INNER * p.g_z(next(i), z, x)
        a, c = next(i), next(j)
        q = 6 * 0.5 * p.f_z(c, z)
        for term in range(int(torch.randint(6, (), generator=generator))):
            q = q - 0.5 * p.h(next(i) if term else a, q)
        x = x - OUTER * (p.f_x(c, x) - p.b(a, q))
        yield z, x


def mrbo(p: Sums, z: Vector, x: Vector, i: Rows, j: Rows) -> Iterator[tuple[Vector, Vector]]:
    last = None
    while True:
        a, c = next(i), next(j)
        u, v = p.g_z(a, z, x), p.series(a, c, z, x, 4, 0.5)
        if last is not None:
            u = u + (1 - 0.3) * (last[0] - p.g_z(a, *last[2:]))
            v = v + (1 - 0.4) * (last[1] - p.series(a, c, *last[2:], 4, 0.5))
        last = u, v, z, x
        z, x = z - INNER * u, x - OUTER * v
        yield z, x


def vrbo(p: Sums, z: Vector, x: Vector, i: Rows, j: Rows, period: int) -> Iterator[tuple[Vector, Vector]]:
    step = 0
    while True:
        if step % period == 0:
            u, v = p.g_z(p.all, z, x), p.series(p.all, p.all, z, x, 4, 0.5)
        last = z, x
        x = x - OUTER * v
        for t in range(4):  # t = 0, ..., m + 1 with m = 2: one inner step less than estimates
            a, c = next(i), next(j)
            u = u + p.g_z(a, z, x) - p.g_z(a, *last)
            v = v + p.series(a, c, z, x, 4, 0.5) - p.series(a, c, *last, 4, 0.5)
            last = z, x
            if t < 3:
                z = z - INNER * u
        step += 1
        yield z, x


def f2sa(p: Sums, z: Vector, x: Vector, i: Rows, j: Rows) -> Iterator[tuple[Vector, Vector]]:
    y, penalty = z, 5.0
    while True:
        for _ in range(3):
            a = next(i)
            z = z - INNER * p.g_z(a, z, x)
            y = y - INNER / penalty * (p.f_z(next(j), y) + penalty * p.g_z(a, y, x))
        a, c = next(i), next(j)
        x = x - OUTER * (p.f_x(c, x) + penalty * (p.g_x(a, y) - p.g_x(a, z)))
        penalty += 0.5
        yield z, x


def bome(p: Sums, z: Vector, x: Vector, i: Rows, j: Rows) -> Iterator[tuple[Vector, Vector]]:
    while True:
        a, c = next(i), next(j)
        ahead = z
        for _ in range(3):
            ahead = ahead - INNER * p.g_z(a, ahead, x)
        gap = torch.cat([p.g_z(a, z, x), p.g_x(a, z) - p.g_x(a, ahead)])
        f = torch.cat([p.f_z(c, z), p.f_x(c, x)])
        factor = max(float((0.5 * gap @ gap - f @ gap) / (gap @ gap)), 0.0)
        z, x = z - INNER * (f + factor * gap)[:5], x - OUTER * (f + factor * gap)[5:]
        yield z, x


def pzobo(p: Sums, z: Vector, x: Vector, i: Rows, j: Rows) -> Iterator[tuple[Vector, Vector]]:
    generator = torch.Generator().manual_seed(0)
    while True:
        batches = [next(i) for _ in range(3)]

        def descend(x: Vector, z: Vector = z, batches: list[Vector] = batches) -> Vector:
            for a in batches:
                z = z - INNER * p.g_z(a, z, x)
            return z

        end, c = descend(x), next(j)
        v = p.f_x(c, x)
        for u in torch.randn(3, 2, generator=generator, dtype=torch.float64).T:
            v = v + ((descend(x + 0.1 * u) - end) / 0.1) @ p.f_z(c, end) * u / 2
        z, x = end, x - OUTER * v
        yield z, x


Code = Callable[..., Iterator[tuple[Vector, Vector]]]
CASES: dict[str, tuple[Any, dict[str, Any], Code]] = {
    "SOBA": (stochastic.SOBA, {}, soba),
    "MASOBA": (stochastic.MASOBA, {"weight": 0.3}, partial(soba, weight=0.3)),
    "SABA": (stochastic.SABA, {}, saba),
    "SRBA": (stochastic.SRBA, {"period": 4, "adjoint_radius": 0.2}, partial(srba, period=4, radius=0.2)),
    "AmIGO": (stochastic.AmIGO, {"inner_steps": 3, "adjoint_steps": 4}, amigo),
    "StocBiO": (stochastic.StocBiO, {"inner_steps": 3, "terms": 4}, partial(stocbio, terms=4)),
    "TTSA": (stochastic.TTSA, {"max_terms": 6, "neumann_rate": 0.5}, partial(ttsa, inner_steps=1)),
    "ALSET": (stochastic.ALSET, {"max_terms": 6, "neumann_rate": 0.5, "inner_steps": 3}, partial(ttsa, inner_steps=3)),
    "MRBO": (stochastic.MRBO, {"terms": 4, "neumann_rate": 0.5, "inner_weight": 0.3, "outer_weight": 0.4}, mrbo),
    "VRBO": (
        stochastic.VRBO,
        {"terms": 4, "neumann_rate": 0.5, "inner_steps": 2, "period": 4},
        partial(vrbo, period=4),
    ),
    "F2SA": (stochastic.F2SA, {"inner_steps": 3, "penalty": 5.0, "penalty_increment": 0.5}, f2sa),
    "BOME": (stochastic.BOME, {"inner_steps": 3}, bome),
    "PZOBO": (stochastic.PZOBO, {"inner_steps": 3, "directions": 2, "smoothing": 0.1}, pzobo),
    "ImplicitStep": (stochastic.ImplicitStep, {"inner_steps": 3, "adjoint_steps": 4}, implicit),
    "ImplicitStep, exact": (
        stochastic.ImplicitStep,
        {"inner_steps": 3, "linear_solver": bilevel.Exact()},
        partial(implicit, exact=True),
    ),
}


def numbered(rows: Rows, size: int) -> Iterator[stochastic.Batch]:
    for row in rows:
        yield stochastic.Batch(data=row[:size], index=int(row[0]) if size == 1 else None)


@pytest.mark.parametrize("name", CASES)
def test_iterates_are_those_of_the_pseudo_code(name: str) -> None:
    make, settings, code = CASES[name]
    p = Sums(**vars(Quadratic.random()))
    size = 1 if name == "SABA" else 3  # SABA: numbered minibatches of one sample
    if name in ("SRBA", "VRBO"):
        settings = {**settings, "reference": lambda: (p.all, p.all)}
    z, x = p.solution(torch.zeros(3, dtype=torch.float64)) + 0.5, torch.tensor([0.3, -0.5, 0.8], dtype=torch.float64)
    expected = code(p, z.clone(), x.clone(), *((row[:size] for row in random_rows(seed)) for seed in (1, 2)))
    method = make(
        p.losses, z, x,
        inner_optimizer=partial(torch.optim.SGD, lr=INNER),
        outer_optimizer=partial(torch.optim.SGD, lr=OUTER),
        **settings,
    )  # fmt: skip
    inner, outer = numbered(random_rows(1), size), numbered(random_rows(2), size)
    for step in range(1, STEPS + 1):
        method.step(inner, outer)
        for what, found, wanted in zip(("inner", "outer"), (z, x), next(expected), strict=True):
            error = float((found.detach() - wanted).norm() / wanted.norm())
            assert math.isfinite(error) and error < 1e-12, f"{name}: {what} differs by {error:.1e} after step {step}"


PAIRED = ("SRBA", "MRBO", "VRBO", "F2SA", "BOME", "PZOBO")


@pytest.mark.parametrize("name", PAIRED)
def test_differences_have_common_random_numbers(name: str) -> None:
    """An objective that draws noise, as dropout does, is the objective whose noise is part of the minibatch."""
    make, settings, _ = CASES[name]
    p = Quadratic.random()

    def run(drawn_inside: bool) -> tuple[Vector, Vector, Vector]:
        torch.manual_seed(5)

        def lower(z: Any, x: Any, noise: Any) -> Vector:
            noise = torch.randn(3, dtype=torch.float64) if noise is None else noise
            return p.inner_objective(z, x, p.all) * (1 + 0.1 * noise[0]) + z[:3] @ (x * noise)

        def batches() -> Iterator[Any]:
            while True:
                yield None if drawn_inside else torch.randn(3, dtype=torch.float64)

        z, x = torch.ones(5, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        method = make((lower, lambda z, x, _: p.outer_objective(z, x, p.all)), z, x, inner_optimizer=SLOW, **settings)
        for _ in range(STEPS):
            method.step(batches(), None)
        return z.detach(), x.detach(), torch.randn(1)

    for found, wanted in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0.0)
