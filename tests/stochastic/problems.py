"""Quadratic finite sums with closed forms: the reference of every test of directions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

SGD = partial(torch.optim.SGD, lr=0.1)


@dataclass
class Quadratic:
    """G_i = ½ zᵀA_i z + zᵀC_i x + a_iᵀz,  F_j = ½‖E_j z − e_j‖² + ½ xᵀD_j x + d_jᵀx; batches are numbers of samples."""

    A: torch.Tensor
    C: torch.Tensor
    a: torch.Tensor
    E: torch.Tensor
    e: torch.Tensor
    D: torch.Tensor
    d: torch.Tensor

    @staticmethod
    def random(
        samples: int = 8, inner: int = 5, outer: int = 3, *, spread: float = 0.3, dtype: Any = torch.float64
    ) -> Quadratic:
        generator = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        factors = normal(samples, inner, inner) * spread
        A = torch.eye(inner, dtype=torch.float64) + factors @ factors.mT / inner
        outer_factors = normal(samples, outer, outer) * spread
        D = 0.5 * torch.eye(outer, dtype=torch.float64) + outer_factors @ outer_factors.mT / outer
        parts = (A, 0.4 * normal(samples, inner, outer), normal(samples, inner), 0.4 * normal(samples, 4, inner), normal(samples, 4),
                 D, normal(samples, outer))  # fmt: skip
        return Quadratic(*(part.to(dtype) for part in parts))

    @property
    def all(self) -> torch.Tensor:
        return torch.arange(len(self.A))

    def inner_objective(self, z: Any, x: Any, rows: Any) -> torch.Tensor:
        A, C, a = self.A[rows].mean(0), self.C[rows].mean(0), self.a[rows].mean(0)
        return 0.5 * z @ A @ z + z @ C @ x + a @ z

    def outer_objective(self, z: Any, x: Any, rows: Any) -> torch.Tensor:
        D, d = self.D[rows].mean(0), self.d[rows].mean(0)
        fit = 0.5 * ((self.E[rows] @ z - self.e[rows]) ** 2).sum(-1).mean()
        return fit + 0.5 * x @ D @ x + d @ x

    @property
    def losses(self) -> tuple[Any, Any]:
        return self.inner_objective, self.outer_objective

    def solution(self, x: torch.Tensor) -> torch.Tensor:
        return -torch.linalg.solve(self.A.mean(0), self.C.mean(0) @ x + self.a.mean(0))

    def adjoint(self, z: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve(self.A.mean(0), self.slope(z))

    def slope(self, z: torch.Tensor) -> torch.Tensor:
        return (self.E.mT @ (self.E @ z - self.e).unsqueeze(-1)).squeeze(-1).mean(0)

    def hypergradient(self, x: torch.Tensor) -> torch.Tensor:
        direct = self.D.mean(0) @ x + self.d.mean(0)
        return direct - self.C.mean(0).T @ self.adjoint(self.solution(x))

    def best(self) -> torch.Tensor:
        """The x at which the hypergradient, an affine function, is zero."""
        zero = torch.zeros(self.d.shape[1], dtype=self.d.dtype)
        at_zero = self.hypergradient(zero)
        columns = [self.hypergradient(unit) - at_zero for unit in torch.eye(len(zero), dtype=self.d.dtype)]
        return torch.linalg.solve(torch.stack(columns, 1), -at_zero)


class Recorder(torch.optim.Optimizer):
    """Keeps the direction it is given, and does not move: the outer direction of a method at fixed outer variables."""

    def __init__(self, params: Any, lr: float = 1.0) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:
        self.direction = [p.grad.clone() for group in self.param_groups for p in group["params"]]
