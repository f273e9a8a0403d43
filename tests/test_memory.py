"""Memory is flat in the number of inner steps and from call to call."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import bilevel

F64 = torch.float64


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of the storages alive that operations inside have made, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.alive:
                    self.alive[key] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, key, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


def objective(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return ((x - a).cosh()).sum()


def peak(make_layer, kind: str, steps: int) -> int:
    n = 2000
    a = torch.linspace(-1, 1, n, dtype=F64, requires_grad=True)
    layer = make_layer(steps)
    gc.collect()
    with PeakBytes() as watch:
        layer(torch.zeros(n, dtype=F64), a).sum().backward()
    return watch.peak


BUDGET = {"tolerance": bilevel.Tolerance(delta=None, delta_prime=None), "linear_solver": bilevel.CG(5)}
LAYERS = {
    "gradient descent": lambda k: bilevel.argmin(objective, solver=bilevel.GradientDescent(1e-3, k), **BUDGET),
    "momentum": lambda k: bilevel.argmin(objective, solver=bilevel.GradientDescent(1e-3, k, momentum=0.5), **BUDGET),
    "adam": lambda k: bilevel.argmin(
        objective, solver=bilevel.TorchOptimizer(torch.optim.Adam, lr=1e-4, max_steps=k), **BUDGET
    ),
    "fixed point": lambda k: bilevel.fixed_point(
        lambda x, a: x - 1e-3 * torch.sinh(x - a),
        solver=bilevel.FixedPointIteration(k),
        linear_solver=bilevel.GMRES(5),
        tolerance=BUDGET["tolerance"],
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_peak_does_not_grow_with_inner_steps(name: str) -> None:
    few, many = peak(LAYERS[name], name, 10), peak(LAYERS[name], name, 1000)
    assert many <= 1.01 * few


@pytest.mark.parametrize("vmapped", [False, True])
def test_nothing_is_left_from_call_to_call(vmapped: bool) -> None:
    a = torch.linspace(-1, 1, 6, dtype=F64, requires_grad=True)
    start = torch.zeros(6, dtype=F64)
    layer = bilevel.argmin(objective)

    def once() -> None:
        if vmapped:
            torch.func.vmap(layer, in_dims=(None, 0))(start, torch.stack([a, 2 * a])).sum().backward()
        else:
            layer(start, a).sum().backward()
        a.grad = None

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    tracemalloc.start()
    for _ in range(100):  # the interpreter's free lists fill up first
        once()
    before = tensors()
    early, _ = tracemalloc.get_traced_memory()
    for _ in range(100):
        once()
    assert tensors() <= before
    late, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert late - early < 100 * 256  # less than the smallest Python object with a tensor in it, for each call


def tensors_left(once: Callable[[], object]) -> int:
    """Return how many tensors five calls leave to Python's collector, which looks for circles of objects only now and then."""

    def tensors() -> int:
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    # What is recorded in the first calls is kept: the constants of a program are tensors.
    for _ in range(3):
        once()
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        for _ in range(5):
            once()
        return tensors() - before
    finally:
        gc.enable()


@pytest.mark.parametrize("name", [*LAYERS, "default"])
def test_what_a_call_made_is_let_go_at_once(name: str) -> None:
    a = torch.linspace(-1, 1, 6, dtype=F64, requires_grad=True)
    layer = LAYERS[name](3) if name in LAYERS else bilevel.argmin(objective)

    def once() -> None:
        layer(torch.zeros(6, dtype=F64), a).sum().backward()
        a.grad = None

    assert tensors_left(once) <= 0


@pytest.mark.parametrize("method", ["hybr", "krylov"])
def test_what_scipy_keeps_of_a_root_is_not_the_problem(method: str) -> None:
    a = torch.linspace(1, 2, 4, dtype=F64, requires_grad=True)
    layer = bilevel.root(lambda x, a: x + 0.1 * x.roll(1) ** 3 - a, solver=bilevel.ScipyRoot(method))

    def once() -> None:
        layer(torch.zeros(4, dtype=F64), a).sum().backward()
        a.grad = None

    assert tensors_left(once) <= 0


@pytest.mark.parametrize("look", ["not at all", "at a bound", "refined"])
def test_what_a_hypergradient_holds_is_let_go_with_it(look: str) -> None:
    class Ridge(bilevel.BilevelProblem):
        def inner_objective(self, inner, outer, data):
            return ((inner - data) ** 2).sum() + outer.exp() * (inner**2).sum()

        def outer_objective(self, inner, outer, data):
            return (inner**2).sum()

    problem = Ridge(tolerance=bilevel.Tolerance(delta=1e-3, delta_prime=1e-3, strong_convexity=2.0))
    data, outer = torch.ones(3, dtype=F64), torch.zeros((), dtype=F64)

    def once() -> None:
        result = problem.hypergradient(outer, data, init=torch.zeros(3, dtype=F64))
        if look == "at a bound":
            assert result.bound.value > 0
        elif look == "refined":
            result.refined().refined()

    assert tensors_left(once) <= 0


def test_a_problem_keeps_one_solution_however_often_it_is_called() -> None:
    class Ridge(bilevel.BilevelProblem):
        def inner_objective(self, inner, outer, data):
            return ((inner - data) ** 2).sum() + outer.exp() * (inner**2).sum()

        def outer_objective(self, inner, outer, data):
            return (inner**2).sum()

    problem = Ridge()
    data, outer = torch.ones(3, dtype=F64), torch.zeros((), dtype=F64)

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    for given in (*[{"init": torch.zeros(3, dtype=F64)}] * 5, *[{}] * 5):  # both ways are recorded
        problem.hypergradient(outer, data, **given)
    before = tensors()
    for _ in range(200):
        problem.hypergradient(outer, data)
    assert tensors() <= before
