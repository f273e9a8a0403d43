"""A bilevel step on a network of ten million weights beside betty and BOAT: time, peak memory, and whether the results agree.

The task is that of ``network.py``: an MLP of 9.9 million weights, whose examples have learned weights. Every library makes five SGD steps on
one minibatch, then the hypergradient on the same minibatch and one of the outer level, then an SGD step of the weights. The hypergradient
is a Neumann series of six terms everywhere, with the inner learning rate as its step and so five products with the same Hessian. Only the
network is warm-started. (Conjugate gradients are left out: in betty 0.2.1 their next direction is built from the old residual, and is wrong.)

Each contestant has a process of its own, which has made a step on a small network before. The processes take turns: one step each, round
after round. Times are processor seconds. Memory is the growth of the peak resident size beyond the model and its data. It is measured twice:
with the heap of the C library as it is, where freed blocks may stay, and with blocks above one MiB returned at once, where the peak is what
the library holds (``MALLOC_MMAP_THRESHOLD_``, of glibc). Reuse of blocks saves time, so both have their own times.

Results are compared twice. On a small network in float64 each hypergradient is compared with the same series of the dense Hessian. On the
large network the learned weights after all rounds are compared with those of the first contestant.

Install the peers in an environment of its own (``pip install betty-ml boat-torch``; betty 0.2.1 declares Python below 3.11, and runs on 3.11
with ``--ignore-requires-python``). What is not installed is left out, with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from network import INNER_STEPS, PRODUCTS, SGD, Task, _peak_now, lower, plain, upper
from torch import nn

import bilevel
from bilevel import stochastic

RATE = 0.01
Step = Callable[[], object]


class Weights(nn.Module):
    """The outer variables as a module, which the peers ask for."""

    def __init__(self, weights: torch.Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights.detach().clone())


def ours(task: Task, outer_rate: float, make: Any, **settings: Any) -> tuple[Step, torch.Tensor]:
    method = make(
        (lower, upper), task.model, task.weights, inner_optimizer=SGD, outer_optimizer=partial(torch.optim.SGD, lr=outer_rate),
        inner_steps=INNER_STEPS, **settings,
    )  # fmt: skip
    return lambda: method.step(task.train, task.valid), task.weights


def betty(task: Task, outer_rate: float, **settings: Any) -> tuple[Step, torch.Tensor]:
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine
    from betty.problems import ImplicitProblem

    class Classifier(ImplicitProblem):
        def get_batch(self) -> Any:
            return task.train

        def training_step(self, batch: Any) -> torch.Tensor:
            return lower(self.module, self.reweight.module.weights, batch)

    class Reweight(ImplicitProblem):
        def get_batch(self) -> Any:
            return task.valid

        def training_step(self, batch: Any) -> torch.Tensor:
            return upper(self.classifier.module, None, batch)

    weights = Weights(task.weights)
    low = Classifier(
        "classifier",
        module=task.model,
        optimizer=SGD(task.model.parameters()),
        config=Config(unroll_steps=INNER_STEPS, **settings),
    )
    up = Reweight(
        "reweight",
        module=weights,
        optimizer=torch.optim.SGD(weights.parameters(), lr=outer_rate),
        config=Config(retain_graph=True),
    )
    engine = Engine(
        [up, low], config=EngineConfig(train_iters=1), dependencies={"u2l": {up: [low]}, "l2u": {low: [up]}}
    )

    def step() -> None:
        for _ in range(INNER_STEPS):
            engine.train_step()

    return step, weights.weights


def boat_lower(data: Any, weights: Weights, model: nn.Module, **given: Any) -> torch.Tensor:
    return lower(partial(model, **given), weights.weights, data["batch"])


def boat_upper(data: Any, weights: Weights, model: nn.Module, **given: Any) -> torch.Tensor:
    return upper(partial(model, **given), None, data["batch"])


def boat(task: Task, outer_rate: float) -> tuple[Step, torch.Tensor]:
    import boat_torch

    weights = Weights(task.weights)
    config = {
        "fo_op": None, "gm_op": ["NGD"], "na_op": ["NS"], "return_grad": False, "lower_iters": INNER_STEPS, "device": "cpu",
        "accumulate_grad": False, "copy_last_param": True, "fo_ol_batch_input": False, "loss_log_path": os.devnull,
        "GDA": {"alpha_init": 0.0, "alpha_decay": 1.0}, "RGT": {"truncate_iter": 0}, "CG": {"k": PRODUCTS, "tolerance": 0.0},
        "lower_level_model": task.model, "upper_level_model": weights, "lower_level_var": list(task.model.parameters()),
        "upper_level_var": list(weights.parameters()), "lower_level_opt": SGD(task.model.parameters()),
        "upper_level_opt": torch.optim.SGD(weights.parameters(), lr=outer_rate),
    }  # fmt: skip
    losses = {
        f"{level}_level_loss": {"function": f"network_peers.boat_{level}", "params": {}} for level in ("lower", "upper")
    }
    problem = boat_torch.Problem(config, losses)
    problem.build_ll_solver()
    problem.build_ul_solver()
    train, valid, count = {"batch": task.train}, {"batch": task.valid}, iter(range(10**9))
    return lambda: problem.run_iter(train, valid, current_iter=next(count)), weights.weights


def plain_step(task: Task, outer_rate: float) -> tuple[Step, torch.Tensor]:
    return plain(task), task.weights


implicit = partial(stochastic.ImplicitStep, warm_start=False)
CONTESTANTS: dict[str, Callable[..., tuple[Step, torch.Tensor]]] = {
    "plain training step": plain_step,
    "StocBiO": partial(ours, make=stochastic.StocBiO, terms=PRODUCTS),
    "ImplicitStep, gradient steps": partial(ours, make=implicit, adjoint_steps=PRODUCTS + 1),
    "ImplicitStep, Neumann": partial(ours, make=implicit, linear_solver=bilevel.Neumann(terms=PRODUCTS, step=RATE)),
    "betty, neumann": partial(betty, type="neumann", neumann_iterations=PRODUCTS, neumann_alpha=RATE),
    "BOAT, NS": boat,
}
HEAPS = {"heap as it is": {}, "large blocks returned at once": {"MALLOC_MMAP_THRESHOLD_": str(2**20)}}


def small_task() -> Task:
    """Return a small network with its minibatches, in float64."""
    task = Task.random(width=8, batch=12)
    train, valid = ((batch[0].double(), *batch[1:]) for batch in (task.train, task.valid))
    return Task(task.model.double(), torch.zeros(12, dtype=torch.float64, requires_grad=True), train, valid)


def reference() -> torch.Tensor:
    """Return the hypergradient of the small network, by the same series of the dense Hessian after the inner steps."""
    task = small_task()
    step = plain(task)
    for _ in range(INNER_STEPS):
        step()
    z = list(task.model.parameters())
    slopes = torch.autograd.grad(lower(task.model, task.weights, task.train), z, create_graph=True)
    slope = torch.cat([part.reshape(-1) for part in slopes])
    term = torch.cat([part.reshape(-1) for part in torch.autograd.grad(upper(task.model, None, task.valid), z)])
    rows = torch.autograd.grad(
        slope, z, torch.eye(len(slope), dtype=slope.dtype), retain_graph=True, is_grads_batched=True
    )
    H, total = torch.cat([row.reshape(len(slope), -1) for row in rows], dim=1), term
    for _ in range(PRODUCTS):
        term = term - RATE * (H @ term)
        total = total + term
    return -RATE * torch.autograd.grad(slope, [task.weights], total)[0].detach()


def work(name: str, options: argparse.Namespace) -> None:
    """Answer the parent's requests, a line each: the first hypergradient, then one step at a time, then the peak and the weights."""
    replies, sys.stdout = sys.stdout, sys.stderr  # betty and BOAT print
    try:
        small = small_task()
        step, weights = CONTESTANTS[name](small, 1.0)
        before = weights.detach().clone()
        step()
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), file=replies, flush=True)
        return
    found = (before - weights.detach()).tolist()
    task = Task.random(options.width, options.batch)
    start = _peak_now()
    step, weights = CONTESTANTS[name](task, 1.0)
    print(json.dumps({"hypergradient": found}), file=replies, flush=True)
    for _ in sys.stdin:
        begin = time.process_time()
        step()
        taken = time.process_time() - begin
        reply = {"seconds": taken, "MiB": (_peak_now() - start) / 1024, "weights": weights.detach().tolist()}
        print(json.dumps(reply), file=replies, flush=True)


class Worker:
    """A contestant in its own process."""

    def __init__(self, name: str, heap: str, options: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--worker", name, "--width", str(options.width), "--batch", str(options.batch),
                   "--threads", str(options.threads)]  # fmt: skip
        self.name = name
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | HEAPS[heap],
        )
        self.first = self._reply()
        self.seconds: list[float] = []
        self.last: dict[str, Any] = {}

    def _reply(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return (
            json.loads(line) if line else {"missing": "its process ended with an error; run it with --worker to see it"}
        )

    def step(self, counted: bool) -> None:
        assert self.process.stdin is not None
        print("step", file=self.process.stdin, flush=True)
        self.last = self._reply()
        if counted:
            self.seconds.append(self.last["seconds"])

    def close(self) -> None:
        self.process.communicate()


def distance(found: list[float], reference: torch.Tensor) -> float:
    return float((torch.tensor(found, dtype=torch.float64) - reference).norm() / reference.norm())


def race(heap: str, options: argparse.Namespace, exact: torch.Tensor) -> None:
    """Let all contestants make their steps, one after the other in each round, and print the table."""
    workers = []
    for name in dict.fromkeys(["plain training step", *options.only]):
        worker = Worker(name, heap, options)
        if "missing" in worker.first:
            print(f"{name}: left out, {worker.first['missing']}")
            worker.close()
        else:
            workers.append(worker)
    for place in range(options.rounds + 1):
        for worker in workers:
            worker.step(counted=place > 0)
    for worker in workers:
        worker.close()
    print(
        f"\n{heap:28s} {'s':>7s} {'/ plain':>8s} {'MiB':>6s} {'/ plain':>8s} {'error, small':>13s} {'differs by':>11s}"
    )
    base, first = workers[0], torch.tensor(workers[min(1, len(workers) - 1)].last["weights"], dtype=torch.float64)
    for worker in workers:
        ratio = statistics.median(mine / least for mine, least in zip(worker.seconds, base.seconds, strict=True))
        memory = worker.last["MiB"]
        line = f"{worker.name:28s} {statistics.median(worker.seconds):7.2f} {ratio:8.1f} {memory:6.0f} {memory / base.last['MiB']:8.1f}"
        if worker is not base:
            line += f" {distance(worker.first['hypergradient'], exact):13.0e} {distance(worker.last['weights'], first):11.0e}"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--only", nargs="*", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--heaps", nargs="*", choices=HEAPS, default=list(HEAPS))
    parser.add_argument("--worker", help="be this contestant, for the parent process")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.worker:
        work(options.worker, options)
        return
    count = sum(p.numel() for p in Task.random(options.width, options.batch).model.parameters())
    print(
        f"{count / 1e6:.1f} million weights, batch {options.batch}, {options.threads} thread(s), {options.rounds} rounds"
    )
    exact = reference()
    for heap in options.heaps:
        race(heap, options, exact)


if __name__ == "__main__":
    main()
