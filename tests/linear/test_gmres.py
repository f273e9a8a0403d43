"""What GMRES promises by itself: long cycles, budgets of each problem's own, and honest ends."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from bilevel import Status, Tolerance
from bilevel.linear._base import solve_linear
from bilevel.linear._solution import LinearOutcome
from bilevel.linear.gmres import GMRES
from bilevel.operators import DenseOperator, FunctionOperator

F64, F32 = torch.float64, torch.float32
dtypes = pytest.mark.parametrize("dtype", [F64, F32])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def contraction(n: int, factor: float, seed: int) -> torch.Tensor:
    J = torch.randn(1, n, n, generator=generator(seed), dtype=F64)
    return torch.eye(n, dtype=F64) - factor * J / torch.linalg.matrix_norm(J, 2)[:, None, None]


def right(batch: int, n: int, seed: int) -> torch.Tensor:
    return torch.randn(batch, n, generator=generator(seed), dtype=F64)


def solve(solver: GMRES, A: torch.Tensor, b: torch.Tensor, **settings: float) -> LinearOutcome:
    return solve_linear(solver, DenseOperator(A), b, Tolerance(**settings).linear(b.dtype))


def test_a_matrix_that_shows_nothing_before_its_last_step_is_solved() -> None:
    # The residual of a cyclic shift stays at one until step n: a restart before loses everything.
    n = 130
    b = torch.eye(n, dtype=F64)[:1]
    found = solve(GMRES(), torch.roll(torch.eye(n, dtype=F64), 1, 0).unsqueeze(0), b)
    assert found.status.tolist() == [Status.CONVERGED] and found.iterations.tolist() == [n]
    cut = solve(GMRES(restart=50), torch.roll(torch.eye(n, dtype=F64), 1, 0).unsqueeze(0), b)
    assert cut.status.tolist() == [Status.STAGNATED]


def test_eigenvalues_around_the_origin_need_the_whole_space() -> None:
    n = 200
    A = torch.randn(1, n, n, generator=generator(3), dtype=F64) / n**0.5
    b = right(1, n, 3)
    found = solve(GMRES(), A, b)
    assert found.status.tolist() == [Status.CONVERGED]
    torch.testing.assert_close(found.x, torch.linalg.solve(A, b.unsqueeze(-1)).squeeze(-1), rtol=1e-7, atol=1e-7)


@dtypes
@pytest.mark.parametrize("restart", [None, 8])
def test_neighbours_change_no_steps(dtype: torch.dtype, restart: int | None) -> None:
    n = 30
    own, b = contraction(n, 0.7, 0).to(dtype), right(2, n, 5).to(dtype)
    neighbours = [
        torch.eye(n),
        torch.diag(torch.logspace(0, -7, n)),
        torch.zeros(n, n),
        torch.full((n, n), float("nan")),
        torch.roll(torch.eye(n), 1, 0),
    ]
    first, *others = (
        solve(GMRES(restart=restart, max_steps=200), torch.cat([own, other.to(dtype).unsqueeze(0)]), b)
        for other in neighbours
    )
    for other in others:
        assert other.status[0] == first.status[0] == Status.CONVERGED
        assert other.iterations[0] == first.iterations[0]
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(other.x[0], first.x[0], rtol=100 * eps, atol=100 * eps)


def test_a_budget_is_each_problems_own() -> None:
    # The first is disturbed once, believes itself solved after two steps and goes on; its neighbour's cycle is long.
    n, products = 40, 0
    entries = torch.stack([1.0 + torch.arange(n, dtype=F64) % 2, torch.logspace(0, -3, n, dtype=F64)])

    def apply(v: torch.Tensor) -> torch.Tensor:
        nonlocal products
        products += 1
        disturbed = entries.clone()
        disturbed[0] *= 1.0 + 1e-4 * (products == 1)
        return disturbed * v

    b = right(2, n, 4)
    found = solve_linear(GMRES(max_steps=40), FunctionOperator(apply, b), b, Tolerance(delta_prime=1e-9).linear(F64))
    assert found.status.tolist() == [Status.CONVERGED, Status.CONVERGED]
    assert int(found.iterations[0]) <= 8 and int(found.iterations[1]) <= 40


def test_a_budget_is_spent_to_the_step() -> None:
    A, b = torch.diag(torch.logspace(0, -6, 50, dtype=F64)).unsqueeze(0), right(1, 50, 0)
    for restart in (None, 4, 5):
        solution = GMRES(10, restart=restart).solve(DenseOperator(A), b, torch.zeros(1, dtype=F64))
        assert solution.iterations.tolist() == [10]
        assert solution.status.tolist() == [Status.MAX_STEPS]


def test_the_residual_returned_is_the_true_one() -> None:
    A, b = contraction(40, 0.9, 1), right(1, 40, 1)
    for steps in (3, 20, 200):
        solution = GMRES(steps).solve(DenseOperator(A), b, torch.full((1,), 1e-10, dtype=F64))
        assert solution.residual is not None
        torch.testing.assert_close(solution.residual, b - (A @ solution.x.unsqueeze(-1)).squeeze(-1))


def test_more_steps_never_make_the_residual_larger() -> None:
    A, b = contraction(25, 0.95, 2), right(1, 25, 2)
    norms = [float(solve(GMRES(k), A, b).residual_norm[0]) for k in range(1, 26)]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(norms))


@dtypes
def test_a_singular_system_ends_and_is_not_called_solved(dtype: torch.dtype) -> None:
    for seed in range(10):
        A, b = contraction(25, 0.6, seed), right(1, 25, seed)
        U, values, Vh = torch.linalg.svd(A)
        values[:, -2:] = 0.0
        A = (U @ torch.diag_embed(values) @ Vh).to(dtype)
        found = solve(GMRES(), A, b.to(dtype))
        assert Status(int(found.status[0])) in (Status.SINGULAR, Status.STAGNATED, Status.MAX_STEPS)
        assert bool(torch.isfinite(found.x).all())


@pytest.mark.parametrize(
    ("matrix", "status"),
    [
        ([[0.0, 0.0], [0.0, 0.0]], Status.SINGULAR),
        ([[0.0, 1.0], [0.0, 0.0]], Status.SINGULAR),
        ([[0.0, 1.0], [1.0, 0.0]], Status.CONVERGED),
        ([[0.0, 1.0], [-1.0, 0.0]], Status.CONVERGED),
        ([[-1.0, 0.0], [0.0, -1.0]], Status.CONVERGED),
    ],
)
@dtypes
def test_small_matrices_at_the_edge(matrix: list[list[float]], status: Status, dtype: torch.dtype) -> None:
    found = solve(GMRES(), torch.tensor([matrix], dtype=dtype), torch.tensor([[1.0, 0.0]], dtype=dtype))
    assert found.status.tolist() == [status]
    assert bool(torch.isfinite(found.x).all())


@pytest.mark.parametrize("condition", [1e7, 1e8])
def test_an_ill_conditioned_matrix_is_not_called_singular(condition: float) -> None:
    for seed in range(5):
        U, _, Vh = torch.linalg.svd(contraction(20, 0.6, seed))
        A = U @ torch.diag(torch.logspace(0, -math.log10(condition), 20, dtype=torch.float64)) @ Vh
        found = solve(GMRES(), A, right(1, 20, seed))
        assert found.status.tolist() == [Status.CONVERGED]
        # As near as a backward stable method comes: eps times ‖A‖ ‖x‖.
        assert float(found.residual_norm[0]) <= 1e-14 * float(found.x.norm())
