"""The prox of each term: against another solver, its derivatives, its properties, batches and dtypes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch.func import hessian, jacfwd, jacrev, vmap

from bilevel import prox
from tests.prox.cases import CASES, Case, draws

every = pytest.mark.parametrize("case", CASES, ids=str)
curved = pytest.mark.parametrize("case", [case for case in CASES if case.curved], ids=str)
SEEDS = st.integers(0, 10_000)
SCALES = st.sampled_from([0.1, 1.0, 5.0])


def points(case: Case, seed: int) -> list[torch.Tensor]:
    """Return points inside, outside and on the boundary: zero, ties, large entries, and a proximal point itself."""
    v, parameters = draws(case, seed)
    x = case.build(*parameters).prox(v)
    return [0.1 * v, v, 5 * v, torch.zeros_like(v), torch.ones_like(v), -torch.ones_like(v), x, 2 * x - v]


def margin_at(term: prox.Term, v: torch.Tensor, step: float = 1.0) -> float:
    x = term.prox(v, step)
    return float(term.margin(x, (x - v) / step, step))


def differences(function: Any, at: torch.Tensor, size: float = 1e-6) -> torch.Tensor:
    """Return the central differences of a function along each entry, in the last axes."""
    columns = []
    for index in range(at.numel()):
        e = torch.zeros(at.numel(), dtype=at.dtype)
        e[index] = size
        e = e.reshape(at.shape)
        columns.append((function(at + e) - function(at - e)) / (2 * size))
    stacked = torch.stack(columns, -1)
    return stacked.reshape(*stacked.shape[:-1], *at.shape)


@every
@pytest.mark.parametrize("seed", range(2))
def test_the_prox_is_the_minimiser_that_another_solver_finds(case: Case, seed: int) -> None:
    _, parameters = draws(case, seed)
    term = case.build(*parameters)
    for v in points(case, seed):
        for step in (0.5,) if case.is_set else (0.5, 2.0):
            expected = case.solve(v.numpy(), step, *(np.asarray(p) for p in parameters))
            np.testing.assert_allclose(term.prox(v, step).numpy(), expected, atol=2e-6 * (1 + float(v.abs().max())))


@every
@given(seed=SEEDS, scale=SCALES)
def test_no_other_point_is_better(case: Case, seed: int, scale: float) -> None:
    v, parameters = draws(case, seed, scale)
    term = case.build(*parameters)
    x = term.prox(v, 0.7)
    best = 0.5 * (x - v).square().sum() + 0.7 * term.value(x)
    generator = torch.Generator().manual_seed(seed)
    for size in (1e-3, 0.1, 1.0):
        other = x + size * torch.randn(v.shape, generator=generator, dtype=v.dtype)
        other = term.prox(other) if case.is_set else other
        assert best <= 0.5 * (other - v).square().sum() + 0.7 * term.value(other) + 1e-12 * (1 + best.abs())


@every
@given(seed=SEEDS, scale=SCALES)
def test_the_prox_is_firmly_nonexpansive_and_projections_are_idempotent(case: Case, seed: int, scale: float) -> None:
    v, parameters = draws(case, seed, scale)
    w = draws(case, seed + 1)[0]
    term = case.build(*parameters)
    x, y = term.prox(v), term.prox(w)
    apart = x - y
    assert apart.square().sum() <= (apart * (v - w)).sum() + 1e-12 * (1 + v.square().sum())
    if case.is_set:
        torch.testing.assert_close(term.prox(x), x, rtol=1e-12, atol=1e-12 * (1 + scale))


MOREAU = [
    (prox.L1(0.7), prox.Box(-0.7, 0.7), (5,)),
    (prox.LInf(0.7), prox.L1Ball(0.7), (5,)),
    (prox.GroupL2(0.7), prox.L2Ball(0.7), (5,)),
]


@pytest.mark.parametrize(("norm", "dual", "shape"), MOREAU, ids=lambda value: type(value).__name__)
@given(seed=SEEDS)
def test_a_norm_and_the_ball_of_its_dual_share_a_point(norm: Any, dual: Any, shape: Any, seed: int) -> None:
    v = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(norm.prox(v) + dual.prox(v), v, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("cone", "shape"), [(prox.SecondOrderCone(), (4,)), (prox.PSDCone(), (3, 3))])
@given(seed=SEEDS)
def test_a_cone_and_its_polar_share_a_point_at_right_angles(cone: Any, shape: Any, seed: int) -> None:
    v = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    v = v + v.mT if v.ndim == 2 else v
    inside, polar = cone.prox(v), -cone.prox(-v)
    torch.testing.assert_close(inside + polar, v, rtol=1e-12, atol=1e-12)
    assert (inside * polar).sum().abs() < 1e-12


@every
@pytest.mark.parametrize("seed", range(3))
def test_the_jacobian_is_that_of_differences(case: Case, seed: int) -> None:
    v, parameters = draws(case, seed)
    assert margin_at(case.build(*parameters), v, 0.5) > 1e-4
    arguments = (v, *parameters)

    def function(*args: torch.Tensor) -> torch.Tensor:
        return case.build(*args[1:]).prox(args[0], 0.5)

    for index in range(len(arguments)):
        others = list(arguments)

        def along(x: torch.Tensor, index: int = index, others: list[torch.Tensor] = others) -> torch.Tensor:
            return function(*others[:index], x, *others[index + 1 :])

        expected = differences(along, arguments[index])
        for transform in (jacrev, jacfwd):
            found = transform(function, argnums=index)(*arguments)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-8)


@curved
def test_second_and_third_derivatives_are_those_of_differences(case: Case) -> None:
    v, parameters = draws(case, 7)
    term = case.build(*parameters)
    weights = torch.randn(case.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def scalar(v: torch.Tensor) -> torch.Tensor:
        return (weights * term.prox(v, 0.5)).sum()

    slope, curvature = jacrev(scalar), hessian(scalar)
    torch.testing.assert_close(curvature(v), differences(slope, v), rtol=1e-5, atol=1e-7)
    third = jacrev(jacrev(slope))(v)
    torch.testing.assert_close(third, differences(jacrev(slope), v), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("term", "v"),
    [
        (prox.PSDCone(), torch.diag(torch.tensor([2.0, 2.0, -1.0, -1.0], dtype=torch.float64))),
        (prox.NuclearNorm(1.0), torch.diag(torch.tensor([2.0, 2.0, 0.5, 0.5, 0.0], dtype=torch.float64))[:, :4]),
        (prox.NuclearNorm(1.0), torch.zeros(2, 3, dtype=torch.float64)),
    ],
)
def test_equal_eigenvalues_do_not_disturb_derivatives(term: Any, v: torch.Tensor) -> None:
    torch.testing.assert_close(jacrev(term.prox)(v), differences(term.prox, v), rtol=1e-6, atol=1e-8)
    weights = torch.randn(v.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    slope = jacrev(lambda v: (weights * term.prox(v)).sum())
    torch.testing.assert_close(jacrev(slope)(v), differences(slope, v), rtol=1e-5, atol=1e-6)


@every
def test_a_batch_is_a_loop(case: Case) -> None:
    singles = [draws(case, seed) for seed in range(5)]
    v = torch.stack([v for v, _ in singles])
    parameters = [torch.stack(each) for each in zip(*(parameters for _, parameters in singles), strict=True)]

    def everything(v: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        term = case.build(*parameters)
        x = term.prox(v, 0.5)
        manifold = term.manifold(x)
        y = manifold.retract(x + 0.01 * v)
        return x, y, manifold.value(y), term.value(x), term.margin(x, (x - v) / 0.5, 0.5)

    together = vmap(everything)(v, *parameters)
    for k, (one, own) in enumerate(singles):
        for found, expected in zip(together, everything(one, *own), strict=True):
            torch.testing.assert_close(found[k], expected, rtol=1e-10, atol=1e-12)
    shared = vmap(lambda v: everything(v, *singles[0][1]))(v)
    torch.testing.assert_close(shared[0][1], everything(singles[1][0], *singles[0][1])[0], rtol=1e-10, atol=1e-12)
    twice = vmap(vmap(everything))(v[None], *(each[None] for each in parameters))
    torch.testing.assert_close(twice[0][0], together[0], rtol=1e-10, atol=1e-12)
    slopes = vmap(jacrev(lambda *args: everything(*args)[0]))(v, *parameters)
    own = jacrev(lambda *args: everything(*args)[0])(singles[3][0], *singles[3][1])
    torch.testing.assert_close(slopes[3], own, rtol=1e-9, atol=1e-11)


@every
@pytest.mark.parametrize("seed", range(3))
def test_single_precision_agrees_with_double(case: Case, seed: int) -> None:
    v, parameters = draws(case, seed)
    found = case.build(*parameters).prox(v.float(), 0.5)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), case.build(*parameters).prox(v, 0.5), rtol=1e-4, atol=2e-6)


def test_zeros_bounds_and_ties_are_exact() -> None:
    v = torch.tensor([3.0, -2.9, 0.1, 2.95, -0.05, 1.0], dtype=torch.float32) / 3
    assert prox.L1(0.3).prox(v).tolist().count(0.0) == 2
    assert prox.Box(-0.1, 0.7).prox(v).unique().tolist().count(float(torch.tensor(0.7))) == 1
    level = prox.LInf(0.5).prox(v).abs()
    assert (level == level.max()).sum() == 3
    assert prox.TotalVariation1D(10.0).prox(v).unique().numel() == 1
    assert prox.Simplex().prox(v).tolist().count(0.0) == 4
    assert prox.GroupL2(1.1, groups=[[0], [1, 2], [5]]).prox(v).tolist()[:3] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("case", [case for case in CASES if case.is_set], ids=str)
def test_a_point_far_away_is_projected_as_well(case: Case) -> None:
    v, parameters = draws(case, 3)
    term = case.build(*parameters)
    x = term.prox(1e8 * v)
    torch.testing.assert_close(term.prox(x), x, rtol=1e-12, atol=1e-12 * (1 + float(x.abs().max())))


@pytest.mark.parametrize("n", [1, 2, 3, 40, 400])
@pytest.mark.parametrize("strength", [0.0, 0.05, 1.0, 30.0])
def test_total_variation_by_active_sets_and_by_the_taut_string(
    n: int, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bilevel.prox import _taut_string

    generator = torch.Generator().manual_seed(n)
    noise = torch.randn(3, n, generator=generator, dtype=torch.float64)
    for v in (noise, noise.cumsum(-1), noise.round(), torch.ones_like(noise)):
        term = prox.TotalVariation1D(strength)
        x = term.prox(v)
        with monkeypatch.context() as patch:
            patch.setattr(_taut_string, "_MAX_STEPS", 0)
            torch.testing.assert_close(term.prox(v), x, rtol=1e-10, atol=1e-10)
        dual = (x - v).cumsum(-1)
        assert dual[:, -1].abs().max() < 1e-10
        assert (dual[:, :-1].abs() <= strength + 1e-10).all()
        torch.testing.assert_close((dual[:, :-1] * x.diff(dim=-1)).sum(), term.value(x), rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@given(seed=SEEDS)
def test_transport_plans_of_any_size_have_their_marginals(scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    n, m = (int(torch.randint(1, 8, (), generator=generator)) for _ in range(2))
    row, column = (torch.rand(size, generator=generator, dtype=torch.float64) for size in (n, m))
    row = row * (torch.rand(n, generator=generator) > 0.3)
    row = row / row.sum() if row.sum() > 0 else torch.full_like(row, 1 / n)
    column = column / column.sum()
    v = (scale * torch.randn(n, m, generator=generator, dtype=torch.float64)).round(decimals=1)
    term = prox.TransportPolytope(row, column)
    x = term.prox(v)
    assert (x >= 0).all()
    assert (x[row == 0] == 0).all()
    torch.testing.assert_close(x.sum(1), row, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.sum(0), column, rtol=1e-12, atol=1e-12)
    # The plan minimises its linearisation, by another solver.
    cost = (x - v).reshape(-1).numpy()
    sums = np.concatenate([np.kron(np.eye(n), np.ones((1, m))), np.kron(np.ones((1, n)), np.eye(m))])
    best = linprog(cost, A_eq=sums, b_eq=np.concatenate([row, column]), method="highs")
    assert float(cost @ x.reshape(-1).numpy()) <= best.fun + 1e-6 * scale


def test_small_and_empty_unknowns() -> None:
    one = torch.tensor([2.0])
    for term in (prox.L1(0.5), prox.GroupL2(0.5), prox.LInf(0.5)):
        assert term.prox(one).tolist() == [1.5]
        assert float(term.manifold(one).value(one)) == 1.0
    assert prox.TotalVariation1D(0.5).prox(one).tolist() == [2.0]
    assert prox.Simplex().prox(one).tolist() == [1.0]
    assert prox.SecondOrderCone().prox(-one).tolist() == [0.0]
    assert prox.PSDCone().prox(-one[None]).tolist() == [[0.0]]
    assert prox.TransportPolytope(one, one).prox(one[None]).tolist() == [[2.0]]
    number = torch.tensor(2.0)
    for term in (prox.L1(0.5), prox.LInf(0.5), prox.Box(0.0, 1.5), prox.L1Ball(1.5), prox.L2Ball(1.5)):
        assert float(term.prox(number)) == 1.5
    nothing = torch.empty(0)
    for term in (
        prox.L1(0.5),
        prox.ElasticNet(0.5, 0.5),
        prox.LInf(0.5),
        prox.Box(0.0, 1.0),
        prox.L1Ball(1.0),
        prox.L2Ball(1.0),
    ):
        assert term.prox(nothing).shape == (0,)
        assert float(term.value(nothing)) == 0.0
        assert term.manifold(nothing).retract(nothing).shape == (0,)
        assert float(term.margin(nothing, nothing)) == 1.0


@every
def test_autocast_leaves_the_precision_alone(case: Case) -> None:
    v, parameters = draws(case, 2)
    term, v = case.build(*(parameter.float() for parameter in parameters)), v.float()

    def everything() -> tuple[torch.Tensor, ...]:
        x = term.prox(v)
        manifold = term.manifold(x)
        y = manifold.retract(x + 0.01 * v)
        return x, y, manifold.value(y), term.value(x), term.margin(x, x - v)

    plain = everything()
    with torch.autocast("cpu", torch.bfloat16):
        cast = everything()
    for found, expected in zip(cast, plain, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", [(2, 3), (5, 6), (20, 30)])
@pytest.mark.parametrize("scale", [1e4, 1e8, 1e10])
def test_a_transport_plan_far_from_its_matrix_solves_the_linear_program(sizes: tuple[int, int], scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    n, m = sizes
    of_rows, of_columns = torch.eye(n).repeat_interleave(m, 1), torch.eye(m).repeat(1, n)
    for turn in range(6):
        row, column = (torch.rand(size, generator=generator, dtype=torch.float64) + 0.1 for size in sizes)
        row[0] = row[0] * (turn != 4)
        row, column = (torch.ones_like(t) if turn % 3 == 0 else t for t in (row, column))
        row, column = row / row.sum(), column / column.sum()
        v = torch.randn(n, m, dtype=torch.float64, generator=generator)
        for dtype, rounding in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
            plan = prox.TransportPolytope(row.to(dtype), column.to(dtype)).prox((scale * v).to(dtype)).double()
            torch.testing.assert_close(plan.sum(1), row, rtol=rounding, atol=rounding)
            torch.testing.assert_close(plan.sum(0), column, rtol=rounding, atol=rounding)
            assert (plan >= 0).all()
            masses = torch.cat([row, column]).numpy()
            best = linprog(-v.reshape(-1).numpy(), A_eq=torch.cat([of_rows, of_columns]).numpy(), b_eq=masses)
            assert float((plan * v).sum()) == pytest.approx(-best.fun, abs=rounding + 2 / scale)
