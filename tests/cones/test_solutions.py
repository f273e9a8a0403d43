"""Solutions of cone programs against closed forms, quadratic programs and the conditions of optimality."""

from __future__ import annotations

import pytest
import torch

import bilevel
from bilevel import Status, cone_program, cones, quadratic_program
from bilevel.cones import Cone
from tests.cones.programs import CONES, F64, random_program


def assert_optimal(data: dict[str, torch.Tensor], factors: list[Cone], solution: bilevel.ConeSolution) -> None:
    """Check the conditions of optimality, of which the projections are those of :mod:`bilevel.prox`."""
    x, y, s = solution.value, solution.multipliers, solution.slacks
    P, q, A, b = data.values()
    torch.testing.assert_close(P @ x + q + A.mT @ y, 0 * q, rtol=0, atol=1e-10)
    torch.testing.assert_close(A @ x + s, b, rtol=0, atol=1e-10)
    assert abs(float(s @ y)) < 1e-10
    for cone, slack, multiplier in zip(factors, *(t.split([c.rows for c in factors]) for t in (s, y)), strict=True):
        if isinstance(cone, cones.PSDTriangle):
            assert all(torch.linalg.eigvalsh(cone.matrix(part)).min() > -1e-10 for part in (slack, multiplier))
        elif isinstance(cone, cones.SecondOrder):
            assert all(part[1:].norm() <= part[0] + 1e-10 for part in (slack, multiplier))
        elif isinstance(cone, cones.Nonnegative):
            assert min(slack.min(), multiplier.min()) >= 0
        else:
            assert slack.abs().max() == 0


@pytest.mark.parametrize("seed", range(6))
def test_random_programs_are_solved_to_rounding(seed: int) -> None:
    factors = [*CONES, cones.SecondOrder(3), cones.SecondOrder(1), cones.PSDTriangle(1), cones.SecondOrder(2)]
    data = random_program(6, factors, seed=seed)
    solution = cone_program.solve(**data, cones=factors)
    assert solution.report.status is Status.CONVERGED and solution.report.residual_norm < 1e-13
    assert_optimal(data, factors, solution)


def test_a_batch_is_solved_as_each_problem_by_itself() -> None:
    data, shared = random_program(5, CONES, 2, 3, seed=3), random_program(5, CONES, seed=3)
    data["A"], data["b"] = shared["A"].reshape(1, 1, *shared["A"].shape), shared["b"]
    x = cone_program(**data, cones=CONES)
    assert x.shape == (2, 3, 5)
    for i in range(2):
        for j in range(3):
            one = cone_program(data["P"][i, j], data["q"][i, j], shared["A"], shared["b"], CONES)
            torch.testing.assert_close(x[i, j], one, rtol=1e-10, atol=1e-10)
    mapped = torch.func.vmap(lambda P, q: cone_program(P, q, shared["A"], shared["b"], CONES))
    torch.testing.assert_close(mapped(data["P"][0], data["q"][0]), x[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "point", [(0.0, 3.0, 4.0), (9.0, 3.0, 4.0), (-9.0, 3.0, 4.0), (1.0, 1.0, 2.0), (-2.0, 1.0, 2.0)]
)
def test_the_projection_on_a_second_order_cone(point: tuple[float, ...]) -> None:
    v, one = torch.tensor(point, dtype=F64, requires_grad=True), torch.eye(3, dtype=F64)
    project = lambda v: cone_program(one, -v, -one, 0.0, [cones.SecondOrder(3)])
    closed = bilevel.prox.SecondOrderCone().prox
    torch.testing.assert_close(project(v), closed(v), rtol=1e-12, atol=1e-12)
    for derivative in (torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        torch.testing.assert_close(derivative(project)(v), derivative(closed)(v), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_least_eigenvalue(dtype: torch.dtype) -> None:
    cone = cones.PSDTriangle(4)
    root = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=F64).to(dtype)
    C = (root + root.T).requires_grad_()
    A = cone.vector(torch.eye(4, dtype=dtype)).unsqueeze(-1)
    least = lambda C: cone_program(None, -torch.ones(1, dtype=dtype), A, cone.vector(C), [cone])[0]
    values, vectors = torch.linalg.eigh(C.detach().double())
    found = least(C)
    assert found.dtype == dtype
    torch.testing.assert_close(found.detach().double(), values[0], rtol=1e-6, atol=1e-6)
    (grad,) = torch.autograd.grad(found, C)
    torch.testing.assert_close(grad.double(), torch.outer(vectors[:, 0], vectors[:, 0]), rtol=1e-5, atol=1e-6)
    if dtype == F64:
        closed = torch.func.hessian(lambda C: torch.linalg.eigvalsh(0.5 * (C + C.T))[0])(C.detach())
        torch.testing.assert_close(torch.func.hessian(least)(C.detach()), closed, rtol=1e-9, atol=1e-9)


def test_max_cut_of_a_five_cycle() -> None:
    # The bound of Goemans and Williamson: (25 + 5√5)/8 for the cycle with unit weights.
    cone, n = cones.PSDTriangle(5), 15
    weights = torch.zeros(5, 5, dtype=F64)
    for i in range(5):
        weights[i, (i + 1) % 5] = weights[(i + 1) % 5, i] = 1.0
    weights.requires_grad_()
    laplacian = torch.diag(weights.sum(0)) - weights
    diagonal = torch.stack([cone.vector(torch.diag(row)) for row in torch.eye(5, dtype=F64)])
    A = torch.cat([diagonal, -torch.eye(n, dtype=F64)])
    b = torch.cat([torch.ones(5, dtype=F64), torch.zeros(n, dtype=F64)])
    x = cone_program(None, -0.25 * cone.vector(laplacian), A, b, [cones.Zero(5), cone], on_failure="ignore")
    bound = 0.25 * cone.vector(laplacian) @ x.detach()
    assert float(bound.detach()) == pytest.approx((25 + 5 * 5**0.5) / 8, abs=1e-7)


def test_robust_least_squares() -> None:
    # min ‖Ax − b‖ + ρ‖x‖, of which the stationary points are those of ridge regression with a strength ρ‖Ax − b‖/‖x‖.
    generator = torch.Generator().manual_seed(1)
    M, y = torch.randn(7, 3, dtype=F64, generator=generator), torch.randn(7, dtype=F64, generator=generator)
    rho = torch.tensor(0.3, dtype=F64, requires_grad=True)
    zero = torch.zeros
    rows = [
        torch.tensor([[0, 0, 0, -1.0, 0]], dtype=F64),
        torch.cat([-M, zero(7, 2, dtype=F64)], 1),
        torch.tensor([[0, 0, 0, 0, -1.0]], dtype=F64),
        torch.cat([-torch.eye(3, dtype=F64), zero(3, 2, dtype=F64)], 1),
    ]
    b = torch.cat([zero(1, dtype=F64), -y, zero(4, dtype=F64)])
    q = torch.cat([zero(3, dtype=F64), torch.ones(1, dtype=F64), rho.reshape(1)])
    x = cone_program(None, q, torch.cat(rows), b, [cones.SecondOrder(8), cones.SecondOrder(4)])[:3]
    objective = lambda x, rho: torch.linalg.vector_norm(M @ x - y) + rho * torch.linalg.vector_norm(x)
    reference = bilevel.argmin(objective)(torch.ones(3, dtype=F64), rho)
    torch.testing.assert_close(x, reference, rtol=1e-8, atol=1e-8)
    slopes = (torch.autograd.grad(part.sum(), rho)[0] for part in (x, reference))
    torch.testing.assert_close(*slopes, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_linear_and_quadratic_programs_agree_with_quadratic_program(linear: bool, sparse: bool) -> None:
    factors = [cones.Zero(2), cones.Nonnegative(6)]
    data = random_program(4, factors, seed=5, depth=1.0)
    P, q, A, b = (t.requires_grad_() for t in data.values())
    G, h = (
        torch.cat([A[2:], torch.eye(4, dtype=F64), -torch.eye(4, dtype=F64)]),
        torch.cat([b[2:], 20 + 0 * q, 20 + 0 * q]),
    )
    P = 0 * P if linear else P
    ours = torch.cat([A[:2], G]), torch.cat([b[:2], h])
    matrices = (P.to_sparse(), ours[0].to_sparse()) if sparse else (P, ours[0])
    x = cone_program(matrices[0], q, matrices[1], ours[1], [cones.Zero(2), cones.Nonnegative(14)])
    other = quadratic_program(P, q, A[:2], b[:2], G, h)
    torch.testing.assert_close(x, other, rtol=1e-9, atol=1e-9)
    weights = torch.arange(1.0, 5.0, dtype=F64)
    mine, theirs = (torch.autograd.grad((part * weights).sum(), (q, A, b), retain_graph=True) for part in (x, other))
    for one, two in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-8)


def test_sparse_matrices_give_the_same() -> None:
    data = random_program(6, CONES, seed=2)
    dense = {name: t.clone().requires_grad_() for name, t in data.items()}
    leaves = {name: t.clone() for name, t in data.items()}
    leaves["P"], leaves["A"] = leaves["P"].to_sparse(), leaves["A"].to_sparse()
    leaves = {name: t.requires_grad_() for name, t in leaves.items()}
    x, other = cone_program(**leaves, cones=CONES), cone_program(**dense, cones=CONES)
    torch.testing.assert_close(x, other, rtol=1e-10, atol=1e-10)
    mine, theirs = (torch.autograd.grad(part.sum(), tuple(d.values())) for part, d in ((x, leaves), (other, dense)))
    for one, two in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one.to_dense() if one.layout != torch.strided else one, two, rtol=1e-9, atol=1e-10)


def test_a_large_sparse_program() -> None:
    # Total variation of a long signal in groups of three: a second-order cone for each neighbour pair.
    n, generator = 400, torch.Generator().manual_seed(0)
    signal = torch.randn(n, dtype=F64, generator=generator).cumsum(0)
    eye = torch.eye(n, dtype=F64)
    first = torch.cat([torch.zeros(n - 1, n, dtype=F64), -torch.eye(n - 1, dtype=F64)], 1)
    second = torch.cat([-(eye[1:] - eye[:-1]), torch.zeros(n - 1, n - 1, dtype=F64)], 1)
    A = torch.stack([first, second], 1).reshape(2 * (n - 1), -1).to_sparse()
    P = torch.diag(torch.cat([torch.ones(n, dtype=F64), torch.zeros(n - 1, dtype=F64)])).to_sparse()
    strength = torch.tensor(0.7, dtype=F64, requires_grad=True)
    q = torch.cat([-signal, strength * torch.ones(n - 1, dtype=F64)])
    x = cone_program(P, q, A, 0.0, [cones.SecondOrder(2)] * (n - 1))[:n]
    reference = bilevel.prox.TotalVariation1D(1.0).prox(signal, 0.7)
    torch.testing.assert_close(x.detach(), reference, rtol=1e-8, atol=1e-8)
    (slope,) = torch.autograd.grad(x.square().sum(), strength)
    step = 1e-6
    moved = (bilevel.prox.TotalVariation1D(1.0).prox(signal, 0.7 + sign * step).square().sum() for sign in (1, -1))
    up, down = moved
    torch.testing.assert_close(slope, (up - down) / (2 * step), rtol=1e-6, atol=1e-6)


def test_no_rows_and_empty_cones() -> None:
    one, q = torch.eye(2, dtype=F64), torch.tensor([1.0, -2.0], dtype=F64)
    none = torch.zeros(0, 2, dtype=F64)
    torch.testing.assert_close(cone_program(one, q, none, 0.0, []), -q)
    empty = [cones.Zero(0), cones.Nonnegative(2), cones.Nonnegative(0)]
    torch.testing.assert_close(cone_program(one, q, -one, 0.0, empty), torch.tensor([0.0, 2.0], dtype=F64))
    nothing = cone_program(torch.zeros(0, 2, 2), torch.zeros(0, 2), torch.zeros(1, 2), 1.0, cones.Nonnegative(1))
    assert nothing.shape == (0, 2)


def test_a_matrix_and_its_vector() -> None:
    cone = cones.PSDTriangle(3)
    matrix = torch.arange(18.0).reshape(2, 3, 3)
    matrix = matrix + matrix.mT
    vector = cone.vector(matrix)
    torch.testing.assert_close(cone.matrix(vector), matrix)
    torch.testing.assert_close((vector[0] * vector[1]).sum(), (matrix[0] * matrix[1]).sum())


@pytest.mark.parametrize("smoothing", [1e-3, 0.1, 10.0])
def test_smoothing_gives_a_point_of_the_central_path(smoothing: float) -> None:
    data = random_program(6, CONES, seed=1)
    solution = cone_program.solve(**data, cones=CONES, smoothing=smoothing)
    rows = [cone.rows for cone in CONES]
    zero, plain, second, semi = zip(solution.slacks.split(rows), solution.multipliers.split(rows), strict=True)
    assert zero[0].abs().max() == 0
    torch.testing.assert_close(plain[0] * plain[1], torch.full((3,), smoothing, dtype=F64))
    (t, u), (r, w) = ((part[0], part[1:]) for part in second)
    torch.testing.assert_close(
        torch.cat([(t * r + u @ w).reshape(1), t * w + r * u]),
        smoothing * torch.eye(3, dtype=F64)[0],
        atol=1e-9,
        rtol=1e-9,
    )
    S, Y = (CONES[3].matrix(part) for part in semi)  # type: ignore[attr-defined]
    torch.testing.assert_close(S @ Y, smoothing * torch.eye(3, dtype=F64), atol=1e-9, rtol=1e-9)
