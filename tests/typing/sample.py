"""A user's project, as ``mypy --strict`` sees it. It is checked by :mod:`tests.test_typing`, and is also run there."""

from __future__ import annotations

from typing import Any

import torch
from typing_extensions import assert_type

import bilevel
from bilevel import prox
from bilevel.meta import IMAML, Tasks


@bilevel.argmin
def ridge(w: torch.Tensor, X: torch.Tensor, y: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """Return the ridge objective: a layer by a decorator."""
    return ((X @ w - y) ** 2).sum() + strength * (w**2).sum()


@bilevel.fixed_point(solver=bilevel.Anderson(history=3), tolerance=bilevel.Tolerance(rtol=1e-6))
def equilibrium(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Return T(x): a layer by a decorator with settings."""
    return 0.5 * torch.cos(x) + a


def layers() -> torch.Tensor:
    """Use layers, a term and constraints."""
    X, y = torch.eye(2), torch.ones(2)
    strength = torch.tensor(1.0, requires_grad=True)
    w = ridge(torch.zeros(2), X, y, strength)
    assert_type(w, torch.Tensor)
    solution = ridge.solve(torch.zeros(2), X, y, strength)
    assert_type(solution.value, torch.Tensor)
    assert_type(solution.report.status, bilevel.Status | tuple[Any, ...])
    if solution.report.status is bilevel.Status.CONVERGED:
        w.sum().backward()
    lasso = bilevel.argmin(lambda w, X, y, s: ((X @ w - y) ** 2).sum(), prox=lambda X, y, s: prox.L1(s))
    bounded = bilevel.argmin(lambda x, a: ((x - a) ** 2).sum(), lower=0.0, equality=lambda x, a: x.sum() - 1.0)
    pair = bilevel.root(lambda x, a: {"u": x["u"] - a, "v": x["v"] - 2 * a})
    parts = pair({"u": torch.zeros(()), "v": torch.zeros(())}, torch.tensor(3.0))
    assert_type(parts, dict[str, torch.Tensor])
    return (
        equilibrium(torch.zeros(2), w) + lasso(torch.zeros(2), X, y, strength) + bounded(torch.zeros(2), y) + parts["v"]
    )


class Tuning(bilevel.BilevelProblem):
    """Tune a regularisation strength; the arguments have the user's names."""

    def inner_objective(
        self, weights: torch.Tensor, log_strength: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """Return the training loss."""
        X, y = batch
        return ((X @ weights - y) ** 2).sum() + log_strength.exp() * (weights**2).sum()

    def outer_objective(
        self, weights: torch.Tensor, log_strength: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """Return the validation loss."""
        X, y = batch
        return ((X @ weights - 0.5 * y) ** 2).sum()

    def initial(self, log_strength: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Return the initial guess."""
        return torch.zeros(2)


def tune() -> torch.Tensor:
    """Use a problem's loss, its hypergradient and the outer loop."""
    problem = Tuning(solver=bilevel.Newton(), tolerance=bilevel.Tolerance(delta=1e-6, delta_prime=1e-6))
    log_strength, batch = torch.zeros((), requires_grad=True), (torch.eye(2), torch.ones(2))
    loss = problem(log_strength, batch)
    assert_type(loss, torch.Tensor)
    loss.backward()
    found = problem.hypergradient(log_strength.detach(), batch)
    assert_type(found.value, torch.Tensor)
    assert_type(found.grad, torch.Tensor)
    assert_type(found.bound.value, float)
    result = bilevel.minimize(
        problem, torch.zeros(()), batch, optimizer=bilevel.HOAG(), tolerance=bilevel.ExponentialSchedule(), max_steps=3
    )
    assert_type(result.outer, torch.Tensor)
    assert_type(result.value, float)
    assert_type(result.history[-1].gradient_norm, float)
    return result.outer


def adapt() -> torch.Tensor:
    """Use IMAML with torch's optimiser."""
    learner = IMAML(torch.nn.Linear(1, 1), torch.nn.functional.mse_loss, lam=2.0)
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.01)
    x = torch.linspace(-1.0, 1.0, 5).reshape(1, 5, 1)
    loss = learner(Tasks(x, 2 * x, x, 2 * x))
    assert_type(loss, torch.Tensor)
    loss.backward()
    optimizer.step()
    return loss


if __name__ == "__main__":
    print(layers().shape, tune().shape, adapt().shape)
