"""A tape does again what a function did: shortened, in one part or in two, on any numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, vjp, vmap
from torch.nn import functional as F

from bilevel.replay.program import Program
from bilevel.replay.recorder import _Recorder, note

F64 = torch.float64
AWKWARD = (0.0, -0.0, 1.0, -1.5, 3.0, 1e-320, 1e200, float("inf"), float("-inf"), float("nan"))


def numbers(seed: int, *shape: int, dtype=F64, awkward: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    plain = torch.randn(shape, generator=generator, dtype=F64)
    if awkward:
        chosen = torch.tensor(AWKWARD, dtype=F64)[torch.randint(0, len(AWKWARD), shape, generator=generator)]
        plain = torch.where(torch.rand(shape, generator=generator) < 0.5, chosen, plain)
    return plain.to(dtype)


def same(found, expected) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(a.dtype == b.dtype and torch.equal(a.nan_to_num(nan=7.25), b.nan_to_num(nan=7.25)) for a, b in pairs)


def noted(function, inputs, **others) -> Program:
    program = note(function, inputs, **others).program
    assert program is not None
    return program


def operations(program: Program) -> list[str]:
    return [step.operation._opname for step in program._tape.steps]


def powers(x, y):
    return [x**1 * y**0 + (x**2) ** 1.0, (y**0.0 * x).exp(), x * 1, x**1]


def twice(x, y):
    return [(x * y).sin() + (x * y).cos(), x * y, y * x, (x + 2) * (x + 2.0)]


def chains(x, y):
    a = x * y
    b = a + 1
    c = b.neg() * y
    d = c.exp() - a
    return [d.tanh() / (1 + y**2), (x.mT * 2).sigmoid().relu()]


def views(x, y):
    a = (x * y).mT
    b = a + a.mT
    c = a.reshape(-1)[::2] * 3
    return [b, c, a.flip(0), x.expand(2, *x.shape) * y]


def second_derivatives(x, y):
    # Without torch's jacrev and hessian, whose directions torch 2.9 finds and does not make.
    pull = vjp(grad(lambda u: (u**3).sum() + (y @ u).pow(2).sum() + (u**2 * y).sum()), x[0])[1]
    return [vmap(pull)(torch.eye(len(x), dtype=x.dtype))[0], grad(lambda u: (u**2).sum())(x)]


def batched(x, y):
    return [vmap(lambda u, v: 0.5 * u @ torch.outer(v, v) @ u - v @ u)(x, y), vmap(lambda u: u.unsqueeze(0) @ y)(x)]


def mixed_dtypes(x, y):
    return [x.float() * y, (x.float() + 1).double() ** 0, torch.where(x > 0, x, 0.0), x.clamp(min=0.25), (x > y).sum()]


def written_over(x, y):
    z = x.clone()
    z += y
    z[0] = 0
    return [z, z * 2, x + 1]


FUNCTIONS = [powers, twice, chains, views, second_derivatives, batched, mixed_dtypes, written_over]


@pytest.mark.parametrize("function", FUNCTIONS)
@given(seed=st.integers(0, 2**20), awkward=st.booleans())
def test_the_same_on_other_numbers(function, seed, awkward):
    program = noted(function, (numbers(0, 3, 3), numbers(1, 3, 3)))
    inputs = numbers(seed, 3, 3, awkward=awkward), numbers(seed + 1, 3, 3, awkward=awkward)
    kept = [t.clone() for t in inputs]
    assert same(program.run(*inputs), function(*inputs))
    assert same(inputs, kept)


@pytest.mark.parametrize("function", [powers, twice, chains, views, batched, mixed_dtypes])
@given(seed=st.integers(0, 2**20))
def test_in_two_parts_the_second_as_often_as_one_likes(function, seed):
    x, *ys = (numbers(seed + place, 3, 3) for place in range(3))
    program = noted(lambda x, y: function(x, y), (numbers(0, 3, 3),), late=(numbers(1, 3, 3),))
    begun = program.begin(x)
    early = [place for place, made in enumerate(begun.outputs) if made is not None]
    before = [begun.outputs[place].clone() for place in early]
    for y in (*ys, ys[0]):
        expected = function(x, y)
        places = tuple(range(len(expected)))
        assert same(begun.finish(places, y), expected)
        for place in places:
            assert same(begun.finish((place,), y), expected[place : place + 1])
    assert same([begun.outputs[place] for place in early], before)


def test_a_chain_on_a_large_tensor_stays_in_one_memory():
    def chain(x):
        a = x * 3
        for _ in range(5):
            a = (a + 1) * 0.5
        return [a]

    x = numbers(0, 100, 100)
    program = noted(chain, (x,))
    places: list[int] = []

    class Places(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            places.append(out.untyped_storage().data_ptr())
            return out

    with Places():
        (found,) = program.run(x)
    assert same([found], chain(x))
    assert len(places) == 11 and len(set(places)) == 1 and x.data_ptr() not in places


def test_what_no_input_reaches_is_made_once():
    def function(x):
        ones = torch.ones_like(x)
        return [x * (ones * 3).sum(), torch.zeros_like(x) + 1]

    x = numbers(0, 3, 3)
    program = noted(function, (x,))
    assert len(program._tape.steps) == 2, "the product with x, and the second result, which belongs to the caller"
    for _ in range(2):
        found = program.run(x)
        assert same(found, function(x))
        found[1].zero_()


def test_what_is_found_and_lasts_is_read_in_every_run():
    buffer = torch.ones(3, dtype=F64)
    program = noted(lambda x: [x * buffer.exp()], (numbers(0, 3),), found=True)
    buffer.mul_(2)
    x = numbers(1, 3)
    assert same(program.run(x), [x * buffer.exp()])


def test_what_the_second_part_reads_is_not_written_over_in_the_first():
    def function(x, y):
        a, b = x + 1, x * 2
        return [a * y, b * y, b.tanh() * y, (b.sin() + 1).exp()]

    x, y = numbers(2, 3, 3), numbers(3, 3, 3)
    program = noted(function, (numbers(0, 3, 3),), late=(numbers(1, 3, 3),))
    for _ in range(2):
        begun = program.begin(x)
        for _ in range(2):
            assert same(begun.finish((0, 1, 2), y), function(x, y)[:3])
        assert same([begun.outputs[3]], function(x, y)[3:])


def test_what_is_given_comes_back_as_another_object():
    x = numbers(0, 3)
    program = noted(lambda x: [x, x.detach(), x + 0], (x,))
    for found in program.run(x):
        assert torch.equal(found, x) and found is not x


def test_a_check_that_makes_nothing_is_kept_in_its_part():
    def factored(A, b):
        return [torch.linalg.cholesky(A).sum(), torch.linalg.cholesky(A + b * torch.eye(2, dtype=F64)).sum()]

    A = 2 * torch.eye(2, dtype=F64)
    program = noted(factored, (A,), late=(torch.zeros((), dtype=F64),))
    with pytest.raises(torch.linalg.LinAlgError):
        program.begin(-A)
    begun = program.begin(A)
    with pytest.raises(torch.linalg.LinAlgError):
        begun.finish((1,), torch.tensor(-5.0, dtype=F64))
    assert same(begun.finish((1,), torch.tensor(2.0, dtype=F64)), [2 * torch.tensor(4.0, dtype=F64).sqrt()])


OPEN = {
    "random numbers": lambda x: [x + torch.rand(3)],
    "dropout": lambda x: [F.dropout(x, 0.5)],
    "a number read": lambda x: [x * float(x.sum())],
    "a branch": lambda x: [x + 1 if x.sum() > 0 else x],
    "a mask": lambda x: [x[x > 0]],
    "places": lambda x: [x[x.nonzero()[:, 0]]],
    "different ones": lambda x: [torch.unique(x)],
    "an index": lambda x: [x[x.argmax()]],
    "a length": lambda x: [x[: int(x.argmax()) + 1]],
    "its argument written to": lambda x: [x.mul_(2)],
    "a view of it written to": lambda x: [x[:2].add_(1)],
    "a tensor from nowhere": lambda x: [x + OUTSIDE],
    "numbers by way of numpy": lambda x: [x + torch.from_numpy(x.numpy() + 1)],
    "a sparse result": lambda x: [(x * x.to_sparse()).to_dense()],
}
OUTSIDE = torch.ones(3, dtype=F64)


@pytest.mark.parametrize("function", OPEN.values(), ids=OPEN)
def test_what_could_do_otherwise_has_no_tape(function):
    x = numbers(0, 3)
    outputs, program, _ = note(function, (x,))
    assert program is None and all(isinstance(t, torch.Tensor) for t in outputs)


def test_a_captured_tensor_is_an_input():
    program = noted(lambda x: [x + OUTSIDE, x * OUTSIDE[0]], (numbers(0, 3),), captured=(OUTSIDE,))
    x, other = numbers(5, 3), numbers(6, 3)
    assert same(program.run(x, other), [x + other, x * other[0]])
    # Two of them in one memory may be apart when they are looked at next.
    assert note(lambda x: [x + OUTSIDE], (numbers(0, 3),), captured=(OUTSIDE, OUTSIDE[:2])).program is None


def test_arguments_in_one_memory_are_told_apart():
    base = numbers(0, 3, 3)
    wide = numbers(1, 3).expand(3, 3)
    program = noted(lambda a, b, c, d: [a @ b + c, d * a], (base, base, base.mT, wide), captured=(wide,))
    a, b, c, d = (numbers(10 + place, 3, 3) for place in range(4))
    assert same(program.run(a, b, c, d, wide), [a @ b + c, d * a])


def test_the_room_of_what_was_noted_is_let_go():
    held = []

    def large(x):
        for _ in range(50):
            x = x * 1.5
        held.append(len(live))
        return [x.sum()]

    live: set[int] = set()
    place = _Recorder._place

    def placed(self, tensor):
        live.clear()
        live.update(ref.cdata for ref in self._memories.values() if not ref.expired())
        return place(self, tensor)

    _Recorder._place = placed
    try:
        noted(large, (numbers(0, 1000),))
    finally:
        _Recorder._place = place
    assert held[0] <= 5


def seen_otherwise(x, y):
    a = x * 2
    b = (a**1).reshape(-1).exp()
    c = (x * 2).reshape(-1).exp()
    return [b, c, a + y, (x**1).reshape(-1).exp(), (y**0 * x).mT.exp(), x + y]


@given(seed=st.integers(0, 2**20))
def test_views_are_of_what_they_view(seed):
    program = noted(seen_otherwise, (numbers(0, 3, 3), numbers(1, 3, 3)))
    inputs = numbers(seed, 3, 3), numbers(seed + 1, 3, 3)
    kept = [t.clone() for t in inputs]
    assert same(program.run(*inputs), seen_otherwise(*inputs))
    assert same(inputs, kept)


def test_a_view_that_is_returned_is_of_a_tensor_of_its_own():
    x = numbers(0, 3, 3)
    program = noted(lambda x: [(x**1).reshape(-1), (x * 2).mT, (x * 2).reshape(-1)], (x,))
    found = program.run(x)
    rooms = [t.untyped_storage().data_ptr() for t in (x, *found)]
    assert len(set(rooms)) == 4
    found[0].zero_()
    assert same([x], [numbers(0, 3, 3)])


# Functions made at random of what is left out, viewed, computed twice and written over.

STEPS = [
    lambda a, b: a**1, lambda a, b: a * b**0, lambda a, b: a * 1, lambda a, b: a.mT, lambda a, b: a.reshape(9).reshape(3, 3),
    lambda a, b: a[:1].expand(3, 3), lambda a, b: a + b, lambda a, b: b + a, lambda a, b: a * b, lambda a, b: b * a, lambda a, b: a * 2.0,
    lambda a, b: a.neg(), lambda a, b: a.sin().exp(), lambda a, b: a.tanh(), lambda a, b: a - b, lambda a, b: a.relu(),
    lambda a, b: a / (1 + b**2), lambda a, b: torch.addcmul(a, a, b), lambda a, b: a.unsqueeze(0).squeeze(0) ** 1.0, lambda a, b: a.flip(0),
    lambda a, b: (a**1).T.sigmoid(), lambda a, b: a.diagonal().unsqueeze(1) * b, lambda a, b: a.contiguous(), lambda a, b: a.clone(),
]  # fmt: skip


@st.composite
def functions(draw):
    steps = draw(
        st.lists(
            st.tuples(st.sampled_from(range(len(STEPS))), st.integers(0, 99), st.integers(0, 99)),
            min_size=2,
            max_size=14,
        )
    )
    returned = draw(st.lists(st.integers(0, 99), min_size=1, max_size=4))

    def function(*inputs):
        made = list(inputs)
        for which, left, right in steps:
            made.append(STEPS[which](made[left % len(made)], made[right % len(made)]))
        return [made[place % len(made)] for place in (*returned, len(made) - 1)]

    return function


@given(function=functions(), seed=st.integers(0, 2**20))
def test_functions_made_at_random(function, seed):
    x, y, z = (numbers(seed + place, 3, 3) for place in range(3))
    kept = [t.clone() for t in (x, y, z)]
    program = noted(function, (numbers(7, 3, 3), numbers(8, 3, 3)))
    for other in (y, z, y):
        found, expected = program.run(x, other), function(x, other)
        assert same(found, expected)
    begun = noted(function, (numbers(7, 3, 3),), late=(numbers(8, 3, 3),)).begin(x)
    for other in (y, z, y):
        expected = function(x, other)
        assert same(begun.finish(tuple(range(len(expected))), other), expected)
        assert all(same(begun.finish((place,), other), [one]) for place, one in enumerate(expected))
    assert same((x, y, z), kept)
