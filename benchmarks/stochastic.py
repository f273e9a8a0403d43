"""Minibatch methods on a finite sum of quadratics: suboptimality of the value function against passes and against seconds.

The problem is in the manner of benchopt's benchmark_bilevel (its simulated quadratic), written anew:
G(z, x) = mean_i ½ (a_iᵀz)² + xᵀC_i z + b_iᵀz and F(z, x) = mean_j ½ (p_jᵀz)² + ½ (s_jᵀx)² + xᵀD_j z + ..., with known spectra, so that
the value function h(x) = F(z*(x), x) is a quadratic of closed form. Every minibatch is drawn at random, that of the first sample included.

A pass is one forward or one reverse pass over one minibatch, or its share of a larger batch. ``--quick`` runs a small size in about a
minute; the full size is n = 32,768, m = 1,024, 100 inner and 10 outer variables.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bilevel import CG, stochastic
from bilevel.stochastic import Minibatches


@dataclass(frozen=True)
class Size:
    inner_samples: int
    outer_samples: int
    inner: int
    outer: int
    batch: int
    steps: int
    seeds: int


FULL = Size(inner_samples=32_768, outer_samples=1_024, inner=100, outer=10, batch=64, steps=20_000, seeds=5)
QUICK = Size(inner_samples=2_048, outer_samples=256, inner=20, outer=5, batch=64, steps=1_500, seeds=3)


@dataclass(frozen=True, eq=False)
class Level:
    """One level's samples: ½ (a_iᵀz)² + ½ (s_iᵀx)² + (xᵀu_i)(w_iᵀz) + b_iᵀz + c_iᵀx."""

    a: torch.Tensor
    s: torch.Tensor
    u: torch.Tensor
    w: torch.Tensor
    b: torch.Tensor
    c: torch.Tensor

    @staticmethod
    def random(samples: int, inner: int, outer: int, least: float, cross: float, generator: torch.Generator) -> Level:
        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        def shaped(size: int, zero: bool) -> torch.Tensor:
            basis = torch.linalg.qr(normal(size, size)).Q
            roots = torch.logspace(0, torch.log10(torch.tensor(least)).item(), size, dtype=torch.float64).sqrt()
            if zero:
                roots[-1] = 0.0
            return normal(samples, size) @ (basis * roots) @ basis.T

        mixing = torch.linalg.qr(normal(inner, outer)).Q * torch.logspace(-1, 0, outer, dtype=torch.float64) * cross
        common = normal(samples, inner)
        return Level(
            shaped(inner, False), shaped(outer, True), (common @ mixing) , common, normal(samples, inner), normal(samples, outer)
        )  # fmt: skip

    @property
    def rows(self) -> tuple[torch.Tensor, ...]:
        return self.a, self.s, self.u, self.w, self.b, self.c

    def matrices(self) -> tuple[torch.Tensor, ...]:
        """Return the means: the Hessians by z and by x, the cross matrix (outer, inner), and the linear terms."""
        n = len(self.a)
        return self.a.T @ self.a / n, self.s.T @ self.s / n, self.u.T @ self.w / n, self.b.mean(0), self.c.mean(0)


def objective(z: torch.Tensor, x: torch.Tensor, data: Any) -> torch.Tensor:
    a, s, u, w, b, c = data
    return (0.5 * (a @ z) ** 2 + 0.5 * (s @ x) ** 2 + (u @ x) * (w @ z) + b @ z + c @ x).mean()


class Value:
    """h(x) − min h of the whole data."""

    def __init__(self, lower: Level, upper: Level) -> None:
        H, _, C, b, _ = lower.matrices()
        P, S, D, e, f = upper.matrices()
        Z = -torch.linalg.solve(H, C.T)  # z*(x) = Z x + z0
        z0 = -torch.linalg.solve(H, b)
        self.A = Z.T @ P @ Z + S + D @ Z + (D @ Z).T
        self.g = Z.T @ (P @ z0 + e) + D @ z0 + f
        self.best = -torch.linalg.solve(self.A, self.g)
        if torch.linalg.eigvalsh(self.A)[0] <= 0:
            raise SystemExit("the value function is not convex; take another seed")

    def __call__(self, x: torch.Tensor) -> float:
        d = x.detach() - self.best
        return float(0.5 * d @ self.A @ d)


def sgd(rate: float) -> Callable[..., torch.optim.Optimizer]:
    return partial(torch.optim.SGD, lr=rate)


@dataclass(frozen=True)
class Contestant:
    """A method with its rates; ``decay`` lets both rates fall as (1 + step / horizon)^-½, which methods with noise need."""

    make: Any
    settings: dict[str, Any]
    inner: float
    outer: float
    decay: bool = True
    large: bool = False


CONTESTANTS = {
    "SOBA": Contestant(stochastic.SOBA, {}, 0.05, 0.02),
    "MASOBA": Contestant(stochastic.MASOBA, {"weight": 0.1}, 0.05, 0.02),
    "SABA": Contestant(stochastic.SABA, {}, 0.05, 0.02, decay=False),
    "SRBA": Contestant(stochastic.SRBA, {"period": 64}, 0.05, 0.02, decay=False, large=True),
    "AmIGO": Contestant(stochastic.AmIGO, {}, 0.05, 0.1),
    "StocBiO": Contestant(stochastic.StocBiO, {}, 0.05, 0.1),
    "TTSA": Contestant(stochastic.TTSA, {"max_terms": 20}, 0.05, 0.02),
    "ALSET": Contestant(stochastic.ALSET, {"max_terms": 20}, 0.05, 0.02),
    "MRBO": Contestant(stochastic.MRBO, {}, 0.05, 0.02),
    "VRBO": Contestant(stochastic.VRBO, {"period": 64}, 0.05, 0.05, decay=False, large=True),
    "F2SA": Contestant(stochastic.F2SA, {"penalty": 10.0, "penalty_increment": 0.01}, 0.05, 0.02),
    "BOME": Contestant(stochastic.BOME, {}, 0.05, 0.02),
    "PZOBO": Contestant(stochastic.PZOBO, {"directions": 2, "inner_steps": 10}, 0.05, 0.01),
    "ImplicitStep, CG": Contestant(stochastic.ImplicitStep, {"linear_solver": CG(max_steps=5)}, 0.05, 0.1),
}


def run(
    contestant: Contestant, size: Size, lower: Level, upper: Level, value: Value, seed: int, passes: int
) -> list[tuple[float, ...]]:
    """Return (passes, seconds, suboptimality) at about forty places, until so many passes are spent."""
    z = torch.zeros(size.inner, dtype=torch.float64)
    x = torch.ones(size.outer, dtype=torch.float64)
    settings = dict(contestant.settings)
    large = [0]
    if contestant.large:

        def reference() -> tuple[Any, Any]:
            large[0] += 1
            return lower.rows, upper.rows

        settings["reference"] = reference
    options = stochastic.StepOptions(on_nonfinite="ignore", seed=seed)
    method = contestant.make(
        (objective, objective), z, x, inner_optimizer=sgd(contestant.inner), outer_optimizer=sgd(contestant.outer),
        options=options, **settings,
    )  # fmt: skip
    train = Minibatches(lower.rows, size.batch, seed=seed)
    valid = Minibatches(upper.rows, size.batch, seed=seed + 1000)
    horizon = 0.02 * passes / 5

    def schedule(step: int) -> float:
        return (1 + step / horizon) ** -0.5 if contestant.decay else 1.0

    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(o, schedule) for o in (method.inner_optimizer, method.outer_optimizer)
    ]
    curve: list[tuple[float, ...]] = [(0.0, 0.0, value(x))]
    begin, paused = time.perf_counter(), 0.0
    # A large batch counts for as many passes as it has minibatches: 3 of five passes are of G, 2 of F.
    extra = 3 * (train.count - 1) + 2 * (valid.count - 1)
    due = passes / 40
    while curve[-1][0] < passes:
        method.step(train, valid)
        for scheduler in schedulers:
            scheduler.step()
        spent = sum(method.passes.values()) + large[0] * extra
        if spent >= due:
            now = time.perf_counter()
            curve.append((float(spent), now - begin - paused, value(x)))
            paused += time.perf_counter() - now
            due = spent + passes / 40
            if not curve[-1][2] < 1e12:
                break
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--only", help="methods whose name has this word")
    parser.add_argument("--output", type=Path, default=None, help="a JSON file for all curves")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size = QUICK if options.quick else FULL
    generator = torch.Generator().manual_seed(0)
    lower = Level.random(size.inner_samples, size.inner, size.outer, 0.1, 0.1, generator)
    upper = Level.random(size.outer_samples, size.inner, size.outer, 1.0, 0.1, generator)
    value = Value(lower, upper)
    passes, seeds = 5 * size.steps, range(options.seeds or size.seeds)
    curves: dict[str, list[Any]] = {}
    print(f"n = {size.inner_samples}, m = {size.outer_samples}, {size.inner}/{size.outer} variables, batch {size.batch}, {passes} passes, "
          f"{len(seeds)} seeds; h(x0) − min h = {value(torch.ones(size.outer, dtype=torch.float64)):.3g}")  # fmt: skip
    print(f"{'method':18s} {'h − min h: quartiles at half':>32s} {'at the end':>32s} {'seconds':>9s} {'µs/pass':>9s}")
    for name, contestant in CONTESTANTS.items():
        if options.only and options.only not in name:
            continue
        found = [run(contestant, size, lower, upper, value, seed, passes) for seed in seeds]
        curves[name] = found
        halves = [curve[len(curve) // 2][2] for curve in found]
        ends = [curve[-1][2] for curve in found]
        seconds = statistics.median(curve[-1][1] for curve in found)
        print(
            f"{name:18s} {quartiles(halves):>32s} {quartiles(ends):>32s} {seconds:9.2f} {1e6 * seconds / found[0][-1][0]:9.1f}",
            flush=True,
        )
    if options.output:
        options.output.write_text(
            json.dumps({"size": asdict(size), "columns": ["passes", "seconds", "suboptimality"], "curves": curves})
        )


def quartiles(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2e}"
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.2e} ({low:.1e}–{high:.1e})"


if __name__ == "__main__":
    main()
