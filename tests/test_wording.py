"""What a failed solve says fits the kind of problem and the solver, and what it advises works."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bilevel

F64 = torch.float64
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
    assert "a kink of the objective: it is not smooth there, its gradient jumps" in said(layer)
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


# A remedy is one that helps when it is followed.


def gradient(layer, init, a):
    a = a.clone().requires_grad_(True)
    layer(init, a).sum().backward()
    return a.grad


def wells(x, a):
    return ((x**2 - a) ** 2).sum()  # minima at ±√a, a maximum at 0


def test_the_remedies_of_a_maximum_at_the_start_help():
    a, zero = torch.tensor([0.7, 0.4], dtype=F64), torch.zeros(2, dtype=F64)
    for n in (2, 600):
        with pytest.raises(bilevel.SolveError, match=r"start beside it.*bilevel.root\(torch.func.grad") as caught:
            bilevel.argmin(wells)(zero[:1].expand(n).clone(), a[:1].expand(n).clone())
        assert "linear_solver" not in str(caught.value)
    torch.manual_seed(0)
    beside = gradient(bilevel.argmin(wells), zero + 1e-3 * torch.randn_like(zero), a).abs()
    torch.testing.assert_close(beside, 0.5 / a.sqrt())
    assert bilevel.root(torch.func.grad(wells))(zero, a).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("remedy", [bilevel.Exact(indefinite=True), bilevel.GMRES()])
def test_the_remedies_of_a_saddle_in_backward_help(remedy):
    def saddle(x, a):
        return (x[0] - a[0]) ** 2 - (x[1] - 2 * a[1]) ** 2

    def solver(objective, init, a):
        return torch.stack([a[0], 2 * a[1]]).detach()

    a, zero = torch.tensor([0.7, 0.4], dtype=F64), torch.zeros(2, dtype=F64)
    layer = bilevel.argmin(saddle, solver=solver, tolerance=bilevel.Tolerance(delta=1e-6))
    with pytest.raises(
        bilevel.SolveError, match=r"linear_solver=bilevel.Exact\(indefinite=True\) or bilevel.GMRES\(\)"
    ):
        gradient(layer, zero, a)
    layer.linear_solver = remedy
    torch.testing.assert_close(gradient(layer, zero, a), torch.tensor([1.0, 2.0], dtype=F64))


def test_the_remedies_of_a_linear_system_that_is_not_definite_help():
    A, b = torch.diag(torch.tensor([1.0, -2.0], dtype=F64)), torch.ones(2, dtype=F64)
    layer = bilevel.linear_solve(lambda x, A: A @ x, symmetric=True, linear_solver=bilevel.CG())
    with pytest.raises(bilevel.SolveError, match=r"bilevel.Exact\(indefinite=True\) or bilevel.GMRES\(\)"):
        layer(b, A)
    for remedy in (bilevel.Exact(indefinite=True), bilevel.GMRES()):
        layer.linear_solver = remedy
        torch.testing.assert_close(layer(b, A), torch.tensor([1.0, -0.5], dtype=F64))


def test_a_jacobian_singular_at_the_start_is_told_from_one_at_no_solution():
    def square(x, a):
        return x**2 - a

    a, zero = torch.tensor([0.7, 0.4], dtype=F64), torch.zeros(2, dtype=F64)
    layer = bilevel.root(square, solver=bilevel.Newton())
    with pytest.raises(
        bilevel.SolveError, match=r"could not leave the start, where the Jacobian is singular.*beside it"
    ):
        layer(zero, a)
    torch.manual_seed(0)
    torch.testing.assert_close(layer(zero + 1e-3 * torch.randn_like(zero), a).abs(), a.sqrt())
    with pytest.raises(bilevel.SolveError, match=r"at a point that is no solution.*contradict each other"):
        bilevel.root(lambda x, a: x.sum() - a)(zero, a)


def lasso(x, a):
    return ((x - a) ** 2).sum() + x.abs().sum()


@pytest.mark.parametrize("start", [0.0, 0.3, 1.0, -0.2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_minimum_at_a_kink_is_named_from_whichever_side_it_is_reached(start, dtype):
    a = torch.tensor([0.2, 2.0], dtype=dtype)
    with pytest.raises(bilevel.SolveError, match="ended at a kink"):
        bilevel.argmin(lasso)(torch.full((2,), start, dtype=dtype), a)


@pytest.mark.parametrize("n", [2, 600])
@pytest.mark.parametrize("solver", [None, bilevel.LBFGS(), bilevel.GradientDescent(0.1, 100)])
def test_a_kink_without_a_finite_hessian_is_named(n, solver):
    # torch's slope of a norm at 0 is 0 by convention, its second derivative NaN.
    settings = {} if solver is None else {"solver": solver}
    layer = bilevel.argmin(lambda x, a: (x.norm() - a) ** 2, on_failure="ignore", **settings)
    solution = layer.solve(torch.zeros(n, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64))
    assert solution.report.status is bilevel.Status.KINK


def test_an_infinite_hessian_is_not_taken_for_a_kink():
    # |x|^1.5 has an infinite second derivative at 0, and a gradient that is continuous there.
    layer = bilevel.argmin(lambda x, a: (x.abs() ** 1.5).sum() + a, on_failure="ignore")
    solution = layer.solve(torch.zeros(3, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64))
    assert solution.report.status is not bilevel.Status.KINK


def test_a_residual_flat_around_the_start_is_not_said_to_need_a_start_beside_it():
    layer, a = bilevel.root(lambda x, a: torch.tanh(x) - a), torch.tensor([0.7, 0.4], dtype=F64)
    with pytest.raises(bilevel.SolveError, match=r"the function is flat there.*remedy: start elsewhere, nearer"):
        layer(torch.full((2,), 30.0, dtype=F64), a)
    torch.testing.assert_close(layer(torch.ones(2, dtype=F64), a), a.atanh())  # the remedy


@pytest.mark.parametrize(
    "objective", [lambda x, a: (x.clamp(-1, 1) - a).square().sum(), lambda x, a: -torch.exp(-((x - a) ** 2)).sum()]
)
def test_a_start_where_the_objective_is_flat_is_not_said_to_have_moved(objective):
    start, a = torch.full((2,), 50.0, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    with pytest.raises(bilevel.SolveError, match="could not leave the start: the function is flat there"):
        bilevel.argmin(objective)(start, a)
    nearer = bilevel.argmin(objective)(start / 100, a)  # the remedy
    torch.testing.assert_close(nearer, a.expand(2), atol=1e-6, rtol=0)


def test_the_remedies_of_a_kink_help():
    a, init = torch.tensor([0.2, 2.0], dtype=F64), torch.zeros(2, dtype=F64)
    smooth = bilevel.argmin(lambda x, a: ((x - a) ** 2).sum() + (x**2 + 1e-3**2).sqrt().sum())
    proximal = bilevel.fixed_point(lambda x, a: torch.nn.functional.softshrink(x - 0.5 * (x - a), 0.25))
    torch.testing.assert_close(smooth(init, a), torch.tensor([0.0, 1.5], dtype=F64), atol=1e-3, rtol=0)
    torch.testing.assert_close(gradient(proximal, init, a), torch.tensor([0.0, 1.0], dtype=F64))


@pytest.mark.parametrize(
    "tolerance", [bilevel.Tolerance(), bilevel.Tolerance(delta=1e-6), bilevel.Tolerance(rtol=1e-4)]
)
def test_a_start_on_a_kink_is_named_whatever_accuracy_is_asked(tolerance):
    a, init = torch.tensor([0.7, 0.4], dtype=F64), torch.zeros(2, dtype=F64)
    layer = bilevel.argmin(lambda x, a: ((x.abs() - a) ** 2).sum() + 0.1 * (x**2).sum(), tolerance=tolerance)
    with pytest.raises(bilevel.SolveError, match=r"ended at a kink.*start elsewhere"):
        layer(init, a)
    torch.testing.assert_close(layer(init + 0.1, a), a / 1.1)


def test_the_remedies_of_descent_that_diverges_help():
    a, init = torch.tensor([0.7, 0.4], dtype=F64), torch.zeros(2, dtype=F64)

    def bowl(x, a):
        return ((x - a) ** 2).sum()

    with pytest.raises(bilevel.SolveError, match=r"moved away.*lower lr, which is 3, pass line_search=True"):
        bilevel.argmin(bowl, solver=bilevel.GradientDescent(3.0, 1000))(init, a)
    for remedy in (bilevel.GradientDescent(0.3, 1000), bilevel.GradientDescent(3.0, 1000, line_search=True)):
        torch.testing.assert_close(bilevel.argmin(bowl, solver=remedy)(init, a), a)
