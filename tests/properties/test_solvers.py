"""The derivative is the solution's, not the solver's: every solver gives the same, and none moves from a solution."""

from __future__ import annotations

import pytest
import scipy.sparse.linalg
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import bilevel
from bilevel.testing import strategies as draw
from bilevel.testing.strategies import RandomProblem

from .support import assert_near, implicit, normal, pull, wide

seeds = st.integers(0, 1000)
MINIMA = st.one_of(draw.strongly_convex(most=4, digits=1.0), draw.merely_convex(most=3), draw.nonconvex(most=3))
EQUATIONS = draw.roots(most=4, digits=0.5)
MAPPINGS = draw.contractions(most=4, factor=0.6)

MINIMISERS = {
    "Newton": bilevel.Newton(),
    "Newton, by products": bilevel.Newton(dense_limit=0),
    "LBFGS": bilevel.LBFGS(),
    "gradient descent": bilevel.GradientDescent(lr=1.0, max_steps=20_000, line_search=True),
    "torch LBFGS": bilevel.TorchOptimizer(torch.optim.LBFGS, max_steps=300, line_search_fn="strong_wolfe"),
    "scipy BFGS": bilevel.ScipyMinimize(method="BFGS"),
}
ROOT_FINDERS = {
    "Newton": bilevel.Newton(),
    "Newton, by products": bilevel.Newton(dense_limit=0),
    "scipy hybr": bilevel.ScipyRoot(),
}
ITERATIONS = {
    **ROOT_FINDERS,
    "Anderson": bilevel.Anderson(),
    "the mapping": bilevel.FixedPointIteration(),
}
GENERAL = {
    "exact": bilevel.Exact(),
    "GMRES": bilevel.GMRES(),
    "BiCGStab": bilevel.BiCGStab(),
    "scipy GMRES": bilevel.ScipyLinear(scipy.sparse.linalg.gmres),
    "a function": lambda operator, rhs: torch.linalg.solve(operator.dense(), rhs),
}
SYMMETRIC = {**GENERAL, "CG": bilevel.CG(), "Neumann": bilevel.Neumann(3000)}


def agrees(problem: RandomProblem, dtype: torch.dtype, seed: int, **settings: object) -> None:
    problem = problem.to(dtype)
    cotangent = normal(problem.init, seed)
    try:
        x, gradients = pull(implicit(problem, **settings), problem.args, cotangent)
    except bilevel.BudgetWarning:
        # A solver with a budget that says that it fell short has kept its word. One that does so often fails hypothesis.
        assume(False)
    exact, expected = pull(problem.solution, wide(problem.args), cotangent)
    assert_near([x], [exact], problem.stated_error)
    assert_near(gradients, expected, problem.stated_error, scale=max(float(g.norm()) for g in expected))


@pytest.mark.parametrize("name", MINIMISERS)
@given(MINIMA, draw.dtypes(), seeds)
def test_every_minimiser_gives_the_same(name: str, problem: RandomProblem, dtype: torch.dtype, seed: int) -> None:
    agrees(problem, dtype, seed, solver=MINIMISERS[name])


@pytest.mark.parametrize("name", ROOT_FINDERS)
@given(EQUATIONS, draw.dtypes(), seeds)
def test_every_root_finder_gives_the_same(name: str, problem: RandomProblem, dtype: torch.dtype, seed: int) -> None:
    agrees(problem, dtype, seed, solver=ROOT_FINDERS[name])


@pytest.mark.parametrize("name", ITERATIONS)
@given(MAPPINGS, draw.dtypes(), seeds)
def test_every_iteration_gives_the_same(name: str, problem: RandomProblem, dtype: torch.dtype, seed: int) -> None:
    agrees(problem, dtype, seed, solver=ITERATIONS[name])


@pytest.mark.parametrize("name", SYMMETRIC)
@given(MINIMA, draw.dtypes(), seeds)
def test_every_linear_solver_gives_the_same(name: str, problem: RandomProblem, dtype: torch.dtype, seed: int) -> None:
    agrees(problem, dtype, seed, linear_solver=SYMMETRIC[name])


@pytest.mark.parametrize("name", GENERAL)
@given(st.one_of(EQUATIONS, MAPPINGS), draw.dtypes(), seeds)
def test_every_general_linear_solver_gives_the_same(
    name: str, problem: RandomProblem, dtype: torch.dtype, seed: int
) -> None:
    agrees(problem, dtype, seed, linear_solver=GENERAL[name])


@pytest.mark.parametrize("name", ["Newton", "Newton, by products", "LBFGS", "gradient descent"])
@given(MINIMA, draw.dtypes(), seeds)
def test_starting_at_a_solution_changes_nothing(
    name: str, problem: RandomProblem, dtype: torch.dtype, seed: int
) -> None:
    stays(problem.to(dtype), MINIMISERS[name], seed)


@pytest.mark.parametrize("name", ["Newton", "Anderson", "the mapping"])
@given(MAPPINGS, draw.dtypes(), seeds)
def test_starting_at_a_fixed_point_changes_nothing(
    name: str, problem: RandomProblem, dtype: torch.dtype, seed: int
) -> None:
    stays(problem.to(dtype), ITERATIONS[name], seed)


def stays(problem: RandomProblem, solver: object, seed: int) -> None:
    layer = problem.layer(solver=solver)
    # What is asked is relative to the start: the second solve may ask for a little more than the first.
    once = layer.solve(problem.init, *problem.args).value
    twice = layer.solve(once, *problem.args).value
    thrice = layer.solve(twice, *problem.args)
    assert_near([twice], [once], problem.stated_error)
    assert int(thrice.report.iterations) == 0 and torch.equal(thrice.value, twice)
    cotangent = normal(problem.init, seed)
    _, before = pull(lambda *args: layer(problem.init, *args), problem.args, cotangent)
    _, after = pull(lambda *args: layer(twice, *args), problem.args, cotangent)
    assert_near(after, before, problem.stated_error, scale=max(float(g.norm()) for g in before))
