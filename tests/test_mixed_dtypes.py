"""An unknown in one floating-point dtype and arguments in another: the solution has the dtype of the unknown, a gradient that of its argument."""

from collections.abc import Callable

import pytest
import torch

import bilevel

F32, F64 = torch.float32, torch.float64
Layer = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def curve(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    return torch.cat([x - c, 0.1 * x.exp()])


def square(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    return ((x - c) ** 2).sum()


def program(init: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    return bilevel.quadratic_program(2 * torch.eye(2, dtype=init.dtype), -c, upper=torch.full_like(init, 1.5))


LAYERS: dict[str, Layer] = {
    "argmin": bilevel.argmin(lambda x, c: square(x, c) + (x**4).sum()),
    "root": bilevel.root(lambda x, c: x**3 + x - c),
    "fixed_point": bilevel.fixed_point(lambda x, c: 0.3 * c * x.cos()),
    "linear_solve": lambda init, c: bilevel.linear_solve(lambda v, c: c * v + v)(init + 1, c),
    "least_squares": bilevel.least_squares(curve),
    "robust": bilevel.least_squares(curve, loss=bilevel.robust.Huber(0.3)),
    "least_squares in bounds": bilevel.least_squares(curve, upper=1.5),
    "prox": bilevel.argmin(square, prox=lambda c: bilevel.prox.L1(0.1 * c)),
    "bounds": bilevel.argmin(square, upper=1.5),
    "inequality": bilevel.argmin(square, inequality=lambda x, c: x.sum() - c[1]),
    "equality": bilevel.argmin(square, equality=lambda x, c: x.sum() - c[0]),
    "quadratic_program": program,
    "unrolled": bilevel.argmin(
        square, solver=bilevel.GradientDescent(0.1, 200), differentiation=bilevel.Unrolled()
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("unknown", "argument"), [(F32, F64), (F64, F32)])
def test_an_argument_may_have_another_dtype_than_the_unknown(name: str, unknown: torch.dtype, argument: torch.dtype):
    found = []
    for kinds in ((unknown, argument), (F64, F64)):
        c = torch.tensor([0.9, 1.8], dtype=kinds[1], requires_grad=True)
        x = LAYERS[name](torch.zeros(2, dtype=kinds[0]), c)
        (grad,) = torch.autograd.grad(x.double().square().sum(), c)
        widest = torch.promote_types(*kinds)  # a quadratic program has no initial guess
        assert x.dtype == (widest if name == "quadratic_program" else kinds[0]) and grad.dtype == kinds[1]
        found.append((x.double(), grad.double()))
    (x, grad), (reference, of_reference) = found
    torch.testing.assert_close(x, reference, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad, of_reference, rtol=2e-3, atol=2e-3)


def game(init: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    simplex = bilevel.prox.Simplex()
    layer = bilevel.equilibrium(
        [lambda x, y, c: x @ torch.diag(c) @ y, lambda x, y, c: -(x @ torch.diag(c) @ y)], prox=[simplex, simplex]
    )
    return torch.cat(layer((init + 0.5, init + 0.5), c))


def bent(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    return x**3 + x + 0.5 * x.flip(0) ** 2 - c


OTHERS: dict[str, Layer] = {
    "more unknowns than residuals": bilevel.least_squares(lambda x, c: (x.sin() * c).sum().reshape(1) - 1, on_failure="ignore"),
    "GMRES": bilevel.root(bent, linear_solver=bilevel.GMRES()),
    "matrix game": game,
}  # fmt: skip


@pytest.mark.parametrize("name", [*LAYERS, *OTHERS])
def test_the_default_dtype_of_torch_does_not_matter(name: str):
    found, before = [], torch.get_default_dtype()
    for default in (F32, F64):
        torch.set_default_dtype(default)
        try:
            c = torch.tensor([0.9, 1.8], dtype=F32, requires_grad=True)
            x = {**LAYERS, **OTHERS}[name](torch.zeros(2, dtype=F32), c)
            (grad,) = torch.autograd.grad(x.square().sum(), c)
        finally:
            torch.set_default_dtype(before)
        assert x.dtype == grad.dtype == F32
        found.append((x, grad))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
