"""Operations that torch differentiates once only: rewritten, they are the same functions, with right second derivatives."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.autograd import gradgradcheck
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import bilevel
from bilevel._torch.double_backward import Repeatable

F64 = torch.float64


@pytest.mark.parametrize(
    ("shape", "dim"), [((3, 4), 0), ((3, 4), 1), ((3, 4), -1), ((2, 3, 2), 0), ((2, 3, 2), 2), ((3,), 0)]
)
def test_weight_norm(shape: tuple[int, ...], dim: int) -> None:
    v = torch.randn(shape, dtype=F64, requires_grad=True)
    g = (1.3 * torch.norm_except_dim(v.detach(), 2, dim)).requires_grad_(True)
    theirs = torch._weight_norm(v, g, dim)
    with Repeatable():
        torch.testing.assert_close(torch._weight_norm(v, g, dim), theirs)
        assert gradgradcheck(lambda v, g: torch._weight_norm(v, g, dim), (v, g))


MASK = torch.tensor([[True, False, True], [True, True, True], [False, False, True]])


@pytest.mark.parametrize(
    "options",
    [{}, {"attn_mask": MASK}, {"attn_mask": torch.randn(3, 3, dtype=F64)}, {"is_causal": True}, {"scale": 0.3}],
    ids=["plain", "mask", "bias", "causal", "scale"],
)
def test_attention(options: dict[str, object]) -> None:
    inputs = tuple(torch.randn(2, 2, 3, 2, dtype=F64, requires_grad=True) for _ in range(3))
    theirs = F.scaled_dot_product_attention(*inputs, **options)
    with Repeatable():
        torch.testing.assert_close(F.scaled_dot_product_attention(*inputs, **options), theirs)
        mapped = vmap(lambda *parts: F.scaled_dot_product_attention(*parts, **options))(*inputs)
        torch.testing.assert_close(mapped, theirs)
        assert gradgradcheck(lambda *parts: F.scaled_dot_product_attention(*parts, **options), inputs)


@pytest.mark.parametrize("need_weights", [True, False])
def test_many_heads(need_weights: bool) -> None:
    module, x = torch.nn.MultiheadAttention(4, 2, batch_first=True).double(), torch.randn(2, 3, 4, dtype=F64)
    theirs, weights = module(x, x, x, need_weights=need_weights, attn_mask=~MASK)
    with Repeatable():
        ours, same = module(x, x, x, need_weights=need_weights, attn_mask=~MASK)
    torch.testing.assert_close(ours, theirs)
    assert (weights is None) == (same is None)


class Attentive(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = torch.nn.MultiheadAttention(2, 1, batch_first=True), torch.nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize(
    "module",
    [
        torch.nn.Sequential(torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 2)), torch.nn.Tanh()),
        Attentive(),
    ],
    ids=["weight norm", "attention"],
)
@pytest.mark.parametrize(
    "solvers", [{}, {"solver": bilevel.LBFGS(), "linear_solver": bilevel.CG()}], ids=["Newton", "CG"]
)
def test_a_hypergradient_through_them_is_right(module: torch.nn.Module, solvers: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = copy.deepcopy(module).double()
    with torch.no_grad():  # what it was made with depends on what was drawn before
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter) + 0.5)
    x, y = torch.randn(2, 4, 2, dtype=F64), torch.randn(2, 4, 1, dtype=F64)
    start = {name: p.detach() for name, p in model.named_parameters()}

    def objective(w, a):
        distance = sum((w[name] - start[name]).square().sum() for name in w)
        return (functional_call(model, w, x) - y).square().mean() + a.exp() * distance

    a = torch.tensor(0.5, dtype=F64, requires_grad=True)
    w = bilevel.argmin(objective, **solvers)(start, a)
    (got,) = torch.autograd.grad(sum(p.sum() for p in w.values()), a)
    # The reference takes first derivatives alone: the Hessian by central differences of the gradient.
    flat = bilevel.ravel({name: p.detach() for name, p in w.items()})

    def slope(point: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        parts = torch.split(point, [p.numel() for p in start.values()])
        tree = {name: part.reshape(p.shape) for part, (name, p) in zip(parts, start.items(), strict=True)}
        return bilevel.ravel(grad(objective)(tree, a))

    steps, at = 1e-5 * torch.eye(flat.numel(), dtype=F64), a.detach()
    hessian = torch.stack([(slope(flat + e, at) - slope(flat - e, at)) / 2e-5 for e in steps])
    mixed = (slope(flat, at + 1e-5) - slope(flat, at - 1e-5)) / 2e-5
    torch.testing.assert_close(got, -torch.linalg.solve(hessian, mixed).sum(), rtol=1e-6, atol=1e-8)


def weight_normed() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 1)).double()


def test_a_function_holds_them_for_some_of_its_arguments() -> None:
    """A model without them, which the function saw first, tells nothing of another one."""
    X, y = torch.randn(6, 2, dtype=F64), torch.randn(6, 1, dtype=F64)

    def objective(w, strength, net):
        misfit = functional_call(net, w, (X,)) - y
        return (misfit**2).mean() + strength * ((bilevel.ravel(w) - 0.5) ** 2).sum()

    used, fresh = (bilevel.argmin(lambda *args: objective(*args), linear_solver=bilevel.CG(20)) for _ in range(2))

    def slope(layer, net):
        strength = torch.tensor(1.0, dtype=F64, requires_grad=True)
        w = layer({name: p.detach() for name, p in net.named_parameters()}, strength, net)
        return torch.autograd.grad(bilevel.ravel(w).square().sum(), strength)[0]

    slope(used, torch.nn.Linear(2, 1).double())
    torch.testing.assert_close(slope(used, weight_normed()), slope(fresh, weight_normed()))


@pytest.mark.parametrize("module", [weight_normed(), Attentive().double()], ids=["weight norm", "attention"])
def test_what_a_hypergradient_knows_of_its_error_is_right(module: torch.nn.Module) -> None:
    """Bounds, refined and corrected gradients are made of second derivatives of both objectives, too."""
    torch.manual_seed(0)
    shape = (4, 3, 2) if isinstance(module, Attentive) else (12, 2)
    X = torch.randn(shape, dtype=F64)

    class Problem(bilevel.BilevelProblem):
        def inner_objective(self, inner, outer, data):
            return (functional_call(module, inner, (X,)) - 1).square().mean() + outer * (
                bilevel.ravel(inner) - 0.5
            ).square().sum()

        def outer_objective(self, inner, outer, data):
            return (functional_call(module, inner, (X,)) - 0.3).square().mean()

    init = {name: p.detach() for name, p in module.named_parameters()}
    result = Problem().hypergradient(torch.tensor(1.0, dtype=F64), (), init=init)
    torch.testing.assert_close(result.corrected_grad, result.grad, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(result.refined().grad, result.grad, rtol=1e-7, atol=1e-10)
    assert result.error_bound < 1e-8


def test_second_derivatives_of_an_outer_loss_that_alone_holds_them() -> None:
    module = weight_normed()
    X = torch.randn(5, 2, dtype=F64)

    class Problem(bilevel.BilevelProblem):
        def inner_objective(self, inner, outer, data):
            return ((bilevel.ravel(inner) - outer) ** 2).sum()

        def outer_objective(self, inner, outer, data):
            return functional_call(module, inner, (X,)).square().mean()

    init = {name: p.detach() for name, p in module.named_parameters()}
    outer = torch.linspace(0.5, 1.5, bilevel.ravel(init).numel(), dtype=F64, requires_grad=True)
    problem = Problem()
    assert gradgradcheck(lambda outer: problem(outer, (), init=init), outer)
    free = outer.detach().clone().requires_grad_(True)
    checkpoint(lambda free: Problem()(free, (), init=init), free, use_reentrant=False).backward()
    torch.testing.assert_close(free.grad, torch.autograd.grad(problem(outer, (), init=init), outer)[0])
