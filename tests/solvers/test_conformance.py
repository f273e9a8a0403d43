"""What every inner solver must do, on every problem that it is meant for."""

from __future__ import annotations

import pytest
import torch

import bilevel
from bilevel.reports import Status
from bilevel.solvers.judging.judge import solve_inner
from bilevel.tolerance import Tolerance

from . import support
from .support import F32, F64, Batch

BATCHES = {
    make.__name__: make()
    for make in (support.quadratic, support.logistic, support.rosenbrock, support.root, support.contraction)
}
SMOOTH = {
    "newton": bilevel.Newton(),
    "newton_krylov": bilevel.Newton(dense_limit=0),
    "newton_cg": bilevel.Newton(linear_solver=bilevel.CG()),
    "lbfgs": bilevel.LBFGS(),
    "scipy": bilevel.ScipyMinimize(),
    "scipy_bfgs": bilevel.ScipyMinimize("BFGS"),
    "scipy_trust_exact": bilevel.ScipyMinimize("trust-exact"),
}
DESCENTS = {
    "descent": bilevel.GradientDescent(lr=1.0, max_steps=20_000, line_search=True),
    "sgd": bilevel.TorchOptimizer(torch.optim.SGD, lr=0.5, max_steps=5000),
}
ROOTS = {
    "newton": bilevel.Newton(),
    "newton_krylov": bilevel.Newton(dense_limit=0),
    "newton_gmres": bilevel.Newton(linear_solver=bilevel.GMRES()),
    "scipy": bilevel.ScipyRoot(),
    "scipy_lm": bilevel.ScipyRoot("lm"),
}
MAPPINGS = {
    "anderson": bilevel.Anderson(),
    "anderson_damped": bilevel.Anderson(mixing=0.7, history=3),
    "iteration": bilevel.FixedPointIteration(),
    "iteration_damped": bilevel.FixedPointIteration(damping=0.3),
}
PAIRS = [
    *[
        (problem, name, solver)
        for problem in ("quadratic", "logistic", "rosenbrock")
        for name, solver in SMOOTH.items()
    ],
    *[("logistic", name, solver) for name, solver in DESCENTS.items()],
    *[(problem, name, solver) for problem in ("root", "contraction") for name, solver in ROOTS.items()],
    *[("contraction", name, solver) for name, solver in MAPPINGS.items()],
]
pairs = pytest.mark.parametrize(
    ("batch", "solver"),
    [pytest.param(BATCHES[problem], solver, id=f"{problem}-{name}") for problem, name, solver in PAIRS],
)
dtypes = pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])


@pairs
@dtypes
def test_agrees_with_oracle(batch: Batch, solver, dtype):
    outcome = batch.solve(solver, dtype)
    assert support.statuses(outcome) == [Status.CONVERGED] * len(batch.init)
    assert outcome.x.dtype == dtype
    assert bool((outcome.residual_norm <= outcome.threshold * (1 + 1e-3) + 1e-6 * (dtype == F32)).all())
    error = (outcome.x.double() - batch.solution).norm(dim=-1)
    rounding = 100 * torch.finfo(dtype).eps * (1 + batch.solution.norm(dim=-1))
    assert bool((error <= batch.sensitivity * (2 * outcome.threshold.double() + rounding)).all())


@pairs
def test_batch_is_stack_of_singles(batch: Batch, solver):
    together = batch.solve(solver, F64)
    for index in range(len(batch.init)):
        alone = batch.solve_one(index, solver, F64)
        assert torch.equal(alone.status, together.status[index : index + 1])
        assert torch.equal(alone.iterations, together.iterations[index : index + 1])
        torch.testing.assert_close(alone.x[0], together.x[index], rtol=1e-9, atol=1e-9)


@pairs
def test_start_at_the_solution_is_left_unchanged(batch: Batch, solver):
    first = batch.solve(solver, F64)
    tolerance = Tolerance(delta=2 * float(first.residual_norm.max()) + 1e-12)
    problem, start = support.build(batch.kind, batch.function, first.x, *batch.args, batched=True)
    again = solve_inner(solver, problem, start, tolerance.inner(F64))
    assert support.statuses(again) == [Status.CONVERGED] * len(start)
    assert again.iterations.tolist() == [0] * len(start)
    assert torch.equal(again.x, start)


@pairs
def test_keeps_no_graph_and_leaves_init_alone(batch: Batch, solver):
    init = batch.init.clone()
    outcome = batch.solve(solver, F64, Tolerance(delta=1e-4))
    assert not outcome.x.requires_grad
    assert torch.equal(batch.init, init)


LIMITED = {
    "quadratic": [bilevel.LBFGS(max_steps=3), bilevel.ScipyMinimize(max_steps=3),
                  bilevel.TorchOptimizer(torch.optim.Adam, lr=1e-3, max_steps=3),
                  bilevel.GradientDescent(lr=1e-3, max_steps=3)],
    "rosenbrock": [bilevel.Newton(max_steps=2), bilevel.Newton(max_steps=2, dense_limit=0)],
    "root": [bilevel.Newton(max_steps=1), bilevel.ScipyRoot(max_steps=3)],
    "contraction": [bilevel.Anderson(max_steps=3), bilevel.FixedPointIteration(max_steps=3)],
}  # fmt: skip
limited = pytest.mark.parametrize(
    ("batch", "solver"),
    [pytest.param(BATCHES[k], solver, id=f"{k}-{solver!r}") for k, group in LIMITED.items() for solver in group],
)


@limited
def test_too_few_steps(batch: Batch, solver):
    asked = support.statuses(batch.solve(solver, F64, Tolerance(delta=1e-10)))
    assert asked[-1] is Status.MAX_STEPS
    meant = support.statuses(batch.solve(solver, F64))
    assert meant[-1] is Status.BUDGET_SPENT
    silent = support.statuses(batch.solve(solver, F64, Tolerance(delta=None)))
    assert silent[-1] is Status.BUDGET_SPENT


@pytest.mark.parametrize("solver", [*SMOOTH.values(), DESCENTS["descent"]], ids=repr)
@pytest.mark.parametrize("factor", [1e-8, 1e8])
def test_scale_of_the_objective_changes_nothing(solver, factor):
    batch = BATCHES["logistic"]

    def scaled(w, X, y, strength):
        return factor * batch.function(w, X, y, strength)

    outcome = support.minimize(solver, scaled, batch.init, *batch.args, batched=True)
    assert support.statuses(outcome) == [Status.CONVERGED] * 3
    torch.testing.assert_close(outcome.x, batch.solution, rtol=0, atol=1e-8)


@pytest.mark.parametrize("solver", [*SMOOTH.values(), DESCENTS["descent"]], ids=repr)
def test_squares_that_vanish_are_no_success(solver):
    batch = BATCHES["logistic"]

    def scaled(w, X, y, strength):
        return 1e-20 * batch.function(w, X, y, strength)

    args = [a.float() for a in batch.args]
    outcome = support.minimize(solver, scaled, batch.init.float(), *args, batched=True)
    wrong = (outcome.x - batch.solution).norm(dim=-1) > 1e-2 * batch.solution.norm(dim=-1)
    assert not bool((wrong & (outcome.status == Status.CONVERGED)).any())


@pytest.mark.parametrize("solver", [*SMOOTH.values(), DESCENTS["descent"]], ids=repr)
def test_one_failure_in_a_batch_is_reported_alone(solver):
    def objective(x, a):
        return ((x - a) ** 2).sum() + (0 * a.log() * x).sum()

    a = torch.tensor([[1.0, 2.0], [-1.0, 2.0], [3.0, 4.0]], dtype=F64)
    outcome = support.minimize(solver, objective, torch.zeros(3, 2, dtype=F64), a, batched=True)
    assert support.statuses(outcome) == [Status.CONVERGED, Status.NOT_FINITE, Status.CONVERGED]
    assert bool(torch.isfinite(outcome.x).all())
    torch.testing.assert_close(outcome.x[::2], a[::2])


@pytest.mark.parametrize("solver", [*SMOOTH.values(), *DESCENTS.values()], ids=repr)
def test_unbounded_objective_is_never_a_success(solver):
    outcome = support.minimize(
        solver, lambda x: -(x**2).sum(), torch.ones(2, dtype=F64), tolerance=Tolerance(delta=1e-6)
    )
    (status,) = support.statuses(outcome)
    assert not status.success
    assert status is not Status.STAGNATED
    assert bool(torch.isfinite(outcome.x).all())


@pytest.mark.parametrize("solver", [*SMOOTH.values(), DESCENTS["descent"]], ids=repr)
def test_one_unknown(solver):
    outcome = support.minimize(
        solver, lambda x, a: x.cosh() - a * x, torch.zeros((), dtype=F64), torch.tensor(2.0, dtype=F64)
    )
    assert support.statuses(outcome) == [Status.CONVERGED]
    torch.testing.assert_close(outcome.x[0, 0], torch.asinh(torch.tensor(2.0, dtype=F64)))


@pytest.mark.parametrize(
    "solver", [bilevel.LBFGS(), bilevel.ScipyMinimize(), DESCENTS["descent"], DESCENTS["sgd"]], ids=repr
)
def test_minimisers_refuse_equations(solver):
    with pytest.raises(bilevel.ArgumentError, match="expected an argmin"):
        support.solve(solver, support.RootSystem, lambda x: x - 1, torch.zeros(2))


@pytest.mark.parametrize("solver", [bilevel.Anderson(), bilevel.FixedPointIteration()], ids=repr)
@pytest.mark.parametrize("kind", [support.RootSystem, support.ArgminSystem])
def test_mapping_solvers_refuse_what_is_no_mapping(solver, kind):
    with pytest.raises(bilevel.ArgumentError, match=r"Newton\(\)"):
        support.solve(solver, kind, lambda x: (x - 1).sum() if kind is support.ArgminSystem else x - 1, torch.zeros(2))


@pytest.mark.parametrize(
    "make",
    [
        lambda: bilevel.Newton(max_steps=0), lambda: bilevel.Newton(dense_limit=-1),
        lambda: bilevel.Newton(linear_steps=0),
        lambda: bilevel.Newton(linear_solver=bilevel.CG), lambda: bilevel.Newton(linear_solver=3),
        lambda: bilevel.LBFGS(max_steps=1.5), lambda: bilevel.LBFGS(history=0),
        lambda: bilevel.Anderson(history=0), lambda: bilevel.Anderson(mixing=0.0), lambda: bilevel.Anderson(mixing=2.0),
        lambda: bilevel.Anderson(regularization=-1.0), lambda: bilevel.FixedPointIteration(damping=1.0),
        lambda: bilevel.ScipyMinimize("no such method"), lambda: bilevel.ScipyMinimize(options=3),
        lambda: bilevel.ScipyRoot("bfgs"), lambda: bilevel.ScipyRoot(max_steps=0),
    ],
)  # fmt: skip
def test_settings_are_checked(make):
    with pytest.raises(bilevel.ArgumentError, match="expected"):
        make()


@pytest.mark.parametrize(
    "solver", [bilevel.Newton(), bilevel.LBFGS(), bilevel.Anderson(), bilevel.ScipyRoot()], ids=repr
)
def test_settings_cannot_be_changed(solver):
    with pytest.raises(AttributeError):
        solver.max_steps = 3
