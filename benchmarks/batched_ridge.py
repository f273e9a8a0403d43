"""128 ridge problems of dimension 20, solved and differentiated as one batch.

Differentiated with respect to the strengths, shared by all, and to each problem's design matrix and targets.
"""

from __future__ import annotations

import torch
from timing import check, compare, rounds
from torch.func import vmap

import bilevel

F64 = torch.float64
COUNT = rounds(40)
torch.manual_seed(0)
BATCH, ROWS, N = 128, 100, 20
X = torch.randn(BATCH, ROWS, N, dtype=F64)
y = torch.randn(BATCH, ROWS, dtype=F64)
theta = torch.zeros(N, dtype=F64)


def leaves() -> list[torch.Tensor]:
    return [t.detach().requires_grad_(True) for t in (theta, X, y)]


def together(gradients: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.cat([gradient.reshape(-1) for gradient in gradients])


def plain() -> torch.Tensor:
    t, A, b = inputs = leaves()
    w = torch.linalg.solve(A.mT @ A + torch.diag(t.exp()), A.mT @ b.unsqueeze(-1))
    return together(torch.autograd.grad((w**2).sum(), inputs))


def ridge(w, theta, X, y):
    return 0.5 * ((X @ w - y) ** 2).sum() + 0.5 * (theta.exp() * w**2).sum()


layer = bilevel.argmin(ridge)
start = torch.zeros(N, dtype=F64)


def batched() -> torch.Tensor:
    inputs = leaves()
    w = vmap(layer, in_dims=(None, None, 0, 0))(start, *inputs)
    return together(torch.autograd.grad((w**2).sum(), inputs))


print("Agreement")
check("bilevel under vmap", batched(), plain(), 1e-9)
compare(
    "128 ridge problems of dimension 20, forward and backward",
    {"torch.linalg.solve under autograd": plain, "bilevel under vmap": batched},
    "torch.linalg.solve under autograd", COUNT,
)  # fmt: skip
