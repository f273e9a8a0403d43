"""Proven error bounds of quadratic programs: never below the error, and not far above it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import bilevel
from bilevel._torch.definite import least_eigenvalue
from bilevel.quadratic_programs._program import Program
from bilevel.quadratic_programs._proof import _Proof
from bilevel.reports import Basis

from .programs import F64, Data, integer_program, random_program

Names = ("Q", "q", "A", "b", "G", "h", "lower", "upper")
SHAPES = [(3, 0, 4, False), (5, 2, 6, True), (12, 3, 10, True), (20, 0, 20, False)]


def exact(data: Data, active: torch.Tensor) -> np.ndarray:
    """Return x* (B, n) in extended precision: a KKT point with these active inequalities, whose conditions are checked here."""
    Q, q, A, b, G, h = (data[name].numpy() for name in Names[:6])
    B, n = q.shape
    C, d = G, h
    if "lower" in data:
        eye = np.broadcast_to(np.eye(n), (B, n, n))
        C, d = np.concatenate([G, -eye, eye], 1), np.concatenate([h, -data["lower"].numpy(), data["upper"].numpy()], 1)
    on = active.numpy()[:, : d.shape[1]].astype(float)
    J, side = np.concatenate([A, C * on[..., None]], 1), np.concatenate([b, d * on], 1)
    k = J.shape[1]
    off = np.concatenate([np.zeros_like(b), 1 - on], 1)
    K = np.zeros((B, n + k, n + k))
    K[:, :n, :n], K[:, n:, :n], K[:, :n, n:] = (Q + Q.transpose(0, 2, 1)) / 2, J, J.transpose(0, 2, 1)
    K[:, range(n, n + k), range(n, n + k)] = off
    right = np.concatenate([-q, side], 1).astype(np.longdouble)
    z = np.zeros_like(right)
    for _ in range(5):
        lack = right - np.einsum("bij,bj->bi", K.astype(np.longdouble), z)
        z = z + np.linalg.solve(K, lack.astype(float)[..., None])[..., 0]
    x, weights = z[:, :n], z[:, n + b.shape[1] :]
    assert (weights >= -1e-15).all() and (np.einsum("bij,bj->bi", C, x) <= d + 1e-13).all()
    return x


def programs(n: int, p: int, m: int, bounds: bool, count: int, dtype: torch.dtype) -> Data:
    data = random_program(n, p, m, count, bounds=bounds)
    return {name: value.to(dtype).to(F64) for name, value in data.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_bound_is_never_below_the_error_of_2000_programs(
    dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    ratios, proven = [], []
    for shape in SHAPES:
        data = programs(*shape, 500, dtype)
        found = bilevel.quadratic_program.solve(**{name: value.to(dtype) for name, value in data.items()})
        fine = bilevel.quadratic_program.solve(**data)
        reference = exact(data, torch.cat(list(fine.active), -1))
        error = np.linalg.norm(found.value.numpy().astype(np.longdouble) - reference, axis=-1)
        bound = found.report.error_bound.numpy()
        certified = found.report.certified.numpy()
        assert (bound >= error)[certified].all()
        proven.append(certified.mean())
        ratios.append((bound / np.maximum(error, 1e-300))[certified])
    spread = np.quantile(np.concatenate(ratios), [0.1, 0.5, 0.9])
    with capsys.disabled():
        print(f"\n{dtype}: {np.mean(proven):.3f} proven, bound/error at 10, 50, 90 %: {spread.round(1)}")
    assert np.mean(proven) > 0.97
    # In float64 the bound is that of rounding at its worst, and the error that of a polished point.
    assert spread[1] < (1e5 if dtype == torch.float64 else 1e3)


@pytest.mark.parametrize("spread", [1e-9, 1e-5, 1e-2])
def test_both_proofs_at_points_that_are_wrong_on_purpose(spread: float) -> None:
    torch.manual_seed(1)
    for shape in SHAPES:
        n = shape[0]
        data = programs(*shape, 300, F64)
        fine = bilevel.quadratic_program.solve(**data)
        active = torch.cat(list(fine.active), -1)
        reference = torch.as_tensor(exact(data, active).astype(float))
        given = {
            "lower": torch.full_like(data["q"], -torch.inf),
            "upper": torch.full_like(data["q"], torch.inf),
            **data,
        }
        program = Program.of([given[name] for name in Names], F64)
        point = torch.cat([fine.value, *fine.multipliers], -1)
        point = point + spread * torch.randn_like(point) * (torch.rand(len(point), 1, dtype=F64) < 0.8)
        proof = _Proof(program, point, active)
        error = (point[:, :n] - reference).norm(dim=-1)
        gap, tight = proof.by_gap().nan_to_num(torch.inf), proof.by_active_set().nan_to_num(torch.inf)
        assert bool((gap >= error).all()) and bool((tight >= error).all())
        if spread <= 1e-5:  # a point that is far off cannot always be moved inside
            assert torch.isfinite(gap).double().mean() > 0.9
            assert torch.isfinite(tight).double().mean() > 0.5


def test_both_proofs_by_hand() -> None:
    def proof(x: list[float], nu: list[float], low: list[float], A: list[list[float]], b: list[float]) -> _Proof:
        n, p = len(x), len(b)
        one = torch.ones(1, n, dtype=F64)
        sides = torch.tensor(A, dtype=F64).reshape(1, p, n), torch.tensor([b], dtype=F64)
        program = Program.of(
            [
                torch.eye(n, dtype=F64)[None],
                0 * one,
                *sides,
                one.new_zeros(1, 0, n),
                one.new_zeros(1, 0),
                0 * one,
                one / 0,
            ],
            F64,
        )
        marks = torch.tensor([[*(weight > 0 for weight in low), *[False] * n]])
        return _Proof(program, torch.tensor([[*x, *nu, *low, *[0.0] * n]], dtype=F64), marks)

    # ½x² with x ≥ 0 at x = 0.5 with λ = 0.5: r = 0, and the gap is 0.25.
    assert float(proof([0.5], [], [0.5], [], []).by_gap()) == pytest.approx(0.5, abs=1e-12)
    # ½x² with x = 1 at x = 1.1 with ν = −1.1: r = 0.
    bound = float(proof([1.1], [-1.1], [0.0], [[1.0]], [1.0]).by_active_set())
    assert bound == pytest.approx(0.2, abs=1e-12)
    # Outside, at x = −0.1: it is first moved inside.
    assert 0.1 <= float(proof([-0.1], [], [0.0], [], []).by_gap()) < 0.7


def test_degenerate_programs_are_proven_by_the_gap_or_not_at_all() -> None:
    for seed in range(60):
        data = integer_program(3, seed)
        data["Q"] = data["Q"] + torch.eye(3, dtype=F64)
        found = bilevel.quadratic_program.solve(**data, on_failure="ignore")
        if bool(found.report.certified):
            small = {name: value.float() for name, value in data.items()}
            rough = bilevel.quadratic_program.solve(**small, on_failure="ignore")
            apart = (rough.value.double() - found.value).norm()
            assert apart <= rough.report.error_bound.nan_to_num(torch.inf) + found.report.error_bound


def test_what_is_known_of_a_program_that_is_not_strictly_convex() -> None:
    q = torch.tensor([1.0, -1.0], dtype=F64)
    linear = bilevel.quadratic_program.solve(torch.zeros(2, 2, dtype=F64), q, lower=0.0, upper=1.0)
    assert linear.report.basis is Basis.ESTIMATED and not bool(linear.report.certified)
    assert linear.report.error_bound == 0
    assert "(estimated)" in str(linear.report)


def test_fixed_unknowns_and_infinite_rows_take_no_part() -> None:
    Q, q = torch.diag(torch.tensor([0.0, 2.0], dtype=F64)), torch.tensor([1.0, -2.0], dtype=F64)
    low, high = torch.tensor([0.3, -torch.inf], dtype=F64), torch.tensor([0.3, torch.inf], dtype=F64)
    G, h = torch.ones(2, 2, dtype=F64), torch.tensor([torch.inf, 0.5], dtype=F64)
    found = bilevel.quadratic_program.solve(Q, q, G=G, h=h, lower=low, upper=high)
    assert bool(found.report.certified)
    assert (found.value - torch.tensor([0.3, 0.2], dtype=F64)).norm() <= found.report.error_bound < 1e-13


def test_arguments_that_have_changed_prove_nothing() -> None:
    q = torch.tensor([1.0, -1.0], dtype=F64)
    found = bilevel.quadratic_program.solve(torch.eye(2, dtype=F64), q, lower=0.0)
    q += 1
    assert found.report.basis is Basis.RESIDUAL and not bool(found.report.certified)


def test_a_report_under_vmap_and_a_pickled_one() -> None:
    import pickle

    Q, q = torch.eye(2, dtype=F64), torch.randn(3, 2, dtype=F64)
    found = torch.func.vmap(lambda q: bilevel.quadratic_program.solve(Q, q, lower=0.0))(q)
    assert found.report.certified.shape == (3,) and bool(found.report.certified.all())
    again = pickle.loads(pickle.dumps(found.report))
    assert torch.equal(again.error_bound, found.report.error_bound)


@pytest.mark.parametrize("n", [1, 4, 30])
def test_the_bound_of_the_least_eigenvalue(n: int) -> None:
    torch.manual_seed(n)
    values = torch.rand(50, n, dtype=F64) * 10.0 ** torch.randint(-6, 1, (50, 1))
    basis = torch.linalg.qr(torch.randn(50, n, n, dtype=F64))[0]
    matrix = basis * values.unsqueeze(1) @ basis.mT
    matrix = 0.5 * (matrix + matrix.mT)
    found, least = least_eigenvalue(matrix), torch.linalg.eigvalsh(matrix)[:, 0]
    assert bool((found <= least).all())
    assert bool((found >= least - 1e-11 * values.amax(-1)).all())
    singular = torch.ones(1, n + 1, n + 1, dtype=F64)
    assert bool(least_eigenvalue(singular) <= 0)


@pytest.mark.parametrize("axes", [(), (3,), (2, 3)])
def test_bounds_have_the_shape_of_the_batch(axes: tuple[int, ...]) -> None:
    eye = torch.eye(2, dtype=torch.float64).expand(*axes, 2, 2)
    report = bilevel.quadratic_program.solve(eye, torch.ones(*axes, 2, dtype=torch.float64), lower=0.0).report
    assert report.error_bound.shape == report.certified.shape == report.residual_norm.shape == axes
