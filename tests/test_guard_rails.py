"""What would make a gradient silently wrong or missing, put into every entry point, in every mode of differentiation."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jvp, vmap

import bilevel
from bilevel import Status
from bilevel.layers.randomness import draws

F64 = torch.float64
ZERO, ONE = torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64)
NAN, INF = float("nan"), float("inf")
Extra = Callable[[torch.Tensor], torch.Tensor]
NOTHING: Extra = torch.zeros_like


# Layers, as functions of θ, with a fault in what they are given to solve.


def requires_grad() -> torch.Tensor:
    return ONE.clone().requires_grad_(True)


def argmin(extra: Extra, start: torch.Tensor = ZERO, **how: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    layer = bilevel.argmin(lambda x, a: ((x - a) ** 2).sum() + 0.1 * extra(x).sum(), **how)
    return lambda a: layer(start, a)


def root(extra: Extra, start: torch.Tensor = ZERO, **how: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    layer = bilevel.root(lambda x, a: x - a + 0.1 * extra(x), **how)
    return lambda a: layer(start, a)


def fixed_point(extra: Extra, start: torch.Tensor = ZERO, **how: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    layer = bilevel.fixed_point(lambda x, a: 0.3 * x + a + 0.1 * extra(x), **how)
    return lambda a: layer(start, a)


def linear_solve(extra: Extra, start: torch.Tensor = ZERO, **how: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    layer = bilevel.linear_solve(lambda x, a: 2 * x + 0 * a * x + 0.1 * extra(x), **how)
    return lambda a: layer(a, a)


LAYERS = {make.__name__: make for make in (argmin, root, fixed_point, linear_solve)}
layers = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


# Problems, as functions of their data that return a gradient, with a fault in the inner and in the outer objective.


class Plain(bilevel.BilevelProblem):
    def __init__(self, inner: Extra, outer: Extra, **how: Any) -> None:
        super().__init__(**how)
        self.inner, self.outer = inner, outer

    def inner_objective(self, x, a, data):
        return ((x - a) ** 2).sum() + (x * data).sum() + 0.1 * self.inner(x).sum()

    def outer_objective(self, x, a, data):
        return (x**2).sum() + 0.1 * self.outer(x).sum()


def forward(inner: Extra, outer: Extra, data: torch.Tensor = ONE, **how: Any) -> torch.Tensor:
    a = requires_grad()
    Plain(inner, outer, **how)(a, data, init=ZERO).backward()
    return a.grad


def forward_under_grad(inner: Extra, outer: Extra, data: torch.Tensor = ONE, **how: Any) -> torch.Tensor:
    return grad(lambda a: Plain(inner, outer, **how)(a, data, init=ZERO))(ONE)


def hypergradient(inner: Extra, outer: Extra, data: torch.Tensor = ONE, **how: Any) -> torch.Tensor:
    return Plain(inner, outer, **how).hypergradient(ONE, data, init=ZERO).grad


def batch(inner: Extra, outer: Extra, data: torch.Tensor = ONE, **how: Any) -> torch.Tensor:
    problem = Plain(inner, outer, batch_dims=0, **how)
    return problem.hypergradient(ONE, data.repeat(3, 1), init=torch.zeros(3, 2, dtype=F64)).grad


def _tuning(inner: Extra, outer: Extra, **how: Any) -> bilevel.HyperparameterOptimization:
    return bilevel.HyperparameterOptimization(
        lambda x, a, data: ((x - a) ** 2).sum() + (x * data).sum() + 0.1 * inner(x).sum(),
        lambda x, data: (x**2).sum() + 0.1 * outer(x).sum(),
        ONE, ZERO, **how,
    )  # fmt: skip


def tuning(inner: Extra, outer: Extra, data: torch.Tensor = ONE, **how: Any) -> torch.Tensor:
    problem = _tuning(inner, outer, **how)
    problem(data).backward()
    return problem.hyperparameters.grad


def tuning_hypergradient(inner: Extra, outer: Extra, data: torch.Tensor = ONE, **how: Any) -> torch.Tensor:
    return _tuning(inner, outer, **how).hypergradient(data).grad


# The same with a goal. Iterative solvers lead to the search, which evaluates the objectives itself.
GOAL = {"tolerance": bilevel.Tolerance(hypergradient=1e-9, relative=True, estimates=True)}
SEARCH = {**GOAL, "solver": bilevel.LBFGS(), "linear_solver": bilevel.CG()}
GOALS = {
    "goal, backward": functools.partial(forward, **GOAL),
    "goal, hypergradient": functools.partial(hypergradient, **GOAL),
    "goal, batch": functools.partial(batch, **GOAL),
    "goal, HyperparameterOptimization, backward": functools.partial(tuning, **GOAL),
}
PROBLEMS = {
    "BilevelProblem, backward": forward,
    "BilevelProblem, torch.func.grad": forward_under_grad,
    "BilevelProblem.hypergradient": hypergradient,
    "BilevelProblem.hypergradient, batch": batch,
    "HyperparameterOptimization, backward": tuning,
    "HyperparameterOptimization.hypergradient": tuning_hypergradient,
    **GOALS,
}
problems = pytest.mark.parametrize("use", PROBLEMS.values(), ids=PROBLEMS)


class Shift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(ONE.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.w


def imaml(extra: Extra, support: torch.Tensor = ONE, query: torch.Tensor = ONE, *, whole: bool = False) -> torch.Tensor:
    """Return the gradient of two tasks, by backward, or by hypergradient if ``whole``."""
    learner = bilevel.IMAML(Shift(), lambda made, y: ((made - y) ** 2).mean() + 0.1 * extra(made).sum())
    batch = tuple(t.expand(2, 3, 2) for t in (support, ONE, query, ONE))
    if whole:
        return learner.hypergradient(batch).grad["parameters"]["w"]
    learner(batch).backward()
    return learner.model.w.grad


whole = pytest.mark.parametrize("whole", [False, True], ids=["backward", "hypergradient"])


def test_without_a_fault_everything_works() -> None:
    for make in LAYERS.values():
        assert bool(torch.isfinite(grad(lambda a, make=make: make(NOTHING)(a).sum())(ONE)).all())
    for use in PROBLEMS.values():
        torch.testing.assert_close(use(NOTHING, NOTHING), ONE)
    for way in (False, True):
        assert bool(torch.isfinite(imaml(NOTHING, whole=way)).all())


# Captures.


def dual(make: Any) -> torch.Tensor | None:
    with forward_ad.dual_level():
        c = forward_ad.make_dual(ONE.clone(), ONE)
        return forward_ad.unpack_dual(make(lambda x: c * x)(ONE)).tangent


def test_arguments_that_are_dual_numbers_are_no_captures() -> None:
    for make in LAYERS.values():
        with forward_ad.dual_level():
            a = forward_ad.make_dual(torch.ones(3, 2, dtype=F64), torch.ones(3, 2, dtype=F64))
            pushed = forward_ad.unpack_dual(vmap(make(NOTHING))(a)).tangent
        alone = jvp(make(NOTHING), (ONE,), (ONE,))[1]
        torch.testing.assert_close(pushed, alone.expand(3, 2))


CAPTURES: dict[str, Callable[[Any], Any]] = {
    "requires grad": lambda make: (lambda c: make(lambda x: c * x)(ONE))(requires_grad()),
    "grad": lambda make: grad(lambda c: make(lambda x: c * x)(ONE).sum())(ONE),
    "grad, of another argument inside": lambda make: grad(
        lambda c: grad(lambda a: make(lambda x: c * x)(a).sum())(ONE).sum()
    )(ONE),
    "jvp": lambda make: jvp(lambda c: make(lambda x: c * x)(ONE), (ONE,), (ONE,)),
    "dual numbers": dual,
    "vmap": lambda make: vmap(lambda c: make(lambda x: c * x)(ONE))(torch.ones(3, 2, dtype=F64)),
    "jacfwd of vmap": lambda make: jacfwd(lambda c: vmap(make(lambda x: c * x))(torch.ones(3, 2, dtype=F64)))(ONE),
}


@layers
@pytest.mark.parametrize("how", CAPTURES)
def test_captures_in_layers(make: Any, how: str) -> None:
    with pytest.raises(bilevel.CapturedTensorError, match="pass it as an argument"):
        CAPTURES[how](make)


@problems
def test_captures_in_the_inner_objective(use: Any) -> None:
    c = requires_grad()
    with pytest.raises(bilevel.CapturedTensorError, match="pass it as an argument"):
        use(lambda x: c * x, NOTHING)
    if use is not hypergradient:
        with pytest.raises(bilevel.CapturedTensorError):
            grad(lambda c: Plain(lambda x: c * x, NOTHING)(ONE, ONE, init=ZERO))(ONE)


@whole
def test_captures_in_the_loss_of_imaml(whole: bool) -> None:
    c = requires_grad()
    with pytest.raises(bilevel.CapturedTensorError, match="pass it as an argument"):
        imaml(lambda x: c * x, whole=whole)


def test_captures_in_the_outer_objective_get_their_gradient_or_are_refused() -> None:
    # Calling a problem is ordinary torch code in the caller's graph: there the tensor receives what it should.
    c = torch.tensor([2.0, 3.0], dtype=F64, requires_grad=True)
    a = requires_grad()
    Plain(NOTHING, lambda x: c * x)(a, ONE, init=ZERO).backward()
    solution = a.detach() - 0.5
    torch.testing.assert_close(c.grad, 0.1 * solution)
    torch.testing.assert_close(a.grad, 2 * solution + 0.1 * c.detach())
    found = grad(lambda c: Plain(NOTHING, lambda x: c * x)(ONE, ONE, init=ZERO))(c.detach())
    torch.testing.assert_close(found, 0.1 * solution)
    # A hypergradient is that of outer alone, and so is what a goal promises.
    for use in (hypergradient, batch, tuning_hypergradient, *GOALS.values()):
        with pytest.raises(bilevel.CapturedTensorError, match="outer_objective reaches one through its closure"):
            use(NOTHING, lambda x: c * x)
        with pytest.warns(bilevel.FailureWarning, match="outer_objective"):
            torch.testing.assert_close(
                use(NOTHING, lambda x: c * x, on_failure="warn"), 2 * solution + 0.1 * c.detach()
            )
        assert bool(torch.isnan(use(NOTHING, lambda x: c * x, on_failure="nan")).all())
    # Data that has a graph of its own is no capture.
    data = requires_grad()
    for use in (hypergradient, GOALS["goal, hypergradient"]):
        torch.testing.assert_close(use(NOTHING, NOTHING, 1.0 * data), ONE)


# Randomness.


def dropout(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.dropout(x, 0.5)


def noise(x: torch.Tensor) -> torch.Tensor:
    return x * torch.randn_like(x)


@layers
@pytest.mark.parametrize("extra", [dropout, noise])
@pytest.mark.parametrize("seed", range(4))
def test_randomness_in_layers(make: Any, extra: Extra, seed: int) -> None:
    # Two throws of a coin for each of two entries agree one time in four: this must not be left to chance.
    torch.manual_seed(seed)
    with pytest.raises(bilevel.StochasticObjectiveError, match="deterministic"):
        make(extra)(ONE)
    with pytest.raises(bilevel.StochasticObjectiveError, match="deterministic"):
        vmap(make(extra))(torch.ones(3, 2, dtype=F64))
    with pytest.raises(bilevel.StochasticObjectiveError, match="deterministic"):
        vmap(grad(lambda a: make(extra)(a).sum()))(torch.ones(3, 2, dtype=F64))


@layers
def test_random_numbers_that_change_nothing_are_no_randomness(make: Any) -> None:
    assert bool(torch.isfinite(make(lambda x: 0 * torch.rand_like(x).sum() * x)(ONE)).all())


@problems
@pytest.mark.parametrize("where", ["inner", "outer"])
@pytest.mark.parametrize("on_failure", ["raise", "warn", "nan"])
@pytest.mark.filterwarnings("ignore:.*the hypergradient's error")  # of a random function nothing is known
def test_randomness_in_problems(use: Any, where: str, on_failure: str) -> None:
    functions = (dropout, NOTHING) if where == "inner" else (NOTHING, dropout)
    if on_failure == "raise":
        with pytest.raises(bilevel.StochasticObjectiveError, match="dropout off"):
            use(*functions)
        return
    if where == "inner":
        return  # tests of layers
    if on_failure == "warn":
        with pytest.warns(bilevel.FailureWarning, match="outer_objective to be deterministic"):
            use(*functions, on_failure="warn")
    else:
        assert bool(torch.isnan(use(*functions, on_failure="nan")).all())


@contextlib.contextmanager
def others_draw() -> Iterator[None]:
    """Draw random numbers in two other threads, without a pause."""
    ended = threading.Event()

    def draw() -> None:
        while not ended.is_set():
            torch.rand(8)

    threads = [threading.Thread(target=draw) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def test_random_numbers_of_other_threads() -> None:
    layer, problem = bilevel.argmin(lambda x, a: ((x - a) ** 2).sum()), Plain(NOTHING, NOTHING)
    problem_of_many = func_of_many(problem)
    with others_draw():
        for _ in range(20):
            layer(ZERO, ONE)
            problem(ONE, ONE, init=ZERO)
            problem.hypergradient(ONE, ONE, init=ZERO)
        assert problem_of_many(torch.ones(3, 2, dtype=F64)).shape == (3, 2)


def func_of_many(problem: bilevel.BilevelProblem) -> Extra:
    return vmap(grad(lambda a: problem(a, ONE, init=ZERO)), randomness="different")


@pytest.mark.parametrize("extra", [dropout, noise, lambda x: 0 * noise(x)])
def test_a_problem_s_own_random_numbers_beside_those_of_other_threads(extra: Extra) -> None:
    problem = Plain(NOTHING, extra)
    calls: list[Callable[[], Any]] = [
        lambda: problem(ONE, ONE, init=ZERO),
        lambda: problem.hypergradient(ONE, ONE, init=ZERO),
        lambda: func_of_many(problem)(torch.ones(3, 2, dtype=F64)),
        lambda: jvp(lambda a: problem(a, ONE, init=ZERO), (ONE,), (ONE,)),
    ]
    with others_draw():
        for call in calls:
            with pytest.raises(bilevel.StochasticObjectiveError, match="outer_objective to be deterministic"):
                call()
        if extra in (dropout, noise):
            with pytest.raises(bilevel.StochasticObjectiveError, match="expected objective to be deterministic"):
                argmin(extra)(ONE)


def test_a_noise_of_size_zero_is_found_later_beside_other_threads() -> None:
    layer = bilevel.argmin(lambda x, a, size: ((x - a) ** 2).sum() + (size * x * torch.randn_like(x)).sum())
    with others_draw():
        for _ in range(4):
            layer(ZERO, ONE, torch.zeros((), dtype=F64))
        with pytest.raises(bilevel.StochasticObjectiveError, match="deterministic"):
            layer(ZERO, ONE, torch.ones((), dtype=F64))


def test_what_counts_as_a_draw() -> None:
    own, x = torch.Generator().manual_seed(0), torch.ones(4)
    attention = torch.nn.functional.scaled_dot_product_attention
    for drawn in (
        lambda: torch.rand(2), lambda: dropout(x), lambda: torch.randperm(3), lambda: vmap(noise, randomness="different")(x),
        lambda: torch.empty(2).normal_(), lambda: attention(*[x.reshape(1, 1, 2, 2)] * 3, dropout_p=0.5),
        lambda: grad(lambda x: dropout(x).sum())(x), lambda: torch.nn.functional.rrelu(x, training=True),
    ):  # fmt: skip
        assert draws(drawn)
    for none in (
        lambda: torch.rand(2, generator=own), lambda: x.sin(), lambda: torch.nn.functional.dropout(x, 0.5, training=False),
        lambda: attention(*[x.reshape(1, 1, 2, 2)] * 3), lambda: torch.nn.functional.rrelu(x, training=False),
    ):  # fmt: skip
        assert not draws(none)


@whole
def test_randomness_in_imaml(whole: bool) -> None:
    with pytest.raises(bilevel.StochasticObjectiveError, match="dropout off"):
        imaml(dropout, whole=whole)


# NaN and infinity.


@layers
@pytest.mark.parametrize("bad", [NAN, INF])
def test_what_is_not_finite_going_in(make: Any, bad: float) -> None:
    for call in (
        lambda: make(lambda x: bad * x)(ONE),
        lambda: make(NOTHING)(bad * ONE),
        lambda: vmap(make(NOTHING))(torch.stack([ONE, bad * ONE])),
        lambda: grad(lambda a: make(NOTHING)(a).sum())(bad * ONE),
        *([] if make is linear_solve else [lambda: make(NOTHING, bad * ONE)(ONE)]),
    ):
        with pytest.raises(bilevel.SolveError) as caught:
            call()
        assert Status.NOT_FINITE in caught.value.report.status_code.flatten().tolist()


@layers
@pytest.mark.parametrize("bad", [NAN, INF])
def test_what_is_not_finite_coming_back(make: Any, bad: float) -> None:
    def backward(a: torch.Tensor) -> torch.Tensor:
        a = a.clone().requires_grad_(True)
        return torch.autograd.grad(make(NOTHING)(a), a, torch.tensor([bad, 1.0], dtype=F64))[0]

    for call in (
        lambda: backward(ONE),
        lambda: grad(lambda a: (bad * make(NOTHING)(a)).sum())(ONE),
        lambda: jvp(make(NOTHING), (ONE,), (bad * ONE,)),
    ):
        with pytest.raises(bilevel.SolveError, match="the backward solve") as caught:
            call()
        assert caught.value.report.status is Status.NOT_FINITE


@layers
def test_a_derivative_that_is_not_finite_at_a_finite_solution(make: Any) -> None:
    # |0 x|^½ is zero everywhere, and its derivative 0 · ∞.
    with pytest.raises(bilevel.SolveError) as caught:
        grad(lambda a: make(lambda x: (0 * x).abs().sqrt())(a).sum())(ONE)
    assert caught.value.report.status is Status.NOT_FINITE


@problems
@pytest.mark.parametrize("bad", [NAN, INF])
def test_what_is_not_finite_in_problems(use: Any, bad: float) -> None:
    for call in (
        lambda: use(lambda x: bad * x, NOTHING),
        lambda: use(NOTHING, lambda x: bad * x),
        lambda: use(NOTHING, lambda x: (0 * x).abs().sqrt()),
        lambda: use(NOTHING, NOTHING, bad * ONE),
    ):
        with pytest.raises(bilevel.SolveError, match=r"met a NaN or an infinity"):
            call()


@whole
@pytest.mark.parametrize("where", ["support", "query", "loss"])
def test_what_is_not_finite_in_imaml(whole: bool, where: str) -> None:
    with pytest.raises(bilevel.SolveError, match=r"met a NaN or an infinity"):
        if where == "loss":
            imaml(lambda x: NAN * x, whole=whole)
        else:
            imaml(NOTHING, whole=whole, **{where: NAN * ONE})


# Changes in place.


@layers
def test_tensors_changed_between_forward_and_backward(make: Any) -> None:
    def change(which: str) -> None:
        a = requires_grad()
        given = 1.0 * a
        x = make(NOTHING)(given)
        with torch.no_grad():
            (x if which == "solution" else given).mul_(2)
        torch.autograd.grad(x.sum(), a)

    for which in ("solution", "argument"):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            change(which)


@layers
def test_functions_that_change_what_they_are_given(make: Any) -> None:
    state = torch.zeros(2, dtype=F64)
    with pytest.raises(bilevel.StochasticObjectiveError, match="deterministic"):
        make(lambda x: state.add_(1.0) * x)(ONE)


def add_to(x: torch.Tensor) -> torch.Tensor:
    x += 1
    return x


@layers
def test_functions_that_change_the_unknown_are_told_what_to_write(make: Any) -> None:
    with pytest.raises(bilevel.StochasticObjectiveError, match=r"write x = x \+ 1 for x \+= 1"):
        make(add_to)(ONE)


def test_functions_that_change_an_argument_are_told_what_to_write() -> None:
    with pytest.raises(bilevel.StochasticObjectiveError, match=r"write x = x \+ 1 for x \+= 1"):
        bilevel.argmin(lambda x, a: ((x - add_to(a)) ** 2).sum())(ZERO, ONE.clone())

    class Changing(Plain):
        def outer_objective(self, x, a, data):
            return (x * add_to(a)).sum()

    for call in (
        lambda: Changing(NOTHING, NOTHING)(requires_grad(), ONE, init=ZERO),
        lambda: Changing(NOTHING, NOTHING).hypergradient(ONE.clone(), ONE, init=ZERO),
    ):
        with pytest.raises(bilevel.StochasticObjectiveError, match=r"write x = x \+ 1 for x \+= 1"):
            call()


@problems
def test_objectives_that_change_their_data(use: Any) -> None:
    seen = torch.zeros(2, dtype=F64)

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", seen)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.add_(1.0)
            return 0 * x

    # Inside a transform torch refuses to change what is captured, before anything of ours is reached.
    words = "leave its arguments and buffers as they are|mutate a captured Tensor"
    for faulty in ((NOTHING, Counting()), (Counting(), NOTHING)):
        with pytest.raises((bilevel.StochasticObjectiveError, RuntimeError), match=words):
            use(*faulty)


def test_an_outer_objective_that_changes_its_data() -> None:
    class Changing(Plain):
        def outer_objective(self, x, a, data):
            return (x**2).sum() + 0 * data.add_(1.0).sum()

    for call in (
        lambda: Changing(NOTHING, NOTHING)(requires_grad(), [ONE, ONE.clone()][1], init=ZERO),
        lambda: Changing(NOTHING, NOTHING).hypergradient(ONE, ONE.clone(), init=ZERO),
        lambda: Changing(NOTHING, NOTHING, **GOAL).hypergradient(ONE, ONE.clone(), init=ZERO),
    ):
        with pytest.raises((bilevel.StochasticObjectiveError, RuntimeError), match=r"in place|inplace"):
            call()


# Outer tensors that nothing leads to.


class Two(Plain):
    """Uses ``outer["a"]``, and ``outer["b"]`` only where it is told to."""

    uses_b = ""

    def inner_objective(self, x, outer, data):
        extra = (outer["b"] * x).sum() if self.uses_b == "inner" else 0 * (outer["b"].detach() * x).sum()
        return super().inner_objective(x, outer["a"], data) + extra

    def outer_objective(self, x, outer, data):
        return super().outer_objective(x, outer["a"], data) + (outer["b"].sum() if self.uses_b == "outer" else 0)


@pytest.mark.parametrize("uses_b", ["", "inner", "outer"])
@pytest.mark.parametrize("batch_dims", [None, 0])
@pytest.mark.parametrize(
    "way",
    ["forward", "hypergradient", "goal, forward", "goal, hypergradient", "search, forward", "search, hypergradient"],
)
def test_a_disconnected_outer_tensor_is_named(uses_b: str, batch_dims: int | None, way: str) -> None:
    data, init = (ONE, ZERO) if batch_dims is None else (torch.ones(3, 2, dtype=F64), torch.zeros(3, 2, dtype=F64))

    def use(on_failure: str) -> Any:
        settings = GOAL if "goal" in way else SEARCH if "search" in way else {}
        problem = Two(NOTHING, NOTHING, batch_dims=batch_dims, on_failure=on_failure, **settings)
        problem.uses_b = uses_b
        outer = {"a": requires_grad(), "b": (0.5 * ONE).requires_grad_(True)}
        if "hypergradient" in way:
            return problem.hypergradient(outer, data, init=init).grad
        problem(outer, data, init=init).backward()
        return {name: leaf.grad for name, leaf in outer.items()}

    if uses_b:
        assert bool((use("raise")["b"] != 0).all())
        return
    with pytest.raises(bilevel.ArgumentError, match=r"no graph leads to outer\['b'\]"):
        use("raise")
    with pytest.warns(bilevel.FailureWarning, match=r"outer\['b'\]"):
        use("warn")
    assert bool(torch.isnan(use("nan")["b"]).all()) or way == "forward"
    found = use("ignore")
    torch.testing.assert_close(found["a"], ONE)
    assert bool((found["b"] == 0).all())


def test_a_gradient_that_happens_to_be_zero_is_no_disconnection() -> None:
    # At a = ½ the solution a − ½ is zero, and with it the gradient.
    found = Plain(NOTHING, NOTHING).hypergradient(0.5 * ONE, ONE, init=ZERO).grad
    assert float(found.abs().max()) < 1e-12


def test_a_loss_that_nothing_leads_to() -> None:
    class Blind(Plain):
        def outer_objective(self, x, a, data):
            return (data**2).sum()

    for call in (
        lambda: Blind(NOTHING, NOTHING)(requires_grad(), ONE, init=ZERO),
        lambda: grad(lambda a: Blind(NOTHING, NOTHING)(a, ONE, init=ZERO))(ONE),
        lambda: jvp(lambda a: Blind(NOTHING, NOTHING)(a, ONE, init=ZERO), (ONE,), (ONE,)),
        lambda: Blind(NOTHING, NOTHING).hypergradient(ONE, ONE, init=ZERO),
        lambda: Blind(NOTHING, NOTHING, **GOAL)(requires_grad(), ONE, init=ZERO),
        lambda: Blind(NOTHING, NOTHING, **GOAL).hypergradient(ONE, ONE, init=ZERO),
    ):
        with pytest.raises(bilevel.ArgumentError, match="expected the outer loss to depend on outer"):
            call()
    with torch.no_grad():
        Blind(NOTHING, NOTHING)(requires_grad(), ONE, init=ZERO)


# Autocast.


@pytest.mark.parametrize("make", [argmin, root, fixed_point])
def test_solvers_compute_outside_autocast(make: Any) -> None:
    # In bfloat16 the projections of GMRES and Anderson would lose all but two digits of float32.
    n = 600
    a = torch.linspace(-1, 1, n, requires_grad=True)
    found, iterations = [], []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled), bilevel.record() as reports:
            x = make(lambda x: x.sin().roll(1), torch.zeros(n))(a)
            (slope,) = torch.autograd.grad(x.square().sum(), a)
        found.append((x.detach(), slope))
        iterations.append([int(report.iterations) for report in reports])
        assert slope.dtype == torch.float32
    torch.testing.assert_close(found[0], found[1], atol=0, rtol=0)
    assert iterations[0] == iterations[1]


def test_tensors_without_numbers_are_refused_with_a_remedy_that_works() -> None:
    objective, operator = lambda x, a: ((x - a) ** 2).sum(), lambda x, a: a * x
    for layer in (bilevel.argmin(objective), bilevel.linear_solve(operator)):
        x, a = torch.ones(3, device="meta"), torch.ones(3, device="meta")
        with pytest.raises(bilevel.DtypeError, match=r"device meta.*torch\.zeros\(3, device='cpu'\)"):
            layer(x, a)
        assert bool(layer(torch.zeros(3, device="cpu"), torch.ones(3)).isfinite().all())


def test_what_torch_cannot_batch_is_named_with_a_remedy() -> None:
    recurrent = torch.nn.LSTM(2, 2, batch_first=True).double().requires_grad_(False)
    layer = bilevel.argmin(lambda w, x: ((recurrent(x)[0] - w) ** 2).sum())
    start, data = torch.zeros(2, dtype=torch.float64), torch.ones(3, 1, 4, 2, dtype=torch.float64)
    alone = layer(start, data[0])
    assert bool(torch.isfinite(alone).all())
    with pytest.raises(bilevel.TransformError, match=r"lstm.*LSTMCell"):
        torch.func.vmap(layer, in_dims=(None, 0))(start, data)


class SquaredOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        return 2 * ctx.saved_tensors[0] * slope


def test_an_objective_that_can_be_differentiated_once_only_is_refused() -> None:
    """torch takes its slope for a constant, without a word where the incoming gradient has no graph: the gradient would be zero."""

    def objective(x, a):
        return SquaredOnce.apply(x - a).sum() + (x**2).sum()

    layer, a = bilevel.argmin(objective), torch.ones(2, dtype=torch.float64, requires_grad=True)
    start = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(bilevel.ArgumentError, match="SquaredOnce in it is marked once_differentiable"):
        layer(start, a)
    with torch.no_grad():  # a solution alone takes first derivatives
        x = bilevel.argmin(objective, solver=bilevel.LBFGS())(start, a)
    torch.testing.assert_close(x, torch.full_like(x, 0.5))
    slope = bilevel.root(lambda x, a: SquaredOnce.apply(x) - a)
    (gradient,) = torch.autograd.grad(slope(torch.ones_like(start), a).sum(), a)
    torch.testing.assert_close(gradient, torch.full_like(start, 0.5))
