"""What may change between two calls without a trace in what a function seems to reach: such a function is not replayed, or the change is found."""

from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn
from torch import tensor_split as cut
from torch.nn import functional as F

import bilevel
from bilevel.replay.purity import reachable_objects

from .test_replay import F64, agree, differentiated, given

SCALE = 1.0
START = torch.zeros(3, dtype=F64)


def bowl(x, a):
    return ((x - a) ** 2).sum() + (x**4).sum()


class Shadowed:
    def __init__(self) -> None:
        self.scale = 1.0
        self.solve: Any = bilevel.argmin(self.solve)

    def solve(self, x, a):
        return bowl(self.scale * x, a)


class Choosing(Shadowed):
    def solve(self, x, a):
        if self.scale > 1:
            return bowl(x, 2 * a)
        return bowl(x, a)


class ShadowedModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0
        self.solve: Any = bilevel.argmin(self.solve)

    def solve(self, x, a):
        return bowl(self.scale * x, a)


@pytest.mark.parametrize("kind", [Shadowed, Choosing, ShadowedModule])
def test_a_method_whose_name_the_object_keeps_something_else_under(kind):
    def call(model, seed):
        model.scale = 1.0 if seed < 5 else 3.0
        return differentiated(model.solve, START, given(seed))

    agree(kind, call)


class Converted:
    """A descriptor that gives a default to who asks the class."""

    def __get__(self, owner, kind):
        return 1.0 if owner is None else owner._strength

    def __set__(self, owner, value):
        owner._strength = value


@dataclasses.dataclass
class Described:
    strength: Any = Converted()

    def objective(self, x, a):
        return bowl(x, a) + self.strength * (x**2).sum()


class Property:
    def __init__(self) -> None:
        self.unit = 1.0
        self.__dict__["strength"] = 1.0

    @property
    def strength(self):
        return self.__dict__["strength"] * self.unit

    @strength.setter
    def strength(self, value):
        self.unit = value

    def objective(self, x, a):
        return bowl(x, a) + self.strength * (x**2).sum()


@pytest.mark.parametrize("kind", [Described, Property])
def test_what_a_class_makes_of_a_name(kind):
    def call(layer, seed):
        kept.strength = 1.0 if seed < 5 else 3.0
        return differentiated(layer, START, given(seed))

    kept = kind()
    agree(lambda: bilevel.argmin(kept.objective), call)


class Two:
    first, second = 0.0, 0.0

    def term(self, x):
        return self.first * x.cos().sum() + self.second * (x**2).sum()


class TwoInModule(nn.Module):
    first, second = 0.0, 0.0

    def forward(self, x):
        return self.first * x.cos().sum() + self.second * (x**2).sum()


@pytest.mark.parametrize("kind", [Two, TwoInModule])
def test_one_number_under_another_name(kind):
    kept = kind()
    term = kept.term if kind is Two else kept

    def call(layer, seed):
        vars(kept).pop("first", None)
        vars(kept).pop("second", None)
        setattr(kept, "first" if seed < 5 else "second", SCALE)
        return differentiated(layer, START, given(seed))

    agree(lambda: bilevel.argmin(lambda x, a: bowl(x, a) + term(x)), call)


def test_one_number_under_another_keyword():
    one, other = 1.5, 3.5

    def objective(x, a, *, u=one, v=other):
        return bowl(x, a) + u * (x**2).sum() + v * x.cos().sum()

    def call(layer, seed):
        objective.__kwdefaults__ = {"u": one, "v": other} if seed < 5 else {"v": one, "u": other}
        return differentiated(layer, START, given(seed))

    agree(lambda: bilevel.argmin(objective), call)


class Group:
    weight = 1.0


def weighted(x):
    return SCALE * (x**2).sum()


def keyed_by_objects(x, a, terms):
    return bowl(x, a) + sum(key.weight * ((x - t) ** 2).sum() for key, t in terms.items())


def keyed_by_functions(x, a, terms):
    return bowl(x, a) + sum(t * key(x) for key, t in terms.items())


@pytest.mark.parametrize("function", [keyed_by_objects, keyed_by_functions])
def test_keys_of_dicts_that_are_more_than_names(function, monkeypatch):
    key: Any = Group() if function is keyed_by_objects else weighted

    def call(layer, seed):
        monkeypatch.setattr(Group, "weight", 1.0 if seed < 5 else 4.0)
        monkeypatch.setitem(globals(), "SCALE", 1.0 if seed < 5 else 4.0)
        t = torch.tensor(2.0, dtype=F64)
        return differentiated(lambda x, a: layer(x, a, {key: t}), START, given(seed))

    agree(lambda: bilevel.argmin(function), call)


@functools.wraps(F.relu)
def relu(x):
    return SCALE * F.relu(x)


def by_another_name(x, a, ends):
    return bowl(x, a) + 5 * ((cut(x, ends)[0] - 1) ** 2).sum()


def of_a_setting(x, a, ends):
    return bowl(x, a) + (x**2).sum() * torch.are_deterministic_algorithms_enabled()


def of_one_memory(x, a, ends):
    return bowl(x, a) + (x**2).sum() * a.is_set_to(ends)


def of_a_wrapped_one(x, a, ends):
    return bowl(x, a) + relu(x).square().sum()


def of_softplus(x, a, ends):
    return bowl(x, a) + F.softplus(x).sum()


def of_a_method(x, a, ends):
    return bowl(x, a) + x.tanh().sum()


@pytest.mark.parametrize(
    "function", [by_another_name, of_a_setting, of_one_memory, of_a_wrapped_one, of_softplus, of_a_method]
)
def test_operations_that_are_others_than_they_seem(function, monkeypatch):
    softplus, tanh = F.softplus, torch.Tensor.tanh

    def call(layer, seed):
        late = seed >= 5
        with monkeypatch.context() as patch:
            patch.setattr(F, "softplus", (lambda x: 3 * softplus(x)) if late else softplus)
            patch.setattr(torch.Tensor, "tanh", (lambda x: 3 * tanh(x)) if late else tanh)
            patch.setitem(globals(), "SCALE", 3.0 if late else 1.0)
            torch.use_deterministic_algorithms(late)
            try:
                a = given(seed).requires_grad_(True)
                ends = torch.tensor([2 if late else 1])
                if function is of_one_memory:
                    ends = a.detach() if late else a.detach().clone()
                x = layer(START, a, ends)
                return [x.detach(), *torch.autograd.grad(x.sum(), a)]
            finally:
                torch.use_deterministic_algorithms(False)

    agree(lambda: bilevel.argmin(function), call)


class Around(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return x + self.body(x)


def test_a_part_of_a_model_that_is_put_elsewhere():
    def call(layer, seed):
        if seed == 5:
            models[-1].add_module("last", models[-1].around.body._modules.pop("last"))
        return differentiated(layer, START, given(seed))

    def make():
        body = nn.Sequential(OrderedDict(first=nn.Tanh(), last=nn.Sigmoid()))
        model = nn.Sequential(OrderedDict(around=Around(body)))
        models.append(model)
        return bilevel.argmin(lambda x, a: bowl(model(x), a) + (x**2).sum())

    models: list[nn.Sequential] = []
    agree(make, call)


def test_a_setting_of_a_layer_of_torch():
    model = nn.Sequential(nn.LeakyReLU(0.1))

    def call(layer, seed):
        model[0].negative_slope = 0.1 if seed < 5 else 0.5
        return differentiated(layer, START, given(seed))

    agree(lambda: bilevel.argmin(lambda x, a: bowl(model(x), a) + (x**2).sum()), call)


class Standardised(nn.Module):
    mean = 0.0

    def forward(self, x):
        return x * 2


def test_an_attribute_of_a_model_that_is_named_like_an_operation():
    model = Standardised()

    def call(layer, seed):
        model.std = 1.0 if seed < 5 else 2.0
        return differentiated(layer, START, given(seed))

    agree(lambda: bilevel.argmin(lambda x, a: bowl(model(x) / model.std - model.mean, a)), call)


def test_a_variable_that_the_function_sets():
    def make():
        seen = 0

        def objective(x, a):
            nonlocal seen
            seen = 1
            return bowl(x, a)

        def read():
            nonlocal seen
            before, seen = seen, 0
            return before

        return bilevel.argmin(objective), read

    def call(made, seed):
        layer, read = made
        read()
        layer(START, given(seed))
        return [torch.tensor(read())]

    agree(make, call)


@pytest.mark.parametrize(
    "settings", [{}, {"solver": bilevel.LBFGS()}, {"solver": bilevel.Newton(dense_limit=0)}], ids=str
)
def test_many_right_hand_sides_go_by_the_function_as_it_was(settings):
    eye = torch.eye(3, dtype=F64)

    def call(layer, seed):
        shift.fill_(1.0)
        a = given(seed).requires_grad_(True)
        x = layer(START, a)
        if seed > 5:
            shift.fill_(2.0)
        try:
            return list(torch.autograd.grad(x, a, eye, is_grads_batched=True))
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            return [eye]

    shift = torch.ones(3, dtype=F64)
    settings = {"linear_solver": bilevel.CG(), **settings}
    agree(lambda: bilevel.argmin(lambda x, a: bowl(x, a) + (x**4 * shift**2).sum(), **settings), call)


def test_what_is_on_the_list_and_what_is_not():
    assert reachable_objects(lambda x: F.softplus(torch.linalg.vector_norm(x)) + x.sum()) is not None
    assert reachable_objects(lambda x: torch.finfo(x.dtype).eps * torch.func.vmap(torch.exp)(x)) is not None
    assert reachable_objects(lambda x: x.nonexistent) is None
    assert reachable_objects(lambda x: torch.nn.modules) is None
    assert reachable_objects(lambda x: torch.are_deterministic_algorithms_enabled()) is None
    assert reachable_objects(lambda x: F) is None
    assert reachable_objects(lambda x: torch.Tensor(x)) is None
    assert reachable_objects(torch.set_default_dtype) is None
    assert reachable_objects(F, torch) is None
