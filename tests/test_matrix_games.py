"""``bilevel.equilibrium`` of games whose objectives are linear in each player's own unknowns: linear programs, best responses, differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch.func import grad, jacrev, vmap

import bilevel
from bilevel import prox

F64, F32 = torch.float64, torch.float32

ZERO_SUM = bilevel.equilibrium(
    [lambda x, y, A: x @ A @ y, lambda x, y, A: -(x @ A @ y)], prox=[prox.Simplex(), prox.Simplex()]
)
BIMATRIX = bilevel.equilibrium(
    [lambda x, y, A, B: x @ A @ y, lambda x, y, A, B: x @ B @ y], prox=[prox.Simplex(), prox.Simplex()]
)


def matrices(seed: int, count: int = 1, shape: tuple[int, int] | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(2, 9, (2,), generator=generator).tolist()
    return torch.randn(count, *(shape or sizes), generator=generator, dtype=F64)


def uniform(A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    m, n = A.shape[-2:]
    return torch.full((m,), 1 / m, dtype=A.dtype), torch.full((n,), 1 / n, dtype=A.dtype)


def by_linear_program(A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the equilibrium of min_x max_y xᵀAy on simplices."""
    m, n = A.shape
    found = linprog(
        np.r_[np.zeros(m), 1.0], A_ub=np.c_[A.T.numpy(), -np.ones(n)], b_ub=np.zeros(n),
        A_eq=[np.r_[np.ones(m), 0.0]], b_eq=[1.0], bounds=[(0, None)] * m + [(None, None)],
    )  # fmt: skip
    return torch.as_tensor(found.x[:m]), torch.as_tensor(-found.ineqlin.marginals)


def regret(x: torch.Tensor, y: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> float:
    """Return the most that a player could gain alone."""
    return max(float(x @ A @ y - (A @ y).min()), float(x @ B @ y - (x @ B).min()))


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("seed", [0, 1, 2, 7])
def test_zero_sum_games_beside_linear_programs(seed: int, dtype: torch.dtype) -> None:
    (A,) = matrices(seed)
    expected = by_linear_program(A)
    A = A.to(dtype).requires_grad_()
    x, y = ZERO_SUM(uniform(A), A)
    close = {"atol": 1e-12 if dtype == F64 else 1e-5, "rtol": 0.0}
    torch.testing.assert_close(x.detach().double(), expected[0], **close)
    torch.testing.assert_close(y.detach().double(), expected[1], **close)
    (found,) = torch.autograd.grad(x @ A @ y, A)
    torch.testing.assert_close(found, torch.outer(x, y).detach(), **close)


def test_a_batch_of_zero_sum_games_and_their_derivatives() -> None:
    A = matrices(5, 3, (3, 4))
    start = uniform(A)

    def value(A: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        x, y = ZERO_SUM(start, A)
        return x @ A @ y, (x, y)

    slopes, (x, y) = vmap(grad(value, has_aux=True))(A)
    for number in range(3):
        assert regret(x[number], y[number], A[number], -A[number]) < 1e-12
    torch.testing.assert_close(slopes, x[:, :, None] * y[:, None], atol=1e-12, rtol=0.0)
    # The supports stay what they are, so that the strategies have a derivative too.
    assert int((x[0] > 0).sum()) == int((y[0] > 0).sum()) > 1
    strategies = lambda A: torch.cat(ZERO_SUM(start, A))
    direction, h = matrices(6, 1, (3, 4))[0], 1e-5
    central = (strategies(A[0] + h * direction) - strategies(A[0] - h * direction)) / (2 * h)
    along = torch.einsum("kij,ij->k", jacrev(strategies)(A[0]), direction)
    assert float(central.norm()) > 0.1
    torch.testing.assert_close(along, central, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("seed", [0, 2, 5, 34])
def test_bimatrix_games_by_regret(seed: int) -> None:
    # Of seed 34, long steps leave the path of solutions for a closed one.
    generator = torch.Generator().manual_seed(seed)
    m, n = torch.randint(2, 9, (2,), generator=generator).tolist()
    A, B = (torch.randn(m, n, generator=generator, dtype=F64) for _ in range(2))
    x, y = BIMATRIX(uniform(A), A, B)
    assert regret(x, y, A, B) < 1e-12
    assert float(x.min()) >= 0 and float(y.min()) >= 0 and abs(float(x.sum()) - 1) < 1e-12


def test_bilinear_games_on_boxes() -> None:
    game = bilevel.equilibrium(
        [lambda x, y, A, b, c: x @ A @ y + b @ x + c @ y, lambda x, y, A, b, c: -(x @ A @ y + b @ x + c @ y)],
        lower=0.0,
        upper=1.0,
    )
    A, b, c = matrices(3, 3, (4, 4)), matrices(4, 3, (2, 4))[:, 0], matrices(4, 3, (2, 4))[:, 1]
    half = torch.full((4,), 0.5, dtype=F64)
    solve = lambda A, b, c: game((half, half), A, b, c)
    x, y = vmap(solve)(A, b, c)
    most = (x * b).sum(-1) + (c + torch.einsum("kij,ki->kj", A, x)).clamp_min(0).sum(-1)
    least = (y * c).sum(-1) + (b + torch.einsum("kij,kj->ki", A, y)).clamp_max(0).sum(-1)
    torch.testing.assert_close(most, least, atol=1e-12, rtol=0.0)
    assert bool(((x > 0) & (x < 1)).any(-1).any())
    by_b = vmap(jacrev(lambda b, A, c: (lambda p: p[0] @ A @ p[1] + b @ p[0] + c @ p[1])(solve(A, b, c))))(b, A, c)
    torch.testing.assert_close(by_b, x, atol=1e-12, rtol=0.0)


def test_matching_pennies_with_a_stake_on_a_box() -> None:
    # ∂f_0/∂x = 2a (2y − 1) + b and ∂f_1/∂y = −2a (2x − 1) vanish.
    game = bilevel.equilibrium(
        [lambda x, y, a, b: a * (2 * x - 1) * (2 * y - 1) + b * x, lambda x, y, a, b: -a * (2 * x - 1) * (2 * y - 1)],
        lower=0.0,
        upper=1.0,
    )
    start = torch.tensor(0.9, dtype=F64), torch.tensor(0.1, dtype=F64)
    a, b = torch.tensor(2.0, dtype=F64), torch.tensor(0.4, dtype=F64)
    solve = lambda b: torch.stack(game(start, a, b))
    torch.testing.assert_close(solve(b), torch.tensor([0.5, 0.45], dtype=F64))
    torch.testing.assert_close(jacrev(solve)(b), torch.tensor([0.0, -0.125], dtype=F64))


def test_curvature_counts_along_the_directions_in_which_a_simplex_lets_a_player_move() -> None:
    # Convex for the player, with a large curvature across the simplex, where no move is possible.
    H = torch.tensor([[50.0, 30.0, 20.0], [30.0, 20.0, 10.0], [20.0, 10.0, 30.0]], dtype=F64)
    assert float(torch.linalg.eigvalsh(H)[0]) > 0
    convex = bilevel.equilibrium(
        [lambda x, y, a: 0.5 * x @ H @ x - a @ x, lambda x, y, a: (y - x[0]) ** 2], prox=[prox.Simplex(), None]
    )
    inside = torch.tensor([0.3, 0.4, 0.3], dtype=F64)
    start, zero = torch.tensor([0.2, 0.2, 0.6], dtype=F64), torch.zeros((), dtype=F64)
    x, _ = convex((start, zero), H @ inside)
    torch.testing.assert_close(x, inside, atol=1e-12, rtol=0.0)
    # Concave along the simplex, and convex across it.
    across = 5 * torch.ones(3, 3, dtype=F64) - 0.5 * torch.eye(3, dtype=F64)
    concave = bilevel.equilibrium(
        [lambda x, y, a: 0.5 * x @ across @ x - a @ x, lambda x, y, a: (y - x[0]) ** 2], prox=[prox.Simplex(), None]
    )
    with pytest.raises(bilevel.SolveError, match="player 0 has negative curvature"):
        concave((inside, zero), across @ inside)


def test_a_game_without_an_equilibrium_names_a_remedy_that_works() -> None:
    def game(k: float, **bounds: float) -> bilevel.EquilibriumLayer:
        return bilevel.equilibrium(
            [lambda x, y: x * y + x + k * (x**2).sum(), lambda x, y: -x * y - y + k * (y**2).sum()], lower=0.0, **bounds
        )

    start = torch.tensor(0.2, dtype=F64), torch.tensor(0.4, dtype=F64)
    with pytest.raises(
        bilevel.SolveError, match=r"bound them on both sides, or add a strictly convex term such as 1e-3"
    ):
        game(0.0)(start)
    torch.testing.assert_close(torch.stack(game(1e-3)(start)), torch.tensor([0.0, 500.0], dtype=F64))
    torch.testing.assert_close(torch.stack(game(0.0, upper=10.0)(start)), torch.tensor([0.0, 10.0], dtype=F64))


def test_a_path_takes_over_before_newtons_method_has_spent_all_its_steps() -> None:
    (A,), (B,) = matrices(4, shape=None), matrices(104, shape=(5, 8))
    solution = BIMATRIX.solve(uniform(A), A, B)
    assert int(solution.report.iterations) < 100  # with 250 steps of Newton's method before the path: 260
    assert regret(*solution.value, A, B) < 1e-12
