"""What replays save: the same calls with and without them, in the same order."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timing import compare, rounds
from torch.func import vmap
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

import bilevel
from bilevel.meta import FewShotSampler, SinusoidSampler, conv_network, draw_glyphs, mlp

F64 = torch.float64
COUNT = rounds(20)
torch.manual_seed(0)


def without(function: Callable[[], object]) -> Callable[[], object]:
    def plain() -> object:
        with bilevel.replaying(False):
            return function()

    return plain


def contest(title: str, function: Callable[[], object], count: int = COUNT) -> None:
    compare(title, {"evaluated at each step": without(function), "replayed": function}, "evaluated at each step", count)


def logistic(w, X, y, strengths):
    return binary_cross_entropy_with_logits(X @ w, y) + 0.5 * (strengths.exp() * w**2).sum()


def quartic(x, A, b):
    return 0.5 * x @ A @ x - b @ x + 0.01 * (x**4).sum()


def contracting(z, W, b):
    return torch.tanh(W @ z + b)


def differentiated(layer, start: torch.Tensor, *args: torch.Tensor, in_dims=None) -> Callable[[], object]:
    def call() -> object:
        free = [a.clone().requires_grad_(True) for a in args]
        x = layer(start, *free) if in_dims is None else vmap(layer, in_dims=in_dims)(start, *free)
        return torch.autograd.grad(x.square().sum(), free)

    return call


def main() -> None:
    X, y = torch.randn(300, 30, dtype=F64), (torch.rand(300) < 0.5).to(F64)
    layer = bilevel.argmin(logistic)
    contest("One logistic regression, 30 strengths", differentiated(layer, X.new_zeros(30), X, y, X.new_zeros(30)))
    descent = bilevel.argmin(logistic, solver=bilevel.LBFGS(), linear_solver=bilevel.CG())
    contest("The same by L-BFGS and CG", differentiated(descent, X.new_zeros(30), X, y, X.new_zeros(30)))
    A = torch.randn(64, 20, 20, dtype=F64)
    A, b = A @ A.mT / 20 + torch.eye(20, dtype=F64), torch.randn(64, 20, dtype=F64)
    layer = bilevel.argmin(quartic)
    contest("64 quartics of 20 unknowns under vmap", differentiated(layer, b.new_zeros(20), A, b, in_dims=(None, 0, 0)))
    W = 0.8 * torch.linalg.qr(torch.randn(64, 64, dtype=F64))[0]
    contest(
        "A fixed point, d = 64", differentiated(bilevel.fixed_point(contracting), W.new_zeros(64), W, W.new_ones(64))
    )

    def learning(learner: bilevel.IMAML, tasks: object) -> Callable[[], object]:
        def step() -> object:
            learner.zero_grad()
            learner(tasks).backward()
            return None

        return step

    settings = bilevel.GradientDescent(0.01, 16), bilevel.CG(5)
    learner = bilevel.IMAML(mlp(), mse_loss, 2.0, *settings, on_failure="ignore")
    contest("IMAML, sinusoids, 25 tasks", learning(learner, SinusoidSampler(shots=10, queries=10).sample(25)))
    tasks = FewShotSampler(draw_glyphs(60, 16), ways=5, shots=1, queries=15).sample(16)
    learner = bilevel.IMAML(conv_network(5), cross_entropy, 2.0, *settings, on_failure="ignore")
    contest("IMAML, 5 ways, 4 conv blocks, 16 tasks", learning(learner, tasks), max(5, COUNT // 4))


if __name__ == "__main__":
    main()
