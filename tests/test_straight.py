"""A function that can do but one thing is looked at once; every other one at each call."""

from __future__ import annotations

import copy
import dis
import gc
import math
import pickle
import sys
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import bilevel
import bilevel.layers.inspector as inspection
from bilevel.replay import InspectionCache, purity, reachable_objects
from bilevel.replay.opcodes import _BY_VERSION, is_known_step

F64 = torch.float64
SCALE, RATE = 2.0, 0.0
SHIFT = torch.tensor([1.0, 2.0], dtype=F64)
TABLE = [1.0]


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    count = [0]
    plain = inspection.inspect_function

    def counted(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return plain(*args, **kwargs)

    monkeypatch.setattr(inspection, "inspect_function", counted)
    return count


def start() -> torch.Tensor:
    return torch.zeros(2, dtype=F64)


def given() -> torch.Tensor:
    return torch.tensor([3.0, 5.0], dtype=F64, requires_grad=True)


def square(x):
    return (x**2).sum()


def plain(x, a):
    return square(x - a) + SCALE * x.exp().mean() / math.e


def over_tree(x, a, *, weights):
    return sum((weights["w"] * (part - a) ** 2).sum() for part in x.values()) + sum([square(p) for p in x.values()])


def branching(x, a):
    return square(x - a) if a.sum() > 0 else square(x + a)


class Branching(torch.nn.Module):
    def forward(self, x, a):
        return branching(x, a)


def tabled(x, a):
    return TABLE[0] * square(x - a)


def dropping(x, a):
    return square(x - a) + square(F.dropout(1 + x, RATE))


def shifted(x, a):
    return square(x - a * SHIFT)


def test_a_straight_function_is_looked_at_once(looks):
    layer = bilevel.argmin(plain)
    for _ in range(3):
        layer(start(), given())
    assert looks == [1]


def test_again_for_other_shapes_dtypes_batches_and_modes(looks):
    layer = bilevel.argmin(plain)
    layer(start(), given())
    layer(torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64, requires_grad=True))
    layer(torch.zeros(3), torch.ones(3, requires_grad=True))
    torch.func.vmap(layer)(torch.zeros(4, 3), torch.ones(4, 3))
    torch.func.vmap(layer, in_dims=(0, None))(torch.zeros(4, 3), torch.ones(3))
    with torch.no_grad():
        layer(torch.zeros(3), torch.ones(3))
    assert looks == [6]


def test_of_trees_keywords_and_what_is_closed_over(looks):
    layer = bilevel.argmin(over_tree)
    shift = torch.ones(2, dtype=F64)
    closed = bilevel.argmin(lambda x, a: square(x - a - shift))
    for _ in range(2):
        layer({"a": start(), "b": start()}, given(), weights={"w": torch.ones((), dtype=F64)})
        closed(start(), given())
    assert looks == [2]


@pytest.mark.parametrize("function", [branching, tabled, torch.compiler.disable(plain), Branching()])
def test_what_might_do_another_thing_is_looked_at_each_time(function, looks):
    layer = bilevel.argmin(function)
    for _ in range(3):
        layer(start(), given())
    assert looks == [3]


@pytest.mark.parametrize("kind", [bilevel.root, bilevel.fixed_point])
def test_of_equations_too(kind: Callable[..., Any], looks):
    layer = kind(lambda x, a: 0.5 * x - a)
    for _ in range(2):
        layer(start(), given())
    assert looks == [1]


def test_a_tensor_that_comes_to_require_grad_is_found_at_a_later_call():
    shift = torch.ones(2, dtype=F64)
    layer = bilevel.argmin(lambda x, a: square(x - a - shift))
    layer(start(), given())
    shift.requires_grad_(True)
    with pytest.raises(bilevel.CapturedTensorError, match="closure"):
        layer(start(), given())


def test_a_global_that_is_set_anew_is_found_at_a_later_call(monkeypatch):
    layer, random = bilevel.argmin(shifted), bilevel.argmin(dropping)
    layer(start(), given())
    random(start(), given())
    monkeypatch.setitem(globals(), "SHIFT", SHIFT.clone().requires_grad_(True))
    monkeypatch.setitem(globals(), "RATE", 0.5)
    with pytest.raises(bilevel.CapturedTensorError):
        layer(start(), given())
    with pytest.raises(bilevel.StochasticObjectiveError):
        random(start(), given())


def test_a_function_called_inside_that_is_set_anew_is_found_at_a_later_call(monkeypatch):
    layer = bilevel.argmin(plain)
    layer(start(), given())
    weight = torch.ones((), dtype=F64, requires_grad=True)
    monkeypatch.setitem(globals(), "square", lambda x: weight * (x**2).sum())
    with pytest.raises(bilevel.CapturedTensorError):
        layer(start(), given())


def test_a_number_passed_as_an_argument_counts():
    layer = bilevel.argmin(lambda x, a, p: square(x - a) + square(F.dropout(1 + x, p)))
    layer(start(), given(), 0.0)
    with pytest.raises(bilevel.StochasticObjectiveError):
        layer(start(), given(), 0.5)


@pytest.mark.parametrize(("first", "later"), [((0.5, 0.0, 0.0), (0.5, 0.5, 0.0)), ((0.0, 0.0, 0.5), (0.0, 0.5, 0.5))])
def test_a_number_that_stands_in_two_places_counts_in_both(first, later):
    layer = bilevel.argmin(
        lambda x, a, p, q, r: square(x - a) + (p + r) * x.sum() + square(F.dropout(1 + x, q)),
        solver=bilevel.GradientDescent(0.1, max_steps=5),
        tolerance=bilevel.Tolerance(delta=None),
    )
    layer(start(), given(), *first)
    with pytest.raises(bilevel.StochasticObjectiveError):
        layer(start(), given(), *later)


def test_a_tensor_of_a_transform_outside_is_found_at_a_later_call():
    cell = [start()]

    def of(shift):
        def objective(x, a):
            return square(x - a - shift)

        return objective

    layer = bilevel.argmin(of(cell[0]))
    layer(start(), given())

    def outside(shift):
        layer.function.__closure__[0].cell_contents = shift
        return layer(start(), given().detach())

    with pytest.raises(bilevel.CapturedTensorError):
        torch.func.vmap(outside)(torch.ones(3, 2, dtype=F64))


def noisy(x, a, size):
    return square(x - a) + size * (torch.randn_like(x) * x).sum()


def dropping_by_a_tensor(x, a, rate):
    return square(x - a) + square(F.dropout(1 + x, rate))


@pytest.mark.parametrize("function", [noisy, dropping_by_a_tensor])
@pytest.mark.parametrize("on_failure", ["raise", "nan"])
def test_noise_that_a_tensor_brings_later_is_found(function, on_failure, monkeypatch):
    # No operation on the list draws random numbers; this is the net below it.
    known = purity.is_known
    monkeypatch.setattr(purity, "is_known", lambda item: item in (torch.randn_like, F.dropout) or known(item))
    few = bilevel.GradientDescent(0.1, max_steps=5)
    layer = bilevel.argmin(function, solver=few, tolerance=bilevel.Tolerance(delta=None), on_failure=on_failure)
    layer(start(), given(), torch.tensor(0.0))
    if on_failure == "nan":
        assert bool(layer(start(), given(), torch.tensor(0.5)).isnan().all())
        return
    for _ in range(2):
        with pytest.raises(bilevel.StochasticObjectiveError):
            layer(start(), given(), torch.tensor(0.5))


def test_what_is_kept_beside_a_function_counts():
    def objective(x, a):
        return objective.weight * square(x - a)

    def by_tensor(x, a):
        return shift.weight * square(x - a - shift)

    shift = torch.ones(2, dtype=F64)
    for keeper, function in ((objective, objective), (shift, by_tensor)):
        layer = bilevel.argmin(function)
        keeper.weight = torch.ones((), dtype=F64)
        layer(start(), given())
        keeper.weight = torch.ones((), dtype=F64, requires_grad=True)
        with pytest.raises(bilevel.CapturedTensorError):
            layer(start(), given())


class Data(NamedTuple):
    target: torch.Tensor

    def loss(self, x):
        return SHIFT[0] * square(x - self.target)


@pytest.mark.parametrize(
    ("function", "call"),
    [
        (lambda x, data: data.loss(x), lambda layer: layer(start(), Data(given()))),
        (lambda data, a: data.loss(a) + square(data.target), lambda layer: layer(Data(start()), given())),
    ],
    ids=["argument", "unknown"],
)
def test_methods_of_what_holds_the_tensors_are_not_looked_for(function, call, monkeypatch):
    layer = bilevel.argmin(function)
    call(layer)
    monkeypatch.setitem(globals(), "SHIFT", SHIFT.clone().requires_grad_(True))
    with pytest.raises(bilevel.CapturedTensorError):
        call(layer)


def test_a_function_that_is_given_another_code_is_looked_at_again():
    def objective(x, a):
        return square(x - a)

    def cut(x, a):
        return square(x.detach() - a)

    layer = bilevel.argmin(objective)
    layer(start(), given())
    objective.__code__ = cut.__code__
    with pytest.raises(bilevel.ArgumentError, match="depend on its first argument"):
        layer(start(), given())


def test_whether_an_operation_copies_depends_on_strides():
    def objective(x, a):
        return square(x - a.contiguous().clamp_(max=5))

    layer = bilevel.argmin(objective)
    layer(torch.zeros(2, 2, dtype=F64), torch.ones(2, 2, dtype=F64).mT)
    given = torch.ones(2, 3, dtype=F64)[:, :2]
    layer(torch.zeros(2, 2, dtype=F64), given)
    assert bool((given == 1).all())
    with pytest.raises(bilevel.StochasticObjectiveError, match="in place"):
        layer(torch.zeros(2, 2, dtype=F64), torch.ones(2, 2, dtype=F64))


def test_what_no_longer_fits_is_said_as_at_a_first_call():
    shift = torch.ones(2, dtype=F64)
    masked = bilevel.argmin(lambda x, a, mask: square(x - a) + square(x[mask] - shift))
    masked(start(), given(), torch.tensor([True, True]))
    with pytest.raises(bilevel.ShapeError, match="args"):
        masked(start(), given(), torch.tensor([False, False]))
    shift.data = torch.ones(3, dtype=F64)
    with pytest.raises(bilevel.ShapeError, match="args"):
        masked(start(), given(), torch.tensor([True, True]))

    turned = bilevel.argmin(lambda x, a: square(torch.eye(2) @ (x - a)))
    single = torch.zeros(2)
    turned(single, given().float())
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(F64)
        with pytest.raises(bilevel.DtypeError):
            turned(single, given().float())
    finally:
        torch.set_default_dtype(before)


def test_other_kernels_of_attention_are_found_at_a_later_call():
    key = torch.randn(1, 1, 2, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    layer = bilevel.argmin(lambda x, k: square(F.scaled_dot_product_attention(x, k, k)) + square(x - k))
    gradients = []
    for backends in (SDPBackend.MATH, [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        with sdpa_kernel(backends):
            gradients += torch.autograd.grad(layer(torch.zeros_like(key), key).sum(), key)
    torch.testing.assert_close(*gradients)


def test_a_function_that_came_as_an_argument_is_let_go():
    layer = bilevel.argmin(lambda x, a, inner: inner(x - a))
    held = torch.ones(2, dtype=F64)
    inner = (lambda held: lambda x: square(held * x))(held)
    kept = weakref.ref(inner), weakref.ref(held)
    layer(start(), given().detach(), inner)
    del inner, held
    gc.collect()
    assert [ref() for ref in kept] == [None, None]
    layer(start(), given().detach(), square)


def test_a_fault_that_is_let_pass_is_said_each_time():
    weight = torch.ones((), dtype=F64, requires_grad=True)
    layer = bilevel.argmin(lambda x, a: weight * square(x - a), on_failure="warn")
    for _ in range(2):
        with pytest.warns(bilevel.FailureWarning, match="closure"):
            layer(start(), given())


def test_that_a_matrix_is_symmetric_is_seen_in_its_numbers():
    layer = bilevel.linear_solve(lambda x, A: A @ x, symmetric=True)
    layer(start() + 1, torch.eye(2, dtype=F64))
    with pytest.raises(bilevel.ArgumentError, match="symmetric"):
        layer(start() + 1, torch.tensor([[1.0, 0.5], [0.0, 1.0]], dtype=F64))


def test_wrong_shapes_are_said_as_at_a_first_call():
    layer = bilevel.argmin(plain)
    layer(start(), given())
    with pytest.raises(bilevel.ShapeError, match="args"):
        layer(start(), torch.ones(3, dtype=F64))


def imports(x):
    import random

    return x * random.random()


def writes(x):
    global TABLE
    TABLE = [x]
    return x


def tries(x):
    try:
        return x()
    except Exception:
        return x


def sets(x):
    x.seen = True
    return x


def unknown(x):
    return x + nowhere  # noqa: F821


def defaults(x, table=[]):  # noqa: B006
    return x


@pytest.mark.parametrize(
    "function",
    [imports, writes, tries, sets, unknown, defaults, branching, tabled, print, len, torch.nn.LSTM(2, 2), "text".upper, SHIFT.mul],
)  # fmt: skip
def test_what_is_not_straight(function):
    assert (reachable_objects(function) is None) == (function is not len)


def test_instructions_are_listed_by_version():
    steps = [*dis.get_instructions(plain), *dis.get_instructions(square)]
    assert all(is_known_step(step) for step in steps)
    assert not any(is_known_step(step, version) for step in steps for version in ((3, 9), (3, 99), (4, 0)))
    # Each name of this version's list is one of this interpreter's.
    assert _BY_VERSION[sys.version_info[:2]] <= {*dis.opmap, "LOAD_CLOSURE"}


def test_what_is_reached():
    parts = reachable_objects(plain)
    assert parts is not None
    for part in (plain, square, math.e, SCALE):
        assert any(part is found for found in parts)
    assert reachable_objects(lambda x: F.softplus(torch.linalg.vector_norm(x))) is not None
    assert reachable_objects(lambda x: bilevel.ravel(x).sum()) is not None
    assert reachable_objects(lambda x: x, 1, ("a", (None, 2.0)), torch.float64, square) is not None
    assert reachable_objects(lambda x: x, [1]) is None
    assert reachable_objects(lambda x: x, given()) is None
    assert reachable_objects(torch.func.grad(branching)) is None
    assert reachable_objects((plain, plain), 1, 1, 2) != reachable_objects((plain, plain), 1, 2, 2)


def test_a_memory_keeps_a_few_things_and_a_copy_none():
    memory: InspectionCache[str] = InspectionCache()
    parts = (plain, SHIFT)
    assert memory.find((1,), parts) is None
    memory.keep((1,), parts, "made")
    assert memory.find((1,), (plain, SHIFT)) == "made"
    assert memory.find((2,), parts) is None
    assert memory.find((1,), (plain, SHIFT.clone())) is None
    assert memory.find((1,), (plain,)) is None
    for other in (copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
        assert other.find((1,), parts) is None
    memory.keep((1,), (torch.zeros(1),), "gone")
    assert memory.find((1,), (None,)) is None
    assert memory.find((1,), parts) == "made"
    for number in range(16):
        memory.keep((number + 2,), parts, "later")
    assert memory.find((1,), parts) is None


class Ridge(bilevel.BilevelProblem):
    def inner_objective(self, inner, outer, data):
        return square(inner - data) + outer.exp() * square(inner)

    def outer_objective(self, inner, outer, data):
        return square(inner - 1)


class Weighted(Ridge):
    weight = 1.0

    def inner_objective(self, inner, outer, data):
        return self.weight * square(inner - data) + outer.exp() * square(inner)


class Super(Ridge):
    def inner_objective(self, inner, outer, data):
        return super().inner_objective(inner, outer, data)


@pytest.mark.parametrize(("kind", "expected"), [(Ridge, 1), (Weighted, 1), (Super, 4)])
@pytest.mark.parametrize("tolerance", [None, bilevel.Tolerance(hypergradient=1e-3, relative=True, estimates=True)])
def test_of_a_problem_whose_method_makes_no_use_of_it(kind, expected, tolerance, looks):
    problem = kind(tolerance=tolerance)
    outer = torch.zeros((), dtype=F64, requires_grad=True)
    found = [problem.hypergradient(outer, given().detach(), init=start()) for _ in range(4)]
    assert looks == [expected]
    grads = torch.stack([result.grad for result in found])
    # d/dt of ((c / (1 + e^t) - 1)²).sum() at t = 0
    c = given().detach()
    assert torch.allclose(grads, (-(c / 2 - 1) * c / 2).sum().expand(4), rtol=1e-3 if tolerance else 1e-9)


def test_an_objective_that_a_problem_is_given_later_is_looked_at(looks):
    problem, weight = Ridge(), torch.ones((), dtype=F64, requires_grad=True)
    outer = torch.zeros((), dtype=F64, requires_grad=True)
    problem.hypergradient(outer, given().detach(), init=start())
    problem.inner_objective = lambda inner, outer, data: weight * square(inner - data) + outer.exp() * square(inner)
    with pytest.raises(bilevel.CapturedTensorError):
        problem.hypergradient(outer, given().detach(), init=start())


def test_problems_with_a_memory_are_copied_and_pickled():
    problem = Ridge()
    outer = torch.zeros((), dtype=F64, requires_grad=True)
    needs_grad = problem.hypergradient(outer, given().detach(), init=start()).grad
    for other in (copy.deepcopy(problem), pickle.loads(pickle.dumps(problem))):
        assert torch.equal(other.hypergradient(outer, given().detach(), init=start()).grad, needs_grad)
