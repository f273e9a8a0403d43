"""Two processes under ``torchrun`` with half a batch each take the steps of one process with the whole batch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn

from bilevel import stochastic
from bilevel.errors import ArgumentError

# One process of the test run starts the two, once for all tests of this file.
pytestmark = pytest.mark.xdist_group("two processes")

METHODS: dict[str, dict[str, Any]] = {
    "SOBA": {},
    "MASOBA": {},
    "SABA": {},
    "SRBA": {"period": 3},
    "AmIGO": {"inner_steps": 2, "adjoint_steps": 2},
    "StocBiO": {"inner_steps": 2, "terms": 2},
    "TTSA": {},
    "ALSET": {"inner_steps": 2},
    "MRBO": {"terms": 2},
    "VRBO": {"terms": 2, "inner_steps": 1, "period": 3},
    "F2SA": {},
    "BOME": {"inner_steps": 2},
    "PZOBO": {"directions": 2},
    "ImplicitStep": {},
}
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def run(name: str, dtype: torch.dtype, rank: int, world: int) -> torch.Tensor:
    """Return the variables after five steps; the first process has other initial values than the others until they are shared."""
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
    inner: Any = nn.parallel.DistributedDataParallel(model) if world > 1 else model

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


def refusal() -> str:
    """Return what is said about a module that FSDP2 has sharded."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Linear(4, 2)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))

    def loss(inner: Any, outer: Any, data: Any) -> torch.Tensor:
        return (inner(data) ** 2).mean() * outer.exp()

    try:
        stochastic.SOBA((loss, loss), model, torch.zeros(()))
    except ArgumentError as error:
        return str(error)
    return "accepted"


def main(folder: str) -> None:
    """Be one of the processes of ``torchrun``."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    found: dict[str, Any] = {f"{name} {kind}": run(name, DTYPES[kind], rank, 2) for name in METHODS for kind in DTYPES}
    found["sharded"] = refusal()
    torch.save(found, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("torchrun")
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(root)}
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
        "--master-port", str(port), "-m", "tests.stochastic.test_processes", str(folder),
    ]  # fmt: skip
    ended = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=150)
    assert ended.returncode == 0, ended.stderr
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2))
    return first, second


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_are_one(name: str, found: tuple[dict[str, Any], dict[str, Any]]) -> None:
    for kind, tolerance in (("float32", 1e-6), ("float64", 1e-10)):
        first, second = (one[f"{name} {kind}"] for one in found)
        assert torch.equal(first, second), f"{kind}: the processes have drifted apart"
        torch.testing.assert_close(first, run(name, DTYPES[kind], 0, 1), rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_sharded_parameters_are_refused(found: tuple[dict[str, Any], dict[str, Any]]) -> None:
    for one in found:
        assert one["sharded"].startswith("SOBA: expected inner to hold whole tensors, and weight is sharded")
        assert "DistributedDataParallel" in one["sharded"]


if __name__ == "__main__":
    main(sys.argv[1])
