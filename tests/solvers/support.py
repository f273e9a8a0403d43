"""Batches of problems at the level that solvers see, each with an oracle that imports no solver of the library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.optimize
import torch
from torch.func import vmap

from bilevel.equations.problem import Problem
from bilevel.equations.system import ArgminSystem, FixedPointSystem, RootSystem, System
from bilevel.pytree import Raveler, flatten_arguments
from bilevel.reports import Status
from bilevel.solvers._base import InnerSolver
from bilevel.solvers.judging.judge import solve_inner
from bilevel.solvers.judging.outcome import InnerOutcome
from bilevel.tolerance import Tolerance

F64, F32 = torch.float64, torch.float32
Function = Callable[..., torch.Tensor]


def build(
    kind: type[System], function: Function, init: torch.Tensor, *args: torch.Tensor, batched: bool = False
) -> tuple[Problem, torch.Tensor]:
    """Return the problem and its start (batch, n); with ``batched`` every argument and ``init`` has a leading axis."""
    tensors, arguments = flatten_arguments(args, {})
    single = init[0] if batched else init
    system = kind("test", function, Raveler.of(single, "test"), arguments)
    if batched:
        system = system.lift(init.shape[0], (True,) * len(tensors))
    return Problem.of(system, tensors), init.reshape(-1, single.numel())


def solve(
    solver: InnerSolver,
    kind: type[System],
    function: Function,
    init: torch.Tensor,
    *args: torch.Tensor,
    batched: bool = False,
    tolerance: Tolerance | None = None,
) -> InnerOutcome:
    """Build and solve."""
    problem, start = build(kind, function, init, *args, batched=batched)
    return solve_inner(solver, problem, start, (tolerance or Tolerance()).inner(init.dtype))


def minimize(solver: InnerSolver, function: Function, init: torch.Tensor, *args: torch.Tensor, **how) -> InnerOutcome:
    """Solve an argmin."""
    return solve(solver, ArgminSystem, function, init, *args, **how)


def statuses(outcome: InnerOutcome) -> list[Status]:
    """Return one status for each problem."""
    return [Status(code) for code in outcome.status.tolist()]


@dataclass(frozen=True)
class Batch:
    """Problems of very different conditioning, with what they are solved by."""

    name: str
    kind: type[System]
    function: Function
    init: torch.Tensor
    args: tuple[torch.Tensor, ...]
    solution: torch.Tensor
    sensitivity: torch.Tensor  # of each solution to its residual: 1 / the least singular value of the Jacobian

    def solve(self, solver: InnerSolver, dtype: torch.dtype, tolerance: Tolerance | None = None) -> InnerOutcome:
        args = [a.to(dtype) for a in self.args]
        return solve(solver, self.kind, self.function, self.init.to(dtype), *args, batched=True, tolerance=tolerance)

    def solve_one(
        self, index: int, solver: InnerSolver, dtype: torch.dtype, tolerance: Tolerance | None = None
    ) -> InnerOutcome:
        args = [a[index].to(dtype) for a in self.args]
        return solve(solver, self.kind, self.function, self.init[index].to(dtype), *args, tolerance=tolerance)


def _sensitivity(jacobian: Function, x: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
    return 1 / torch.linalg.svdvals(vmap(jacobian)(x, *args))[..., -1]


def _rotations(batch: int, n: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(batch, n, n, dtype=F64, generator=torch.Generator().manual_seed(1)))[0]


def quadratic() -> Batch:
    """½ xᵀAx − bᵀx with condition numbers from 1 to 1,000, against a dense solve."""
    n = 6
    spectra = torch.stack([torch.logspace(0, k, n, dtype=F64) for k in (0.0, 1.0, 2.0, 3.0)])
    V = _rotations(4, n)
    A = V @ torch.diag_embed(spectra) @ V.mT
    A = 0.5 * (A + A.mT)
    b = torch.randn(4, n, dtype=F64, generator=torch.Generator().manual_seed(2))

    def objective(x, A, b):
        return 0.5 * x @ A @ x - b @ x

    return Batch("quadratic", ArgminSystem, objective, torch.zeros(4, n, dtype=F64), (A, b),
                 torch.linalg.solve(A, b), torch.ones(4, dtype=F64))  # fmt: skip


def logistic() -> Batch:
    """Ridge-penalised logistic regression with strengths from 1e-2 to 1, against scipy's Newton iteration."""
    generator = torch.Generator().manual_seed(3)
    X = torch.randn(3, 40, 4, dtype=F64, generator=generator)
    y = torch.sign(X[..., 0] + 0.5 * torch.randn(3, 40, dtype=F64, generator=generator))
    strength = torch.tensor([1e-2, 1e-1, 1.0], dtype=F64)

    def objective(w, X, y, strength):
        return torch.nn.functional.softplus(-y * (X @ w)).mean() + 0.5 * strength * (w**2).sum()

    def oracle(X, y, strength):
        def gradient(w):
            return X.T @ (-y / (1 + np.exp(y * (X @ w)))) / len(y) + strength * w

        return scipy.optimize.root(gradient, np.zeros(4), tol=1e-15).x

    found = np.stack([oracle(*(t[i].numpy() for t in (X, y, strength))) for i in range(3)])
    return Batch("logistic", ArgminSystem, objective, torch.zeros(3, 4, dtype=F64), (X, y, strength),
                 torch.tensor(found), 1 / strength)  # fmt: skip


def rosenbrock() -> Batch:
    """(a − x)² + 100 (y − x²)², whose minimum is at (a, a²)."""
    a = torch.tensor([1.0, 0.1, -0.5, 1.5], dtype=F64)

    def objective(x, a):
        return (a - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2

    init = torch.tensor([[-1.2, 1.0]], dtype=F64).repeat(4, 1)
    return Batch("rosenbrock", ArgminSystem, objective, init, (a,),
                 torch.stack([a, a**2], dim=-1), torch.full((4,), 20.0, dtype=F64))  # fmt: skip


def root() -> Batch:
    """A root whose Jacobian is far from symmetric, against scipy's."""
    n = 5
    generator = torch.Generator().manual_seed(4)
    M = torch.randn(3, n, n, dtype=F64, generator=generator) * torch.tensor([0.1, 0.5, 1.0], dtype=F64)[:, None, None]
    c = torch.randn(3, n, dtype=F64, generator=generator)

    def residual(x, M, c):
        skew = M - M.mT
        return x + torch.tanh(skew @ x) + 0.1 * x**3 - c

    def oracle(M, c):
        return scipy.optimize.root(lambda x: x + np.tanh((M - M.T) @ x) + 0.1 * x**3 - c, np.zeros(n), tol=1e-15).x

    found = torch.tensor(np.stack([oracle(M[i].numpy(), c[i].numpy()) for i in range(3)]))
    jacobian = torch.func.jacrev(residual)
    return Batch("root", RootSystem, residual, torch.zeros(3, n, dtype=F64), (M, c),
                 found, _sensitivity(jacobian, found, M, c))  # fmt: skip


def contraction() -> Batch:
    """x = tanh(Mx) + c at contraction factors of 0.1, 0.5 and 0.95, against a long plain iteration."""
    n = 6
    M = torch.randn(3, n, n, dtype=F64, generator=torch.Generator().manual_seed(5))
    factors = torch.tensor([0.1, 0.5, 0.95], dtype=F64)
    M = factors[:, None, None] * M / torch.linalg.matrix_norm(M, 2)[:, None, None]
    c = 0.3 * torch.randn(3, n, dtype=F64, generator=torch.Generator().manual_seed(6))

    def mapping(x, M, c):
        return torch.tanh(M @ x) + c

    x = torch.zeros(3, n, dtype=F64)
    for _ in range(2000):
        x = vmap(mapping)(x, M, c)
    return Batch("contraction", FixedPointSystem, mapping, torch.zeros(3, n, dtype=F64), (M, c), x, 1 / (1 - factors))
