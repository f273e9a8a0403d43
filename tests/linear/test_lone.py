"""A single problem's steps, whose numbers are Python's, beside the same problem's in a batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bilevel
from bilevel.linear import _lone
from bilevel.linear._base import solve_linear
from bilevel.operators import DenseOperator
from bilevel.reports import Status
from bilevel.tolerance import Target

F64 = torch.float64
ASKED = Target(relative=1e-9, asked=True)


def matrix(kind: str, n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=F64))[0]
    values = torch.logspace(0, {"easy": 1, "hard": 7}.get(kind, 2), n, dtype=F64)
    if kind == "indefinite":
        values[::3] *= -1
    if kind == "singular":
        values[0] = 0.0
    A = (basis * values) @ basis.T
    A = 0.5 * (A + A.T)
    return torch.full_like(A, torch.nan) if kind == "nan" else A


def solved(A: torch.Tensor, b: torch.Tensor, count: int, solver: bilevel.CG, target: Target = ASKED):
    operator = DenseOperator(A.expand(count, *A.shape).clone(), symmetric=True)
    return solve_linear(solver, operator, b.expand(count, -1).clone(), target)


@given(
    st.sampled_from(["easy", "hard", "indefinite", "singular", "nan"]), st.integers(1, 25), st.integers(0, 999),
    st.sampled_from([None, 1, 2, 7]), st.sampled_from([ASKED, Target(), Target(relative=0.0, silent=True)]),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_alone_as_in_a_batch(kind, n, seed, most, target):
    A = matrix(kind, n, seed)
    b = torch.randn(n, generator=torch.Generator().manual_seed(seed + 1), dtype=F64)
    solver = bilevel.CG(most)
    one, two = solved(A, b, 1, solver, target), solved(A, b, 2, solver, target)
    if kind in ("easy", "nan") or most is not None:
        assert one.status[0] == two.status[0]
        assert abs(int(one.iterations[0]) - int(two.iterations[0])) <= 1
    # Rounding of sums decides where a run through a singular or indefinite matrix ends: both say that it failed, or both that it is solved.
    good = (Status.CONVERGED, Status.BUDGET_SPENT)
    if kind != "singular":
        assert (int(one.status[0]) in good) == (int(two.status[0]) in good)
    if kind == "easy":
        assert torch.allclose(one.x[0], two.x[0], rtol=1e-7, atol=1e-9)
        assert torch.allclose(one.residual[0], b - A @ one.x[0], atol=1e-9)


def test_the_true_residual_ends_it():
    A, b = matrix("easy", 12, 0), torch.ones(12, dtype=F64)
    outcome = solved(A, b, 1, bilevel.CG())
    assert int(outcome.status[0]) == Status.CONVERGED
    assert torch.allclose(outcome.residual[0], b - A @ outcome.x[0], rtol=0, atol=1e-14)
    assert float(outcome.residual_norm[0]) <= 1e-9 * float(b.norm())


@pytest.mark.parametrize(("n", "scale"), [(1, 1.0), (3, 1e-160), (3, 1e150)])
def test_few_numbers_and_extreme_ones(n, scale):
    A, b = scale * matrix("easy", n, 1), torch.ones(n, dtype=F64)
    outcome = solved(A, b, 1, bilevel.CG())
    assert int(outcome.status[0]) == Status.CONVERGED
    assert torch.allclose(A @ outcome.x[0], b, rtol=1e-8)


def test_a_step_takes_one_product(monkeypatch):
    A, b = matrix("easy", 20, 2), torch.ones(20, dtype=F64)
    count = [0]
    plain = DenseOperator.matvec

    def counted(self, v):
        count[0] += 1
        return plain(self, v)

    monkeypatch.setattr(DenseOperator, "matvec", counted)
    outcome = solved(A, b, 1, bilevel.CG())
    assert count[0] == int(outcome.iterations[0]) + 1  # the true residual


def test_it_is_what_a_single_problem_is_solved_by(monkeypatch):
    called = []
    monkeypatch.setattr("bilevel.linear.cg.run_single", lambda *a, **k: called.append(1) or _lone.run_single(*a, **k))
    A, b = matrix("easy", 5, 3), torch.ones(5, dtype=F64)
    for count in (1, 2):
        solved(A, b, count, bilevel.CG())
    assert called == [1]
