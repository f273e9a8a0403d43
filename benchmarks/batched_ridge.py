"""128 ridge problems of dimension 20, solved and differentiated as one batch."""

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


def plain() -> torch.Tensor:
    t = theta.detach().requires_grad_(True)
    A = X.mT @ X + torch.diag(t.exp())
    w = torch.linalg.solve(A, (X.mT @ y.unsqueeze(-1)))
    (w**2).sum().backward()
    return t.grad


def ridge(w, theta, X, y):
    return 0.5 * ((X @ w - y) ** 2).sum() + 0.5 * (theta.exp() * w**2).sum()


layer = bilevel.argmin(ridge)
start = torch.zeros(N, dtype=F64)


def batched() -> torch.Tensor:
    t = theta.detach().requires_grad_(True)
    w = vmap(layer, in_dims=(None, None, 0, 0))(start, t, X, y)
    (w**2).sum().backward()
    return t.grad


print("Agreement")
check("bilevel under vmap", batched(), plain(), 1e-9)
compare(
    "128 ridge problems of dimension 20, forward and backward",
    {"torch.linalg.solve under autograd": plain, "bilevel under vmap": batched},
    "torch.linalg.solve under autograd", COUNT,
)  # fmt: skip
