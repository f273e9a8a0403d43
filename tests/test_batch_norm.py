"""Gradients through batch norms beside torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, vmap
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import bilevel
import bilevel._torch.batch_norm as batch_norm
from bilevel._torch.batch_norm import FastNorms
from bilevel._torch.convolution import FastHVP
from bilevel._torch.norms import WrittenNorms

F64 = torch.float64


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_norm, "_MANY", 0)


def uses(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows with every use of the rule under test."""
    found: list[int] = []
    forward = batch_norm._BatchNorm.forward

    def counted(*inputs):
        found.append(1)
        return forward(*inputs)

    counted.__signature__ = forward.__signature__
    monkeypatch.setattr(batch_norm._BatchNorm, "forward", staticmethod(counted))
    return found


def agree(loss, *parameters: torch.Tensor, order: int = 1, tol: float = 1e-11) -> None:
    """Assert that derivatives up to ``order`` are torch's, or, from the second on, those of the norm written out."""
    found = []
    for mode in (FastNorms(), WrittenNorms()):
        leaves = [p.detach().clone().requires_grad_(True) for p in parameters]
        with mode:
            value = loss(*leaves)
        first = [value]
        for k in range(order):
            first = torch.autograd.grad(value, leaves, create_graph=k + 1 < order)
            value = sum(g.pow(2).sum() for g in first)
        found.append(first)
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=tol, rtol=tol)
        assert float(theirs.detach().norm()) > 0


def weighted(y: torch.Tensor) -> torch.Tensor:
    return (y.sin() * torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape)).sum() / y.numel()


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("affine", ["both", "weight", "neither"])
@pytest.mark.parametrize("shape", [(7, 3), (4, 3, 5), (3, 2, 4, 3)])
def test_derivatives_of_every_order(shape, affine, order, monkeypatch) -> None:
    torch.manual_seed(0)
    used = uses(monkeypatch)
    x, gamma, beta = (
        3 + torch.randn(shape, dtype=F64),
        torch.randn(shape[1], dtype=F64),
        torch.randn(shape[1], dtype=F64),
    )

    def loss(x, gamma=None, beta=None):
        return weighted(F.batch_norm(x, None, None, gamma, beta, training=True, eps=1e-3))

    agree(loss, *{"both": (x, gamma, beta), "weight": (x, gamma), "neither": (x,)}[affine], order=order, tol=1e-9)
    assert used


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("dims", [(0, 0, 0), (2, 1, None), (0, None, None), (None, 0, 0)])
def test_under_vmap(dims, order, monkeypatch) -> None:
    torch.manual_seed(0)
    used = uses(monkeypatch)
    x, gamma, beta = torch.randn(4, 2, 3, dtype=F64), torch.randn(2, dtype=F64), torch.randn(2, dtype=F64)
    tensors = [
        t if d is None else torch.stack([t, t.cos() * 2, t.flip(0)], d)
        for t, d in zip((x, gamma, beta), dims, strict=True)
    ]
    mapped = vmap(lambda x, g, b: weighted(F.batch_norm(x, None, None, g, b, training=True)), in_dims=dims)
    agree(lambda *a: (mapped(*a) * torch.arange(1.0, 4.0, dtype=F64)).sum(), *tensors, order=order, tol=1e-9)
    assert len(used) == 1, "one pass for all"


def test_under_two_vmaps_and_beside_torch_s_own() -> None:
    torch.manual_seed(0)
    x, gamma = torch.randn(2, 3, 4, 2, 3, dtype=F64), torch.randn(3, 2, dtype=F64)
    norm = vmap(vmap(lambda x, g: F.batch_norm(x, None, None, g, None, training=True)), in_dims=(0, None))
    agree(lambda x, g: norm(x, g).pow(3).sum(), x, gamma)
    with FastNorms():
        mine = norm(x, gamma)
    torch.testing.assert_close(mine, norm(x, gamma), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(
        torch.batch_norm(x[0, 0], gamma[0], None, None, None, True, 0.1, 1e-5, False), mine[0, 0]
    )


def test_far_from_zero_in_single_precision() -> None:
    """Variances are of what is left of the mean, and not differences of squares."""
    torch.manual_seed(0)
    x = 1000 + torch.randn(50, 3, 20)
    with FastNorms():
        mine = F.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(mine.double(), F.batch_norm(x.double(), None, None, training=True), atol=2e-3, rtol=0)


def test_what_is_torch_s_own_stays_so(monkeypatch) -> None:
    """Running statistics, single values, integers, and what the user's function differentiates or computes again."""
    used = uses(monkeypatch)
    x, mean, var = torch.randn(5, 3, requires_grad=True), torch.zeros(3), torch.ones(3)

    def norm(x):
        return F.batch_norm(x, None, None, training=True).pow(3).sum()

    with FastNorms():
        F.batch_norm(x, mean, var, training=True)
        F.batch_norm(x, mean, var)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            F.batch_norm(torch.randn(1, 3), None, None, training=True)
        grad(norm)(x)
        checkpoint(norm, x, use_reentrant=False).backward()
        assert not used and float(mean.abs().sum()) > 0
        norm(x)
        assert used


@pytest.mark.counts
def test_a_solver_s_gradients_use_it_and_no_other_function_s_do(monkeypatch) -> None:
    torch.manual_seed(0)
    used = uses(monkeypatch)
    x, a = torch.randn(3, 8, 2, dtype=F64), torch.rand(3, 2, dtype=F64, requires_grad=True)

    def objective(w, x, a):
        return (F.batch_norm(x @ w, None, None, training=True).tanh() * a).sum() + (w**2).sum()

    settings = {
        "solver": bilevel.GradientDescent(0.05, 30), "linear_solver": bilevel.CG(), "on_failure": "ignore"
    }  # fmt: skip
    layer = bilevel.argmin(objective, **settings)
    w = vmap(layer, in_dims=(None, 0, 0))(torch.eye(2, dtype=F64), x, a)
    assert len(used) >= 30 and FastHVP.normalises(objective)
    monkeypatch.setattr(batch_norm, "_MANY", 10**9)
    expected = vmap(bilevel.argmin(objective, **settings), in_dims=(None, 0, 0))(torch.eye(2, dtype=F64), x, a)
    torch.testing.assert_close(w, expected, atol=1e-10, rtol=1e-10)
    plain = bilevel.argmin(lambda w, a: ((w - a) ** 2).sum())
    plain(torch.zeros(2, dtype=F64), a[0])
    assert not FastHVP.normalises(plain.function)


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
