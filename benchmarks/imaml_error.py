"""The error of the meta-gradient against the number of inner steps: figure 2(a) of the iMAML paper.

Regularised linear regression, whose meta-gradient has a closed form. iMAML with 2 and 5 steps of conjugate gradients,
and MAML, which unrolls the same gradient descent. Writes a plot and a table with --output DIR.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

import bilevel

F64 = torch.float64
STEPS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TASKS, EXAMPLES, SIZE, LAM, LR = 20, 4, 20, 2.0, 0.1


def tasks() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(TASKS, SIZE, 1, generator=generator, dtype=F64)
    x, qx = (0.5 * torch.randn(TASKS, EXAMPLES, SIZE, generator=generator, dtype=F64) for _ in range(2))
    noise = [0.1 * torch.randn(TASKS, EXAMPLES, 1, generator=generator, dtype=F64) for _ in range(2)]
    return x, x @ truth + noise[0], qx, qx @ truth + noise[1]


def exact(theta: torch.Tensor, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return the meta-gradient by dense solves."""
    x, y, qx, qy = batch
    eye = torch.eye(SIZE, dtype=F64)
    hessian = 2 * x.mT @ x / EXAMPLES
    phi = torch.linalg.solve(hessian + LAM * eye, 2 * x.mT @ y / EXAMPLES + LAM * theta.unsqueeze(-1))
    v = 2 * qx.mT @ (qx @ phi - qy) / EXAMPLES
    return torch.linalg.solve(eye + hessian / LAM, v).squeeze(-1).mean(0)


def implicit(model: nn.Linear, batch: tuple[torch.Tensor, ...], steps: int, cg_steps: int) -> torch.Tensor:
    learner = bilevel.IMAML(
        model, nn.functional.mse_loss, LAM, bilevel.GradientDescent(LR, steps), bilevel.CG(cg_steps)
    )
    model.zero_grad()
    learner(batch).backward()
    assert model.weight.grad is not None
    return model.weight.grad.reshape(-1)


def unrolled(model: nn.Linear, batch: tuple[torch.Tensor, ...], steps: int) -> torch.Tensor:
    """Return the gradient through the descent itself, as MAML computes it."""
    x, y, qx, qy = batch
    theta = model.weight.detach().reshape(-1).requires_grad_(True)
    phi = theta.expand(TASKS, -1)
    for _ in range(steps):
        fit = ((x @ phi.unsqueeze(-1) - y) ** 2).mean(dim=(1, 2)).sum() + 0.5 * LAM * ((phi - theta) ** 2).sum()
        (slope,) = torch.autograd.grad(fit, phi, create_graph=True)
        phi = phi - LR * slope
    loss = ((qx @ phi.unsqueeze(-1) - qy) ** 2).mean(dim=(1, 2)).mean()
    return torch.autograd.grad(loss, theta)[0]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=None)
    output = parser.parse_args().output
    torch.manual_seed(0)
    model, batch = nn.Linear(SIZE, 1, bias=False).double(), tasks()
    reference = exact(model.weight.detach().reshape(-1), batch)
    rows = {
        name: [float((method(steps) - reference).norm() / reference.norm()) for steps in STEPS]
        for name, method in {
            "iMAML, 2 CG steps": lambda steps: implicit(model, batch, steps, 2),
            "iMAML, 5 CG steps": lambda steps: implicit(model, batch, steps, 5),
            "MAML, unrolled": lambda steps: unrolled(model, batch, steps),
        }.items()
    }
    print(f"Relative error of the meta-gradient: {TASKS} tasks, {SIZE} parameters, {EXAMPLES} examples, λ = {LAM:g}")
    print(f"{'inner steps':>12s}" + "".join(f"{name:>20s}" for name in rows))
    for place, steps in enumerate(STEPS):
        print(f"{steps:12d}" + "".join(f"{errors[place]:20.1e}" for errors in rows.values()))
    if output is not None:
        from matplotlib.figure import Figure

        from bilevel.cli.output import save_figure

        output.mkdir(parents=True, exist_ok=True)
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot()
        for name, errors in rows.items():
            axes.loglog(STEPS, errors, "o-", label=name)
        axes.set(xlabel="inner steps", ylabel="relative error of the meta-gradient")
        axes.legend()
        save_figure(figure, output / "imaml_error.png")


if __name__ == "__main__":
    main()
