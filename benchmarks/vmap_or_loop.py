"""64 problems of dimension 20 and very different conditioning: vmap beside a Python loop."""

from __future__ import annotations

import torch
from timing import check, compare, rounds
from torch.func import vmap

import bilevel

F64 = torch.float64
COUNT = rounds(15)
torch.manual_seed(0)
BATCH, N = 64, 20
Q = torch.linalg.qr(torch.randn(BATCH, N, N, dtype=F64))[0]
A = Q @ torch.diag_embed(torch.stack([torch.logspace(-k * 6 / 63, 0, N, dtype=F64) for k in range(BATCH)])) @ Q.mT
b = (A @ torch.randn(BATCH, N, 1, dtype=F64)).squeeze(-1)
start = torch.zeros(N, dtype=F64)


def objective(x, A, b):
    return 0.5 * x @ A @ x - b @ x + 0.01 * (x**4).sum()


layer = bilevel.argmin(objective)


def looped() -> torch.Tensor:
    free = b.clone().requires_grad_(True)
    torch.stack([layer(start, A[k], free[k]) for k in range(BATCH)]).square().sum().backward()
    return free.grad


def batched() -> torch.Tensor:
    free = b.clone().requires_grad_(True)
    vmap(layer, in_dims=(None, 0, 0))(start, A, free).square().sum().backward()
    return free.grad


print("Agreement")
check("vmap", batched(), looped(), 1e-9)
compare("64 problems of dimension 20, forward and backward", {"vmap": batched, "loop": looped}, "vmap", COUNT)
