"""``bilevel.equilibrium``: games with closed forms, saddle points, and answers that are no equilibrium."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import hessian, jacfwd, jacrev, vmap

import bilevel
from bilevel import Status

F64 = torch.float64
ZERO = torch.zeros((), dtype=F64)


def firm(i: int) -> Any:
    """Return minus the profit of a firm at the price 1 − Σ x, with unit costs c."""

    def loss(*given: torch.Tensor) -> torch.Tensor:
        *outputs, c = given
        return -outputs[i] * (1 - torch.stack(outputs).sum() - c[i])

    return loss


def cournot(c: torch.Tensor) -> torch.Tensor:
    """Return x_i = (1 + Σ c − (N + 1) c_i) / (N + 1)."""
    n = c.shape[-1]
    return (1 + c.sum(-1, keepdim=True) - (n + 1) * c) / (n + 1)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_cournot_s_closed_form_with_all_derivatives(n: int) -> None:
    game = bilevel.equilibrium([firm(i) for i in range(n)])
    c = torch.linspace(0.1, 0.3, n, dtype=F64)

    def outputs(c: torch.Tensor) -> torch.Tensor:
        return torch.stack(game((ZERO,) * n, c))

    torch.testing.assert_close(outputs(c), cournot(c))
    for mode in (jacrev, jacfwd):
        torch.testing.assert_close(mode(outputs)(c), jacrev(cournot)(c))
    both = torch.stack([c, 2 * c])
    torch.testing.assert_close(vmap(outputs)(both), cournot(both))
    torch.testing.assert_close(vmap(jacrev(outputs))(both)[1], jacrev(cournot)(c))


def players(a: torch.Tensor, b: torch.Tensor, theta: torch.Tensor) -> list[torch.Tensor]:
    first = torch.cosh(a - theta[0]).sum() + 0.3 * (a * b["u"]).sum() + 0.05 * (a**4).sum()
    second = (
        ((b["u"] - a) ** 2).sum() * torch.exp(theta[1]) + (b["v"] - b["u"].sum() * a.prod()) ** 2 + 0.1 * b["v"] ** 4
    )
    return [first, second]


NONLINEAR = bilevel.equilibrium([lambda a, b, t: players(a, b, t)[0], lambda a, b, t: players(a, b, t)[1]])
START = (torch.zeros(2, dtype=F64), {"u": torch.zeros(2, dtype=F64), "v": ZERO})


def flat(tree: Any) -> torch.Tensor:
    return bilevel.ravel(tree)


def test_a_nonlinear_game_with_pytrees_beside_differences() -> None:
    theta = torch.tensor([0.7, -0.2], dtype=F64)
    a, b = NONLINEAR(START, theta)
    assert a.shape == (2,) and set(b) == {"u", "v"} and b["v"].shape == ()
    # No player can do better by itself.
    assert float(jacrev(lambda a: players(a, b, theta)[0])(a).abs().max()) < 1e-9
    assert float(flat(jacrev(lambda b: players(a, b, theta)[1])(b)).abs().max()) < 1e-9

    def answer(theta: torch.Tensor) -> torch.Tensor:
        return flat(NONLINEAR(START, theta))

    units = 1e-5 * torch.eye(2, dtype=F64)
    differences = torch.stack([(answer(theta + e) - answer(theta - e)) / 2e-5 for e in units], -1)
    torch.testing.assert_close(jacrev(answer)(theta), differences, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(jacfwd(answer)(theta), jacrev(answer)(theta), rtol=1e-9, atol=1e-10)
    second = torch.stack([(jacrev(answer)(theta + e) - jacrev(answer)(theta - e)) / 2e-5 for e in units], -1)
    found = hessian(lambda t: answer(t)[0])(theta)
    torch.testing.assert_close(found, second[0], rtol=1e-6, atol=1e-7)


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 3))
def test_a_saddle_point_of_a_quadratic(seed: int, n: int, m: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    A, B, C = (torch.randn(*shape, generator=generator, dtype=F64) for shape in ((n, n), (n, m), (m, m)))
    P, Q = A @ A.mT + torch.eye(n, dtype=F64), C @ C.mT + torch.eye(m, dtype=F64)
    p, q = (torch.randn(k, generator=generator, dtype=F64) for k in (n, m))

    def value(x: torch.Tensor, y: torch.Tensor, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return 0.5 * x @ P @ x + x @ B @ y - 0.5 * y @ Q @ y + p @ x + q @ y

    saddle = bilevel.equilibrium([value, lambda *given: -value(*given)])
    x, y = saddle((torch.zeros(n, dtype=F64), torch.zeros(m, dtype=F64)), p, q)
    K = torch.cat([torch.cat([P, B], 1), torch.cat([B.mT, -Q], 1)], 0)
    torch.testing.assert_close(torch.cat([x, y]), torch.linalg.solve(K, -torch.cat([p, q])), rtol=1e-7, atol=1e-8)


def test_a_player_at_a_maximum_is_named() -> None:
    # Player 1 was given its profit in place of a loss.
    game = bilevel.equilibrium(
        [lambda x, y, a: (x - a) ** 2 + x * y, lambda x, y, a: -(y**2) + x * y], on_failure="ignore"
    )
    a = torch.tensor([1.0, 2.0], dtype=F64)
    with bilevel.record() as reports:
        vmap(lambda a: game((ZERO, ZERO), a))(a)
    assert reports[0].status == (Status.INDEFINITE,) * 2
    assert "player 1 has negative curvature" in reports[0].message
    game.on_failure = "raise"
    with pytest.raises(bilevel.SolveError, match=r"player 1 has negative curvature.*each player minimises"):
        game((ZERO, ZERO), a[0])


def test_a_batch_that_mixes_them() -> None:
    game = bilevel.equilibrium(
        [lambda x, y, s: s * x**2 + x * y - x, lambda x, y, s: y**2 + x * y], on_failure="ignore"
    )
    with bilevel.record() as reports:
        vmap(lambda s: game((ZERO, ZERO), s))(torch.tensor([1.0, -1.0, 2.0], dtype=F64))
    assert reports[0].status == (Status.CONVERGED, Status.INDEFINITE, Status.CONVERGED)


def test_large_players_are_checked_by_products() -> None:
    n = 400
    weights = torch.linspace(1, 2, n, dtype=F64)
    start = (torch.zeros(n, dtype=F64), torch.zeros(n, dtype=F64))

    def game(sign: float) -> Any:
        first, second = (
            (lambda x, y, a: (weights * x**2).sum() + 0.1 * (x * y).sum() - a * x.sum()),
            (lambda x, y, a: (weights * y**2).sum() - 3 * (1 - sign) * y[7] ** 2 + 0.1 * (x * y).sum()),
        )
        return bilevel.equilibrium([first, second], on_failure="ignore")

    a = torch.tensor(1.0, dtype=F64)
    assert game(1.0).solve(start, a).report.status is Status.CONVERGED
    assert game(0.0).solve(start, a).report.status is Status.INDEFINITE


def test_float32() -> None:
    game = bilevel.equilibrium([firm(0), firm(1)])
    c = torch.tensor([0.1, 0.3])
    x = game((torch.zeros(()), torch.zeros(())), c)
    assert x[0].dtype == torch.float32
    torch.testing.assert_close(torch.stack(x), cournot(c))


def test_another_solver() -> None:
    game = bilevel.equilibrium([firm(0), firm(1)], solver=bilevel.LevenbergMarquardt())
    c = torch.tensor([0.1, 0.3], dtype=F64)
    torch.testing.assert_close(torch.stack(game((ZERO, ZERO), c)), cournot(c))


def test_the_check_of_gradients_knows_games_and_least_squares() -> None:
    c = torch.tensor([0.1, 0.3], dtype=F64)
    assert bilevel.testing.check_gradients(bilevel.equilibrium([firm(0), firm(1)]), ((ZERO, ZERO), c)).passed
    fit = bilevel.least_squares(lambda x, c: torch.stack([x**2 - c[0], x - c[1], x * c[0]]))
    assert bilevel.testing.check_gradients(fit, (ZERO + 1, c)).passed
    for layer, start in ((fit, ZERO + 1), (bilevel.equilibrium([firm(0), firm(1)]), (ZERO, ZERO))):
        assert "no finding" in str(bilevel.testing.diagnose(layer, start, c))


def test_a_captured_tensor_is_found() -> None:
    captured = torch.tensor(0.1, dtype=F64, requires_grad=True)
    game = bilevel.equilibrium([lambda x, y: (x - captured) ** 2, lambda x, y: (y - x) ** 2])
    with pytest.raises(bilevel.CapturedTensorError):
        game((ZERO, ZERO))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: bilevel.equilibrium(firm(0)), "list of objectives"),
        (lambda: bilevel.equilibrium([]), "list of objectives"),
        (lambda: bilevel.equilibrium([firm(0), 3.0]), "to be functions"),
        (lambda: bilevel.equilibrium([firm(0), firm(1)])(ZERO, ZERO), "tuple of 2"),
        (lambda: bilevel.equilibrium([firm(0), firm(1)])((ZERO,), ZERO), "tuple of 2"),
        (
            lambda: bilevel.equilibrium([lambda x, y: x * torch.ones(2), lambda x, y: y])((ZERO, ZERO)),
            "player 0 to return",
        ),
        (lambda: bilevel.equilibrium([lambda x, y: x, lambda x, y: 1.0])((ZERO, ZERO)), "player 1 to return"),
    ],
)
def test_mistakes_are_named(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_a_player_without_unknowns_is_no_fault() -> None:
    game = bilevel.equilibrium([lambda x, y, a: (x * a).pow(2).sum(), lambda x, y, a: (y - a) ** 2])
    a = torch.tensor(2.0, requires_grad=True)
    x, y = game((torch.zeros(0), torch.zeros(())), a)
    y.backward()
    assert x.shape == (0,) and round(y.item(), 5) == 2.0 and a.grad.item() == pytest.approx(1.0)
