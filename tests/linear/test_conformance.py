"""Every linear solver on every kind of system, beside a dense float64 solve."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from bilevel import Status, Tolerance
from bilevel.linear._base import CallableLinearSolver, LinearSolver, solve_linear
from bilevel.linear._solution import LinearOutcome
from bilevel.linear.bicgstab import BiCGStab
from bilevel.linear.cg import CG
from bilevel.linear.exact import Exact
from bilevel.linear.gmres import GMRES
from bilevel.linear.lsmr import LSMR
from bilevel.linear.minres import MINRES
from bilevel.linear.neumann import Neumann
from bilevel.linear.nystrom import Nystrom
from bilevel.linear.orthogonal import QR, SVD
from bilevel.linear.scipy_bridge import ScipyLinear
from bilevel.operators import DenseOperator, FunctionOperator, RepeatedOperator

F64, F32 = torch.float64, torch.float32
BATCHED: dict[str, LinearSolver] = {
    "cg": CG(),
    "cg, orthogonalised": CG(reorthogonalize=True),
    "lsmr": LSMR(),
    "qr": QR(),
    "svd": SVD(),
    "minres": MINRES(),
    "cg, by Nystrom": CG(preconditioner=Nystrom(4, 0.1)),
    "cg, preconditioned": CG(preconditioner=lambda r: r / torch.linspace(1, 2, r.shape[-1], dtype=r.dtype)),
    "neumann": Neumann(4000),
    "exact": Exact(),
    "gmres": GMRES(),
    "gmres, restarted": GMRES(restart=8, max_steps=3000),
    "bicgstab": BiCGStab(),
}
SOLVERS = {
    **BATCHED,
    "scipy cg": ScipyLinear(scipy.sparse.linalg.cg),
    "scipy gmres": ScipyLinear(scipy.sparse.linalg.gmres),
    "scipy minres": ScipyLinear(scipy.sparse.linalg.minres),
    "a function": CallableLinearSolver(lambda operator, rhs: torch.linalg.solve(operator.dense(), rhs)),
}
NEEDS_SYMMETRY = {
    "minres",
    "cg, by Nystrom",
    "cg",
    "cg, orthogonalised",
    "cg, preconditioned",
    "scipy cg",
    "scipy minres",
}
GENERAL = {name: solver for name, solver in SOLVERS.items() if name not in NEEDS_SYMMETRY}
solvers = pytest.mark.parametrize("name", SOLVERS)
batched = pytest.mark.parametrize("name", BATCHED)
dtypes = pytest.mark.parametrize("dtype", [F64, F32])


def spd(batch: int, n: int, kappa: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(batch, n, n, generator=generator, dtype=F64))[0]
    spectrum = torch.logspace(0, -torch.log10(torch.tensor(kappa)).item(), n, dtype=F64)
    return Q @ torch.diag_embed(spectrum.expand(batch, n)) @ Q.mT


def skewed(batch: int, n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, n, n, generator=generator, dtype=F64) / n**0.5
    return torch.eye(n, dtype=F64) - 0.6 * noise / torch.linalg.matrix_norm(noise, 2)[:, None, None]


def right(batch: int, n: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, n, generator=torch.Generator().manual_seed(seed), dtype=F64)


def solve(
    solver: LinearSolver, A: torch.Tensor, b: torch.Tensor, *, symmetric: bool = True, **settings
) -> LinearOutcome:
    target = Tolerance(**settings).linear(b.dtype)
    return solve_linear(solver, DenseOperator(A.to(b.dtype), symmetric=symmetric), b, target)


def error(x: torch.Tensor, A: torch.Tensor, b: torch.Tensor) -> float:
    exact = torch.linalg.solve(A, b.double().unsqueeze(-1)).squeeze(-1)
    return float(((x.double() - exact).norm(dim=-1) / exact.norm(dim=-1).clamp_min(1e-300)).max())


@solvers
@dtypes
@pytest.mark.parametrize(("batch", "n"), [(1, 1), (1, 12), (5, 12)])
def test_symmetric_positive_definite(name: str, dtype: torch.dtype, batch: int, n: int) -> None:
    A, b = spd(batch, n, 10.0), right(batch, n).to(dtype)
    found = solve(SOLVERS[name], A, b)
    assert set(found.status.tolist()) == {int(Status.CONVERGED)}
    assert error(found.x, A, b) < (1e-10 if dtype == F64 else 2e-4)
    assert found.x.dtype == dtype


@pytest.mark.parametrize("name", GENERAL)
@dtypes
@pytest.mark.parametrize("transposed", [False, True])
def test_not_symmetric(name: str, dtype: torch.dtype, transposed: bool) -> None:
    A, b = skewed(4, 15), right(4, 15).to(dtype)
    operator = DenseOperator(A.to(dtype))
    found = solve_linear(GENERAL[name], operator.T if transposed else operator, b, Tolerance().linear(dtype))
    assert set(found.status.tolist()) == {int(Status.CONVERGED)}
    assert error(found.x, A.mT if transposed else A, b) < (1e-10 if dtype == F64 else 2e-4)


@pytest.mark.parametrize(
    ("name", "kappa"),
    [
        ("qr", 1e6),
        ("svd", 1e6),
        ("minres", 1e6),
        ("lsmr", 1e4),
        ("cg", 1e6),
        ("cg, orthogonalised", 1e6),
        ("exact", 1e6),
        ("gmres", 1e6),
        ("bicgstab", 1e3),
    ],
)
def test_ill_conditioned_to_what_the_arithmetic_allows(name: str, kappa: float) -> None:
    A, b = spd(3, 30, kappa), right(3, 30)
    found = solve(SOLVERS[name], A, b)
    assert set(found.status.tolist()) == {int(Status.CONVERGED)}
    assert error(found.x, A, b) < 1e-5


@batched
def test_many_right_hand_sides_of_few_matrices(name: str) -> None:
    A, b = spd(3, 8, 10.0), right(12, 8)
    operator = RepeatedOperator(DenseOperator(A, symmetric=True), 4)
    found = solve_linear(SOLVERS[name], operator, b, Tolerance().linear(F64))
    assert error(found.x, A.repeat(4, 1, 1), b) < 1e-10


@solvers
@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1e30])
def test_tiny_and_huge_right_hand_sides_are_solved_alike(name: str, scale: float) -> None:
    A, b = spd(2, 6, 10.0), right(2, 6)
    # An absolute accuracy of 1e-6 is beyond float64 where the answer is 1e30.
    for settings in ({}, {"delta_prime": 1e-6}) if scale < 1 else ({},):
        one, scaled = solve(SOLVERS[name], A, b, **settings), solve(SOLVERS[name], A, scale * b, **settings)
        torch.testing.assert_close(scaled.x / scale, one.x, rtol=1e-5, atol=1e-5)
        assert bool((scaled.status == Status.CONVERGED).all())


@solvers
def test_zero_on_the_right_gives_zero(name: str) -> None:
    found = solve(SOLVERS[name], spd(3, 6, 10.0), torch.zeros(3, 6, dtype=F64))
    assert bool((found.x == 0).all()) and bool((found.status == Status.CONVERGED).all())


@solvers
def test_nan_on_the_right_spoils_its_own_problem_alone(name: str) -> None:
    A, b = spd(3, 6, 10.0), right(3, 6)
    b[1, 2] = float("nan")
    found = solve(SOLVERS[name], A, b)
    assert found.status.tolist() == [Status.CONVERGED, Status.NOT_FINITE, Status.CONVERGED]
    assert error(found.x[::2], A[::2], b[::2]) < 1e-10
    assert bool(torch.isnan(found.x[1]).all())


@batched
def test_nan_in_one_matrix_spoils_its_own_problem_alone(name: str) -> None:
    A, b = spd(3, 6, 10.0), right(3, 6)
    A[1, 2, 2] = float("nan")
    found = solve(SOLVERS[name], A, b)
    assert found.status.tolist()[::2] == [Status.CONVERGED] * 2
    assert not Status(int(found.status[1])).success
    assert error(found.x[::2], A[::2], b[::2]) < 1e-10


@solvers
@pytest.mark.parametrize("c", [1.0, 3.0, 1e-8, 1e8])
def test_multiples_of_the_identity(name: str, c: float) -> None:
    A, b = c * torch.eye(5, dtype=F64).expand(2, 5, 5), right(2, 5)
    found = solve(SOLVERS[name], A, b)
    if name == "cg, preconditioned":
        assert error(found.x, A, b) < 1e-10
    else:
        assert error(found.x, A, b) < 1e-12
    if name in ("cg", "gmres"):
        assert found.iterations.tolist() == [1, 1]


@batched
def test_a_batch_is_the_stack_of_its_members(name: str) -> None:
    A = torch.cat([spd(1, 10, kappa, seed) for seed, kappa in enumerate((1.5, 10.0, 100.0, 2.0))])
    b = right(4, 10)
    whole = solve(SOLVERS[name], A, b)
    for k in range(4):
        single = solve(SOLVERS[name], A[k : k + 1], b[k : k + 1])
        torch.testing.assert_close(whole.x[k], single.x[0], atol=1e-9, rtol=1e-9)
        assert int(whole.status[k]) == int(single.status[0])
        assert abs(int(whole.iterations[k]) - int(single.iterations[0])) <= 1


@pytest.mark.parametrize(
    ("name", "limited"),
    [
        ("cg", CG(6)),
        ("lsmr", LSMR(6)),
        ("minres", MINRES(6)),
        ("neumann", Neumann(40)),
        ("gmres", GMRES(6)),
        ("bicgstab", BiCGStab(4)),
    ],
)
def test_one_slow_problem_is_reported_alone(name: str, limited: LinearSolver) -> None:
    A = torch.cat([spd(2, 12, 1.2), spd(1, 12, 1e4), spd(2, 12, 1.2)])
    found = solve(limited, A, right(5, 12), delta_prime=1e-4)
    assert found.status.tolist() == [Status.CONVERGED] * 2 + [Status.MAX_STEPS] + [Status.CONVERGED] * 2
    unasked = solve(limited, A, right(5, 12))
    assert int(unasked.status[2]) == Status.BUDGET_SPENT


@pytest.mark.parametrize(
    "name", ["cg", "cg, orthogonalised", "exact", "gmres", "bicgstab", "lsmr", "qr", "svd", "minres"]
)
def test_a_singular_matrix_is_never_called_solved(name: str) -> None:
    A = spd(3, 6, 10.0)
    vector = torch.linalg.eigh(A[1])[1][:, 0]
    A[1] = A[1] - (vector @ A[1] @ vector) * torch.outer(vector, vector)
    b = right(3, 6)
    found = solve(SOLVERS[name], A, b)
    assert int(found.status[1]) in (
        Status.SINGULAR,
        Status.STAGNATED,
        Status.BREAKDOWN,
        Status.MAX_STEPS,
        Status.INDEFINITE,
    )
    if name == "exact":
        assert int(found.status[1]) == Status.SINGULAR
    assert found.status.tolist()[::2] == [Status.CONVERGED] * 2
    assert error(found.x[::2], A[::2], b[::2]) < 1e-10


def test_cg_takes_negative_curvature_for_the_proof_it_is() -> None:
    A = spd(3, 6, 10.0)
    A[1] = A[1] - 0.5 * torch.eye(6, dtype=F64)
    found = solve(CG(), A, right(3, 6))
    assert found.status.tolist() == [Status.CONVERGED, Status.INDEFINITE, Status.CONVERGED]
    assert bool(torch.isfinite(found.x).all())


def test_exact_solves_an_indefinite_matrix_and_says_so_where_a_minimum_is_expected() -> None:
    A, b = spd(2, 6, 10.0), right(2, 6)
    A[1] = A[1] - 0.5 * torch.eye(6, dtype=F64)
    operator = DenseOperator(A, symmetric=True)
    assert solve_linear(Exact(), operator, b, Tolerance().linear(F64)).status.tolist() == [0, 0]
    operator.expect_definite = True
    found = solve_linear(Exact(), operator, b, Tolerance().linear(F64))
    assert found.status.tolist() == [Status.CONVERGED, Status.INDEFINITE]
    assert error(found.x, A, b) < 1e-10
    operator.memo.clear()
    assert solve_linear(Exact(indefinite=True), operator, b, Tolerance().linear(F64)).status.tolist() == [0, 0]


def counting(A: torch.Tensor) -> tuple[FunctionOperator, list[int]]:
    products: list[int] = []

    def apply(v: torch.Tensor) -> torch.Tensor:
        products.append(1)
        return torch.einsum("bij,bj->bi", A, v)

    return FunctionOperator(apply, torch.zeros(A.shape[:2], dtype=A.dtype), symmetric=True), products


def test_cg_wastes_no_product() -> None:
    A = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=F64)).unsqueeze(0)
    operator, products = counting(A)
    found = solve_linear(CG(), operator, torch.ones(1, 3, dtype=F64), Tolerance().linear(F64))
    # One for each step, and one for the true residual at the end: none with a zero start.
    assert int(found.iterations[0]) == 3 and len(products) == 4


@pytest.mark.parametrize("name", ["cg", "gmres", "bicgstab", "neumann", "lsmr", "minres"])
def test_a_good_start_is_used_and_a_bad_one_is_not(name: str) -> None:
    A, b = spd(2, 10, 50.0), right(2, 10)
    exact = torch.linalg.solve(A, b.unsqueeze(-1)).squeeze(-1)
    operator, target = DenseOperator(A, symmetric=True), Tolerance().linear(F64)
    assert solve_linear(SOLVERS[name], operator, b, target, exact).iterations.tolist() == [0, 0]
    cold = solve_linear(SOLVERS[name], operator, b, target)
    for bad in (1e6 * torch.ones_like(b), torch.full_like(b, float("nan"))):
        found = solve_linear(SOLVERS[name], operator, b, target, bad)
        torch.testing.assert_close(found.iterations, cold.iterations)


def test_the_preconditioner_is_used() -> None:
    scales = torch.logspace(0, 6, 40, dtype=F64)
    A, b = torch.diag(scales).unsqueeze(0), right(1, 40)
    plain, helped = solve(CG(), A, b), solve(CG(preconditioner=lambda r: r / scales), A, b)
    assert int(plain.iterations[0]) > 2
    others = [method(preconditioner=lambda r: r / scales) for method in (GMRES, BiCGStab)]
    for found in (helped, *(solve(solver, A, b, symmetric=False) for solver in others)):
        assert int(found.iterations[0]) <= 2 and found.status.tolist() == [Status.CONVERGED]
        assert error(found.x, A, b) < 1e-10


def test_float32_cg_keeps_its_residuals_orthogonal() -> None:
    # A spectrum with a few far outliers, as a network's Hessian has: their directions come back through rounding.
    generator = torch.Generator().manual_seed(0)
    n = 20_000
    spectrum = torch.cat(
        [torch.logspace(0, 4, 12, dtype=F64), 1 + 0.01 * torch.rand(n - 12, generator=generator, dtype=F64)]
    )
    b = torch.randn(1, n, generator=generator, dtype=F64)

    def operator(dtype: torch.dtype) -> FunctionOperator:
        return FunctionOperator(lambda v: spectrum.to(dtype) * v, torch.zeros(1, n, dtype=dtype), symmetric=True)

    silent = Tolerance(delta_prime=None)
    exact = solve_linear(CG(20, reorthogonalize=True), operator(F64), b, silent.linear(F64)).x

    def wrong(keep: bool | None) -> float:
        x = solve_linear(CG(20, reorthogonalize=keep), operator(F32), b.float(), silent.linear(F32)).x
        return float((x.double() - exact).norm() / exact.norm())

    assert wrong(None) < 1e-5
    assert wrong(False) > 100 * wrong(None)


def test_a_tolerance_is_held_by_the_true_residual() -> None:
    A, b = spd(1, 60, 1e9), right(1, 60)
    found = solve(CG(5000), A, b, delta_prime=1e-13)
    true = float((b - (A @ found.x.unsqueeze(-1)).squeeze(-1)).norm())
    assert (int(found.status[0]) == Status.CONVERGED) == (true <= 1e-13)
    assert float(found.residual_norm[0]) == pytest.approx(true, rel=0.5)


def test_neumann_finds_divergence_and_its_step() -> None:
    A, b = spd(2, 6, 5.0), right(2, 6)
    assert solve(Neumann(200, step=5.0), A, b).status.tolist() == [Status.DIVERGED] * 2
    for scale in (1e-6, 1e6):
        assert bool((solve(Neumann(500), scale * A, b).status == Status.CONVERGED).all())
    spent = solve(Neumann(3), A, b)
    assert spent.status.tolist() == [Status.BUDGET_SPENT] * 2 and spent.iterations.tolist() == [4, 4]


def test_the_size_guard_speaks_before_77_terabytes_are_asked_for() -> None:
    n = 3_100_000
    operator = FunctionOperator(lambda v: v, torch.zeros(1, n, dtype=F64), symmetric=True)
    with pytest.raises(ValueError, match=r"take 7\.\d+e\+04 GiB; pass linear_solver=CG\(\)"):
        Exact().solve(operator, torch.ones(1, n, dtype=F64), torch.zeros(1, dtype=F64))


@pytest.mark.parametrize(
    "make",
    [
        lambda: CG(0), lambda: CG(2.5), lambda: CG(preconditioner=3), lambda: GMRES(restart=0), lambda: GMRES(preconditioner=1),
        lambda: BiCGStab(-1), lambda: BiCGStab(preconditioner=1), lambda: Neumann(-1), lambda: Neumann(3, step=-1.0),
        lambda: ScipyLinear("cg"),
    ],
)  # fmt: skip
def test_settings_are_checked(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="expected"):
        make()


@given(st.integers(0, 10_000), st.integers(1, 8), st.integers(1, 4), st.floats(0, 4), st.sampled_from(sorted(BATCHED)))
def test_linear_in_the_right_hand_side(seed: int, n: int, batch: int, digits: float, name: str) -> None:
    if name == "neumann":
        digits = min(digits, 1.0)
    A, b = spd(batch, n, 10**digits, seed), right(batch, n, seed + 1)
    c = right(batch, n, seed + 2)
    x, y, both = (solve(SOLVERS[name], A, v).x for v in (b, c, 2 * b - 3 * c))
    torch.testing.assert_close(both, 2 * x - 3 * y, atol=1e-6, rtol=1e-6)
