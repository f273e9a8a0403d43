"""`BilevelProblem.inner_prox`: outer losses and hypergradients through proximal terms."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bilevel
from bilevel import prox
from tests.prox.test_layer import data, lasso, zeros

DOUBLE = torch.float64


class Lasso(bilevel.BilevelProblem):
    def inner_objective(self, inner: Any, outer: Any, data: Any) -> torch.Tensor:
        X, y, _, _ = data
        return ((X @ inner - y) ** 2).sum() / (2 * len(y))

    def inner_prox(self, outer: Any, data: Any) -> Any:
        return prox.L1(outer.exp())

    def outer_objective(self, inner: Any, outer: Any, data: Any) -> torch.Tensor:
        _, _, X, y = data
        return ((X @ inner - y) ** 2).mean()


def four(seed: int = 0) -> tuple[torch.Tensor, ...]:
    return (*data(seed=seed), *data(seed=seed))


log = torch.tensor(0.1, dtype=DOUBLE).log()


def reference(log: torch.Tensor, d: Any) -> tuple[torch.Tensor, torch.Tensor]:
    def loss(log: torch.Tensor) -> torch.Tensor:
        return ((d[2] @ lasso(zeros(12), d[0], d[1], log.exp()) - d[3]) ** 2).mean()

    slope, value = torch.func.grad_and_value(loss)(log)
    return value, slope


def test_the_loss_and_the_hypergradient_are_those_of_the_layer() -> None:
    problem, d = Lasso(), four()
    value, slope = reference(log, d)
    leaf = log.clone().requires_grad_()
    loss = problem(leaf, d, init=zeros(12))
    torch.testing.assert_close(loss.detach(), value)
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], slope)
    result = problem.hypergradient(log, d, init=zeros(12))
    torch.testing.assert_close(result.grad, slope)
    torch.testing.assert_close(result.value, value)
    torch.testing.assert_close(result.corrected_value, value)
    assert not result.certified
    assert result.bound.basis in (bilevel.Basis.ESTIMATED, bilevel.Basis.RESIDUAL)
    assert result.error_bound < 1e-8
    torch.testing.assert_close(result.corrected_grad, slope)
    hessian = torch.func.hessian(lambda log: problem(log, d, init=zeros(12)))(log)
    h = 1e-4
    want = (reference(log + h, d)[1] - reference(log - h, d)[1]) / (2 * h)
    torch.testing.assert_close(hessian, want, rtol=1e-6, atol=1e-8)


def test_strong_convexity_certifies_nothing_of_a_hypergradient() -> None:
    problem, d = Lasso(tolerance=bilevel.Tolerance(strong_convexity=1e-3)), four()
    result = problem.hypergradient(log, d, init=zeros(12))
    assert not result.certified
    assert not result.inner_bound.certified
    assert not result.value_bound.certified
    assert "estimated" in str(result) or "not known" in str(result)


def test_a_batch_of_problems() -> None:
    many = [four(seed) for seed in range(3)]
    stacked = tuple(torch.stack(parts) for parts in zip(*many, strict=True))
    problem = Lasso(batch_dims=0)
    result = problem.hypergradient(log, stacked, init=torch.zeros(3, 12, dtype=DOUBLE))
    values, slopes = zip(*(reference(log, d) for d in many), strict=True)
    torch.testing.assert_close(result.value, torch.stack(values).mean())
    torch.testing.assert_close(result.grad, torch.stack(slopes).mean())
    assert not result.certified


def test_minimize_finds_the_strength() -> None:
    X, y = data(60, 12)
    d = (X[:30], y[:30], X[30:], y[30:])
    found = bilevel.minimize(Lasso(), torch.tensor(-1.0, dtype=DOUBLE), d, init=zeros(12), gradient_tolerance=1e-4)
    grid = torch.linspace(-5, 0, 40, dtype=DOUBLE)
    losses = torch.func.vmap(lambda log: reference(log, d)[0])(grid)
    assert float(found.value) <= float(losses.min()) + 1e-6


def test_a_goal_is_refused_in_a_sentence() -> None:
    problem = Lasso(tolerance=bilevel.Tolerance(hypergradient=1e-3, relative=True, estimates=True))
    with pytest.raises(bilevel.ArgumentError, match="leave the goal out"):
        problem.hypergradient(log, four(), init=zeros(12))


def test_a_term_that_is_known_by_its_prox_alone() -> None:
    class Own(Lasso):
        def inner_prox(self, outer: Any, data: Any) -> Any:
            return prox.Custom(lambda v, step: v - v.clamp(-step * outer.exp(), step * outer.exp()))

    d = four()
    value, slope = reference(log, d)
    problem = Own()
    leaf = log.clone().requires_grad_()
    loss = problem(leaf, d, init=zeros(12))
    torch.testing.assert_close(loss.detach(), value)
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], slope)
    result = problem.hypergradient(log, d, init=zeros(12))
    torch.testing.assert_close(result.grad, slope)
    assert not result.certified
    with pytest.raises(bilevel.ArgumentError, match="prox alone"):
        _ = result.corrected_grad


def test_a_strength_that_no_objective_uses_is_told() -> None:
    class Unused(Lasso):
        def inner_prox(self, outer: Any, data: Any) -> Any:
            return prox.L1(0.1)

    with pytest.raises(bilevel.ArgumentError):
        Unused().hypergradient(log, four(), init=zeros(12))
