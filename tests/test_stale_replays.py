"""What an objective goes by without naming it, changed after its replays are trusted: the change is found at the next call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bilevel

from .test_replay import F64, differentiated, replays, same  # noqa: F401  # a fixture

FACTOR = {"by": 1.0}
START = torch.zeros(3, dtype=F64)
FIRST, LATER = torch.tensor([1.0, 2.0, 3.0], dtype=F64), torch.tensor([-1.0, 0.5, 7.0], dtype=F64)
Change = Callable[[Any, pytest.MonkeyPatch], object]


def bowl(x, a):
    return ((x - a) ** 2).sum() + 0.1 * (x**4).sum()


def fits(objective, change: Callable[[], object]) -> None:
    """Compare a call after ``change`` with one of a new layer, evaluated by itself."""
    layer = bilevel.argmin(objective)
    for _ in range(5):
        differentiated(layer, START, FIRST)
    change()
    found = [differentiated(layer, START, LATER) for _ in range(2)]
    with bilevel.replaying(False):
        expected = differentiated(bilevel.argmin(objective), START, LATER)
    assert all(same(each, expected) for each in found)


# Modules: how they are called.


def linear(kind: type[nn.Linear] = nn.Linear) -> nn.Linear:
    torch.manual_seed(0)
    return kind(3, 3, dtype=F64).requires_grad_(False)


class Calling(nn.Linear):
    def _call_impl(self, *args, **kwargs):
        return FACTOR["by"] * self.forward(*args, **kwargs)


class Wrapping(nn.Linear):
    def _wrapped_call_impl(self, *args, **kwargs):
        return FACTOR["by"] * self.forward(*args, **kwargs)


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = linear()

    def forward(self, x):
        return self.inner(x)


class Calls(Whole):
    def _call_impl(self, *args, **kwargs):
        return FACTOR["by"] * self.forward(*args, **kwargs)


def kept(model: nn.Module) -> nn.Module:
    model._call_impl = lambda x: FACTOR["by"] * model.forward(x)  # type: ignore[method-assign]
    return model


def triple(model, patch):
    patch.setitem(FACTOR, "by", 3.0)


def in_a_convolution(**settings: Any) -> nn.Module:
    convolution = nn.Conv1d(1, 1, 3, dtype=F64, **settings).requires_grad_(False)
    return nn.Sequential(nn.Unflatten(0, (1, 3)), convolution, nn.Flatten(0))


MODULES: dict[str, tuple[Callable[[], nn.Module], Change]] = {
    "a call of its own": (lambda: linear(Calling), triple),
    "a call of its own around": (lambda: linear(Wrapping), triple),
    "a call of its own, of a user's module": (Calls, triple),
    "a call that one object keeps": (lambda: kept(linear()), triple),
    "a compiled call": (linear, lambda m, patch: setattr(m, "_compiled_call_impl", lambda x: 3 * m.forward(x))),
    "a call that a class is given": (Whole, lambda m, patch: patch.setattr(Whole, "_call_impl", lambda self, x: 3 * x, raising=False)),
    "attributes that a class is given": (
        Whole, lambda m, patch: patch.setattr(Whole, "__getattr__", lambda self, name: lambda x: 3 * x, raising=False),
    ),
    "another forward of a class": (Whole, lambda m, patch: patch.setattr(Whole, "forward", lambda self, x: 3 * self.inner(x))),
    "another forward of torch's": (linear, lambda m, patch: patch.setattr(nn.Linear, "forward", lambda self, x: 3 * x)),
    "another function below one of torch's": (linear, lambda m, patch: patch.setattr(F, "linear", lambda x, w, b: 3 * x)),
    "another method below one of torch's": (
        lambda: in_a_convolution(padding=1), lambda m, patch: patch.setattr(nn.Conv1d, "_conv_forward", lambda self, x, w, b: 3 * x),
    ),
    "a method that one layer keeps": (
        lambda: in_a_convolution(padding=1), lambda m, patch: setattr(m[1], "_conv_forward", lambda x, w, b: 3 * x),
    ),
    "a private setting": (
        lambda: in_a_convolution(padding=1, padding_mode="circular"), lambda m, patch: setattr(m[1], "_reversed_padding_repeated_twice", (2, 0)),
    ),
    "a private setting in a list": (
        lambda: in_a_convolution(padding="same", padding_mode="circular"),
        lambda m, patch: m[1]._reversed_padding_repeated_twice.__setitem__(slice(None), [2, 0]),
    ),
    "a hook": (linear, lambda m, patch: m.register_forward_hook(lambda *given: 3 * given[-1])),
    "a class": (lambda: nn.Sequential(linear(), nn.Tanh()), lambda m, patch: setattr(m[1], "__class__", nn.Sigmoid)),
}  # fmt: skip


@pytest.mark.parametrize(("make", "change"), MODULES.values(), ids=MODULES)
def test_how_a_module_is_called(make, change, monkeypatch):
    model = make()
    fits(lambda x, a: bowl(model(x), a) + (x**4).sum(), lambda: change(model, monkeypatch))


def test_ordinary_modules_are_replayed_as_before(replays):  # noqa: F811
    for make in (linear, Whole, lambda: in_a_convolution(padding=1)):
        before, model = replays[0], make()
        fits(lambda x, a, model=model: bowl(model(x), a) + (x**4).sum(), lambda: None)
        assert replays[0] > before


# Modules: operators, len() and the like, which code does not name.


class Odd(nn.Module):
    def __len__(self):
        return int(FACTOR["by"])

    def __iter__(self):
        return iter([FACTOR["by"]])

    def __getitem__(self, place):
        return FACTOR["by"]

    def __rmul__(self, other):
        return other * FACTOR["by"]

    def __neg__(self):
        return FACTOR["by"]

    def __float__(self):
        return FACTOR["by"]

    def __index__(self):
        return int(FACTOR["by"])

    def __contains__(self, item):
        return FACTOR["by"] > 2

    def __format__(self, how):
        return "a" * int(FACTOR["by"])

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return args[0] * FACTOR["by"]


ODD = Odd()
OPERATORS: dict[str, Callable[[Any], Any]] = {
    "len": lambda a: a * len(ODD),
    "iter": lambda a: a * sum(2 * number for number in ODD),
    "getitem": lambda a: a * ODD[0],
    "rmul": lambda a: a * ODD,
    "neg": lambda a: a * -ODD,
    "float": lambda a: a * float(ODD),
    "index": lambda a: a * [0.0, 1.0, 2.0, 3.0][ODD],
    "contains": lambda a: a * (1 + (1 in ODD)),
    "format": lambda a: a * len(f"{ODD}"),
    "torch_function": lambda a: torch.mul(a, ODD),
}


@pytest.mark.parametrize("scaled", OPERATORS.values(), ids=OPERATORS)
def test_operators_of_a_module(scaled, monkeypatch):
    fits(lambda x, a: bowl(x, scaled(a)), lambda: monkeypatch.setitem(FACTOR, "by", 3.0))


@pytest.mark.parametrize(
    ("name", "other"), [("__mul__", lambda self, other: self + other), ("__len__", lambda self: 9)]
)
def test_operators_of_tensors(name, other, monkeypatch):
    def objective(x, a):
        return ((x - a) ** 2).sum() + (x**4).sum() + (x * a).sin().sum() * len(a)

    layer = bilevel.argmin(objective, on_failure="ignore")
    for _ in range(5):
        differentiated(layer, START, FIRST)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, name, other)
        found = layer(START, LATER)
        with bilevel.replaying(False):
            expected = bilevel.argmin(objective, on_failure="ignore")(START, LATER)
    assert torch.equal(found, expected)


# Strings made of tensors: torch reads their numbers past every mode.


PERCENT = "%s"
TEXTS: list[Callable[[Any], str]] = [
    lambda a: f"{a}", lambda a: f"{a!r}", lambda a: f"{[a]}", lambda a: f"{a[0]:.9g}", lambda a: PERCENT % a, lambda a: PERCENT % [a],
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_what_a_tensor_looks_like_in_print(text):
    fits(lambda x, a: bowl(x, a * len(text(a))), lambda: None)


def test_strings_of_whole_numbers_are_replayed(replays):  # noqa: F811
    def named(x, a, weights):
        return bowl(x, a * weights[f"layer{1}.weight"])

    layer = bilevel.argmin(named)
    for _ in range(5):
        layer(START, FIRST, {"layer1.weight": LATER})
    assert replays[0]
