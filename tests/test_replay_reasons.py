"""Why a call is not replayed: a layer's inspector says it in a sentence that names the place."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.func import vmap

import bilevel
from bilevel.replay import ReplayCache

pytestmark = pytest.mark.counts

F64 = torch.float64
A = torch.tensor([1.0, 2.0], dtype=F64)
START = torch.zeros(2, dtype=F64)
STRENGTHS = [1.0, 2.0]


class Spring:
    stiffness = 2.0


SPRING = Spring()


def plain(x, a):
    return ((x - a) ** 2).sum() + 0.1 * (x**4).sum()


def branching(x, a):
    if x.ndim > 3:
        return x.sum()
    return ((x - a) ** 2).sum()


def of_a_list(x, a):
    return STRENGTHS[0] * ((x - a) ** 2).sum()


def of_an_object(x, a):
    return SPRING.stiffness * ((x - a) ** 2).sum()


def reads_a_number(x, a):
    return ((x - a) ** 2).sum() * float(a[0])


def of_numpy(x, a):
    return ((x - a) ** 2).sum() * pytest.approx(1.0).expected


class Kept:
    def __init__(self):
        self.strengths = [1.0]

    def objective(self, x, a):
        return self.strengths[0] * ((x - a) ** 2).sum()


def after(function, calls=4):
    layer = bilevel.argmin(function)
    for _ in range(calls):
        layer(START, A)
    return layer.inspector.reason


def test_a_function_that_is_replayed_is_recorded():
    assert after(plain) == "recorded"


def test_before_and_in_the_first_calls():
    layer = bilevel.argmin(plain)
    assert layer.inspector.reason == "no call was made yet"
    layer(START, A)
    assert layer.inspector.reason == "the first call of a function checks it"
    assert ReplayCache().reason == "not recorded yet: an evaluation is recorded, and compared with the next"


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (branching, "`branching` branches in line "),
        (of_a_list, "`STRENGTHS` in `of_a_list` is a list, which may change between calls"),
        (of_an_object, "`.stiffness` in `of_an_object` is not on the list of known operations"),
        (of_numpy, "`pytest.approx` in `of_numpy` is not on the list of known operations"),
        (Kept().objective, "`self.strengths` in `objective` is a list, which may change between calls"),
    ],
    ids=["branch", "list", "object", "module", "attribute"],
)
def test_the_place_is_named(function, words):
    assert words in after(function)


def test_the_line_of_a_branch_is_right():
    assert after(branching).endswith(f" {branching.__code__.co_firstlineno + 1}")


def test_an_operation_that_reads_numbers_is_named():
    assert "aten._local_scalar_dense.default reads numbers" in after(reads_a_number)


def test_a_captured_object_is_named():
    scale = {"a": 1.0}
    assert after(lambda x, a: scale["a"] * ((x - a) ** 2).sum()).startswith("`scale` in `<lambda>` is a dict")


def test_what_is_around_the_call_is_named():
    layer = bilevel.argmin(plain)
    for _ in range(4):
        layer(START, A)
    with bilevel.replaying(False):
        layer(START, A)
    assert "replaying(False)" in layer.inspector.reason
    vmap(layer)(START.expand(3, 2), A.expand(3, 2))
    layer(START, A)
    assert layer.inspector.reason == "recorded"


def test_a_disagreement_is_said(monkeypatch):
    from bilevel.replay import cache

    monkeypatch.setattr(cache, "_same", lambda a, b: False)
    assert "the recorded program and the function disagreed at output 0" in after(plain)


def test_a_linear_layer_says_that_it_checks_each_call():
    layer = bilevel.linear_solve(lambda x, A: A @ x)
    layer(A, torch.eye(2, dtype=F64))
    assert "is checked at each call" in layer.inspector.reason


def test_a_copy_remembers_nothing():
    layer = bilevel.argmin(plain)
    for _ in range(4):
        layer(START, A)
    assert copy.deepcopy(layer.inspector).reason == "no call was made yet"
    assert pickle.loads(pickle.dumps(layer.inspector)).reason == "no call was made yet"
