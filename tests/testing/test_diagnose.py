"""Each defect is named, a healthy problem has none, and nothing that is to be found stops the examination."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bilevel
from bilevel.testing import Defect, diagnose
from bilevel.testing import strategies as draw
from bilevel.testing.strategies import RandomProblem

F64 = torch.float64
Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


def tensor(*entries: float, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.tensor(entries, dtype=dtype)


A = tensor(0.7, -0.4)
START = tensor(0.3, 0.2)


def bowl(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return ((x - a) ** 2).sum() + 0.1 * ((x - a) ** 4).sum()


class Ridge(bilevel.BilevelProblem):
    def inner_objective(self, inner, outer, data):
        X, y = data
        return ((X @ inner - y) ** 2).sum() + (outer["log_strength"].exp() * inner**2).sum()

    def outer_objective(self, inner, outer, data):
        X, y = data
        return ((X @ inner - 0.9 * y) ** 2).mean()


class Deaf(Ridge):
    def outer_objective(self, inner, outer, data):
        return (outer["log_strength"] ** 2).sum()


def ridge(kind: type[Ridge] = Ridge, **outer: torch.Tensor) -> Call:
    torch.manual_seed(0)
    data = torch.randn(8, 3, dtype=F64), torch.randn(8, dtype=F64)
    return kind(), ({"log_strength": tensor(0.1, 0.2, 0.3), **outer}, data), {"init": torch.zeros(3, dtype=F64)}


def saddle() -> Call:
    return bilevel.argmin(lambda x, a: (x[0] - a[0]) ** 2 - (x[1] - a[1]) ** 2), (A.clone(), A), {}


def saddle_that_descent_sits_on() -> Call:
    layer = bilevel.argmin(
        lambda x, a: (x[0] - a[0]) ** 2 + (x[1] ** 2 - 1) ** 2, solver=bilevel.GradientDescent(0.1, 400)
    )
    return layer, (torch.zeros(2, dtype=F64), A), {}


def valley() -> Call:
    return bilevel.argmin(lambda x, a: (x.sum() - a.sum()) ** 2), (START, A), {}


def wells(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return ((x**2 - a.abs()) ** 2).sum()  # with a maximum at 0


def start_at_a_maximum() -> Call:
    return bilevel.argmin(wells), (torch.zeros(2, dtype=F64), A), {}


def start_at_a_maximum_large() -> Call:
    return bilevel.argmin(wells), (torch.zeros(600, dtype=F64), torch.ones(600, dtype=F64)), {}


def start_on_a_kink(**settings: Any) -> Call:
    layer = bilevel.argmin(lambda x, a: ((x.abs() - a.abs()) ** 2).sum() + 0.1 * (x**2).sum(), **settings)
    return layer, (torch.zeros(2, dtype=F64), A), {}


def start_on_a_kink_with_delta() -> Call:
    return start_on_a_kink(tolerance=bilevel.Tolerance(delta=1e-6))


def minimum_at_a_kink() -> Call:
    layer = bilevel.argmin(lambda x, a: ((x - a) ** 2).sum() + 2 * x.abs().sum())
    return layer, (tensor(0.3, 0.3), tensor(0.2, 2.0)), {}


def singular_at_the_start() -> Call:
    return bilevel.root(lambda x, a: x**2 - a.abs(), solver=bilevel.Newton()), (torch.zeros(2, dtype=F64), A), {}


def contradiction() -> Call:
    return bilevel.root(lambda x, a: x.sum() - a), (START, A), {}


def one_equation_twice() -> Call:
    return bilevel.root(lambda x, a: (x.sum() - a.sum()) * torch.ones_like(x)), (START, A), {}


class Shifted(bilevel.BilevelProblem):
    def inner_objective(self, inner, outer, data):
        return torch.logsumexp(inner, 0) - (outer.softmax(0) * inner).sum()  # the same for inner + c

    def outer_objective(self, inner, outer, data):
        return (inner.softmax(0) ** 2).sum()


class Pinned(Shifted):
    def outer_objective(self, inner, outer, data):
        return inner[0] ** 2  # not the same for inner + c


def free_shift() -> Call:
    return Shifted(), (tensor(0.1, 0.4, -1.0), ()), {"init": torch.zeros(3, dtype=F64)}


def free_shift_by_products() -> Call:
    return Shifted(linear_solver=bilevel.CG()), *free_shift()[1:]


def free_shift_that_matters() -> Call:
    return Pinned(), (tensor(0.1, 0.4, -1.0), ()), {"init": tensor(1.0, 0.0, 0.0)}


def unconverged() -> Call:
    return bilevel.argmin(bowl, solver=bilevel.GradientDescent(1e-2, 5)), (START, A), {}


def undefined() -> Call:
    return bilevel.argmin(lambda x, a: (x - a).sqrt().sum() + (x**2).sum()), (START, A), {}


def dropout() -> Call:
    drop = torch.nn.Dropout(0.5)
    return bilevel.argmin(lambda x, a: ((drop(x) - a) ** 2).sum() + (x**2).sum()), (torch.ones(20, dtype=F64), A[0]), {}


def captured() -> Call:
    weight = torch.ones(2, dtype=F64, requires_grad=True)
    return bilevel.argmin(lambda x, a: ((x - weight * a) ** 2).sum()), (START, A), {}


def disconnected() -> Call:
    return ridge(momentum=torch.tensor(0.9, dtype=F64))


def ill_conditioned() -> Call:
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=F64))[0]
    H = Q @ torch.diag(torch.logspace(0, -8, 6, dtype=F64)) @ Q.T
    return (
        bilevel.argmin(lambda x, b: 0.5 * x @ H @ x - b @ x),
        (torch.zeros(6, dtype=F64), H @ torch.ones(6, dtype=F64)),
        {},
    )


def badly_scaled() -> Call:
    sizes = tensor(1e3, 1.0, 1e-2)

    def objective(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        z = x * sizes
        return ((z - a) ** 2).sum() + 0.3 * (z[0] * z[1] + z[1] * z[2])

    return bilevel.argmin(objective), (torch.zeros(3, dtype=F64), tensor(1.0, 2.0, 3.0)), {}


def deaf() -> Call:
    return ridge(Deaf)


def running_statistics() -> Call:
    norm = torch.nn.BatchNorm1d(2).double().requires_grad_(False)
    data = torch.randn(8, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    return bilevel.argmin(lambda x, a: ((norm(data + a) @ x) ** 2).sum() + ((x - a) ** 2).sum()), (START, A), {}


def lopsided_gradient() -> Call:
    class Twisted(torch.autograd.Function):
        @staticmethod
        def forward(x: torch.Tensor) -> torch.Tensor:
            return (x**2).sum()

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return g * (2 * x + torch.stack([0.5 * x[1], -0.5 * x[1]]))

    return bilevel.argmin(lambda x, a: Twisted.apply(x) - a @ x), (START, A), {}


def detached_part() -> Call:
    return bilevel.argmin(lambda x, a: ((x - a) ** 2).sum() * (1 + x.detach() ** 2).sum()), (START, A), {}


def cut_off() -> Call:
    return bilevel.argmin(lambda x, a: ((x.detach() - a) ** 2).sum()), (START, A), {}


def unsymmetric_for_cg() -> Call:
    J = tensor(1.0, 2.0, -2.0, 1.0).reshape(2, 2)
    return bilevel.root(lambda x, a: J @ x - a, linear_solver=bilevel.CG()), (START, A), {}


def too_few_products() -> Call:
    scales = torch.logspace(0, 3, 20, dtype=F64)
    layer = bilevel.argmin(lambda x, a: (scales * (x - a) ** 2).sum(), linear_solver=bilevel.CG(2))
    return layer, (torch.zeros(20, dtype=F64), torch.ones(20, dtype=F64)), {}


def beyond_rounding() -> Call:
    layer = bilevel.argmin(bowl, tolerance=bilevel.Tolerance(delta=1e-12))
    return layer, (START.float(), A.float() * 100), {}


def half() -> Call:
    return bilevel.argmin(bowl, solver=bilevel.GradientDescent(0.1, 50)), (START.bfloat16(), A.bfloat16()), {}


def mixed() -> Call:
    return bilevel.argmin(lambda x, a: ((x.double() - a) ** 2).sum()), (START.float(), A), {}


def divergent() -> Call:
    return bilevel.argmin(bowl, solver=bilevel.GradientDescent(10.0, 200)), (START, A), {}


def clamped() -> Call:
    return bilevel.argmin(lambda x, a, b: ((x - a - b.clamp(max=0.0)) ** 2).sum()), (START, A, tensor(0.5, 0.6)), {}


def raises() -> Call:
    return bilevel.argmin(lambda x, a: (x @ torch.zeros(5, dtype=F64)).sum()), (START, A), {}


def integers() -> Call:
    return bilevel.argmin(bowl), (torch.zeros(2, dtype=torch.int64), A), {}


def no_start() -> Call:
    problem, args, _ = ridge()
    return problem, args, {}


DEFECTS: dict[Callable[[], Call], set[Defect]] = {
    saddle: {Defect.SADDLE},
    saddle_that_descent_sits_on: {Defect.SADDLE},
    valley: {Defect.SINGULAR},
    start_at_a_maximum: {Defect.SADDLE},
    start_at_a_maximum_large: {Defect.SADDLE},
    start_on_a_kink: {Defect.KINK},
    start_on_a_kink_with_delta: {Defect.KINK},
    minimum_at_a_kink: {Defect.KINK},
    singular_at_the_start: {Defect.SINGULAR_SEARCH},
    contradiction: {Defect.SINGULAR_SEARCH},
    one_equation_twice: {Defect.SINGULAR},
    free_shift: {Defect.MINIMUM_NORM},
    free_shift_by_products: {Defect.MINIMUM_NORM},
    free_shift_that_matters: {Defect.SINGULAR},
    unconverged: {Defect.UNCONVERGED},
    undefined: {Defect.NOT_FINITE},
    dropout: {Defect.STOCHASTIC},
    captured: {Defect.CAPTURED_TENSOR},
    disconnected: {Defect.DISCONNECTED},
    ill_conditioned: {Defect.ILL_CONDITIONED},
    badly_scaled: {Defect.BADLY_SCALED},
    deaf: {Defect.OUTER_IGNORES_INNER},
    running_statistics: {Defect.CHANGES_STATE},
    lopsided_gradient: {Defect.WRONG_GRADIENT, Defect.NOT_SYMMETRIC},
    detached_part: {Defect.WRONG_GRADIENT},
    cut_off: {Defect.INNER_DISCONNECTED},
    unsymmetric_for_cg: {Defect.UNFIT_LINEAR_SOLVER},
    too_few_products: {Defect.LINEAR_SOLVE},
    beyond_rounding: {Defect.UNREACHABLE_TOLERANCE},
    half: {Defect.LOW_PRECISION},
    mixed: {Defect.MIXED_DTYPES},
    divergent: {Defect.DIVERGED},
    clamped: {Defect.ZERO_GRADIENT},
    raises: {Defect.UNUSABLE},
    integers: {Defect.UNUSABLE},
    no_start: {Defect.UNUSABLE},
}
# What follows from the defect and is found too.
CONSEQUENCES = {
    beyond_rounding: {Defect.UNCONVERGED},
    half: {Defect.UNCONVERGED},
    lopsided_gradient: {Defect.UNCONVERGED},
}


@pytest.mark.parametrize("make", DEFECTS, ids=lambda make: make.__name__)
def test_the_defect_is_named_and_no_other(make: Callable[[], Call]) -> None:
    target, args, settings = make()
    found = diagnose(target, *args, **settings)
    print(found)
    named = set(found.defects)
    assert named >= DEFECTS[make]
    assert named <= DEFECTS[make] | CONSEQUENCES.get(make, set())
    assert not found.healthy
    assert len(str(found).splitlines()) <= 40
    json.dumps(found.as_dict(), allow_nan=False)
    if found.dtype == "float64":
        assert not any("use float64" in finding.remedy for finding in found.findings)


@pytest.mark.parametrize(
    ("make", "where"),
    [
        (start_at_a_maximum, "not positive definite at the start"),
        (start_on_a_kink, "its gradient jumps at the start"),
        (singular_at_the_start, "could not leave the start"),
        (contradiction, "at a point that is no solution"),
        (free_shift, "the outer loss does not change along them"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_seen_at_the_start_is_told_from_what_is_seen_at_the_solution(
    make: Callable[[], Call], where: str
) -> None:
    target, args, settings = make()
    assert where in diagnose(target, *args, **settings).findings[0].sentence


def test_a_free_shift_is_no_reason_to_expect_no_digits() -> None:
    target, args, settings = free_shift()
    advice = diagnose(target, *args, **settings).advice
    assert advice is not None and advice.tolerance == "Tolerance()"


def healthy_layer() -> Call:
    return bilevel.argmin(bowl), (START, A), {}


def healthy_float32() -> Call:
    return bilevel.argmin(bowl), (START.float(), A.float()), {}


def healthy_root() -> Call:
    J = tensor(1.0, 2.0, -2.0, 1.0).reshape(2, 2)

    def residual(x: dict[str, torch.Tensor], a: torch.Tensor) -> dict[str, torch.Tensor]:
        u = torch.cat([x["u"].reshape(1), x["v"]])
        r = J @ u + 0.1 * u**3 - a
        return {"u": r[0], "v": r[1:]}

    return bilevel.root(residual), ({"u": START[0], "v": START[1:]}, A), {}


def healthy_fixed_point() -> Call:
    return bilevel.fixed_point(lambda x, a: 0.5 * torch.cos(x) + a), (START, A), {}


def healthy_batch() -> Call:
    return bilevel.argmin(bowl), (START, torch.stack([A, 2 * A, 3 * A])), {"in_dims": (None, 0)}


def healthy_learner() -> Call:
    torch.manual_seed(0)
    learner = bilevel.IMAML(
        torch.nn.Linear(3, 1).double(),
        torch.nn.functional.mse_loss,
        solver=bilevel.Newton(),
        linear_solver=bilevel.CG(),
    )
    x, y = torch.randn(2, 5, 3, dtype=F64), torch.randn(2, 5, 1, dtype=F64)
    return learner, ((x, y, x + 0.1, y),), {}


def healthy_large() -> Call:
    scales = torch.linspace(1, 3, 700, dtype=F64)
    return (
        bilevel.argmin(lambda x, a: (scales * (x - a) ** 2).sum()),
        (torch.zeros(700, dtype=F64), torch.ones(700, dtype=F64)),
        {},
    )


@pytest.mark.parametrize(
    "make",
    [
        healthy_layer, healthy_float32, healthy_root, healthy_fixed_point, healthy_batch, healthy_learner, healthy_large, ridge,
    ],
    ids=lambda make: make.__name__,
)  # fmt: skip
def test_a_healthy_problem_has_no_finding(make: Callable[[], Call]) -> None:
    target, args, settings = make()
    found = diagnose(target, *args, **settings)
    print(found)
    assert found.healthy, str(found)
    assert found.inner is not None and found.curvature is not None and found.linear is not None
    assert found.cost is not None and found.advice is not None and found.deterministic


def explode(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    if float(x.detach().sum()) != 0.5:  # fine at the start, and nowhere else
        raise ZeroDivisionError("not here")
    return (x**2).sum()


class Broken(Ridge):
    def outer_objective(self, inner, outer, data):
        raise KeyError("outer")


class Shapeless(Ridge):
    def outer_objective(self, inner, outer, data):
        return inner


NASTY: dict[str, Callable[[], Call]] = {
    "returns nothing": lambda: (bilevel.argmin(lambda x, a: None), (START, A), {}),
    "returns a number": lambda: (bilevel.argmin(lambda x, a: 1.0), (START, A), {}),
    "returns a vector": lambda: (bilevel.argmin(lambda x, a: (x - a) ** 2), (START, A), {}),
    "returns another shape": lambda: (bilevel.root(lambda x, a: x.sum()), (START, A), {}),
    "explodes beside the start": lambda: (bilevel.argmin(explode), (START, A), {}),
    "NaN everywhere": lambda: (bilevel.argmin(lambda x, a: (x * a).sum() * float("nan")), (START, A), {}),
    "infinite data": lambda: (bilevel.argmin(bowl), (START, A * float("inf")), {}),
    "NaN at the start": lambda: (bilevel.argmin(bowl), (START * float("nan"), A), {}),
    "a constant": lambda: (bilevel.argmin(lambda x, a: (0.0 * x).sum() + a.sum()), (START, A), {}),
    "linear": lambda: (bilevel.argmin(lambda x, a: (a * x).sum()), (START, A), {}),
    "a concave objective": lambda: (bilevel.argmin(lambda x, a: -((x - a) ** 2).sum()), (START, A), {}),
    "a kink": lambda: (bilevel.argmin(lambda x, a: (x - a).abs().sum()), (START, A), {}),
    "no root": lambda: (bilevel.root(lambda x, a: x**2 + 1 + a**2), (START, A), {}),
    "nothing unknown": lambda: (
        bilevel.argmin(lambda x, a: (x**2).sum() + a.sum()),
        (torch.zeros(0, dtype=F64), A),
        {},
    ),
    "a number as start": lambda: (bilevel.argmin(bowl), (1.0, A), {}),
    "no start": lambda: (bilevel.argmin(bowl), (), {}),
    "an empty start": lambda: (bilevel.argmin(bowl), ({}, A), {}),
    "complex": lambda: (bilevel.argmin(bowl), (START, A + 0j), {}),
    "no tensor": lambda: (bilevel.argmin(lambda x, a: ((x - a) ** 2).sum()), (START, 3.0), {}),
    "too many arguments": lambda: (bilevel.argmin(bowl), (START, A, A, A), {}),
    "wrong axes": lambda: (bilevel.argmin(bowl), (START, A), {"in_dims": (0, 5)}),
    "a solver that raises": lambda: (bilevel.argmin(bowl, solver=lambda *args: 1 / 0), (START, A), {}),
    "a solver that returns rubbish": lambda: (bilevel.argmin(bowl, solver=lambda *args: "rubbish"), (START, A), {}),
    "a linear solver that raises": lambda: (bilevel.argmin(bowl, linear_solver=lambda A, b: 1 / 0), (START, A), {}),
    "a broken outer loss": lambda: ridge(Broken),
    "an outer loss that is no scalar": lambda: ridge(Shapeless),
    "integers as outer": lambda: (Ridge(), ({"log_strength": torch.zeros(3, dtype=torch.int64)}, ()), {}),
    "the data alone": lambda: (Ridge(), (A,), {}),
    "a batch with one bad problem": lambda: (
        bilevel.argmin(lambda x, a: ((x - a) ** 2).sum() + (x - a[0]).sqrt().sum() * (a[0] > 5)),
        (START, torch.stack([A, A, A + 9])),
        {"in_dims": (None, 0)},
    ),
}


@pytest.mark.parametrize("name", NASTY)
def test_nothing_that_is_to_be_found_is_raised(name: str) -> None:
    target, args, settings = NASTY[name]()
    found = diagnose(target, *args, **settings)
    print(found)
    assert not found.healthy or name == "nothing unknown"
    assert found.findings or found.unexamined or name == "nothing unknown"
    json.dumps(found.as_dict(), allow_nan=False)


@given(draw.problems(regular=True), draw.dtypes())
def test_random_regular_problems_have_no_finding(problem: RandomProblem, dtype: torch.dtype) -> None:
    problem = problem.to(dtype)
    found = diagnose(problem.layer(), problem.init, *problem.args)
    # A matrix that multiplies what vanishes at the solution has the gradient zero, which is said, and is no more than that.
    assert found.healthy or found.defects == (Defect.ZERO_GRADIENT,), str(found)
    if not found.healthy:
        assert problem.make is not bilevel.root and found.outer[0].gradient == 0.0
    assert found.curvature is not None and found.curvature.condition <= 1.3 * problem.condition


@given(st.one_of(draw.ill_conditioned(least_digits=6.2), draw.badly_scaled()))
def test_random_hard_problems_are_named(problem: RandomProblem) -> None:
    found = diagnose(problem.layer(), problem.init, *problem.args)
    assert found.curvature is not None
    hard = {Defect.ILL_CONDITIONED, Defect.BADLY_SCALED} & set(found.defects)
    assert bool(hard) == (found.curvature.condition > 1e6), str(found)
    if problem.name.startswith("badly") and problem.condition > 1e6:
        assert found.defects == (Defect.BADLY_SCALED,)


def test_what_is_no_problem_is_refused() -> None:
    with pytest.raises(bilevel.ArgumentError, match="wrap the function"):
        diagnose(bowl, START, A)


def test_the_facts_are_those_of_the_problem() -> None:
    H = torch.diag(tensor(0.5, 2.0, 8.0))
    found = diagnose(
        bilevel.argmin(lambda x, b: 0.5 * x @ H @ x - b @ x), torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64)
    )
    document = found.as_dict()
    assert document["curvature"]["smallest"] == pytest.approx(0.5) and document["curvature"][
        "largest"
    ] == pytest.approx(8.0)
    assert document["curvature"]["condition"] == pytest.approx(16.0)
    assert document["curvature"]["condition_scaled"] == pytest.approx(1.0)
    assert document["outer"][0]["name"] == "b" and document["outer"][0]["in_inner"]
    assert document["inner"]["newton_step"] < 1e-12
    assert document["cost"]["cg_products"] == 3 and document["cost"]["dense_numbers"] == 9
    assert "Newton()" in document["advice"]["solver"] and document["healthy"]


def test_lanczos_finds_the_ends_of_a_large_spectrum() -> None:
    spectrum = torch.cat([tensor(-0.5), torch.linspace(1, 3, 700, dtype=F64), tensor(40.0)])
    layer = bilevel.argmin(lambda x, a: 0.5 * (spectrum * (x - a) ** 2).sum(), solver=lambda f, x, a: a)
    found = diagnose(layer, torch.zeros(702, dtype=F64), torch.ones(702, dtype=F64))
    assert found.curvature is not None and not found.curvature.exact
    assert found.curvature.smallest == pytest.approx(-0.5, rel=1e-6)
    assert found.curvature.largest == pytest.approx(40.0, rel=1e-6)
    assert Defect.SADDLE in found.defects
    J = torch.diag(torch.linspace(1, 2, 600, dtype=F64)) + torch.diag(torch.full((599,), 0.5, dtype=F64), 1)
    skew = diagnose(bilevel.root(lambda x, a: J @ x - a), torch.zeros(600, dtype=F64), torch.ones(600, dtype=F64))
    assert skew.healthy, str(skew)
    assert skew.curvature is not None and skew.curvature.largest == pytest.approx(
        float(torch.linalg.svdvals(J)[0]), rel=1e-3
    )
    assert skew.curvature.asymmetry > 0.01


def test_a_large_unconverged_point_is_found_without_the_matrix() -> None:
    scales = torch.linspace(1, 3, 700, dtype=F64)
    layer = bilevel.argmin(lambda x, a: (scales * (x - a) ** 2).sum(), solver=bilevel.GradientDescent(0.01, 5))
    found = diagnose(layer, torch.zeros(700, dtype=F64), torch.ones(700, dtype=F64))
    assert found.defects == (Defect.UNCONVERGED,) and "at least" in found.findings[0].sentence


def test_warm_starts_are_forgotten_and_gradients_left_alone() -> None:
    problem, (outer, data), settings = ridge()
    outer["log_strength"].requires_grad_(True)
    problem(outer, data, **settings)
    diagnose(problem, outer, data, **settings)
    assert outer["log_strength"].grad is None
    with pytest.raises(bilevel.ArgumentError, match="init"):
        problem(outer, data)


def test_a_term_at_its_threshold_is_named_and_a_sound_lasso_is_sound() -> None:
    layer = bilevel.argmin(lambda x, a: 0.5 * ((x - a) ** 2).sum(), prox=bilevel.prox.L1(1.0))
    start = torch.zeros(2, dtype=torch.float64)
    found = bilevel.testing.diagnose(layer, start, torch.tensor([1.0, 3.0], dtype=torch.float64))
    assert [defect.name for defect in found.defects] == ["DEGENERATE"]
    assert bilevel.testing.diagnose(layer, start, torch.tensor([0.5, 3.0], dtype=torch.float64)).healthy
