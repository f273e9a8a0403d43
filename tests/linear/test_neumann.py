"""What the Neumann series promises by itself."""

from __future__ import annotations

import pytest
import torch

from bilevel import Status, Tolerance
from bilevel.errors import ShapeError
from bilevel.linear._base import solve_linear
from bilevel.linear.neumann import Neumann
from bilevel.operators import DenseOperator, FunctionOperator

F64 = torch.float64


def contraction(batch: int, n: int, factor: float) -> torch.Tensor:
    J = torch.randn(batch, n, n, generator=torch.Generator().manual_seed(0), dtype=F64)
    return torch.eye(n, dtype=F64) - factor * J / torch.linalg.matrix_norm(J, 2)[:, None, None]


def right(batch: int, n: int) -> torch.Tensor:
    return torch.randn(batch, n, generator=torch.Generator().manual_seed(1), dtype=F64)


@pytest.mark.parametrize("terms", [0, 1, 5])
@pytest.mark.parametrize("step", [1.0, 0.7])
def test_it_is_the_partial_sum_and_its_residual_is_the_next_power(terms: int, step: float) -> None:
    A, b = contraction(2, 6, 0.5), right(2, 6)
    M = torch.eye(6, dtype=F64) - step * A
    powers = [torch.linalg.matrix_power(M, j) @ b.unsqueeze(-1) for j in range(terms + 2)]
    solution = Neumann(terms, step).solve(DenseOperator(A), b, torch.zeros(2, dtype=F64))
    torch.testing.assert_close(solution.x, step * sum(powers[:-1]).squeeze(-1))  # type: ignore[union-attr]
    torch.testing.assert_close(b - (A @ solution.x.unsqueeze(-1)).squeeze(-1), powers[-1].squeeze(-1))
    assert solution.iterations.tolist() == [terms + 1] * 2


def test_a_contraction_needs_no_transpose() -> None:
    A, b = contraction(1, 6, 0.5), right(1, 6)
    operator = FunctionOperator(lambda v: (A @ v.unsqueeze(-1)).squeeze(-1), b)
    assert solve_linear(Neumann(100), operator, b, Tolerance().linear(F64)).status.tolist() == [Status.CONVERGED]
    large = FunctionOperator(lambda v: 5 * (A @ v.unsqueeze(-1)).squeeze(-1), b)
    with pytest.raises(ShapeError, match="pass rmatvec="):
        solve_linear(Neumann(100), large, b, Tolerance().linear(F64))


def test_a_neighbour_of_nans_asks_for_no_transpose() -> None:
    A, b = contraction(2, 6, 0.5), right(2, 6)
    A[1] = float("nan")
    operator = FunctionOperator(lambda v: (A @ v.unsqueeze(-1)).squeeze(-1), b)
    found = solve_linear(Neumann(100), operator, b, Tolerance().linear(F64))
    assert found.status.tolist() == [Status.CONVERGED, Status.NOT_FINITE]


def test_the_step_fits_each_problem_of_a_batch() -> None:
    scales = torch.tensor([1e-4, 1.0, 1e4], dtype=F64)[:, None, None]
    symmetric = contraction(3, 6, 0.5) + contraction(3, 6, 0.5).mT
    for A, is_symmetric in ((scales * contraction(3, 6, 0.5), False), (scales * symmetric, True)):
        found = solve_linear(
            Neumann(2000), DenseOperator(A, symmetric=is_symmetric), right(3, 6), Tolerance().linear(F64)
        )
        assert found.status.tolist()[1:] == [Status.CONVERGED] * 2
        # 1e-4·A is a contraction's I − ∂T that is all but singular at step one: slow there, and said to be.
        assert found.status.tolist()[0] in ((Status.CONVERGED,) if is_symmetric else (Status.BUDGET_SPENT,))


def test_a_divergent_series_keeps_its_best_part_and_its_neighbour_converges() -> None:
    A = torch.stack([torch.eye(3, dtype=F64), -torch.eye(3, dtype=F64)])
    b = right(2, 3)
    found = solve_linear(Neumann(500, step=0.5), DenseOperator(A, symmetric=True), b, Tolerance().linear(F64))
    assert found.status.tolist() == [Status.CONVERGED, Status.DIVERGED]
    assert bool((found.residual_norm <= b.norm(dim=-1) * (1 + 1e-12)).all())
