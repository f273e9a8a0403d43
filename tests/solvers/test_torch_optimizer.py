"""Optimizers of torch.optim as inner solvers."""

from __future__ import annotations

import pytest
import torch

import bilevel
from bilevel.reports import Status
from bilevel.tolerance import Tolerance

from . import support
from .support import F64, statuses

ELEMENTWISE = {
    "SGD": {"lr": 0.1, "momentum": 0.5, "nesterov": True}, "Adam": {"lr": 0.1},
    "AdamW": {"lr": 0.1, "weight_decay": 0.0},
    "RMSprop": {"lr": 0.01}, "Adagrad": {"lr": 0.5}, "Adadelta": {"lr": 5.0}, "Adamax": {"lr": 0.1},
    "NAdam": {"lr": 0.05}, "RAdam": {"lr": 0.1}, "Rprop": {"lr": 0.05}, "ASGD": {"lr": 0.1},
}  # fmt: skip
TARGETS = torch.tensor([[1.0, 3.0], [0.1, -2.0], [0.0, 0.0]], dtype=F64)
START = torch.zeros(3, 2, dtype=F64)


def objective(x, a):
    return ((x - a) ** 2).sum() + 0.01 * (x**4).sum()


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_batch_equals_stack_of_singles(name):
    solver = bilevel.TorchOptimizer(getattr(torch.optim, name), max_steps=150, **ELEMENTWISE[name])
    tolerance = Tolerance(delta=1e-3)
    together = support.minimize(solver, objective, START, TARGETS, batched=True, tolerance=tolerance)
    assert together.iterations[2] == 0
    for index in range(3):
        alone = support.minimize(solver, objective, START[index], TARGETS[index], tolerance=tolerance)
        assert torch.equal(alone.iterations, together.iterations[index : index + 1])
        assert torch.equal(alone.status, together.status[index : index + 1])
        torch.testing.assert_close(alone.x[0], together.x[index], rtol=1e-12, atol=1e-12)


def test_follows_the_optimizer_itself():
    parameter = torch.nn.Parameter(START[0].clone())
    optimizer = torch.optim.Adam([parameter], lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        objective(parameter, TARGETS[0]).backward()
        optimizer.step()
    solver = bilevel.TorchOptimizer(torch.optim.Adam, lr=0.1, max_steps=20)
    outcome = support.minimize(solver, objective, START[0], TARGETS[0])
    assert statuses(outcome) == [Status.BUDGET_SPENT]
    torch.testing.assert_close(outcome.x[0], parameter.detach(), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("name", "options"),
    [("LBFGS", {"line_search_fn": "strong_wolfe"}), ("LBFGS", {"lr": 0.5}), ("SparseAdam", {"lr": 0.1})],
)
def test_others_solve_one_problem(name, options):
    solver = bilevel.TorchOptimizer(getattr(torch.optim, name), max_steps=400, **options)
    outcome = support.minimize(solver, objective, START[0], TARGETS[0], tolerance=Tolerance(delta=1e-6))
    assert statuses(outcome) == [Status.CONVERGED]


@pytest.mark.parametrize("name", ["Muon", "Adafactor"])
def test_matrix_optimizers_see_the_shapes_of_the_unknown(name):
    solver = bilevel.TorchOptimizer(getattr(torch.optim, name), max_steps=50, lr=0.02, weight_decay=0.0)
    target = torch.ones(3, 2, dtype=F64)
    outcome = support.minimize(solver, lambda x, a: ((x - a) ** 2).sum(), torch.zeros(3, 2, dtype=F64), target)
    assert statuses(outcome) == [Status.BUDGET_SPENT]
    assert bool((outcome.x > 0).all())


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("LBFGS", r"bilevel\.LBFGS\(\)"), ("Muon", "elementwise=True"), ("Adafactor", "torch.optim.Adam")],
)
def test_others_refuse_a_batch(name, remedy):
    solver = bilevel.TorchOptimizer(getattr(torch.optim, name), max_steps=3)
    with pytest.raises(bilevel.ArgumentError, match=f"(?s)batch of 3.*{remedy}"):
        support.minimize(solver, objective, START, TARGETS, batched=True)


def test_third_party_class_can_be_declared_elementwise():
    class Halving(torch.optim.Optimizer):
        def __init__(self, params, lr):
            super().__init__(params, {"lr": lr})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter -= group["lr"] * parameter.grad

    with pytest.raises(bilevel.ArgumentError, match="elementwise=True"):
        support.minimize(bilevel.TorchOptimizer(Halving, lr=0.1, max_steps=3), objective, START, TARGETS, batched=True)
    declared = bilevel.TorchOptimizer(Halving, lr=0.2, max_steps=500, elementwise=True)
    outcome = support.minimize(declared, objective, START, TARGETS, batched=True, tolerance=Tolerance(delta=1e-6))
    assert statuses(outcome) == [Status.CONVERGED] * 3
    assert repr(declared) == "TorchOptimizer(Halving, max_steps=500, elementwise=True, lr=0.2)"


def test_weight_decay_is_not_mistaken_for_the_objective():
    solver = bilevel.TorchOptimizer(torch.optim.SGD, lr=0.2, weight_decay=0.5, max_steps=200)
    outcome = support.minimize(solver, objective, START[0], TARGETS[0], tolerance=Tolerance(delta=1e-6))
    assert statuses(outcome) == [Status.MAX_STEPS]


@pytest.mark.parametrize(
    "make",
    [
        lambda: bilevel.TorchOptimizer(torch.optim.Adam, max_steps=0),
        lambda: bilevel.TorchOptimizer(torch.optim.Adam, max_steps=3, bogus=1),
        lambda: bilevel.TorchOptimizer(torch.optim.SGD, max_steps=3, lr=-1.0),
        lambda: bilevel.TorchOptimizer(torch.optim.Adam, max_steps=3, maximize=True),
        lambda: bilevel.TorchOptimizer(torch.optim.Adam, max_steps=3, differentiable=True),
        lambda: bilevel.TorchOptimizer(torch.optim.Adam([torch.zeros(1, requires_grad=True)]), max_steps=3),
        lambda: bilevel.TorchOptimizer(torch.nn.Linear, max_steps=3),
    ],
)
def test_settings_are_checked(make):
    with pytest.raises(bilevel.ArgumentError, match="expected"):
        make()


def test_is_a_value():
    one = bilevel.TorchOptimizer(torch.optim.Adam, lr=0.1, max_steps=20)
    assert one == bilevel.TorchOptimizer(torch.optim.Adam, lr=0.1, max_steps=20)
    assert repr(one) == "TorchOptimizer(Adam, max_steps=20, lr=0.1)"
    assert one.name == "TorchOptimizer(Adam)"
    with pytest.raises(AttributeError):
        one.max_steps = 3
