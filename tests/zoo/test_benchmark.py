"""The instrument itself: ``benchmarks/defaults.py`` knows the right answers, and sees each kind of fault."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import default_references as references
import defaults

sys.path.pop(0)

NAMES = [family.name for family in defaults.REGULAR]


def drawn(name: str, index: int = 0) -> defaults.Draw:
    """Return a batch whose start is near, so that every reference solves it."""
    family = defaults.FAMILIES[name]
    given = defaults.draw(family, 0, 3 * index, None)
    start = given.solution * 1.001 if family.positive else given.solution + 1e-3
    return replace(given, start=start) if name in NAMES else given


def right_answer(given: defaults.Draw) -> defaults.Answer:
    family = given.family
    z, _ = references.polished(family.kind, family.function, given.solution, *given.args)
    slope, _ = references.implicit_gradient(
        family.kind, family.function, z, given.theta, *given.data, weights=given.weights
    )
    k = len(z)
    return defaults.Answer(z, slope, ["CONVERGED"] * k, ["CONVERGED"] * k, torch.ones(k, dtype=torch.bool))


def judged(given: defaults.Draw, answer: defaults.Answer) -> list[list[str]]:
    """Return what is noted of each problem that is regular."""
    notes: list[list[str]] = []
    judge = defaults.judge_regular if given.family.name in defaults.REGULAR_NAMES else defaults.judge_singular

    def note(row: int, found: list[str] | None, **figures: Any) -> None:
        if found is not None:
            notes.append(found)

    judge(given, answer, note)
    return notes


@pytest.mark.parametrize("name", NAMES)
def test_a_problem_is_drawn_around_its_solution(name: str) -> None:
    family = defaults.FAMILIES[name]
    verified = 0
    for index in range(4):
        given = defaults.draw(family, 1, index, "float64")
        z, there = references.polished(family.kind, family.function, given.solution, *given.args)
        value = references.residual(family.kind, family.function, z, *given.args).detach()
        assert float(value.abs().max()) <= 1e-9
        assert float((z - given.solution).abs().max()) <= 1e-6
        verified += int(there.all())
    assert verified == 4


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_of_the_reference_is_that_of_differences(name: str) -> None:
    family = defaults.FAMILIES[name]
    given = defaults.draw(family, 2, 0, "float64")
    z, _ = references.polished(family.kind, family.function, given.solution, *given.args)
    slope, size = references.implicit_gradient(
        family.kind, family.function, z, given.theta, *given.data, weights=given.weights
    )
    direction = torch.randn(given.theta.shape, dtype=torch.float64)
    h = 1e-6
    moved = [
        references.polished(family.kind, family.function, z, given.theta + sign * h * direction, *given.data)[0]
        for sign in (1, -1)
    ]
    differences = ((moved[0] - moved[1]) * given.weights).sum(-1) / (2 * h)
    found = (slope * direction).sum(-1)
    # Where the curvature is least, a step of h is not small.
    condition = defaults.condition(given, z)
    fair = condition < 1e4
    error = (found - differences).abs() / (size * direction.norm(dim=-1) + 1e-12)
    assert bool((error[fair] <= 1e-3).all())


@pytest.mark.parametrize("name", NAMES)
def test_a_right_answer_is_a_success_and_every_fault_is_seen(name: str) -> None:
    given = drawn(name)
    right, limit = right_answer(given), defaults.ACCURACY[given.dtype]
    assert all(found == ["success"] for found in judged(given, right))
    off = replace(right, z=right.z + 3 * limit)
    assert all("wrong x" in found for found in judged(given, off))
    slope = right.gradient * (1 + 30 * limit)
    zero = right.gradient.norm(dim=-1) == 0
    assert not bool(zero.all()) or given.family.name in ("box, linear cost", "relu of a shift")
    faults = judged(given, replace(right, gradient=slope))
    assert sum("wrong gradient" in found for found in faults) >= 0.3 * int((~zero).sum())
    failed = replace(right, success=torch.zeros(len(right.z), dtype=torch.bool))
    assert all(found == ["failed", "lost"] for found in judged(given, failed))


@pytest.mark.parametrize("name", [family.name for family in defaults.SINGULAR])
def test_a_success_on_a_singular_problem_is_seen(name: str) -> None:
    given = drawn(name)
    k = len(given.theta)
    answer = defaults.Answer(
        torch.full_like(given.start, 0.1), torch.ones_like(given.theta), ["CONVERGED"] * k, ["CONVERGED"] * k, torch.ones(k, dtype=torch.bool),
    )  # fmt: skip
    assert all(found == ["silent"] for found in judged(given, answer))
    refused = replace(answer, success=torch.zeros(k, dtype=torch.bool))
    assert all(found == ["named"] for found in judged(given, refused))


def test_minimum_norm_counts_where_the_equations_are_solved() -> None:
    given = drawn("rank-deficient root")
    z = (torch.linalg.pinv(given.data[0]) @ given.theta.unsqueeze(-1)).squeeze(-1)
    k = len(z)
    answer = defaults.Answer(z, given.theta, ["MINIMUM_NORM"] * k, ["CONVERGED"] * k, torch.ones(k, dtype=torch.bool))
    assert all(found == ["right"] for found in judged(given, answer))
    assert all(found == ["silent"] for found in judged(given, replace(answer, z=z + 1)))


def test_a_call_is_the_same_every_time() -> None:
    family = defaults.FAMILIES["Poisson"]
    first, second = (defaults.draw(family, 5, 7, None) for _ in range(2))
    for name in ("start", "theta", "scale", "weights", "solution"):
        assert torch.equal(getattr(first, name), getattr(second, name))


def test_the_start_is_where_it_is_said_to_be() -> None:
    """Unless the objective is not finite so far away."""
    for index in range(20):
        given = defaults.draw(defaults.FAMILIES["quadratic"], 3, index, "float64")
        away = (given.start - given.solution).abs().amax(-1)
        assert torch.allclose(away, torch.full_like(away, given.distance), rtol=1e-6, atol=1e-9)
