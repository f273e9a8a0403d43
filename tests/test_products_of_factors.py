"""prod and cumprod: rewritten, they are the same functions, with right derivatives of every order where factors are small or zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import bilevel
from bilevel._torch.double_backward import Repeatable

F64 = torch.float64
Tensor = torch.Tensor
FACTORS = {
    "small": [1e-17, 2.0, 3.0, -1.0],
    "two small": [1e-9, 1e-17, 3.0, 1.0],
    "smallest": [1e-300, 2.0, 3.0, 1.0],
    "zero": [0.0, 2.0, 3.0, 1.0],
    "two zeros": [0.0, 2.0, 0.0, 1.0],
    "three zeros": [0.0, 0.0, 3.0, 0.0],
    "zero beside small": [0.0, 1e-17, 3.0, 2.0],
    "ordinary": [0.5, 2.0, 3.0, -1.0],
}
CALLS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "method": (lambda x: x.prod(), lambda x: x[0] * x[1] * x[2] * x[3]),
    "function": (lambda x: torch.prod(x.reshape(2, 2)), lambda x: x[0] * x[1] * x[2] * x[3]),
    "axis": (lambda x: torch.prod(x.reshape(2, 2), 0), lambda x: torch.stack([x[0] * x[2], x[1] * x[3]])),
    "kept": (lambda x: x.reshape(2, 2).prod(-1, keepdim=True), lambda x: torch.stack([x[:1] * x[1], x[2:3] * x[3]])),
    "three": (lambda x: x[:3].prod(dim=0), lambda x: x[0] * x[1] * x[2]),
    "cumprod": (
        lambda x: x.cumprod(0),
        lambda x: torch.stack([x[0], x[0] * x[1], x[0] * x[1] * x[2], x[0] * x[1] * x[2] * x[3]]),
    ),
    "cumprod of rows": (
        lambda x: torch.cumprod(x.reshape(2, 2), dim=1),
        lambda x: torch.stack([torch.stack([x[0], x[0] * x[1]]), torch.stack([x[2], x[2] * x[3]])]),
    ),
}
ORDERS: dict[str, Callable[[Any], Any]] = {
    "first": jacrev,
    "reverse over reverse": lambda f: jacrev(jacrev(f)),
    "forward over reverse": hessian,
    "forward over forward": lambda f: jacfwd(jacfwd(f)),
    "third": lambda f: jacrev(jacrev(jacrev(f))),
    "third, mixed": lambda f: jacfwd(hessian(f)),
}


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("call", CALLS)
def test_derivatives_are_those_of_multiplications(call: str, order: str, dtype: torch.dtype) -> None:
    written, plain = CALLS[call]
    x = torch.tensor(list(FACTORS.values()), dtype=dtype)
    right = vmap(ORDERS[order](plain))(x.double())
    with Repeatable():
        batched = vmap(ORDERS[order](written))(x)
        single = torch.stack([ORDERS[order](written)(row) for row in x])
    accuracy = 4 * torch.finfo(dtype).eps
    for found in (batched, single):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), right, rtol=accuracy, atol=1e-44)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13])
def test_sizes(size: int) -> None:
    x = torch.randn(3, size, 2, generator=torch.Generator().manual_seed(size), dtype=F64).requires_grad_()
    for call in (lambda x: x.prod(), lambda x: x.prod(1), lambda x: x.prod(1, True), lambda x: x.cumprod(1)):
        theirs = call(x)
        with Repeatable():
            torch.testing.assert_close(call(x), theirs)
            assert gradcheck(call, (x,))
            assert gradgradcheck(call, (x,))


def test_the_rest_is_left_to_torch() -> None:
    whole, flags, empty = torch.tensor([2, 3]), torch.tensor([True, False]), torch.zeros(2, 0)
    with Repeatable():
        assert whole.prod().dtype == torch.int64 and int(whole.prod()) == 6
        assert int(flags.prod()) == 0
        assert empty.prod(1).tolist() == [1.0, 1.0] and float(empty.prod()) == 1.0
        assert whole.cumprod(0).tolist() == [2, 6] and empty.cumprod(1).shape == (2, 0)
        assert whole.prod(dtype=F64).dtype == F64 and whole.cumprod(0, dtype=F64).dtype == F64
        assert float(torch.tensor(3.0).prod()) == 3.0 and float(torch.tensor(3.0).prod(0)) == 3.0
        assert torch.tensor(3.0).cumprod(0).shape == ()
        assert torch.prod(torch.tensor([1j, 2j])) == -2
        out = torch.zeros(2)
        torch.prod(torch.ones(2, 3), 1, out=out)
        assert out.tolist() == [1.0, 1.0]
        with pytest.raises(IndexError):
            torch.ones(2).prod(3)


KINDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "prod": lambda x, a: ((x - a) ** 2).sum() + x.prod(),
    "cumprod": lambda x, a: ((x - a) ** 2).sum() + x.cumprod(0)[1],
}


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("a", [(1.0, 2.0), (2.0, 1.0), (1.5, 3.0)])
def test_a_minimum_where_a_factor_is_rounding(a: tuple[float, float], kind: str, dtype: torch.dtype) -> None:
    """2 (x − a) + (x₁, x₀) = 0: x = (4a − 2 (a₁, a₀)) / 3, one of which is zero."""
    layer = bilevel.argmin(KINDS[kind])
    theta = torch.tensor(a, dtype=dtype)
    matrix = torch.tensor([[4.0, -2.0], [-2.0, 4.0]], dtype=dtype) / 3
    accuracy = 1e-9 if dtype == F64 else 1e-4
    for start in ((0.0, 0.0), (1.0, 1.0), (5.0, -3.0)):
        x = lambda t, start=start: layer(torch.tensor(start, dtype=dtype), t)
        torch.testing.assert_close(x(theta), matrix @ theta, rtol=accuracy, atol=accuracy)
        torch.testing.assert_close(jacrev(x)(theta), matrix, rtol=accuracy, atol=accuracy)
        second = jacrev(jacrev(x))(theta)
        torch.testing.assert_close(second, torch.zeros_like(second), rtol=0, atol=100 * accuracy)
    starts = torch.tensor([[0.0, 0.0], [1.0, 1.0], [5.0, -3.0]], dtype=dtype)
    slopes = vmap(jacrev(lambda t, s: layer(s, t)), in_dims=(None, 0))(theta, starts)
    torch.testing.assert_close(slopes, matrix.expand(3, 2, 2), rtol=accuracy, atol=accuracy)


def test_an_outer_objective_with_a_product() -> None:
    class Problem(bilevel.BilevelProblem):
        def inner_objective(self, inner: Tensor, outer: Tensor, data: Any) -> Tensor:
            return 0.5 * ((inner - outer) ** 2).sum()

        def outer_objective(self, inner: Tensor, outer: Tensor, data: Any) -> Tensor:
            return inner.prod()

    theta = torch.tensor([1e-17, 2.0, 3.0], dtype=F64)
    problem = Problem()
    loss = lambda t: problem(t, None, init=torch.zeros(3, dtype=F64))
    torch.testing.assert_close(grad(loss)(theta), torch.tensor([6.0, 3e-17, 2e-17], dtype=F64), atol=1e-14, rtol=1e-9)
    right = torch.tensor([[0.0, 3.0, 2.0], [3.0, 0.0, 0.0], [2.0, 0.0, 0.0]], dtype=F64)
    torch.testing.assert_close(jacrev(grad(loss))(theta), right, atol=1e-9, rtol=1e-9)
