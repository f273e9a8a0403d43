"""Quadratic programs for tests: random ones, OSQP's classes from their description (Stellato et al. 2020, appendix A), and references."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch

Data = dict[str, torch.Tensor]
F64 = torch.float64


def tensor(array: Any) -> torch.Tensor:
    return torch.as_tensor(np.asarray(array, dtype=np.float64))


def random_program(n: int, p: int, m: int, *batch: int, bounds: bool = True) -> Data:
    """A strictly convex program with a feasible point inside, in general position."""
    factor = torch.randn(*batch, n, n, dtype=F64)
    inside = torch.randn(*batch, n, dtype=F64)
    A, G = torch.randn(*batch, p, n, dtype=F64), torch.randn(*batch, m, n, dtype=F64)
    data = {
        "Q": factor @ factor.mT / n + 0.1 * torch.eye(n, dtype=F64), "q": 3 * torch.randn(*batch, n, dtype=F64),
        "A": A, "b": (A @ inside.unsqueeze(-1)).squeeze(-1),
        "G": G, "h": (G @ inside.unsqueeze(-1)).squeeze(-1) + torch.rand(*batch, m, dtype=F64),
    }  # fmt: skip
    if bounds:
        data["lower"] = inside - 0.5 * torch.rand(*batch, n, dtype=F64)
        data["upper"] = inside + 0.5 * torch.rand(*batch, n, dtype=F64)
    return data


def integer_program(n: int, seed: int, linear: bool = False) -> Data:
    """Small integers make ties, duplicated rows, empty interiors and weakly active constraints."""
    rng = np.random.default_rng(seed)
    G = tensor(rng.integers(-1, 2, (2 * n, n)))
    inside = tensor(rng.integers(-1, 2, n))
    root = tensor(rng.integers(-1, 2, (n, n)))
    data = {
        "Q": torch.zeros(n, n, dtype=F64) if linear else root.T @ root, "q": tensor(rng.integers(-2, 3, n)),
        "G": torch.cat([G, G[:1]]), "h": torch.cat([G, G[:1]]) @ inside + tensor(rng.integers(0, 2, 2 * n + 1)),
        "lower": inside - tensor(rng.integers(0, 2, n)), "upper": inside + tensor(rng.integers(0, 3, n)),
    }  # fmt: skip
    data["h"][-1] = data["h"][0]
    return data


def by_clarabel(data: Data) -> torch.Tensor:
    """The solution of one program by Clarabel, as exactly as it can."""
    clarabel = pytest.importorskip("clarabel", reason="Clarabel is the reference, and is not installed")
    n = data["q"].shape[-1]
    rows, sides, cones = [], [], []
    if "A" in data and data["A"].shape[0]:
        rows.append(data["A"].numpy())
        sides.append(data["b"].numpy())
        cones.append(clarabel.ZeroConeT(len(sides[-1])))
    blocks = [(data["G"].numpy(), data["h"].numpy())] if "G" in data and data["G"].shape[0] else []
    blocks += [(-np.eye(n), -data["lower"].numpy())] if "lower" in data else []
    blocks += [(np.eye(n), data["upper"].numpy())] if "upper" in data else []
    for matrix, side in blocks:
        kept = np.isfinite(side)
        rows.append(matrix[kept])
        sides.append(side[kept])
        cones.append(clarabel.NonnegativeConeT(int(kept.sum())))
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-12
    settings.reduced_tol_gap_abs = settings.reduced_tol_gap_rel = settings.reduced_tol_feas = 1e-9
    matrix = sp.csc_matrix(np.vstack(rows) if rows else np.zeros((0, n)))
    side = np.concatenate(sides) if sides else np.zeros(0)
    solver = clarabel.DefaultSolver(
        sp.triu(sp.csc_matrix(data["Q"].numpy())).tocsc(), data["q"].numpy(), matrix, side, cones, settings
    )
    return tensor(solver.solve().x)


def objective(data: Data, x: torch.Tensor) -> float:
    return float(0.5 * x @ data["Q"] @ x + data["q"] @ x)


def from_osqp(P: Any, q: Any, A: Any, low: Any, up: Any) -> Data:
    """min ½xᵀPx + qᵀx, low ≤ Ax ≤ up, in our form: equations where the sides agree, two inequalities where not."""
    P, A = np.asarray(P.todense()), np.asarray(A.todense())
    same = low == up
    G = np.vstack([A[~same], -A[~same]])
    h = np.concatenate([up[~same], -low[~same]])
    return {name: tensor(v) for name, v in (("Q", P), ("q", q), ("A", A[same]), ("b", up[same]), ("G", G), ("h", h))}


def _random_qp(rng: np.random.Generator, n: int = 15) -> Data:
    m = 5 * n
    M = sp.random(n, n, density=0.5, rng=rng, data_rvs=rng.standard_normal)
    A = sp.random(m, n, density=0.5, rng=rng, data_rvs=rng.standard_normal)
    return from_osqp(M @ M.T + 1e-2 * sp.eye(n), rng.standard_normal(n), A, -rng.uniform(size=m), rng.uniform(size=m))


def _equality_qp(rng: np.random.Generator, n: int = 20) -> Data:
    m = n // 2
    M = sp.random(n, n, density=0.5, rng=rng, data_rvs=rng.standard_normal)
    A = sp.random(m, n, density=0.8, rng=rng, data_rvs=rng.standard_normal)
    side = rng.standard_normal(m)
    return from_osqp(M @ M.T + 1e-2 * sp.eye(n), rng.standard_normal(n), A, side, side)


def _portfolio(rng: np.random.Generator, k: int = 2, n: int = 20) -> Data:
    F = sp.random(n, k, density=0.8, rng=rng, data_rvs=rng.standard_normal)
    D = sp.diags(rng.uniform(0.1, 1.0, n) * np.sqrt(k))
    P = sp.block_diag([2 * D, 2 * sp.eye(k)])
    A = sp.bmat([[F.T, -sp.eye(k)], [np.ones((1, n)), None], [sp.eye(n), None]])
    low = np.concatenate([np.zeros(k), [1.0], np.zeros(n)])
    up = np.concatenate([np.zeros(k), [1.0], np.full(n, np.inf)])
    return from_osqp(P, np.concatenate([-rng.standard_normal(n), np.zeros(k)]), A, low, up)


def _lasso(rng: np.random.Generator, n: int = 8, m: int = 24) -> Data:
    Ad = sp.random(m, n, density=0.6, rng=rng, data_rvs=rng.standard_normal)
    truth = rng.standard_normal(n) * (rng.uniform(size=n) < 0.5) / np.sqrt(n)
    side = Ad @ truth + rng.standard_normal(m)
    strength = 0.2 * np.abs(Ad.T @ side).max()
    P = sp.block_diag([sp.csc_matrix((n, n)), 2 * sp.eye(m), sp.csc_matrix((n, n))])
    q = np.concatenate([np.zeros(n + m), strength * np.ones(n)])
    eye, none = sp.eye(n), None
    A = sp.bmat([[Ad, -sp.eye(m), none], [eye, none, -eye], [eye, none, eye]])
    inf = np.full(n, np.inf)
    return from_osqp(P, q, A, np.concatenate([side, -inf, np.zeros(n)]), np.concatenate([side, np.zeros(n), inf]))


def _svm(rng: np.random.Generator, n: int = 6, m: int = 30) -> Data:
    labels = np.where(np.arange(m) < m // 2, 1.0, -1.0)
    points = rng.standard_normal((m, n)) / np.sqrt(n) + labels[:, None] / n
    P = sp.block_diag([sp.eye(n), sp.csc_matrix((m, m))])
    A = sp.bmat([[sp.csc_matrix(-labels[:, None] * points), -sp.eye(m)], [None, sp.eye(m)]])
    low = np.concatenate([np.full(m, -np.inf), np.zeros(m)])
    up = np.concatenate([-np.ones(m), np.full(m, np.inf)])
    return from_osqp(P, np.concatenate([np.zeros(n), np.ones(m)]), A, low, up)


def _huber(rng: np.random.Generator, n: int = 5, m: int = 20) -> Data:
    Ad = sp.random(m, n, density=0.8, rng=rng, data_rvs=rng.standard_normal)
    noise = np.where(rng.uniform(size=m) < 0.95, 0.25 * rng.standard_normal(m), rng.uniform(0, 10, m))
    side = Ad @ (rng.standard_normal(n) / np.sqrt(n)) + noise
    eye = sp.eye(m)
    P = sp.block_diag([sp.csc_matrix((n, n)), 2 * eye, sp.csc_matrix((2 * m, 2 * m))])
    q = np.concatenate([np.zeros(n + m), 2 * np.ones(2 * m)])
    A = sp.bmat([[Ad, -eye, -eye, eye], [None, None, eye, None], [None, None, None, eye]])
    up = np.concatenate([side, np.full(2 * m, np.inf)])
    return from_osqp(P, q, A, np.concatenate([side, np.zeros(2 * m)]), up)


def _control(rng: np.random.Generator, nx: int = 4, nu: int = 2, T: int = 5) -> Data:
    Ad = np.eye(nx) + 0.1 * rng.standard_normal((nx, nx))
    Ad /= max(1.0, np.abs(np.linalg.eigvals(Ad)).max())
    Bd = rng.standard_normal((nx, nu))
    Qx = sp.diags(rng.uniform(0, 10, nx) * (rng.uniform(size=nx) < 0.7))
    P = sp.block_diag([sp.kron(sp.eye(T + 1), Qx), sp.kron(sp.eye(T), 0.1 * sp.eye(nu))])
    dynamics = sp.hstack(
        [
            sp.kron(sp.eye(T + 1), -sp.eye(nx)) + sp.kron(sp.eye(T + 1, k=-1), Ad),
            sp.kron(sp.vstack([np.zeros((1, T)), np.eye(T)]), Bd),
        ]
    )
    limit = np.concatenate([np.tile(rng.uniform(1, 2, nx), T + 1), np.tile(rng.uniform(0, 0.1, nu), T)])
    start = np.concatenate([-0.5 * rng.uniform(-1, 1, nx), np.zeros(T * nx)])
    A = sp.vstack([dynamics, sp.eye(P.shape[0])])
    return from_osqp(P, np.zeros(P.shape[0]), A, np.concatenate([start, -limit]), np.concatenate([start, limit]))


OSQP_CLASSES = {
    "random QP": _random_qp, "equality QP": _equality_qp, "portfolio": _portfolio, "lasso": _lasso, "SVM": _svm, "huber": _huber,
    "control": _control,
}  # fmt: skip
