"""Bounds on many unknowns: the default, and the projected quasi-Newton method by itself, beside scipy's L-BFGS-B and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse
import torch

import bilevel

F64 = torch.float64


def sparse_design(n: int, seed: int) -> tuple[scipy.sparse.csr_matrix, torch.Tensor]:
    """Return a sparse A (n/2, n) with five entries a column, and b."""
    rng = np.random.default_rng(seed)
    rows, columns = rng.integers(0, n // 2, 5 * n), np.repeat(np.arange(n), 5)
    A = scipy.sparse.csr_matrix((rng.standard_normal(5 * n), (rows, columns)), shape=(n // 2, n))
    b = A @ np.maximum(rng.standard_normal(n), 0) + 0.05 * rng.standard_normal(n // 2)
    return A, torch.as_tensor(b)


class Nonnegative:
    """½‖Ax − b‖² + ½ r‖x‖² for a sparse A, by its entries."""

    def __init__(self, A: scipy.sparse.csr_matrix) -> None:
        entries = A.tocoo()
        self.rows, self.columns = (torch.as_tensor(part.astype(np.int64)) for part in (entries.row, entries.col))
        self.values, self.height = torch.as_tensor(entries.data), A.shape[0]

    def __call__(self, x: torch.Tensor, b: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        product = x.new_zeros(self.height).index_add(0, self.rows, self.values * x[self.columns])
        return 0.5 * ((product - b) ** 2).sum() + 0.5 * r * (x * x).sum()


def test_nonnegative_least_squares_with_a_sparse_design_and_its_derivative() -> None:
    n, r = 1500, 0.05
    A, b = sparse_design(n, 0)
    b.requires_grad_()
    layer = bilevel.argmin(Nonnegative(A), lower=0.0)
    found = layer.solve(torch.zeros(n, dtype=F64), b, torch.tensor(r, dtype=F64))
    x, target = found.value.detach().numpy(), b.detach().numpy()
    reference = scipy.optimize.minimize(
        lambda z: (0.5 * ((A @ z - target) ** 2).sum() + 0.5 * r * z @ z, A.T @ (A @ z - target) + r * z),
        np.zeros(n), jac=True, method="L-BFGS-B", bounds=[(0, None)] * n,
        options={"maxiter": 20_000, "maxfun": 40_000, "ftol": 1e-16, "gtol": 1e-10, "maxcor": 20},
    )  # fmt: skip
    assert np.abs(x - reference.x).max() < 1e-5
    # The optimality conditions, which scipy's answer fulfils less exactly.
    slope = A.T @ (A @ x - target) + r * x
    assert np.abs(x - np.maximum(x - slope, 0)).max() < 1e-11
    free = x > 0
    weights = np.random.default_rng(1).standard_normal(n)
    (gradient,) = torch.autograd.grad((torch.as_tensor(weights) * found.value).sum(), b)
    part = A[:, free].toarray()
    expected = part @ np.linalg.solve(part.T @ part + r * np.eye(part.shape[1]), weights[free])
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("history", [3, 10])
def test_boxes_fixed_unknowns_and_a_batch(history: int) -> None:
    n = 40
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(3, n, n, generator=generator, dtype=F64)
    Q, q = root @ root.mT / n + 0.05 * torch.eye(n, dtype=F64), torch.randn(3, n, generator=generator, dtype=F64)
    lower = torch.where(torch.arange(n) % 4 == 0, -torch.inf, -0.3).to(F64)
    upper = torch.where(torch.arange(n) % 5 == 0, torch.inf, 0.2).to(F64)
    lower[7] = upper[7] = 0.1
    solver = bilevel.ProjectedLBFGS(history=history)
    layer = bilevel.argmin(
        lambda x, Q, q: 0.5 * x @ Q @ x + q @ x + 0.1 * (x**4).sum(), lower=lower, upper=upper, solver=solver
    )
    found = torch.func.vmap(layer.solve, in_dims=(None, 0, 0))(torch.zeros(n, dtype=F64), Q, q)
    assert bool(found.report.converged.all())
    for k in range(3):
        reference = scipy.optimize.minimize(
            lambda z, k=k: (
                0.5 * z @ Q[k].numpy() @ z + q[k].numpy() @ z + 0.1 * (z**4).sum(),
                Q[k].numpy() @ z + q[k].numpy() + 0.4 * z**3,
            ),
            np.clip(np.zeros(n), lower.numpy(), upper.numpy()), jac=True, method="L-BFGS-B",
            bounds=list(zip(lower.tolist(), upper.tolist(), strict=True)), options={"ftol": 1e-16, "gtol": 1e-10, "maxiter": 5000},
        )  # fmt: skip
        assert np.abs(found.value[k].numpy() - reference.x).max() < 1e-6
    assert bool((found.value[:, 7] == 0.1).all())


def test_a_factorisation_into_nonnegative_matrices_is_stationary() -> None:
    generator = torch.Generator().manual_seed(0)
    W, H = (torch.rand(*shape, generator=generator, dtype=F64) for shape in ((60, 5), (5, 50)))
    V = W @ H + 0.05 * torch.rand(60, 50, generator=generator, dtype=F64)

    def loss(parts: dict[str, torch.Tensor], V: torch.Tensor) -> torch.Tensor:
        return 0.5 * ((parts["W"] @ parts["H"] - V) ** 2).sum() + 0.05 * sum((p * p).sum() for p in parts.values())

    start = {
        "W": torch.rand(60, 5, generator=generator, dtype=F64),
        "H": torch.rand(5, 50, generator=generator, dtype=F64),
    }
    layer = bilevel.argmin(loss, lower=0.0, on_failure="ignore")
    found = layer.solve(start, V)
    assert bool(found.report.converged)
    for name, other in (("W", "H"), ("H", "W")):
        parts = {key: value.detach().requires_grad_(key == name) for key, value in found.value.items()}
        (slope,) = torch.autograd.grad(loss(parts, V), parts[name])
        x = found.value[name]
        assert float((x - (x - slope).clamp_min(0)).abs().max()) < 1e-8, other


def test_what_has_no_solution_is_named() -> None:
    solver = bilevel.ProjectedLBFGS()
    layer = bilevel.argmin(lambda x, a: (a * x).sum(), lower=0.0, solver=solver)
    with pytest.raises(bilevel.SolveError, match="falls without end") as caught:
        layer(torch.zeros(3, dtype=F64), torch.tensor([1.0, -1.0, 1.0], dtype=F64))
    assert int(caught.value.report.iterations.max()) < 100  # steps grow: by one per cent of x each, it took 2,777
    with pytest.raises(bilevel.ArgumentError, match="history"):
        bilevel.ProjectedLBFGS(history=0)
    few = bilevel.argmin(
        lambda x, a: ((x - a) ** 4).sum(), lower=0.0, solver=bilevel.ProjectedLBFGS(max_steps=2), on_failure="ignore"
    )
    assert not bool(few.solve(torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64)).report.converged)
