"""``bilevel.least_squares``: solutions beside numpy and scipy, derivatives beside closed forms and differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import hessian, jacfwd, jacrev, vmap

import bilevel
from bilevel import Status
from bilevel.robust import Cauchy, Huber, SoftL1

from .zoo.least_squares import ZOO

F64, F32 = torch.float64, torch.float32
T = torch.linspace(0, 3, 30, dtype=F64)
P0 = torch.ones(3, dtype=F64)


def decay(p: torch.Tensor, t: torch.Tensor, y: torch.Tensor, w: torch.Tensor | float = 1.0) -> torch.Tensor:
    return w * (p[0] * torch.exp(-p[1] * t) + p[2] - y)


def measured(seed: int = 0, count: int = 0) -> torch.Tensor:
    noise = torch.randn((count, 30) if count else (30,), generator=torch.Generator().manual_seed(seed), dtype=F64)
    return 2 * torch.exp(-0.8 * T) + 0.3 + 0.05 * noise


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def differences(function: Any, y: torch.Tensor, entries: range, step: float = 1e-5) -> torch.Tensor:
    units = torch.eye(y.numel(), dtype=F64)[list(entries)].reshape(-1, *y.shape)
    return torch.stack([(function(y + step * e) - function(y - step * e)) / (2 * step) for e in units], -1)


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_is_solved_by_default(name: str) -> None:
    zoo = ZOO[name]
    solution = bilevel.least_squares(lambda x: zoo.residual(x)).solve(zoo.init())
    square = float((zoo.residual(solution.value) ** 2).sum())
    assert solution.report.status is Status.CONVERGED
    assert any(abs(square - least) <= 1e-6 * least + 1e-15 for least in zoo.minima), square


@pytest.mark.parametrize("name", ["Bard", "Beale", "Kowalik and Osborne", "helical valley", "Wood", "Osborne 2"])
def test_derivatives_by_the_data_of_the_zoo(name: str) -> None:
    zoo = ZOO[name]
    fit = bilevel.least_squares(lambda x, shift: zoo.residual(x) - shift)
    shift = torch.zeros(len(zoo.residual(zoo.init())), dtype=F64)
    x = fit(zoo.init(), shift)

    def near(moved: torch.Tensor) -> torch.Tensor:
        return fit(x, moved)

    expected = differences(near, shift, range(2), 1e-6)
    torch.testing.assert_close(jacrev(near)(shift)[:, :2], expected, rtol=2e-4, atol=2e-4 * float(expected.abs().max()))


def test_the_derivative_is_that_of_the_full_hessian() -> None:
    a = torch.tensor(2.0, dtype=F64, requires_grad=True)
    start = torch.tensor(0.0, dtype=F64)
    bilevel.least_squares(lambda x, a: (a - x) ** 2)(start, a).backward()
    assert a.grad is not None and float(a.grad) == pytest.approx(1.0, abs=1e-9)


def test_gauss_newton_is_biased_and_only_by_name() -> None:
    # Stopped early, at x = 1: (Jᵀr)' by a is −6 (a − x)², JᵀJ is 4 (a − x)², the Hessian 6 (a − x)².
    a = torch.tensor(2.0, dtype=F64)
    start = torch.tensor(1.0, dtype=F64)
    silent = bilevel.Tolerance(delta=None, delta_prime=None)

    def slope(**how: Any) -> tuple[float, float]:
        layer = bilevel.least_squares(
            lambda x, a: (a - x) ** 2, solver=lambda residual, init, a: init, tolerance=silent, **how
        )
        return float(jacrev(lambda a: layer(start, a))(a)), float(jacfwd(lambda a: layer(start, a))(a))

    assert slope() == pytest.approx((1.0, 1.0))
    assert slope(hessian=bilevel.FullHessian()) == pytest.approx((1.0, 1.0))
    assert slope(hessian=bilevel.GaussNewtonHessian()) == pytest.approx((1.5, 1.5))


def test_gauss_newton_s_derivative_of_a_fit() -> None:
    y = measured()
    fit = bilevel.least_squares(decay, hessian=bilevel.GaussNewtonHessian())
    p = fit(P0, T, y)
    J = jacrev(decay)(p, T, y)
    cross = jacrev(jacrev(lambda p, y: 0.5 * (decay(p, T, y) ** 2).sum()), argnums=1)(p, y)
    expected = -torch.linalg.solve(J.mT @ J, cross)
    for mode in (jacrev, jacfwd):
        torch.testing.assert_close(mode(lambda y: fit(P0, T, y))(y), expected, rtol=1e-9, atol=1e-12)
    given = y.clone().requires_grad_()
    fit(P0, T, given).sum().backward()
    torch.testing.assert_close(given.grad, expected.sum(0), rtol=1e-9, atol=1e-12)
    full = jacrev(lambda y: bilevel.least_squares(decay)(P0, T, y))(y)
    assert float((full - expected).abs().max()) > 1e-3
    both = vmap(jacrev(lambda y: fit(P0, T, y)))(torch.stack([y, measured(1)]))
    torch.testing.assert_close(both[0], expected, rtol=1e-9, atol=1e-12)


def test_a_curve_fit_beside_scipy_with_derivatives_by_data_and_weights() -> None:
    y, w = measured(), torch.linspace(0.5, 2.0, 30, dtype=F64)
    fit = bilevel.least_squares(decay)
    p = fit(P0, T, y, w)
    expected = scipy.optimize.curve_fit(
        lambda t, a, b, c: a * np.exp(-b * t) + c,
        T.numpy(),
        y.numpy(),
        np.ones(3),
        sigma=(1 / w).numpy(),
        xtol=1e-14,
        ftol=1e-14,
    )[0]
    np.testing.assert_allclose(p.numpy(), expected, rtol=1e-7)
    for function, at in ((lambda y: fit(P0, T, y, w), y), (lambda w: fit(P0, T, y, w), w)):
        slope = jacrev(function)(at)
        torch.testing.assert_close(slope[:, :4], differences(function, at, range(4)), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(jacfwd(function)(at), slope, rtol=1e-9, atol=1e-12)


def test_second_derivatives_are_those_of_an_argmin() -> None:
    y = measured()
    fit = bilevel.least_squares(decay)
    same = bilevel.argmin(lambda p, t, y: 0.5 * (decay(p, t, y) ** 2).sum())
    found, expected = (hessian(lambda y, layer=layer: layer(P0, T, y).prod())(y) for layer in (fit, same))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("solver", [None, bilevel.GaussNewton(), bilevel.LevenbergMarquardt(dense_limit=0)])
def test_vmap_is_a_loop(solver: Any) -> None:
    fit = bilevel.least_squares(decay, solver=solver)
    Y = measured(3, count=5)
    starts = P0 + 0.2 * randn(5, 3)
    both = vmap(lambda p, y: fit(p, T, y))(starts, Y)
    loop = torch.stack([fit(p, T, y) for p, y in zip(starts, Y, strict=True)])
    torch.testing.assert_close(both, loop, rtol=1e-9, atol=1e-10)
    slopes = vmap(jacrev(lambda y, p: fit(p, T, y)))(Y, starts)
    torch.testing.assert_close(slopes[2], jacrev(lambda y: fit(starts[2], T, y))(Y[2]), rtol=1e-7, atol=1e-9)


def test_one_problem_that_fails_is_named_alone() -> None:
    fit = bilevel.least_squares(decay, on_failure="ignore")
    Y = measured(3, count=4)
    Y[1, 3] = float("nan")
    with bilevel.record() as reports:
        values = vmap(lambda y: fit(P0, T, y))(Y)
    status = reports[0].status
    assert status[1] is Status.NOT_FINITE and {status[0], status[2], status[3]} == {Status.CONVERGED}
    torch.testing.assert_close(values[2], fit(P0, T, Y[2]), rtol=1e-9, atol=1e-10)


def test_float32() -> None:
    y = measured()
    fit = bilevel.least_squares(decay)
    found = fit(P0.float(), T.float(), y.float())
    assert found.dtype == F32
    torch.testing.assert_close(found.double(), fit(P0, T, y), rtol=2e-4, atol=2e-4)
    slope = jacrev(lambda y: fit(P0.float(), T.float(), y))(y.float())
    torch.testing.assert_close(slope.double(), jacrev(lambda y: fit(P0, T, y))(y), rtol=5e-3, atol=5e-4)


def test_a_pytree_of_residuals_and_of_unknowns() -> None:
    @bilevel.least_squares(solver=bilevel.LevenbergMarquardt())
    def layer(x: dict[str, torch.Tensor], A: torch.Tensor, b: torch.Tensor) -> dict[str, Any]:
        return {"fit": A @ x["w"] + x["b"] - b, "ridge": [0.5 * x["w"], torch.complex(0.1 * x["b"], 0.2 * x["b"])]}

    A, b = randn(7, 2), randn(7, seed=1)
    found = layer({"w": torch.zeros(2, dtype=F64), "b": torch.zeros((), dtype=F64)}, A, b)
    stacked = torch.cat([torch.cat([torch.ones(7, 1, dtype=F64), A], 1), torch.diag(torch.tensor([0.0, 0.5, 0.5]))], 0)
    stacked = torch.cat([stacked, torch.tensor([[0.05**0.5, 0.0, 0.0]])]).double()
    expected = torch.linalg.lstsq(stacked, torch.cat([b, torch.zeros(4, dtype=F64)]).unsqueeze(-1))[0].squeeze(-1)
    torch.testing.assert_close(torch.cat([found["b"].reshape(1), found["w"]]), expected, rtol=1e-7, atol=1e-7)


LOSSES = {"huber": Huber, "cauchy": Cauchy, "soft_l1": SoftL1}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dense_limit", [512, 0])
def test_robust_losses_are_scipy_s(name: str, dense_limit: int) -> None:
    y = measured()
    y[5], y[10] = y[5] + 5, y[10] - 4
    solver = bilevel.LevenbergMarquardt(dense_limit=dense_limit)
    found = bilevel.least_squares(decay, loss=LOSSES[name](0.1), solver=solver)(P0, T, y)
    t, data = T.numpy(), y.numpy()
    expected = scipy.optimize.least_squares(
        lambda p: p[0] * np.exp(-p[1] * t) + p[2] - data, np.ones(3), loss=name, f_scale=0.1, xtol=1e-14, ftol=1e-14
    ).x
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_the_scale_of_a_loss_is_an_argument_like_any_other(name: str) -> None:
    y = measured()
    y[5] += 5
    robust = bilevel.least_squares(lambda p, t, y, s: decay(p, t, y), loss=lambda t, y, s: LOSSES[name](s))
    scale = torch.tensor(0.1, dtype=F64)

    def fitted(s: torch.Tensor) -> torch.Tensor:
        return robust(P0, T, y, s)

    expected = (fitted(scale + 1e-5) - fitted(scale - 1e-5)) / 2e-5
    torch.testing.assert_close(jacrev(fitted)(scale), expected, rtol=1e-5, atol=1e-7)
    scales = torch.tensor([0.1, 0.2], dtype=F64)
    torch.testing.assert_close(vmap(fitted)(scales)[1], fitted(scales[1]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", [None, bilevel.GaussNewton(), bilevel.LevenbergMarquardt(dense_limit=0)])
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 5), st.integers(1, 5))
def test_linear_problems_are_numpy_s_lstsq(solver: Any, seed: int, m: int, n: int, rank: int) -> None:
    A, b = randn(m, rank, seed=seed) @ randn(rank, n, seed=seed + 1), randn(m, seed=seed + 2)
    values = torch.linalg.svdvals(A)[: min(m, n, rank)]
    if float(values[-1]) < 1e-3 * float(values[0]):
        return
    layer = bilevel.least_squares(lambda x, A, b: A @ x - b, solver=solver)
    found = layer(torch.zeros(n, dtype=F64), A, b)
    expected = np.linalg.lstsq(A.numpy(), b.numpy(), rcond=1e-10)[0]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-6 * (1 + np.abs(expected).max()))


def test_a_rank_deficient_problem_is_differentiated_as_a_minimum_norm_one() -> None:
    A = randn(6, 4)
    A[:, 3] = A[:, 0] + A[:, 1]
    layer = bilevel.least_squares(lambda x, A, b: A @ x - b)
    b = randn(6, seed=1)
    with bilevel.record() as reports:
        slope = jacrev(lambda b: A @ layer(torch.zeros(4, dtype=F64), A, b))(b)
    assert {status for report in reports.backward for status in report.status} == {Status.MINIMUM_NORM}
    torch.testing.assert_close(slope, A @ torch.linalg.pinv(A), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("rows", [3, 6])
def test_a_derivative_along_a_free_direction_names_a_door_that_has_it(rows: int) -> None:
    A, b = randn(rows, 4), randn(rows, seed=1).requires_grad_()
    A[:, 3] = A[:, 0] + A[:, 1]
    zero = torch.zeros(4, dtype=F64)
    x = bilevel.least_squares(lambda x, A, b: A @ x - b)(zero, A, b)
    with pytest.raises(bilevel.SolveError, match=r"linear_solve\(lambda x, A: A @ x, unknown=init\)\(b, A\)"):
        x.sum().backward()
    again = bilevel.linear_solve(lambda x, A: A @ x, unknown=zero)(b, A)
    torch.testing.assert_close(again, x)
    again.sum().backward()
    torch.testing.assert_close(b.grad, torch.linalg.pinv(A).sum(0))


def test_units_of_the_unknowns_do_not_matter() -> None:
    # Powers of two, so that scaling does not round.
    units = torch.tensor([2.0**-20, 1.0, 2.0**20], dtype=F64)
    y = measured()
    plain = bilevel.least_squares(decay).solve(P0, T, y)
    scaled = bilevel.least_squares(lambda p, t, y: decay(p * units, t, y)).solve(P0 / units, T, y)
    torch.testing.assert_close(scaled.value * units, plain.value, rtol=1e-9, atol=1e-9)
    assert abs(int(scaled.report.iterations) - int(plain.report.iterations)) <= 6


def test_large_problems_are_solved_by_products_alone() -> None:
    A, b = randn(900, 600) / 30, randn(900, seed=1)
    layer = bilevel.least_squares(lambda x, A, b: A @ x + 0.1 * torch.sin(A @ x) - b)
    solution = layer.solve(torch.zeros(600, dtype=F64), A, b)
    x, residual = solution.value, lambda x: A @ x + 0.1 * torch.sin(A @ x) - b
    gradient = A.mT @ ((1 + 0.1 * torch.cos(A @ x)) * residual(x))
    assert solution.report.solver == "LevenbergMarquardt" and float(gradient.norm()) < 1e-8


def test_a_root_is_found_as_a_least_squares_problem() -> None:
    layer = bilevel.root(
        lambda x, a: torch.stack([x[0] ** 2 + x[1] ** 2 - a, x[0] - x[1]]), solver=bilevel.LevenbergMarquardt()
    )
    a = torch.tensor(2.0, dtype=F64)
    start = torch.tensor([3.0, 0.5], dtype=F64)
    torch.testing.assert_close(layer(start, a), torch.ones(2, dtype=F64), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(jacrev(lambda a: layer(start, a))(a), torch.full((2,), 0.25, dtype=F64))


def test_a_solver_of_the_user_s_gets_the_residual() -> None:
    def scipy_s(residual: Any, init: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        found = scipy.optimize.least_squares(
            lambda p: residual(torch.as_tensor(p), t, y).detach().numpy(),
            init.numpy(),
            xtol=1e-15,
            ftol=1e-15,
            gtol=1e-15,
        )
        return torch.as_tensor(found.x)

    y = measured()
    found, expected = (
        bilevel.least_squares(decay, solver=solver, tolerance=bilevel.Tolerance(rtol=1e-6))
        for solver in (scipy_s, None)
    )
    torch.testing.assert_close(found(P0, T, y), expected(P0, T, y), rtol=1e-5, atol=1e-6)


def test_replays_give_what_the_function_gives() -> None:
    fit = bilevel.least_squares(decay)
    Y = measured(7, count=8)
    first = [fit(P0, T, y) for y in Y]
    again = [bilevel.least_squares(decay)(P0, T, y) for y in Y]
    torch.testing.assert_close(torch.stack(first), torch.stack(again), rtol=1e-10, atol=1e-11)


def test_a_loss_that_changes_is_not_replayed() -> None:
    scale = torch.tensor(0.1, dtype=F64)
    y = measured()
    y[5] += 5
    fit = bilevel.least_squares(decay, loss=Huber(scale))
    for _ in range(4):
        fit(P0, T, y)
    scale.mul_(5)
    torch.testing.assert_close(
        fit(P0, T, y), bilevel.least_squares(decay, loss=Huber(0.5))(P0, T, y), rtol=1e-8, atol=1e-9
    )


@pytest.mark.parametrize("loss", ["linear", "cauchy"])
def test_bounds_are_those_of_scipy(loss: str) -> None:
    y = measured()
    lower, upper = torch.tensor([0.0, 0.9, 0.0], dtype=F64), torch.tensor([1.8, 2.0, 1.0], dtype=F64)
    robust = None if loss == "linear" else Cauchy(0.1)
    fit = bilevel.least_squares(decay, lower=lower, upper=lambda t, y, *cap: upper, loss=robust)
    t, data = T.numpy(), y.numpy()
    expected = scipy.optimize.least_squares(
        lambda p: p[0] * np.exp(-p[1] * t) + p[2] - data, np.array([1.0, 1.0, 0.5]), bounds=(lower.numpy(), upper.numpy()),
        loss=loss, f_scale=0.1, xtol=1e-14, ftol=1e-14, gtol=1e-14,
    ).x  # fmt: skip
    found = fit(P0, T, y)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-7)
    slope = jacrev(lambda y: fit(P0, T, y))(y)
    torch.testing.assert_close(slope[:, :2], differences(lambda y: fit(P0, T, y), y, range(2)), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: bilevel.least_squares(decay, loss=Huber), "loss to be a bilevel.robust.RobustLoss"),
        (lambda: bilevel.least_squares(decay, loss=3.0), "loss to be a bilevel.robust.RobustLoss"),
        (lambda: bilevel.least_squares(decay, hessian=bilevel.GaussNewtonHessian), "expected hessian to be"),
        (lambda: bilevel.least_squares(decay, lower=0.0, hessian=bilevel.GaussNewtonHessian()), "leave hessian out"),
        (lambda: bilevel.least_squares(decay, lower=0.0, solver=bilevel.LevenbergMarquardt()), "leave solver out"),
        (lambda: bilevel.least_squares(decay, P0), "write bilevel.least_squares"),
        (lambda: Huber(-1.0), "expected delta"),
        (lambda: Cauchy(0.0), "expected scale"),
        (lambda: bilevel.LevenbergMarquardt(damping=0.0), "expected damping"),
        (lambda: bilevel.GaussNewton(max_steps=0), "expected max_steps"),
        (lambda: bilevel.argmin(lambda x: (x**2).sum(), solver=bilevel.LevenbergMarquardt())(P0), "write bilevel.least_squares"),
        (lambda: bilevel.argmin(lambda x: (x**2).sum(), solver=bilevel.GaussNewton())(P0), "write bilevel.least_squares"),
        (lambda: bilevel.least_squares(lambda x: 3.0)(P0), "residual to return floating-point"),
        (lambda: bilevel.least_squares(lambda x: (x > 0).long())(P0), "residual to return floating-point"),
        (lambda: bilevel.least_squares(lambda x: x, loss=lambda: 3)(P0), "loss to return"),
        (lambda: bilevel.least_squares(lambda x, A: A @ x)(P0, torch.ones(2, 2, dtype=F64)), "fit together"),
    ],
)  # fmt: skip
def test_mistakes_are_named(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_errors_of_a_bounded_problem_name_the_layer() -> None:
    with pytest.raises(bilevel.ShapeError, match=r"^`least_squares` layer `"):
        bilevel.least_squares(lambda x, a: x - a, lower=0.0)(torch.zeros(2), torch.zeros(3))
