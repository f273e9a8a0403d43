"""``bilevel.equilibrium`` with bounds for each player: closed forms, complementarity, derivatives by the bounds, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import hessian, jacfwd, jacrev, vmap

import bilevel
from bilevel import Status

F64, F32 = torch.float64, torch.float32
ZERO = torch.zeros((), dtype=F64)


def first(x: torch.Tensor, y: torch.Tensor, c: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    return -x * (1 - x - y - c[0])


def second(x: torch.Tensor, y: torch.Tensor, c: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    return -y * (1 - x - y - c[1])


CAPPED = bilevel.equilibrium([first, second], lower=[0.0, 0.0], upper=[lambda c, u: u, None])


def outputs(c: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    zero = torch.zeros((), dtype=c.dtype)
    return torch.stack(CAPPED((zero, zero), c, u))


@pytest.mark.parametrize("dtype", [F64, F32])
def test_a_duopoly_with_a_capacity_in_closed_form(dtype: torch.dtype) -> None:
    c, u = torch.tensor([0.1, 0.4], dtype=dtype), torch.tensor([0.25, 0.9], dtype=dtype)
    close = {"atol": 1e-12 if dtype == F64 else 1e-5, "rtol": 0.0}
    found = vmap(outputs, (None, 0))(c, u)
    torch.testing.assert_close(found, torch.tensor([[0.25, 0.175], [0.4, 0.1]], dtype=dtype), **close)
    assert float(found[0, 0]) == 0.25  # on the bound, exactly
    for mode in (jacrev, jacfwd):
        by_cost, by_cap = mode(outputs, argnums=(0, 1))(c, u[0])
        torch.testing.assert_close(by_cost, torch.tensor([[0.0, 0.0], [0.0, -0.5]], dtype=dtype), **close)
        torch.testing.assert_close(by_cap, torch.tensor([1.0, -0.5], dtype=dtype), **close)
        by_cost, by_cap = mode(outputs, argnums=(0, 1))(c, u[1])
        torch.testing.assert_close(by_cost, torch.tensor([[-2.0, 1.0], [1.0, -2.0]], dtype=dtype) / 3, **close)
        torch.testing.assert_close(by_cap, torch.zeros(2, dtype=dtype), **close)
    # u² + ((1 − u − c₁)/2)²
    torch.testing.assert_close(
        hessian(lambda u: (outputs(c, u) ** 2).sum())(u[0]), torch.tensor(2.5, dtype=dtype), **close
    )


@given(seed=st.integers(0, 10_000), n=st.integers(1, 6), spread=st.floats(0.0, 2.0))
def test_complementarity_and_differences_of_monotone_games(seed: int, n: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    P, Q, B = (torch.randn(n, n, generator=generator, dtype=F64) for _ in range(3))
    P = P @ P.mT * 10**spread / n + 0.1 * torch.eye(n, dtype=F64)
    Q = Q @ Q.mT / n + 0.1 * torch.eye(n, dtype=F64)
    q = 3 * torch.randn(2 * n, generator=generator, dtype=F64)
    game = bilevel.equilibrium(
        [
            lambda x, y, q: (
                0.5 * x @ P @ x + x @ B @ y + q[:n] @ x + 0.1 * (x["w"] if isinstance(x, dict) else x).pow(4).sum()
            ),
            lambda x, y, q: 0.5 * y @ Q @ y - x @ B @ y + q[n:] @ y,
        ],
        lower=[-0.5, 0.0],
        upper=[torch.full((n,), 0.5, dtype=F64), None],
    )
    zero = torch.zeros(n, dtype=F64)
    solve = lambda q: torch.cat(game((zero, zero), q))
    x = solve(q)
    a, b = x[:n], x[n:]
    slope = torch.cat([P @ a + B @ b + q[:n] + 0.4 * a**3, Q @ b - B.mT @ a + q[n:]])
    low = torch.cat([zero - 0.5, zero])
    high = torch.cat([zero + 0.5, zero + torch.inf])
    assert bool((x >= low).all()) and bool((x <= high).all())
    torch.testing.assert_close(torch.clamp(x - slope, low, high), x, atol=1e-8, rtol=1e-8)
    on_bound = (x == low) | (x == high)
    if bool((slope.abs()[on_bound] < 1e-3).any()) or bool((torch.minimum(x - low, high - x)[~on_bound] < 1e-3).any()):
        return  # too near a change of the active set for differences
    direction = torch.randn(2 * n, generator=generator, dtype=F64)
    h = 1e-6
    central = (solve(q + h * direction) - solve(q - h * direction)) / (2 * h)
    torch.testing.assert_close(jacrev(solve)(q) @ direction, central, atol=1e-6, rtol=1e-6)


def test_trees_of_unknowns_and_a_saddle_point() -> None:
    # min over a ∈ [−1, 1]², b free; max over y ∈ [0, 1]:  ½‖a‖² + b²/2 + y (a₀ + b − t) − y²/2
    def value(x: dict[str, torch.Tensor], y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 0.5 * (x["a"] ** 2).sum() + 0.5 * x["b"] ** 2 + y * (x["a"][0] + x["b"] - t) - 0.5 * y**2

    game = bilevel.equilibrium(
        [value, lambda x, y, t: -value(x, y, t)], lower=[{"a": -1.0, "b": None}, 0.0], upper=[None, 1.0]
    )
    init = {"a": torch.zeros(2, dtype=F64), "b": ZERO}, ZERO
    for t, y in ((-1.5, 0.5), (1.0, 0.0), (-6.0, 1.0)):
        x, found = game(init, torch.tensor(t, dtype=F64))
        torch.testing.assert_close(found, torch.tensor(y, dtype=F64))
        torch.testing.assert_close(x["a"], torch.tensor([-y, 0.0], dtype=F64))


def test_the_curvature_counts_on_free_unknowns_alone() -> None:
    # Concave in an unknown that its bound holds: an equilibrium. Concave where it is free: none.
    concave = lambda x, y, a: -0.5 * x**2 + a * x
    other = lambda x, y, a: 0.5 * (y - x) ** 2
    held = bilevel.equilibrium([concave, other], lower=[0.0, None], upper=[1.0, None])
    x, y = held((ZERO, ZERO), torch.tensor(2.0, dtype=F64))
    assert float(x) == 0.0 and abs(float(y)) < 1e-12
    # The mixed derivative of a free unknown and a held one is no curvature either.
    mixed = lambda x, y, a: 0.5 * x[0] ** 2 + 10 * x[0] * x[1] + a * x[1]
    lower = torch.tensor([-torch.inf, 0.0], dtype=F64)
    twisted = bilevel.equilibrium([mixed, lambda x, y, a: 0.5 * (y - x[0]) ** 2], lower=[lower, None])
    x, _ = twisted((torch.ones(2, dtype=F64), ZERO), torch.tensor(200.0, dtype=F64))
    torch.testing.assert_close(x, torch.zeros(2, dtype=F64))
    with pytest.raises(bilevel.SolveError, match="objective of player 0 has negative curvature"):
        held((ZERO + 0.5, ZERO), torch.tensor(0.5, dtype=F64))


def test_a_bound_with_a_zero_slope_has_no_derivative() -> None:
    c, u = torch.tensor([0.1, 0.4], dtype=F64), torch.tensor(0.4, dtype=F64)
    torch.testing.assert_close(outputs(c, u), torch.tensor([0.4, 0.1], dtype=F64))
    with pytest.raises(bilevel.SolveError, match=r"unknown 0 is on its bound with a zero slope.*move the bound"):
        jacrev(outputs)(c, u)


def test_bounds_in_the_wrong_order_are_infeasible() -> None:
    game = bilevel.equilibrium([first, second], lower=[0.0, 0.0], upper=[lambda c, u: u, None], on_failure="ignore")
    c = torch.tensor([0.1, 0.4], dtype=F64)
    found = vmap(lambda u: game((ZERO, ZERO), c, u)[0])(torch.tensor([0.25, -0.5], dtype=F64))
    assert float(found[0]) == 0.25
    assert game.solve((ZERO, ZERO), c, torch.tensor(-0.5, dtype=F64)).report.status is Status.INFEASIBLE
    with pytest.raises(bilevel.SolveError, match="lower bound above the upper bound"):
        CAPPED((ZERO, ZERO), c, torch.tensor(-0.5, dtype=F64))


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"lower": "0"}, "expected lower to be a number for all players, a function"),
        ({"upper": [1.0]}, "or a list of 2 entries, one for each player, got"),
        ({"upper": ["a", None]}, r"expected upper\[0\] to be None, a number"),
        ({"lower": [None, torch.zeros((), requires_grad=True)]}, r"expected lower\[1\] not to require grad"),
    ],
)
def test_bounds_that_cannot_be_used_are_refused(bounds: dict[str, Any], message: str) -> None:
    with pytest.raises(bilevel.errors.ArgumentError, match=message):
        bilevel.equilibrium([first, second], **bounds)


def test_bounds_that_do_not_fit_are_refused() -> None:
    c = torch.tensor([0.1, 0.4], dtype=F64)
    wide = bilevel.equilibrium([first, second], lower=[torch.zeros(3), None])
    with pytest.raises(bilevel.errors.ShapeError, match=r"expected lower\[0\] to fit unknowns of shape \(\)"):
        wide((ZERO, ZERO), c, ZERO)
    two = bilevel.equilibrium([first, second], lower=[lambda c, u: (u, u), None])
    with pytest.raises(bilevel.errors.ShapeError, match="one bound for each of the 1 tensors"):
        two((ZERO, ZERO), c, ZERO)
    captured = torch.tensor(0.25, dtype=F64, requires_grad=True)
    closed = bilevel.equilibrium([first, second], upper=[lambda c, u: captured, None])
    with pytest.raises(bilevel.errors.CapturedTensorError):
        closed((ZERO, ZERO), c, ZERO)


def test_a_function_may_return_the_bounds_of_all_players_and_a_number_bound_all() -> None:
    game = bilevel.equilibrium([first, second], lower=0.0, upper=lambda c, u: (u, None))
    c, u = torch.tensor([0.1, 0.4], dtype=F64), torch.tensor(0.25, dtype=F64)

    def outcome(game: bilevel.EquilibriumLayer, u: torch.Tensor) -> torch.Tensor:
        return torch.stack(game((ZERO, ZERO), c, u))

    torch.testing.assert_close(outcome(game, u), outcome(CAPPED, u))
    torch.testing.assert_close(jacrev(lambda u: outcome(game, u))(u), torch.tensor([1.0, -0.5], dtype=F64))
    # The second firm would produce less than nothing at a cost of 0.9.
    idle = game((ZERO, ZERO), torch.tensor([0.1, 0.9], dtype=F64), torch.tensor(1.0, dtype=F64))
    torch.testing.assert_close(torch.stack(idle), torch.tensor([0.45, 0.0], dtype=F64))
    with pytest.raises(bilevel.errors.ShapeError, match=r"upper\(\*args\) to return a tuple of 2 entries"):
        bilevel.equilibrium([first, second], upper=lambda c, u: u)((ZERO, ZERO), c, u)
    captured = torch.tensor(0.25, dtype=F64, requires_grad=True)
    closed = bilevel.equilibrium([first, second], upper=lambda c, u: (captured, None))
    with pytest.raises(bilevel.errors.CapturedTensorError):
        closed((ZERO, ZERO), c, u)


def test_a_term_may_be_that_of_all_players() -> None:
    c = torch.tensor([0.1, 0.4], dtype=F64)
    shared = bilevel.equilibrium([first, second], prox=bilevel.prox.L1(0.05))
    each = bilevel.equilibrium([first, second], prox=lambda c, u: [bilevel.prox.L1(0.05), bilevel.prox.L1(0.05)])
    # A tax of 0.05 on each unit: x = (1 − 2 c₀ + c₁ − 0.05) / 3.
    expected = torch.tensor([1 - 0.2 + 0.4 - 0.05, 1 - 0.8 + 0.1 - 0.05], dtype=F64) / 3
    for game in (shared, each):
        torch.testing.assert_close(torch.stack(game((ZERO, ZERO), c, ZERO)), expected)
