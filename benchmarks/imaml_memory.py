"""Peak memory against the number of inner steps: figure 2(b) of the iMAML paper.

The network of the Omniglot experiments, 5-way 1-shot, four tasks in a batch. MAML unrolls the descent. Every measurement is
a process of its own: its peak resident memory less that of a process that makes one gradient. With --output DIR a plot.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn
from torch.func import functional_call, vmap

import bilevel
from bilevel.meta import FewShotSampler, Tasks, conv_network, draw_glyphs

STEPS = (1, 4, 16, 64)
LAM, LR = 2.0, 0.01


def batch() -> Tasks:
    return FewShotSampler(draw_glyphs(20, 6), ways=5, shots=1, queries=5).sample(4)


def implicit(steps: int) -> None:
    model = conv_network(5)
    learner = bilevel.IMAML(
        model, nn.functional.cross_entropy, LAM, bilevel.GradientDescent(LR, steps), bilevel.CG(5), on_failure="ignore"
    )
    learner(batch()).backward()


def unrolled(steps: int) -> None:
    model, tasks = conv_network(5), batch()
    theta = dict(model.named_parameters())
    phi = {name: value.expand(4, *value.shape) for name, value in theta.items()}

    def losses(phi: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return vmap(lambda p, x, y: nn.functional.cross_entropy(functional_call(model, p, (x,)), y))(phi, x, y)

    for _ in range(steps):
        pull = 0.5 * LAM * sum(((phi[name] - theta[name]) ** 2).sum() for name in theta)
        total = losses(phi, tasks.support_x, tasks.support_y).sum() + pull
        slopes = torch.autograd.grad(total, list(phi.values()), create_graph=True)
        phi = {name: value - LR * slope for (name, value), slope in zip(phi.items(), slopes, strict=True)}
    losses(phi, tasks.query_x, tasks.query_y).mean().backward()


METHODS = {"implicit": implicit, "unrolled": unrolled}


def peak(method: str, steps: int) -> float:
    """Return the peak resident memory of a process that makes one meta-gradient, in MiB."""
    found = subprocess.run(
        [sys.executable, __file__, "--one", method, str(steps)], capture_output=True, text=True, check=True
    )
    return float(found.stdout) / 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--one", nargs=2, default=None)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if options.one is not None:
        if options.one[0] != "none":
            METHODS[options.one[0]](int(options.one[1]))
        else:
            batch()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return
    base = peak("none", 0)
    rows = {name: [peak(name, steps) - base for steps in STEPS] for name in METHODS}
    print(f"Peak memory above {base:.0f} MiB of a process that only makes the tasks, MiB")
    print(f"{'inner steps':>12s}" + "".join(f"{name:>12s}" for name in rows))
    for place, steps in enumerate(STEPS):
        print(f"{steps:12d}" + "".join(f"{found[place]:12.0f}" for found in rows.values()))
    if options.output is not None:
        from matplotlib.figure import Figure

        from bilevel.cli.output import save_figure

        options.output.mkdir(parents=True, exist_ok=True)
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot()
        for name, found in rows.items():
            axes.loglog(STEPS, found, "o-", label={"implicit": "iMAML", "unrolled": "MAML, unrolled"}[name], base=2)
        axes.set(xlabel="inner steps", ylabel="peak memory, MiB")
        axes.legend()
        save_figure(figure, options.output / "imaml_memory.png")


if __name__ == "__main__":
    main()
