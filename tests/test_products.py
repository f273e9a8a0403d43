"""Products with Hessians of convolutional networks beside torch's own second derivatives."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import vmap
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import bilevel
from bilevel._torch.convolution import FastHVP
from bilevel._torch.norms import WrittenNorms
from bilevel.equations.problem import Problem
from bilevel.equations.system import ArgminSystem
from bilevel.layers.layer import Layer
from bilevel.pytree import Raveler

F64 = torch.float64


def products(loss, parameters, quick: bool, seed: int = 1):
    """Return the gradient and H u of ``loss(parameters)``, with the rules under test or without."""
    leaves = [p.detach().clone().requires_grad_(True) for p in parameters]
    generator = torch.Generator().manual_seed(seed)
    if quick:
        with FastHVP():
            gradient = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    else:
        gradient = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    u = [torch.randn(g.shape, generator=generator, dtype=g.dtype) for g in gradient]
    return gradient, torch.autograd.grad(gradient, leaves, u, retain_graph=True, materialize_grads=True)


def agree(loss, *parameters: torch.Tensor) -> None:
    for mine, theirs in zip(products(loss, parameters, True), products(loss, parameters, False), strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
            assert float(b.detach().norm()) > 0


CONVOLUTIONS = [
    (F.conv1d, (3, 4, 9), (6, 4, 3), {"stride": 2, "padding": 1}),
    (F.conv2d, (2, 4, 6, 7), (6, 4, 3, 2), {"padding": (1, 0), "dilation": (1, 2)}),
    (F.conv2d, (2, 4, 6, 6), (6, 2, 3, 3), {"groups": 2, "stride": (2, 1)}),
    (F.conv2d, (2, 4, 5, 5), (4, 4, 3, 3), {"padding": "same"}),
    (F.conv3d, (1, 2, 4, 4, 5), (3, 2, 2, 2, 2), {}),
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("convolve", "shape", "weight", "how"), CONVOLUTIONS)
def test_convolution(convolve, shape, weight, how, bias) -> None:
    torch.manual_seed(0)
    x, w, b = torch.randn(shape, dtype=F64), torch.randn(weight, dtype=F64), torch.randn(weight[0], dtype=F64)
    if bias:
        agree(lambda x, w, b: convolve(x, w, b, **how).sin().sum(), x, w, b)
    else:
        agree(lambda x, w: convolve(x, w, **how).sin().sum(), x, w)


@pytest.mark.parametrize("dims", [(0, 0), (0, None), (None, 0), (2, 1)])
def test_convolutions_under_vmap(dims) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(2, 4, 5, 6, dtype=F64), torch.randn(6, 2, 3, 3, dtype=F64)
    x, w = (
        t if d is None else torch.stack([t, t.flip(-1).cos(), t.sin()], d) for t, d in zip((x, w), dims, strict=True)
    )
    mapped = vmap(lambda x, w: F.conv2d(x, w, stride=2, padding=1, groups=2).sin().sum(), in_dims=dims)
    agree(lambda x, w: (mapped(x, w) * torch.arange(1.0, 4.0, dtype=F64)).sum(), x, w)


def test_convolutions_under_two_vmaps() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(2, 3, 2, 2, 5, dtype=F64), torch.randn(3, 2, 2, 2, dtype=F64)
    mapped = vmap(vmap(lambda x, w: F.conv1d(x, w).sin().sum()), in_dims=(0, None))
    agree(lambda x, w: mapped(x, w).square().sum(), x, w)


@pytest.mark.parametrize("affine", ["both", "weight", "neither"])
@pytest.mark.parametrize("shape", [(7, 3), (4, 3, 5), (3, 2, 4, 3)])
def test_batch_norm(shape, affine) -> None:
    torch.manual_seed(0)
    x, gamma, beta = (torch.randn(s, dtype=F64) for s in (shape, shape[1], shape[1]))

    def loss(x, gamma=None, beta=None):
        y = F.batch_norm(x, None, None, gamma, beta, training=True, eps=1e-3)
        return (y.sin() * torch.arange(y.numel(), dtype=F64).reshape(y.shape)).sum()

    agree(loss, *{"both": (x, gamma, beta), "weight": (x, gamma), "neither": (x,)}[affine])


@pytest.mark.parametrize("shared", [False, True])
def test_batch_norm_under_vmap(shared) -> None:
    torch.manual_seed(0)
    x, gamma, beta = torch.randn(5, 4, 2, 3, dtype=F64), torch.randn(5, 2, dtype=F64), torch.randn(2, dtype=F64)
    gamma = gamma[0] if shared else gamma
    mapped = vmap(
        lambda x, gamma, beta: F.batch_norm(x, None, None, gamma, beta, training=True).sin().pow(3).sum(),
        in_dims=(0, None if shared else 0, None),
    )
    agree(lambda *a: (mapped(*a) * torch.arange(1.0, 6.0, dtype=F64)).sum(), x, gamma, beta)


def test_third_derivatives_of_a_batch_norm_are_right() -> None:
    """torch's own take for constants what the forward pass saved."""
    torch.manual_seed(0)
    x, gamma = torch.randn(6, 2, dtype=F64), torch.randn(2, dtype=F64)
    found = []
    for mode in (FastHVP(), WrittenNorms()):
        leaves = [t.clone().requires_grad_(True) for t in (x, gamma)]
        with mode:
            value = F.batch_norm(leaves[0], None, None, leaves[1], training=True).pow(3).sum()
        for _ in range(3):
            first = torch.autograd.grad(value, leaves, create_graph=True)
            value = sum(g.pow(2).sum() for g in first)
        found.append(first)
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=1e-9)


def test_what_is_not_written_out_is_torch_s_own() -> None:
    """Running statistics are updated, single images taken, integers refused, as outside."""
    x, mean, var = torch.randn(5, 3), torch.zeros(3), torch.ones(3)
    with FastHVP():
        F.batch_norm(x, mean, var, training=True)
        assert F.conv2d(torch.randn(1, 4, 4), torch.randn(2, 1, 3, 3)).shape == (2, 2, 2)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            F.batch_norm(torch.randn(1, 3), None, None, training=True)
        with pytest.raises(RuntimeError):
            F.conv2d(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3, dtype=torch.int64))
    assert float(mean.abs().sum()) > 0


@pytest.mark.parametrize("way", ["checkpoint", "jvp", "dual"])
def test_functions_that_checkpoint_or_push_tangents_forward_keep_torch_s_rules(way: str) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(4, 1, 5, 5, dtype=F64), torch.randn(2, 1, 3, 3, dtype=F64)

    def net(w, x):
        return F.batch_norm(F.conv2d(x, w), None, None, training=True).tanh().mean((2, 3))

    def loss(w):
        if way == "checkpoint":
            return checkpoint(net, w, x, use_reentrant=False).square().sum()
        if way == "jvp":
            return torch.func.jvp(lambda x: net(w, x), (x,), (x.cos(),))[1].square().sum()
        with forward_ad.dual_level():
            pushed = F.conv2d(forward_ad.make_dual(x, x.cos()), w)
            return forward_ad.unpack_dual(pushed.sin()).tangent.square().sum()

    agree(loss, w)


def test_a_network_s_hessian_is_torch_s_own() -> None:
    """Dense, by single products, and by many at once."""
    torch.manual_seed(0)
    x, y = torch.randn(3, 6, 1, 5, 5, dtype=F64), torch.randint(3, (3, 6))
    sizes = {"w": (4, 1, 3, 3), "gamma": (4,), "beta": (4,), "head": (3, 4)}

    def objective(p, x, y):
        z = F.conv2d(x, p["w"], stride=2)
        z = F.batch_norm(z, None, None, p["gamma"], p["beta"], training=True).sigmoid()
        return F.cross_entropy(z.mean((-1, -2)) @ p["head"].T, y) + 0.1 * bilevel.ravel(p).square().sum()

    layer = Layer(ArgminSystem, objective, solver=None, linear_solver=None, tolerance=None, on_failure="raise")
    start = {name: torch.randn(s, dtype=F64) for name, s in sizes.items()}
    raveler = Raveler.of(start, "here")
    system, _ = layer._system(raveler, (x[0], y[0]), {})
    problem = Problem.of(system.lift(3, (True, True)), [x, y])
    at = torch.randn(3, raveler.size, dtype=F64)
    operator = problem.linearize(at).operator
    # torch's own hessian of a batch norm is wrong under vmap (see bilevel/_torch/norms.py).
    with WrittenNorms():
        H = torch.stack([torch.func.hessian(lambda w, i=i: system.output(w, x[i], y[i]))(at[i]) for i in range(3)])
    u = torch.randn(4, 3, raveler.size, dtype=F64)
    expected = torch.einsum("bij,kbj->kbi", H, u)
    torch.testing.assert_close(operator.matvec(u[0]), expected[0], atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(operator.matmat(u), expected, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(operator.dense(), H, atol=1e-11, rtol=1e-11)


def test_a_layer_takes_the_rules_into_use_at_its_second_linearisation() -> None:
    """They are for functions that were seen to need them; all derivatives stay the same."""
    torch.manual_seed(0)
    x = torch.randn(4, 1, 5, 5, dtype=F64)

    def objective(w, a):
        z = F.conv2d(x, w.reshape(2, 1, 3, 3))
        return F.batch_norm(z, None, None, training=True).tanh().mul(a).sum() + (w**2).sum()

    layer = bilevel.argmin(objective, linear_solver=bilevel.CG())
    a = torch.tensor(0.3, dtype=F64, requires_grad=True)
    found, nodes = [], []
    for _ in range(3):
        w = layer(torch.ones(18, dtype=F64), a)
        found.append(torch.autograd.grad(w.sum(), a)[0])
        with FastHVP.around(layer.function) as mode:
            nodes.append(mode is not None)
    assert nodes == [True] * 3
    torch.testing.assert_close(found[1:], [found[0]] * 2, atol=1e-9, rtol=1e-9)
    with FastHVP.around(lambda w, a: (w**2).sum()) as mode:
        assert mode is None
