"""What is special about bounds, constraints and proximal maps is named, and ordinary ones have no finding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import bilevel
from bilevel.prox import L1
from bilevel.testing import Defect, diagnose

F64 = torch.float64


def tensor(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=F64)


def distance(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return ((x - a) ** 2).sum()


def descend(objective: Callable[..., torch.Tensor], x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Proximal gradient steps that are too long."""
    for _ in range(50):
        x = L1(0.1).prox(x - 0.05 * 100 * (x - a), 0.05)
    return x


argmin, ZERO, A = bilevel.argmin, torch.zeros(2, dtype=F64), tensor(1.0, 2.0)
COST = tensor(1.0, -1.0)
# Each with what is to be said: the defect, and words of its sentence.
CASES: dict[str, tuple[bilevel.Layer, tuple[torch.Tensor, ...], dict[Defect, str]]] = {
    "a kink": (
        argmin(lambda x, a: (x - a).abs().sum(), inequality=lambda x, a: x - 4), (ZERO, A), {Defect.KINK: "kink of the objective"},
    ),
    "a degenerate constraint": (
        argmin(distance, inequality=lambda x, a: torch.stack([x[0] - 9, x.sum() - 1])), (ZERO, tensor(0.25, 0.75)),
        {Defect.DEGENERATE: "inequality[1] is active with multiplier 0"},
    ),
    "a start outside a bound": (
        argmin(distance, lower=0.0), (ZERO - 1, A), {Defect.INFEASIBLE_START: "the start violates the lower bound of x[0] by 1"},
    ),
    "a start outside an inequality": (
        argmin(distance, inequality=lambda x, a: x - 1), (tensor(5.0, 0.0), A + 1),
        {Defect.INFEASIBLE_START: "the start violates inequality[0] by 4"},
    ),
    "an inequality twice": (
        argmin(distance, inequality=lambda x, a: torch.stack([x.sum() - 1, x.sum() - 1])), (ZERO, A),
        {Defect.DUPLICATED: "inequality[0] and inequality[1] state the same"},
    ),
    "a multiple of an equality": (
        argmin(distance, equality=lambda x, a: torch.stack([x.sum() - 1, 2 - 2 * x.sum()])), (ZERO, A),
        {Defect.DUPLICATED: "equality[0] and equality[1] state the same"},
    ),
    "an equality that follows": (
        argmin(distance, equality=lambda x, a: torch.stack([x[0], x[1], x.sum()])), (ZERO, A),
        {Defect.DUPLICATED: "one of equality[0], equality[1], equality[2] follows from the others"},
    ),
    "no feasible point": (
        argmin(distance, inequality=lambda x, a: torch.stack([x.sum() - 1, 2 - x.sum()])), (ZERO, A), {Defect.INFEASIBLE: "still violated by 0.5"},
    ),
    "crossed bounds": (
        argmin(distance, lower=1.0, upper=0.0), (ZERO, A), {Defect.INFEASIBLE: "lower bound of x[0] is 1, above the upper bound 0"},
    ),
    "no minimum": (argmin(lambda x, c: c @ x, lower=0.0), (ZERO, COST), {Defect.UNBOUNDED: "falls without end"}),
    "a box of width zero": (
        argmin(distance, lower=lambda a: a, upper=lambda a: a), (ZERO, A), {Defect.FIXED: "bound of x[0], x[1] are equal"},
    ),
    "steps of a proximal map that are too long": (
        argmin(lambda x, a: 50 * distance(x, a), prox=lambda a: L1(0.1), solver=descend), (ZERO, A), {Defect.DIVERGED: "residual"},
    ),
    "a proximal map that is no contraction": (
        bilevel.fixed_point(lambda x, a: L1(0.1).prox(x - 2.5 * (x - a), 1.0), solver=bilevel.FixedPointIteration()), (ZERO, A),
        {Defect.DIVERGED: "moved away"},
    ),
    "an inequality that repeats a bound": (
        argmin(distance, lower=-3.0, inequality=lambda x, a: -6 - 2 * x[1]), (ZERO, A),
        {Defect.DUPLICATED: "the lower bound of x[1] state the same"},
    ),
    "an argument detached in a constraint": (
        argmin(lambda x, a, s: distance(x, a), inequality=lambda x, a, s: x.sum() - s.detach()), (ZERO, A, tensor(1.0)),
        {Defect.WRONG_GRADIENT: "bounds and constraints by s"},
    ),
    "an argument that no constraint uses": (
        argmin(lambda x, a, s: distance(x, a), inequality=lambda x, a, s: x.sum() - 1), (ZERO, A, tensor(1.0)),
        {Defect.DISCONNECTED: "proximal term uses s"},
    ),
    "a strength detached in a proximal term": (
        argmin(lambda x, a, s: distance(x, a), prox=lambda a, s: L1(s.detach())), (ZERO, A, tensor(0.1)[0]),
        {Defect.DISCONNECTED: "proximal term uses s"},
    ),
    "bounds": (argmin(distance, lower=-3.0, upper=lambda a: a + 5), (ZERO, A - 1.5), {}),
    "constraints": (argmin(distance, equality=lambda x, a: x[0] - 1, inequality=lambda x, a: x - 1.5), (ZERO, A), {}),
    "a pytree": (
        argmin(lambda x, a: distance(x["w"], a) + x["b"] ** 2, lower={"w": 0.0, "b": None}), ({"w": ZERO, "b": tensor(0.0)[0]}, A), {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_special_is_named(name: str) -> None:
    layer, args, expected = CASES[name]
    found = diagnose(layer, *args)
    assert found.defects == tuple(expected), str(found)
    assert not found.unexamined
    for finding in found.findings:
        assert expected[finding.defect] in finding.sentence
        assert finding.remedy


def test_problems_of_a_batch_are_told_apart() -> None:
    layer = argmin(lambda x, a, low: distance(x, a), lower=lambda a, low: low, upper=1.0)
    found = diagnose(layer, torch.zeros(3, 2, dtype=F64), A, tensor(-1.0, 1.0, 2.0), in_dims=(0, None, 0))
    assert set(found.defects) == {Defect.INFEASIBLE, Defect.FIXED}
    assert "of problem 1" in next(f.sentence for f in found.findings if f.defect is Defect.FIXED)
