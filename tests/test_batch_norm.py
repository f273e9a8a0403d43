"""Gradients through batch norms of one image, where torch's own are wrong."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, vmap
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import bilevel
from bilevel._torch.norms import OneImageNorms

F64 = torch.float64


def weighted(y: torch.Tensor) -> torch.Tensor:
    return (y.sin() * torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape)).sum() / y.numel()


def test_only_norms_of_one_image_by_its_own_statistics_are_written_out(monkeypatch) -> None:
    """Running statistics, several images, single values, and what the user's function differentiates or computes again are torch's own."""
    used, plain = [], torch.Tensor.rsqrt
    monkeypatch.setattr(torch.Tensor, "rsqrt", lambda x: used.append(1) or plain(x))
    x, several = torch.randn(1, 3, 4, requires_grad=True), torch.randn(5, 3)
    mean, var = torch.zeros(3), torch.ones(3)

    def norm(x):
        return F.batch_norm(x, None, None, training=True).pow(3).sum()

    with OneImageNorms():
        F.batch_norm(x, mean, var, training=True)
        norm(several)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            F.batch_norm(torch.randn(1, 3), None, None, training=True)
        grad(norm)(x)
        checkpoint(norm, x, use_reentrant=False).backward()
        assert not used
        norm(x)
        assert used


def by_hand(z: torch.Tensor) -> torch.Tensor:
    centred = z - z.mean((0, 2, 3), keepdim=True)
    return centred / (centred.pow(2).mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()


def by_torch(z: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(z, None, None, training=True)


@pytest.mark.parametrize("solver", [bilevel.GradientDescent(0.05, 8), bilevel.Newton(), bilevel.LBFGS()], ids=repr)
def test_one_image_in_a_layout_that_may_be_read_in_two_ways(solver: bilevel.solvers.InnerSolver) -> None:
    # torch 2.13's own gradient of a norm is wrong here by factors, and what a solver finds with it.
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 1, 5, 5, 4, generator=generator, dtype=F64).permute(0, 1, 4, 2, 3)
    start = 0.3 * torch.randn(72, generator=generator, dtype=F64)
    found = []
    for norm in (by_torch, by_hand):

        def objective(v: torch.Tensor, x: torch.Tensor, s: torch.Tensor, norm=norm) -> torch.Tensor:
            seen = norm(F.conv2d(x, v.reshape(2, 3, 3, 4).permute(0, 3, 1, 2), padding=1))
            return weighted(s * F.softplus(seen)) + 0.5 * (v**2).sum()

        layer = bilevel.argmin(objective, solver=solver, on_failure="ignore")
        s = torch.ones((), dtype=F64, requires_grad=True)
        solution = vmap(layer, in_dims=(None, 0, None))(start, images, s)
        solution.sin().sum().backward()
        found.append((solution.detach(), s.grad))
    torch.testing.assert_close(*found, atol=1e-8, rtol=1e-6)


def test_a_fixed_point_of_one_image_in_such_a_layout() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 1, 5, 5, 4, generator=generator, dtype=F64).permute(0, 1, 4, 2, 3)
    found = []
    for norm in (by_torch, by_hand):

        def mapping(v: torch.Tensor, x: torch.Tensor, s: torch.Tensor, norm=norm) -> torch.Tensor:
            seen = norm(F.conv2d(x, v.reshape(2, 3, 3, 4).permute(0, 3, 1, 2), padding=1))
            return 0.2 * s * (seen.mean((0, 2)).sin().reshape(-1).repeat(8)[:72] + v.cos())

        layer = bilevel.fixed_point(mapping)
        s = torch.ones((), dtype=F64, requires_grad=True)
        solution = vmap(layer, in_dims=(None, 0, None))(torch.full((72,), 0.1, dtype=F64), images, s)
        solution.sin().sum().backward()
        found.append((solution.detach(), s.grad))
    torch.testing.assert_close(*found, atol=1e-8, rtol=1e-6)
