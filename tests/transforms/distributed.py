"""Every column's layer inside DistributedDataParallel, in two gloo processes; run by torchrun it is one of them."""

from __future__ import annotations

import functools
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from bilevel.meta.processes import processes

WORLD = 2


@functools.cache
def gradients() -> dict[str, torch.Tensor]:
    """Return each column's gradient as the first of the processes has it after its backward pass."""
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(root)}
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(WORLD),
            "--master-addr", "127.0.0.1", "--master-port", str(port), "-m", "tests.transforms.distributed", folder,
        ]  # fmt: skip
        ended = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=150)
        assert ended.returncode == 0, ended.stderr
        loaded: dict[str, torch.Tensor] = torch.load(Path(folder) / "gradients.pt", weights_only=True)
    return loaded


def share(X: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the data of a process."""
    return (1.0 + 0.2 * rank) * X


def main(folder: str) -> None:
    from .problems import COLUMNS
    from .rows import Layered, scalar

    class All(torch.nn.Module):
        """Every column at once: one reduction for all."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(Layered(c.solve(), *c.inputs()[:2]) for c in COLUMNS)

        def forward(self, rank: int) -> torch.Tensor:
            each = [scalar(m(share(c.inputs()[2], rank))) for m, c in zip(self.layers, COLUMNS, strict=True)]
            return torch.stack([value.double() for value in each]).sum()

    with processes("cpu") as here:
        module = torch.nn.parallel.DistributedDataParallel(All())
        module(here.rank).backward()
        if here.leads:
            found = {c.name: m.t.grad for m, c in zip(module.module.layers, COLUMNS, strict=True)}
            torch.save(found, f"{folder}/gradients.pt")


if __name__ == "__main__":
    main(sys.argv[1])
