"""Quadratic and linear programs in other units of the objective, of the unknowns and of the rows have the same solution."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import bilevel
from bilevel.quadratic_programs._balance import balance, sparse_balance

F64 = torch.float64
UNITS = [
    (1e-13, 1, 1), (1e13, 1, 1), (1, 1e-7, 1), (1, 1e7, 1), (1, 1, 1e-6), (1e-8, 1e6, 1e6), (1e8, 1e-6, 1e-6), (1e-8, 1, 1e6), (1e-6, 1e7, 1),
]  # fmt: skip


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("units", UNITS, ids=str)
@pytest.mark.parametrize("quadratic", [True, False])
def test_units_do_not_matter(quadratic: bool, units: tuple[float, float, float], sparse: bool) -> None:
    """min ½‖z‖² − (1, 2, −1)·z, or without the square, where z₀ + z₁ + z₂ = 1, z₀ − z₂ ≤ 1, z ≥ −1."""
    if sparse:
        pytest.importorskip("clarabel")
    of_f, of_x, of_row = units
    Q = quadratic * torch.eye(3, dtype=F64) * of_f / of_x**2
    A, G = torch.ones(1, 3, dtype=F64) * of_row / of_x, tensor(1, 0, -1).unsqueeze(0) / of_x
    b, h = tensor(1.0).requires_grad_(), tensor(1.0).requires_grad_()
    matrices = [matrix.to_sparse() if sparse else matrix for matrix in (Q, A, G)]
    q = tensor(-1, -2, 1) * of_f / of_x
    x = bilevel.quadratic_program(
        matrices[0], q, matrices[1], b * of_row, matrices[2], h, lower=tensor(-1, -1, -1) * of_x
    )
    z = x / of_x
    torch.testing.assert_close(z.detach(), tensor(1 / 6, 5 / 3, -5 / 6) if quadratic else tensor(-1, 3, -1))
    by_b, by_h = torch.autograd.grad(z @ tensor(1, 3, 7), (b, h))
    expected = (11 / 3, -3.0) if quadratic else (3.0, 0.0)
    torch.testing.assert_close(torch.cat([by_b, by_h]), tensor(*expected))


def test_a_small_objective_finds_its_constraints() -> None:
    """A wrong active set violates the conditions by about q, which is tiny."""
    generator, (n, p, m), unit = np.random.default_rng(754), (4, 2, 4), 1e6
    for _ in range(20):
        A, G, z = (generator.standard_normal(shape) for shape in ((p, n), (m, n), n))
        weight = np.concatenate([generator.uniform(0.2, 2, n - p), np.zeros(m - n + p)])
        slack = np.concatenate([np.zeros(n - p), generator.uniform(0.2, 2, m - n + p)])
        q = -1e-6 * (G.T @ weight + A.T @ generator.standard_normal(p))
        data = [torch.tensor(part) for part in (q / unit, A, unit * (A @ z), G, unit * (G @ z + slack))]
        x = bilevel.quadratic_program(torch.zeros(n, n, dtype=F64), *data)
        torch.testing.assert_close(x / unit, torch.tensor(z))


def test_the_two_balances_agree() -> None:
    scipy_sparse = pytest.importorskip("scipy.sparse")
    generator = np.random.default_rng(0)
    for _ in range(5):
        sizes, rows = 10 ** generator.uniform(-6, 6, 5), 10 ** generator.uniform(-6, 6, (3, 1))
        L, E = generator.standard_normal((5, 5)), generator.standard_normal((3, 5)) * sizes * rows
        Q = 1e-9 * (L @ L.T) * sizes * sizes[:, None]
        dense = balance(torch.tensor(Q).unsqueeze(0), torch.tensor(E).unsqueeze(0))[0]
        sparse = sparse_balance(scipy_sparse.csr_matrix(Q), scipy_sparse.csr_matrix(E))
        np.testing.assert_allclose(dense.numpy(), sparse, rtol=1e-12)
        K = np.block([[Q, E.T], [E, np.zeros((3, 3))]]) * sparse * sparse[:, None]
        assert np.linalg.cond(K) < 1e4


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("quadratic", [False, True], ids=["linear", "quadratic"])
def test_every_row_and_unknown_has_units_of_its_own(quadratic: bool, sparse: bool) -> None:
    """A vertex moves with its rows alone. Units that make the largest entries one leave these rows dependent in all but rounding."""
    if sparse:
        pytest.importorskip("clarabel")
    n, m = 5, 8
    for seed in range(8):
        generator = np.random.default_rng(seed)
        G, z = generator.standard_normal((m, n)) * (generator.random((m, n)) < 0.7), generator.standard_normal(n)
        G[:n] += 2 * np.eye(n)
        weight = np.where(np.arange(m) < n, generator.uniform(0.3, 2, m), 0.0)
        L = quadratic * generator.standard_normal((n, n))
        Q, h = L @ L.T, G @ z + np.where(weight > 0, 0.0, generator.uniform(0.3, 2, m))
        of_x, of_row, of_f = (10 ** generator.uniform(-8, 8, size) for size in (n, m, 1))
        q = torch.tensor(-of_f * (Q @ z + G.T @ weight) / of_x).requires_grad_()
        side, rows = torch.tensor(of_row * h).requires_grad_(), torch.tensor(of_row[:, None] * G / of_x)
        matrices = [torch.tensor(of_f * Q / of_x / of_x[:, None]), rows.requires_grad_()]
        given = [matrix.to_sparse() if sparse else matrix for matrix in matrices]
        x = bilevel.quadratic_program(given[0], q, G=given[1], h=side) / torch.tensor(of_x)
        np.testing.assert_allclose(x.detach(), z, atol=1e-6)
        inverse = np.linalg.inv(G[:n])
        for i in range(n):
            by_q, by_h, by_G = torch.autograd.grad(x[i], (q, side, rows), retain_graph=True)
            np.testing.assert_allclose(by_q.numpy() * of_f / of_x, 0, atol=1e-6)
            np.testing.assert_allclose((by_h.numpy() * of_row)[:n], inverse[i], atol=1e-6)
            by_entry, present = by_G.numpy() * of_row[:, None] / of_x, G[:n] != 0
            np.testing.assert_allclose(by_entry[:n][present], -np.outer(inverse[i], z)[present], atol=1e-6)


def test_problems_of_a_batch_have_their_own_units() -> None:
    """With multipliers, and on the central path too."""
    of_x, of_row = (
        torch.tensor([[1.0, 1.0], [1e-9, 1e9]], dtype=F64),
        torch.tensor([[1.0, 1.0], [1e7, 1e-8]], dtype=F64),
    )
    G, h, weight = tensor(2, 1, 0, 1).reshape(2, 2), tensor(3, 1), tensor(1, 2)
    q = (-(G.T @ weight) / of_x).requires_grad_()
    Q, rows, sides = torch.zeros(2, 2, dtype=F64), of_row.unsqueeze(-1) * G / of_x.unsqueeze(-2), of_row * h
    for smoothing in (None, 0.1):
        solution = bilevel.quadratic_program.solve(Q, q, G=rows, h=sides, smoothing=smoothing)
        x = solution.value / of_x
        torch.testing.assert_close(solution.multipliers.inequality * of_row, weight.expand(2, 2))
        # On the path the slack of a row is τ / λ.
        torch.testing.assert_close(x @ G.T, (h - (smoothing or 0) / weight).expand(2, 2))
        (by_q,) = torch.autograd.grad(x.sum(), q)
        inverse = torch.linalg.inv(G)
        expected = -(smoothing or 0) * inverse @ torch.diag(1 / weight**2) @ inverse.T
        torch.testing.assert_close(by_q / of_x, expected.sum(0).expand(2, 2))
