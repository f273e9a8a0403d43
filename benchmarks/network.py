"""A step on a network of ten million parameters: its time beside the passes it has to make and a plain training step, and its peak memory.

The network is an MLP of 9.9 million weights; the outer variables weigh its examples. The floor of a method makes the same forward and
reverse passes with torch's autograd and throws the results away: no update, no check, no norm. Times are ratios within one round of one
process. Memory is the growth of the peak resident size in a child process each, beyond the model and its data.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from bilevel import stochastic

SGD = partial(torch.optim.SGD, lr=0.01)
INNER_STEPS, PRODUCTS = 5, 5


@dataclass(frozen=True, eq=False)
class Task:
    model: nn.Module
    weights: torch.Tensor
    train: tuple[torch.Tensor, ...]
    valid: tuple[torch.Tensor, ...]

    @staticmethod
    def random(width: int, batch: int) -> Task:
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Linear(256, width), nn.Tanh()]
        for _ in range(4):
            layers += [nn.Linear(width, width), nn.Tanh()]
        model = nn.Sequential(*layers, nn.Linear(width, 10))
        x, y = torch.randn(2 * batch, 256), torch.randint(10, (2 * batch,))
        train = x[:batch], y[:batch], torch.arange(batch)
        return Task(model, torch.zeros(batch, requires_grad=True), train, (x[batch:], y[batch:]))

    def copy(self) -> Task:
        return Task(copy.deepcopy(self.model), self.weights.detach().clone(), self.train, self.valid)


def lower(inner: Any, outer: Any, batch: Any) -> torch.Tensor:
    losses = cross_entropy(inner(batch[0]), batch[1], reduction="none")
    return (outer[batch[2]].sigmoid() * losses).mean()


def upper(inner: Any, outer: Any, batch: Any) -> torch.Tensor:
    return cross_entropy(inner(batch[0]), batch[1])


class Floor:
    """The passes of methods, and nothing else."""

    def __init__(self, task: Task) -> None:
        self.task, self.z = task, list(task.model.parameters())
        self.q = [torch.zeros_like(tensor) for tensor in self.z]

    def gradients(self, count: int) -> None:
        for _ in range(count):
            torch.autograd.grad(lower(self.task.model, self.task.weights, self.task.train), self.z)

    def slope(self) -> None:
        torch.autograd.grad(upper(self.task.model, self.task.weights, self.task.valid), self.z)

    def linearized(self, products: int) -> None:
        loss = lower(self.task.model, self.task.weights, self.task.train)
        slopes = torch.autograd.grad(loss, self.z, create_graph=True)
        for _ in range(products):
            torch.autograd.grad(slopes, self.z, self.q, retain_graph=True)
        torch.autograd.grad(slopes, [self.task.weights], self.q)

    def soba(self) -> None:
        loss = lower(self.task.model, self.task.weights, self.task.train)
        slopes = torch.autograd.grad(loss, self.z, create_graph=True)
        torch.autograd.grad(slopes, [*self.z, self.task.weights], self.q)
        self.slope()

    def implicit(self) -> None:
        self.gradients(INNER_STEPS)
        self.slope()
        self.linearized(PRODUCTS)

    def f2sa(self) -> None:
        self.gradients(2 * INNER_STEPS + 2)
        for _ in range(INNER_STEPS + 1):
            self.slope()


def plain(task: Task) -> Callable[[], object]:
    """Return one training step of the same network."""
    optimizer = SGD(task.model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        lower(task.model, task.weights.detach(), task.train).backward()
        optimizer.step()

    return step


def ours(make: Any, task: Task, **settings: Any) -> Callable[[], object]:
    method = make((lower, upper), task.model, task.weights, inner_optimizer=SGD, outer_optimizer=SGD, **settings)
    return lambda: method.step(task.train, task.valid)


CONTESTANTS: dict[str, tuple[Callable[[Task], Callable[[], object]], str]] = {
    "SOBA": (partial(ours, stochastic.SOBA), "soba"),
    "implicit step, gradient steps": (
        partial(ours, stochastic.ImplicitStep, inner_steps=INNER_STEPS, adjoint_steps=PRODUCTS),
        "implicit",
    ),
    "F2SA": (partial(ours, stochastic.F2SA, inner_steps=INNER_STEPS), "f2sa"),
}


def timed(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every function in every round."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for place in range(rounds + 2):
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            if place >= 2:
                times[name].append(time.perf_counter() - begin)
    return times


def ratio(left: Sequence[float], right: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(left, right, strict=True))


def peak(name: str, width: int, batch: int) -> float:
    """Return by how many MiB three steps raise the peak resident size, in this process."""
    task = Task.random(width, batch)
    before = _peak_now()
    step = plain(task) if name == "plain" else CONTESTANTS[name][0](task)
    for _ in range(3):
        step()
    return (_peak_now() - before) / 1024


def _peak_now() -> int:
    """Return the largest resident size so far, in KiB; that of ``resource`` would count the parent's too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--peak", help="print the peak of this method alone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        print(peak(options.peak, options.width, options.batch))
        return
    task = Task.random(options.width, options.batch)
    count = sum(p.numel() for p in task.model.parameters())
    print(
        f"{count / 1e6:.1f} million weights ({count * 4 / 2**20:.0f} MiB), batch {options.batch}, {options.threads} thread(s)"
    )
    print(f"{'':30s} {'ms':>8s} {'/ its passes':>13s} {'/ plain step':>13s} {'peak, MiB':>10s} {'/ plain':>8s}")
    least = _peak_in_child("plain", options)
    print(f"{'plain training step':30s} {1e3 * statistics.median(timed({'': plain(task.copy())}, options.rounds)['']):8.0f} "
          f"{'':13s} {'':13s} {least:10.0f}")  # fmt: skip
    for name, (make, floor) in CONTESTANTS.items():
        functions = {
            "plain": plain(task.copy()),
            "floor": getattr(Floor(task), floor),
            "ours": make(task.copy()),
        }
        times = timed(functions, options.rounds)
        memory = _peak_in_child(name, options)
        print(
            f"{name:30s} {1e3 * statistics.median(times['ours']):8.0f} {ratio(times['ours'], times['floor']):13.2f} "
            f"{ratio(times['ours'], times['plain']):13.2f} {memory:10.0f} {memory / least:8.2f}",
            flush=True,
        )


def _peak_in_child(name: str, options: argparse.Namespace) -> float:
    command = [sys.executable, __file__, "--peak", name, "--width", str(options.width), "--batch", str(options.batch)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
