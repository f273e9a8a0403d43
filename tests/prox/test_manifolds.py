"""The manifold of each term: its retraction, the derivative of a solution that it gives, and how near a kink is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import bilevel
from bilevel import prox
from tests.prox.cases import CASES, Case, draws
from tests.prox.test_proximal_points import differences, margin_at

every = pytest.mark.parametrize("case", CASES, ids=str)
SEEDS = st.integers(0, 10_000)
STEP = 0.2


@every
@given(seed=SEEDS, scale=st.sampled_from([0.3, 1.0, 5.0]))
def test_the_retraction_keeps_the_point_and_its_derivative_is_a_projector(case: Case, seed: int, scale: float) -> None:
    v, parameters = draws(case, seed, scale)
    term = case.build(*parameters)
    x = term.prox(v)
    manifold = term.manifold(x)
    torch.testing.assert_close(manifold.retract(x), x, rtol=1e-11, atol=1e-11 * (1 + scale))
    torch.testing.assert_close(manifold.value(x), term.value(x), rtol=1e-11, atol=1e-11 * (1 + scale))
    n = x.numel()
    slope = jacrev(manifold.retract)(x).reshape(n, n)
    torch.testing.assert_close(slope, slope.mT, rtol=0, atol=1e-8)
    torch.testing.assert_close(slope @ slope, slope, rtol=0, atol=1e-8)
    if manifold.free is not None:
        torch.testing.assert_close(slope, torch.diag(manifold.free.reshape(-1).to(x.dtype)))
    near = manifold.retract(x + 1e-3 * v / scale)
    torch.testing.assert_close(manifold.retract(near), near, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(manifold.value(near), term.value(near), rtol=1e-9, atol=1e-9)


def quadratic(case: Case, seed: int) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    """Return Q and q of f(x) = ½ xᵀQx − qᵀx, and parameters of the term."""
    q, parameters = draws(case, seed, 2.0)
    n = q.numel()
    root = torch.randn(n, n, generator=torch.Generator().manual_seed(seed + 100), dtype=q.dtype)
    return torch.eye(n, dtype=q.dtype) + root @ root.mT / n, q, parameters


def objective(Q: torch.Tensor, q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    flat = x.reshape(-1)
    return 0.5 * flat @ (Q @ flat) - (q * x).sum()


def solution(term: prox.Term, Q: torch.Tensor, q: torch.Tensor, start: torch.Tensor | None = None) -> torch.Tensor:
    """Return the minimiser of f + g to rounding, by the proximal gradient method with the momentum of a strong convexity of 1."""
    x = y = torch.zeros_like(q) if start is None else start
    root = STEP**0.5
    for _ in range(100):
        new = term.prox(y - STEP * ((Q @ y.reshape(-1)).reshape(q.shape) - q), STEP)
        x, y = new, new + (1 - root) / (1 + root) * (new - x)
    return term.prox(x - STEP * ((Q @ x.reshape(-1)).reshape(q.shape) - q), STEP)


def implicit(
    case: Case,
    Q: torch.Tensor,
    q: torch.Tensor,
    parameters: tuple[torch.Tensor, ...],
    jacobian: Callable[..., Callable],
) -> list[torch.Tensor]:
    """Return the derivatives of the solution in q and the parameters, from ∇Φ(y) = 0."""
    x = solution(case.build(*parameters), Q, q)

    def model(y: torch.Tensor, q: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        manifold = case.build(*parameters).manifold(x)
        z = manifold.retract(y)
        return objective(Q, q, z) + manifold.value(z) + 0.5 * (y - z).square().sum()

    slope = grad(model)
    assert slope(x, q, *parameters).abs().max() < 1e-9
    n = x.numel()
    H = jacobian(slope)(x, q, *parameters).reshape(n, n)
    torch.testing.assert_close(H, H.mT, rtol=1e-8, atol=1e-8)
    made = []
    for index, parameter in enumerate((q, *parameters)):
        B = jacobian(slope, argnums=index + 1)(x, q, *parameters).reshape(n, -1)
        made.append(-torch.linalg.solve(H, B).reshape(*x.shape, *parameter.shape))
    return made


@every
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))])
def test_the_derivative_of_a_solution_is_that_of_differences(case: Case, seed: int) -> None:
    Q, q, parameters = quadratic(case, seed)
    term = case.build(*parameters)
    x = solution(term, Q, q)
    slope = grad(lambda x: objective(Q, q, x))(x)
    margin = float(term.margin(x, slope, STEP))
    assert 1e-3 < margin <= 1, f"a draw near a kink ({margin}): take another seed"
    found = implicit(case, Q, q, parameters, jacrev)
    for forward, reverse in zip(implicit(case, Q, q, parameters, jacfwd), found, strict=True):
        torch.testing.assert_close(forward, reverse, rtol=1e-8, atol=1e-9)
    arguments = (q, *parameters)
    for index, derivative in enumerate(found):
        expected = slopes_of_solutions(case, Q, arguments, index, x)
        torch.testing.assert_close(derivative, expected, rtol=1e-5, atol=1e-6)


def slopes_of_solutions(
    case: Case, Q: torch.Tensor, arguments: tuple[torch.Tensor, ...], index: int, x: torch.Tensor, size: float = 1e-5
) -> torch.Tensor:
    """Return the central differences of the solution along each entry of an argument, all problems in one batch."""
    target = arguments[index]
    moves = size * torch.eye(target.numel(), dtype=x.dtype).reshape(-1, *target.shape)

    def solved(changed: torch.Tensor) -> torch.Tensor:
        q, *parameters = (*arguments[:index], changed, *arguments[index + 1 :])
        return solution(case.build(*parameters), Q, q, x)

    high, low = vmap(solved)(torch.cat([target + moves, target - moves])).split(len(moves))
    return ((high - low) / (2 * size)).movedim(0, -1).reshape(*x.shape, *target.shape)


def full(*shape: int, value: float) -> torch.Tensor:
    return torch.full(shape, value, dtype=torch.float64)


def vector(*entries: float) -> torch.Tensor:
    return torch.tensor(entries, dtype=torch.float64)


MIXED = vector(1.0, -2.0, 0.3, 0.1, 1.5)
SYMMETRIC = torch.tensor([[2.0, 0.5, 0.1], [0.5, 3.0, -0.4], [0.1, -0.4, 4.0]], dtype=torch.float64)
FACES: dict[str, tuple[Callable[..., prox.Term], torch.Tensor, tuple[torch.Tensor, ...]]] = {
    "L1 zero": (prox.L1, MIXED, (vector(9.0)[0],)),
    "L1 smooth": (prox.L1, MIXED, (vector(0.0, 1.0, 0.0, 1.0, 0.2),)),
    "GroupL2 zero": (prox.GroupL2, MIXED, (vector(9.0)[0],)),
    "GroupL2 single": (prox.GroupL2, MIXED, (vector(0.1)[0],)),
    "LInf zero": (prox.LInf, MIXED, (vector(9.0)[0],)),
    "LInf one largest": (prox.LInf, MIXED, (vector(0.01)[0],)),
    "NuclearNorm zero": (prox.NuclearNorm, SYMMETRIC, (vector(9.0)[0],)),
    "NuclearNorm full rank": (prox.NuclearNorm, SYMMETRIC, (vector(0.1)[0],)),
    "TotalVariation1D constant": (prox.TotalVariation1D, MIXED, (vector(9.0)[0],)),
    "TotalVariation1D free": (prox.TotalVariation1D, MIXED, (vector(1e-3)[0],)),
    "NonNegative zero": (prox.NonNegative, -MIXED.abs(), ()),
    "Box of no width": (lambda c: prox.Box(c, c), MIXED, (vector(0.0, 0.1, 0.2, 0.3, 0.4),)),
    "Box unbounded": (prox.Box, MIXED, (vector(-float("inf"), -0.1, -float("inf"), -9.0, -9.0), full(5, value=9.0))),
    "Simplex corner": (prox.Simplex, vector(9.0, 0.0, -3.0), (vector(1.0)[0],)),
    "Simplex inside": (prox.Simplex, vector(0.3, 0.0, 0.1), (vector(1.0)[0],)),
    "L1Ball inside": (prox.L1Ball, MIXED, (vector(20.0)[0],)),
    "L1Ball corner": (prox.L1Ball, vector(0.0, 9.0, 1.0), (vector(1.0)[0],)),
    "L2Ball inside": (prox.L2Ball, MIXED, (vector(20.0)[0], full(5, value=0.1))),
    "HalfSpace inside": (prox.HalfSpace, MIXED, (full(5, value=1.0), vector(20.0)[0])),
    "HalfSpace boundary": (prox.HalfSpace, MIXED, (full(5, value=1.0), vector(-1.0)[0])),
    "SecondOrderCone inside": (prox.SecondOrderCone, vector(9.0, 1.0, -1.0), ()),
    "SecondOrderCone apex": (prox.SecondOrderCone, vector(-9.0, 1.0, -1.0), ()),
    "SecondOrderCone boundary": (prox.SecondOrderCone, vector(1.0, 3.0, -2.0), ()),
    "PSDCone inside": (prox.PSDCone, SYMMETRIC, ()),
    "PSDCone zero": (prox.PSDCone, -SYMMETRIC, ()),
    "TransportPolytope corner": (prox.TransportPolytope, 3 * SYMMETRIC, (vector(0.5, 0.2, 0.3), vector(0.1, 0.4, 0.5))),
    "TransportPolytope empty row": (prox.TransportPolytope, SYMMETRIC, (vector(0.5, 0.0, 0.5), vector(0.2, 0.3, 0.5))),
}


@pytest.mark.parametrize("name", FACES)
def test_the_derivative_on_each_kind_of_face(name: str) -> None:
    build, q, parameters = FACES[name]
    case = Case(name, build, lambda generator: parameters, q.shape, lambda v, step: v)
    n = q.numel()
    root = torch.randn(n, n, generator=torch.Generator().manual_seed(5), dtype=q.dtype)
    Q = torch.eye(n, dtype=q.dtype) + 0.1 * root @ root.mT / n
    x = solution(build(*parameters), Q, q)
    margin = float(build(*parameters).margin(x, grad(lambda x: objective(Q, q, x))(x), STEP))
    assert margin > 1e-3
    found = implicit(case, Q, q, parameters, jacrev)
    torch.testing.assert_close(found[0], slopes_of_solutions(case, Q, (q, *parameters), 0, x), rtol=1e-6, atol=1e-7)
    if name.startswith("TransportPolytope") or name in ("L1 smooth", "Box unbounded"):
        return  # a change of one marginal alone has no solution; a strength of zero, or an infinite bound, has no neighbours
    for index, parameter in enumerate(parameters, start=1):
        expected = slopes_of_solutions(case, Q, (q, *parameters), index, x)
        torch.testing.assert_close(found[index], expected, rtol=1e-6, atol=1e-7), parameter


@every
@pytest.mark.parametrize("seed", range(2))
def test_single_precision_names_the_same_manifold(case: Case, seed: int) -> None:
    v, parameters = draws(case, seed)
    term = case.build(*parameters)
    single = case.build(*(parameter.float() for parameter in parameters))
    x, y = term.prox(v, 0.5), single.prox(v.float(), 0.5)
    found, expected = jacrev(single.manifold(y).retract)(y), jacrev(term.manifold(x).retract)(x)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(single.manifold(y).retract(y), y, rtol=1e-5, atol=1e-5)
    margin = float(single.margin(y, (y - v.float()) / 0.5, 0.5))
    assert margin == pytest.approx(margin_at(term, v, 0.5), rel=1e-3, abs=1e-4)


@every
def test_the_model_is_differentiated_in_batches(case: Case) -> None:
    problems = [quadratic(case, seed) for seed in range(3)]
    points = torch.stack([solution(case.build(*parameters), Q, q) for Q, q, parameters in problems])
    matrices, costs = (torch.stack([problem[i] for problem in problems]) for i in (0, 1))
    parameters = [torch.stack(each) for each in zip(*(problem[2] for problem in problems), strict=True)]

    def model(
        y: torch.Tensor, x: torch.Tensor, Q: torch.Tensor, q: torch.Tensor, *parameters: torch.Tensor
    ) -> torch.Tensor:
        manifold = case.build(*parameters).manifold(x)
        z = manifold.retract(y)
        return objective(Q, q, z) + manifold.value(z) + 0.5 * (y - z).square().sum()

    together = vmap(hessian(model))(points, points, matrices, costs, *parameters)
    for k, (Q, q, own) in enumerate(problems):
        alone = hessian(model)(points[k], points[k], Q, q, *own)
        torch.testing.assert_close(together[k], alone, rtol=1e-8, atol=1e-9)
    if case.curved:
        third = jacrev(jacrev(grad(model)))(points[k], points[k], Q, q, *own)
        close = differences(lambda y: hessian(model)(y, points[k], Q, q, *own), points[k], 1e-5)
        torch.testing.assert_close(third, close, rtol=1e-4, atol=1e-5)


KINKED = [case for case in CASES if case.name not in ("AffineSet", "Zero")]


@pytest.mark.parametrize("case", KINKED, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_the_margin_vanishes_where_the_manifold_changes(case: Case, seed: int) -> None:
    v, parameters = draws(case, seed)
    term = case.build(*parameters)

    def kind(v: torch.Tensor) -> list[bool]:
        x = term.prox(v, 0.5)
        slope = jacrev(term.manifold(x).retract)(x)
        return [*(slope.abs() > 1e-9).reshape(-1).tolist(), round(float(slope.reshape(v.numel(), -1).trace()))]

    low, high = 0.0, 1.0
    first = kind(v)
    ends = [draws(case, other, scale)[0] for other in range(50, 60) for scale in (3.0, 0.05)]
    inside = 0.5 * (term.prox(v) + term.prox(-v))
    w = next(w for w in (*ends, inside) if kind(w) != first)
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if kind(v + middle * (w - v)) == first else (low, middle)
    assert abs(margin_at(term, v + low * (w - v), 0.5)) < 1e-8
    assert margin_at(term, v, 0.5) > 1e-4


def test_the_margin_of_a_plan_with_several_parts_is_that_of_the_best_potentials() -> None:
    halves = torch.full((2,), 0.5, dtype=torch.float64)
    term = prox.TransportPolytope(halves, halves)
    x = torch.eye(2, dtype=torch.float64) / 2
    # Potentials: α = (1, 0), β = (0, −1) make the reduced costs off the diagonal 1 and 1; those of least norm make them 2 and 0.
    cost = torch.tensor([[1.0, 3.0], [0.0, -1.0]], dtype=torch.float64)
    assert float(term.margin(x, cost)) == pytest.approx(min(0.5, 1.5) / 3.5)
    assert float(term.margin(x, cost.mT)) == pytest.approx(min(0.5, 1.5) / 3.5)
    assert float(term.margin(x, torch.zeros_like(x))) == 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_entry_that_rounding_moved_from_zero_is_zero(dtype: torch.dtype) -> None:
    # The plan has the blocks {0, 1} and {2}, each with equal sums. Rounding may leave a trace of mass between them.
    thirds = torch.full((3,), 1 / 3, dtype=dtype)
    term = prox.TransportPolytope(thirds, thirds)
    generator = torch.Generator().manual_seed(14)
    cost = torch.rand(3, 3, generator=generator, dtype=torch.float64).to(dtype)
    plan = term.prox(thirds[:, None] * thirds - 2 * cost)
    assert float(plan[plan > 0].min()) > 1e-3
    rounded = plan + torch.finfo(dtype).tiny * 100
    assert torch.equal(term.manifold(rounded).retract(rounded) > 0, plan > 0)
    assert float(term.margin(rounded, cost + 0.5 * plan)) > 1e-3


def test_a_plan_of_uniform_marginals_has_a_derivative() -> None:
    thirds = torch.full((3,), 1 / 3, dtype=torch.float64)
    layer = bilevel.argmin(
        lambda plan, cost: (cost * plan).sum() + 0.25 * (plan**2).sum(), prox=prox.TransportPolytope(thirds, thirds)
    )

    def value(cost: torch.Tensor) -> torch.Tensor:
        return (cost * layer(thirds[:, None] * thirds, cost)).sum()

    cost = torch.rand(3, 3, generator=torch.Generator().manual_seed(14), dtype=torch.float64)
    step = 1e-6 * torch.eye(9, dtype=torch.float64).reshape(9, 3, 3)
    central = torch.stack([(value(cost + e) - value(cost - e)) / 2e-6 for e in step]).reshape(3, 3)
    torch.testing.assert_close(grad(value)(cost), central, rtol=1e-6, atol=1e-7)


def test_a_strength_of_zero_is_smooth() -> None:
    x = torch.tensor([[0.0, 0.0, 1.0], [1.0, 1.0, -1.0]], dtype=torch.float64)
    for term in (
        prox.L1(0.0),
        prox.ElasticNet(0.0, 0.3),
        prox.GroupL2(0.0),
        prox.LInf(0.0),
        prox.NuclearNorm(0.0),
        prox.TotalVariation1D(0.0),
    ):
        assert float(term.margin(x, x)) == 1.0
        torch.testing.assert_close(jacrev(term.manifold(x).retract)(x).reshape(6, 6), torch.eye(6, dtype=x.dtype))


def test_the_scale_of_the_problem_leaves_the_margin_alone() -> None:
    for case in CASES:
        if case.name in ("TransportPolytope",):
            continue
        v, parameters = draws(case, 11)
        if len(parameters) == 2 and case.name != "Box":
            continue  # a matrix, a normal vector or a share without a unit is among them
        small = tuple(1e-6 * p for p in parameters)
        found = margin_at(case.build(*small), 1e-6 * v)
        assert found == pytest.approx(margin_at(case.build(*parameters), v), rel=1e-6), case.name
