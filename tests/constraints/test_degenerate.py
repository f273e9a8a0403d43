"""Where no derivative exists it is refused and named; problems without a solution have statuses of their own."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch.func import grad, jacrev, vmap

import bilevel
from bilevel import Status

F64 = torch.float64


def tensor(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=F64)


def zeros(n: int) -> torch.Tensor:
    return torch.zeros(n, dtype=F64)


def distance(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return ((x - a) ** 2).sum()


def refused(layer: bilevel.Layer, a: torch.Tensor, sentence: str) -> torch.Tensor:
    """Return x, of which the derivative is refused with ``sentence``."""
    a = a.clone().requires_grad_(True)
    solution = layer.solve(zeros(len(a)), a)
    assert bool(solution.report.converged)
    with pytest.raises(bilevel.SolveError, match=sentence) as caught:
        solution.value.sum().backward()
    assert caught.value.report.status is Status.DEGENERATE
    assert "smoothing=" in str(caught.value)
    return solution.value.detach()


def test_a_bound_with_multiplier_zero_is_named() -> None:
    x = refused(
        bilevel.argmin(distance, lower=0.0), tensor(0.0, 2.0), r"lower bound of x\[0\] is active with multiplier 0"
    )
    torch.testing.assert_close(x, tensor(0.0, 2.0))


def test_an_inequality_with_multiplier_zero_is_named() -> None:
    layer = bilevel.argmin(distance, inequality=lambda x, a: torch.stack([x[0] - 9, x.sum() - 1]))
    refused(layer, tensor(0.25, 0.75), r"inequality\[1\] is active with multiplier 0")


def test_smoothing_is_a_remedy() -> None:
    tau = 1e-4
    layer = bilevel.argmin(distance, lower=0.0, smoothing=tau)
    a = tensor(0.0, 2.0)
    solution = layer.solve(zeros(2), a)
    # 2 (x - a) = τ/x
    expected = 0.5 * (a + (a**2 + 2 * tau).sqrt())
    torch.testing.assert_close(solution.value, expected)
    torch.testing.assert_close(solution.multipliers.lower, tau / expected)
    found = jacrev(lambda a: layer(zeros(2), a))(a)
    torch.testing.assert_close(found, torch.diag(0.5 * (1 + a / (a**2 + 2 * tau).sqrt())))


def test_smoothing_of_inequalities_is_the_central_path() -> None:
    layer = bilevel.argmin(
        distance, inequality=lambda x, a: x.sum() - 1, equality=lambda x, a: x[0] - x[2], smoothing=1e-3
    )
    a = tensor(0.5, 0.2, 0.9)
    solution = layer.solve(zeros(3), a)
    product = solution.multipliers.inequality * (solution.value.sum() - 1)
    torch.testing.assert_close(product, torch.tensor(-1e-3, dtype=F64))
    found = jacrev(lambda a: layer(zeros(3), a))(a)
    columns = [(layer(zeros(3), a + 1e-5 * e) - layer(zeros(3), a - 1e-5 * e)) / 2e-5 for e in torch.eye(3, dtype=F64)]
    torch.testing.assert_close(found, torch.stack(columns, -1), rtol=1e-6, atol=1e-8)


def test_a_duplicated_constraint_leaves_the_derivative() -> None:
    layer = bilevel.argmin(distance, inequality=lambda x, a: torch.stack([x.sum() - 1, x.sum() - 1]))
    a = tensor(1.0, 2.0).requires_grad_(True)
    with bilevel.record() as reports:
        x = layer(zeros(2), a)
        x[0].backward()
    torch.testing.assert_close(x.detach(), tensor(0.0, 1.0))
    assert a.grad is not None
    torch.testing.assert_close(a.grad, tensor(0.5, -0.5))
    assert reports.backward[0].status is Status.MINIMUM_NORM


def test_constraints_that_an_argument_moves_apart_are_named() -> None:
    largest = bilevel.argmin(lambda t, a: t.sum(), inequality=lambda t, a: a - t)
    a = tensor(2.0, 2.0).requires_grad_(True)
    x = largest(zeros(1), a)
    assert x.item() == pytest.approx(2.0)
    with pytest.raises(bilevel.SolveError, match=r"inequality\[0\], inequality\[1\] are linearly dependent") as caught:
        x.sum().backward()
    assert caught.value.report.status is Status.DEGENERATE


def test_a_linear_program_without_a_unique_solution_is_named() -> None:
    layer = bilevel.argmin(lambda x, a: a @ x, lower=0.0, equality=lambda x, a: x.sum() - 1)
    refused(layer, tensor(1.0, 1.0, 3.0), "second-order condition fails")


def test_degenerate_problems_of_a_batch_are_told_apart() -> None:
    layer = bilevel.argmin(distance, lower=0.0, on_failure="nan")
    points = torch.stack([tensor(-1.0, 2.0), tensor(0.0, 2.0), tensor(1.0, 2.0)])
    with bilevel.record() as reports:
        found = vmap(jacrev(lambda a: layer(zeros(2), a)))(points)
    torch.testing.assert_close(found[0], torch.diag(tensor(0.0, 1.0)))
    torch.testing.assert_close(found[2], torch.eye(2, dtype=F64))
    # x₀ = max(a₀, 0) has no derivative at 0; x₁ = a₁ has one.
    assert torch.isnan(found[1]).tolist() == [[True, True], [False, False]]
    torch.testing.assert_close(found[1, 1], tensor(0.0, 1.0))
    assert bool(reports.forward[0].converged.all())


def test_infeasible() -> None:
    layer = bilevel.argmin(distance, inequality=lambda x, a: torch.stack([x.sum() - 1, 2 - x.sum()]))
    with pytest.raises(bilevel.SolveError, match=r"inequality\[[01]\] is still violated by 0.5") as caught:
        layer(zeros(2), tensor(1.0, 1.0))
    assert caught.value.report.status is Status.INFEASIBLE


def test_the_multipliers_of_an_infeasible_problem_are_a_farkas_ray() -> None:
    G = torch.tensor([[1.0, 1.0], [-1.0, 0.0], [0.0, -1.0]], dtype=F64)
    h = tensor(1.0, -1.0, -1.0)
    layer = bilevel.argmin(distance, inequality=lambda x, a: G @ x - h, on_failure="ignore")
    solution = layer.solve(zeros(2), tensor(0.0, 0.0))
    ray = solution.multipliers.inequality
    assert solution.report.status is Status.INFEASIBLE
    assert bool((ray >= 0).all())
    torch.testing.assert_close(G.T @ ray, zeros(2), atol=1e-6, rtol=0)
    assert float(h @ ray) < -0.1


def test_unbounded() -> None:
    for layer in (
        bilevel.argmin(lambda x, a: a @ x, lower=0.0),
        bilevel.argmin(lambda x, a: a @ x, lower=0.0, inequality=lambda x, a: x[0] - 3),
        bilevel.argmin(lambda x, a: a @ x, equality=lambda x, a: x[0] - 3),
    ):
        with pytest.raises(bilevel.SolveError) as caught:
            layer(zeros(2), tensor(1.0, -1.0))
        assert caught.value.report.status is Status.UNBOUNDED


def test_no_derivative_comes_of_an_infeasible_problem() -> None:
    layer = bilevel.argmin(distance, lower=lambda a: a, upper=1.0, on_failure="ignore")
    points = torch.stack([tensor(2.0, 0.0), tensor(0.5, 0.0), tensor(1.0, 1.0), tensor(-math.inf, 0.5)])
    target = torch.tensor(3.0, dtype=F64)
    bounded = bilevel.argmin(
        lambda x, lower, t: ((x - t) ** 2).sum(), lower=lambda lower, t: lower, upper=1.0, on_failure="ignore"
    )
    del layer
    solution = vmap(bounded.solve, (None, 0, None))(zeros(2), points, target)
    codes = list(solution.report.status)
    assert codes == [Status.INFEASIBLE, Status.CONVERGED, Status.CONVERGED, Status.CONVERGED]
    torch.testing.assert_close(solution.value[1:], torch.ones(3, 2, dtype=F64))
    found = vmap(jacrev(lambda low: bounded(zeros(2), low, target).sum()))(points)
    assert bool(torch.isnan(found[0]).all())
    assert not bool(torch.isnan(found[1:]).any())


def test_crossed_bounds_are_named() -> None:
    with pytest.raises(bilevel.SolveError, match=r"lower bound of x\[1\] is 2, above the upper bound 1"):
        bilevel.argmin(distance, lower=tensor(0.0, 2.0), upper=1.0)(zeros(2), tensor(0.0, 0.0))


def test_a_batch_that_mixes_all_of_these() -> None:
    """Empty active set, all active, zero width, infeasible and unbounded beside each other, with infinite bounds."""
    layer = bilevel.argmin(
        lambda x, data: data["q"] * ((x - data["a"]) ** 2).sum() + data["c"] @ x,
        lower=lambda data: data["lower"],
        upper=lambda data: data["upper"],
        inequality=lambda x, data: x.sum() - data["cap"],
        on_failure="ignore",
    )
    inf = math.inf
    rows = [
        # q, a, c, lower, upper, cap
        (1.0, (0.1, 0.2), (0.0, 0.0), (-inf, -inf), (inf, inf), 5.0),  # nothing active
        (1.0, (5.0, 5.0), (0.0, 0.0), (-inf, -inf), (1.0, 0.5), 9.0),  # all bounds active
        (1.0, (5.0, 5.0), (0.0, 0.0), (0.5, -inf), (0.5, inf), 1.0),  # zero width, and the cap
        (1.0, (0.0, 0.0), (0.0, 0.0), (2.0, 2.0), (inf, inf), 1.0),  # infeasible
        (0.0, (0.0, 0.0), (1.0, 0.0), (-inf, 0.0), (inf, 1.0), 1.0),  # unbounded
    ]
    names = ("q", "a", "c", "lower", "upper", "cap")
    data = {name: torch.tensor([row[i] for row in rows], dtype=F64) for i, name in enumerate(names)}
    solution = vmap(layer.solve, (None, 0))(zeros(2), data)
    assert list(solution.report.status) == [Status.CONVERGED] * 3 + [Status.INFEASIBLE, Status.UNBOUNDED]
    expected = torch.tensor([[0.1, 0.2], [1.0, 0.5], [0.5, 0.5]], dtype=F64)
    torch.testing.assert_close(solution.value[:3], expected)
    assert solution.active.inequality.tolist()[:3] == [False, False, True]
    found = vmap(jacrev(lambda d: layer(zeros(2), d).sum()))(data)["cap"]
    torch.testing.assert_close(found[:3], tensor(0.0, 0.0, 1.0))
    assert bool(torch.isnan(found[3:]).all())


def transport(smoothing: float | None = None, columns: int = 3) -> bilevel.Layer:
    """A plan whose rows sum to ``a`` and whose first ``columns`` columns sum to a third: the last sum follows from the others."""
    third = torch.full((3,), 1 / 3, dtype=torch.float64)

    def sums(plan: torch.Tensor, cost: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return torch.cat([plan.sum(1) - a, (plan.sum(0) - third)[:columns]])

    options = {} if smoothing is None else {"smoothing": smoothing}
    return bilevel.argmin(
        lambda plan, cost, a: (plan * cost).sum() + 0.5 * (plan**2).sum(), lower=0.0, equality=sums, **options
    )


def test_equations_that_repeat_each_other_are_named_and_leaving_one_out_helps() -> None:
    torch.manual_seed(0)
    cost, start = torch.rand(3, 3, dtype=torch.float64), torch.full((3, 3), 1 / 9, dtype=torch.float64)
    weights = torch.arange(9.0, dtype=torch.float64).reshape(3, 3)
    a = torch.full((3,), 1 / 3, dtype=torch.float64, requires_grad=True)
    plan = transport()(start, cost, a)
    with pytest.raises(bilevel.SolveError, match=r"equality\[0\], .* repeat each other, .* leave one .* out") as caught:
        (weights * plan).sum().backward()
    assert caught.value.report.status is Status.DEGENERATE
    # What the message advises works; the reference moves mass between two rows, so that both forms stay feasible.
    fewer = transport(columns=2)
    (weights * fewer(start, cost, a)).sum().backward()
    step = 1e-5 * torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)
    with torch.no_grad():
        moved = [(weights * transport()(start, cost, a + sign * step)).sum() for sign in (1, -1)]
    assert a.grad is not None
    torch.testing.assert_close(a.grad @ step, (moved[0] - moved[1]) / 2, rtol=1e-5, atol=0)


def test_repeated_equations_that_no_argument_moves_apart_are_no_failure() -> None:
    cost = torch.arange(9.0, dtype=torch.float64).reshape(3, 3).sin().requires_grad_()
    a = torch.full((3,), 1 / 3, dtype=torch.float64)
    (slope,) = torch.autograd.grad(transport()(torch.full_like(cost, 1 / 9).detach(), cost, a).square().sum(), cost)
    (same,) = torch.autograd.grad(
        transport(columns=2)(torch.full_like(cost, 1 / 9).detach(), cost, a).square().sum(), cost
    )
    torch.testing.assert_close(slope, same)


@pytest.mark.parametrize("n", [3, 5])
def test_unknowns_stay_exactly_on_their_bounds_where_equations_repeat_each_other(n: int) -> None:
    # The linear systems are singular then, and their solutions moved zeros by 1e-32: too little to see, and off the bound.
    torch.manual_seed(n)
    costs, part = torch.rand(20, n, n, dtype=torch.float64), torch.full((n,), 1 / n, dtype=torch.float64)
    start = torch.full((n, n), 1 / n**2, dtype=torch.float64)
    weights = torch.arange(n * n, dtype=torch.float64).reshape(n, n)

    def plans(columns: int) -> bilevel.Layer:
        return bilevel.argmin(
            lambda plan, cost: (plan * cost).sum() + 0.5 * (plan**2).sum(),
            lower=0.0,
            equality=lambda plan, cost: torch.cat([plan.sum(1) - part, (plan.sum(0) - part)[:columns]]),
        )

    every, one_left_out = plans(n), plans(n - 1)
    x = vmap(lambda cost: every(start, cost))(costs)
    assert not bool(((x > 0) & (x < 1e-12)).any())
    slopes = [
        vmap(grad(lambda cost, layer=layer: (weights * layer(start, cost) ** 2).sum()))(costs)
        for layer in (every, one_left_out)
    ]
    torch.testing.assert_close(slopes[0], slopes[1])


@pytest.mark.parametrize("seed", [0, 3])
def test_inequalities_that_leave_no_interior(seed: int) -> None:
    # An inequality repeats an equation, so that multipliers of an interior-point method grow without end.
    torch.manual_seed(seed)
    n = 5
    M, a, inside = torch.randn(n, n).double(), torch.randn(n).double(), torch.randn(n).double()
    Q, A, G = M @ M.mT + 0.1 * torch.eye(n).double(), torch.randn(2, n).double(), torch.randn(2, n).double()
    b, h, w = A @ inside, G @ inside + 0.1, torch.arange(n).double()

    def layer(inequality: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> bilevel.Layer:
        return bilevel.argmin(
            lambda x, q: 0.5 * x @ Q @ x + q @ x,
            equality=lambda x, q: A @ x - b,
            inequality=inequality,
            lower=inside - 0.5,
            upper=inside + 0.5,
        )

    repeated = layer(lambda x, q: torch.cat([G @ x - h, (A @ x - b)[:1]]))
    plain, start = layer(lambda x, q: G @ x - h), torch.zeros(n).double()
    torch.testing.assert_close(repeated(start, a), plain(start, a))
    slopes = [jacrev(lambda q, one=one: (w * one(start, q) ** 2).sum())(a) for one in (repeated, plain)]
    torch.testing.assert_close(slopes[0], slopes[1])
