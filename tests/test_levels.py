"""Three levels by nesting, against a closed form: z* = log y, y* = x, dF/dx = x − c + 1/x."""

from __future__ import annotations

import pytest
import torch

import bilevel


@bilevel.argmin
def lowest(z, y):
    return (z.exp() - y * z).sum()


@bilevel.argmin
def middle(y, x):
    return (y - x * lowest(torch.zeros_like(y), y)).sum()


def top(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    y = middle(torch.ones_like(x), x)
    return (0.5 * (y - c) ** 2 + lowest(torch.zeros_like(y), y)).sum()


class ThreeLevels(bilevel.BilevelProblem):
    """The middle level is the inner problem; both objectives call the lowest level."""

    def inner_objective(self, inner, outer, data):
        return (inner - outer * lowest(torch.zeros_like(inner), inner)).sum()

    def outer_objective(self, inner, outer, data):
        return (0.5 * (inner - data) ** 2 + lowest(torch.zeros_like(inner), inner)).sum()


def point(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, float]:
    x, c = torch.tensor([0.7, 2.0], dtype=dtype), torch.tensor([1.0, 3.0], dtype=dtype)
    return x, c, 1e-9 if dtype is torch.float64 else 2e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_problem_has_the_hypergradient_of_the_closed_form(dtype: torch.dtype) -> None:
    x, c, error = point(dtype)
    found = ThreeLevels().hypergradient(x, c, init=torch.ones_like(x))
    torch.testing.assert_close(found.inner, x, rtol=0, atol=error)
    torch.testing.assert_close(found.value, (0.5 * (x - c) ** 2 + x.log()).sum(), rtol=0, atol=error)
    torch.testing.assert_close(found.grad, x - c + 1 / x, rtol=0, atol=error)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_layers_have_its_first_and_second_derivatives(dtype: torch.dtype) -> None:
    x, c, error = point(dtype)
    x.requires_grad_()
    (slope,) = torch.autograd.grad(top(x, c), x, create_graph=True)
    torch.testing.assert_close(slope, x - c + 1 / x, rtol=0, atol=error)
    (bend,) = torch.autograd.grad(slope.sum(), x)
    torch.testing.assert_close(bend, 1 - 1 / x.detach() ** 2, rtol=0, atol=10 * error)


def test_in_forward_mode_and_under_vmap() -> None:
    x, c, error = point(torch.float64)
    v = torch.tensor([1.0, -2.0], dtype=torch.float64)
    _, along = torch.func.jvp(lambda x: top(x, c), (x,), (v,))
    torch.testing.assert_close(along, (x - c + 1 / x) @ v, rtol=0, atol=error)
    xs = torch.stack([x, x + 0.5])
    slopes = torch.vmap(torch.func.grad(top), in_dims=(0, None))(xs, c)
    torch.testing.assert_close(slopes, xs - c + 1 / xs, rtol=0, atol=error)


def test_minimize_finds_the_stationary_point() -> None:
    c = torch.tensor([3.0], dtype=torch.float64)
    result = bilevel.minimize(
        ThreeLevels(), torch.tensor([2.4], dtype=torch.float64), c, init=torch.ones_like(c), gradient_tolerance=1e-6, max_steps=20
    )  # fmt: skip
    assert result.status is bilevel.OuterStatus.CONVERGED
    assert float(result.outer) == pytest.approx((3 + 5**0.5) / 2, abs=3e-6)  # x² − 3x + 1 = 0


def above(size: int, lower: bilevel.Tolerance | None, upper: bilevel.Tolerance | None, solver=None):
    """A least-squares level above a strictly convex one, and a list that counts the calls of its objective."""
    calls = []
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64) / size**0.5

    @bilevel.argmin(tolerance=lower)
    def level(y, x):
        return (0.5 * (y - x) ** 2 + 0.1 * y**4 + 0.1 * (1 + y.exp()).log()).sum()

    @bilevel.argmin(tolerance=upper, solver=solver)
    def top(x):
        calls.append(None)
        return 0.5 * ((level(torch.zeros_like(x), matrix @ x) - 1) ** 2).sum() + 0.05 * (x**2).sum()

    return top, calls


@pytest.mark.parametrize("solver", [None, bilevel.LBFGS()])
def test_a_level_above_an_inexact_one_ends_and_says_why(solver) -> None:
    """The lower level stays at its initial guess, so that values of the level above do not follow its derivatives."""
    start = torch.zeros(2, dtype=torch.float64)
    inexact, calls = above(2, bilevel.Tolerance(delta=0.1), None, solver)
    with pytest.raises(
        bilevel.SolveError, match="leave its tolerance at the default, or ask this one for a hundred times that error"
    ):
        inexact(start)
    assert len(calls) < 500
    exact, _ = above(2, None, None, solver)
    assert exact.solve(start).report.status is bilevel.Status.CONVERGED  # the first remedy


@pytest.mark.parametrize("size", [2, 20])
@pytest.mark.parametrize("error", [1e-1, 1e-2])
def test_a_level_meets_a_tolerance_a_hundred_times_that_of_the_level_below(size: int, error: float) -> None:
    start = torch.zeros(size, dtype=torch.float64)
    exact, _ = above(size, None, None)
    top, calls = above(size, bilevel.Tolerance(delta=error / 100), bilevel.Tolerance(delta=error))
    solution = top.solve(start)
    assert solution.report.status is bilevel.Status.CONVERGED and len(calls) < 30
    assert float((solution.value - exact(start)).detach().norm()) < error
