"""A process that is killed by SIGKILL at random moments and resumed ends where one that was never killed ends, bit for bit."""

from __future__ import annotations

import multiprocessing
import os
import random
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bilevel import stochastic
from bilevel.stochastic import Minibatches, StepOptions

STEPS = 60
KILLS = 10


def train(folder: str) -> None:
    """Train from the last checkpoint to the end; a checkpoint after each step, which replaces the last one at one stroke."""
    torch.set_num_threads(1)
    place = Path(folder) / "checkpoint.pt"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.3), nn.BatchNorm1d(8), nn.Linear(8, 3))
    weights, data = torch.zeros(24), (torch.randn(24, 4), torch.randint(3, (24,)), torch.arange(24))

    def lower(inner: Any, outer: Any, batch: Any) -> torch.Tensor:
        losses = nn.functional.cross_entropy(inner(batch[0]), batch[1], reduction="none")
        return (outer[batch[2]].sigmoid() * losses).mean()

    def upper(inner: Any, outer: Any, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(inner(batch[0]), batch[1])

    method = stochastic.SABA(
        (lower, upper), model, weights, inner_optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.5),
        outer_optimizer=torch.optim.Adam, options=StepOptions(ema_decay=0.9, max_norm=1.0),
    )  # fmt: skip
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(method.inner_optimizer, STEPS)
    streams = Minibatches(data, 6, seed=1), Minibatches(data, 8, seed=2)
    seen: list[int] = []
    stateful = (method, scheduler, *streams)
    if place.exists():
        saved = torch.load(place, weights_only=True)
        for part, state in zip(stateful, saved["states"], strict=True):
            part.load_state_dict(state)
        seen = saved["seen"]
    while method.steps < STEPS:
        batches = [next(stream) for stream in streams]
        seen += [batch.index for batch in batches]
        method.step(*batches)
        scheduler.step()
        with method.averaged():
            averages = [tensor.detach().clone() for tensor in (weights, *model.parameters())]
        states = [part.state_dict() for part in stateful]
        torch.save({"states": states, "seen": seen, "averages": averages}, f"{place}.new")
        os.replace(f"{place}.new", place)
        (Path(folder) / "step").write_text(str(method.steps))


def same(left: Any, right: Any) -> bool:
    """Whether two checkpoints agree in every bit."""
    if isinstance(left, torch.Tensor):
        return bool(torch.equal(left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_killed_ten_times_and_resumed_bit_for_bit(tmp_path: Path) -> None:
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    child = processes.Process(target=train, args=(str(whole),))
    begin = time.perf_counter()
    child.start()
    child.join(120)
    assert child.exitcode == 0
    one_step = (time.perf_counter() - begin) / STEPS
    generator = random.Random(7)
    for moment in sorted(generator.sample(range(1, STEPS - 5), KILLS)):
        child = processes.Process(target=train, args=(str(killed),))
        child.start()
        while _steps(killed) < moment and child.is_alive():
            time.sleep(one_step / 20)
        time.sleep(generator.uniform(0, one_step))  # anywhere in a step, or while the checkpoint is written
        child.kill()
        child.join(60)
        assert child.exitcode == -9
    child = processes.Process(target=train, args=(str(killed),))
    child.start()
    child.join(120)
    assert child.exitcode == 0
    first, second = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, killed))
    assert first["seen"] == second["seen"] and len(first["seen"]) == 2 * STEPS
    assert same(first, second)


def _steps(folder: Path) -> int:
    try:
        return int((folder / "step").read_text() or 0)
    except FileNotFoundError:
        return 0
