"""Values and derivatives of constrained layers against closed forms and independent solvers."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch
from torch.func import hessian, jacfwd, jacrev, vmap

import bilevel

F64 = torch.float64


def tensor(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=F64)


def zeros(n: int, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.zeros(n, dtype=dtype)


def distance(x: torch.Tensor, a: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
    return 0.5 * ((x - a) ** 2).sum()


ball = bilevel.argmin(distance, inequality=lambda x, a, r: (x * x).sum() - r**2)
simplex = bilevel.argmin(distance, lower=0.0, equality=lambda x, a: x.sum() - 1)
box = bilevel.argmin(distance, lower=lambda a, b: -b, upper=lambda a, b: b)
entropic = bilevel.argmin(
    lambda x, cost, tau: (cost * x).sum() + tau * (x * x.log()).sum(),
    lower=0.0,
    equality=lambda x, cost, tau: x.sum() - 1,
)


def onto_ball(a: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    return r * a / a.norm()


def test_ball_all_orders() -> None:
    a, r = tensor(1.0, 2.0, 2.0), torch.tensor(1.5, dtype=F64)
    solve = lambda a, r: ball(zeros(3), a, r)
    torch.testing.assert_close(solve(a, r), onto_ball(a, r))
    for argument in (0, 1):
        expected = jacrev(onto_ball, argument)(a, r)
        torch.testing.assert_close(jacrev(solve, argument)(a, r), expected)
        torch.testing.assert_close(jacfwd(solve, argument)(a, r), expected)
    weights = tensor(1.0, -2.0, 0.5)
    second = hessian(lambda a: weights @ solve(a, r))(a)
    torch.testing.assert_close(second, hessian(lambda a: weights @ onto_ball(a, r))(a))


def test_ball_multiplier_is_the_value_of_its_radius() -> None:
    a, r = tensor(1.0, 2.0, 2.0), torch.tensor(1.5, dtype=F64)
    multiplier = lambda a, r: ball.solve(zeros(3), a, r).multipliers.inequality
    # x + 2 λ x = a on the sphere
    torch.testing.assert_close(multiplier(a, r), 0.5 * (a.norm() / r - 1))
    torch.testing.assert_close(jacrev(multiplier)(a, r), 0.5 * a / (a.norm() * r))


def test_inside_the_ball_nothing_is_active() -> None:
    a, r = tensor(0.1, 0.2, 0.2), torch.tensor(1.5, dtype=F64)
    solution = ball.solve(zeros(3), a, r)
    torch.testing.assert_close(solution.value, a)
    assert solution.multipliers.inequality.item() == 0.0
    assert not bool(solution.active.inequality)
    torch.testing.assert_close(jacrev(lambda a: ball(zeros(3), a, r))(a), torch.eye(3, dtype=F64))


def test_simplex() -> None:
    a = tensor(0.5, 0.9, -2.0)
    solution = simplex.solve(zeros(3), a)
    torch.testing.assert_close(solution.value, tensor(0.3, 0.7, 0.0))
    assert solution.value[2].item() == 0.0
    assert solution.active.lower.tolist() == [False, False, True]
    torch.testing.assert_close(solution.multipliers.equality, torch.tensor(0.2, dtype=F64))
    torch.testing.assert_close(solution.multipliers.lower, tensor(0.0, 0.0, 2.2))
    expected = torch.tensor([[0.5, -0.5, 0.0], [-0.5, 0.5, 0.0], [0.0, 0.0, 0.0]], dtype=F64)
    torch.testing.assert_close(jacrev(lambda a: simplex(zeros(3), a))(a), expected)


def test_a_bound_that_moves_carries_x_along() -> None:
    a, b = tensor(-3.0, 0.2, 5.0), tensor(1.0, 2.0, 3.0)
    solution = box.solve(zeros(3), a, b)
    torch.testing.assert_close(solution.value, tensor(-1.0, 0.2, 3.0))
    torch.testing.assert_close(jacrev(lambda b: box(zeros(3), a, b))(b), torch.diag(tensor(-1.0, 0.0, 1.0)))
    torch.testing.assert_close(jacfwd(lambda a: box(zeros(3), a, b))(a), torch.diag(tensor(0.0, 1.0, 0.0)))


def test_entropy_on_the_simplex_is_softmax() -> None:
    cost, tau = tensor(1.0, 2.0, 0.5), torch.tensor(0.3, dtype=F64)
    solve = lambda cost, tau: entropic(torch.full((3,), 0.1, dtype=F64), cost, tau)
    softmax = lambda cost, tau: torch.softmax(-cost / tau, 0)
    torch.testing.assert_close(solve(cost, tau), softmax(cost, tau))
    for argument in (0, 1):
        torch.testing.assert_close(jacrev(solve, argument)(cost, tau), jacrev(softmax, argument)(cost, tau))
    torch.testing.assert_close(hessian(lambda c: solve(c, tau)[0])(cost), hessian(lambda c: softmax(c, tau)[0])(cost))


def test_geometric_program() -> None:
    # min 1/(x y) with x + a y <= 1 is at x = 1/2, y = 1/(2a)
    solve = bilevel.argmin(lambda z, a: 1 / (z[0] * z[1]), lower=1e-3, inequality=lambda z, a: z[0] + a * z[1] - 1)
    a = torch.tensor(2.0, dtype=F64)
    call = lambda a: solve(tensor(1.0, 1.0), a)
    torch.testing.assert_close(call(a), tensor(0.5, 0.25))
    torch.testing.assert_close(jacrev(call)(a), tensor(0.0, -0.125))


def test_non_negative_least_squares_is_scipys() -> None:
    generator = torch.Generator().manual_seed(0)
    X, y = torch.randn(30, 8, dtype=F64, generator=generator), torch.randn(30, dtype=F64, generator=generator)
    nnls = bilevel.argmin(lambda w, X, y: ((X @ w - y) ** 2).sum(), lower=0.0)
    w = nnls(zeros(8), X, y)
    expected = scipy.optimize.nnls(X.numpy(), y.numpy())[0]
    np.testing.assert_allclose(w.numpy(), expected, atol=1e-12)
    support = torch.as_tensor(expected > 0)
    assert 0 < int(support.sum()) < 8
    found = jacrev(lambda y: nnls(zeros(8), X, y))(y)
    torch.testing.assert_close(found[support], torch.linalg.pinv(X[:, support]))
    assert not bool(found[~support].any())


def test_cournot_with_capacities() -> None:
    # A potential game: firm i maximises x_i (p - sum x) - c_i x_i within its capacity.
    potential = lambda x, cost, cap: (cost - 10) @ x + 0.5 * (x @ x) + 0.5 * x.sum() ** 2
    market = bilevel.argmin(potential, lower=0.0, upper=lambda cost, cap: cap)
    cost, cap = tensor(1.0, 2.0, 3.0), tensor(1.0, 9.0, 9.0)
    # The first firm is at its capacity 1; of the others, 2 x_i + x_j + 1 + c_i = 10.
    torch.testing.assert_close(market(zeros(3), cost, cap), tensor(1.0, 8 / 3, 5 / 3))
    torch.testing.assert_close(jacrev(lambda cap: market(zeros(3), cost, cap))(cap)[:, 0], tensor(1.0, -1 / 3, -1 / 3))


def test_maximum_of_numbers() -> None:
    largest = bilevel.argmin(lambda t, a: t, inequality=lambda t, a: a - t)
    a = tensor(0.5, 3.0, 1.0)
    torch.testing.assert_close(largest(torch.tensor(0.0, dtype=F64), a), a.amax())
    torch.testing.assert_close(jacrev(lambda a: largest(torch.tensor(0.0, dtype=F64), a))(a), tensor(0.0, 1.0, 0.0))


def test_linear_program_at_a_vertex() -> None:
    solve = bilevel.argmin(
        lambda x, c, b: c @ x, lower=0.0, inequality=lambda x, c, b: torch.stack([x.sum() - b, x[0] - 2])
    )
    c, b = tensor(-2.0, -1.0), torch.tensor(3.0, dtype=F64)
    torch.testing.assert_close(solve(zeros(2), c, b), tensor(2.0, 1.0))
    torch.testing.assert_close(jacrev(lambda b: solve(zeros(2), c, b))(b), tensor(0.0, 1.0))
    assert not bool(jacrev(lambda c: solve(zeros(2), c, b))(c).any())


@pytest.mark.parametrize("layer", [ball, box], ids=["ball", "box"])
def test_vmap_is_a_loop(layer: bilevel.Layer) -> None:
    points = 2 * torch.randn(6, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
    other = torch.tensor(1.0, dtype=F64) if layer is ball else tensor(1.0, 0.5, 0.25)
    call = lambda a: layer(zeros(3), a, other)
    torch.testing.assert_close(vmap(call)(points), torch.stack([call(a) for a in points]))
    torch.testing.assert_close(vmap(jacrev(call))(points), torch.stack([jacrev(call)(a) for a in points]))
    sums = lambda a: (call(a) ** 3).sum()
    torch.testing.assert_close(vmap(hessian(sums))(points), torch.stack([hessian(sums)(a) for a in points]))


def test_float32() -> None:
    a = torch.tensor([0.5, 0.9, -2.0])
    x = simplex(zeros(3, torch.float32), a)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, torch.tensor([0.3, 0.7, 0.0]))
    expected = torch.tensor([[0.5, -0.5, 0.0], [-0.5, 0.5, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(jacrev(lambda a: simplex(zeros(3, torch.float32), a))(a), expected)
    torch.testing.assert_close(jacfwd(lambda a: simplex(zeros(3, torch.float32), a))(a), expected)


def test_float32_with_a_captured_tensor_of_that_dtype() -> None:
    A = torch.eye(3) * 2
    solve = bilevel.argmin(lambda x, a: ((A @ x - a) ** 2).sum(), lower=0.0, equality=lambda x, a: x.sum() - 1)
    torch.testing.assert_close(
        solve(zeros(3, torch.float32), torch.tensor([1.0, 1.8, -4.0])), torch.tensor([0.3, 0.7, 0.0])
    )


def test_pytrees() -> None:
    solve = bilevel.argmin(
        lambda x, a, *, b: ((x["u"] - a) ** 2).sum() + ((x["v"] - b) ** 2).sum(),
        lower={"u": 0.0, "v": None},
        upper=lambda a, b: {"u": None, "v": b - 1},
        equality=lambda x, a, b: [x["u"][0] - 0.3],
        inequality=lambda x, a, b: {"cap": x["u"].sum() - 1, "other": (x["v"].sum() - 5).reshape(1, 1)},
    )
    a, b = tensor(1.0, 2.0), torch.ones(2, 2, dtype=F64)
    solution = solve.solve({"u": zeros(2), "v": torch.zeros(2, 2, dtype=F64)}, a, b=b)
    torch.testing.assert_close(solution.value["u"], tensor(0.3, 0.7))
    torch.testing.assert_close(solution.value["v"], torch.zeros(2, 2, dtype=F64))
    torch.testing.assert_close(solution.multipliers.inequality["cap"], torch.tensor(2.6, dtype=F64))
    torch.testing.assert_close(solution.multipliers.upper["v"], torch.full((2, 2), 2.0, dtype=F64))
    assert solution.multipliers.inequality["other"].shape == (1, 1)
    assert bool(solution.active.upper["v"].all())
    assert not bool(solution.active.inequality["other"])


def test_large_box() -> None:
    n = 1500
    generator = torch.Generator().manual_seed(0)
    Q = torch.randn(n, 200, dtype=F64, generator=generator) / n**0.5
    q = torch.randn(n, dtype=F64, generator=generator)
    objective = lambda x, s: 0.5 * ((Q.T @ x) ** 2).sum() + 0.5 * s * (x @ x) - q @ x
    solve = bilevel.argmin(objective, lower=0.0, upper=1.0)
    s = torch.tensor(0.3, dtype=F64, requires_grad=True)
    solution = solve.solve(zeros(n), s)
    assert bool(solution.report.converged)
    (solution.value**2).sum().backward()
    free = (solution.value > 0) & (solution.value < 1)
    H = (Q @ Q.T + s * torch.eye(n, dtype=F64)).detach()[free][:, free]
    x = solution.value.detach()[free]
    assert s.grad is not None
    torch.testing.assert_close(s.grad, -2 * x @ torch.linalg.solve(H, x))


@pytest.mark.parametrize("unit", [1e-8, 1e-4, 1e4, 1e8])
def test_units_do_not_matter(unit: float) -> None:
    solve = bilevel.argmin(lambda x, a, u: ((x - a * u) ** 2).sum(), lower=0.0, equality=lambda x, a, u: x.sum() - u)
    a, u = tensor(1.0, 2.5, 3.0), torch.tensor(unit, dtype=F64)
    torch.testing.assert_close(solve(zeros(3), a, u) / unit, tensor(0.0, 0.25, 0.75))
    wanted = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.5, -0.5], [0.0, -0.5, 0.5]], dtype=F64)
    torch.testing.assert_close(jacrev(lambda a: solve(zeros(3), a, u) / unit)(a), wanted)


def test_bounds_that_are_far_away_do_not_matter() -> None:
    solve = bilevel.argmin(
        distance, lower=-1e7, upper=1e7, inequality=lambda x, a: torch.stack([x.sum() - 1e-3, -x.sum() - 1e6])
    )
    a = tensor(1.0, 2.0)
    torch.testing.assert_close(solve(zeros(2), a), tensor(-0.4995, 0.5005))
    torch.testing.assert_close(
        jacrev(lambda a: solve(zeros(2), a))(a), torch.tensor([[0.5, -0.5], [-0.5, 0.5]], dtype=F64)
    )
