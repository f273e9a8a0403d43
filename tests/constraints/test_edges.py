"""Feasible sets without an interior, answers that are none, float32 closures: each is solved, or named with a remedy that works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.func import vmap

import bilevel
from bilevel import Status

F64 = torch.float64


def tensor(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=F64)


def distance(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return ((x - a) ** 2).sum()


ZERO, A = torch.zeros(2, dtype=F64), tensor(3.0, 1.0)
# Sets of one point, and the point.
POINTS: dict[str, tuple[dict[str, Any], torch.Tensor]] = {
    "a box of width zero": ({"lower": 1.0, "upper": 1.0}, tensor(1, 1)),
    "a box and an equation": ({"lower": 0.0, "upper": 1.0, "equality": lambda x, a: x.sum() - 2}, tensor(1, 1)),
    "bounds and an equation": ({"lower": 0.0, "equality": lambda x, a: x.sum()}, tensor(0, 0)),
    "a bound and an inequality": ({"upper": 1.0, "inequality": lambda x, a: 1 - x}, tensor(1, 1)),
    "opposite inequalities": ({"inequality": lambda x, a: torch.cat([x - 1, 1 - x])}, tensor(1, 1)),
    "a ball that touches a half-plane": (
        {"inequality": lambda x, a: torch.stack([(x**2).sum() - 1, 1 - x[0]]), "equality": lambda x, a: x[1]},
        tensor(1, 0),
    ),
}
SOLVERS = {"default": None, "SLSQP": bilevel.ScipyMinimize("SLSQP")}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", POINTS)
def test_a_set_of_one_point_is_solved_and_does_not_move_with_the_objective(name: str, solver: str) -> None:
    constraints, point = POINTS[name]
    a = A.clone().requires_grad_()
    options = {} if SOLVERS[solver] is None else {"solver": SOLVERS[solver]}
    solution = bilevel.argmin(distance, **constraints, **options).solve(ZERO, a)
    assert solution.report.status is Status.CONVERGED
    torch.testing.assert_close(solution.value.detach(), point, rtol=0, atol=1e-9)
    (slope,) = torch.autograd.grad(solution.value @ tensor(1, 2), a)
    torch.testing.assert_close(slope, torch.zeros_like(a), rtol=0, atol=1e-9)


def test_one_point_beside_ordinary_problems() -> None:
    layer = bilevel.argmin(
        lambda x, a, total: distance(x, a),
        lower=0.0,
        upper=1.0,
        equality=lambda x, a, total: x.sum() - total,
        on_failure="ignore",
    )
    totals = tensor(2.0, 1.0, 3.0, 0.0)
    solution = vmap(layer.solve, (None, None, 0))(ZERO, A, totals)
    converged, infeasible = Status.CONVERGED, Status.INFEASIBLE
    assert list(solution.report.status) == [converged, converged, infeasible, converged]
    torch.testing.assert_close(solution.value[[0, 1, 3]], torch.tensor([[1, 1], [1, 0], [0, 0]], dtype=F64))


def test_an_argument_that_moves_a_set_of_one_point_is_refused_by_name() -> None:
    total = torch.tensor(2.0, dtype=F64, requires_grad=True)
    layer = bilevel.argmin(
        lambda x, total: distance(x, A), lower=0.0, upper=1.0, equality=lambda x, total: x.sum() - total
    )
    x = layer(ZERO, total)
    with pytest.raises(
        bilevel.SolveError, match=r"equality, the upper bound of x\[0\].* leave no interior.* loosen one"
    ) as caught:
        x.sum().backward()
    assert caught.value.report.status is Status.DEGENERATE
    loose = bilevel.argmin(
        lambda x, total: distance(x, A), lower=0.0, upper=1.1, equality=lambda x, total: x.sum() - total
    )
    (slope,) = torch.autograd.grad(loose(ZERO, total).sum(), total)
    assert slope.item() == pytest.approx(1.0)


def test_opposite_inequalities_that_move_together_are_differentiated() -> None:
    b = tensor(3.0, 1.0).requires_grad_()
    layer = bilevel.argmin(lambda x, b: (x**2).sum(), inequality=lambda x, b: torch.cat([x - b, b - x]))
    (slope,) = torch.autograd.grad(layer(ZERO, b) @ tensor(1, 2), b)
    torch.testing.assert_close(slope, tensor(1, 2))


def test_a_constraint_whose_gradient_vanishes_is_named_and_stating_it_otherwise_helps() -> None:
    a = A.clone().requires_grad_()
    x = bilevel.argmin(lambda x, a: (x**2).sum(), inequality=lambda x, a: ((x - a) ** 2).sum())(ZERO, a)
    torch.testing.assert_close(x.detach(), A, rtol=0, atol=1e-5)
    with pytest.raises(bilevel.SolveError, match=r"gradient of inequality vanishes.*x = a in place of"):
        x.sum().backward()
    (slope,) = torch.autograd.grad(
        bilevel.argmin(lambda x, a: (x**2).sum(), equality=lambda x, a: x - a)(ZERO, a).sum(), a
    )
    torch.testing.assert_close(slope, tensor(1, 1))


def balls(x: torch.Tensor, a: torch.Tensor, apart: float = 0.0) -> torch.Tensor:
    """Unit balls around (1, 0) and (-1, 0), which touch at 0."""
    return torch.stack([((x - side * tensor(1, 0)) ** 2).sum() - 1 + apart for side in (1, -1)])


TOUCHING: dict[str, tuple[dict[str, Any], torch.Tensor, str]] = {
    "two balls": ({"inequality": balls}, tensor(0, 0), r"inequality\[0\], inequality\[1\]"),
    "two balls in a small unit": (
        {"inequality": lambda x, a: 1e-6 * balls(x, a)}, tensor(0, 0), r"inequality\[0\], inequality\[1\]",
    ),
    "a disk and its tangent": (
        {"inequality": lambda x, a: torch.stack([(x**2).sum() - 1, 1 - x[0]])}, tensor(1, 0), r"inequality\[0\], inequality\[1\]",
    ),
    "a disk and a bound": (
        {"inequality": lambda x, a: (x**2).sum() - 1, "lower": tensor(1, -5)}, tensor(1, 0), r"inequality, the lower bound of x\[0\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "solver"), [*((name, None) for name in TOUCHING), ("two balls", bilevel.ScipyMinimize("trust-constr"))]
)
def test_sets_that_touch_in_one_point_are_solved_and_the_missing_qualification_is_named(name: str, solver: Any) -> None:
    constraints, point, names = TOUCHING[name]
    a = A.clone().requires_grad_()
    options = {} if solver is None else {"solver": solver}
    x = bilevel.argmin(distance, **constraints, **options)(ZERO + 0.3, a)
    torch.testing.assert_close(x.detach(), point, rtol=0, atol=2e-8)
    with pytest.raises(
        bilevel.SolveError, match=rf"no constraint qualification holds: {names} leave no interior.* loosen one"
    ) as caught:
        x.sum().backward()
    assert caught.value.report.status is Status.DEGENERATE


def test_balls_that_overlap_or_are_apart_are_ordinary_and_loosening_is_the_remedy() -> None:
    """Two circles cross at (0, sqrt(2 r - r^2)) with r = 1e-3, whatever the objective."""
    a = A.clone().requires_grad_()
    apart = bilevel.argmin(distance, inequality=lambda x, a: balls(x, a, 1e-3), on_failure="ignore").solve(ZERO, a)
    assert apart.report.status is Status.INFEASIBLE
    x = bilevel.argmin(distance, inequality=lambda x, a: balls(x, a, -1e-3))(ZERO, a)
    torch.testing.assert_close(x.detach(), tensor(0, 1e-3**0.5), rtol=1e-8, atol=1e-10)
    (slope,) = torch.autograd.grad(x.sum(), a)
    torch.testing.assert_close(slope, torch.zeros_like(a), rtol=0, atol=1e-9)


def test_a_flat_objective_is_told_from_a_missing_qualification_and_a_ridge_helps() -> None:
    cost = tensor(1.0, 1.0, 3.0).requires_grad_()
    bounds = {"lower": 0.0, "upper": 1.0, "inequality": lambda x, c: 1 - x.sum()}
    start = torch.zeros(3, dtype=F64)
    x = bilevel.argmin(lambda x, c: 0 * (c @ x), **bounds)(start, cost)
    with pytest.raises(bilevel.SolveError, match=r"may not be unique.*ridge.*smoothing=1e-3"):
        x.sum().backward()
    for layer in (
        bilevel.argmin(lambda x, c: 0 * (c @ x) + 1e-3 * (x**2).sum(), **bounds),
        bilevel.argmin(lambda x, c: 0 * (c @ x), **bounds, smoothing=1e-3),
    ):
        (slope,) = torch.autograd.grad(layer(start, cost).sum(), cost)
        torch.testing.assert_close(slope, torch.zeros_like(cost), rtol=0, atol=1e-9)


def test_a_far_start_reaches_the_solution() -> None:
    """Rosenbrock's function in a disk: the solution by Newton's method on the circle."""

    def rosenbrock(x: torch.Tensor) -> torch.Tensor:
        return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2

    layer = bilevel.argmin(rosenbrock, inequality=lambda x: (x**2).sum() - 1.5)
    angle = torch.tensor(0.7, dtype=F64)
    for _ in range(50):
        along = lambda t: rosenbrock(1.5**0.5 * torch.stack([t.cos(), t.sin()]))
        angle = angle - torch.func.grad(along)(angle) / torch.func.hessian(along)(angle)
    expected = 1.5**0.5 * torch.stack([angle.cos(), angle.sin()])
    for start in (tensor(1e4, -1e4), tensor(-300, 20)):
        torch.testing.assert_close(layer(start), expected, rtol=1e-8, atol=1e-8)


FALLING: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "exp": lambda x: (-x).exp().sum(),
    "1/x": lambda x: (1 / (1 + x)).sum(),
    "sqrt": lambda x: -(1 + x).sqrt().sum(),
}


@pytest.mark.parametrize("constraint", [{"lower": 0.0}, {"inequality": lambda x: -x}], ids=["bound", "inequality"])
@pytest.mark.parametrize("name", FALLING)
def test_an_objective_without_a_minimum_has_no_solution(name: str, constraint: dict[str, Any]) -> None:
    layer = bilevel.argmin(FALLING[name], **constraint)
    with pytest.raises(bilevel.SolveError, match=r"no minimum|falls without end") as caught:
        layer(ZERO)
    assert caught.value.report.status in (Status.STAGNATED, Status.UNBOUNDED)
    ridged = bilevel.argmin(lambda x: FALLING[name](x) + 1e-2 * (x**2).sum(), **constraint)
    assert ridged.solve(ZERO).report.status is Status.CONVERGED


KINKS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "objective": (
        "the objective",
        {"objective": lambda x, a: (x - a).abs().sum(), "inequality": lambda x, a: x - 4},
        {"objective": lambda x, a: ((x - a) ** 2 + 1e-6).sqrt().sum(), "inequality": lambda x, a: x - 4},
    ),
    "bounds alone": (
        "the objective",
        {"objective": lambda x, a: (x - a).abs().sum(), "lower": -3.0},
        {"objective": lambda x, a: ((x - a) ** 2 + 1e-6).sqrt().sum(), "lower": -3.0},
    ),
    "constraint": (
        "inequality",
        {"objective": distance, "inequality": lambda x, a: x.max() - 0.5},
        {"objective": distance, "inequality": lambda x, a: x - 0.5},
    ),
}


@pytest.mark.parametrize("name", KINKS)
def test_a_kink_is_named_and_its_remedy_works(name: str) -> None:
    where, kinked, smooth = KINKS[name]
    with pytest.raises(bilevel.SolveError, match=rf"ended at a kink of {where}: its gradient jumps there") as caught:
        bilevel.argmin(kinked["objective"], **{k: v for k, v in kinked.items() if k != "objective"})(ZERO, A)
    assert caught.value.report.status is Status.KINK
    layer = bilevel.argmin(smooth["objective"], **{k: v for k, v in smooth.items() if k != "objective"})
    assert layer.solve(ZERO, A).report.status is Status.CONVERGED


@pytest.mark.parametrize("seed", range(3))
def test_float32_closures_are_solved_in_float64(seed: int) -> None:
    torch.manual_seed(seed)
    G, h = torch.rand(3, 5) - 0.3, torch.rand(3)
    a = torch.linspace(1, 3, 5)
    layer = lambda G, h: bilevel.argmin(distance, lower=-2.0, inequality=lambda x, a: G @ x - h)
    narrow, wide = a.clone().requires_grad_(), a.double().requires_grad_()
    x = layer(G, h)(torch.zeros(5), narrow)
    expected = layer(G.double(), h.double())(torch.zeros(5, dtype=F64), wide)
    torch.testing.assert_close(x.detach().double(), expected.detach(), rtol=1e-6, atol=1e-6)
    weights = torch.arange(5.0)
    (one,) = torch.autograd.grad(x @ weights, narrow)
    (other,) = torch.autograd.grad(expected @ weights.double(), wide)
    torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("init", "closure"), [(torch.float32, F64), (F64, torch.float32)])
def test_closures_of_another_dtype_than_init_are_refused_with_a_sentence(
    init: torch.dtype, closure: torch.dtype
) -> None:
    G = torch.ones(1, 2, dtype=closure)
    layer = bilevel.argmin(distance, inequality=lambda x, a: G @ x - 1)
    with pytest.raises(bilevel.DtypeError, match="tensors that inequality reaches to have the dtype of init"):
        layer(torch.zeros(2, dtype=init), A.to(init))


@pytest.mark.parametrize("given", [(1.0, 0.2), (3.0, 0.0), (0.5, 0.0)])
def test_an_answer_that_is_none_is_refused(given: tuple[float, float]) -> None:
    layer = bilevel.argmin(distance, upper=1.0)
    a = tensor(3.0, 0.0)
    with pytest.raises(bilevel.SolveError, match=r"is no solution: the solution found from it is .* away"):
        layer.at(tensor(*given), a)
    torch.testing.assert_close(layer.at(tensor(1.0 - 1e-4, 1e-5), a), tensor(1.0, 0.0))


def test_external_solvers_are_told_that_a_problem_is_infeasible() -> None:
    layer = bilevel.argmin(
        distance, inequality=lambda x, a: torch.cat([x - 1, 2 - x]), solver=bilevel.ScipyMinimize("SLSQP")
    )
    with pytest.raises(bilevel.SolveError, match=r"inequality\[\d\] is still violated by 0\.5") as caught:
        layer(ZERO, A)
    assert caught.value.report.status is Status.INFEASIBLE


def test_no_residual_is_said_to_be_asked_where_there_is_no_solution() -> None:
    with pytest.raises(bilevel.SolveError) as caught:
        bilevel.argmin(lambda x, a: a @ x, lower=0.0)(ZERO, tensor(1.0, -1.0))
    assert caught.value.report.status is Status.UNBOUNDED
    assert "asked" not in str(caught.value) and "asked" not in str(caught.value.report)


@pytest.mark.parametrize("unit", [1e-15, 1e-8, 1e8])
@pytest.mark.parametrize("kind", ["equality", "inequality"])
def test_constraints_in_any_unit_are_the_same(kind: str, unit: float) -> None:
    """x₀ + x₁ = b, or at most b: x = (0, 1) for b = 1, dx₀/db = ½, and a multiplier of 2 in units of one."""
    b = torch.tensor(1.0, dtype=F64, requires_grad=True)
    layer = bilevel.argmin(lambda x, b: distance(x, tensor(1, 2)), **{kind: lambda x, b: unit * (x.sum() - b)})
    solution = layer.solve(ZERO, b)
    torch.testing.assert_close(solution.value.detach(), tensor(0, 1))
    assert getattr(solution.multipliers, kind).item() * unit == pytest.approx(2)
    (slope,) = torch.autograd.grad(solution.value[0], b)
    assert slope.item() == pytest.approx(0.5)


@pytest.mark.parametrize("unit", [1e-6, 1e-8])
@pytest.mark.parametrize("weight", [1.0, 1e-8, 1e-10])
def test_small_constraints_of_small_unknowns_hold(unit: float, weight: float) -> None:
    """The same program in another unit of x: its constraints look moderate by x's own unit, and are tiny in that of the solution."""
    layer = bilevel.argmin(
        lambda x, a: distance(x / unit, a),
        equality=lambda x, a: weight * (x.sum() / unit - 1),
        inequality=lambda x, a: weight * (x[0] / unit - 0.2),
    )
    a = tensor(1, 0.5, -1).requires_grad_()
    x = layer(torch.zeros(3, dtype=F64), a)
    torch.testing.assert_close(x.detach() / unit, tensor(0.2, 1.15, -0.35))
    (slope,) = torch.autograd.grad(x[1] / unit, a)
    torch.testing.assert_close(slope, tensor(0, 0.5, -0.5))


WRONG: dict[str, tuple[dict[str, Any], Status, str]] = {
    "a bound of NaN": ({"lower": tensor(float("nan"), 0)}, Status.NOT_FINITE, r"the lower bound of x\[0\] is nan"),
    "a lower bound of inf": ({"lower": float("inf")}, Status.INFEASIBLE, r"no number is between"),
    "an upper bound of -inf": ({"upper": tensor(0, -float("inf"))}, Status.INFEASIBLE, r"lower bound of x\[1\] .* no number is between"),
    "a constraint of -inf": (
        {"inequality": lambda x, a: x - tensor(float("inf"), 0.5)}, Status.NOT_FINITE, r"inequality\[0\] is -inf at the start.*leave out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_finite_is_named(name: str) -> None:
    constraints, status, sentence = WRONG[name]
    with pytest.raises(bilevel.SolveError, match=sentence) as caught:
        bilevel.argmin(distance, **constraints)(ZERO, A)
    assert caught.value.report.status is status
