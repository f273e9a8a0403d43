"""The line search of gradient descent: what it promises of every step, and how many gradients it takes."""

from __future__ import annotations

import pytest
import torch
from torch.func import vmap

import bilevel

F64 = torch.float64


def curved(count: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return curvatures (count, n) from 1 to 100, another order for each problem, and minima (count, n)."""
    generator = torch.Generator().manual_seed(0)
    curvature = torch.logspace(0, 2, n, dtype=F64).expand(count, n)
    order = torch.rand(count, n, generator=generator, dtype=F64).argsort(dim=-1)
    return curvature.gather(-1, order), torch.randn(count, n, generator=generator, dtype=F64)


def descended(steps: int, lr: float, function, start, *args, dims) -> torch.Tensor:
    solver = bilevel.GradientDescent(lr, steps, line_search=True)
    tolerance = bilevel.Tolerance(delta=None, delta_prime=None)
    layer = bilevel.argmin(function, solver=solver, tolerance=tolerance, on_failure="ignore")
    return vmap(layer, in_dims=(None, *dims))(start, *args)


def weighted(x, c, a):
    return 0.5 * (c * (x - a) ** 2).sum()


def wavy(x, c, a):
    return weighted(x, c, a) + 30 * torch.sin(3 * x).sum()


@pytest.mark.parametrize("function", [weighted, wavy])
@pytest.mark.parametrize("lr", [1e-3, 1.0, 100.0])
def test_every_step_falls_by_a_part_of_its_slope(function, lr):
    c, a = curved(4, 5)
    start = torch.zeros(5, dtype=F64)
    x = start.expand(4, 5)
    for steps in range(1, 9):
        y = descended(steps, lr, function, start, c, a, dims=(0, 0))
        point = x.clone().requires_grad_(True)
        before = vmap(function)(point, c, a)
        (slope,) = torch.autograd.grad(before.sum(), point)
        step = y - x
        assert bool((vmap(function)(y, c, a) <= before + 0.1 * (slope * step).sum(dim=-1) * (1 - 1e-9)).all())
        # A step is along the gradient, and a power of two times the first.
        along = -(step * slope).sum(dim=-1) / (slope**2).sum(dim=-1)
        torch.testing.assert_close(step, -along.unsqueeze(-1) * slope)
        exponent = torch.log2(along / lr)
        torch.testing.assert_close(exponent, exponent.round(), atol=1e-6, rtol=0)
        x = y


def test_it_comes_to_the_minimum():
    c, a = curved(4, 5)
    x = descended(2000, 1e-3, weighted, torch.zeros(5, dtype=F64), c, a, dims=(0, 0))
    torch.testing.assert_close(x, a, atol=1e-8, rtol=0)


@pytest.mark.counts
@pytest.mark.parametrize(("count", "most"), [(1, 60), (8, 90)])
def test_a_step_takes_few_more_gradients_than_one(count, most):
    """To double every step that was accepted at once took 66 and 111 gradients, as every second one was then refused."""
    c, a = curved(count, 5)
    seen: list[int] = []

    def counted(x, c, a):
        seen.append(1)
        return weighted(x, c, a)

    with bilevel.replaying(False):
        x = descended(40, 1e-3, counted, torch.zeros(5, dtype=F64), c, a, dims=(0, 0))
    assert len(seen) <= most
    assert float((x - a).abs().max()) < 0.6
