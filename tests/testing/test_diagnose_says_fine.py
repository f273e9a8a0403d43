"""A problem whose gradient is wrong, or that the library refuses, is never called healthy; a sound one is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import bilevel
from bilevel.testing import Defect, diagnose

F64 = torch.float64
A, ZERO = torch.tensor([1.0, 2.0], dtype=F64), torch.zeros(2, dtype=F64)
HIDDEN = torch.tensor(2.0, dtype=F64, requires_grad=True)
argmin = bilevel.argmin


def distance(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return ((x - a) ** 2).sum()


class Outer(bilevel.BilevelProblem):
    def __init__(self, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.loss = loss

    def inner_objective(self, inner, outer, data):
        return ((inner - outer) ** 2).sum()

    def outer_objective(self, inner, outer, data):
        return self.loss(inner, outer)


LAYERS: dict[str, tuple[bilevel.Layer, Defect, str]] = {
    "an argument detached in one of two terms": (
        argmin(lambda x, a: ((x - a.detach()) ** 2 + x * a).sum()), Defect.WRONG_GRADIENT, "derivative by a",
    ),
    "an argument detached in one of two terms, with a bound": (
        argmin(lambda x, a: ((x - a.detach()) ** 2 + x * a).sum(), lower=0.0), Defect.WRONG_GRADIENT, "derivative by a",
    ),
    "a wrong gradient, with a bound": (
        argmin(lambda x, a: ((x.detach() - a) ** 2 + 0.5 * (x - a) ** 2).sum(), lower=0.0), Defect.WRONG_GRADIENT, "differences of the values",
    ),
    "a captured tensor, with a bound": (
        argmin(lambda x, a: distance(x, a * HIDDEN), lower=0.0), Defect.CAPTURED_TENSOR, "HIDDEN",
    ),
    "a captured tensor, with a proximal term": (
        argmin(lambda x, a: distance(x, a * HIDDEN), prox=bilevel.prox.L1(0.1)), Defect.CAPTURED_TENSOR, "HIDDEN",
    ),
    "a captured tensor in a constraint": (
        argmin(distance, inequality=lambda x, a: x.sum() - HIDDEN), Defect.CAPTURED_TENSOR, "a constraint or bound reaches one",
    ),
    "a random objective, with a bound": (
        argmin(lambda x, a: distance(x, a + 0.1 * torch.rand(())), lower=0.0), Defect.STOCHASTIC, "differ",
    ),
    "a random constraint": (
        argmin(distance, inequality=lambda x, a: x.sum() - 1 - 0.1 * torch.rand(())), Defect.STOCHASTIC, "a constraint or bound",
    ),
    "an objective of two values": (argmin(lambda x, a: (x - a) ** 2), Defect.UNUSABLE, "expected the objective to return a scalar tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_of_a_layer(name: str) -> None:
    layer, defect, words = LAYERS[name]
    found = diagnose(layer, ZERO + 0.1, A)
    named = [finding.sentence for finding in found.findings if finding.defect is defect]
    assert named and words in named[0], str(found)


LOSSES: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], Defect, str]] = {
    "NaN": (lambda x, o: (x - 9).log().sum(), Defect.NOT_FINITE, "the outer loss is nan"),
    "a gradient that is NaN": (
        lambda x, o: (0 * x).sum().sqrt(),
        Defect.NOT_FINITE,
        "gradient is not finite",
    ),
    "random": (lambda x, o: distance(x, torch.rand(())), Defect.STOCHASTIC, "the outer loss"),
    "detached in part": (
        lambda x, o: (x * x.detach()).sum(),
        Defect.WRONG_GRADIENT,
        "derivative by the inner solution",
    ),
    "outer detached": (lambda x, o: (x * o.detach()).sum(), Defect.WRONG_GRADIENT, "derivative by outer"),
    "at a kink": (lambda x, o: (x - A).abs().sum(), Defect.DEGENERATE, "kink at the inner solution"),
    "of two values": (lambda x, o: x, Defect.UNUSABLE, "expected outer_objective to return a scalar"),
    "with a captured tensor": (lambda x, o: x.sum() * HIDDEN, Defect.CAPTURED_TENSOR, "outer_objective reaches one"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_of_an_outer_loss(name: str) -> None:
    loss, defect, words = LOSSES[name]
    found = diagnose(Outer(loss), A, None, init=ZERO)
    named = [finding.sentence for finding in found.findings if finding.defect is defect]
    assert named and words in named[0], str(found)


def test_a_solution_that_is_zero_is_stationary() -> None:
    found = diagnose(Outer(lambda x, o: (x**2 + x).sum()), 0 * A, None, init=ZERO + 0.3)
    assert found.healthy, str(found)


def test_arguments_that_have_to_be_symmetric_or_are_at_a_kink_accuse_nobody() -> None:
    S = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=F64)
    layer = argmin(lambda x, S, a: 0.5 * (torch.linalg.cholesky(S).mT @ x).square().sum() - torch.relu(a) @ x - x.sum())
    assert diagnose(layer, ZERO, S, 0 * A).defects == (Defect.ZERO_GRADIENT,)  # that of relu(0)
    labels = torch.tensor([0.0, 1.0], dtype=F64)
    logistic = argmin(lambda w, y, s: (torch.nn.functional.softplus(torch.where(y > 0.5, -w, w)) + s * w**2).sum())
    assert diagnose(logistic, ZERO, labels, torch.ones((), dtype=F64).requires_grad_()).healthy
