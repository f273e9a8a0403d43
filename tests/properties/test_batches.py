"""A batch is the stack of its members: values, derivatives, and what members share receives their sum."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import jvp, vmap

import bilevel
from bilevel.testing import check_gradients
from bilevel.testing import strategies as draw
from bilevel.testing.strategies import RandomBatch, RandomProblem

from .support import assert_near, implicit, normal, pull

BATCHES = draw.batches(draw.problems(regular=True))
seeds = st.integers(0, 1000)


def to(batch: RandomBatch, dtype: torch.dtype) -> RandomBatch:
    return RandomBatch(batch.problem.to(dtype), tuple(a.to(dtype) for a in batch.args), batch.in_dims, batch.size)


@given(BATCHES, draw.dtypes(), seeds)
def test_gradients_of_a_batch_are_those_of_its_members(batch: RandomBatch, dtype: torch.dtype, seed: int) -> None:
    batch = to(batch, dtype)
    problem = batch.problem
    one = implicit(problem)
    cotangents = normal(torch.empty(batch.size, problem.size, dtype=dtype), seed)
    x, gradients = pull(vmap(one, in_dims=batch.in_dims), batch.args, cotangents.reshape(-1))

    def loop(*args: torch.Tensor) -> torch.Tensor:
        cut = RandomBatch(problem, args, batch.in_dims, batch.size)
        return torch.stack([one(*cut.single(k)) for k in range(batch.size)])

    each, expected = pull(loop, batch.args, cotangents.reshape(-1))
    error = 2 * problem.stated_error
    assert_near(list(x.reshape(batch.size, -1)), list(each.reshape(batch.size, -1)), error)
    assert_near(gradients, expected, error, scale=max(float(g.norm()) for g in expected))


@given(BATCHES, seeds)
def test_the_tangents_of_a_batch_are_those_of_its_members(batch: RandomBatch, seed: int) -> None:
    one = implicit(batch.problem)
    tangents = tuple(normal(argument, seed + k) for k, argument in enumerate(batch.args))
    _, together = jvp(vmap(one, in_dims=batch.in_dims), batch.args, tangents)
    moving = RandomBatch(batch.problem, tangents, batch.in_dims, batch.size)
    each = [jvp(one, batch.single(k), moving.single(k))[1] for k in range(batch.size)]
    assert_near(list(together), each, 2 * batch.problem.stated_error, scale=max(float(e.norm()) for e in each))


@given(draw.batches(draw.problems(regular=True, most=3), most=3))
def test_the_references_agree_on_a_batch(batch: RandomBatch) -> None:
    check = check_gradients(batch.problem.layer(), (batch.problem.init, *batch.args), in_dims=(None, *batch.in_dims))
    assert check.passed, str(check)


class Fit(bilevel.BilevelProblem):
    """A drawn objective's last two arguments tuned so that x meets a target."""

    def __init__(self, drawn: RandomProblem, **settings: object) -> None:
        super().__init__(**settings)
        self.drawn = drawn

    def inner_objective(self, inner, outer, data):
        return self.drawn.function(inner, data[0], *outer)

    def outer_objective(self, inner, outer, data):
        return ((inner - data[1]) ** 2).sum() + 0.1 * (outer[-1] ** 2).sum()


@given(draw.strongly_convex(most=4), draw.dtypes(), st.integers(1, 3), seeds)
def test_the_hypergradient_of_a_mean_is_the_mean_of_hypergradients(
    drawn: RandomProblem, dtype: torch.dtype, count: int, seed: int
) -> None:
    drawn = drawn.to(dtype)
    A, *outer = drawn.args
    targets = normal(torch.empty(count, drawn.size, dtype=dtype), seed)
    factors = torch.linspace(1.0, 0.8, count, dtype=dtype)
    As = factors[:, None, None] * A
    start = drawn.init.expand(count, -1)
    together = Fit(drawn, batch_dims=(0, 0)).hypergradient(tuple(outer), (As, targets), init=start)
    single = Fit(drawn)
    each = [single.hypergradient(tuple(outer), (a, t), init=drawn.init) for a, t in zip(As, targets, strict=True)]
    error = 2 * drawn.stated_error
    parts = [[result.grad[k] for result in each] for k in range(len(outer))]
    size = max(float(g.norm()) for part in parts for g in part)
    assert_near(list(together.grad), [torch.stack(part).mean(0) for part in parts], error, scale=size)
    assert_near(list(together.inner), [result.inner for result in each], error)


@given(draw.strongly_convex(most=3), draw.dtypes(), seeds)
def test_the_references_agree_on_a_bilevel_problem(drawn: RandomProblem, dtype: torch.dtype, seed: int) -> None:
    drawn = drawn.to(dtype)
    A, *outer = drawn.args
    data = (A, normal(drawn.init, seed))
    check = check_gradients(Fit(drawn), (tuple(outer), data), init=drawn.init, seed=seed)
    assert check.passed, str(check)
