"""Evaluations of straight functions are replayed: with the same numbers, and only where the function could do nothing else."""

from __future__ import annotations

import copy
import gc
import sys
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian, jacfwd, jacrev, vmap
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import bilevel
from bilevel.replay import purity
from bilevel.replay.cache import ReplayCache

F64 = torch.float64
SHIFT = torch.full((3,), 0.5, dtype=F64)
FACTOR = 1.0
DEFAULT = torch.get_default_dtype()


def objective(x, a):
    return ((x - a) ** 2).sum() + 0.1 * (x**4).sum() + (x * a).sin().sum()


def given(seed: int, *shape: int, dtype=F64) -> torch.Tensor:
    return torch.randn(shape or (3,), generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


@pytest.fixture
def replays(monkeypatch):
    """Count evaluations that were replayed, in a list of one number."""
    count = [0]
    made = ReplayCache.program

    def program(self, *args, **kwargs):
        found = made(self, *args, **kwargs)
        count[0] += found is not None
        return found

    monkeypatch.setattr(ReplayCache, "program", program)
    return count


def of_a_new_layer(make, start, *args):
    """Solution and gradients of the last call's arguments, by a layer that has never been called."""
    return differentiated(make(), start, *args)


def differentiated(layer, start, *args):
    free = [a.detach().clone().requires_grad_(a.is_floating_point()) for a in args]
    x = layer(start, *free)
    needs_grad = [a for a in free if a.requires_grad]
    return [x.detach(), *torch.autograd.grad((x * torch.arange(1, x.numel() + 1).reshape(x.shape)).sum(), needs_grad)]


def same(found, expected) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


SOLVERS = {
    "newton": {},
    "descent": {"solver": bilevel.GradientDescent(0.05, 400, line_search=True), "linear_solver": bilevel.CG()},
    "lbfgs": {"solver": bilevel.LBFGS(), "linear_solver": bilevel.CG()},
    "hessian-free": {"solver": bilevel.Newton(dense_limit=0), "linear_solver": bilevel.Neumann(terms=200)},
    "budget": {
        "solver": bilevel.GradientDescent(0.05, 7), "linear_solver": bilevel.CG(max_steps=2),
        "tolerance": bilevel.Tolerance(delta=None, delta_prime=None), "on_failure": "ignore",
    },
}  # fmt: skip


@pytest.mark.parametrize("settings", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_the_same_numbers_bit_for_bit(settings, dtype, replays):
    layer = bilevel.argmin(objective, **settings)
    start = torch.zeros(3, dtype=dtype)
    for seed in range(6):
        a = given(seed, dtype=dtype)
        found = differentiated(layer, start, a)
        assert same(found, of_a_new_layer(lambda: bilevel.argmin(objective, **settings), start, a))
    assert replays[0] > 6


def contracting(x, A, b):
    return (A @ x).tanh() * 0.5 + b


def vanishing(x, A, b):
    return x - (A @ x).tanh() * 0.5 - b


@pytest.mark.parametrize(("kind", "mapping"), [(bilevel.root, vanishing), (bilevel.fixed_point, contracting)])
def test_of_equations_too(kind, mapping, replays):
    for settings in ({}, {"linear_solver": bilevel.GMRES()}, {"linear_solver": bilevel.BiCGStab()}):
        layer = kind(mapping, **settings)
        for seed in range(5):
            args = 0.3 * given(seed, 3, 3), given(seed + 9)
            found = differentiated(layer, torch.zeros(3, dtype=F64), *args)
            expected = of_a_new_layer(lambda: kind(mapping, **settings), torch.zeros(3, dtype=F64), *args)
            assert same(found, expected)
    assert replays[0] > 10


def test_of_batches_trees_and_keywords(replays):
    def tree(x, a, *, weights):
        return ((x["u"] - a) ** 2).sum() + weights["w"] * ((x["v"] @ x["u"]) ** 2 + (x["v"] ** 2).sum())

    def call(layer, seed):
        start = {"u": torch.ones(2, dtype=F64), "v": torch.ones(2, dtype=F64)}
        w = given(seed, 4).exp().requires_grad_(True)
        x = vmap(lambda a, w: layer(start, a, weights={"w": w}))(given(seed, 4, 2), w)
        return [x["u"].detach(), x["v"].detach(), *torch.autograd.grad(x["u"].square().sum() + x["v"].sum(), w)]

    layer = bilevel.argmin(tree)
    for seed in range(5):
        assert same(call(layer, seed), call(bilevel.argmin(tree), seed))
    assert replays[0] > 10


def test_higher_derivatives_and_transforms_after_many_calls(replays):
    layer, start = bilevel.argmin(objective), torch.zeros(3, dtype=F64)
    for seed in range(4):
        differentiated(layer, start, given(seed))
    a = given(7)
    for transform in (jacrev, jacfwd, hessian, lambda f: jacfwd(jacrev(f))):
        found = transform(lambda a: layer(start, a).square().sum())(a)
        expected = transform(lambda a: bilevel.argmin(objective)(start, a).square().sum())(a)
        assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(lambda a: layer(start, a), a.clone().requires_grad_(True))
    assert torch.autograd.gradgradcheck(lambda a: layer(start, a), a.clone().requires_grad_(True))


def test_what_is_captured_is_read_anew(monkeypatch, replays):
    shift, start = torch.ones(3, dtype=F64), torch.zeros(3, dtype=F64)

    def near(x, a):
        return ((x - a - shift) ** 2).sum() + ((x - SHIFT) ** 2).sum() * FACTOR

    layer = bilevel.argmin(near)

    def check():
        found = layer(start, given(0))
        assert torch.allclose(found, (given(0) + shift + FACTOR * SHIFT) / (1 + FACTOR))

    for _ in range(4):
        check()
    assert replays[0] > 0
    shift += 1  # in place
    check()
    shift = 3 * torch.ones(3, dtype=F64)  # another object
    check()
    monkeypatch.setattr(sys.modules[__name__], "SHIFT", torch.zeros(3, dtype=F64))
    check()
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 5.0)
    check()


def test_arguments_that_share_memory_at_first():
    def two(x, a, b, A, B):
        return ((x - a * b) ** 2).sum() + ((A @ x) ** 2).sum() + ((B.T @ x - a) ** 2).sum()

    layer, start = bilevel.argmin(two), torch.zeros(3, dtype=F64)
    for seed in range(4):
        a, A = given(seed), given(seed, 3, 3)
        layer(start, a, a, A, A.T)  # the same numbers, and a view of them in another layout
        wide = given(seed).expand(3, 3)
        layer(start, wide[0], wide[0], wide, wide.T)
    args = given(20), given(21), given(22, 3, 3), given(23, 3, 3).T
    assert same(differentiated(layer, start, *args), differentiated(bilevel.argmin(two), start, *args))


def by_item(x, a):
    return ((x - a) ** 2).sum() * (1 + float(a.detach().abs().sum()))


def by_index(x, a):
    return ((x - a) ** 2).sum() + ((x - 1) ** 2)[: a.detach().argmax() + 1].sum()


def by_select(x, a):
    return ((x - a) ** 2).sum() + ((x - 1) ** 2)[a.detach().argmax()]


def by_mask(x, a):
    return ((x - a) ** 2).sum() + ((x - 1) ** 2)[a > 0].sum()


def by_places(x, a):
    return ((x - a) ** 2).sum() + ((x - 1) ** 2)[a.nonzero()[:, 0]].sum()


def by_product(x, a):
    return 20 * ((x - a) ** 2).sum() + (a.round() * x).prod()  # whose derivative asks for zeros


def by_numpy(x, a):
    return ((x - a) ** 2).sum() + ((x - torch.from_numpy(a.detach().numpy() + 1)) ** 2).sum()


def by_list(x, a):
    return ((x - a) ** 2).sum() + ((x - sum(a.detach().tolist())) ** 2).sum()


def by_split(x, a):
    ends = a.detach().argsort()[:1]
    return ((x - a) ** 2).sum() + ((x.tensor_split(ends)[0] - 1) ** 2).sum()


@pytest.mark.parametrize("function", [by_item, by_index, by_select, by_mask, by_places, by_numpy, by_list, by_split])
def test_what_goes_by_numbers_is_evaluated_each_time(function):
    layer, start = bilevel.argmin(function, on_failure="ignore"), torch.zeros(3, dtype=F64)
    for a in ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [-1.0, 0.0, 2.0], [0.0, -1.0, 0.2]):
        args = (torch.tensor(a, dtype=F64),)
        expected = of_a_new_layer(lambda: bilevel.argmin(function, on_failure="ignore"), start, *args)
        assert same(differentiated(layer, start, *args), expected)


@pytest.mark.counts
def test_a_function_that_gets_through_is_found_by_comparison(monkeypatch, replays):
    monkeypatch.setattr(purity, "_not_of_tensors", lambda names: None)
    layer, start = bilevel.argmin(by_list), torch.zeros(3, dtype=F64)
    for seed in range(6):
        args = (given(seed),)
        assert same(differentiated(layer, start, *args), differentiated(bilevel.argmin(by_list), start, *args))
    assert replays[0] == 0


def test_a_derivative_that_torch_writes_in_two_ways_is_right_in_either():
    layer, start = bilevel.argmin(by_product), torch.zeros(3, dtype=F64)
    for a in ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.3, 2.0, 3.0], [3.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.3, 2.0, 1.0]):
        args = (torch.tensor(a, dtype=F64),)
        found, expected = (differentiated(of, start, *args) for of in (layer, bilevel.argmin(by_product)))
        assert all(torch.allclose(x, y, rtol=1e-9, atol=1e-12) for x, y in zip(found, expected, strict=True))


def test_indexing_by_whole_numbers_and_writing_in_place_are_replayed(replays):
    def gathered(x, a, places):
        y = x[places].clone()
        y[0] = x[1] * a[1]
        y += 1
        return ((y - a) ** 2).sum() + (x**2).sum()

    layer, start = bilevel.argmin(gathered, solver=bilevel.GradientDescent(0.05, 500)), torch.zeros(3, dtype=F64)
    for seed in range(5):
        args = given(seed), torch.tensor([seed % 3, (seed + 1) % 3, 0])
        new = bilevel.argmin(gathered, solver=bilevel.GradientDescent(0.05, 500))
        assert same(differentiated(layer, start, *args), differentiated(new, start, *args))
    assert replays[0] > 5


def test_a_function_that_fails_fails_in_a_replay(replays):
    def factored(x, A, b):
        L = torch.linalg.cholesky(A)
        return ((L @ x - b) ** 2).sum()

    layer, start, b = bilevel.argmin(factored), torch.zeros(3, dtype=F64), given(1)
    good = torch.eye(3, dtype=F64)
    for _ in range(4):
        layer(start, good, b)
    assert replays[0] > 0
    with pytest.raises(bilevel.SolveError, match=r"torch\.linalg\.cholesky"):
        layer(start, -good, b)
    assert torch.allclose(layer(start, 4 * good, b), b / 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_solve_that_fails_is_told(bad, replays):
    layer, start = bilevel.argmin(objective), torch.zeros(3, dtype=F64)
    for seed in range(4):
        layer(start, given(seed))
    before = replays[0]
    with pytest.raises(bilevel.SolveError):
        layer(start, torch.tensor([bad, 0.0, 0.0], dtype=F64))
    assert replays[0] > before
    assert same(differentiated(layer, start, given(1)), differentiated(bilevel.argmin(objective), start, given(1)))


class Watching(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Counting(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def traced(frame, event, arg):
    return None


def test_whoever_wants_to_see_the_function_run_does(replays):
    layer, start = bilevel.argmin(objective), torch.zeros(3, dtype=F64)
    for seed in range(4):
        layer(start, given(seed))
    before = replays[0]
    for mode in (Watching(), Counting()):
        with mode:
            layer(start, given(0))
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly(check_nan=False):
        layer(start, given(0))
    a = given(0).requires_grad_(True)
    checkpoint(lambda a: layer(start, a), a, use_reentrant=False).sum().backward()
    outside = sys.gettrace()
    sys.settrace(traced)
    try:
        layer(start, given(0))
    finally:
        sys.settrace(outside)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(torch.zeros(3), given(0, dtype=torch.float32))
    assert replays[0] == before
    layer(start, given(0))
    assert replays[0] > before


def test_replays_can_be_switched_off(replays):
    layer, start = bilevel.argmin(objective, solver=bilevel.LBFGS()), torch.zeros(3, dtype=F64)
    for seed in range(4):
        differentiated(layer, start, given(seed))
    before = replays[0]
    with bilevel.replaying(False):
        without = differentiated(layer, start, given(0))
        assert replays[0] == before
        with bilevel.replaying(True):
            assert same(differentiated(layer, start, given(0)), without)
    assert replays[0] > before


def test_what_torch_makes_of_numbers_by_default_is_told_apart():
    def ones(x, a):
        return ((x - a) ** 2).sum() + ((x - torch.tensor(1 / 3)) ** 2).sum()

    layer, start = bilevel.argmin(ones), torch.zeros(3, dtype=F64)
    single = [layer(start, given(0)) for _ in range(4)][-1]
    try:
        torch.set_default_dtype(F64)
        double = layer(start, given(0))
    finally:
        torch.set_default_dtype(DEFAULT)
    assert torch.allclose(double, (given(0) + 1 / 3) / 2, rtol=0, atol=1e-12)
    assert not torch.allclose(single, double, rtol=0, atol=1e-12)


def test_nothing_is_kept_alive_and_inputs_stay_as_they_are():
    shift = torch.ones(3, dtype=F64)
    layer, start = bilevel.argmin(lambda x, a: ((x - a - shift) ** 2).sum() + (x**4).sum()), torch.zeros(3, dtype=F64)
    for seed in range(4):
        a = given(seed).requires_grad_(True)
        x = layer(start, a)
        x.sum().backward()
    assert torch.equal(a, given(3)) and torch.equal(start, torch.zeros(3, dtype=F64))
    assert torch.equal(shift, torch.ones(3, dtype=F64))
    refs = [weakref.ref(a), weakref.ref(x), weakref.ref(layer)]
    del a, x, layer
    gc.collect()
    assert [ref() for ref in refs] == [None] * 3


def test_results_are_the_caller_s_own():
    # R = x of ½‖x‖²: what a replay returns is not the object that was put in.
    layer = bilevel.argmin(lambda x, a: 0.5 * (x * x).sum() - x @ a)
    start = torch.zeros(3, dtype=F64)
    for seed in range(5):
        x = layer(start, given(seed))
        x.requires_grad_(True)
        assert torch.allclose(x, given(seed)) and not start.requires_grad


def test_copies_and_threads():
    layer, start = bilevel.argmin(objective), torch.zeros(3, dtype=F64)
    expected = [differentiated(bilevel.argmin(objective), start, given(seed)) for seed in range(20)]
    found: dict[int, list[torch.Tensor]] = {}

    def work(begin: int) -> None:
        for seed in range(begin, 20, 4):
            found[seed] = differentiated(layer, start, given(seed))

    threads = [threading.Thread(target=work, args=(begin,)) for begin in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(found[seed], expected[seed]) for seed in range(20))
    other = copy.deepcopy(layer)
    assert same(differentiated(other, start, given(3)), expected[3])


# Learners: the model is read, and what is changed in it is found.


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.scale = nn.Linear(2, 5), nn.Linear(5, 1), 1.0

    def bent(self, h):
        return torch.tanh(self.scale * h)

    def forward(self, x):
        return self.last(self.bent(self.first(x)))


class Branching(Scaled):
    def forward(self, x):
        return self.last(self.bent(self.first(x)) if self.scale > 0 else self.first(x))


def tasks(seed: int, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(4, 6, 2, generator=generator).to(dtype), torch.randn(4, 6, 1, generator=generator).to(dtype)
    return x, y, x.flip(1), y


def learner_of(model, **settings):
    return bilevel.IMAML(
        model, settings.pop("loss", nn.functional.mse_loss), 2.0, bilevel.GradientDescent(0.05, 6), bilevel.CG(3),
        on_failure="ignore", **settings,
    )  # fmt: skip


def meta_gradient(learner, batch):
    learner.zero_grad()
    loss = learner(batch)
    loss.backward()
    return [loss.detach(), *(p.grad for p in learner.parameters())]


MODELS = {
    "torch's own": lambda: nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)),
    "a user's": Scaled,
    "one that branches": Branching,
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("settings", [{}, {"learn_lam": True}, {"mode": "released"}, {"tasks_per_pass": 3}], ids=str)
def test_a_learner_s_numbers_are_the_same_bit_for_bit(make, settings, replays):
    model = make().double()
    learner = learner_of(model, **settings)
    for seed in range(5):
        fresh = learner_of(copy.deepcopy(model), **settings)
        assert same(meta_gradient(learner, tasks(seed)), meta_gradient(fresh, tasks(seed)))
    assert (replays[0] > 10) == (make is not Branching)


def rescaled(model):
    model.scale = -2.0


def hooked(model):
    model.last.register_forward_hook(lambda module, args, output: 3 * output)


def overwritten(model):
    model.first.forward = lambda x: x @ torch.ones(2, 5, dtype=F64)


def exchanged(model):
    model.bent = torch.sigmoid


def another_layer(model):
    model.last = nn.Linear(5, 1, bias=False, dtype=F64)


@pytest.mark.parametrize("change", [rescaled, hooked, overwritten, exchanged, another_layer])
def test_what_is_changed_in_a_model_is_found(change, replays):
    learner = learner_of(Scaled().double())
    for seed in range(4):
        before = meta_gradient(learner, tasks(seed))
    assert replays[0] > 10
    change(learner.model)
    if change is another_layer:
        learner = learner_of(learner.model)  # its parameters are other ones
    found = meta_gradient(learner, tasks(3))
    assert same(found, meta_gradient(learner_of(copy.deepcopy(learner.model)), tasks(3)))
    assert not torch.equal(found[0], before[0])


def test_another_loss_is_found():
    learner = learner_of(Scaled().double())
    for seed in range(4):
        meta_gradient(learner, tasks(seed))
    learner.loss = nn.functional.l1_loss
    fresh = learner_of(copy.deepcopy(learner.model), loss=nn.functional.l1_loss)
    assert same(meta_gradient(learner, tasks(0)), meta_gradient(fresh, tasks(0)))


def test_a_hook_on_all_modules_is_found(replays):
    learner = learner_of(Scaled().double())
    for seed in range(4):
        meta_gradient(learner, tasks(seed))
    count, before = replays[0], meta_gradient(learner, tasks(0))
    assert replays[0] > count
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: 2 * output)
    try:
        count = replays[0]
        assert not torch.equal(meta_gradient(learner, tasks(0))[0], before[0])
        assert replays[0] == count
    finally:
        handle.remove()


class Smoothed(bilevel.BilevelProblem):
    strength = 0.1

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 3, dtype=F64).requires_grad_(False)
        self.power = 2

    def penalty(self, inner):
        return self.strength * (inner.abs() ** self.power).sum()

    def inner_objective(self, inner, outer, data):
        moved = functional_call(self.net, {"weight": torch.eye(3, dtype=F64), "bias": outer}, (data,))
        return ((inner - moved) ** 2).sum() + self.penalty(inner)

    def outer_objective(self, inner, outer, data):
        return ((inner - data) ** 2).sum()

    def initial(self, outer, data):
        return torch.ones_like(data)


def test_a_problem_s_method_goes_by_what_the_problem_keeps(replays):
    problem = Smoothed()
    outer, data = given(0), given(1)

    def gradient(of):
        return [of.hypergradient(outer, data).value, of.hypergradient(outer, data).grad]

    for _ in range(4):
        gradient(problem)
    assert replays[0] > 3
    for change in ({"strength": 0.7}, {"power": 4}, {"net": nn.Linear(3, 3, dtype=F64).requires_grad_(False)}):
        for name, value in change.items():
            setattr(problem, name, value)
        fresh = Smoothed()
        fresh.strength, fresh.power = problem.strength, problem.power
        assert same([t.round(decimals=10) for t in gradient(problem)], [t.round(decimals=10) for t in gradient(fresh)])


class Teacher(Smoothed):
    def inner_objective(self, inner, outer, data):
        return ((inner - self.net(data) * outer) ** 2).sum() + self.penalty(inner)


def test_tensors_of_a_module_that_is_called_as_it_is_are_read_anew(replays):
    problem, outer, data = Teacher(), given(0), given(1)
    for _ in range(4):
        problem.hypergradient(outer, data)
    assert replays[0] > 1
    with torch.no_grad():
        problem.net.weight *= 2

    def check():
        fresh = Teacher()
        fresh.net = problem.net
        found, expected = problem.hypergradient(outer, data), fresh.hypergradient(outer, data)
        assert torch.allclose(found.grad, expected.grad, rtol=1e-9)

    check()
    problem.net.weight = nn.Parameter(given(5, 3, 3), requires_grad=False)
    check()


def test_one_tensor_reached_from_two_places(replays):
    one = torch.ones(3, dtype=F64)
    other = one
    layer, start = (
        bilevel.argmin(lambda x, a: ((x - a * one) ** 2).sum() + ((x - other) ** 2).sum()),
        torch.zeros(3, dtype=F64),
    )
    for seed in range(4):
        assert torch.allclose(layer(start, given(seed)), (given(seed) + 1) / 2)
    assert replays[0] > 0


# Calls in a row, with replays and without: arguments that change in more than their fractional numbers, and what is changed in between.


def whole(seed: int, high: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def labelled(w, X, labels):
    return nn.functional.cross_entropy(X @ w.reshape(2, 3), labels, ignore_index=1) + 0.1 * (w**2).sum()


def masked(w, a, mask):
    return torch.where(mask, (w - a) ** 2, (w + a) ** 2).sum() + w.masked_fill(mask, 0.0).square().sum()


def perturbed_copies(w, a, places):
    return ((torch.zeros(3, dtype=F64).scatter_add(0, places, w) - a) ** 2).sum() + (w**2).sum()


def repeated(w, a, times):
    return ((w.repeat_interleave(times)[:3] - a) ** 2).sum() + (w**2).sum()


def sliced(w, a, start):
    return ((w - a) ** 2).sum() + (w[start:] ** 2).sum()


def ordered(w, a, unused):
    return ((w.sort().values - a.sort().values) ** 2).sum() + (w**2).sum()


def solved(w, A, unused):
    return ((torch.linalg.solve(A @ A.mT + torch.eye(3, dtype=F64), w) - 1) ** 2).sum() + torch.linalg.slogdet(A)[
        1
    ] * w[0]


CALLS = {
    labelled: lambda seed: (torch.zeros(6, dtype=F64), given(seed, 5, 2), whole(seed, 3, 5)),
    masked: lambda seed: (torch.zeros(3, dtype=F64), given(seed), given(seed + 1) > 0),
    perturbed_copies: lambda seed: (torch.zeros(3, dtype=F64), given(seed), whole(seed, 3, 3)),
    repeated: lambda seed: (torch.zeros(3, dtype=F64), given(seed), 1 + whole(seed, 3, 3)),
    sliced: lambda seed: (torch.zeros(3, dtype=F64), given(seed), torch.tensor(seed % 3)),
    ordered: lambda seed: (torch.tensor([0.1, 0.2, 0.3], dtype=F64), given(seed), whole(seed, 3, 3)),
    solved: lambda seed: (torch.zeros(3, dtype=F64), given(seed, 3, 3), whole(seed, 3, 3)),
    objective: lambda seed: (torch.zeros(2 + seed % 3, dtype=F64), given(seed, 2 + seed % 3, 2)[:, seed % 2]),
}


def in_a_row(make, call, count: int = 8):
    of = make()
    return [call(of, seed) for seed in range(count)]


def agree(make, call, rtol: float = 1e-11) -> None:
    found = in_a_row(make, call)
    with bilevel.replaying(False):
        expected = in_a_row(make, call)
    for one, other in zip(found, expected, strict=True):
        assert all(torch.allclose(a, b, rtol=rtol, atol=rtol) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("function", CALLS, ids=lambda function: function.__name__)
def test_arguments_of_every_kind_that_change(function):
    agree(lambda: bilevel.argmin(function), lambda layer, seed: differentiated(layer, *CALLS[function](seed)))


@pytest.mark.parametrize("dims", [(None, 0, 0), (None, 0, None), (None, 0, 1)], ids=str)
def test_batches_that_come_in_turn_with_single_problems(dims, replays):
    def pair(w, a, b):
        return ((w - a * b) ** 2).sum() + (w**4).sum() * b.square().sum()

    def call(layer, seed):
        start, a = torch.zeros(3, dtype=F64), given(seed, 5, 3).requires_grad_(True)
        b = {0: given(seed, 5, 3), 1: given(seed, 3, 5), None: given(seed)}[dims[2]].requires_grad_(True)
        x = vmap(layer, in_dims=dims)(start, a, b)
        return [
            x.detach(),
            *torch.autograd.grad(x.square().sum(), (a, b)),
            *differentiated(layer, start, a[0], given(seed)),
        ]

    agree(lambda: bilevel.argmin(pair), call)
    assert replays[0] > 20


def network_of_a_user(w, a, parameters):
    return (functional_call(NETWORK, parameters, (w,)) - a.sum()).square().sum() + (w**2).sum()


NETWORK = nn.Sequential(nn.Linear(3, 2, dtype=F64), nn.Tanh(), nn.Linear(2, 1, dtype=F64))


def test_a_network_that_is_closed_over(monkeypatch, replays):
    def call(layer, seed):
        with monkeypatch.context() as patch:
            if seed > 4:
                patch.setitem(NETWORK._modules, "1", nn.Sigmoid())
            a = given(seed).requires_grad_(True)
            x = layer(torch.zeros(3, dtype=F64), a, {name: p.detach() for name, p in NETWORK.named_parameters()})
            return [x.detach(), *torch.autograd.grad(x.sum(), a)]

    agree(lambda: bilevel.argmin(network_of_a_user), call)
    assert replays[0] > 3


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(2, 4), nn.Dropout(0.0), nn.Linear(4, 1)
        self.first.weight.requires_grad_(False)
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x):
        return self.last(self.drop(torch.relu(self.first(x))) * self.scale)


def moved(learner, seed):
    with torch.no_grad():
        learner.model.scale.fill_(1 + seed / 10)
        learner.model.first.weight.mul_(1.1)
    learner.model.train(seed > 4)


def loaded(learner, seed):
    learner.load_state_dict({name: 1.1 * value for name, value in learner.state_dict().items()})


def renewed(learner, seed):
    learner.model.last.weight = nn.Parameter(learner.model.last.weight.detach() * 1.1)


@pytest.mark.parametrize("change", [moved, loaded, renewed])
def test_a_model_that_is_changed_in_between(change, replays):
    def make():
        torch.manual_seed(0)
        return learner_of(Frozen().double())

    def call(learner, seed):
        change(learner, seed)
        learner.zero_grad()
        loss = learner(tasks(seed))
        loss.backward()
        return [loss.detach(), *(p.grad for p in learner.parameters() if p.requires_grad)]

    agree(make, call)
    assert replays[0] > 10


@pytest.mark.parametrize("arguments", [0, 1])
def test_batches_of_starts_alone_of_several_sizes(arguments):
    def call(layer, seed):
        args = [given(9)] * arguments
        return [vmap(lambda start: layer(start, *args))(given(seed, 4 + seed % 3, 3))]

    agree(
        lambda: bilevel.argmin((lambda x: ((x - 1) ** 4).sum() + (x**2).sum(), objective)[arguments]), call, rtol=1e-7
    )


# What a method reaches by other ways than the names in its code.


def of_an_object(kept, x):
    return x * kept.scale


class Keeper:
    scale = 1.0

    def __call__(self, x):
        return x * self.scale

    def __getitem__(self, place):
        return self.scale

    def called(self, x, a):
        return ((self(x) - a) ** 2).sum() + (x**4).sum()

    def handed_on(self, x, a):
        return ((of_an_object(self, x) - a) ** 2).sum() + (x**4).sum()

    def indexed(self, x, a):
        return ((self[0] * x - a) ** 2).sum() + (x**4).sum()

    def mapped(self, x, a):
        return sum(map(lambda kept: ((kept.scale * x - a) ** 2).sum(), (self,))) + (x**4).sum()  # noqa: C417


class Holding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bend = nn.Softplus(beta=1.0)
        self.register_buffer("scale", torch.tensor(1.0, dtype=F64))

    def forward(self, x):
        return self.bend(x) * self.scale

    def called(self, x, a):
        return ((self(x) - a) ** 2).sum() + (x**4).sum()

    def listed(self, x, a):
        return ((x * sum(self.buffers()) - a) ** 2).sum() + (x**4).sum()

    def child(self, x, a):
        bent = [part(x) for part in self.children()]
        return ((bent[0] - a) ** 2).sum() + (x**4).sum()

    def named(self, x, a):
        return ((x * self.get_buffer("scale") - a) ** 2).sum() + (x**4).sum()

    def in_state(self, x, a):
        return ((x * self.state_dict()["scale"] - a) ** 2).sum() + (x**4).sum()


class Classy(nn.Module):
    scale = 1.0

    def forward(self, x):
        return of_an_object(self, x)


def rescale(kept, value):
    if isinstance(kept, Holding):
        kept.bend.beta, kept.scale = value, torch.tensor(value, dtype=F64)
    else:
        type(kept).scale = value


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        *((Keeper, method) for method in ("called", "handed_on", "indexed", "mapped")),
        *((Holding, method) for method in ("called", "listed", "child", "named", "in_state")),
        (Classy, None),
    ],
)
def test_state_that_is_reached_by_other_ways_than_names(kind, method):
    kept = kind()

    def make():
        rescale(kept, 1.0)
        if method is None:
            return bilevel.argmin(lambda x, a: ((kept(x) - a) ** 2).sum() + (x**4).sum())
        return bilevel.argmin(getattr(kept, method))

    def call(layer, seed):
        rescale(kept, 1.0 if seed < 5 else 3.0)
        return differentiated(layer, torch.zeros(3, dtype=F64), given(seed))

    agree(make, call, rtol=1e-9)
    rescale(kept, 1.0)


def test_a_number_that_is_found_and_not_made_is_read_anew(monkeypatch):
    # Both are tensors without axes that no operation makes: one of the code's own numbers, and one that is kept where it is not looked for.
    source = torch.ones(3, dtype=F64)
    strength = [torch.tensor(1.0, dtype=F64)]

    def kept():
        return strength[0]

    def found(x, a):
        return ((x - a) ** 2).sum() + (x * source).square().sum() * kept() * torch.tensor(0.5)

    known = purity.is_known
    monkeypatch.setattr(purity, "is_known", lambda item: item is kept or known(item))

    def call(layer, seed):
        strength[0] = torch.tensor(1.0 if seed < 5 else 4.0, dtype=F64)
        return differentiated(layer, torch.zeros(3, dtype=F64), given(seed))

    agree(lambda: bilevel.argmin(found), call)


def test_the_code_s_own_numbers_are_no_hindrance(replays):
    layer = bilevel.argmin(
        lambda x, a: ((x - a) ** 2).sum() + torch.tensor(0.5) * (x**2).sum() + x.where(x > 0, 0.0).sum()
    )
    for seed in range(5):
        layer(torch.ones(3, dtype=F64), given(seed).abs() + 1)
    assert replays[0] > 0


def test_a_gradient_that_a_captured_tensor_has_is_not_a_constant():
    kept = torch.tensor(1.0, dtype=F64)

    def call(layer, seed):
        kept.grad = torch.tensor(2.0 if seed < 5 else 5.0, dtype=F64)
        return differentiated(layer, torch.zeros(3, dtype=F64), given(seed))

    agree(lambda: bilevel.argmin(lambda x, a: ((x - a * kept.grad) ** 2).sum() + (x**4).sum()), call)


@pytest.mark.parametrize("settings", SOLVERS.values(), ids=SOLVERS)
def test_a_tensor_that_is_changed_before_the_derivative_is_told(settings):
    shift = given(5)
    layer = bilevel.argmin(
        lambda x, a: ((x - a) ** 2).sum() + (x * shift * a).sin().sum() + (x**4 * shift**2).sum(), **settings
    )
    for seed in range(6):
        a = given(seed).requires_grad_(True)
        x = layer(torch.zeros(3, dtype=F64), a)
        if seed < 5:
            x.sum().backward()
    shift += 1
    with bilevel.replaying(False):
        plain = bilevel.argmin(layer.function, **settings)
        y = plain(torch.zeros(3, dtype=F64), a)
    shift += 1
    outcomes = []
    for solution in (x, y):
        try:
            solution.sum().backward()
            outcomes.append("derivative")
        except RuntimeError as error:
            told = [part for part in ("modified by an inplace operation", "became one of") if part in str(error)]
            outcomes.append(told[0] if told else str(error))
    assert outcomes[0] == outcomes[1]


def test_what_is_in_a_tuple_is_let_go():
    def call(layer, seed):
        held = (given(seed),)
        layer(torch.zeros(3, dtype=F64), given(seed + 1), lambda x: x * held[0])
        return weakref.ref(held[0])

    layer = bilevel.argmin(lambda x, a, function: ((function(x) - a) ** 2).sum() + (x**4).sum())
    refs = [call(layer, seed) for seed in range(5)]
    gc.collect()
    assert [ref() for ref in refs] == [None] * 5


class Oven:
    """An object of a user's own, which the reader does not follow: it has a cache, and methods that choose."""

    def __init__(self, weights: torch.Tensor) -> None:
        self.weights, self.seen, self.calls = weights, {}, 0

    def __call__(self, x):
        self.calls += 1
        self.seen[len(self.seen) % 3] = x.shape
        return (self.weights @ x).sin() if self.seen else x

    def objective(self, x, a):
        return ((x - a) ** 2).sum() + 0.1 * (x**4).sum() + 0.2 * (self(x) * a).sum()

    def residual(self, x, a):
        return x - 0.3 * self(x) - a

    def mapping(self, x, a):
        return 0.3 * self(x) + a

    def capped(self, x, a):
        return x.sum() + 0.1 * self(x).sum() - 0.5


VOUCHED = {
    "argmin": lambda oven, **settings: bilevel.argmin(oven.objective, **settings),
    "root": lambda oven, **settings: bilevel.root(oven.residual, **settings),
    "fixed point": lambda oven, **settings: bilevel.fixed_point(oven.mapping, **settings),
    "constraint": lambda oven, **settings: bilevel.argmin(oven.objective, inequality=oven.capped, **settings),
}


def oven(dtype=F64) -> Oven:
    return Oven(given(1, 3, 3, dtype=dtype))


@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        pytest.param(make, dtype, id=f"{name}, {dtype}")
        for name, make in VOUCHED.items()
        for dtype in (F64, torch.float32)
        if dtype == F64 or name != "constraint"
    ],
)
def test_what_the_user_vouches_for_is_replayed(make, dtype, replays):
    start = torch.zeros(3, dtype=dtype)
    plain = make(oven(dtype))
    expected = [differentiated(plain, start, given(seed, dtype=dtype)) for seed in range(6)]
    assert not replays[0]
    vouched = oven(dtype)
    layer = make(vouched, static=True)
    for seed in range(6):
        before = vouched.calls
        assert same(differentiated(layer, start, given(seed, dtype=dtype)), expected[seed])
    assert replays[0] > 4
    # The derivative of a constrained solution evaluates the function itself.
    assert vouched.calls - before <= 3


def test_a_vouched_function_under_vmap(replays):
    layer, start = bilevel.argmin(oven().objective, static=True), torch.zeros(3, dtype=F64)

    def call(layer, seed):
        a = given(seed, 4, 3).requires_grad_(True)
        x = vmap(lambda a: layer(start, a))(a)
        return [x.detach(), *torch.autograd.grad(x.square().sum(), a)]

    for seed in range(5):
        assert same(call(layer, seed), call(bilevel.argmin(oven().objective), seed))
    assert replays[0] > 4


def test_a_vouched_tensor_that_is_changed_in_place(replays):
    vouched = oven()
    layer, start = bilevel.argmin(vouched.objective, static=True), torch.zeros(3, dtype=F64)
    for seed in range(6):
        vouched.weights.mul_(1.1)
        expected = differentiated(bilevel.argmin(Oven(vouched.weights).objective), start, given(seed))
        assert same(differentiated(layer, start, given(seed)), expected)
    assert replays[0] > 4


def test_a_vouched_tensor_that_comes_to_require_grad(replays):
    vouched = oven()
    layer, start = bilevel.argmin(vouched.objective, static=True), torch.zeros(3, dtype=F64)
    for seed in range(5):
        differentiated(layer, start, given(seed))
    assert replays[0]
    vouched.weights.requires_grad_(True)
    with pytest.raises(bilevel.CapturedTensorError, match="closure"):
        layer(start, given(5))


class Wrong:
    """What a user vouches for in error, and a recording shows at once."""

    def __init__(self) -> None:
        self.noted: dict[int, float] = {}

    def reads(self, x, a):
        return ((x - a) ** 2).sum() * (2.0 if float(x.detach().sum()) > 0.3 else 1.0 + len(self.noted))

    def outside_of_torch(self, x, a):
        weights = torch.from_numpy(a.detach().numpy() ** 2 + 1) if a.is_floating_point() else self.noted
        return ((x - a) ** 2 * weights).sum()


@pytest.mark.parametrize("name", ["reads", "outside_of_torch"])
def test_a_wrong_promise_that_a_recording_shows(name, replays):
    layer, start = bilevel.argmin(getattr(Wrong(), name), static=True), torch.zeros(3, dtype=F64)
    for seed in range(6):
        a = given(seed)
        found = layer(start, a)
        assert torch.allclose(found, a, atol=1e-8)
    assert not replays[0]


def test_what_the_reader_can_follow_is_not_taken_on_trust(replays):
    layer, start = bilevel.argmin(lambda x, a: ((x - a * FACTOR) ** 2).sum(), static=True), torch.zeros(3, dtype=F64)
    global FACTOR
    try:
        for FACTOR in (1.0, 1.0, 1.0, 1.0, 2.0):
            assert torch.allclose(layer(start, SHIFT), SHIFT * FACTOR)
    finally:
        FACTOR = 1.0
    assert replays[0]


def test_a_problem_that_is_vouched_for(replays):
    class Baked(bilevel.BilevelProblem):
        def __init__(self, **settings):
            super().__init__(warm_start=False, **settings)
            self.oven = oven()

        def inner_objective(self, inner, outer, data, /):
            return self.oven.objective(inner, outer * data)

        def outer_objective(self, inner, outer, data, /):
            return (inner**2).sum()

    start, plain, problem = torch.zeros(3, dtype=F64), Baked(), Baked(static=True)
    expected = [plain.hypergradient(given(seed), given(7), init=start).grad for seed in range(6)]
    assert not replays[0]
    found = [problem.hypergradient(given(seed), given(7), init=start).grad for seed in range(6)]
    assert replays[0] > 4
    assert same(found, expected)
