"""The estimate of the error in x, and what the judge makes of it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bilevel
from bilevel.equations.system import ArgminSystem, FixedPointSystem, RootSystem
from bilevel.reports import Status
from bilevel.solvers.judging.error import estimate_error, has_kink, residual_rounding
from bilevel.tolerance import Tolerance

from . import support
from .support import F32, F64, statuses

EVERY = torch.ones(1, dtype=torch.bool)


def spread(n: int, decades: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 10 ** (decades * (torch.rand(n, generator=generator, dtype=F64) - 0.5))


@given(seed=st.integers(0, 10_000), n=st.integers(1, 12), decades=st.floats(0, 12))
def test_of_a_quadratic_the_estimate_is_the_error_in_any_units(seed, n, decades):
    generator = torch.Generator().manual_seed(seed)
    M = torch.randn(n, n, generator=generator, dtype=F64)
    unit, right = spread(n, decades, seed), torch.randn(n, generator=generator, dtype=F64)
    A = (M @ M.mT + torch.eye(n)) / unit.unsqueeze(-1) / unit
    solution = right * unit
    problem, x = support.build(
        ArgminSystem, lambda x: 0.5 * (x - solution) @ A @ (x - solution), solution + 1e-3 * unit
    )
    found = estimate_error(problem, x, problem.residual(x), EVERY)
    torch.testing.assert_close(found.error[0] / unit, (x[0] - solution) / unit, rtol=1e-5, atol=1e-9)
    assert bool(found.solved) and not bool(found.singular | found.indefinite)
    assert found.factor is not None
    torch.testing.assert_close(
        (found.factor @ found.factor.mT)[0] * unit * unit.unsqueeze(-1), A * unit * unit.unsqueeze(-1)
    )


@pytest.mark.parametrize("n", [3, 40, 300])
@pytest.mark.parametrize("kind", [ArgminSystem, RootSystem, FixedPointSystem])
def test_the_estimate_is_the_error_at_every_size(kind, n):
    generator = torch.Generator().manual_seed(n)
    M = torch.randn(n, n, generator=generator, dtype=F64) / n**0.5
    A = M @ M.mT + torch.eye(n) if kind is ArgminSystem else torch.eye(n) + 0.3 * M
    solution = torch.randn(n, generator=generator, dtype=F64)

    def function(x):
        if kind is ArgminSystem:
            return 0.5 * (x - solution) @ A @ (x - solution)
        return A @ (x - solution) if kind is RootSystem else x - A @ (x - solution)

    problem, x = support.build(kind, function, solution + 1e-4)
    found = estimate_error(problem, x, problem.residual(x), EVERY)
    error = (x - solution)[0]
    assert bool(found.solved)
    assert float((found.error[0] - error).norm()) <= (1e-9 if n == 3 else 0.5) * float(error.norm())


def test_what_no_jacobian_explains_is_no_estimate():
    for n in (2, 40, 600):
        problem, x = support.build(RootSystem, lambda x: x**3 - 8, torch.zeros(n, dtype=F64))
        found = estimate_error(problem, x, problem.residual(x), EVERY)
        assert bool(torch.isinf(found.error).any()) or not bool(found.solved)


def test_the_null_space_is_told_from_the_rest():
    problem, x = support.build(
        ArgminSystem, lambda x: (x[0] + x[1] - 1) ** 2 + x[2] ** 2, torch.tensor([3.0, -2.0, 0.0], dtype=F64)
    )
    found = estimate_error(problem, x, problem.residual(x), EVERY)
    assert bool(found.singular) and not bool(found.indefinite)
    torch.testing.assert_close(found.error, torch.zeros_like(x))
    torch.testing.assert_close(found.null_part[0], torch.tensor([2.5, -2.5, 0.0], dtype=F64))


@pytest.mark.parametrize("dtype", [F32, F64])
def test_kinks_are_told_from_bends(dtype):
    kinked = [
        lambda x: x.abs().sum() + (x**2).sum(),
        lambda x: torch.relu(x).sum() + x.sum(),
        lambda x: torch.maximum(x, -2 * x).sum(),
    ]
    smooth = [
        lambda x: (x**2).sum() + 3 * x.sum(),
        lambda x: (x.clamp(min=0) ** 2).sum() + x.sum(),
        lambda x: (1e6 * x**4).sum(),
        lambda x: torch.nn.functional.huber_loss(x, torch.zeros_like(x), reduction="sum"),
        lambda x: torch.exp(20 * x).sum(),
    ]
    for expected, functions in ((True, kinked), (False, smooth)):
        for number, function in enumerate(functions):
            problem, x = support.build(ArgminSystem, function, torch.zeros(3, dtype=dtype))
            assert bool(has_kink(problem, x, problem.residual(x))) is expected, (expected, number)


def test_the_rounding_of_a_residual_covers_that_of_its_terms():
    n = 70
    generator = torch.Generator().manual_seed(0)
    shift = torch.rand(n, generator=generator, dtype=F32)
    problem, x = support.build(
        RootSystem, lambda x: (torch.cos(x).sum() - n) + (x - shift), torch.rand(n, generator=generator)
    )
    single = problem.residual(x)
    exact = problem.to(F64).residual(x.double())
    assert bool(((single.double() - exact).abs() <= residual_rounding(problem, x, single).double()).all())


@pytest.mark.parametrize("start", [1e-6, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(
    "solver",
    [bilevel.Newton(), bilevel.Newton(dense_limit=0), bilevel.LBFGS(), bilevel.ScipyMinimize("BFGS")],
    ids=lambda s: s.name,
)
def test_the_answer_does_not_hang_on_where_the_search_began(solver, dtype, start):
    a = torch.tensor([1.0, 8.0], dtype=dtype)
    outcome = support.minimize(
        solver, lambda x, a: (x**4).sum() / 4 - (a * x).sum(), torch.full((2,), start, dtype=dtype), a
    )
    if statuses(outcome) == [Status.CONVERGED]:
        torch.testing.assert_close(
            outcome.x[0], torch.tensor([1.0, 2.0], dtype=dtype), rtol=2e-3 if dtype == F32 else 1e-5, atol=0
        )
    else:
        assert not statuses(outcome)[0].success
        assert (
            start >= 1e3
        )  # from there a method without second derivatives may end in its own words, not in a wrong answer


def test_a_descent_from_a_flat_tail_is_no_divergence():
    outcome = support.minimize(
        bilevel.Newton(), lambda r: 4 * (r**-12 - r**-6).sum(), torch.tensor([1000.0], dtype=F64)
    )
    assert statuses(outcome) == [Status.CONVERGED]
    assert outcome.x.item() == pytest.approx(2 ** (1 / 6), rel=1e-9)


def test_a_search_that_ran_away_is_named():
    start = torch.tensor([1.0, 2.0], dtype=F64)
    outcome = support.solve(bilevel.Anderson(), FixedPointSystem, lambda x: x + 1 / (1 + x * x), start)
    assert statuses(outcome) == [Status.DIVERGED]


@pytest.mark.parametrize(
    "solver", [bilevel.Anderson(), bilevel.FixedPointIteration(), bilevel.Newton()], ids=lambda s: s.name
)
def test_an_x_that_rounds_by_more_than_delta_is_no_solution(solver):
    start = torch.tensor([1e15, 1.0], dtype=F64)
    outcome = support.solve(
        solver, FixedPointSystem, lambda x: x + torch.tensor([1e-3, 0.0]), start, tolerance=Tolerance(delta=1e-6)
    )
    assert float(outcome.residual_norm) == 0.0  # 1e15 + 1e-3 is 1e15
    assert not statuses(outcome)[0].success


@pytest.mark.parametrize("rtol", [1e-2, 1e-5, 1e-9])
@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e7])
def test_rtol_is_relative_to_each_unknown(rtol, scale):
    units = scale * torch.tensor([1.0, 1e3, 1e-2], dtype=F64)
    outcome = support.solve(
        bilevel.FixedPointIteration(),
        FixedPointSystem,
        lambda x: 0.95 * x + 0.05 * units,
        torch.zeros(3, dtype=F64),
        tolerance=Tolerance(rtol=rtol),
    )
    assert statuses(outcome) == [Status.CONVERGED]
    error = float(((outcome.x[0] - units) / units).abs().max())
    assert error <= 1.01 * rtol
    # And not much more is done than was asked.
    assert int(outcome.iterations) <= math.log(0.01 * rtol) / math.log(0.95) + 2


def test_rtol_beyond_the_dtype_is_refused():
    f = lambda x: ((x - 1 / 3) ** 2).sum() + (x.sum() - 1.1) ** 2
    outcome = support.minimize(bilevel.Newton(), f, torch.zeros(3, dtype=F32), tolerance=Tolerance(rtol=1e-12))
    exact = support.minimize(bilevel.Newton(), f, torch.zeros(3, dtype=F64))
    assert statuses(outcome) != [Status.CONVERGED] or float((outcome.x.double() - exact.x).abs().max()) <= 1e-7


def test_a_failed_default_hands_over_and_says_so():
    t = torch.arange(1, 17, dtype=F64)
    y = torch.tensor(
        [34.78, 28.61, 23.65, 19.63, 16.37, 13.72, 11.54, 9.744, 8.261, 7.03, 6.005, 5.147, 4.427, 3.82, 3.307, 2.872], dtype=F64
    )  # fmt: skip
    found = bilevel.argmin(
        lambda x: ((x[0] * torch.exp(10 * x[1] / (0.45 + 0.05 * t + x[2]) - 13) - y) ** 2).sum()
    ).solve(torch.tensor([40.0, 50.0, 30.0], dtype=F64))
    torch.testing.assert_close(
        found.value, torch.tensor([2.48177830, 6.18134635, 3.45223634], dtype=F64), rtol=1e-7, atol=0
    )
    assert found.report.solver.startswith("Newton, then LBFGS")


def test_a_problem_that_fails_leaves_its_neighbours_as_they_are():
    a = torch.tensor([[1.0], [-1.0], [2.0]], dtype=F64)
    layer = bilevel.argmin(lambda x, a: (a * x**2).sum() + x.sum(), on_failure="ignore")
    found = torch.func.vmap(layer.solve)(torch.ones(3, 1, dtype=F64), a)
    assert found.report.status[0] == found.report.status[2] == Status.CONVERGED
    assert not found.report.status[1].success
    torch.testing.assert_close(found.value[[0, 2]], torch.tensor([[-0.5], [-0.25]], dtype=F64))


@pytest.mark.parametrize("dtype", [F64, F32])
def test_an_unknown_of_a_fixed_point_is_as_large_as_its_terms(dtype):
    """The first unknown is at a bound and has large units: no equation of the others says how large."""
    unit = torch.tensor([3e4, 5e2, 2e-4, 2e-3], dtype=dtype)
    M = torch.tensor(
        [[0.3, 0.2, 0.1, 0.1], [0.2, 0.4, 0.3, 0.1], [0.1, 0.3, 0.4, 0.3], [0.1, 0.1, 0.3, 0.5]], dtype=dtype
    )
    z = torch.tensor([-1.0, 0.7, 0.4, 0.5], dtype=dtype)
    c = z - M @ z - torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=dtype)
    problem, x = support.build(FixedPointSystem, lambda x: unit * (M @ (x / unit) + c).clamp(-1, 1), unit * z)
    found = estimate_error(problem, x, problem.residual(x), EVERY)
    assert bool((found.size[0] >= x[0].abs()).all()) and bool((found.size[0] < 4 * unit).all())


def test_a_fixed_point_in_mixed_units_is_not_singular():
    """1 − ∂T has the condition number 1e3 in natural units."""
    M = torch.tensor(
        [
            [0.40268081, -0.02552638, 0.12886560, 0.41928479, 0.13355558],
            [-0.02552638, 0.53448349, 0.04243216, 0.00120078, 0.49675494],
            [0.12886560, 0.04243216, 0.55934775, -0.14061365, -0.25472102],
            [0.41928479, 0.00120078, -0.14061365, 0.18475904, 0.13305478],
            [0.13355558, 0.49675494, -0.25472102, 0.13305478, 0.25733635],
        ]
    )
    unit = torch.tensor([88.5, 8.61e5, 494.0, 1.61, 8.64e-6])
    z = torch.tensor([0.1146, 0.2990, -0.1543, 0.1339, 0.2994])
    problem, x = support.build(FixedPointSystem, lambda x: unit * (M @ (x / unit) + 1e-3), unit * z)
    assert not bool(estimate_error(problem, x, problem.residual(x), EVERY).singular)


ONE_OF_TWO = lambda x, a: torch.stack([x[0] - (x[0] - a[0]) ** 3, torch.cos(x[1]) + 0 * a[1]])


@pytest.mark.parametrize(
    ("mapping", "dtype"),
    [
        pytest.param(lambda x, a: x - (x - a) ** 3, F64, id="cubic"),
        pytest.param(lambda x, a: torch.sin(x - a) + a, F32, id="sine"),
        pytest.param(ONE_OF_TWO, F64, id="one of two"),
        pytest.param(ONE_OF_TWO, F32, id="one of two, float32", marks=pytest.mark.long),  # tens of thousands of steps
    ],
)
def test_what_is_left_of_one_minus_the_slope_is_no_derivative(mapping, dtype):
    """Plain iteration comes so near a multiple root that 1 − T′ is its own rounding. The gradient was 0.65 where 1 is right."""
    a = torch.zeros(2, dtype=dtype, requires_grad=True)
    x = bilevel.fixed_point(mapping)(torch.full((2,), 0.5, dtype=dtype), a)
    with pytest.raises(bilevel.SolveError, match="singular to working precision"):
        x[0].backward()


def test_a_multiple_root_written_as_a_simple_one_has_its_derivative():
    a = torch.zeros(2, dtype=F64, requires_grad=True)
    x = bilevel.fixed_point(lambda x, a: x - (x - a))(torch.full((2,), 0.5, dtype=F64), a)
    x.sum().backward()
    torch.testing.assert_close(a.grad, torch.ones(2, dtype=F64))


class Far(bilevel.InnerSolver):
    """Goes to where rounding hides the residual."""

    def solve(self, problem, init, goal):
        steps = torch.ones(len(init), dtype=torch.int64)
        far = torch.tensor([[1821178.75, 7111499.5]])
        return bilevel.InnerSolution(far, steps, torch.full_like(steps, int(Status.CONVERGED)))


def test_a_residual_of_far_rounding_is_none_nearer_by():
    """R is 0.12 there, half of what it is everywhere else."""
    layer = bilevel.fixed_point(lambda x, c: torch.relu(x - c), solver=Far(), on_failure="ignore")
    found = layer.solve(torch.tensor([0.22, 1.0]), torch.tensor([0.0828, 0.2071]))
    assert found.report.status is Status.DIVERGED
