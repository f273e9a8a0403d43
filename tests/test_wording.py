"""What a failed solve says fits the kind of problem and the solver, and what it advises works."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bilevel

ZERO = torch.zeros(2, dtype=torch.float64)
A = torch.tensor([1.0, 2.0], dtype=torch.float64)
ASKED = bilevel.Tolerance(delta=1e-6)
SMOOTHERS: list[Any] = [None, bilevel.LBFGS()]


def said(layer: bilevel.Layer, init: torch.Tensor = ZERO + 0.3) -> str:
    with pytest.raises(bilevel.SolveError) as error:
        layer(init, A)
    assert str(error.value.report.words.get(error.value.report.status, ("", ""))[0]) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("make", "linear"), [(bilevel.root, 0.0), (bilevel.fixed_point, 1.0)])
def test_a_root_has_no_objective(make: Any, linear: float) -> None:
    message = said(make(lambda x, a: x**2 + a + linear * x, solver=bilevel.Newton()))
    assert "objective" not in message
    assert "step size" not in message
    assert "found no step that lowers the residual" in message
    # "start elsewhere, check that a root exists"
    found = make(lambda x, a: x**2 - a + linear * x, solver=bilevel.Newton())(ZERO + 0.3, A)
    torch.testing.assert_close(found, A.sqrt())


@pytest.mark.parametrize("solver", [None, bilevel.LBFGS(), bilevel.GradientDescent(0.1, 200), bilevel.ScipyMinimize()])
def test_an_objective_that_falls_without_end_is_told_so(solver: Any) -> None:
    def falls(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return -(a * x**2).sum()

    message = said(bilevel.argmin(falls, solver=solver, tolerance=ASKED))
    assert "it seems to have no minimum" in message
    assert "step size" not in message
    # "add a term that grows with x"
    kept = bilevel.argmin(lambda x, a: falls(x - a, a) + 3.0 * ((x - a) ** 2).sum(), solver=solver, tolerance=ASKED)
    torch.testing.assert_close(kept(ZERO, A), A, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", SMOOTHERS)
def test_an_objective_with_a_kink_is_told_so(solver: Any) -> None:
    layer = bilevel.argmin(lambda x, a: ((x - a) ** 2).sum() + 3 * x.abs().sum(), solver=solver)
    assert "it is not smooth there, its gradient jumps" in said(layer)
    smooth = bilevel.argmin(lambda x, a: ((x - a) ** 2).sum() + 3 * (x**2 + 1e-4**2).sqrt().sum(), solver=solver)
    exact = torch.tensor([0.0, 0.5], dtype=torch.float64)  # soft thresholding by 3/2
    torch.testing.assert_close(smooth(ZERO + 0.3, A), exact, rtol=1e-3, atol=1e-3)

    def proximal_step(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        u = x - 0.25 * 2 * (x - a)
        return u.sign() * torch.relu(u.abs() - 0.25 * 3)

    fixed = bilevel.fixed_point(proximal_step, solver=bilevel.FixedPointIteration(max_steps=200), tolerance=ASKED)
    torch.testing.assert_close(fixed(ZERO + 0.3, A), exact, rtol=1e-5, atol=1e-5)


def test_a_smooth_objective_is_not_said_to_have_a_kink() -> None:
    for function in (
        lambda x, a: torch.cosh(50 * (x - a)).sum(),
        lambda x, a: ((x - a) ** 4).sum() + 1e6 * (x[0] - x[1]) ** 2,
        lambda x, a: torch.logaddexp(20 * x, -20 * x - a).sum(),
    ):
        report = (
            bilevel.argmin(function, solver=bilevel.LBFGS(max_steps=2), tolerance=ASKED, on_failure="ignore")
            .solve(ZERO, A)
            .report
        )
        assert not report.success
        assert "not smooth" not in report.message


def test_a_step_that_is_too_long_names_its_setting() -> None:
    def stiff(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return 50 * ((x - a) ** 2).sum()

    message = said(bilevel.argmin(stiff, solver=bilevel.GradientDescent(0.1, 100), tolerance=ASKED))
    assert "lower lr, which is 0.1, pass line_search=True" in message
    for solver in (bilevel.GradientDescent(0.005, 200), bilevel.GradientDescent(0.1, 100, line_search=True)):
        torch.testing.assert_close(
            bilevel.argmin(stiff, solver=solver, tolerance=ASKED)(ZERO, A), A, rtol=1e-5, atol=1e-5
        )
    sgd = bilevel.TorchOptimizer(torch.optim.SGD, lr=0.1, max_steps=100)
    assert "lower lr" in said(bilevel.argmin(stiff, solver=sgd, tolerance=ASKED))


def test_one_of_a_batch_is_looked_at() -> None:
    layer = bilevel.argmin(lambda x, a: a * (x**2).sum() + x.sum(), tolerance=ASKED)
    with pytest.raises(bilevel.SolveError, match=r"it seems to have no minimum in 1 of 3 problems, first in number 1"):
        torch.func.vmap(layer)(
            torch.ones(3, 2, dtype=torch.float64), torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64)
        )
