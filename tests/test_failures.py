"""Nothing is silently wrong: each way to fail has its own status or error, under each policy, forward and backward."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import bilevel
from bilevel import Status

F64 = torch.float64
ZERO = torch.zeros(2, dtype=F64)
THREE, WIDE = torch.ones(3, dtype=F64), torch.ones(4, 3, dtype=F64)
policies = pytest.mark.parametrize("on_failure", ["raise", "warn", "nan", "ignore"])


def bowl(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return ((x - a) ** 2).sum() + 0.1 * ((x - a) ** 4).sum()


def saddle(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return (x[0] - a[0]) ** 2 - (x[1] - a[1]) ** 2


def valley(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    # At a[0] = 1 the tilt is zero, and its slope points along the valley: neither x.sum() nor a change of a is in the range.
    return (x[0] + 2 * x[1] - a[0] - 2 * a[1]) ** 2 + (a[0] - 1) * (2 * x[0] - x[1])


def undefined(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return (x - a).sqrt().sum() + (x**2).sum()


def given(answer: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return a user's inner solver that knows the answer."""

    def known(objective: object, init: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return answer(a.detach())

    return known


TOO_FEW = {"solver": bilevel.GradientDescent(lr=1e-3, max_steps=3), "tolerance": bilevel.Tolerance(delta=1e-8)}
FORWARD = {
    "too few steps": (bowl, TOO_FEW, {Status.MAX_STEPS}),
    "indefinite": (saddle, {}, {Status.INDEFINITE}),
    "nan": (undefined, {}, {Status.NOT_FINITE}),
    "divergence": (
        bowl,
        {"solver": bilevel.GradientDescent(lr=1e6, max_steps=50)},
        {Status.DIVERGED, Status.NOT_FINITE},
    ),
    "a user's solver that stops short": (bowl, {"solver": given(lambda a: a + 0.1)}, {Status.NOT_CONVERGED}),
}
BACKWARD = {
    # With δ given the residual decides forward, and a saddle passes.
    "indefinite, factorised": (
        saddle, {"solver": given(lambda a: a), "linear_solver": bilevel.Exact(), "tolerance": bilevel.Tolerance(delta=1e-9)},
        Status.INDEFINITE,
    ),
    "indefinite, by CG": (
        saddle, {"solver": given(lambda a: a), "linear_solver": bilevel.CG(), "tolerance": bilevel.Tolerance(delta=1e-9)},
        Status.INDEFINITE,
    ),
    "singular, factorised": (valley, {"solver": given(lambda a: a), "linear_solver": bilevel.Exact()}, Status.SINGULAR),
    "too few CG steps": (
        lambda x, a: ((x - a) ** 2 * torch.tensor([1.0, 9.0], dtype=F64)).sum(),
        {"solver": given(lambda a: a), "linear_solver": bilevel.CG(1), "tolerance": bilevel.Tolerance(delta_prime=1e-8)},
        Status.MAX_STEPS,
    ),
}  # fmt: skip


@policies
@pytest.mark.parametrize("case", FORWARD)
def test_forward_failures(case: str, on_failure: str) -> None:
    objective, settings, expected = FORWARD[case]
    a = torch.tensor([1.0, 2.0], dtype=F64)
    layer = bilevel.argmin(objective, on_failure=on_failure, **settings)
    start = a.clone() if case == "indefinite" else ZERO
    with bilevel.record() as reports:
        if on_failure == "raise":
            with pytest.raises(bilevel.SolveError, match="remedy") as caught:
                layer(start, a)
            assert caught.value.report.status in expected
        elif on_failure == "warn":
            with pytest.warns(bilevel.SolveWarning, match="remedy"):
                assert bool(torch.isfinite(layer(start, a)).all())
        else:
            x = layer(start, a)
            assert bool(torch.isnan(x).all()) == (on_failure == "nan") or case == "nan"
    assert reports.forward[0].status in expected
    assert not bool(reports.forward[0].converged)


@policies
@pytest.mark.parametrize("case", BACKWARD)
@pytest.mark.parametrize("mode", ["backward", "grad", "jvp"])
def test_backward_failures(case: str, on_failure: str, mode: str) -> None:
    objective, settings, expected = BACKWARD[case]
    a = torch.tensor([1.0, 2.0], dtype=F64)
    layer = bilevel.argmin(objective, on_failure=on_failure, **settings)

    def differentiate() -> torch.Tensor:
        if mode == "grad":
            return grad(lambda a: layer(ZERO, a).sum())(a)
        if mode == "jvp":
            return jvp(lambda a: layer(ZERO, a), (a,), (torch.tensor([1.0, 2.0], dtype=F64),))[1]
        free = a.clone().requires_grad_(True)
        layer(ZERO, free).sum().backward()
        return free.grad

    with bilevel.record() as reports:
        if on_failure == "raise":
            with pytest.raises(bilevel.SolveError, match="remedy") as caught:
                differentiate()
            assert caught.value.report.status is expected
        elif on_failure == "warn":
            with pytest.warns(bilevel.SolveWarning, match="the backward solve"):
                differentiate()
        else:
            g = differentiate()
            assert bool(torch.isnan(g).any()) or on_failure == "ignore"
    assert reports.backward[0].status is expected


def quadratic(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return ((x - a) ** 2).sum()


DERIVATIVES = {
    "backward": lambda f, a: torch.autograd.functional.jacobian(f, a),
    "jacrev": lambda f, a: jacrev(f)(a),
    "jacfwd": lambda f, a: jacfwd(f)(a),
    "hessian": lambda f, a: hessian(lambda a: (f(a) ** 2).sum())(a),
}


@pytest.mark.parametrize("objective", [bowl, quadratic])
@pytest.mark.parametrize("mode", DERIVATIVES)
def test_a_forward_failure_told_by_nan_stays_nan_in_every_derivative(objective: Callable, mode: str) -> None:
    layer = bilevel.argmin(objective, on_failure="nan", **TOO_FEW)
    a = torch.tensor([1.0, 2.0], dtype=F64)
    assert bool(torch.isnan(DERIVATIVES[mode](lambda a: layer(ZERO, a), a)).all())


def test_a_failed_quadratic_in_a_batch_gets_nan_and_its_neighbours_do_not() -> None:
    layer = bilevel.argmin(quadratic, on_failure="nan", **TOO_FEW)
    a = torch.tensor([[0.0, 0.0], [1.0, 2.0], [0.0, 0.0]], dtype=F64)  # from zero, all but one begin solved
    for jacobian in (jacrev, jacfwd):
        found = vmap(jacobian(lambda a: layer(ZERO, a)))(a)
        assert torch.isnan(found).all(dim=-1).all(dim=-1).tolist() == [False, True, False]
        torch.testing.assert_close(found[0], torch.eye(2, dtype=F64))
    free = a.clone().requires_grad_(True)
    vmap(layer, in_dims=(None, 0))(ZERO, free).sum().backward()
    assert torch.isnan(free.grad).all(dim=-1).tolist() == [False, True, False]


def test_one_failed_problem_among_64_is_reported_and_spoiled_alone() -> None:
    torch.manual_seed(0)
    stiffness = torch.logspace(0, 2, 64, dtype=F64)
    stiffness[17] = 1e6  # this one diverges at a step that suits the others

    def objective(x: torch.Tensor, k: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return 0.5 * (k * x[0] ** 2 + x[1] ** 2) - (a * x).sum()

    a = torch.randn(64, 2, dtype=F64, requires_grad=True)
    layer = bilevel.argmin(
        objective,
        solver=bilevel.GradientDescent(lr=0.015, max_steps=5000),
        tolerance=bilevel.Tolerance(delta=1e-8),
        on_failure="nan",
    )
    with bilevel.record() as reports:
        x = vmap(layer, in_dims=(None, 0, 0))(ZERO, stiffness, a)
        x.nansum().backward()
    report = reports.forward[0]
    assert len(report.status) == 64
    assert [k for k, good in enumerate(report.converged.tolist()) if not good] == [17]
    assert "1 of 64 problems, first in number 17" in report.message
    poisoned = torch.isnan(x).any(-1)
    assert poisoned.nonzero().flatten().tolist() == [17]
    solution = torch.stack([a[:, 0] / stiffness, a[:, 1]], -1)
    torch.testing.assert_close(x[~poisoned], solution[~poisoned], atol=1e-7, rtol=0)
    assert bool(torch.isfinite(a.grad[~poisoned]).all())


# Misuse: found at the edge, before a gradient can be wrong.


def captured_by_autograd() -> object:
    a = torch.ones(2, dtype=F64, requires_grad=True)
    return lambda layer: layer(lambda x: ((x - a) ** 2).sum())(ZERO)


def captured_by_grad() -> object:
    return lambda layer: grad(lambda a: layer(lambda x: ((x - a) ** 2).sum())(ZERO).sum())(ZERO + 1)


def captured_by_an_outer_grad() -> object:
    def use(layer):
        def f(a):
            return grad(lambda b: layer(lambda x, b: ((x - a) ** 2 + (x - b) ** 2).sum())(ZERO, b).sum())(ZERO).sum()

        return grad(f)(ZERO + 1)

    return use


def captured_by_jvp() -> object:
    return lambda layer: jacfwd(lambda a: layer(lambda x: ((x - a) ** 2).sum())(ZERO))(ZERO + 1)


def captured_by_a_dual_level() -> object:
    def use(layer):
        with forward_ad.dual_level():
            a = forward_ad.make_dual(ZERO + 1, ZERO + 1)
            return layer(lambda x: ((x - a) ** 2).sum())(ZERO)

    return use


def captured_by_vmap() -> object:
    return lambda layer: vmap(lambda a: layer(lambda x: ((x - a) ** 2).sum())(ZERO))(torch.ones(3, 2, dtype=F64))


def captured_module() -> object:
    model = torch.nn.Linear(2, 1).double()
    return lambda layer: layer(lambda x: (model(x) ** 2).sum() + (x**2).sum())(ZERO)


@policies
@pytest.mark.parametrize(
    "how",
    [
        captured_by_autograd,
        captured_by_grad,
        captured_by_an_outer_grad,
        captured_by_jvp,
        captured_by_a_dual_level,
        captured_by_vmap,
        captured_module,
    ],
)
def test_captured_tensors(how: Callable[[], Callable], on_failure: str) -> None:
    use = how()

    def layer(objective):
        return bilevel.argmin(objective, on_failure=on_failure)

    if on_failure == "raise" or how is captured_by_vmap:
        with pytest.raises(bilevel.CapturedTensorError, match=r"pass it as an argument"):
            use(layer)
    elif on_failure == "warn":
        with pytest.warns(bilevel.FailureWarning, match=r"pass it as an argument"):
            use(layer)
    elif on_failure == "nan":
        assert bool(torch.isnan(use(layer)).all())
    else:
        use(layer)


def test_a_captured_tensor_is_no_fault_where_nothing_is_differentiated() -> None:
    a = torch.ones(2, dtype=F64, requires_grad=True)
    with torch.no_grad():
        torch.testing.assert_close(bilevel.argmin(lambda x: ((x - a) ** 2).sum())(ZERO), a.detach())
    detached = bilevel.argmin(lambda x, b: ((x - a.detach() - b) ** 2).sum())
    b = torch.zeros(2, dtype=F64, requires_grad=True)
    detached(ZERO, b).sum().backward()
    torch.testing.assert_close(b.grad, torch.ones(2, dtype=F64))


@policies
@pytest.mark.parametrize("mode", ["autograd", "grad", "jacfwd"])
def test_init_that_requires_grad(on_failure: str, mode: str) -> None:
    layer = bilevel.argmin(bowl, on_failure=on_failure)
    a = torch.ones(2, dtype=F64)

    def use() -> torch.Tensor:
        if mode == "grad":
            return grad(lambda x: layer(x, a).sum())(ZERO)
        if mode == "jacfwd":
            return jacfwd(lambda x: layer(x, a))(ZERO)
        return layer(ZERO.clone().requires_grad_(True), a)

    if on_failure == "raise":
        with pytest.raises(bilevel.InitGradientError, match=r"init\.detach\(\)"):
            use()
    elif on_failure == "warn":
        with pytest.warns(bilevel.FailureWarning, match=r"init\.detach\(\)"):
            use()
    elif on_failure == "nan" and mode == "autograd":
        assert bool(torch.isnan(use()).all())
    else:
        use()


@policies
@pytest.mark.parametrize("start", [0.0, 1.0])
def test_dropout_in_the_objective(on_failure: str, start: float) -> None:
    def noisy(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return ((torch.nn.functional.dropout(x, 0.5) - a) ** 2).sum()

    torch.manual_seed(0)
    # A start at zero, which dropout leaves alone, must not hide it; nor must a batch.
    layer = bilevel.argmin(
        noisy, solver=bilevel.GradientDescent(0.1, 2), tolerance=bilevel.Tolerance(delta=None), on_failure=on_failure
    )
    init, a = torch.full((20,), start, dtype=F64), torch.ones(20, dtype=F64)
    if on_failure == "raise":
        with pytest.raises(bilevel.StochasticObjectiveError, match="dropout off"):
            layer(init, a)
        with pytest.raises(bilevel.StochasticObjectiveError, match="dropout off"):
            vmap(layer, in_dims=(None, 0))(init, a.expand(3, 20))
    elif on_failure == "warn":
        with pytest.warns(bilevel.FailureWarning, match="dropout off"):
            layer(init, a)
    elif on_failure == "nan":
        assert bool(torch.isnan(layer(init, a)).all())
    else:
        assert bool(torch.isfinite(layer(init, a)).all())


def test_dropout_inside_a_vmap_that_refuses_randomness_can_be_told_by_nan() -> None:
    layer = bilevel.argmin(
        lambda x, a: ((torch.nn.functional.dropout(x, 0.5) - a) ** 2).sum(),
        solver=bilevel.GradientDescent(0.1, 2),
        tolerance=bilevel.Tolerance(delta=None),
        on_failure="nan",
    )
    assert bool(torch.isnan(vmap(layer, in_dims=(None, 0))(ZERO, torch.ones(3, 2, dtype=F64))).all())


def test_rounding_that_varies_from_run_to_run_is_not_randomness() -> None:
    # As sums over threads, or a GPU's atomics, round: at a solution the whole slope is rounding.
    def jittery(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return ((x - a) ** 2).sum() + (1e-15 * torch.rand_like(x) * x).sum()

    a = torch.ones(2, dtype=F64)
    torch.testing.assert_close(bilevel.argmin(jittery)(a.clone(), a), a)


@pytest.mark.parametrize("where", ["closure", "argument"])
def test_running_statistics_are_refused(where: str) -> None:
    norm = torch.nn.BatchNorm1d(2).double().requires_grad_(False)
    data = torch.randn(8, 2, dtype=F64)

    def closure(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return ((norm(data + a) @ x) ** 2).sum() + (x**2).sum()

    def argument(x: torch.Tensor, buffers: dict[str, torch.Tensor]) -> torch.Tensor:
        return ((torch.func.functional_call(norm, buffers, (data,)) @ x) ** 2).sum() + (x**2).sum()

    with pytest.raises(bilevel.StochasticObjectiveError, match="batch norm"):
        if where == "closure":
            bilevel.argmin(closure)(ZERO, torch.ones((), dtype=F64))
        else:
            bilevel.argmin(argument)(ZERO, dict(norm.named_buffers()))


# Shapes, dtypes and settings: always errors, whatever the policy.


@policies
@pytest.mark.parametrize(
    ("error", "message", "use"),
    [
        (bilevel.DtypeError, "got int64", lambda p: bilevel.argmin(bowl, on_failure=p)(torch.zeros(2, dtype=torch.int64), ZERO)),
        (bilevel.DtypeError, "got float", lambda p: bilevel.argmin(bowl, on_failure=p)(1.0, ZERO)),
        (bilevel.DtypeError, r"init\['w'\]", lambda p: bilevel.argmin(bowl, on_failure=p)({"w": torch.zeros(1, dtype=torch.bool)}, ZERO)),
        (bilevel.ShapeError, "at least one tensor", lambda p: bilevel.argmin(bowl, on_failure=p)({}, ZERO)),
        (bilevel.ShapeError, r"got \(2,\)", lambda p: bilevel.argmin(lambda x, a: (x - a) ** 2, on_failure=p)(ZERO, ZERO)),
        (bilevel.ShapeError, "got float", lambda p: bilevel.argmin(lambda x, a: 1.0, on_failure=p)(ZERO, ZERO)),
        (bilevel.ArgumentError, "no graph leads there", lambda p: bilevel.argmin(lambda x, a: (x.detach() ** 2).sum(), on_failure=p)(ZERO, ZERO)),
        (bilevel.ShapeError, r"return shape \(2,\)", lambda p: bilevel.root(lambda x, a: x.sum(), on_failure=p)(ZERO, ZERO)),
        (bilevel.ShapeError, "structure of init", lambda p: bilevel.root(lambda x, a: {"y": x}, on_failure=p)(ZERO, ZERO)),
        (bilevel.ShapeError, r"return shape \(2,\)", lambda p: bilevel.fixed_point(lambda x, a: x[:1], on_failure=p)(ZERO, ZERO)),
        (bilevel.DtypeError, "complex", lambda p: bilevel.argmin(bowl, on_failure=p)(ZERO, ZERO + 0j)),
        (bilevel.ShapeError, r"init \(2,\) float64, args\[0\] \(3,\)", lambda p: bilevel.argmin(bowl, on_failure=p)(ZERO, THREE)),
        (bilevel.ShapeError, r"init\['w'\] \(2,\)", lambda p: bilevel.argmin(lambda x, X: (X @ x["w"]).sum(), on_failure=p)({"w": ZERO}, WIDE)),
        (bilevel.ShapeError, r"args\[0\] \(3,\)", lambda p: vmap(bilevel.root(lambda x, a: x - a, on_failure=p), (None, 0))(ZERO, WIDE)),
        (bilevel.ShapeError, r"args\[0\] \(3,\)", lambda p: grad(lambda a: bilevel.fixed_point(torch.add, on_failure=p)(ZERO, a).sum())(THREE)),
        (bilevel.DtypeError, r"kwargs\['X'\] \(4, 2\) float32", lambda p: bilevel.root(lambda x, X: X @ x, on_failure=p)(ZERO, X=torch.ones(4, 2))),
    ],
)  # fmt: skip
def test_misfits_name_the_argument_and_the_remedy(error, message, use, on_failure) -> None:
    with pytest.raises(error, match=message):
        use(on_failure)


@pytest.mark.parametrize(
    "make",
    [
        lambda: bilevel.argmin(3),
        lambda: bilevel.argmin(bowl, on_failure="explode"),
        lambda: bilevel.argmin(bowl, solver=torch.optim.SGD),
        lambda: bilevel.argmin(bowl, solver=3),
        lambda: bilevel.argmin(bowl, linear_solver=bilevel.CG),
        lambda: bilevel.argmin(bowl, linear_solver="cg"),
        lambda: bilevel.argmin(bowl, tolerance=1e-3),
        lambda: bilevel.Tolerance(delta=-1.0),
        lambda: bilevel.Tolerance(delta_prime=math.nan),
        lambda: bilevel.Tolerance(strong_convexity=0.0),
        lambda: bilevel.Tolerance(delta="small"),
        lambda: bilevel.GradientDescent(lr=0.0, max_steps=3),
        lambda: bilevel.GradientDescent(lr=0.1, max_steps=0),
        lambda: bilevel.GradientDescent(lr=0.1, max_steps=3, momentum=1.0),
    ],
)
def test_settings_are_checked_when_made(make: Callable[[], object]) -> None:
    with pytest.raises(bilevel.ArgumentError, match="expected"):
        make()


# Budgets: spending one with no accuracy asked is not a failure, and it is said.


@pytest.mark.parametrize(("dtype", "told"), [(F64, False), (torch.float32, True)])
def test_who_is_in_float64_is_not_told_to_use_it(dtype: torch.dtype, told: bool) -> None:
    layer = bilevel.argmin(
        lambda x, a: (x.exp() + (x - a) ** 2).sum(), tolerance=bilevel.Tolerance(delta=1e-25), on_failure="ignore"
    )
    report = layer.solve(torch.zeros(50, dtype=dtype), torch.linspace(-3, 3, 50, dtype=dtype)).report
    assert report.status in (Status.STAGNATED, Status.LINE_SEARCH_FAILED)
    for said in (report.message, str(report)):
        assert ("use float64" in said) is told
        assert "loosen the tolerance" in said


def test_a_budget_without_a_tolerance_succeeds_and_warns() -> None:
    a = torch.ones(2, dtype=F64)
    layer = bilevel.argmin(bowl, solver=bilevel.GradientDescent(0.1, 5))
    with pytest.warns(
        bilevel.BudgetWarning, match=r"no accuracy was asked .*, the default asks .* Tolerance\(delta=None\)"
    ):
        solution = layer.solve(ZERO, a)
    assert solution.report.status is Status.BUDGET_SPENT
    assert not bool(solution.report.converged) and bool(solution.report.success)


def test_a_budget_of_a_backward_solve_names_the_number_of_the_linear_solver() -> None:
    a = torch.ones(2, dtype=F64, requires_grad=True)
    stretch = torch.tensor([1.0, 9.0], dtype=F64)
    said = {}
    for delta_prime in (bilevel.AUTO, None):
        layer = bilevel.argmin(
            lambda x, a: ((x - a) ** 2 * stretch).sum(),
            linear_solver=bilevel.CG(max_steps=1),
            tolerance=bilevel.Tolerance(delta_prime=delta_prime),
            on_failure="ignore",
        )
        with bilevel.record() as reports:
            layer(ZERO, a).sum().backward()
        said[delta_prime] = reports.backward[0].message
    assert "Tolerance(delta_prime=None)" in said[bilevel.AUTO]
    assert "nothing needs doing" in said[None]


def test_a_budget_asked_for_by_none_is_silent() -> None:
    a = torch.ones(2, dtype=F64, requires_grad=True)
    layer = bilevel.argmin(
        lambda x, a: ((x - a) ** 2 * torch.tensor([1.0, 9.0], dtype=F64)).sum(),
        solver=bilevel.GradientDescent(0.05, 16),
        linear_solver=bilevel.CG(1),
        tolerance=bilevel.Tolerance(delta=None, delta_prime=None),
    )
    with warnings.catch_warnings(), bilevel.record() as reports:
        warnings.simplefilter("error")
        layer(ZERO, a).sum().backward()
    assert [report.status for report in reports] == [Status.BUDGET_SPENT, Status.BUDGET_SPENT]
    assert int(reports[0].iterations) == 16 and int(reports[1].iterations) == 1


def test_statuses_print_as_names_and_count_as_numbers() -> None:
    report = bilevel.argmin(bowl).solve(ZERO, ZERO).report
    assert f"{report.status}" == str(report.status) == "Status.CONVERGED"
    assert str(bilevel.Basis.RESIDUAL) == "Basis.RESIDUAL"
    assert report.status == 0 and f"{Status.SINGULAR:02d}" == "08"


@pytest.mark.parametrize("linear_solver", [None, bilevel.Exact(), bilevel.CG(), bilevel.GMRES(), bilevel.Neumann(500)])
def test_a_gradient_that_came_in_as_nan_is_not_blamed_on_the_objective(
    linear_solver: bilevel.LinearSolver | None,
) -> None:
    a = torch.ones(2, dtype=F64, requires_grad=True)
    loss = bilevel.argmin(bowl, linear_solver=linear_solver)(ZERO, a).sum() * torch.tensor(math.nan, dtype=F64)
    with (
        bilevel.record() as reports,
        pytest.raises(bilevel.SolveError, match=r"right-hand side is not finite.*with respect to the solution"),
    ):
        loss.backward()
    assert reports[-1].status is Status.NOT_FINITE and "right-hand side is not finite" in str(reports[-1])


def test_only_the_problem_whose_gradient_came_in_as_nan_is_told_so() -> None:
    a = torch.ones(3, 2, dtype=F64, requires_grad=True)
    weight = torch.tensor([[1.0], [math.nan], [2.0]], dtype=F64)
    layer = bilevel.argmin(bowl, on_failure="ignore")
    with bilevel.record() as reports:
        (vmap(layer, in_dims=(None, 0))(ZERO, a) * weight).sum().backward()
    assert reports[-1].status == (Status.CONVERGED, Status.NOT_FINITE, Status.CONVERGED)
    assert "right-hand side is not finite" in reports[-1].message and "number 1" in reports[-1].message


def test_a_matrix_with_a_nan_is_not_blamed_on_the_gradient() -> None:
    a = torch.ones(2, dtype=F64, requires_grad=True)
    layer = bilevel.argmin(
        lambda x, a: ((x - a).abs() ** 1.5).sum(),
        solver=given(lambda a: a),
        linear_solver=bilevel.CG(),
        on_failure="ignore",
    )
    with bilevel.record() as reports:
        layer(ZERO, a).sum().backward()
    assert reports[-1].status is Status.NOT_FINITE and "right-hand side is not finite" not in reports[-1].message


def test_a_tangent_that_came_in_as_nan_is_not_called_a_gradient() -> None:
    a = torch.ones(2, dtype=F64)
    with pytest.raises(bilevel.SolveError, match=r"right-hand side is not finite.*in forward mode in the tangents"):
        jvp(lambda a: bilevel.argmin(bowl)(ZERO, a), (a,), (a * math.nan,))


@pytest.mark.parametrize(
    ("layer", "args", "said"),
    [
        (bilevel.argmin(lambda x, a, b: ((x - a * b) ** 2).sum()), 2, r"got an initial guess and 1 more.*'b'"),
        (bilevel.argmin(lambda x, a: ((x - a) ** 2).sum()), 3, r"got an initial guess and 2 more.*too many"),
        (bilevel.root(lambda x, a: x - a), 1, r"got an initial guess and 0 more.*'a'"),
    ],
)
def test_a_missing_initial_guess_is_named(layer, args, said) -> None:
    with pytest.raises(bilevel.ArgumentError, match=said + ".*pass the initial guess first"):
        layer(*[torch.ones(2)] * args)


def test_a_type_error_of_the_users_own_stays() -> None:
    with pytest.raises(TypeError, match="unsupported operand"):
        bilevel.argmin(lambda x, a: x.sum() + "a")(torch.ones(2), torch.ones(2))
