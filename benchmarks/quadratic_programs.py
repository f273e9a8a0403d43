"""Quadratic programs, forward and backward: 128 small dense ones, and a sparse one of 2,000 unknowns beside Clarabel alone.

Run ``python -m benchmarks.quadratic_programs``. Peers are timed where they can be imported: qpth, cvxpylayers, JAXopt. Wall time and the time of the
process on all cores are both printed: the first is noisy on a busy machine. Ratios are of the second, round by round.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable

import numpy as np
import scipy.sparse as sp
import torch

import bilevel
from benchmarks import jaxopt_peers
from benchmarks.quadratic_program_floor import Floor

F64 = torch.float64


def compare(contestants: dict[str, Callable[[], object]], floor: str, count: int) -> None:
    """Time all once in each round. Print medians of wall time and of process time, and of the ratios of process times to ``floor``'s."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for turn in range(-2, count):
        for name, function in contestants.items():
            begin, cpu = time.perf_counter(), time.process_time()
            function()
            if turn >= 0:
                taken[name].append((1e3 * (time.perf_counter() - begin), 1e3 * (time.process_time() - cpu)))
    for name, times in taken.items():
        wall, process = (statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(mine[1] / base[1] for mine, base in zip(times, taken[floor], strict=True))
        print(f"  {name:44s} {wall:9.2f} ms wall {process:9.2f} ms process, ratio {ratio:.2f}")


def small_programs(batch: int, n: int, m: int) -> dict[str, torch.Tensor]:
    """The programs of OptNet's benchmark: Q = LLᵀ + 1e-3 I, random inequalities with a feasible point."""
    factor = torch.rand(batch, n, n, dtype=F64)
    G = torch.randn(batch, m, n, dtype=F64)
    inside, slack = torch.randn(batch, n, dtype=F64), torch.rand(batch, m, dtype=F64)
    return {
        "Q": factor @ factor.mT + 1e-3 * torch.eye(n, dtype=F64), "q": torch.randn(batch, n, dtype=F64), "G": G,
        "h": (G @ inside.unsqueeze(-1)).squeeze(-1) + slack,
    }  # fmt: skip


def dense(batch: int, n: int, m: int, rounds: int) -> None:
    """Time the dense batch."""
    data = small_programs(batch, n, m)
    leaves = {name: t.clone().requires_grad_() for name, t in data.items()}

    def both() -> None:
        bilevel.quadratic_program(**leaves).sum().backward()

    print(
        f"\n{batch} programs, n = {n}, m = {m}, forward and backward ({rounds} rounds, {torch.get_num_threads()} threads)"
    )
    solution = bilevel.quadratic_program.solve(**data)
    print(
        f"  largest relative residual {float(solution.report.residual_norm.max()):.1e}, steps {int(solution.report.iterations.max())}"
    )
    contestants: dict[str, Callable[[], object]] = {
        "a floor by hand, forward and backward": lambda: Floor.apply(*leaves.values()).sum().backward(),
        "bilevel, forward and backward": both,
        "bilevel, forward": lambda: bilevel.quadratic_program(**data),
    }
    error = (Floor.apply(*data.values()) - solution.value).abs().max()
    print(f"  the floor's x differs by up to {float(error):.0e}")
    if importlib.util.find_spec("qpth"):
        from qpth.qp import QPFunction

        none = torch.zeros(0, dtype=F64)

        def theirs() -> None:
            QPFunction(verbose=-1)(leaves["Q"], leaves["q"], leaves["G"], leaves["h"], none, none).sum().backward()

        contestants["qpth, forward and backward"] = theirs
    if importlib.util.find_spec("cvxpylayers"):
        layer = cvxpy_layer(n, m)
        root = torch.linalg.cholesky(data["Q"]).mT.contiguous().requires_grad_()
        contestants["cvxpylayers, forward and backward"] = lambda: (
            layer(root, *list(leaves.values())[1:])[0].sum().backward()
        )
    if jaxopt_peers.INSTALLED:
        for tol in (1e-3, 1e-6):
            peer = jaxopt_peers.quadratic_programs(data, tol)
            print(
                f"  JAXopt's OSQP, tol {tol:.0e}: x differs by up to {float((peer() - solution.value).abs().max()):.0e}"
            )
            contestants[f"JAXopt's OSQP, tol {tol:.0e}, forward and backward"] = peer
    compare(contestants, "a floor by hand, forward and backward", rounds)


def cvxpy_layer(n: int, m: int) -> Callable[..., tuple[torch.Tensor, ...]]:
    """The same programs for cvxpylayers, whose parameter is the root of Q."""
    import cvxpy as cp
    from cvxpylayers.torch import CvxpyLayer

    x, root, q, G, h = cp.Variable(n), cp.Parameter((n, n)), cp.Parameter(n), cp.Parameter((m, n)), cp.Parameter(m)
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(root @ x) + q @ x), [G @ x <= h])
    return CvxpyLayer(problem, parameters=[root, q, G, h], variables=[x])


def sparse(n: int, rounds: int) -> None:
    """Time a sparse program, derivative included, beside Clarabel alone."""
    import clarabel

    rng = np.random.default_rng(0)
    m = n // 2
    M = sp.random(n, n, density=3 / n, rng=rng, data_rvs=rng.standard_normal)
    Q = (M @ M.T + 1e-1 * sp.eye(n)).tocoo()
    G = sp.random(m, n, density=5 / n, rng=rng, data_rvs=rng.standard_normal).tocoo()
    q, inside = rng.standard_normal(n), rng.standard_normal(n)
    h = G @ inside + 0.1 * rng.uniform(size=m)
    low, up = inside - 1, inside + 1
    P, rows = sp.triu(Q).tocsc(), sp.vstack([G, -sp.eye(n), sp.eye(n)]).tocsc()
    side = np.concatenate([h, -low, up])
    settings = clarabel.DefaultSettings()
    settings.verbose = False

    def alone() -> object:
        return clarabel.DefaultSolver(P, q, rows, side, [clarabel.NonnegativeConeT(len(side))], settings).solve()

    def tensor(matrix: sp.coo_matrix) -> torch.Tensor:
        places = torch.from_numpy(np.stack([matrix.row, matrix.col]).astype(np.int64))
        return torch.sparse_coo_tensor(places, torch.from_numpy(matrix.data), matrix.shape).coalesce().requires_grad_()

    leaves = [torch.from_numpy(v).requires_grad_() for v in (q, h, low, up)]
    matrices = tensor(Q), tensor(G)

    def both() -> None:
        x = bilevel.quadratic_program(
            matrices[0], leaves[0], G=matrices[1], h=leaves[1], lower=leaves[2], upper=leaves[3]
        )
        x.sum().backward()

    print(f"\nA sparse program, n = {n}, m = {m} and bounds ({rounds} rounds)")
    compare({"Clarabel alone": alone, "bilevel, forward and backward": both}, "Clarabel alone", rounds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dense(128, 20, 20, options.rounds)
    sparse(2000, options.rounds)
