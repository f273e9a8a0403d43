"""Solves that begin at the last primal and dual answer: fewer steps, and the same results."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

import bilevel

F64 = torch.float64
N = 12


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


ROOT, SLOPE, ROWS, AIM = _random(N, N, seed=0), _random(N, seed=1), _random(8, N, seed=2), _random(N, seed=3)
MATRIX = ROOT @ ROOT.mT / N + 0.1 * torch.eye(N, dtype=F64)


class Constrained(bilevel.BilevelProblem):
    """θ moves the slope and the sides of the constraints."""

    def initial(self, outer: Any, data: Any) -> Any:
        return torch.zeros(N, dtype=F64) if self.batch_dims is None else torch.zeros(len(data), N, dtype=F64)

    def inner_objective(self, inner: Any, outer: Any, data: Any) -> torch.Tensor:
        shift = 0.0 if data is None else data
        return 0.5 * inner @ MATRIX @ inner - (SLOPE * (1 + outer) + shift) @ inner + 0.02 * (inner**4).sum()

    def inner_constraints(self, outer: Any, data: Any) -> bilevel.Constraints:
        return bilevel.Constraints(
            inequality=lambda x, outer, data: {"rows": ROWS @ x - 0.3 - 0.1 * outer[0]},
            equality=lambda x, outer, data: x.sum() - 1,
            lower=-1.0,
        )

    def outer_objective(self, inner: Any, outer: Any, data: Any) -> torch.Tensor:
        return ((inner - AIM) ** 2).sum()


def run(warm: bool) -> tuple[bilevel.OuterResult, list[int]]:
    with bilevel.record() as reports:
        found = bilevel.minimize(
            Constrained(warm_start=warm), torch.zeros(N, dtype=F64), None, max_steps=6, gradient_tolerance=1e-9
        )
    return found, [int(r.iterations) for r in reports if r.direction is bilevel.Pass.FORWARD]


def test_minimize_takes_fewer_inner_steps_to_the_same_points() -> None:
    (warm, steps), (cold, others) = run(True), run(False)
    assert len(steps) == len(others)
    assert torch.allclose(warm.outer, cold.outer, rtol=1e-9, atol=1e-11)
    assert warm.value == pytest.approx(cold.value, rel=1e-10)
    assert 3 * sum(steps[3:]) < 2 * sum(others[3:])  # 35 to 42 and 69, by processor
    assert sorted(steps)[len(steps) // 2] <= 6


def test_a_batch_and_its_derivatives_are_those_of_a_cold_start() -> None:
    data, outer = 0.1 * _random(3, N, seed=5), torch.zeros(N, dtype=F64)
    warm, cold = (Constrained(batch_dims=0, warm_start=flag) for flag in (True, False))
    warm.hypergradient(outer, data)
    moved = outer + 0.02 * _random(N, seed=6)
    one, other = warm.hypergradient(moved, data), cold.hypergradient(moved, data)
    assert torch.allclose(one.inner, other.inner, atol=1e-10)
    assert torch.allclose(one.grad, other.grad, atol=1e-8)
    assert bool((one.report.forward.iterations < other.report.forward.iterations).all())


def test_the_multipliers_are_part_of_the_memory() -> None:
    problem, outer = Constrained(), torch.zeros(N, dtype=F64)
    problem.hypergradient(outer, None)
    kept = io.BytesIO()
    torch.save(problem.memory(), kept)
    kept.seek(0)
    again = Constrained()
    again.recall(torch.load(kept, weights_only=True))
    moved = outer + 0.02
    one, other = problem.hypergradient(moved, None), again.hypergradient(moved, None)
    assert torch.equal(one.inner, other.inner)
    assert int(one.report.forward.iterations) == int(other.report.forward.iterations)
    old = Constrained()
    state = problem.memory()
    del state["multipliers"]
    old.recall(state)
    assert torch.allclose(old.hypergradient(moved, None).inner, one.inner, atol=1e-10)


def test_far_arguments_and_infeasible_ones_are_solved_as_from_a_cold_start() -> None:
    problem = Constrained()
    problem.hypergradient(torch.zeros(N, dtype=F64), None)
    far = 3 * _random(N, seed=7)
    one, other = problem.hypergradient(far, None), Constrained().hypergradient(far, None)
    assert torch.allclose(one.inner, other.inner, atol=1e-9)
    contradictory = torch.zeros(N, dtype=F64)
    contradictory[0] = -1e3
    with pytest.raises(bilevel.SolveError, match="no point that satisfies"):
        problem.hypergradient(contradictory, None)
