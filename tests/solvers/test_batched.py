"""A user's solver that takes a whole batch: called once under ``vmap``, with the values and derivatives of a plain function."""

import pytest
import torch

import bilevel


def objective(x, a, b):
    return 0.5 * ((x["u"] - a) ** 2).sum() + 0.5 * b * (x["u"] ** 2).sum() + 0.5 * ((x["v"] - b) ** 2)


def counting():
    seen = []

    @bilevel.BatchedSolver
    def solver(batched, init, a, b):
        seen.append((init["u"].shape, init["v"].shape, a.shape, b.shape, batched(init, a, b).shape))
        return {"u": a / (1 + b[:, None]), "v": b}

    return solver, seen


def start(dtype=torch.float64):
    return {"u": torch.zeros(2, dtype=dtype), "v": torch.zeros((), dtype=dtype)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_vmap_calls_the_solver_once(dtype):
    solver, seen = counting()
    layer = bilevel.argmin(objective, solver=solver)
    a = torch.randn(5, 2, dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()
    b = torch.tensor(0.7, dtype=dtype, requires_grad=True)
    x = torch.func.vmap(lambda one: layer(start(dtype), one, b))(a)
    assert seen == [((5, 2), (5,), (5, 2), (5,), (5,))]
    found = torch.autograd.grad(x["u"].sin().sum() + x["v"].sum(), (a, b))
    closed = (a / (1 + b)).sin().sum() + 5 * b
    for one, other in zip(found, torch.autograd.grad(closed, (a, b)), strict=True):
        torch.testing.assert_close(one, other)
    assert len(seen) == 1


def test_levels_of_vmap_are_one_axis():
    solver, seen = counting()
    layer = bilevel.argmin(objective, solver=solver)
    a, b = torch.arange(6, dtype=torch.float64).reshape(3, 2), torch.linspace(0.5, 2, 4, dtype=torch.float64)
    inner = torch.func.vmap(lambda s, t: layer(start(), s, t)["u"], (None, 0))
    x = torch.func.vmap(inner, (0, None))(a, b)
    assert seen == [((12, 2), (12,), (12, 2), (12,), (12,))]
    torch.testing.assert_close(x, a[:, None] / (1 + b[None, :, None]))


def test_a_lone_call_is_a_batch_of_one():
    solver, seen = counting()
    a, b = torch.ones(2, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    x = bilevel.argmin(objective, solver=solver)(start(), a, b)
    assert seen[0][0] == (1, 2)
    torch.testing.assert_close(x["u"], a / 2)


def test_second_derivatives():
    solver, _ = counting()
    layer = bilevel.argmin(objective, solver=solver)
    a = torch.ones(3, 2, dtype=torch.float64)
    b = torch.linspace(0.5, 2, 3, dtype=torch.float64)
    hessian = torch.func.vmap(torch.func.hessian(lambda t, s: layer(start(), s, t)["u"].sum()))(b, a)
    torch.testing.assert_close(hessian, 4 / (1 + b) ** 3)


def test_with_bounds_and_with_a_proximal_term():
    calls = []

    @bilevel.BatchedSolver
    def clip(_, init, a):
        calls.append(len(init))
        return a.clamp(min=0)

    @bilevel.BatchedSolver
    def soft(_, init, a):
        calls.append(len(init))
        return a.sign() * (a.abs() - 0.5).clamp(min=0)

    a = torch.tensor([[1.0, -1.0], [-2.0, 3.0]], dtype=torch.float64, requires_grad=True)
    square = lambda x, a: 0.5 * ((x - a) ** 2).sum()
    for layer in (
        bilevel.argmin(square, lower=0.0, solver=clip),
        bilevel.argmin(square, prox=bilevel.prox.L1(0.5), solver=soft),
    ):
        calls.clear()
        x = torch.func.vmap(layer)(torch.zeros_like(a), a)
        (slope,) = torch.autograd.grad(x.sum(), a)
        torch.testing.assert_close(slope, (x != 0).to(a))
        assert calls == [2]


def test_an_answer_without_the_batch_axis_is_refused():
    layer = bilevel.argmin(lambda x, a: ((x - a) ** 2).sum(), solver=bilevel.BatchedSolver(lambda _, init, a: a[0]))
    with pytest.raises(bilevel.ShapeError, match="batch axis of 3"):
        torch.func.vmap(layer)(torch.zeros(3, 2), torch.ones(3, 2))


def test_one_wrong_answer_fails_alone():
    layer = bilevel.argmin(
        lambda x, a: ((x - a) ** 2).sum(),
        solver=bilevel.BatchedSolver(lambda _, init, a: a + (a[:, :1] == 2)),
        on_failure="nan",
    )
    a = torch.tensor([[1.0, 1.0], [2.0, 2.0]], requires_grad=True)
    x = torch.func.vmap(layer)(torch.zeros(2, 2), a)
    (slope,) = torch.autograd.grad(x.sum(), a)
    assert torch.isfinite(slope[0]).all() and torch.isnan(slope[1]).all()


def test_what_is_no_function_is_refused():
    with pytest.raises(bilevel.ArgumentError, match="expected a function"):
        bilevel.BatchedSolver(3)
