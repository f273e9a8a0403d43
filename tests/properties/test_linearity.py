"""The derivative is a linear map: its products are linear, its two modes adjoint, and its own derivative symmetric."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from bilevel.testing import strategies as draw
from bilevel.testing.strategies import RandomProblem

from .support import assert_near, flat, implicit, normal, pull

REGULAR = draw.problems(regular=True)
seeds = st.integers(0, 1000)
factors = st.floats(-1e3, 1e3)


@given(REGULAR, draw.dtypes(), seeds, factors, factors)
def test_the_vjp_is_linear_in_its_cotangent(
    problem: RandomProblem, dtype: torch.dtype, seed: int, a: float, b: float
) -> None:
    problem = problem.to(dtype)
    u, v = (normal(flat(problem.init), seed + k) for k in range(2))
    function = implicit(problem)
    one, other, both = (pull(function, problem.args, w)[1] for w in (u, v, a * u + b * v))
    size = max(float(abs(a) * x.norm() + abs(b) * y.norm()) for x, y in zip(one, other, strict=True))
    assert_near(both, [a * x + b * y for x, y in zip(one, other, strict=True)], problem.stated_error, scale=size)


@given(REGULAR, draw.dtypes(), seeds)
def test_vjp_and_jvp_are_adjoint(problem: RandomProblem, dtype: torch.dtype, seed: int) -> None:
    problem = problem.to(dtype)
    cotangent = normal(flat(problem.init), seed)
    tangents = tuple(normal(argument, seed + 1 + k) for k, argument in enumerate(problem.args))
    _, pulled = pull(implicit(problem), problem.args, cotangent)
    _, pushed = torch.func.jvp(implicit(problem), problem.args, tangents)
    by_vjp = sum((g.double() * t.double()).sum() for g, t in zip(pulled, tangents, strict=True))
    by_jvp = (cotangent.double() * flat(pushed).double()).sum()
    size = sum(float(g.norm() * t.norm()) for g, t in zip(pulled, tangents, strict=True))
    assert abs(float(by_vjp - by_jvp)) <= problem.stated_error * max(size, float(cotangent.norm() * pushed.norm()))


@given(REGULAR, seeds)
def test_double_backward_is_symmetric(problem: RandomProblem, seed: int) -> None:
    # Second derivatives of ⟨w, x⟩ + sin⟨w, x⟩ in all arguments together.
    leaves = [argument.clone().requires_grad_(True) for argument in problem.args]
    weight = normal(flat(problem.init), seed)
    inner = weight @ flat(implicit(problem)(*leaves))
    gradients = torch.autograd.grad(inner + inner.sin(), leaves, create_graph=True, materialize_grads=True)
    u, v = ([normal(leaf, seed + 7 * k + n) for n, leaf in enumerate(leaves)] for k in (1, 2))

    def product(direction: list[torch.Tensor]) -> list[torch.Tensor]:
        along = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
        return list(torch.autograd.grad(along, leaves, retain_graph=True, materialize_grads=True))

    def pair(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
        return float(sum((x * y).sum() for x, y in zip(left, right, strict=True)))

    hu, hv = product(u), product(v)
    size = sum(float(x.norm() * y.norm()) for x, y in zip(hu, v, strict=True))
    assert abs(pair(hu, v) - pair(hv, u)) <= problem.condition * problem.stated_error * size


@given(REGULAR, seeds)
def test_double_backward_is_that_of_the_closed_form(problem: RandomProblem, seed: int) -> None:
    weight = normal(flat(problem.init), seed)
    direction = [normal(argument, seed + 1 + k) for k, argument in enumerate(problem.args)]

    def curvature(function):
        leaves = [argument.clone().requires_grad_(True) for argument in problem.args]
        value = weight @ flat(function(*leaves))
        gradients = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True, materialize_grads=True)
        along = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
        if not along.requires_grad:
            return [torch.zeros_like(leaf) for leaf in leaves]
        return list(torch.autograd.grad(along, leaves, allow_unused=True, materialize_grads=True))

    expected = curvature(problem.solution)
    size = max(float(x.norm()) for x in expected)
    # A second derivative passes through the inverse once more.
    error = max(problem.condition, 1.0) * problem.stated_error
    natural = size + float(weight.norm()) * sum(float(d.norm()) for d in direction) * problem.condition
    assert_near(curvature(implicit(problem)), expected, error, scale=natural)
