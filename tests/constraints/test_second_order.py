"""Points that meet the first-order conditions and are no minima are left, or named. Weakly active constraints at minima are no fault."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.func import vmap

import bilevel
from bilevel import Status

F64 = torch.float64
Objective = Callable[[torch.Tensor], torch.Tensor]


def tensor(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=F64)


def quadratic(*rows: tuple[float, ...]) -> Objective:
    H = torch.tensor(rows, dtype=F64)
    return lambda x: 0.5 * x @ H @ x


BOX = {"lower": 0.0, "upper": 1.0}
# An objective, constraints at which zero meets the first-order conditions, and the least value.
SADDLES: dict[str, tuple[Objective, dict[str, Any], int, float]] = {
    "a cubic": (lambda x: -(x**3).sum(), BOX, 1, -1.0),
    "a quartic": (lambda x: -(x**4).sum(), BOX, 2, -2.0),
    "a product": (lambda x: -x[0] * x[1], BOX, 2, -1.0),
    "a product of three": (lambda x: -x.prod(), BOX, 3, -1.0),
    "a pair of three": (quadratic((1, 1, -3), (1, 2, 1), (-3, 1, 1)), BOX, 3, -2.0),
    "a free and a bounded unknown": (lambda x: x[0] * x[1], {"lower": tensor(-1, 0), "upper": 1.0}, 2, -1.0),
    "between bounds": (lambda x: -(x**2).sum(), {"lower": -1.0, "upper": 1.0}, 2, -2.0),
    "an inequality": (lambda x: -(x**3).sum(), {"inequality": lambda x: torch.cat([-x, x - 1])}, 1, -1.0),
    "an equality": (lambda x: -(x[0] ** 3), {**BOX, "equality": lambda x: x[1] - x[0]}, 2, -1.0),
    "a curved constraint": (
        lambda x: x[1] - 2 * x[0] ** 2,
        {"inequality": lambda x: torch.stack([x[0] ** 2 - x[1], x[0] - 1, -1 - x[0]])}, 2, -1.0,
    ),
    "a curved constraint, flat to second order": (
        lambda x: x[1] - x[0] ** 2 - x[0] ** 4,
        {"inequality": lambda x: torch.stack([x[0] ** 2 - x[1], x[0] - 1, -1 - x[0]])}, 2, -1.0,
    ),
    "many unknowns": (lambda x: -(x**3).sum(), BOX, 600, -600.0),
}  # fmt: skip
MINIMA: dict[str, tuple[Objective, dict[str, Any], int]] = {
    "a cubic": (lambda x: (x**3).sum(), BOX, 2),
    "a quartic": (lambda x: (x**4).sum(), BOX, 2),
    "a product": (lambda x: x[0] * x[1], BOX, 2),
    "an indefinite copositive matrix": (quadratic((1, 3, 3), (3, 1, 3), (3, 3, 1)), BOX, 3),
    "an inequality": (lambda x: (x**3).sum(), {"inequality": lambda x: torch.cat([-x, x - 1])}, 2),
    "a curved constraint": (
        lambda x: x[1] - x[0] ** 2 + x[0] ** 4, {"inequality": lambda x: torch.stack([x[0] ** 2 - x[1], x[0] - 1, -1 - x[0]])}, 2,
    ),
    "a fall behind a rise": (lambda x: (x**3 - 10 * x**4).sum(), {"lower": 0.0, "upper": 0.2}, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", SADDLES)
def test_a_first_order_point_that_is_no_minimum_is_left(name: str) -> None:
    objective, constraints, n, least = SADDLES[name]
    solution = bilevel.argmin(objective, **constraints).solve(torch.zeros(n, dtype=F64))
    assert solution.report.status is Status.CONVERGED
    assert objective(solution.value).item() == pytest.approx(least, rel=1e-8)


@pytest.mark.parametrize("name", MINIMA)
def test_a_minimum_is_none_of_these(name: str) -> None:
    objective, constraints, n = MINIMA[name]
    solution = bilevel.argmin(objective, **constraints).solve(torch.zeros(n, dtype=F64))
    assert solution.report.status is Status.CONVERGED
    torch.testing.assert_close(solution.value, torch.zeros(n, dtype=F64), rtol=0, atol=1e-7)


def test_an_endless_fall_from_a_flat_bound_is_named() -> None:
    with pytest.raises(bilevel.SolveError, match="falls without end") as caught:
        bilevel.argmin(lambda x: -(x**3).sum(), lower=0.0)(torch.zeros(1, dtype=F64))
    assert caught.value.report.status is Status.UNBOUNDED


@pytest.mark.parametrize("solver", [bilevel.ProjectedNewton(), bilevel.ScipyMinimize("L-BFGS-B")], ids=["own", "scipy"])
def test_a_chosen_solver_that_stays_there_is_named(solver: Any) -> None:
    with pytest.raises(bilevel.SolveError, match="saddle or a maximum") as caught:
        bilevel.argmin(lambda x: -(x**3).sum(), **BOX, solver=solver)(torch.zeros(1, dtype=F64))
    assert caught.value.report.status is Status.INDEFINITE


def test_each_problem_of_a_batch_is_judged_by_itself() -> None:
    layer = bilevel.argmin(lambda x, a: a * (x**3).sum() + 0.1 * x[1] ** 2, **BOX)
    solution = vmap(layer.solve, (None, 0))(torch.zeros(2, dtype=F64), tensor(1, -1, 2))
    assert list(solution.report.status) == [Status.CONVERGED] * 3
    torch.testing.assert_close(
        solution.value, torch.stack([tensor(0, 0), tensor(1, 0), tensor(0, 0)]), rtol=0, atol=1e-6
    )


TERMS: dict[str, tuple[Objective, Any, int, bool]] = {
    "a maximum at a kink": (lambda x: x.sum() - (x**2).sum(), bilevel.prox.L1(1.0), 2, False),
    "a minimum at a kink": (lambda x: x.sum() + (x**2).sum(), bilevel.prox.L1(1.0), 2, True),
    "a cubic at a kink": (lambda x: x.sum() + (x**3).sum(), bilevel.prox.L1(1.0), 2, False),
    "a cubic at a bound": (lambda x: -(x**3).sum(), bilevel.prox.NonNegative(), 1, False),
    "a product at bounds": (lambda x: -x[0] * x[1], bilevel.prox.NonNegative(), 2, False),
    "a product that grows": (lambda x: x[0] * x[1], bilevel.prox.NonNegative(), 2, True),
    "a ridge that holds": (lambda x: x.sum() - (x**2).sum(), bilevel.prox.ElasticNet(1.0, 3.0), 2, True),
}


@pytest.mark.parametrize("name", TERMS)
def test_a_term_at_its_threshold_does_not_hide_a_maximum(name: str) -> None:
    objective, term, n, minimum = TERMS[name]
    report = bilevel.argmin(objective, prox=term, on_failure="ignore").solve(torch.zeros(n, dtype=F64)).report
    assert report.status is (Status.CONVERGED if minimum else Status.INDEFINITE)
