"""The time of a meta-gradient beside the structure of the authors' released code, with the same numbers out.

That structure: a loop over tasks, in each a copy of the model adapted by an optimiser, and for each step of conjugate
gradients a fresh gradient with its graph, differentiated once more. Written here from its description.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from timing import check, compare
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import bilevel
from bilevel.cli.allocator import keep_freed_memory
from bilevel.meta import FewShotSampler, SinusoidSampler, Tasks, conv_network, draw_glyphs, mlp

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def flat(tensors: object) -> torch.Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])  # type: ignore[attr-defined]


def descended(
    model: nn.Module, loss: Loss, x: torch.Tensor, y: torch.Tensor, lam: float, lr: float, steps: int
) -> nn.Module:
    """Return a copy of the model adapted to one task by an optimiser."""
    theta = [p.detach() for p in model.parameters()]
    learner = copy.deepcopy(model)
    parameters = list(learner.parameters())
    optimizer = torch.optim.SGD(parameters, lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        pull = sum(((p - t) ** 2).sum() for p, t in zip(parameters, theta, strict=True))
        (loss(learner(x), y) + 0.5 * lam * pull).backward()
        optimizer.step()
    return learner


def looped(
    model: nn.Module, loss: Loss, tasks: Tasks, lam: float, lr: float, steps: int, cg_steps: int
) -> torch.Tensor:
    """Return the meta-gradient, task by task and product by product."""
    total = torch.zeros_like(flat(model.parameters()))
    for x, y, qx, qy in zip(*tasks[:4], strict=True):
        learner = descended(model, loss, x, y, lam, lr, steps)
        parameters = list(learner.parameters())
        v = flat(torch.autograd.grad(loss(learner(qx), qy), parameters))

        def product(u: torch.Tensor, learner=learner, parameters=parameters, x=x, y=y) -> torch.Tensor:
            slopes = torch.autograd.grad(loss(learner(x), y), parameters, create_graph=True)
            joined = torch.cat([slope.reshape(-1) for slope in slopes])
            return u + flat(torch.autograd.grad(joined @ u, parameters)) / lam

        g, r, p = torch.zeros_like(v), v.clone(), v.clone()
        rr = r @ r
        for _ in range(cg_steps):
            Ap = product(p)
            curvature = p @ Ap
            if not curvature > 0:  # the released code goes on; where it matters the two would differ
                break
            alpha = rr / curvature
            g, r = g + alpha * p, r - alpha * Ap
            fresh = r @ r
            p, rr = r + fresh / rr * p, fresh
        total += g / len(tasks.support_y)
    return total


def ours(
    model: nn.Module, loss: Loss, tasks: Tasks, lam: float, lr: float, steps: int, cg_steps: int, per_pass: int | None
):
    learner = bilevel.IMAML(
        model, loss, lam, bilevel.GradientDescent(lr, steps), bilevel.CG(cg_steps), on_failure="ignore",
        tasks_per_pass=per_pass,
    )  # fmt: skip

    def gradient() -> torch.Tensor:
        model.zero_grad()
        learner(tasks).backward()
        return flat(p.grad for p in model.parameters())

    return gradient


def contest(
    title: str, model: nn.Module, loss: Loss, tasks: Tasks, settings: tuple[float, float, int, int], count: int, repeat: int = 1,
    passes: tuple[int | None, ...] = (None,),
) -> None:  # fmt: skip
    """Check that all compute the same in float64, and time them in float32, where a kink of a ReLU may fall to either side."""
    contestants: dict[str, Callable[[], torch.Tensor]] = {
        "looped, a fresh double backward per product": lambda: looped(model, loss, tasks, *settings)
    }
    for per_pass in passes:
        name = "bilevel.IMAML" if per_pass is None else f"bilevel.IMAML, {per_pass} tasks a pass"
        contestants[name] = ours(model, loss, tasks, *settings, per_pass)
    exact = copy.deepcopy(model).double()
    wide = Tasks(*(t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in tasks))
    reference = looped(exact, loss, wide, *settings)
    print()
    for name, per_pass in zip(list(contestants)[1:], passes, strict=True):
        check(name, ours(exact, loss, wide, *settings, per_pass)(), reference, 1e-8)
    compare(title, contestants, "looped, a fresh double backward per product", count, repeat)


def adaptation(model: nn.Module, loss: Loss, tasks: Tasks, lam: float, lr: float, steps: int, count: int) -> None:
    """Time the inner gradients alone."""
    learner = bilevel.IMAML(model, loss, lam, bilevel.GradientDescent(lr, steps), on_failure="ignore")

    def loop() -> torch.Tensor:
        pairs = zip(tasks.support_x, tasks.support_y, strict=True)
        return torch.stack([flat(descended(model, loss, x, y, lam, lr, steps).parameters()) for x, y in pairs])

    def together() -> torch.Tensor:
        adapted = learner.adapt((tasks.support_x, tasks.support_y))
        return torch.cat([p.flatten(1) for p in adapted.values()], 1)

    print()
    check("bilevel.IMAML", together(), loop(), 1e-4)
    title = f"Sinusoid, MLP 40-40, {len(tasks.support_y)} tasks, {steps} inner gradients alone"
    compare(
        title, {"looped, an optimiser's steps": loop, "bilevel.IMAML": together}, "looped, an optimiser's steps", count
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="sinusoid,5,20")
    parser.add_argument("--plain-malloc", action="store_true", help="leave the C library's allocator as it is")
    options = parser.parse_args()
    only = options.only.split(",")
    # As ``bilevel imaml`` does, for all contestants; the loop's tensors are small, and gain little by it.
    print(f"freed memory is kept: {keep_freed_memory() if not options.plain_malloc else False}")
    torch.manual_seed(0)
    if "sinusoid" in only:
        torch.set_num_threads(1)
        sinusoid = SinusoidSampler(shots=10, queries=10).sample(25)
        contest(
            "Sinusoid, MLP 40-40, 25 tasks, 1 inner step, 1 CG step", mlp(), mse_loss, sinusoid, (2.0, 0.01, 1, 1),
            10 * options.rounds,
        )  # fmt: skip
        contest(
            "Sinusoid, MLP 40-40, 25 tasks, 16 inner steps, 5 CG steps", mlp(), mse_loss, sinusoid, (2.0, 0.01, 16, 5),
            4 * options.rounds,
        )  # fmt: skip
        adaptation(mlp(), mse_loss, sinusoid, 2.0, 0.01, 100, 2 * options.rounds)
    glyphs = draw_glyphs(60, 16)
    if "5" in only:
        torch.manual_seed(0)
        torch.set_num_threads(2)
        tasks = FewShotSampler(glyphs, ways=5, shots=1, queries=15).sample(16)
        contest(
            "5-way 1-shot, 4 conv blocks, 16 tasks, 16 inner steps, 5 CG steps", conv_network(5), cross_entropy, tasks,
            (2.0, 0.01, 16, 5), options.rounds,
        )  # fmt: skip
    if "20" in only:
        torch.manual_seed(0)
        torch.set_num_threads(1)
        tasks = FewShotSampler(glyphs, ways=20, shots=1, queries=5).sample(16)
        contest(
            "20-way 1-shot, 4 conv blocks, 16 tasks, 16 inner steps, 5 CG steps", conv_network(20), cross_entropy, tasks,
            # λ beyond the negative curvature of a fresh network: where products meet that, steps end by their last digits.
            (20.0, 0.01, 16, 5), max(3, options.rounds // 2), passes=(None, 4, 1),
        )  # fmt: skip


if __name__ == "__main__":
    main()
