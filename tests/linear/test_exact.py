"""The factorising solver on matrices whose rows and columns come in units of very different sizes."""

from __future__ import annotations

import pytest
import torch

import bilevel
from bilevel.linear._base import solve_linear
from bilevel.linear.exact import Exact
from bilevel.operators import DenseOperator, RepeatedOperator
from bilevel.reports import Status
from bilevel.tolerance import Tolerance

KINDS = ("positive definite", "indefinite", "general")


def matrices(kind: str, n: int, dtype: torch.dtype) -> torch.Tensor:
    A = torch.randn(3, n, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    if kind == "positive definite":
        A = A @ A.mT + torch.eye(n, dtype=torch.float64)
    elif kind == "indefinite":
        A = A + A.mT
    return A.to(dtype)


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize(("dtype", "decades"), [(torch.float64, 6), (torch.float32, 3)])
@pytest.mark.parametrize("n", [2, 5, 12])
@pytest.mark.parametrize("kind", KINDS)
def test_units_are_not_taken_for_singularity(kind: str, n: int, dtype: torch.dtype, decades: int, repeats: int) -> None:
    A = matrices(kind, n, dtype)
    rows = 10 ** torch.linspace(-decades, decades, n, dtype=dtype)
    columns = rows.flip(0) if kind == "general" else rows
    b = torch.randn(repeats * 3, n, generator=torch.Generator().manual_seed(1), dtype=dtype)
    operator = DenseOperator(rows[:, None] * A * columns, symmetric=kind != "general")
    target = Tolerance().linear(dtype)
    outcome = solve_linear(Exact(), RepeatedOperator(operator, repeats) if repeats > 1 else operator, b, target)
    assert bool((outcome.status == Status.CONVERGED).all())
    wide, right = A.double().repeat(repeats, 1, 1), (b / rows).double()
    reference = torch.linalg.solve(wide, right) / columns.double()
    condition = torch.linalg.cond(wide).amax()
    error = ((outcome.x - reference).abs().amax(-1) / reference.abs().amax(-1)).amax()
    assert error <= 50 * torch.finfo(dtype).eps * condition


@pytest.mark.parametrize("kind", KINDS)
def test_units_do_not_hide_singularity(kind: str) -> None:
    A = matrices(kind, 6, torch.float64)
    A[..., 5] = A[..., 4]
    A[..., 5, :] = A[..., 4, :]
    rows = 2.0 ** torch.linspace(-20, 20, 6, dtype=torch.float64).round()
    b = torch.ones(3, 6, dtype=torch.float64)
    operator = DenseOperator(rows[:, None] * A * rows, symmetric=kind != "general")
    outcome = solve_linear(Exact(), operator, b, Tolerance().linear(torch.float64))
    assert bool((outcome.status == Status.SINGULAR).all())


def test_what_is_ill_conditioned_in_any_units_does_not_excuse_its_residual() -> None:
    # x = A⁻¹b has run away along what is all but a null vector, and rounding hides anything there.
    Q = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    A = Q @ torch.diag(10 ** torch.linspace(0, -13, 8, dtype=torch.float64)) @ Q.mT
    units = 2.0 ** torch.linspace(-15, 15, 8, dtype=torch.float64).round()
    b = torch.ones(1, 8, dtype=torch.float64)
    for matrix in (A, units[:, None] * A * units):
        for symmetric in (True, False):
            operator = DenseOperator(0.5 * (matrix + matrix.mT), symmetric=symmetric)
            outcome = solve_linear(Exact(), operator, b, Tolerance().linear(torch.float64))
            assert not bool((outcome.status == Status.CONVERGED).any())


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_regular_matrix_in_single_precision_has_the_residual_of_its_rounding(seed: int) -> None:
    """Of equations in units from 1e-6 to 1e4, the largest hide in their rounding what the smallest say."""
    draws = torch.Generator().manual_seed(seed)
    Q, P = (torch.linalg.qr(torch.randn(8, 8, generator=draws, dtype=torch.float64)).Q for _ in range(2))
    units = torch.logspace(-6, 4, 8, dtype=torch.float64)
    A = (units[:, None] * (Q @ torch.diag(torch.logspace(0, -3.8, 8, dtype=torch.float64)) @ P)).float()
    b = torch.ones(1, 8)
    right = torch.linalg.solve(A.double(), b[0].double())
    outcome = solve_linear(Exact(), DenseOperator(A[None], symmetric=False), b, Tolerance().linear(torch.float32))
    assert Status(int(outcome.status)) is Status.CONVERGED
    assert float((outcome.x[0].double() - right).abs().max() / right.abs().max()) < 1e-4


def test_ridge_regression_in_its_own_units() -> None:
    # Features in micrometres and in light years: the solution and its derivatives are those of sensible units, rescaled.
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(30, generator=generator, dtype=torch.float64)
    units = torch.tensor([1e-7, 1e-2, 1e2, 1e7], dtype=torch.float64)

    def ridge(w: torch.Tensor, t: torch.Tensor, X: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
        return 0.5 * ((X @ w - y) ** 2).sum() + 0.5 * (t.exp() * (units * w) ** 2).sum()

    def solved(units: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        t = torch.zeros(4, dtype=torch.float64, requires_grad=True)
        layer = bilevel.argmin(ridge, linear_solver=bilevel.Exact())
        w = layer(torch.zeros(4, dtype=torch.float64), t, X * units, units)
        return (units * w).detach(), torch.autograd.grad((units * w).sin().sum(), t)[0]

    for mine, plain in zip(solved(units), solved(torch.ones_like(units)), strict=True):
        torch.testing.assert_close(mine, plain, atol=1e-9, rtol=1e-9)
