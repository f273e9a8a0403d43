"""BilevelProblem: the outer loss, its hypergradient, batches, warm starts, corrected value and error bounds."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, vmap

import bilevel

from . import oracles

F64 = torch.float64
MATCHED = bilevel.Tolerance(delta=1e-12, delta_prime=1e-12)


class Ridge(bilevel.BilevelProblem):
    def inner_objective(self, inner, outer, data):
        X, y, _, _ = data
        return ((X @ inner - y) ** 2).sum() + (outer.exp() * inner**2).sum()

    def outer_objective(self, inner, outer, data):
        _, _, X, y = data
        return ((X @ inner - y) ** 2).mean() + 0.01 * (outer**2).sum()


class Classifier(Ridge):
    def inner_objective(self, inner, outer, data):
        X, y, _, _ = data
        return torch.nn.functional.softplus(-y.sign() * (X @ inner)).sum() + 0.5 * (outer.exp() * inner**2).sum()


def split(seed: int = 0, n: int = 4) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator, dtype=F64) for shape in ((20, n), (20,), (10, n), (10,)))


def closed_form(outer: torch.Tensor, data: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    X, y, Xv, yv = data
    free = outer.detach().clone().requires_grad_(True)
    w = oracles.ridge(X, y, free.exp())
    loss = ((Xv @ w - yv) ** 2).mean() + 0.01 * (free**2).sum()
    return loss.detach(), torch.autograd.grad(loss, free)[0]


@pytest.mark.parametrize("outer", [torch.tensor(0.3, dtype=F64), torch.linspace(-1, 1, 4, dtype=F64)])
@pytest.mark.parametrize("linear", [bilevel.Exact(), bilevel.CG()])
def test_value_and_gradient_agree_with_the_closed_form(outer: torch.Tensor, linear: object) -> None:
    data = split()
    problem = Ridge(linear_solver=linear, tolerance=MATCHED)
    result = problem.hypergradient(outer, data, init=torch.zeros(4, dtype=F64))
    value, gradient = closed_form(outer, data)
    torch.testing.assert_close(result.value, value, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(result.corrected_value, value, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(result.grad, gradient, atol=1e-9, rtol=1e-9)
    free = outer.clone().requires_grad_(True)
    problem(free, data).backward()
    torch.testing.assert_close(free.grad, gradient, atol=1e-9, rtol=1e-9)
    X, y, Xv, yv = data
    hessian = 2 * (X.T @ X + torch.diag(outer.exp().expand(4)))
    slope = 2 * Xv.T @ (Xv @ oracles.ridge(X, y, outer.exp()) - yv) / len(yv)
    torch.testing.assert_close(result.adjoint, torch.linalg.solve(hessian, slope), atol=1e-10, rtol=1e-9)
    assert result.report.backward.direction is bilevel.Pass.BACKWARD
    assert result.report.converged.all() and "forward" in str(result.report)


def test_outer_pytrees_and_leaves_that_are_not_differentiated() -> None:
    class Tree(Ridge):
        def inner_objective(self, inner, outer, data):
            return super().inner_objective(inner["w"], outer["s"] * outer["n"], data) + 0 * outer["labels"].sum()

        def outer_objective(self, inner, outer, data):
            return super().outer_objective(inner["w"], outer["s"], data)

    outer = {"s": torch.tensor(0.3, dtype=F64), "n": 1, "labels": torch.tensor([1, 2])}
    result = Tree(tolerance=MATCHED).hypergradient(outer, split(), init={"w": torch.zeros(4, dtype=F64)})
    torch.testing.assert_close(result.grad["s"], closed_form(outer["s"], split())[1], atol=1e-9, rtol=1e-9)
    assert result.grad["n"] is None and result.grad["labels"] is None
    assert result.adjoint["w"].shape == result.inner["w"].shape == (4,)


def test_a_batch_of_problems_is_the_mean_of_its_members() -> None:
    members = [split(seed) for seed in range(3)]
    X, y = (torch.stack([member[i] for member in members]) for i in (0, 1))
    Xv, yv = members[0][2:]
    outer = torch.linspace(-1, 1, 4, dtype=F64)
    batch = Ridge(batch_dims=(0, 0, None, None), tolerance=MATCHED)
    result = batch.hypergradient(outer, (X, y, Xv, yv), init=torch.zeros(3, 4, dtype=F64))
    singles = [
        Ridge(tolerance=MATCHED).hypergradient(outer, (X[k], y[k], Xv, yv), init=torch.zeros(4, dtype=F64))
        for k in range(3)
    ]
    torch.testing.assert_close(result.value, torch.stack([s.value for s in singles]).mean())
    torch.testing.assert_close(result.corrected_value, torch.stack([s.corrected_value for s in singles]).mean())
    torch.testing.assert_close(result.grad, torch.stack([s.grad for s in singles]).mean(0), atol=1e-10, rtol=1e-9)
    torch.testing.assert_close(result.adjoint, torch.stack([s.adjoint for s in singles]), atol=1e-10, rtol=1e-9)
    assert result.report.forward.status == (bilevel.Status.CONVERGED,) * 3


@given(st.integers(0, 10_000), st.floats(1e-6, 1e-1))
def test_the_certified_bound_is_never_exceeded_on_ridge(seed: int, delta: float) -> None:
    data, outer = split(seed), torch.tensor(0.2, dtype=F64)
    # ∇²G ≥ 2 exp(outer) whatever the data.
    mu = 2 * float(outer.exp())
    problem = Ridge(
        solver=bilevel.GradientDescent(0.005, 10_000),
        linear_solver=bilevel.CG(),
        tolerance=bilevel.Tolerance(delta=delta, delta_prime=delta, strong_convexity=mu),
    )
    result = problem.hypergradient(outer, data, init=torch.zeros(4, dtype=F64))
    value, gradient = closed_form(outer, data)
    inner = oracles.ridge(data[0], data[1], outer.exp())
    assert result.certified
    assert float((result.grad - gradient).norm()) <= result.error_bound
    assert float((result.inner - inner).norm()) <= float(result.report.forward.error_bound)
    assert bool(result.report.forward.certified) and bool(result.report.backward.certified)
    # C4: |F(φ*) − corrected| ≤ r_lin ε + ½ L_F ε², with ε = ‖φ − φ*‖ and no Hessian to vary.
    epsilon = float((result.inner - inner).norm())
    smoothness = 2 * float(torch.linalg.matrix_norm(data[2], 2)) ** 2 / len(data[3])
    slack = float(result.report.backward.residual_norm) * epsilon + 0.5 * smoothness * epsilon**2
    assert abs(float(result.corrected_value - value)) <= 1.001 * slack + 1e-12


def test_without_constants_the_error_is_estimated_and_marked_so() -> None:
    data, outer = split(), torch.linspace(-1, 1, 4, dtype=F64)
    exact = Classifier(tolerance=MATCHED).hypergradient(outer, data, init=torch.zeros(4, dtype=F64)).grad
    problem = Classifier(solver=bilevel.GradientDescent(0.02, 10_000), tolerance=bilevel.Tolerance(delta=1e-3))
    result = problem.hypergradient(outer, data, init=torch.zeros(4, dtype=F64))
    error = float((result.grad - exact).norm())
    assert not result.certified and not bool(result.report.forward.certified)
    assert 0.5 * error <= result.error_bound <= 2 * error
    # μ alone does not certify a problem that is not quadratic: the Lipschitz constants are missing.
    mu = float(outer.exp().min())
    known = Classifier(tolerance=bilevel.Tolerance(delta=1e-3, strong_convexity=mu))
    assert not known.hypergradient(outer, data, init=torch.zeros(4, dtype=F64)).certified


def test_declared_constants_certify() -> None:
    data, outer = split(), torch.linspace(-1, 1, 4, dtype=F64)
    X, _, Xv, _ = data

    class Declared(Classifier):
        def constants(self, outer, data):
            norms = X.norm(dim=1)
            return bilevel.Constants(
                strong_convexity=float(outer.exp().min()),
                outer_smoothness=float(2 * (Xv.norm() ** 2) / len(Xv)),
                hessian_lipschitz=float((norms**3).sum()) / 10,  # |σ''| ≤ 1/(6√3) < 1/10
                cross_lipschitz=float(outer.exp().max()),
                outer_cross_lipschitz=0.0,
            )

    exact = Classifier(tolerance=MATCHED).hypergradient(outer, data, init=torch.zeros(4, dtype=F64)).grad
    problem = Declared(solver=bilevel.GradientDescent(0.02, 10_000), tolerance=bilevel.Tolerance(delta=1e-4))
    result = problem.hypergradient(outer, data, init=torch.zeros(4, dtype=F64))
    assert result.certified
    assert float((result.grad - exact).norm()) <= result.error_bound < 1.0


@pytest.mark.parametrize("mu", [None, 2.0])
def test_the_report_has_the_fields_of_a_solves_report(mu: float | None) -> None:
    X, y, Xv, yv = split()
    problem = Ridge(tolerance=bilevel.Tolerance(strong_convexity=mu), batch_dims=(0, None, None, None))
    data = (X.expand(3, -1, -1), y, Xv, yv)
    report = problem.hypergradient(torch.zeros(4, dtype=F64), data, init=torch.zeros(3, 4, dtype=F64)).report
    assert report.status == (bilevel.Status.CONVERGED,) * 3
    for name in ("converged", "iterations", "residual_norm", "error_bound", "certified"):
        assert getattr(report, name).shape == (3,)
    assert report.certified.tolist() == [mu is not None] * 3
    if mu is not None:
        torch.testing.assert_close(report.error_bound, report.residual_norm / mu)


def test_warm_starts_of_the_inner_solution_and_of_the_adjoint() -> None:
    data = split(n=4)
    outer = torch.linspace(-1, 1, 4, dtype=F64)
    settings = {
        "solver": bilevel.GradientDescent(0.01, 10_000),
        "linear_solver": bilevel.CG(),
        "tolerance": bilevel.Tolerance(delta=1e-8, delta_prime=1e-8),
    }

    def work(problem: Ridge) -> tuple[int, int]:
        result = problem.hypergradient(outer, data)
        return int(result.report.forward.iterations), int(result.report.backward.iterations)

    warm = Ridge(**settings)
    first = warm.hypergradient(outer, data, init=torch.zeros(4, dtype=F64)).report
    assert work(warm) == (0, 0) < (int(first.forward.iterations), int(first.backward.iterations))
    warm.reset()
    with pytest.raises(bilevel.ArgumentError, match="override initial"):
        warm(outer, data)
    cold = Ridge(warm_start=False, **settings)
    cold.hypergradient(outer, data, init=torch.zeros(4, dtype=F64))
    with pytest.raises(bilevel.ArgumentError, match="init"):
        work(cold)
    again = cold.hypergradient(outer, data, init=torch.zeros(4, dtype=F64)).report
    assert int(again.backward.iterations) == int(first.backward.iterations)


@pytest.mark.parametrize("goal", [False, True])
@pytest.mark.parametrize("batch", [None, 3])
def test_a_call_begins_where_it_is_told_to(batch: int | None, goal: bool) -> None:
    data, outer = split(n=4), torch.linspace(-1, 1, 4, dtype=F64)
    dims = None if batch is None else (0, None, None, None)
    init = torch.zeros(4, dtype=F64) if batch is None else torch.zeros(batch, 4, dtype=F64)
    if batch is not None:
        data = (torch.stack([data[0] * (1 + k) for k in range(batch)]), *data[1:])
    tolerance = bilevel.Tolerance(descent=0.9, estimates=True) if goal else bilevel.Tolerance(1e-8, 1e-8)
    problem = Ridge(solver=bilevel.LBFGS(), linear_solver=bilevel.CG(), tolerance=tolerance, batch_dims=dims)
    there = problem.hypergradient(outer, data, init=init)
    problem.hypergradient(outer - 3.0, data)
    problem.begin_at(there.inner, there.adjoint)
    again = problem.hypergradient(outer, data)
    assert int(again.report.iterations.sum()) == 0
    torch.testing.assert_close(again.adjoint, there.adjoint)
    torch.testing.assert_close(again.grad, there.grad)


def test_a_warm_start_of_another_batch_is_not_used() -> None:
    class Started(Ridge):
        def initial(self, outer, data):
            return torch.zeros(len(data[0]), 4, dtype=F64)

    X, y, Xv, yv = split()
    outer = torch.zeros(4, dtype=F64)
    problem = Started(batch_dims=(0, None, None, None))
    for count in (3, 5, 2):
        result = problem.hypergradient(outer, (X.expand(count, -1, -1), y, Xv, yv))
        assert result.inner.shape == (count, 4)
        torch.testing.assert_close(result.grad, closed_form(outer, (X, y, Xv, yv))[1], atol=1e-9, rtol=1e-9)


def test_a_warm_start_of_another_size_is_not_used() -> None:
    class Started(Ridge):
        def initial(self, outer, data):
            return torch.zeros(data[0].shape[1], dtype=F64)

    problem = Started()
    for n in (4, 3, 6):
        data, outer = split(n=n), torch.zeros(n, dtype=F64)
        torch.testing.assert_close(problem.hypergradient(outer, data).grad, closed_form(outer, data)[1])
    unaware = Ridge()
    unaware(torch.zeros(4, dtype=F64), split(n=4), init=torch.zeros(4, dtype=F64))
    with pytest.raises(bilevel.ShapeError, match=r"init \(4,\)"):
        unaware(torch.zeros(3, dtype=F64), split(n=3))


def test_problems_can_be_copied_and_pickled() -> None:
    import copy
    import pickle

    outer = torch.zeros(4, dtype=F64)
    problem = Ridge()
    value = problem(outer, split(), init=torch.zeros(4, dtype=F64))
    for twin in (copy.deepcopy(problem), pickle.loads(pickle.dumps(problem))):
        torch.testing.assert_close(twin(outer, split()), value)
    tuning = bilevel.HyperparameterOptimization(
        lambda w, h, d: ((w - d) ** 2).sum() + h.exp() * (w**2).sum(),
        lambda w, d: (w**2).sum(),
        torch.tensor(0.0, dtype=F64),
        torch.zeros(3, dtype=F64),
    )
    data = torch.ones(3, dtype=F64)
    torch.testing.assert_close(copy.deepcopy(tuning)(data), tuning(data))


def test_a_hypergradient_can_be_sent_to_another_process() -> None:
    import copy
    import pickle

    zero = torch.zeros(4, dtype=F64)
    result = Ridge(tolerance=bilevel.Tolerance(strong_convexity=0.3)).hypergradient(zero, split(), init=zero)
    known = result.bound
    sent = pickle.loads(pickle.dumps(result))
    torch.testing.assert_close(sent.grad, result.grad, atol=0, rtol=0)
    assert str(sent.report) == str(result.report)
    assert sent.bound == known and sent.certified == result.certified
    for missing in ("inner_bound", "observed_constants", "corrected_grad"):
        with pytest.raises(bilevel.ArgumentError, match="before you pickle"):
            getattr(sent, missing)
    with pytest.raises(bilevel.ArgumentError, match="before you pickle"):
        sent.refined()
    again = pickle.loads(pickle.dumps(sent))
    assert again.bound == known
    for twin in (copy.copy(result), copy.deepcopy(result)):
        assert twin.inner_bound == result.inner_bound
        torch.testing.assert_close(twin.refined().grad, result.refined().grad, atol=0, rtol=0)


def test_tuning_with_a_torch_optimiser_lowers_the_outer_loss() -> None:
    data = split()
    outer = torch.zeros(4, dtype=F64, requires_grad=True)
    problem, optimiser = Ridge(), torch.optim.Adam([outer], lr=0.1)
    losses = []
    for step in range(30):
        optimiser.zero_grad()
        loss = problem(outer, data, init=torch.zeros(4, dtype=F64) if step == 0 else None)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))


def test_second_derivatives_of_the_outer_loss() -> None:
    data, outer = split(), torch.linspace(-1, 1, 4, dtype=F64)
    problem = Ridge(warm_start=False, tolerance=MATCHED)
    start = torch.zeros(4, dtype=F64)

    def reference(outer: torch.Tensor) -> torch.Tensor:
        X, y, Xv, yv = data
        return ((Xv @ oracles.ridge(X, y, outer.exp()) - yv) ** 2).mean() + 0.01 * (outer**2).sum()

    mine = torch.func.hessian(lambda outer: problem(outer, data, init=start))(outer)
    torch.testing.assert_close(mine, torch.func.hessian(reference)(outer), atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "tolerance", [MATCHED, bilevel.Tolerance(hypergradient=1e-9, estimates=True)], ids=["fixed", "goal"]
)
def test_a_checkpoint_around_a_problem_sees_its_loss_alone(reentrant: bool, tolerance: bilevel.Tolerance) -> None:
    """What the first call looks at, and what a goal solves, is not there to be computed again."""
    data, outer = split(), torch.linspace(-1, 1, 4, dtype=F64)
    problem = Ridge(tolerance=tolerance)

    def loss(outer: torch.Tensor) -> torch.Tensor:
        return problem(outer, data, init=torch.zeros(4, dtype=F64))

    for _ in range(2):
        free = outer.clone().requires_grad_(True)
        torch.utils.checkpoint.checkpoint(loss, free, use_reentrant=reentrant).backward()
        torch.testing.assert_close(free.grad, closed_form(outer, data)[1], atol=1e-8, rtol=1e-8)


def test_an_outer_loss_that_ignores_the_inner_solution_still_has_its_direct_gradient() -> None:
    class Direct(Ridge):
        def outer_objective(self, inner, outer, data):
            return (outer**2).sum()

    outer = torch.linspace(-1, 1, 4, dtype=F64)
    result = Direct().hypergradient(outer, split(), init=torch.zeros(4, dtype=F64))
    torch.testing.assert_close(result.grad, 2 * outer)
    assert float(result.adjoint.norm()) == 0.0


def test_data_may_be_sparse() -> None:
    class Sparse(Ridge):
        def inner_objective(self, inner, outer, data):
            X, y, _, _ = data
            return ((torch.mv(X, inner) - y) ** 2).sum() + (outer.exp() * inner**2).sum()

    outer, data = torch.tensor(0.3, dtype=F64), split()
    gradient = closed_form(outer, data)[1]
    for tolerance in (None, bilevel.Tolerance(delta=1e-4, strong_convexity=2.0)):
        problem = Sparse(tolerance=tolerance, solver=bilevel.LBFGS())
        result = problem.hypergradient(outer, (data[0].to_sparse(), *data[1:]), init=torch.zeros(4, dtype=F64))
        assert float((result.grad - gradient).norm()) <= result.error_bound <= 1e-2


def test_misuse_is_said() -> None:
    class Vector(Ridge):
        def outer_objective(self, inner, outer, data):
            return inner

    start = torch.zeros(4, dtype=F64)
    with pytest.raises(bilevel.ShapeError, match="outer_objective"):
        Vector()(torch.tensor(0.0, dtype=F64), split(), init=start)
    with pytest.raises(bilevel.ArgumentError, match="outer to hold"):
        Ridge().hypergradient(3, split(), init=start)
    with pytest.raises(TypeError, match="abstract"):
        bilevel.BilevelProblem()
    for dims, message in (({"X": 0}, "prefix of data's structure"), ((0, 0, None, None), "have one length")):
        X, y, Xv, yv = split()
        with pytest.raises(ValueError, match=message):
            Ridge(batch_dims=dims)(
                torch.tensor(0.0, dtype=F64), (X.expand(3, -1, -1), y, Xv, yv), init=start.expand(3, 4)
            )
    batch = (X.expand(3, -1, -1), y, Xv, yv)
    for wrong in (start, start.expand(2, 4), start[0]):
        with pytest.raises(bilevel.ShapeError, match=r"leading axis of 3.*init\.expand"):
            Ridge(batch_dims=(0, None, None, None))(torch.tensor(0.0, dtype=F64), batch, init=wrong)
    for dims in ((3, None, None, None), ("0", None, None, None), (-4, None, None, None)):
        with pytest.raises(bilevel.ShapeError, match="name an axis"):
            Ridge(batch_dims=dims)(torch.tensor(0.0, dtype=F64), batch, init=start.expand(3, 4))
    with pytest.raises(bilevel.SolveError, match="`Ridge`: the forward solve by GradientDescent"):
        Ridge(solver=bilevel.GradientDescent(1e-6, 2), tolerance=bilevel.Tolerance(delta=1e-9))(
            torch.tensor(0.0, dtype=F64), split(), init=start
        )


def test_data_of_the_outer_objective_that_do_not_fit_are_named() -> None:
    X, y, Xv, yv = split()
    theta, start = torch.tensor(0.0, dtype=F64), torch.zeros(4, dtype=F64)
    with pytest.raises(bilevel.ShapeError, match=r"outer_objective to have shapes that fit together, got .*data\[2\]"):
        Ridge()(theta, (X, y, Xv[:, :2], yv), init=start)
    with pytest.raises(bilevel.DtypeError, match="outer_objective to have dtypes that fit together"):
        Ridge().hypergradient(theta, (X, y, Xv.float(), yv), init=start)


def test_data_of_inference_mode_have_the_hypergradient_of_their_copies() -> None:
    with torch.inference_mode():
        made = tuple(part.clone() for part in split())
    theta, start = torch.tensor(0.0, dtype=F64), torch.zeros(4, dtype=F64)
    expected = Ridge().hypergradient(theta, split(), init=start).grad
    assert torch.equal(Ridge().hypergradient(theta, made, init=start).grad, expected)
    theta.requires_grad_()
    Ridge()(theta, made, init=start).backward()
    torch.testing.assert_close(theta.grad, expected)
    layer = bilevel.argmin(lambda w, X, y, log: ((X @ w - y) ** 2).mean() + log.exp() * (w**2).sum())
    slopes = []
    for X, y in (made[:2], split()[:2]):
        log = torch.tensor(0.0, dtype=F64, requires_grad=True)
        layer(start, X, y, log).sum().backward()
        slopes.append(log.grad)
    assert torch.equal(*slopes)


def test_the_bound_counts_the_inner_error_alone() -> None:
    # G = ½(φ − θ)² and F = ½ c φ²: the adjoint at φ is exact, and the hypergradient's error is c (φ − θ), all of it inherited.
    class Inherited(bilevel.BilevelProblem):
        def inner_objective(self, inner, outer, data):
            return 0.5 * ((inner - outer) ** 2).sum()

        def outer_objective(self, inner, outer, data):
            return 0.5 * data * (inner**2).sum()

    c, outer = torch.tensor(50.0, dtype=F64), torch.tensor([2.0], dtype=F64)
    problem = Inherited(
        solver=bilevel.GradientDescent(0.5, 100), tolerance=bilevel.Tolerance(delta=1e-2, strong_convexity=1.0)
    )
    result = problem.hypergradient(outer, c, init=torch.zeros(1, dtype=F64))
    error = float((result.grad - c * outer).norm())
    assert error > 0.1 and result.certified
    assert error <= result.error_bound * (1 + 1e-9) <= 1.01 * error


@pytest.mark.parametrize("tolerance", [None, bilevel.Tolerance(hypergradient=1e-3, estimates=True)])
def test_hypergradients_inside_a_transform_are_refused_with_what_to_write(tolerance: bilevel.Tolerance | None) -> None:
    problem, data = Ridge(tolerance=tolerance), split()
    outers = torch.zeros(3, 4, dtype=F64)
    with pytest.raises(
        bilevel.TransformError, match=r"around hypergradient.*torch.func.vmap\(torch.func.grad\(problem\)\)"
    ):
        vmap(lambda outer: problem.hypergradient(outer, data).grad)(outers)
    with pytest.raises(bilevel.TransformError, match="around hypergradient"):
        grad(lambda outer: problem.hypergradient(outer, data).value)(outers[0])


def test_what_the_refusal_says_to_write_gives_the_hypergradients() -> None:
    problem, data, start = Ridge(tolerance=MATCHED), split(), torch.zeros(4, dtype=F64)
    outers = torch.tensor([[0.0] * 4, [0.3, -0.2, 0.1, 1.0]], dtype=F64)
    together = vmap(grad(lambda outer: problem(outer, data, init=start)))(outers)
    apart = torch.stack([problem.hypergradient(outer, data, init=start).grad for outer in outers])
    torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-10)
