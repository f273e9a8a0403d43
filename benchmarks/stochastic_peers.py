"""Minibatch methods beside those of benchopt's benchmark_bilevel (JAX, compiled) on its simulated quadratic: the same data, rates and batches.

Two runs in two environments, as JAX is none of this project's dependencies:

    python benchmarks/stochastic_peers.py theirs --repository DIR --output DIR   # JAX, benchopt and a clone of benchmark_bilevel
    python benchmarks/stochastic_peers.py ours --output DIR                      # torch and this library; prints both

The first writes the data and its curves, the second reads them. A new JAX folds the data into what it compiles, for minutes, unless
``XLA_FLAGS=--xla_disable_hlo_passes=constant_folding`` is set. Rates are those of the project's ``quadratics_021424_best_params.yml``, and
its defaults where that has none; both sides decay them alike. h is the value function of the whole data (the project's own metric looks at
the first sample alone). A step of a method makes the same passes on both sides, so steps compare passes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

# Steps between two looks at h, and the settings of each solver there.
METHODS: dict[str, tuple[int, dict[str, Any]]] = {
    "SOBA": (64, {"step_size": 0.1, "outer_ratio": 1.0}),
    "SABA": (64, {"step_size": 0.1, "outer_ratio": 1.0}),
    "SRBA": (64, {"step_size": 0.1, "outer_ratio": 1.0, "period_frac": 0.5}),
    "AmIGO": (16, {"step_size": 0.01, "outer_ratio": 0.1, "n_inner_steps": 10}),
    "StocBiO": (16, {"step_size": 0.1, "outer_ratio": 1.0, "n_inner_steps": 10, "n_shia_steps": 10}),
    "F2SA": (16, {"step_size": 0.1, "outer_ratio": 1.0, "lmbda0": 1.0, "delta_lmbda": 0.01, "n_inner_steps": 10}),
    "MRBO": (16, {"step_size": 0.1, "outer_ratio": 0.1, "n_shia_steps": 10, "eta": 0.5}),
    "VRBO": (2, {"step_size": 0.1, "outer_ratio": 1.0, "period_frac": 0.01, "n_inner_steps": 10, "n_shia_steps": 10}),
}
BATCH = 64
LEVELS = ("inner", "outer")
PARTS = ("hess_inner", "hess_outer", "cross", "linear_inner", "linear_outer")
Curve = list[tuple[int, float, float]]  # steps, seconds, h − min h


class Value:
    """h(x) − min h of the whole data, in float64."""

    def __init__(self, data: dict[str, np.ndarray]) -> None:
        H, _, C, b, _ = (data[f"inner_{part}"].mean(0, dtype=np.float64) for part in PARTS)
        P, S, D, e, f = (data[f"outer_{part}"].mean(0, dtype=np.float64) for part in PARTS)
        Z, z0 = -np.linalg.solve(H, C.T), -np.linalg.solve(H, b)  # z*(x) = Z x + z0
        self.A = Z.T @ P @ Z + S + D @ Z + (D @ Z).T
        self.best = -np.linalg.solve(self.A, Z.T @ (P @ z0 + e) + D @ z0 + f)

    def __call__(self, x: Any) -> float:
        d = np.asarray(x, dtype=np.float64) - self.best
        return float(0.5 * d @ self.A @ d)


def run_theirs(options: argparse.Namespace) -> None:
    os.chdir(options.repository)
    sys.path.insert(0, ".")
    import jax

    dataset = importlib.import_module("datasets.simulated")
    matrices, made = dataset.gen_matrices, []

    def kept_matrices(*args: object) -> object:
        made.append(matrices(*args))
        return made[-1]

    vars(dataset)["gen_matrices"] = kept_matrices
    sizes = {"n_samples_inner": options.samples, "n_samples_outer": 1024, "dim_inner": 100, "dim_outer": 10}
    problem = dataset.Dataset.get_instance(**sizes).get_data()
    data = {
        f"{level}_{part}": np.asarray(values)
        for level, kept in zip(LEVELS, made[-2:], strict=True)
        for part, values in zip(PARTS, kept, strict=True)
    }
    for name, values in data.items():
        np.save(options.output / f"{name}.npy", values)
    value = Value(data)
    f_inner, n_inner, d_inner, _ = problem["pb_inner"]
    f_outer, n_outer, d_outer, _ = problem["pb_outer"]
    curves: dict[str, list[Curve]] = {}
    for name, (every, settings) in METHODS.items():
        if name not in options.only:
            continue
        curves[name] = []
        for seed in range(options.seeds):
            solver = importlib.import_module(f"solvers.{name.lower()}").Solver.get_instance(
                batch_size=BATCH, eval_freq=every, random_state=seed + 1, **settings
            )
            start = jax.numpy.zeros(d_inner), -2 * jax.numpy.ones(d_outer)
            solver.set_objective(f_inner, f_outer, n_inner, n_outer, *start)
            watch = Watch(every, value, lambda solver=solver: jax.block_until_ready(solver.outer_var), options.looks)
            solver.run(watch)
            curves[name].append(watch.curve)
        print(name, [f"{curve[-1][2]:.2e} in {curve[-1][1]:.2f} s" for curve in curves[name]], flush=True)
    (options.output / "theirs.json").write_text(json.dumps(curves))


class Watch:
    """Benchopt's callback: notes h after every so many steps, and keeps the time of that out of the seconds."""

    def __init__(self, every: int, value: Value, outer: Callable[[], Any], looks: int) -> None:
        self.every, self.value, self.outer, self.looks = every, value, outer, looks
        self.curve: Curve = []
        self.seconds, self.since = 0.0, 0.0

    def __call__(self) -> bool:
        x = self.outer()
        if self.curve:
            self.seconds += time.perf_counter() - self.since
        self.curve.append((self.every * len(self.curve), self.seconds, self.value(x)))
        self.since = time.perf_counter()
        return len(self.curve) <= self.looks


def run_ours(options: argparse.Namespace) -> None:
    import torch

    from bilevel import stochastic
    from bilevel.stochastic import Batch

    torch.set_num_threads(options.threads)

    def objective(z: torch.Tensor, x: torch.Tensor, data: Any) -> torch.Tensor:
        hess_inner, hess_outer, cross, linear_inner, linear_outer = data
        return (
            0.5 * (hess_inner @ z) @ z + 0.5 * (hess_outer @ x) @ x + (cross @ z) @ x + linear_inner @ z + linear_outer @ x
        ).mean()  # fmt: skip

    class Slices(Iterator[Batch]):
        """The minibatches of that project: slices of the data, in a new order in each epoch."""

        def __init__(self, rows: list[torch.Tensor], seed: int) -> None:
            self.parts = list(zip(*(t.split(BATCH) for t in rows), strict=True))
            self.generator = np.random.default_rng(seed)
            self.order: list[int] = []

        def __next__(self) -> Batch:
            if not self.order:
                self.order = list(self.generator.permutation(len(self.parts)))
            index = int(self.order.pop())
            return Batch(data=self.parts[index], index=index)

    data = {f"{level}_{part}": np.load(options.output / f"{level}_{part}.npy") for level in LEVELS for part in PARTS}
    levels = [[torch.from_numpy(data[f"{level}_{part}"]) for part in PARTS] for level in LEVELS]
    value = Value(data)
    samples = sum(len(level[0]) for level in levels)

    def ours(name: str, given: dict[str, Any]) -> tuple[dict[str, Any], tuple[float, ...]]:
        """Return the settings of our method, and the exponents of its decays: inner, adjoint or penalty, outer."""
        extra: dict[str, Any] = {}
        exponents = (0.5, 0.5) if name == "SOBA" else (0.0, 0.0)
        if name in ("SRBA", "VRBO"):
            extra["period"] = int(samples * given["period_frac"] / BATCH)
            extra["reference"] = lambda: tuple(tuple(level) for level in levels)
        if name in ("AmIGO", "StocBiO", "VRBO", "F2SA"):
            extra["inner_steps"] = given["n_inner_steps"]
        if name == "AmIGO":
            extra["adjoint_steps"] = 10
        if name in ("StocBiO", "VRBO", "MRBO"):
            extra["terms"], extra["neumann_rate"] = given["n_shia_steps"], given["step_size"]
        if name == "F2SA":
            extra["penalty"], extra["penalty_increment"] = given["lmbda0"], given["delta_lmbda"]
            exponents = (5 / 7, 4 / 7)
        if name == "MRBO":
            extra["inner_weight"] = extra["outer_weight"] = given["eta"]
            exponents = (1 / 3, 1 / 3)
        return extra, exponents

    curves: dict[str, list[Curve]] = {}
    for name, (every, given) in METHODS.items():
        if name not in options.only:
            continue
        curves[name] = []
        extra, exponents = ours(name, given)
        for seed in range(options.seeds):
            rates = given["step_size"], given["step_size"] / given["outer_ratio"]
            method = getattr(stochastic, name)(
                (objective, objective), torch.zeros(100), torch.full((10,), -2.0),
                inner_optimizer=partial(torch.optim.SGD, lr=rates[0]), outer_optimizer=partial(torch.optim.SGD, lr=rates[1]),
                options=stochastic.StepOptions(on_nonfinite="ignore", seed=seed), **extra,
            )  # fmt: skip
            optimizers = method.inner_optimizer, method.outer_optimizer
            schedulers = [
                torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step, power=power: (1 + step) ** -power)
                for optimizer, power in zip(optimizers, exponents, strict=True)
                if power
            ]
            batches = [Slices(level, 2 * seed + place) for place, level in enumerate(levels)]
            watch = Watch(every, value, lambda method=method: method.outer.detach().numpy(), options.looks)
            while watch():
                for _ in range(every):
                    method.step(*batches)
                    for scheduler in schedulers:
                        scheduler.step()
            curves[name].append(watch.curve)
        print(name, [f"{curve[-1][2]:.2e} in {curve[-1][1]:.2f} s" for curve in curves[name]], flush=True)
    (options.output / "ours.json").write_text(json.dumps(curves))
    if (options.output / "theirs.json").exists():
        table(options.output)


def table(folder: Path) -> None:
    """Print quartiles of h − min h at the same steps, and the ratio of the median seconds."""
    ours, theirs = (json.loads((folder / f"{side}.json").read_text()) for side in ("ours", "theirs"))
    print(
        f"{'method':8s} {'steps':>6s}  {'h − min h, ours: quartiles':>30s} {'theirs':>30s} {'µs/step':>9s} {'theirs':>9s} {'ratio':>6s}"
    )
    for name in (name for name in ours if name in theirs):
        looks = len(ours[name][0]) - 1
        for place in (looks // 2, looks):
            values = [quartiles([curve[place][2] for curve in side[name]]) for side in (ours, theirs)]
            steps = ours[name][0][place][0]
            each = [1e6 * statistics.median(curve[place][1] for curve in side[name]) / steps for side in (ours, theirs)]
            print(
                f"{name:8s} {steps:6d}  {values[0]:>30s} {values[1]:>30s} {each[0]:9.0f} {each[1]:9.0f} {each[0] / each[1]:6.2f}"
            )


def quartiles(values: list[float]) -> str:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:.2e} ({low:.1e}–{high:.1e})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("side", choices=["theirs", "ours", "table"])
    parser.add_argument("--repository", type=Path, help="a clone of benchmark_bilevel, for 'theirs'")
    parser.add_argument("--output", type=Path, required=True, help="a folder for the data and the curves")
    parser.add_argument("--samples", type=int, default=32_768, help="inner samples; 32,768 of them take 1.5 GB")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--looks", type=int, default=40, help="how often h is looked at")
    parser.add_argument("--only", nargs="*", choices=METHODS, default=list(METHODS), help="the methods to run")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    options.output = options.output.resolve()
    options.output.mkdir(parents=True, exist_ok=True)
    {"theirs": run_theirs, "ours": run_ours, "table": lambda given: table(given.output)}[options.side](options)


if __name__ == "__main__":
    main()
