"""Reverse mode as a transform, against torch.func's own."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import func

import bilevel
from bilevel._torch.reverse import grad, grad_and_value, reverse_pass, vjp

F64 = torch.float64
X, Y = torch.tensor([0.3, -1.0, 2.0], dtype=F64), torch.tensor([1.5, 0.5, -0.2], dtype=F64)


def scalar(x, y):
    return (x.sin() * y**2).sum() + x.prod()


def vector(x, y):
    return x.sin() * y**2 + x.prod()


def close(found, expected) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)


def test_gradients() -> None:
    close(grad(scalar, X, Y), func.grad(scalar, argnums=(0, 1))(X, Y))
    slopes, value = grad_and_value(scalar, X, Y)
    close((slopes, value), func.grad_and_value(scalar, argnums=(0, 1))(X, Y))
    assert not value.requires_grad
    close(grad(lambda x: torch.ones((), dtype=F64), X), (torch.zeros_like(X),))
    close(grad(lambda x, y: x.sum(), X, Y), (torch.ones_like(X), torch.zeros_like(Y)))


def test_products() -> None:
    found, pull = vjp(vector, X, Y)
    expected, theirs = func.vjp(vector, X, Y)
    close(found, expected)
    for u in (X, Y):
        close(pull(u), theirs(u))
    *_, aux = vjp(lambda x: (x**2, x.sum()), X, has_aux=True)
    close(aux, X.sum())
    pair, pull = vjp(lambda x: (x**2, x.sum()), X)
    close(pull(pair), func.vjp(lambda x: (x**2, x.sum()), X)[1](pair))


@pytest.mark.parametrize("outside", [func.grad, func.jacrev, func.jacfwd, func.hessian])
def test_inside_another_transform(outside) -> None:
    close(
        outside(lambda y: grad(scalar, X, y)[0].cos().sum())(Y),
        outside(lambda y: func.grad(scalar)(X, y).cos().sum())(Y),
    )
    close(
        outside(lambda y: vjp(vector, X, y)[1](y)[1].cos().sum())(Y),
        outside(lambda y: func.vjp(vector, X, y)[1](y)[1].cos().sum())(Y),
    )


def test_around_another_and_in_a_batch() -> None:
    close(
        grad(lambda x: grad(scalar, x, Y)[0].square().sum(), X)[0],
        func.grad(lambda x: func.grad(scalar)(x, Y).square().sum())(X),
    )
    rows = torch.stack([X, Y])
    close(
        func.vmap(lambda x: grad(scalar, x, Y)[1])(rows), func.vmap(lambda x: func.grad(scalar, argnums=1)(x, Y))(rows)
    )
    units = torch.eye(3, dtype=F64)
    close(func.vmap(vjp(vector, X, Y)[1])(units), func.vmap(func.vjp(vector, X, Y)[1])(units))


def test_under_no_grad_inference_mode_and_the_caller_s_graph() -> None:
    expected = func.grad(scalar)(X, Y)
    with torch.no_grad():
        close(grad(scalar, X, Y)[0], expected)
    pull, pulled = vjp(vector, X, Y)[1], func.vjp(vector, X, Y)[1](X)  # torch 2.9's own gives zeros in inference mode
    with torch.inference_mode():
        close(pull(X), pulled)
    y = Y.clone().requires_grad_()
    grad(scalar, X, y)[0].sum().backward()
    close(y.grad, func.grad(lambda y: func.grad(scalar)(X, y).sum())(Y))


def test_hooks_of_the_caller_s_are_hidden_and_those_of_the_function_refused() -> None:
    seen: list[torch.Tensor] = []
    expected = func.jacrev(func.grad(scalar))(X, Y).sum(0)

    def hooked(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            return scalar(x, y)

    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.append(t), t)[1], lambda t: t)
    for around in (contextlib.nullcontext(), hooks):
        with around:
            close(grad(lambda x: grad(scalar, x, Y)[0].sum(), X)[0], expected)
            with pytest.raises(bilevel.TransformError, match="saved-tensor hooks"):
                grad(hooked, X, Y)
    assert not seen
    hooked(X.clone().requires_grad_(True), Y).backward()  # and hooks are as before


def test_a_pass_over_a_graph() -> None:
    x = X.clone().requires_grad_()
    outputs = [x**2, x.exp(), torch.ones(3, dtype=F64)]
    close(reverse_pass(outputs, [x], [Y, X, X]), torch.autograd.grad(outputs[:2], x, [Y, X], retain_graph=True))
    close(reverse_pass(outputs, [Y.clone().requires_grad_(), x], [Y, X, X])[0], torch.zeros_like(Y))
    assert reverse_pass(outputs, [], [Y, X, X]) == ()
    (slope,) = reverse_pass([x**3], [x], [Y], create_graph=True)
    close(torch.autograd.grad(slope.sum(), x)[0], 6 * X * Y)
