"""What cannot be used is refused with a sentence, and what looks unusual but is sound goes on."""

from __future__ import annotations

import contextlib
import copy
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from bilevel import stochastic
from bilevel.errors import ArgumentError, BilevelError, NonFiniteError
from bilevel.stochastic import Batch, Microbatches, Minibatches, StepOptions
from tests.stochastic.problems import SGD, Quadratic

FIT = Quadratic.random()
X, Y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.ones(6, 1)


def start() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(5, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)


def made(name: str, **settings: Any) -> Any:
    return getattr(stochastic, name)(FIT.losses, *start(), inner_optimizer=SGD, outer_optimizer=SGD, **settings)


def squares(model: Any, outer: Any, data: Any) -> torch.Tensor:
    x, y = data
    return ((model(x) - y) ** 2).mean() + outer.exp() * sum((p**2).sum() for p in model.parameters())


def on_module(model: nn.Module, name: str = "SOBA", **settings: Any) -> Any:
    return getattr(stochastic, name)((squares, squares), model, torch.tensor(-2.0), **settings)


class Rate(torch.optim.Optimizer):
    """An optimiser whose learning rate has another name."""

    def __init__(self, params: Any, rate: float = 0.1) -> None:
        super().__init__(params, {"rate": rate})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["rate"] * p.grad


def shared_memory() -> None:
    z = torch.zeros(5)
    stochastic.SOBA(FIT.losses, z, z[:3])


def inference_tensor() -> None:
    with torch.inference_mode():
        z, x = start()
    stochastic.SOBA(FIT.losses, z, x)


def in_inference_mode() -> None:
    method = made("SOBA")
    with torch.inference_mode():
        method.step(FIT.all, FIT.all)


def frozen_later() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))
    method = on_module(model)
    model[0].requires_grad_(False)
    method.step((X, Y), (X, Y))


def replaced_later() -> None:
    model = nn.Linear(4, 1)
    method = on_module(model)
    model.weight = nn.Parameter(torch.zeros(1, 4))
    method.step((X, Y), (X, Y))


def another_group() -> None:
    method = on_module(nn.Linear(4, 1))
    method.inner_optimizer.add_param_group({"params": [torch.zeros(2, requires_grad=True)]})
    method.step((X, Y), (X, Y))


def other_batch_of_a_number() -> None:
    method = made("SABA")
    method.step(Batch(data=FIT.all[:2], index=2), FIT.all)
    method.step(Batch(data=FIT.all[2:5], index=2), FIT.all)


def adam_into_sgd() -> None:
    adam = stochastic.SOBA(FIT.losses, *start(), inner_optimizer=torch.optim.Adam, outer_optimizer=SGD)
    made("SOBA").load_state_dict(adam.state_dict())


def in_float32() -> None:
    other = stochastic.SOBA(FIT.losses, torch.zeros(5), torch.zeros(3), inner_optimizer=SGD, outer_optimizer=SGD)
    made("SOBA").load_state_dict(other.state_dict())


def other_size() -> None:
    Minibatches(FIT.all, 4).load_state_dict(Minibatches(FIT.all, 2).state_dict())


def lazy() -> None:
    on_module(nn.LazyLinear(1))


HALVES = [FIT.all[:4], FIT.all[4:]]
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "fractional index": (lambda: Batch(data=FIT.all, index=2.7), "index to be an integer.*got 2.7"),  # type: ignore[arg-type]
    "index by name": (lambda: Batch(data=FIT.all, index="a"), "index to be an integer"),  # type: ignore[arg-type]
    "indices in float32": (lambda: Batch(data=FIT.all, index=torch.tensor([1.5])), "index to be an integer"),
    "a batch of a batch": (lambda: Batch(data=Batch(data=FIT.all)), "got a Batch; pass its data"),
    "parts that are batches": (lambda: Microbatches([Batch(data=FIT.all)]), "got a Batch"),
    "sizes for shares": (lambda: Microbatches(HALVES, weights=[4, 4]), "sum of 8; divide each by the sum"),
    "a negative share": (lambda: Microbatches(HALVES, weights=[2.0, -1.0]), "each weight"),
    "words for shares": (lambda: Microbatches(HALVES, weights="ab"), "each weight"),  # type: ignore[arg-type]
    "one part alone": (lambda: Microbatches(3), "a list of batches, got int"),  # type: ignore[arg-type]
    "no part": (lambda: Microbatches.split(FIT.all, 0), "parts to be an integer of at least 1"),
    "seed of minibatches": (lambda: Minibatches(FIT.all, 2, seed=1.5), "seed to be an integer"),  # type: ignore[arg-type]
    "a minibatch that is not there": (lambda: Minibatches(FIT.all, 2)[17], "one of the 4 minibatches, got 17"),
    "no state of minibatches": (lambda: Minibatches(FIT.all, 2).load_state_dict({}), "the dict that state_dict"),
    "minibatches of another size": (other_size, "in minibatches of 4, got .* of 2; load it"),
    "seed": (lambda: StepOptions(seed="a"), "seed to be an integer"),  # type: ignore[arg-type]
    "scaler": (lambda: StepOptions(grad_scaler="a"), "a torch.amp.GradScaler or None"),  # type: ignore[arg-type]
    "two arguments": (
        lambda: stochastic.SOBA((lambda z, x: z.sum(), FIT.outer_objective), *start()),
        r"inner_objective to be a function of \(inner, outer, data\)",
    ),
    "SparseAdam": (
        lambda: stochastic.SOBA(FIT.losses, *start(), inner_optimizer=torch.optim.SparseAdam),
        "pass torch.optim.Adam",
    ),
    "rate by another name": (
        lambda: stochastic.SOBA(FIT.losses, *start(), inner_optimizer=Rate),
        "named 'lr'.*adjoint_optimizer=",
    ),
    "shared memory": (shared_memory, "(inner and outer|outer and inner) do; pass tensor.clone"),
    "expanded": (lambda: stochastic.SOBA(FIT.losses, torch.zeros(1).expand(5), start()[1]), "an expanded tensor"),
    "inference tensor": (inference_tensor, "made in torch.inference_mode; pass tensor.clone"),
    "in inference mode": (in_inference_mode, "outside torch.inference_mode"),
    "frozen later": (frozen_later, "0.weight has been frozen since the method was made"),
    "replaced later": (replaced_later, "weight has been replaced in its module"),
    "another group": (another_group, "it holds 2 of them and 1 others"),
    "another batch of a number": (other_batch_of_a_number, "number 2 to be the one seen before.*2 numbers, got 3"),
    "Adam's state": (adam_into_sgd, r"SGD has the settings .*'momentum'.*the optimisers that it had"),
    "a lazy module": (lazy, "weight is not initialised yet; call the module once before"),
    "a number for a tolerance": (
        lambda: made("ImplicitStep", tolerance=1e-3),
        "expected tolerance to be a bilevel.Tolerance",
    ),
    "state in float32": (in_float32, "convert the variables before"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_refused(case: str) -> None:
    act, words = REFUSED[case]
    with pytest.raises(BilevelError, match=words):
        act()


def test_remedies_of_the_refusals_work() -> None:
    method = stochastic.SOBA(FIT.losses, *start(), inner_optimizer=Rate, outer_optimizer=SGD, adjoint_optimizer=SGD)
    method.step(FIT.all, FIT.all)
    stochastic.StocBiO(FIT.losses, *start(), inner_optimizer=Rate, neumann_rate=0.1).step(FIT.all, FIT.all)
    stochastic.F2SA(FIT.losses, *start(), inner_optimizer=Rate).step(FIT.all, FIT.all)
    z = torch.zeros(5, dtype=torch.float64)
    stochastic.SOBA(FIT.losses, z, z[:3].clone()).step(FIT.all, FIT.all)
    with torch.inference_mode():
        z, x = start()
    stochastic.SOBA(FIT.losses, z.clone(), x.clone()).step(FIT.all, FIT.all)


SAVED = list(made("SABA").state_dict())


@pytest.mark.parametrize("entry", SAVED)
@pytest.mark.parametrize("value", ["left out", None, {"a": 1}])
def test_an_edited_state_is_refused_and_changes_nothing(entry: str, value: Any) -> None:
    saved = made("SABA")
    saved.step(FIT.all, FIT.all)
    state = saved.state_dict()
    if value == "left out":
        del state[entry]
    else:
        state[entry] = value
    method = made("SABA")
    before = method.state_dict()
    dispensable = {"average": ["left out", None], "memory": [{"a": 1}]}
    if value in dispensable.get(entry, []):
        method.load_state_dict(state)
    else:
        with pytest.raises(ArgumentError, match="state"):
            method.load_state_dict(state)
        assert str(method.state_dict()) == str(before)
    method.step(FIT.all, FIT.all)


def empty(rows: Any) -> Any:
    return rows[:0]


def test_what_is_not_finite_is_traced_to_its_cause() -> None:
    with pytest.raises(NonFiniteError, match=r"inner_batch: the last batch has a tensor of shape \(0,\)"):
        made("SOBA").step(empty(FIT.all), FIT.all)
    model = nn.Linear(4, 1)
    bad = X.clone()
    bad[2, 1] = float("nan")
    with pytest.raises(NonFiniteError, match="outer_batch: the last batch holds NaN"):
        on_module(model).step((X, Y), (bad, Y))
    z, x = start()
    z[0] = float("inf")
    with pytest.raises(NonFiniteError, match="inner holds NaN or infinity itself; begin from finite"):
        stochastic.SOBA(FIT.losses, z, x).step(FIT.all, FIT.all)


@pytest.mark.parametrize("name", ["SOBA", "PZOBO"])
def test_a_step_records_derivatives_under_no_grad(name: str) -> None:
    first, second = made(name), made(name)
    first.step(FIT.all, FIT.all)
    with torch.no_grad():
        second.step(FIT.all, FIT.all)
    assert torch.equal(first.outer, second.outer)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda method: pickle.loads(pickle.dumps(method))])
def test_a_copy_made_before_the_first_step_goes_on(copied: Any) -> None:
    method = made("SOBA")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about copies of its tree structures
        other = copied(method)
    method.step(FIT.all, FIT.all)
    other.step(FIT.all, FIT.all)
    assert torch.equal(method.outer, other.outer) and method.outer is not other.outer


def test_minibatches_of_different_sizes_have_the_mean_of_the_data_set() -> None:
    """Eight examples in threes: the last two weigh as much each as the others."""
    slow = partial(torch.optim.SGD, lr=0.05)
    method = stochastic.SABA(FIT.losses, *start(), inner_optimizer=SGD, outer_optimizer=slow)
    inner, outer = Minibatches(FIT.all, 3, seed=1), Minibatches(FIT.all, 3, seed=2)
    for _ in range(1500):
        method.step(inner, outer)
    torch.testing.assert_close(method.outer.detach(), FIT.best(), rtol=1e-5, atol=1e-5)
    batch = next(inner)
    split = Microbatches.split(batch.data, 2, batch.index)
    whole = stochastic.SOBA(FIT.losses, *start(), options=StepOptions(accumulate=2))
    plain = stochastic.SOBA(FIT.losses, *start())
    results = [method.step(batch, FIT.all) for method in (whole, plain)]
    torch.testing.assert_close(results[0].inner_loss, results[1].inner_loss)
    assert split.weight == 1.0 and batch.weight in (3 * 3 / 8, 2 * 3 / 8)


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("name", ["VRBO", "MRBO"])
@pytest.mark.parametrize("at", [1, 3, 6, 9])
def test_a_recursive_estimate_survives_an_objective_that_raises(name: str, at: int) -> None:
    """With whole batches an estimate is the exact direction, so that a new method at the same point makes the same steps."""
    calls = [0]

    def counted(*args: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 0:
            raise StoppedError
        return FIT.losses[0](*args)

    slow = partial(torch.optim.SGD, lr=0.05)
    settings = {"inner_optimizer": slow, "outer_optimizer": slow, **({"period": 1000} if name == "VRBO" else {})}
    method = getattr(stochastic, name)((counted, FIT.losses[1]), *start(), **settings)
    for _ in range(3):
        method.step(FIT.all, FIT.all)
    calls[0] = -at
    with contextlib.suppress(StoppedError):
        method.step(FIT.all, FIT.all)
    calls[0] = 1
    other = getattr(stochastic, name)(
        FIT.losses, method.inner.detach().clone(), method.outer.detach().clone(), **settings
    )
    for one in (method, other):
        one.step(FIT.all, FIT.all)
        one.step(FIT.all, FIT.all)
    torch.testing.assert_close(method.outer, other.outer, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(method.inner, other.inner, rtol=1e-10, atol=1e-12)
