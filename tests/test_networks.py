"""A module as the unknown: of layers, of bilevel problems, and in the checks of gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bilevel

F64 = torch.float64
X = torch.tensor([[1.0, 2.0], [0.5, -1.0], [2.0, 0.0]], dtype=F64)
Y = torch.tensor([1.0, -2.0, 0.5], dtype=F64)


def objective(net, log_s):
    return ((net(X).squeeze(-1) - Y) ** 2).sum() + log_s.exp() * sum((p**2).sum() for p in net.parameters())


class Tuning(bilevel.BilevelProblem):
    def inner_objective(self, inner, outer, data):
        return objective(inner, outer)

    def outer_objective(self, inner, outer, data):
        return (inner(data) ** 2).mean()


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(2, 1, bias=False).double()


def value_and_slope(log_s: torch.Tensor, data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return F and dF/dlog s of ridge regression by its closed form."""
    free = log_s.clone().requires_grad_(True)
    w = torch.linalg.solve(X.T @ X + free.exp() * torch.eye(2, dtype=F64), X.T @ Y)
    value = ((data @ w) ** 2).mean()
    return value.detach(), torch.autograd.grad(value, free)[0]


@pytest.mark.parametrize("given", ["init", "initial"])
def test_a_problem_takes_a_network_as_its_unknown(given: str) -> None:
    log_s, data, model = torch.tensor(0.3, dtype=F64), torch.eye(2, dtype=F64), linear()
    before = model.weight.detach().clone()
    problem = Tuning(tolerance=bilevel.Tolerance(strong_convexity=2.0))
    init = {"init": model} if given == "init" else {}
    if given == "initial":
        problem.initial = lambda outer, data: model
    value, slope = value_and_slope(log_s, data)
    result = problem.hypergradient(log_s, data, **init)
    torch.testing.assert_close((result.value, result.grad), (value, slope))
    assert result.certified and torch.equal(model.weight, before)
    torch.testing.assert_close(result.inner(data), data @ result.inner["weight"].T)
    theta = log_s.clone().requires_grad_(True)
    for options in (init, {}):  # once from the network, once from the last solution
        loss = problem(theta, data, **options)
        torch.testing.assert_close(torch.autograd.grad(loss, theta)[0], slope)
    with_goal = Tuning(tolerance=bilevel.Tolerance(hypergradient=1e-6)).hypergradient(log_s, data, init=model)
    torch.testing.assert_close(with_goal.grad, slope, rtol=1e-5, atol=1e-6)
    again = problem.hypergradient(log_s, data, at=result.inner)
    torch.testing.assert_close(again.grad, slope)


def test_the_checks_of_gradients_take_a_network() -> None:
    model, log_s, data = linear(), torch.tensor(0.3, dtype=F64), torch.eye(2, dtype=F64)
    layer = bilevel.argmin(objective)
    assert bilevel.testing.check_gradients(layer, (model, log_s)).passed
    assert bilevel.testing.diagnose(layer, model, log_s).healthy
    assert bilevel.testing.check_gradients(Tuning(), (log_s, data), init=model).passed
    assert bilevel.testing.diagnose(Tuning(), log_s, data, init=model).healthy


def test_data_of_another_dtype_than_the_network_are_named_with_what_to_write() -> None:
    layer = bilevel.argmin(lambda net, x, s: (net(x) ** 2).sum() + s * (net.weight**2).sum())
    with pytest.raises(bilevel.DtypeError, match=r"for example args\[0\]\.to\(torch\.float32\)$"):
        layer(nn.Linear(2, 1), X, torch.tensor(1.0))
    assert layer(nn.Linear(2, 1), X.to(torch.float32), torch.tensor(1.0)).weight.dtype == torch.float32
