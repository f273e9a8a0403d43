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
        data = [torch.tensor(part) for part in (q / unit, A / unit, A @ z, G / unit, G @ z + slack)]
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
