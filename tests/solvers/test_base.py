"""The loop that owns limits, masks and statuses, and the judge."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import bilevel
from bilevel.reports import Status
from bilevel.solvers._base import Goal, InnerSolution, InnerSolver, as_inner_solver, iterate
from bilevel.solvers.judging.judge import solve_inner
from bilevel.tolerance import Target, Tolerance

from . import support
from .support import F64, statuses


@dataclass(frozen=True)
class _State:
    x: torch.Tensor
    residual: torch.Tensor
    count: int = 0


def _goal(batch: int, threshold: float) -> tuple[Goal, torch.Tensor]:
    def objective(x, a):
        return (a * x**2).sum()

    x = torch.ones(batch, 1, dtype=F64)
    problem, x = support.build(support.ArgminSystem, objective, x, x[:, 0], batched=True)
    return Goal(problem, x, Target(absolute=threshold, asked=True)), x


def test_each_problem_ends_by_itself():
    goal, x = _goal(4, 0.1)
    rates = torch.tensor([[0.5], [0.05], [float("nan")], [3e6]], dtype=F64)

    def step(state, active):
        x = state.x * rates
        return _State(x, x, state.count + 1), None

    solution, state = iterate(_State(x, x), step, goal, 6)
    assert [Status(s) for s in solution.status.tolist()] == [
        Status.CONVERGED, Status.CONVERGED, Status.NOT_FINITE, Status.DIVERGED,
    ]  # fmt: skip
    assert solution.iterations.tolist() == [4, 1, 1, 2]
    torch.testing.assert_close(solution.x[:3], torch.tensor([[0.0625], [0.05], [1.0]], dtype=F64))
    assert state.count == 4


def test_verdict_keeps_the_old_state():
    goal, x = _goal(2, 0.1)

    def step(state, active):
        x = state.x * 0.5
        verdict = torch.tensor([int(Status.RUNNING), int(Status.LINE_SEARCH_FAILED)])
        return _State(x, x), verdict

    solution, _ = iterate(_State(x, x), step, goal, 10)
    assert [Status(s) for s in solution.status.tolist()] == [Status.CONVERGED, Status.LINE_SEARCH_FAILED]
    assert solution.x[1].item() == 1.0


def test_infinite_iterate_with_a_finite_residual_is_not_kept():
    goal, x = _goal(2, 1e-9)

    def step(state, active):
        x = torch.stack([state.x[0] * float("inf"), state.x[1] * 0.5])
        return _State(x, torch.ones_like(x)), None

    solution, _ = iterate(_State(x, x), step, goal, 3)
    assert [Status(s) for s in solution.status.tolist()] == [Status.NOT_FINITE, Status.MAX_STEPS]
    assert solution.x[0].item() == 1.0


@dataclass(frozen=True)
class _Claims(InnerSolver):
    """Returns its start and says that it has converged."""

    def solve(self, problem, init, goal):
        codes = torch.zeros(len(init), dtype=torch.int64)
        return InnerSolution(init, codes, codes)


def test_a_claim_is_judged_by_the_true_residual():
    problem, x = support.build(support.ArgminSystem, lambda x: (x**2).sum(), torch.ones(2, dtype=F64))
    outcome = solve_inner(_Claims(), problem, x, Tolerance(delta=1e-6).inner(F64))
    assert statuses(outcome) == [Status.STAGNATED]
    torch.testing.assert_close(outcome.residual_norm, torch.full((1,), 8.0, dtype=F64).sqrt())


@pytest.mark.parametrize(
    "solver",
    [
        bilevel.GradientDescent(0.3, 200),
        bilevel.TorchOptimizer(torch.optim.SGD, lr=0.3, max_steps=200),
        bilevel.LBFGS(),
        bilevel.Newton(),
        bilevel.Newton(dense_limit=0),
        bilevel.ScipyMinimize("BFGS"),
        as_inner_solver(lambda objective, init, c: torch.ones_like(init)),
    ],
    ids=lambda solver: solver.name,
)
@pytest.mark.parametrize("start", [0.0, 1.0])
def test_an_objective_without_a_value_has_no_minimum_though_its_gradient_vanishes(solver, start):
    c = torch.tensor([float("nan"), 0.0, float("inf")], dtype=F64)  # added, so that the gradient does not show it
    x = torch.full((3, 2), start, dtype=F64)
    outcome = support.minimize(solver, lambda x, c: ((x - 1) ** 2).sum() + c, x, c, batched=True)
    assert statuses(outcome) == [Status.NOT_FINITE, Status.CONVERGED, Status.NOT_FINITE]


def test_scale_is_measured_from_the_linearisation_that_a_solver_makes(monkeypatch):
    problem, x = support.build(support.ArgminSystem, lambda x: (x**2).sum(), torch.ones(2, dtype=F64))
    plain = Goal(problem, x, Target(relative=1e-6))
    shared = Goal(problem, x, Target(relative=1e-6))
    expected = plain.threshold
    shared.measure(problem.linearize_dense(x))
    monkeypatch.delattr(type(problem), "linearize")  # so that another linearisation would be an error
    torch.testing.assert_close(shared.threshold, expected)


def test_dense_linearisation_agrees_with_products():
    batch = support.root()
    problem, x = support.build(batch.kind, batch.function, batch.solution, *batch.args, batched=True)
    dense, plain = problem.linearize_dense(x), problem.linearize(x)
    plain.operator.materialize = None
    torch.testing.assert_close(dense.residual, plain.residual.detach())
    torch.testing.assert_close(dense.operator.dense(), plain.operator.dense())
    v = torch.randn_like(x)
    torch.testing.assert_close(dense.operator.matvec(v), plain.operator.matvec(v))
    torch.testing.assert_close(dense.operator.rmatvec(v), plain.operator.rmatvec(v))
