"""Solvers of other origin, and what each refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.func import jacrev, vmap

import bilevel

F64 = torch.float64


def tensor(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=F64)


def objective(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return ((x - a) ** 4).sum() + ((x - a) ** 2).sum()


STATED: dict[str, Any] = {
    "equality": lambda x, a: x[0] - x[1],
    "inequality": lambda x, a: (x * x).sum() - 1,
    "lower": tensor(-9.0, -9.0, 0.75),
}
A = tensor(1.0, 2.0, 0.3)


@pytest.fixture(scope="module")
def reference() -> tuple[torch.Tensor, torch.Tensor]:
    layer = bilevel.argmin(objective, **STATED)
    call = lambda a: layer(torch.zeros(3, dtype=F64), a)
    return call(A), jacrev(call)(A)


def perturbed(objective: Any, init: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    side = ((1 - 0.75**2) / 2) ** 0.5
    return tensor(side, side, 0.75) + 1e-7


def with_multipliers(
    objective: Any, init: torch.Tensor, a: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return perturbed(objective, init, a), {"equality": tensor(0.0)[0], "inequality": tensor(1.0)[0]}


@pytest.mark.parametrize(
    "solver",
    [
        bilevel.InteriorPoint(),
        bilevel.ScipyMinimize("SLSQP"),
        bilevel.ScipyMinimize("trust-constr"),
        perturbed,
        with_multipliers,
    ],
    ids=lambda solver: getattr(solver, "__name__", str(solver)),
)
def test_solvers_agree(solver: Any, reference: tuple[torch.Tensor, torch.Tensor]) -> None:
    layer = bilevel.argmin(objective, solver=solver, **STATED)
    call = lambda a: layer(torch.zeros(3, dtype=F64), a)
    torch.testing.assert_close(call(A), reference[0])
    torch.testing.assert_close(jacrev(call)(A), reference[1])
    assert layer.solve(torch.zeros(3, dtype=F64), A).active.lower.tolist() == [False, False, True]


@pytest.mark.parametrize(
    "solver",
    [bilevel.ProjectedNewton(), bilevel.ProjectedLBFGS(), bilevel.InteriorPoint(), bilevel.ScipyMinimize("L-BFGS-B")],
    ids=str,
)
def test_bounds_alone(solver: Any) -> None:
    layer = bilevel.argmin(lambda x, a: ((x - a) ** 2).sum(), lower=0.0, upper=1.0, solver=solver)
    points = 2 * torch.randn(5, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(vmap(layer, (None, 0))(torch.zeros(3, dtype=F64), points), points.clamp(0, 1))


def test_a_wrong_answer_of_a_users_solver_is_not_believed() -> None:
    layer = bilevel.argmin(objective, solver=lambda f, init, a: torch.ones(3, dtype=F64), **STATED)
    with pytest.raises(bilevel.SolveError) as caught:
        layer(torch.zeros(3, dtype=F64), A)
    assert caught.value.report.status is bilevel.Status.NOT_CONVERGED


def test_a_budget_that_is_spent_is_reported() -> None:
    layer = bilevel.argmin(objective, solver=bilevel.InteriorPoint(max_steps=1), **STATED)
    with pytest.warns(bilevel.BudgetWarning):
        layer(torch.zeros(3, dtype=F64), A)


@pytest.mark.parametrize(
    ("solver", "sentence"),
    [
        (bilevel.LBFGS(), "expected a solver that takes constraints, got LBFGS"),
        (bilevel.ScipyMinimize("BFGS"), "expected a scipy method that takes constraints, got BFGS"),
        (bilevel.ProjectedNewton(), "expected bounds alone"),
        (bilevel.ProjectedLBFGS(), "expected bounds alone"),
    ],
)
def test_solvers_that_take_no_constraints_say_so(solver: Any, sentence: str) -> None:
    with pytest.raises(bilevel.ArgumentError, match=sentence):
        bilevel.argmin(objective, solver=solver, **STATED)(torch.zeros(3, dtype=F64), A)


def test_constrained_solvers_need_constraints() -> None:
    with pytest.raises(bilevel.ArgumentError, match="expected bounds or constraints for InteriorPoint, got none"):
        bilevel.argmin(objective, solver=bilevel.InteriorPoint())(torch.zeros(3, dtype=F64), A)


@pytest.mark.parametrize(
    ("given", "error", "sentence"),
    [
        ({"upper": tensor(1.0, 2.0)}, bilevel.ShapeError, "upper to have a shape that can be broadcast"),
        ({"upper": lambda: 1.0}, bilevel.ArgumentError, "a function of the layer's arguments without x"),
        ({"upper": 1j * tensor(1.0, 1.0, 1.0)}, bilevel.DtypeError, "upper to be numbers or real tensors"),
        ({"lower": {"u": 0.0}}, bilevel.DtypeError, "lower to be numbers or real tensors"),
        ({"equality": lambda x: x.sum()}, bilevel.ShapeError, "equality to be a function of"),
        ({"equality": lambda x, a: 1.0}, bilevel.DtypeError, "value of equality"),
        ({"inequality": lambda x, a: x.sum().to(torch.complex128)}, bilevel.DtypeError, "inequality to return real"),
    ],
)
def test_what_cannot_be_a_constraint_is_named(given: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        bilevel.argmin(objective, **given)(torch.zeros(3, dtype=F64), A)


def test_settings_are_checked_when_the_layer_is_made() -> None:
    with pytest.raises(bilevel.ArgumentError, match="expected equality to be a function"):
        bilevel.argmin(objective, equality=3.0)
    with pytest.raises(bilevel.ArgumentError, match="expected smoothing to be a positive number"):
        bilevel.argmin(objective, lower=0.0, smoothing=-1.0)
    with pytest.raises(bilevel.ArgumentError, match="expected lower, upper, equality or inequality with smoothing"):
        bilevel.argmin(objective, smoothing=1e-3)


def test_a_tensor_that_a_constraint_captures_is_found() -> None:
    limit = torch.tensor(1.0, dtype=F64, requires_grad=True)
    for given in ({"inequality": lambda x, a: x.sum() - limit}, {"upper": limit}, {"upper": lambda a: limit}):
        with pytest.raises(bilevel.CapturedTensorError):
            bilevel.argmin(objective, **given)(torch.zeros(3, dtype=F64), A)  # type: ignore[arg-type]


def test_a_start_that_is_the_solution_takes_one_step() -> None:
    layer = bilevel.argmin(objective, **STATED)
    x = layer(torch.zeros(3, dtype=F64), A)
    solution = layer.solve(x + 1e-6, A)
    torch.testing.assert_close(solution.value, x)
    assert solution.report.iterations.item() == 1
    torch.testing.assert_close(
        jacrev(lambda a: layer.at(x, a))(A), jacrev(lambda a: layer(torch.zeros(3, dtype=F64), a))(A)
    )


def test_a_start_that_is_a_maximum_is_left() -> None:
    layer = bilevel.argmin(lambda x: 0.1 * (x**4).sum() - (x * x).sum(), inequality=lambda x: x.sum() - 100)
    torch.testing.assert_close(layer(torch.zeros(3, dtype=F64)).abs(), torch.full((3,), 5**0.5, dtype=F64))


# The least value of the inequality on the plane is 9/61 = 0.1475.
@pytest.mark.parametrize(
    ("limit", "feasible"), [(0.1, False), (0.2, True), pytest.param(0.4, True, marks=pytest.mark.long)]
)
def test_the_rounding_of_float32_is_not_taken_for_infeasible(limit: float, feasible: bool) -> None:
    factors = torch.tensor([0.5, 0.75, 1.0])

    def scaled(x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float32:
            raise RuntimeError("this function works in float32 alone")
        return factors.diag() @ x

    layer = bilevel.argmin(
        lambda x, a: ((x - a) ** 2).sum(),
        equality=lambda x, a: x.sum() - 1,
        inequality=lambda x, a: (scaled(x) ** 2).sum() - limit,
        on_failure="ignore",
    )
    report = layer.solve(torch.full((3,), 1 / 3), torch.tensor([0.0, 0.2, 2.0])).report
    assert (report.status is not bilevel.Status.INFEASIBLE) is feasible
    if not feasible:
        assert "as an argument, so that the solve can run in float64" in report.message
