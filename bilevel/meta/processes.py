"""Several processes under ``torchrun``: their numbers, and the values that they have to share."""

from __future__ import annotations

import contextvars
import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

import bilevel

__all__ = ["Processes", "processes"]


@dataclass(frozen=True)
class Processes:
    """One process among those of a run.

    Parameters
    ----------
    rank, world
        This one's number, and how many there are.
    device
        Where this one computes.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Return whether ``flag`` is set in any process; all of them have to ask."""
        return self.sum([float(flag)])[0] > 0

    def sum(self, numbers: list[float]) -> list[float]:
        """Return the sums of ``numbers`` over the processes."""
        if self.world == 1:
            return numbers
        tensor = torch.tensor(numbers, dtype=torch.float64, device=self.device if self.device.type == "cuda" else None)
        dist.all_reduce(tensor)
        return [float(number) for number in tensor]


@contextmanager
def processes(device: str | None = None) -> Iterator[Processes]:
    """Join the processes that ``torchrun`` started, if it did, for the length of a block.

    Parameters
    ----------
    device
        Such as ``"cpu"`` or ``"cuda"``; by default a GPU if there is one, the process's own under ``torchrun``.

    Raises
    ------
    bilevel.ArgumentError
        If there is no such device.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = _device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if world == 1 or "RANK" not in os.environ:
        yield Processes(0, 1, chosen)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    before = _contexts()
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), chosen)
        # A process that leaves while another still talks to it can be aborted by torch's own threads.
        dist.barrier()
    finally:
        dist.destroy_process_group()
        _contexts_dropped(before)


def _contexts() -> int:
    return sum(type(thing) is contextvars.Context for thing in gc.get_objects())


def _contexts_dropped(before: int, patience: float = 2.0) -> bool:
    """Wait until no more than ``before`` contexts are held, for ``patience`` seconds at most; return whether that came.

    A backward pass hands a copy of the context to torch 2.13's communication threads, with each reduction. One that drops it when the
    interpreter is already leaving finds no lock to take, and aborts the process (``std::terminate``): a reduction as the last
    thing done, on a busy machine, is enough. No call of torch's waits for that: destroying the group joins no thread while a
    ``DistributedDataParallel`` still refers to it.
    """
    until = time.monotonic() + patience
    while _contexts() > before:
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def _device(name: str | None, local: int) -> torch.device:
    try:
        chosen = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if chosen.type == "cuda" and chosen.index is None:
            chosen = torch.device("cuda", local % max(1, torch.cuda.device_count()))
        if float(torch.ones(2, device=chosen).sum()) != 2.0:  # some devices make tensors, and hold no numbers
            raise RuntimeError("it does not compute")
    except (RuntimeError, AssertionError, ImportError) as error:
        raise bilevel.ArgumentError(
            f"expected device to be one that torch can use here, got {name!r} ({' '.join(str(error).split())[:80]}); "
            "take cpu"
        ) from None
    return chosen
