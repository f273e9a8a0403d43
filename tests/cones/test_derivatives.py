"""Derivatives of cone programs: finite differences, every order, mode and transform."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import hessian, jacfwd, jacrev, vmap

import bilevel
from bilevel import cone_program, cones
from bilevel.cones import Cone
from tests.cones.programs import CONES, F64, random_program

ONE_KIND: dict[str, list[Cone]] = {
    "equations": [cones.Zero(2)],
    "inequalities": [cones.Nonnegative(5)],
    "second-order": [cones.SecondOrder(3), cones.SecondOrder(3), cones.SecondOrder(4)],
    "semidefinite": [cones.PSDTriangle(3)],
}


def required(data: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return tuple(t.clone().requires_grad_() for t in data.values())


@pytest.mark.parametrize("smoothing", [None, 0.1])
@pytest.mark.parametrize("kind", ONE_KIND)
def test_gradcheck(kind: str, smoothing: float | None) -> None:
    factors = ONE_KIND[kind]
    check = lambda *args: cone_program(*args, factors, smoothing=smoothing)
    arguments = required(random_program(4, factors))
    assert gradcheck(check, arguments, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert gradgradcheck(check, arguments, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("name", ["P", "q", "A", "b"])
def test_gradcheck_of_each_argument(name: str) -> None:
    data = random_program(4, CONES, seed=1)
    check = lambda value: cone_program(**{**data, name: value}, cones=CONES)
    assert gradcheck(check, (data[name].clone().requires_grad_(),), check_forward_ad=True, fast_mode=name in "PA")


def test_multipliers_and_slacks_are_differentiable() -> None:
    def check(*args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        solution = cone_program.solve(*args, CONES)
        return solution.multipliers, solution.slacks

    arguments = required(random_program(4, CONES, seed=1))
    assert gradcheck(check, arguments, check_forward_ad=True, fast_mode=True)
    P, q, A, b = arguments
    multipliers, slacks = check(*arguments)
    x = cone_program(*arguments, CONES)
    for left in (0.5 * (P + P.mT) @ x + q + A.mT @ multipliers, A @ x + slacks - b):
        assert all(g.abs().max() < 1e-9 for g in torch.autograd.grad(left.sum(), arguments, retain_graph=True))


def test_third_order() -> None:
    data = random_program(4, CONES, seed=1)
    P, others = data.pop("P"), data

    def f(t: torch.Tensor) -> torch.Tensor:
        return cone_program(P * torch.exp(t), **others, cones=CONES).pow(3).sum()

    t, step = torch.tensor(0.1, dtype=F64), 1e-4
    third, second = jacrev(jacrev(jacrev(f)))(t), hessian(f)
    torch.testing.assert_close(third, (second(t + step) - second(t - step)) / (2 * step), rtol=1e-5, atol=1e-5)


def test_every_mode_gives_the_same_jacobians() -> None:
    data = random_program(4, CONES, 3, seed=4)
    everything = (0, 1, 2, 3)
    solve = lambda *args: cone_program(*args, CONES)
    reverse = vmap(jacrev(solve, everything))(*data.values())
    forward = vmap(jacfwd(solve, everything))(*data.values())
    loop = [jacrev(solve, everything)(*(t[i] for t in data.values())) for i in range(3)]
    for k in everything:
        torch.testing.assert_close(reverse[k], forward[k], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(reverse[k], torch.stack([one[k] for one in loop]), rtol=1e-9, atol=1e-9)
    assert any(float(one.abs().max()) > 0.1 for one in reverse)


def test_second_derivatives_under_vmap() -> None:
    data = random_program(4, CONES, 2, seed=4)
    q = data.pop("q")
    value = lambda q, P, A, b: cone_program(P, q, A, b, CONES).square().sum()
    batched = vmap(hessian(value))(q, *data.values())
    for i in range(2):
        one = jacrev(jacfwd(value))(q[i], *(t[i] for t in data.values()))
        torch.testing.assert_close(batched[i], one, rtol=1e-8, atol=1e-8)


def test_what_problems_share_receives_the_sum() -> None:
    data = random_program(4, CONES, 3, seed=4)
    A = data["A"][0].clone().requires_grad_()
    x = cone_program(data["P"], data["q"], A, data["b"][0], CONES)
    (together,) = torch.autograd.grad(x.square().sum(), A)
    each = [cone_program(data["P"][i], data["q"][i], A, data["b"][0], CONES).square().sum() for i in range(3)]
    (summed,) = torch.autograd.grad(torch.stack(each).sum(), A)
    torch.testing.assert_close(together, summed, rtol=1e-9, atol=1e-9)


def test_single_precision_has_the_derivatives_of_double() -> None:
    data = random_program(4, CONES, seed=1)
    single = {name: t.float().requires_grad_() for name, t in data.items()}
    double = {name: t.detach().double().requires_grad_() for name, t in single.items()}
    x, exact = (cone_program(**d, cones=CONES) for d in (single, double))
    assert x.dtype == torch.float32
    mine, theirs = (torch.autograd.grad(t.sum(), tuple(d.values())) for t, d in ((x, single), (exact, double)))
    for one, two in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, two.float(), rtol=1e-5, atol=1e-6)


def test_sparse_derivatives_of_second_order() -> None:
    data = random_program(4, CONES, seed=1)

    def product(A: torch.Tensor) -> torch.Tensor:
        value = cone_program(data["P"], data["q"], A.to_sparse(), data["b"], CONES).square().sum()
        (grad,) = torch.autograd.grad(value, A, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), A)[0]

    A = data["A"].requires_grad_()
    value = cone_program(data["P"], data["q"], A, data["b"], CONES).square().sum()
    (grad,) = torch.autograd.grad(value, A, create_graph=True)
    torch.testing.assert_close(product(A), torch.autograd.grad(grad.square().sum(), A)[0], rtol=1e-7, atol=1e-7)
    # Of its values torch differentiates a sparse tensor once.
    entries = A.detach().to_sparse()
    values = entries.values().requires_grad_()
    made = torch.sparse_coo_tensor(entries.indices(), values, A.shape, check_invariants=False)
    value = cone_program(data["P"], data["q"], made, data["b"], CONES).square().sum()
    assert torch.autograd.grad(value, values, retain_graph=True)[0].shape == values.shape
    with pytest.raises(bilevel.ArgumentError, match="differentiated twice"):
        torch.autograd.grad(value, values, create_graph=True)
