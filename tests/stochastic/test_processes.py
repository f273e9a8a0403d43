"""Two processes with half a batch each take the steps of one process with the whole batch."""

from __future__ import annotations

import os
import socket
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing, nn

from bilevel import stochastic

METHODS = {"SOBA": {}, "SABA": {}, "MRBO": {"terms": 2}, "F2SA": {}, "PZOBO": {"directions": 2}, "ImplicitStep": {}}


def run(name: str, dtype: torch.dtype, rank: int, world: int) -> torch.Tensor:
    """Return the variables after five steps; the first process has other initial values than the others until they are shared."""
    torch.set_num_threads(1)
    torch.manual_seed(0 if rank == 0 else 99)
    model: nn.Module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).to(dtype)
    strengths = torch.zeros(2, dtype=dtype) + rank
    generator = torch.Generator().manual_seed(5)
    inputs, targets = (
        torch.randn(8, 4, generator=generator, dtype=dtype),
        torch.randn(8, 1, generator=generator, dtype=dtype),
    )
    share = slice(rank * 8 // world, (rank + 1) * 8 // world)
    batch = inputs[share], targets[share]
    inner: Any = nn.parallel.DistributedDataParallel(model) if world > 1 and name == "SOBA" else model

    def lower(inner: nn.Module, outer: torch.Tensor, batch: Any) -> torch.Tensor:
        fit = ((inner(batch[0]) - batch[1]) ** 2).mean()
        weights = [p for p in inner.parameters() if p.ndim == 2]
        return fit + sum(s.exp() * (w**2).sum() for s, w in zip(outer, weights, strict=True)) * 0.1

    def upper(inner: nn.Module, outer: torch.Tensor, batch: Any) -> torch.Tensor:
        return (inner(batch[0]) - batch[1]).abs().mean()

    method = getattr(stochastic, name)(
        (lower, upper), inner, strengths, inner_optimizer=partial(torch.optim.SGD, lr=0.05),
        outer_optimizer=partial(torch.optim.SGD, lr=0.05), **METHODS[name],
    )  # fmt: skip
    for _ in range(5):
        result = method.step(batch, batch)
    values = [p.detach().reshape(-1) for p in model.parameters()]
    return torch.cat([*values, strengths.detach(), result.inner_loss.reshape(1), result.outer_loss.reshape(1)])


def work(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    found = {(name, dtype): run(name, dtype, rank, 2) for name in METHODS for dtype in (torch.float32, torch.float64)}
    torch.save(found, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    for (name, dtype), values in first.items():
        assert torch.equal(values, second[name, dtype]), f"{name}: the processes have drifted apart"
        tolerance = 1e-6 if dtype == torch.float32 else 1e-10
        torch.testing.assert_close(
            values, run(name, dtype, 0, 1), rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )
