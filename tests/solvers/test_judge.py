"""The judge of inner solves, asked about answers that look right."""

from __future__ import annotations

import pytest
import torch

import bilevel
from bilevel.errors import SolveError

F64, F32 = torch.float64, torch.float32


def solver_that_returns(number: float):
    """Return a solver whose answer is ``number`` for every unknown."""
    return lambda function, init, *args: torch.full_like(init, number)


def recorded_status(layer: bilevel.Layer, *args: torch.Tensor) -> bilevel.Status:
    """Return how the solve of one problem ended."""
    with bilevel.record() as reports, torch.no_grad():
        layer(*args)
    return bilevel.Status(int(reports[0].status))


def test_a_point_where_the_equations_are_not_finite_does_not_solve_them() -> None:
    # x = x + a/x has no solution. Without its null part x is zero, where the residual is infinite, as is its rounding.
    layer = bilevel.fixed_point(lambda x, a: x + a / x, solver=solver_that_returns(9.1e7))
    with pytest.raises(SolveError, match="moved away"):
        layer(torch.ones(1, dtype=F64), torch.ones(1, dtype=F64))


@pytest.mark.parametrize("size", [1, 40, 600])
def test_a_residual_lost_in_the_rounding_of_x_is_named_at_every_size(size: int) -> None:
    layer = bilevel.fixed_point(lambda x, a: x + a / (1 + x * x), solver=solver_that_returns(5.8e5))
    with pytest.raises(SolveError, match="moved away"):
        layer(torch.ones(size, dtype=F64), torch.ones((), dtype=F64))


@pytest.mark.parametrize("size", [1, 200, 600])
def test_a_start_on_a_plateau_is_named_at_every_size(size: int) -> None:
    layer = bilevel.argmin(lambda x, a: -torch.exp(-((x - a) ** 2)).sum())
    with pytest.raises(SolveError, match="could not leave the start: the function is flat there"):
        layer(torch.full((size,), 30.0, dtype=F64), torch.tensor(0.5, dtype=F64))


@pytest.mark.parametrize("size", [40, 600])
@pytest.mark.parametrize("dtype", [F64, F32])
def test_solutions_at_rounding_stay_solutions(size: int, dtype: torch.dtype) -> None:
    a = torch.linspace(1, 2, size, dtype=dtype)
    layer = bilevel.fixed_point(lambda x, a: a + 0.5 * (x - a), solver=lambda function, init, a: a)
    assert torch.equal(layer(torch.zeros(size, dtype=dtype), a), a)
    layer = bilevel.root(lambda x, a: x**3 - a**3, solver=lambda function, init, a: a)
    assert torch.equal(layer(torch.ones(size, dtype=dtype), a), a)


@pytest.mark.parametrize("size", [2, 600])
def test_a_kink_at_which_one_unknown_stays_is_named_though_the_others_move(size: int) -> None:
    start = torch.full((size,), 0.3, dtype=F64)
    start[0] = 0.0
    layer = bilevel.argmin(lambda x, a: ((x.abs() - a) ** 2).sum() + 0.1 * (x**2).sum())
    with pytest.raises(SolveError, match="kink"):
        layer(start, torch.ones((), dtype=F64))


@pytest.mark.parametrize("size", [2, 600])
def test_a_maximum_in_one_unknown_is_named_though_the_others_move(size: int) -> None:
    start = torch.full((size,), 0.3, dtype=F64)
    start[0] = 0.0
    layer = bilevel.argmin(lambda x, a: (x**4 / 4 - a * x**2 / 2).sum(), on_failure="ignore")
    assert recorded_status(layer, start, torch.ones((), dtype=F64)) is bilevel.Status.INDEFINITE


def test_an_unknown_without_influence_is_no_kink() -> None:
    start, a = torch.tensor([0.0, 0.3], dtype=F64), torch.tensor([0.0, 2.0], dtype=F64)
    layer = bilevel.argmin(lambda x, a: torch.log(torch.cosh(x - a)).sum())
    torch.testing.assert_close(layer(start, a), a, rtol=1e-8, atol=1e-10)


def test_a_search_that_ends_beside_a_kink_is_told_so() -> None:
    layer = bilevel.argmin(lambda x, a: ((x - a) ** 2).sum() + x.abs().sum())
    with pytest.raises(SolveError, match="kink"):
        layer(torch.ones(2, dtype=F64), torch.tensor([2.0, 0.1], dtype=F64))


@pytest.mark.parametrize("size", [1, 40, 600])
def test_a_saturated_root_is_not_solved_at_any_size(size: int) -> None:
    layer = bilevel.root(lambda x, a: torch.tanh(x) - a, on_failure="ignore")
    assert recorded_status(layer, torch.full((size,), 100.0, dtype=F64), torch.tensor(0.5, dtype=F64)) is (
        bilevel.Status.SINGULAR
    )


@pytest.mark.parametrize("size", [1, 40, 600])
def test_a_root_whose_jacobian_vanishes_at_the_start_is_found_at_every_size(size: int) -> None:
    layer, a = bilevel.root(lambda x, a: x**3 - a), torch.tensor(8.0, dtype=F64, requires_grad=True)
    x = layer(torch.zeros(size, dtype=F64), a)
    torch.testing.assert_close(x.detach(), torch.full((size,), 2.0, dtype=F64))
    (gradient,) = torch.autograd.grad(x.mean(), a)
    torch.testing.assert_close(gradient, torch.tensor(1 / 12, dtype=F64))


@pytest.mark.parametrize("size", [1, 40, 600])
def test_a_mapping_that_only_shifts_has_no_fixed_point_at_any_size(size: int) -> None:
    layer = bilevel.fixed_point(lambda x, a: x + a, solver=solver_that_returns(1.0))
    with pytest.raises(SolveError):
        layer(torch.zeros(size, dtype=F64), torch.ones((), dtype=F64))


def test_lbfgs_soon_says_that_an_objective_falls_without_end() -> None:
    layer = bilevel.argmin(lambda x, a: (a * x - torch.log(x)).sum(), solver=bilevel.LBFGS(), on_failure="ignore")
    with bilevel.record() as reports, torch.no_grad():
        layer(torch.ones(1, dtype=F64), torch.tensor([-1.0], dtype=F64))
    assert int(reports[0].iterations) < 20
    assert bilevel.Status(int(reports[0].status)) is bilevel.Status.DIVERGED


@pytest.mark.parametrize("size", [1, 600])
def test_the_remedy_for_a_maximum_finds_the_stationary_point(size: int) -> None:
    def objective(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return ((x**2 - a) ** 2).sum()

    start, a = torch.zeros(size, dtype=F64), torch.ones((), dtype=F64)
    with pytest.raises(SolveError, match=r"bilevel.root\(torch.func.grad"):
        bilevel.argmin(objective)(start, a)
    assert torch.equal(bilevel.root(torch.func.grad(objective))(start, a), start)
