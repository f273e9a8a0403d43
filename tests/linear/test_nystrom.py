"""Nyström's approximation beside the formula of the paper, dense; its residual; and as a preconditioner."""

from __future__ import annotations

import pytest
import torch
from torch.func import jacrev

import bilevel
from bilevel import Status, Tolerance
from bilevel.linear._base import solve_linear
from bilevel.operators import DenseOperator, FunctionOperator, RepeatedOperator

F64 = torch.float64


def decaying(batch: int, n: int, seed: int = 0) -> torch.Tensor:
    Q = torch.linalg.qr(torch.randn(batch, n, n, generator=torch.Generator().manual_seed(seed), dtype=F64))[0]
    return Q @ torch.diag_embed(torch.logspace(2, -3, n, dtype=F64).expand(batch, n)) @ Q.mT


def right(batch: int, n: int) -> torch.Tensor:
    return torch.randn(batch, n, generator=torch.Generator().manual_seed(1), dtype=F64)


@pytest.mark.parametrize(("n", "rank"), [(12, 5), (6, 6), (4, 20)])
def test_the_paper_s_formula(n: int, rank: int) -> None:
    H, b, rho = decaying(3, n), right(3, n), 0.3
    found = solve_linear(
        bilevel.Nystrom(rank, rho, seed=2), DenseOperator(H, symmetric=True), b, Tolerance(delta_prime=None).linear(F64)
    )
    chosen = torch.randperm(n, generator=torch.Generator().manual_seed(2))[:rank]
    C, W = H[:, :, chosen], H[:, chosen][:, :, chosen]
    small = torch.linalg.solve(W + C.mT @ C / rho, C.mT @ b.unsqueeze(-1))
    expected = b / rho - (C @ small).squeeze(-1) / rho**2
    torch.testing.assert_close(found.x, expected, rtol=1e-7, atol=1e-8)
    assert found.status.tolist() == [Status.BUDGET_SPENT] * 3
    torch.testing.assert_close(found.residual_norm, (b - (H @ found.x.unsqueeze(-1)).squeeze(-1)).norm(dim=-1))


def test_an_accuracy_that_was_asked_and_not_reached_is_a_failure() -> None:
    H, b = decaying(1, 12), right(1, 12)
    found = solve_linear(
        bilevel.Nystrom(3, 0.1), DenseOperator(H, symmetric=True), b, Tolerance(delta_prime=1e-6).linear(F64)
    )
    assert not Status(int(found.status[0])).success


def test_columns_are_made_once_for_all_right_hand_sides() -> None:
    H, products = decaying(1, 30), []

    def apply(v: torch.Tensor) -> torch.Tensor:
        products.append(1)
        return (H @ v.unsqueeze(-1)).squeeze(-1)

    operator = FunctionOperator(apply, torch.zeros(1, 30, dtype=F64), symmetric=True)
    solver, silent = bilevel.Nystrom(7, 0.1), Tolerance(delta_prime=None).linear(F64)
    for _ in range(3):
        solve_linear(solver, operator, right(1, 30), silent, seen=False)
    assert len(products) == 7
    many = solve_linear(solver, RepeatedOperator(operator, 4), right(4, 30), silent)
    torch.testing.assert_close(many.x[:1], solve_linear(solver, operator, right(4, 30)[:1], silent).x)


def test_as_a_preconditioner_it_saves_steps_and_has_no_bias() -> None:
    n = 200
    Q = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=F64))[0]
    spectrum = torch.cat([torch.logspace(6, 2, 20, dtype=F64), torch.linspace(1, 2, n - 20, dtype=F64)])
    H, b = (Q * spectrum @ Q.mT).unsqueeze(0), right(1, n)
    operator, target = DenseOperator(H, symmetric=True), Tolerance().linear(F64)
    plain = solve_linear(bilevel.CG(), operator, b, target)
    helped = solve_linear(bilevel.CG(preconditioner=bilevel.Nystrom(80, 1.0)), operator, b, target)
    exact = torch.linalg.solve(H, b.unsqueeze(-1)).squeeze(-1)
    assert float((helped.x - exact).norm() / exact.norm()) < 1e-9
    assert int(helped.iterations) < 0.7 * int(plain.iterations)


def test_in_a_layer() -> None:
    X = torch.randn(40, 5, generator=torch.Generator().manual_seed(0), dtype=F64)
    y = torch.linspace(-1, 1, 40, dtype=F64)

    def ridge(w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ((X @ w - y) ** 2).sum() + (w**2).sum()

    exact = jacrev(lambda y: bilevel.argmin(ridge)(torch.zeros(5, dtype=F64), y))(y)
    tolerance = Tolerance(delta_prime=None)
    for solver, how in ((bilevel.Nystrom(5, 1e-8), 1e-6), (bilevel.CG(preconditioner=bilevel.Nystrom(3, 1.0)), 1e-9)):
        layer = bilevel.argmin(ridge, linear_solver=solver, tolerance=tolerance)
        torch.testing.assert_close(
            jacrev(lambda y, layer=layer: layer(torch.zeros(5, dtype=F64), y))(y), exact, rtol=how, atol=how
        )


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="expected rank"):
        bilevel.Nystrom(0)
    with pytest.raises(ValueError, match="expected rho"):
        bilevel.Nystrom(rho=0.0)
    with pytest.raises(ValueError, match="expected a symmetric"):
        bilevel.Nystrom()(DenseOperator(torch.eye(3)), torch.ones(1, 3))
    with pytest.raises(ValueError, match="expected preconditioner"):
        bilevel.CG(preconditioner=bilevel.Exact())  # type: ignore[arg-type]
