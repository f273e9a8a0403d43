"""The same problem written otherwise has the same solution and derivative."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

import bilevel
from bilevel.testing import strategies as draw
from bilevel.testing.strategies import RandomProblem

from .support import assert_near, flat, implicit, normal, pull

REGULAR = draw.problems(regular=True)
seeds = st.integers(0, 1000)


def agree(problem: RandomProblem, other: Callable[..., Any], seed: int) -> None:
    """Hold the solution and the gradients of ``other`` (args ↦ x in the old terms) against the problem's own."""
    cotangent = normal(flat(problem.init), seed)
    x, gradients = pull(implicit(problem), problem.args, cotangent)
    y, others = pull(other, problem.args, cotangent)
    assert_near([y], [x], 2 * problem.stated_error)
    assert_near(others, gradients, 2 * problem.stated_error, scale=max(float(g.norm()) for g in gradients))


def changed(problem: RandomProblem, matrix: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Return args ↦ V z*, solved in the variables z = Vᵀ x."""
    V = matrix.to(problem.dtype)

    def function(z: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
        value = problem.function(V @ z, *args)
        return value if problem.make is bilevel.argmin else V.mT @ value

    other = replace(problem, function=function, init=V.mT @ problem.init)
    return lambda *args: V @ implicit(other)(*args)


@given(REGULAR, draw.dtypes(), seeds)
def test_an_orthogonal_change_of_variables(problem: RandomProblem, dtype: torch.dtype, seed: int) -> None:
    problem = problem.to(dtype)
    n = problem.size
    rotation = torch.linalg.qr(normal(torch.empty(n, n, dtype=torch.float64), seed + 1))[0]
    agree(problem, changed(problem, rotation), seed)


@given(REGULAR, draw.dtypes(), seeds)
def test_a_reordering_of_variables(problem: RandomProblem, dtype: torch.dtype, seed: int) -> None:
    problem = problem.to(dtype)
    order = torch.randperm(problem.size, generator=torch.Generator().manual_seed(seed))
    agree(problem, changed(problem, torch.eye(problem.size)[order]), seed)


@given(REGULAR, draw.dtypes(), seeds, st.floats(-6, 6))
def test_a_scaling_of_the_objective(problem: RandomProblem, dtype: torch.dtype, seed: int, digits: float) -> None:
    problem = problem.to(dtype)
    if problem.make is bilevel.fixed_point:  # a mapping has no scale: its residual as a root has
        function = problem.function
        problem = replace(problem, make=bilevel.root, function=lambda x, *args: x - function(x, *args))
    scaled = replace(problem, function=lambda x, *args: 10**digits * problem.function(x, *args))
    agree(problem, implicit(scaled), seed)


@given(REGULAR, draw.dtypes(), seeds, st.data())
def test_a_splitting_into_a_pytree(problem: RandomProblem, dtype: torch.dtype, seed: int, data: st.DataObject) -> None:
    problem = problem.to(dtype)
    tree = data.draw(draw.trees(size=problem.size, dtype=dtype))
    split = problem.in_terms_of(tree)
    x = implicit(split)(*problem.args)
    assert torch.utils._pytree.tree_structure(x) == torch.utils._pytree.tree_structure(tree)
    agree(problem, lambda *args: flat(implicit(split)(*args)), seed)


@given(draw.trees(), seeds)
def test_any_pytree_can_be_the_unknown_and_the_argument(tree: Any, seed: int) -> None:
    # 0-d leaves, empty ones, axes of length one: x = a wherever it stands, and dx/da is the identity.
    leaves, structure = torch.utils._pytree.tree_flatten(tree)

    def objective(x: Any, a: Any) -> torch.Tensor:
        pairs = zip(torch.utils._pytree.tree_leaves(x), torch.utils._pytree.tree_leaves(a), strict=True)
        return sum(((p - q) ** 2).sum() + 0.1 * ((p - q) ** 4).sum() for p, q in pairs)

    free = [leaf.clone().requires_grad_(True) for leaf in leaves]
    start = torch.utils._pytree.tree_map(torch.zeros_like, tree)
    x = bilevel.argmin(objective)(start, torch.utils._pytree.tree_unflatten(free, structure))
    found = torch.utils._pytree.tree_leaves(x)
    cotangents = [normal(leaf, seed + k) for k, leaf in enumerate(leaves)]
    assert [leaf.shape for leaf in found] == [leaf.shape for leaf in leaves]
    torch.testing.assert_close([leaf.detach() for leaf in found], leaves, atol=1e-9, rtol=1e-9)
    pulled = torch.autograd.grad(found, free, cotangents, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(list(pulled), cotangents, atol=1e-9, rtol=1e-9)
