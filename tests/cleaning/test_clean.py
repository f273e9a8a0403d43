"""Example weights find wrong labels of scikit-learn's digits, and training with them is more accurate."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import bilevel
from bilevel import cleaning, stochastic
from bilevel.cleaning import CleaningSettings, SigmoidWeights, SimplexWeights
from bilevel.errors import ArgumentError, DtypeError, ShapeError


@pytest.fixture(scope="module")
def digits() -> tuple[Any, Any, Any, torch.Tensor, torch.Tensor]:
    """400 training digits of which 138 have wrong labels, 200 trusted, 1,197 for the test; the mask and the true labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    inputs, labels = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, trusted, test = order[:400], order[400:600], order[600:]
    given, wrong = cleaning.corrupt(labels[train], 0.345)
    assert int(wrong.sum()) == 138
    return (
        (inputs[train], given),
        (inputs[trusted], labels[trusted]),
        (inputs[test], labels[test]),
        wrong,
        labels[train],
    )


@pytest.mark.slow
def test_wrong_labels_are_flagged_and_the_test_accuracy_improves(digits: Any) -> None:
    training, trusted, test, wrong, true = digits
    seen = []
    found = cleaning.clean(training, trusted, test=test, on_step=lambda step, result: seen.append(step))
    precision, recall = found.precision_and_recall(wrong)
    assert precision > 0.85 and recall > 0.85
    assert found.accuracies.cleaned >= found.accuracies.untrusted + 0.04
    assert found.accuracies.cleaned > 0.9 and 0 < found.accuracies.trusted_only < 1
    assert seen == list(range(1, 151)) and found.outer_losses[-1] < found.outer_losses[0]
    # The most suspicious are wrong, and most suggestions for the wrong are the truth.
    assert wrong[found.order[:60]].double().mean() > 0.9
    assert (found.suggested[wrong] == true[wrong]).double().mean() > 0.75
    assert torch.equal(found.flagged, found.weights < 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["network", "minibatches by SOBA", "images"])
def test_other_models_and_methods_find_wrong_labels(digits: Any, case: str) -> None:
    training, trusted, _, wrong, _ = digits
    make, settings = partial(cleaning.mlp, 64, 10), CleaningSettings(steps=80, training_steps=20)
    if case == "minibatches by SOBA":

        def soba(problem: Any, inner: Any, outer: Any) -> Any:
            return stochastic.SOBA(
                problem, inner, outer, inner_optimizer=partial(torch.optim.SGD, lr=0.3, momentum=0.9),
                adjoint_optimizer=partial(torch.optim.SGD, lr=0.3), outer_optimizer=partial(torch.optim.Adam, lr=0.05),
            )  # fmt: skip

        make = None
        settings = CleaningSettings(steps=400, training_steps=20, batch_size=100, make_method=soba)
    if case == "images":
        make, settings = (
            partial(cleaning.convolutional, 1, 8, 10, width=4),
            CleaningSettings(steps=60, training_steps=20),
        )
        training, trusted = ((data[0].reshape(-1, 1, 8, 8), data[1]) for data in (training, trusted))
    found = cleaning.clean(training, trusted, make_model=make, settings=settings)
    precision, recall = found.precision_and_recall(wrong)
    assert precision > 0.7 and recall > 0.6
    assert torch.isnan(torch.tensor(found.accuracies.cleaned))


def test_the_hypergradient_of_weights_is_that_of_the_library() -> None:
    """−w′_i ⟨∇ℓ_i, H⁻¹∇F⟩ from the stochastic step, and from an exact solve of the same problem with the parameters as a dict."""
    torch.manual_seed(0)
    data = torch.randn(12, 3, dtype=torch.float64), torch.randint(2, (12,)), torch.arange(12)
    trusted = torch.randn(6, 3, dtype=torch.float64), torch.randint(2, (6,))
    for weights in (SigmoidWeights(), SimplexWeights()):
        problem = cleaning.ExampleWeighting(weights, weight_decay=0.1)
        model = nn.Linear(3, 2).double()

        class Flat(bilevel.BilevelProblem):
            def inner_objective(self, inner: Any, outer: Any, data: Any, problem: Any = problem) -> torch.Tensor:
                return problem.inner_objective(_Handle(inner), outer, data[0])

            def outer_objective(self, inner: Any, outer: Any, data: Any, problem: Any = problem) -> torch.Tensor:
                return problem.outer_objective(_Handle(inner), outer, data[1])

        logits = torch.linspace(-1, 1, 12, dtype=torch.float64)
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        exact = Flat().hypergradient(logits, (data, trusted), init=start)
        method = stochastic.ImplicitStep(
            problem, model, logits, inner_steps=0, linear_solver=bilevel.Exact(), outer_optimizer=partial(torch.optim.SGD, lr=1.0)
        )  # fmt: skip
        model.load_state_dict(exact.inner)
        before = logits.detach().clone()
        method.step(data, trusted)
        torch.testing.assert_close(before - logits.detach(), exact.grad, rtol=1e-8, atol=1e-12)


class _Handle:
    """Parameters of a linear layer in a dict, in the manner of the module."""

    def __init__(self, tree: dict[str, torch.Tensor]) -> None:
        self.tree = tree

    def parameters(self) -> Any:
        return iter(self.tree.values())

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(inputs, self.tree["weight"], self.tree["bias"])


def test_cleaning_is_the_same_every_time_and_leaves_the_generator_alone() -> None:
    data = torch.randn(20, 3), torch.randint(2, (20,))
    settings = CleaningSettings(steps=3, training_steps=3, seed=7, batch_size=8)
    torch.manual_seed(1)
    first = cleaning.clean(data, data, settings=settings)
    after = torch.randn(1)
    torch.manual_seed(1)
    again = cleaning.clean(data, data, settings=settings)
    assert torch.equal(first.weights, again.weights) and torch.equal(after, torch.randn(1))


X, Y = torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 0, 1])
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "pair": (lambda: cleaning.clean(X, (X, Y)), ArgumentError, "training to be a pair"),
    "labels": (lambda: cleaning.clean((X, Y.float()), (X, Y)), DtypeError, "int64 labels"),
    "rows": (lambda: cleaning.clean((X, Y[:5]), (X, Y)), ShapeError, "one label for each input"),
    "negative": (lambda: cleaning.clean((X, Y - 1), (X, Y)), ArgumentError, "labels from 0"),
    "not finite": (lambda: cleaning.clean((X / 0, Y), (X, Y)), ArgumentError, "finite inputs"),
    "steps": (lambda: CleaningSettings(steps=0), ArgumentError, "steps"),
    "weights": (lambda: CleaningSettings(weights="sigmoid"), ArgumentError, "SigmoidWeights"),
    "share": (lambda: cleaning.corrupt(Y, 1.0), ArgumentError, "share"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    make, error, words = BAD[case]
    with pytest.raises(error, match=words):
        make()
