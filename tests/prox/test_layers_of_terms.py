"""Each term of :mod:`bilevel.prox` in a layer: derivatives of first and second order against central differences, and batches against a loop."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import bilevel
from bilevel import Status, prox
from tests.prox.test_layer import differences

DOUBLE = torch.float64
N = 6

TERMS: dict[str, tuple[Callable[[torch.Tensor], prox.Term], float, tuple[int, ...]]] = {
    "L1": (lambda t: prox.L1(t), 0.5, (N,)),
    "ElasticNet": (lambda t: prox.ElasticNet(t, 2 * t), 0.3, (N,)),
    "GroupL2": (lambda t: prox.GroupL2(t, groups=[[0, 1], [2, 3], [4, 5]]), 0.8, (N,)),
    "LInf": (lambda t: prox.LInf(t), 0.8, (N,)),
    "NuclearNorm": (lambda t: prox.NuclearNorm(t), 0.5, (2, 3)),
    "TotalVariation1D": (lambda t: prox.TotalVariation1D(t), 0.3, (N,)),
    "NonNegative": (lambda t: prox.NonNegative(), 0.3, (N,)),
    "Box": (lambda t: prox.Box(-t, t), 0.2, (N,)),
    "Simplex": (lambda t: prox.Simplex(t), 1.3, (N,)),
    "L1Ball": (lambda t: prox.L1Ball(t), 0.7, (N,)),
    "L2Ball": (lambda t: prox.L2Ball(t), 0.5, (N,)),
    "TransportPolytope": (
        lambda t: prox.TransportPolytope(1.5 * t * torch.ones(2, dtype=DOUBLE), torch.stack([1.1 * t, t, 0.9 * t])),
        0.5,
        (2, 3),
    ),
    "AffineSet": (lambda t: prox.AffineSet(torch.ones(1, N, dtype=DOUBLE), t.reshape(1)), 0.5, (N,)),
    "HalfSpace": (lambda t: prox.HalfSpace(torch.ones(N, dtype=DOUBLE), t), -0.5, (N,)),
    "SecondOrderCone": (lambda t: prox.SecondOrderCone(), 0.5, (N,)),
    "PSDCone": (lambda t: prox.PSDCone(), 0.5, (2, 2)),
    "Custom": (lambda t: prox.Custom(lambda v, s: v - v.clamp(-s * t, s * t)), 0.8, (N,)),
}


@pytest.mark.parametrize("name", TERMS)
def test_derivatives_and_batches(name: str) -> None:
    make, strength, shape = TERMS[name]
    generator = torch.Generator().manual_seed(4)
    A = torch.randn(8, len(torch.zeros(shape).reshape(-1)), generator=generator, dtype=DOUBLE)
    y = 2 * torch.randn(8, generator=generator, dtype=DOUBLE)

    def loss(x: torch.Tensor, A: torch.Tensor, y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return ((A @ x.reshape(-1) - y) ** 2).mean() + 0.05 * (x**4).sum()

    layer = bilevel.argmin(loss, prox=lambda A, y, t: make(t))
    t = torch.tensor(strength, dtype=DOUBLE)
    run = lambda y, t: layer(torch.zeros(shape, dtype=DOUBLE), A, y, t).reshape(-1)
    solution = layer.solve(torch.zeros(shape, dtype=DOUBLE), A, y, t)
    assert solution.report.status is Status.CONVERGED
    by_t, by_y = torch.func.jacrev(run, argnums=1)(y, t), torch.func.jacrev(run)(y, t)
    torch.testing.assert_close(by_t, differences(lambda t: run(y, t), t)[:, 0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(by_y, differences(lambda y: run(y, t), y), rtol=1e-5, atol=1e-7)
    outer = lambda t: (run(y, t) ** 3).sum()
    second = differences(lambda t: torch.func.grad(outer)(t), t)[0]
    torch.testing.assert_close(torch.func.hessian(outer)(t), second, rtol=1e-4, atol=1e-6)
    ts = t * torch.tensor([1.0, 1.1, 0.5], dtype=DOUBLE)
    values = torch.func.vmap(lambda t: run(y, t))(ts)
    slopes = torch.func.vmap(torch.func.jacrev(lambda t: run(y, t)))(ts)
    for one, value, slope in zip(ts, values, slopes, strict=True):
        torch.testing.assert_close(value, run(y, one), rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(slope, torch.func.jacrev(lambda t: run(y, t))(one), rtol=1e-7, atol=1e-9)
