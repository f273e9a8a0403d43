"""The safeguards of Anderson acceleration: it solves what plain iteration solves, and returns what T returns."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bilevel
from bilevel.reports import Status

from . import support
from .support import F32, F64, FixedPointSystem, statuses

TIGHT = bilevel.Tolerance(delta=1e-9)


def solve(mapping, init, *args, solver=None, **how):
    return support.solve(solver or bilevel.Anderson(), FixedPointSystem, mapping, init, *args, **how)


def plain(mapping, x, steps=10_000):
    """The reference: x ← T(x), in float64."""
    for _ in range(steps):
        x, before = mapping(x), x
        if torch.equal(x, before):
            break
    return x


def tensor(*numbers, dtype=F64):
    return torch.tensor(numbers, dtype=dtype)


def logistic(seed, separable=False):
    """A gradient step of L2-logistic regression, λ = 1e-3, p = 3."""
    generator = torch.Generator().manual_seed(seed)
    m = 20 if separable else 40
    X = torch.randn(m, 3, generator=generator, dtype=F64)
    y = X @ torch.randn(3, generator=generator, dtype=F64)
    y = torch.sign(y if separable else y + 0.3 * torch.randn(m, generator=generator, dtype=F64))
    L = float(torch.linalg.matrix_norm(X, 2)) ** 2 / (4 * m) + 1e-3

    def mapping(w):
        return w - ((X * (-y * torch.sigmoid(-y * (X @ w)))[:, None]).mean(0) + 1e-3 * w) / L

    return mapping, torch.zeros(3, dtype=F64)


def lasso(seed, correlation, empty=False):
    """X, y, λ and 1/L of min ‖y − Xβ‖²/(2m) + λ‖β‖₁, as textbooks have it."""
    generator = torch.Generator().manual_seed(seed)
    m, p = 50, 20
    Z = torch.randn(m, p, generator=generator, dtype=F64)
    X = Z.clone()
    for j in range(1, p):
        X[:, j] = correlation * X[:, j - 1] + (1 - correlation**2) ** 0.5 * Z[:, j]
    if empty:
        X[:, p // 2] = 0
    beta = torch.zeros(p, dtype=F64)
    beta[:5] = 2 * torch.randn(5, generator=generator, dtype=F64)
    y = X @ beta + 0.5 * torch.randn(m, generator=generator, dtype=F64)
    return X, y, 0.1 * (X.T @ y / m).abs().max(), m / torch.linalg.matrix_norm(X, 2) ** 2


def soft_step(b, X, y, strength, step):
    moved = b - step * (X.T @ (X @ b - y)) / y.shape[-1]
    return moved.sign() * (moved.abs() - step * strength).clamp(min=0)


def positive_step(b, X, y, strength, step):
    return (b - step * (X.T @ (X @ b - y)) / y.shape[-1] - step * strength).clamp(min=0)


def box_qp(condition=1e2):
    generator = torch.Generator().manual_seed(1)
    Q = torch.linalg.qr(torch.randn(20, 20, generator=generator, dtype=F64))[0]
    A = Q @ torch.diag(torch.logspace(0, 1, 20, base=condition, dtype=F64) / condition) @ Q.T
    b = 0.3 * torch.randn(20, generator=generator, dtype=F64)
    return lambda x: (x - A @ x + b).clamp(-1, 1), torch.zeros(20, dtype=F64)


def box_cost():
    c = torch.randn(10, generator=torch.Generator().manual_seed(0), dtype=F64)
    return lambda x: (x - 0.01 * c).clamp(0, 1), torch.full((10,), 0.5, dtype=F64)


def entropic(seed=0, temperature=0.5):
    """Mirror descent on the simplex: the logarithm of what a mixture makes negative is NaN."""
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(6, 6, generator=generator, dtype=F64)
    A, c = B @ B.T / 6, torch.randn(6, generator=generator, dtype=F64)

    def mapping(p):
        return torch.softmax(torch.log(p) - 0.1 * (A @ p + c + temperature * torch.log(p)), 0)

    return mapping, torch.full((6,), 1 / 6, dtype=F64)


def markov():
    """A slowly mixing chain with a state that is left for ever: its probability is zero."""
    P = torch.rand(8, 8, generator=torch.Generator().manual_seed(0), dtype=F64) ** 4
    P[3] = 0
    P = 0.95 * torch.eye(8, dtype=F64) + 0.05 * P / P.sum(0)
    P[3, 3] = 0.5
    return lambda p: (P / P.sum(0)) @ p, torch.full((8,), 1 / 8, dtype=F64)


def nonnegative_lasso():
    args = lasso(0, 0.5, empty=True)
    return lambda b: positive_step(b, *args), torch.zeros(20, dtype=F64)


HARD = {
    "clamp": lambda: (lambda x: (x - 0.01).clamp(-1, 1), tensor(1.0, 0.5)),
    "relu": lambda: (lambda x: torch.relu(x - 0.01), tensor(1.0, 0.5, 3.0)),
    "absolute value": lambda: (lambda x: 1 - 0.9 * x.abs(), tensor(0.3, 2.0, -5.0)),
    "absolute value, slow": lambda: (lambda x: 1 - 0.99 * x.abs(), tensor(0.3, 2.0, -5.0)),
    "square root": lambda: (lambda x: x.sqrt() + 0.1, tensor(1e-3, 1.0, 100.0)),
    "sine and cube": lambda: (
        lambda v: torch.cat((v[:3].sin() * v[:3] ** 2, v[3:] ** 3)),
        tensor(0.6, 0.0, -0.1, 0.7, 0.5),
    ),
    "box-constrained cost": box_cost,
    "box-constrained quadratic": box_qp,
    "non-negative Lasso": nonnegative_lasso,
    "mirror descent": entropic,
    "mirror descent, cold": lambda: entropic(temperature=0.05),
    **{f"logistic {seed}": (lambda seed=seed: logistic(seed)) for seed in range(8)},
    **{f"logistic, separable {seed}": (lambda seed=seed: logistic(seed, separable=True)) for seed in range(4)},
}


@pytest.mark.parametrize("tolerance", [TIGHT, None], ids=["delta", "default"])
@pytest.mark.parametrize("name", HARD)
def test_what_plain_iteration_solves_is_solved(name, tolerance):
    mapping, init = HARD[name]()
    outcome = solve(mapping, init, tolerance=tolerance)
    assert statuses(outcome) == [Status.CONVERGED]
    torch.testing.assert_close(outcome.x[0], plain(mapping, init), atol=1e-5, rtol=1e-5)


def test_differences_at_rounding_level_teach_nothing():
    # R is constant until the bound: what the differences of R hold is rounding alone.
    outcome = solve(*box_cost(), tolerance=TIGHT)
    slow = solve(*box_cost(), tolerance=TIGHT, solver=bilevel.FixedPointIteration())
    assert statuses(outcome) == [Status.CONVERGED]
    assert int(outcome.iterations) <= int(slow.iterations) + 20


@pytest.mark.parametrize("correlation", [0.5, 0.9])
def test_lasso_maps_with_their_zeros(correlation):
    args = [torch.stack(list(each)) for each in zip(*(lasso(seed, correlation) for seed in range(30)), strict=True)]
    init = torch.zeros(30, 20, dtype=F64)
    outcome = solve(soft_step, init, *args, batched=True, tolerance=TIGHT)
    assert statuses(outcome) == [Status.CONVERGED] * 30
    for b, X, y, strength, _ in zip(outcome.x, *args, strict=True):
        # What solves the conditions of optimality on the support, and keeps those beside it, is the solution.
        support = b != 0
        XS, m = X[:, support], len(y)
        exact = torch.linalg.solve(XS.T @ XS, XS.T @ y - m * strength * b[support].sign())
        assert torch.equal(exact.sign(), b[support].sign())
        assert float((X[:, ~support].T @ (y - XS @ exact)).abs().max()) < float(m * strength)
        torch.testing.assert_close(b[support], exact, atol=1e-6, rtol=0)


def test_probabilities_stay_probabilities():
    mapping, init = markov()
    outcome = solve(mapping, init, tolerance=TIGHT)
    assert statuses(outcome) == [Status.CONVERGED]
    assert float(outcome.x.min()) >= 0
    assert int(outcome.iterations) < 300
    torch.testing.assert_close(outcome.x[0], plain(mapping, init), atol=1e-7, rtol=0)


@pytest.mark.parametrize("solver", [bilevel.Anderson(max_steps=7), bilevel.Anderson(max_steps=7, mixing=0.5)], ids=repr)
def test_last_step_of_a_budget_is_the_mapping(solver):
    asked = []

    def mapping(b):
        asked.append(b.clone())
        return soft_step(b, *lasso(1, 0.9))

    outcome = solve(mapping, torch.zeros(20, dtype=F64), solver=solver)
    assert statuses(outcome) == [Status.BUDGET_SPENT]
    values = [soft_step(b.reshape(-1), *lasso(1, 0.9)) for b in asked]
    assert any(torch.allclose(outcome.x[0], value, atol=1e-14) for value in values)
    assert int((outcome.x == 0).sum()) > 0


def test_nan_at_a_mixture_leads_to_a_plain_step():
    mapping, init = entropic()
    outside = []

    def watched(p):
        outside.append(bool((p < 0).any()))
        return mapping(p)

    outcome = solve(watched, init, tolerance=TIGHT)
    assert any(outside)
    assert statuses(outcome) == [Status.CONVERGED]
    assert int(outcome.iterations) < 200


def luring(x):
    """Plain iteration from 1 goes to 0; extrapolation goes to the right, where residuals are lower and there is no fixed point."""
    return x - torch.where(x <= 0.75, x / 2, torch.where(x < 2, 0.3, -0.1 - 1 / (1 + x**2)))


def trapping(x):
    """Plain iteration from 1 goes to 0; extrapolation goes to the right, where residuals are lower, and every step comes back."""
    right = torch.where(x < 5, -0.1, 0.15)
    return x - torch.where(x <= 0.75, x / 2, torch.where(x < 2, 0.3, right))


def test_a_plain_run_lies_beneath():
    outcome = solve(trapping, tensor(1.0), tolerance=TIGHT)
    assert statuses(outcome) == [Status.CONVERGED]
    assert 1000 < int(outcome.iterations) < 1100
    torch.testing.assert_close(outcome.x, torch.zeros(1, 1, dtype=F64), atol=1e-8, rtol=0)


def test_plain_run_takes_over_where_acceleration_breaks_down():
    def mapping(x):  # extrapolation goes to the right of 2, and then every step leads beyond 3
        right = torch.where(x < 3, -0.1, torch.nan)
        return x - torch.where(x <= 0.75, x / 2, torch.where(x < 2, 0.3, right))

    outcome = solve(mapping, tensor(1.0), tolerance=TIGHT)
    assert statuses(outcome) == [Status.CONVERGED]
    assert 40 < int(outcome.iterations) < 100
    torch.testing.assert_close(outcome.x, torch.zeros(1, 1, dtype=F64), atol=1e-8, rtol=0)


def test_problems_of_a_batch_behave_as_alone():
    # Solved at once, by the plain run, not at all (a NaN), and slowly.
    kinds = torch.arange(5, dtype=F64)

    def mapping(x, kind):
        found = torch.cos(x)
        for k, other in enumerate(
            (luring(x), torch.log(x - 3), 2 * x + 1 / (1 + x**2), (x - 0.01).clamp(-1, 1)), start=1
        ):
            found = torch.where(kind == k, other, found)
        return found

    init = torch.ones(5, 1, dtype=F64)
    together = solve(mapping, init, kinds, batched=True, tolerance=TIGHT)
    expected = [Status.CONVERGED, Status.CONVERGED, Status.NOT_FINITE, Status.CONVERGED, Status.CONVERGED]
    assert statuses(together) == expected
    for k in range(5):
        alone = solve(mapping, init[k], kinds[k], tolerance=TIGHT)
        assert statuses(alone) == [expected[k]]
        assert int(alone.iterations) == int(together.iterations[k])
        torch.testing.assert_close(alone.x[0], together.x[k])


@pytest.mark.parametrize("solver", [bilevel.Anderson(), bilevel.FixedPointIteration()], ids=repr)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_rounding_ends_a_run(solver, dtype):
    mapping, init = box_qp()
    asked = bilevel.Tolerance(delta=1e-30)
    outcome = solve(lambda x: mapping(x.double()).to(dtype), init.to(dtype), solver=solver, tolerance=asked)
    assert statuses(outcome) in ([Status.STAGNATED], [Status.CONVERGED])  # the residual may be zero just so
    assert int(outcome.iterations) < 1500
    torch.testing.assert_close(outcome.x[0].double(), plain(mapping, init), atol=30 * torch.finfo(dtype).eps, rtol=0)


@pytest.mark.parametrize("rate", [0.9, 0.999, 0.9999])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_acceleration_pays_where_plain_iteration_is_slow(rate, dtype):
    eigenvalues = torch.linspace(-rate, rate, 12, dtype=dtype)
    outcome = solve(lambda x: eigenvalues * x + 1, torch.zeros(12, dtype=dtype))
    assert statuses(outcome) == [Status.CONVERGED]
    assert int(outcome.iterations) <= 40
    torch.testing.assert_close(outcome.x[0], 1 / (1 - eigenvalues), rtol=2e-2 if dtype is F32 else 1e-7, atol=0)


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 6), history=st.integers(1, 6), scale=st.floats(-6, 6))
def test_random_nonexpansive_piecewise_linear_maps(seed, n, history, scale):
    generator = torch.Generator().manual_seed(seed)
    M = torch.randn(2, n, n, dtype=F64, generator=generator)
    M = 0.98 * M / torch.linalg.matrix_norm(M, 2)[:, None, None]
    c = torch.randn(2, n, dtype=F64, generator=generator)
    s = 10.0**scale

    def mapping(x):
        x = x / s
        return s * (M[1] @ (M[0] @ x + c[0]).clamp(-1, 1) + 0.1 * torch.relu(x - c[1]) / 10 + c[1])

    outcome = solve(mapping, torch.zeros(n, dtype=F64), solver=bilevel.Anderson(history=history))
    assert statuses(outcome) == [Status.CONVERGED]
    torch.testing.assert_close(outcome.x[0], plain(mapping, torch.zeros(n, dtype=F64)), atol=1e-8 * s, rtol=0)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_mixture_that_hides_the_residual_is_no_fixed_point(dtype):
    """Far out x − c is x. The secant of a constant residual leads there; plain iteration comes to zero in a few steps."""
    for seed in (8, 106, 150, 166, 189, 268, 284):
        generator = torch.Generator().manual_seed(seed)
        n = int(torch.randint(1, 9, (1,), generator=generator))
        c = 10 ** (-2 * torch.rand(n, generator=generator, dtype=F64))
        begun = torch.randn(n, generator=generator, dtype=F64) * 10 ** float(
            torch.randint(-1, 2, (1,), generator=generator)
        )
        x = bilevel.fixed_point(lambda x, c: torch.relu(x - c))(begun.to(dtype), c.to(dtype))
        assert not bool(x.any())
