"""``bilevel.equilibrium`` with a proximal term for each player: best responses, differences, ``vmap``, and refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.func import hessian, jacfwd, jacrev, vmap

import bilevel
from bilevel import prox

F64 = torch.float64
N = 5


def game_of(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    P, Q = (torch.randn(N, N, generator=generator, dtype=F64) for _ in range(2))
    B = 0.2 * torch.randn(N, N, generator=generator, dtype=F64)
    eye = torch.eye(N, dtype=F64)
    return P @ P.mT / N + eye, Q @ Q.mT / N + eye, B, torch.randn(2 * N, generator=generator, dtype=F64)


def by_best_responses(data: Any, q: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """Return the equilibrium: each player in turn descends to its best response, until nothing moves."""
    P, Q, B = (part.numpy() for part in data)
    linear, strengths = q.numpy(), s.tolist()
    x, y = np.zeros(N), np.zeros(N)
    steps = [1 / np.linalg.eigvalsh(H)[-1] for H in (P, Q)]

    def response(H: np.ndarray, b: np.ndarray, z: np.ndarray, step: float, strength: float) -> np.ndarray:
        for _ in range(60):
            v = z - step * (H @ z + b)
            z = np.sign(v) * np.maximum(np.abs(v) - step * strength, 0)
        return z

    for _ in range(300):
        before = np.concatenate([x, y])
        x = response(P, B @ y + linear[:N], x, steps[0], strengths[0])
        y = response(Q, linear[N:] - B.T @ x, y, steps[1], strengths[1])
        if np.abs(np.concatenate([x, y]) - before).max() < 1e-15:
            break
    return torch.as_tensor(np.concatenate([x, y]))


class Layer:
    """Player 0 has an L1 norm, player 1 an elastic net, with strengths that are arguments."""

    def __init__(self, data: Any) -> None:
        P, Q, B, _ = data
        self.game = bilevel.equilibrium(
            [
                lambda x, y, q, s: 0.5 * x @ P @ x + x @ B @ y + q[:N] @ x,
                lambda x, y, q, s: 0.5 * y @ Q @ y - x @ B @ y + q[N:] @ y,
            ],
            prox=[lambda q, s: prox.L1(s[0]), lambda q, s: prox.ElasticNet(s[1], 0.3)],
        )

    def __call__(self, q: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        zero = torch.zeros(N, dtype=F64)
        return torch.cat(self.game((zero, zero), q, s))


@pytest.mark.parametrize("seed", range(4))
def test_values_and_derivatives_beside_best_responses(seed: int) -> None:
    P, Q, B, q = game_of(seed)
    layer, s = Layer((P, Q, B, q)), torch.tensor([0.3, 0.2], dtype=F64)
    wide = (P, Q + 0.3 * torch.eye(N, dtype=F64), B)

    def reference(q: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return by_best_responses(wide, q, s)

    found, expected = layer(q, s), reference(q, s)
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=0.0)
    assert torch.equal(found == 0, expected == 0) and bool((found == 0).any())
    direction = torch.randn(2 * N, generator=torch.Generator().manual_seed(seed), dtype=F64)
    h = 1e-5
    by_q = (reference(q + h * direction, s) - reference(q - h * direction, s)) / (2 * h)
    unit = torch.tensor([1.0, -0.5], dtype=F64)
    by_s = (reference(q, s + h * unit) - reference(q, s - h * unit)) / (2 * h)
    for mode in (jacrev, jacfwd):
        first, second = mode(layer, argnums=(0, 1))(q, s)
        torch.testing.assert_close(first @ direction, by_q, atol=1e-7, rtol=1e-7)
        torch.testing.assert_close(second @ unit, by_s, atol=1e-7, rtol=1e-7)


def test_second_derivatives_of_a_game_that_is_not_quadratic_beside_differences() -> None:
    game = bilevel.equilibrium(
        [lambda x, y, a: 0.5 * (x**2).sum() + 0.1 * (x**4).sum() + 0.3 * (x * y).sum() - a @ x, lambda x, y, a: 0.5 * ((y + 0.5 * x - a) ** 2).sum()],
        prox=[lambda a: prox.L1(a[0].exp() * 0.2), None], lower=[None, 0.0],
    )  # fmt: skip
    zero = torch.zeros(3, dtype=F64)

    def loss(a: torch.Tensor) -> torch.Tensor:
        x, y = game((zero, zero), a)
        return (x**3).sum() + (x * y).sum()

    a = torch.tensor([0.9, -1.5, 0.1], dtype=F64)
    x, y = game((zero, zero), a)
    assert float(x[2]) == 0.0 and float(y[1]) == 0.0 and float(x[0]) != 0.0
    h, eye = 1e-5, torch.eye(3, dtype=F64)
    slope = torch.stack([(loss(a + h * e) - loss(a - h * e)) / (2 * h) for e in eye])
    torch.testing.assert_close(jacrev(loss)(a), slope, atol=1e-8, rtol=1e-7)
    bend = torch.stack([(jacrev(loss)(a + h * e) - jacrev(loss)(a - h * e)) / (2 * h) for e in eye])
    torch.testing.assert_close(hessian(loss)(a), bend, atol=1e-7, rtol=1e-6)


def test_a_batch_and_groups_of_a_tree() -> None:
    game = bilevel.equilibrium(
        [lambda x, y, a: 0.5 * ((x["w"] - a) ** 2).sum() + 0.5 * (x["b"] - y) ** 2, lambda x, y, a: 0.5 * (y - 0.5 * x["b"] - a.sum()) ** 2],
        prox=[lambda a: {"w": prox.GroupL2(1.0, [[0, 1], [2]]), "b": None}, prox.NonNegative()],
    )  # fmt: skip
    start = {"w": torch.zeros(3, dtype=F64), "b": torch.zeros((), dtype=F64)}, torch.zeros((), dtype=F64)
    a = torch.tensor([[3.0, 4.0, 0.5], [-0.3, 0.4, -2.0]], dtype=F64)
    x, y = vmap(lambda a: game(start, a))(a)
    expected = torch.tensor([[2.4, 3.2, 0.0], [0.0, 0.0, -1.0]], dtype=F64)
    torch.testing.assert_close(x["w"], expected, atol=1e-11, rtol=0.0)
    torch.testing.assert_close(y, torch.tensor([15.0, 0.0], dtype=F64), atol=1e-10, rtol=0.0)
    torch.testing.assert_close(x["b"], y, atol=1e-10, rtol=0.0)
    assert bool((x["w"][0, 2] == 0) & (x["w"][1, :2] == 0).all())


def test_a_term_at_its_threshold_has_no_derivative() -> None:
    game = bilevel.equilibrium(
        [lambda x, y, a: 0.5 * (x - a) ** 2, lambda x, y, a: 0.5 * (y - x) ** 2], prox=[prox.L1(0.5), None]
    )
    zero = torch.zeros((), dtype=F64)
    a = torch.tensor(0.5, dtype=F64, requires_grad=True)
    x, _ = game((zero, zero), a)
    assert bool(x == 0)
    with pytest.raises(bilevel.SolveError, match="just at its threshold"):
        x.backward()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prox": [prox.L1(1.0)]}, "or a list of 2 entries, one for each player, got"),
        ({"prox": [1.0, None]}, r"expected prox\[0\] to be None, a term"),
        ({"prox": [prox.L1(1.0), None], "lower": [0.0, None]}, "expected bounds or a term for player 0, got both"),
        ({"prox": [prox.L1(torch.tensor(1.0, requires_grad=True)), None]}, "not to require grad"),
    ],
)
def test_mistakes_are_named(settings: Any, words: str) -> None:
    with pytest.raises(bilevel.ArgumentError, match=words):
        bilevel.equilibrium([lambda x, y: x * x, lambda x, y: y * y], **settings)


def test_what_a_function_returns_is_checked() -> None:
    players = [lambda x, y, s: x * x, lambda x, y, s: y * y]
    zero, s = torch.zeros((), dtype=F64), torch.tensor(-1.0, dtype=F64)
    with pytest.raises(bilevel.ArgumentError, match="at least 0"):
        bilevel.equilibrium(players, prox=[lambda s: prox.L1(s), None])((zero, zero), s)
    with pytest.raises(bilevel.ArgumentError, match="to return a term"):
        bilevel.equilibrium(players, prox=[lambda s: s, None])((zero, zero), s)


def test_an_unknown_that_a_solver_leaves_near_a_kink_ends_exactly_there() -> None:
    objectives = [lambda x, y: (x - 1 - 0.3 * y) ** 2, lambda x, y: (y - 0.2 * x) ** 2]
    zero = torch.zeros((), dtype=F64)

    def nearly(objectives: Any, init: Any) -> Any:
        return torch.tensor(0.65, dtype=F64), torch.tensor(1e-14, dtype=F64)

    game = bilevel.equilibrium(objectives, prox=prox.L1(0.7), solver=nearly, tolerance=bilevel.Tolerance(delta=1e-8))
    x, y = game((zero, zero))
    assert float(y) == 0.0 and float(x) == pytest.approx(0.65, abs=1e-12)
