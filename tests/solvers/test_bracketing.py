"""Bisection and Brent's method: independent scalar roots beside scipy, and brackets that hold none."""

from __future__ import annotations

from typing import Any

import pytest
import scipy.optimize
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import jacfwd, jacrev, vmap

import bilevel
from bilevel import Status

F64 = torch.float64
METHODS = {"bisection": bilevel.Bisection, "brent": bilevel.Brent}
methods = pytest.mark.parametrize("name", METHODS)


def layer(name: str, f: Any, lower: Any, upper: Any, **settings: Any) -> Any:
    return bilevel.root(f, solver=METHODS[name](lower, upper), **settings)


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=F64)


CURVES: dict[str, tuple[Any, float, float]] = {
    "cubic": (lambda x, a: x**3 - a, -1.0, 10.0),
    "exponential": (lambda x, a: torch.exp(x) - a, -30.0, 30.0),
    "flat at the root": (lambda x, a: (x - a) * torch.exp(-1 / (x - a).square().clamp_min(1e-4)), -5.0, 7.0),
    "steep": (lambda x, a: torch.tanh(1e6 * (x - a)), -5.0, 70.0),
    "far": (lambda x, a: torch.atan(x - a), -1e12, 1e15),
    "with a root at an end": (lambda x, a: x * (x + a), 0.0, 2.0),
}


@methods
@pytest.mark.parametrize("curve", CURVES)
def test_roots_beside_scipy(name: str, curve: str) -> None:
    f, lower, upper = CURVES[curve]
    a = torch.tensor([[0.3, 1.0, 2.0], [0.7, 3.0, 5.0]], dtype=F64)
    solution = layer(name, f, lower, upper, on_failure="ignore").solve(zeros(2, 3), a)
    assert solution.value.shape == (2, 3)
    for x, one in zip(solution.value.reshape(-1), a.reshape(-1), strict=True):
        if curve == "with a root at an end":
            assert float(x) == 0.0
            continue
        expected = scipy.optimize.brentq(
            lambda x, one=one: float(f(torch.tensor(x, dtype=F64), one)), lower, upper, xtol=1e-15, rtol=1e-15
        )
        assert float(x) == pytest.approx(expected, rel=1e-11, abs=1e-11 if curve != "flat at the root" else 1e-1)


@methods
@given(st.lists(st.floats(-50, 50), min_size=1, max_size=6), st.floats(0.1, 4), st.integers(0, 3))
def test_monotone_equations(name: str, roots: list[float], power: float, kind: int) -> None:
    target = torch.tensor(roots, dtype=F64)
    curves = (lambda d: d + d**3, lambda d: torch.sinh(d / 20) * power, lambda d: d * power, lambda d: torch.atan(d))
    solution = layer(name, lambda x, t: curves[kind](x - t), -60.0, 61.0).solve(torch.zeros_like(target), target)
    assert solution.report.status is Status.CONVERGED
    torch.testing.assert_close(solution.value, target, rtol=1e-10, atol=1e-10)
    # Bisection halves; Brent is no slower than by a factor, and usually faster by one.
    assert int(solution.report.iterations) <= (80 if name == "bisection" else 120)


def test_brent_needs_few_steps() -> None:
    steps = {
        name: int(
            layer(name, lambda x, a: torch.exp(x) - a, -5.0, 5.0)
            .solve(zeros(), torch.tensor(3.0, dtype=F64))
            .report.iterations
        )
        for name in METHODS
    }
    assert steps["brent"] <= 14 and steps["bisection"] >= 45


@methods
def test_derivatives_and_vmap(name: str) -> None:
    solve = layer(name, lambda x, a: x**3 + x - a, torch.tensor([-10.0, -9.0]), torch.tensor([10.0, 12.0]))
    a = torch.tensor([2.0, 10.0], dtype=F64)
    expected = torch.diag(1 / (3 * torch.tensor([1.0, 2.0], dtype=F64) ** 2 + 1))
    for mode in (jacrev, jacfwd):
        torch.testing.assert_close(mode(lambda a: solve(zeros(2), a))(a), expected)
    both = torch.stack([a, 3 * a, 0 * a])
    torch.testing.assert_close(vmap(lambda a: solve(zeros(2), a))(both)[0], torch.tensor([1.0, 2.0], dtype=F64))
    torch.testing.assert_close(vmap(jacrev(lambda a: solve(zeros(2), a)))(both)[0], expected)


@methods
def test_a_bracket_without_a_sign_change_is_named_alone(name: str) -> None:
    solve = layer(name, lambda x, a: x**2 - a, 0.0, 2.0, on_failure="ignore")
    a = torch.tensor([1.0, 9.0, 2.0], dtype=F64)
    with bilevel.record() as reports:
        x = vmap(lambda a: solve(zeros(), a))(a)
    assert reports[0].status == (Status.CONVERGED, Status.NOT_CONVERGED, Status.CONVERGED)
    torch.testing.assert_close(x[::2], a[::2].sqrt())
    with pytest.raises(bilevel.SolveError, match=r"residuals of one sign at lower and upper.*widen the bracket"):
        layer(name, lambda x, a: x**2 - a, 0.0, 2.0)(zeros(), a[1])


@methods
def test_poles_and_jumps_are_no_roots(name: str) -> None:
    with pytest.raises(bilevel.SolveError, match="a pole or a NaN"):
        layer(name, lambda x: 1 / (x - 0.3), 0.0, 1.0)(zeros())
    with pytest.raises(bilevel.SolveError, match="jump across zero"):
        layer(name, lambda x: torch.where(x < 0.3, x - 1.0, x + 1.0), 0.0, 1.0)(zeros())


@methods
def test_equations_that_depend_on_each_other_are_not_called_solved(name: str) -> None:
    A = torch.tensor([[1.0, 3.0], [-2.0, 1.0]], dtype=F64)
    solve = layer(name, lambda x, b: A @ x - b, -10.0, 10.0, on_failure="ignore")
    b = torch.tensor([1.0, 2.0], dtype=F64)
    solution = solve.solve(zeros(2), b)
    right = float((A @ solution.value - b).norm()) < 1e-8
    assert right or not bool(solution.report.success)


@methods
def test_many_unknowns_with_a_diagonal_derivative(name: str) -> None:
    n = 5000
    a = torch.linspace(0.5, 50, n, dtype=F64).requires_grad_()
    solve = layer(name, lambda x, a: x**3 + x - a, 0.0, 10.0, linear_solver=bilevel.Diagonal())
    x = solve(zeros(n), a)
    x.sum().backward()
    torch.testing.assert_close(a.grad, 1 / (3 * x.detach() ** 2 + 1))


@methods
def test_float32_and_pytrees(name: str) -> None:
    bounds = {"u": torch.tensor(0.0), "v": torch.zeros(2)}, {"u": torch.tensor(5.0), "v": torch.full((2,), 9.0)}
    solve = layer(name, lambda x, a: {"u": x["u"] ** 2 - a, "v": torch.log(x["v"] + 1) - a}, *bounds)
    x = solve({"u": torch.zeros(()), "v": torch.zeros(2)}, torch.tensor(2.0))
    torch.testing.assert_close(x["u"], torch.tensor(2.0).sqrt())
    torch.testing.assert_close(x["v"], torch.full((2,), 2.0).exp() - 1)


@methods
def test_mistakes_are_named(name: str) -> None:
    with pytest.raises(ValueError, match="lower < upper"):
        METHODS[name](1.0, 1.0)
    with pytest.raises(ValueError, match="expected max_steps"):
        METHODS[name](0.0, 1.0, max_steps=0)
    for bounds, remedy in (
        ((2.0, 1.0), "exchange"),
        ((1.0, 1.0), "a lower bound below the root"),
        ((0.0, float("inf")), "finite"),
    ):
        with pytest.raises(ValueError, match=f"lower < upper.*{remedy}"):
            METHODS[name](*bounds)
    with pytest.raises(ValueError, match=r"expected finite bounds.*nan"):
        METHODS[name](float("nan"), 1.0)
    with pytest.raises(ValueError, match=r"got 1 and 1; choose"):
        layer(name, lambda x: x, torch.tensor([0.0, 1.0]), 1.0)(zeros(2))
    with pytest.raises(ValueError, match="one for each unknown"):
        layer(name, lambda x: x, torch.zeros(3), 1.0)(zeros(2))
    with pytest.raises(ValueError, match="expected a root"):
        bilevel.argmin(lambda x: (x**2).sum(), solver=METHODS[name](0.0, 1.0))(zeros(2))


@methods
def test_a_residual_that_is_nan_at_a_bound_is_named(name: str) -> None:
    with pytest.raises(bilevel.SolveError, match="a pole or a NaN"):
        layer(name, lambda x, a: x.sqrt() - a, -1.0, 10.0)(zeros(), torch.tensor(2.0, dtype=F64))


@methods
def test_a_residual_that_overflows_at_both_bounds(name: str) -> None:
    a = torch.tensor([7.0, -0.3], dtype=F64)
    x = layer(name, lambda x, a: x**3 - a, -1e200, 1e200)(zeros(2), a)
    torch.testing.assert_close(x**3, a, rtol=1e-13, atol=0)
    with pytest.raises(bilevel.SolveError):
        layer(name, lambda x, a: torch.where(x < 0.3, -torch.inf, torch.inf) + 0 * x * a, -1.0, 1.0)(zeros(2), a)


@methods
def test_any_finite_bracket_is_wide_enough(name: str) -> None:
    x = layer(name, lambda x: torch.tanh(x - 0.7), -1e300, 1e300)(zeros())
    assert float(x) == pytest.approx(0.7, rel=1e-14)


@methods
def test_brackets_under_transforms(name: str) -> None:
    def at(bound: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return layer(name, lambda x, a: x**3 - a, -bound, bound)(torch.zeros_like(bound), a)

    bounds, a = torch.tensor([3.0, 30.0], dtype=F64), torch.tensor([8.0, 27.0], dtype=F64)
    to_bounds, to_a = torch.func.grad(lambda b, a: at(b, a).sum(), argnums=(0, 1))(bounds, a)
    assert torch.equal(to_bounds, zeros(2)) and torch.allclose(to_a, a ** (-2 / 3) / 3)
    with pytest.raises(bilevel.ArgumentError, match=r"make the batch one unknown, which is a vector"):
        vmap(at)(bounds, a)
    assert torch.allclose(at(bounds, a), torch.tensor([2.0, 3.0], dtype=F64))
