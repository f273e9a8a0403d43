"""What conjugate gradients promise by themselves: verdicts that are proofs, and problems that do not touch each other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bilevel import Status, Tolerance
from bilevel.linear._base import solve_linear
from bilevel.linear._solution import LinearOutcome
from bilevel.linear.cg import CG
from bilevel.operators import DenseOperator, FunctionOperator
from bilevel.tolerance import Target

F64, F32 = torch.float64, torch.float32
dtypes = pytest.mark.parametrize("dtype", [F64, F32])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_spectrum(spectrum: torch.Tensor, seed: int, dtype: torch.dtype = F64) -> torch.Tensor:
    n = len(spectrum)
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator(seed), dtype=F64))[0]
    A = Q @ torch.diag(spectrum.to(F64)) @ Q.mT
    return (0.5 * (A + A.mT)).to(dtype).unsqueeze(0)


def right(batch: int, n: int, seed: int, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.randn(batch, n, generator=generator(seed), dtype=F64).to(dtype)


def solve(solver: CG, A: torch.Tensor, b: torch.Tensor, **settings: float) -> LinearOutcome:
    return solve_linear(solver, DenseOperator(A, symmetric=True), b, Tolerance(**settings).linear(b.dtype))


def diagonal(entries: torch.Tensor) -> FunctionOperator:
    return FunctionOperator(lambda v: entries * v, torch.zeros_like(entries), symmetric=True)


@dtypes
def test_a_problem_that_has_ended_stands_still_while_its_neighbour_goes_on(dtype: torch.dtype) -> None:
    # Its residual, kept once more for each step of the neighbour, made what is orthogonalised grow until it overflowed.
    n = 600
    quick = torch.cat([torch.ones(n // 2), torch.full((n // 2,), 2.0)])
    operator = diagonal(torch.stack([quick, torch.logspace(0, -5, n)]).to(dtype))
    b = right(2, n, 1, dtype)
    found = solve_linear(CG(300, reorthogonalize=True), operator, b, Tolerance().linear(dtype))
    assert found.status.tolist() == [Status.CONVERGED, Status.BUDGET_SPENT]
    assert int(found.iterations[0]) == 2
    torch.testing.assert_close(found.x[0], b[0] / quick.to(dtype))


@dtypes
@pytest.mark.parametrize("keep", [None, True, False])
@pytest.mark.parametrize("kappa", [2.0, 1e2, 1e5])
def test_neighbours_change_nothing_to_the_last_bit(dtype: torch.dtype, keep: bool | None, kappa: float) -> None:
    n = 30
    own, b = with_spectrum(torch.logspace(0, -torch.tensor(kappa).log10().item(), n), 0, dtype), right(2, n, 5, dtype)
    neighbours = {
        "easy": torch.eye(n),
        "hard": with_spectrum(torch.logspace(0, -7, n), 9)[0],
        "negative": -torch.eye(n),
        "zero": torch.zeros(n, n),
        "NaN": torch.full((n, n), float("nan")),
    }
    first, *others = (
        solve(CG(reorthogonalize=keep), torch.cat([own, other.to(dtype).unsqueeze(0)]), b)
        for other in neighbours.values()
    )
    for other in others:
        assert torch.equal(other.x[0], first.x[0])
        assert other.status[0] == first.status[0]
        assert other.iterations[0] == first.iterations[0]


def test_each_problem_has_its_own_fresh_starts_from_the_true_residual() -> None:
    # Problem k has k + 2 eigenvalues and ends at that step. One disturbed product makes each need one fresh start: a
    # counter for all of them together gave up those that came after the eighth.
    count, n = 20, 21
    entries = torch.stack([1.0 + torch.arange(n, dtype=F64) % (k + 2) / (k + 2) for k in range(count)])
    products = 0

    def apply(v: torch.Tensor) -> torch.Tensor:
        nonlocal products
        products += 1
        return entries * v * (1.0 + 1e-4 * (products == 1))

    b = right(count, n, 2)
    found = solve_linear(CG(), FunctionOperator(apply, b, symmetric=True), b, Tolerance(delta_prime=1e-11).linear(F64))
    assert found.status.tolist() == [Status.CONVERGED] * count
    torch.testing.assert_close(found.x, b / entries, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n", [20_000, 2_000_000])
def test_many_unknowns_in_float32_do_not_pass_for_a_singular_matrix(n: int) -> None:
    # n·eps is 0.24 at two million: curvature a hundredth of the largest was called rounding.
    entries = torch.ones(1, n)
    entries[0, 0] = 1e-2
    b = torch.ones(1, n)
    b[0, 0] = 1e3
    found = solve_linear(CG(50, reorthogonalize=False), diagonal(entries), b, Tolerance().linear(F32))
    assert found.status.tolist() == [Status.CONVERGED]
    torch.testing.assert_close(found.x, b / entries, rtol=1e-3, atol=1e-3)


@dtypes
@pytest.mark.parametrize("n", [10, 60])
@pytest.mark.parametrize("null", [1, 4])
def test_rounding_is_no_proof_of_negative_curvature(dtype: torch.dtype, n: int, null: int) -> None:
    spectrum = torch.logspace(0, -2, n)
    spectrum[:null] = 0.0
    for seed in range(12):
        A, b = with_spectrum(spectrum, seed, dtype), right(1, n, seed, dtype)
        found = solve(CG(), A, b)
        assert Status(int(found.status[0])) in (Status.SINGULAR, Status.STAGNATED)
        assert int(found.iterations[0]) <= 3 * n


@dtypes
@pytest.mark.parametrize("least", [-0.5, -1e-2])
def test_negative_curvature_is_found_and_not_stepped_over(dtype: torch.dtype, least: float) -> None:
    n = 40
    spectrum = torch.logspace(0, -2, n)
    spectrum[0] = least
    for seed in range(5):
        A, b = with_spectrum(spectrum, seed, dtype), right(1, n, seed, dtype)
        found = solve(CG(), A, b)
        assert found.status.tolist() == [Status.INDEFINITE]
        # Up to there CG minimises ½xᵀAx − bᵀx; a step along negative curvature would be a step to the saddle.
        x = found.x[0].double()
        assert float(0.5 * x @ A[0].double() @ x - b[0].double() @ x) <= 0
        assert bool(torch.isfinite(x).all())


@pytest.mark.parametrize(
    ("matrix", "b", "status"),
    [
        ([[0.0, 1.0], [1.0, 0.0]], [1.0, 0.0], Status.INDEFINITE),  # pᵀAp = 0 and Ap ≠ 0
        ([[1.0, 1.0], [1.0, -1.0]], [1.0, 1.0 + 2.0**0.5], Status.INDEFINITE),  # the same, to rounding
        ([[-1.0, 0.0], [0.0, -2.0]], [1.0, 1.0], Status.INDEFINITE),
        ([[0.0, 0.0], [0.0, 0.0]], [1.0, 1.0], Status.SINGULAR),
        ([[1.0, 0.0], [0.0, 0.0]], [0.0, 1.0], Status.SINGULAR),
        ([[1.0, 0.0], [0.0, 0.0]], [1.0, 0.0], Status.CONVERGED),  # singular, and b is in its range
    ],
)
@dtypes
def test_what_a_first_direction_without_curvature_means(
    matrix: list[list[float]], b: list[float], status: Status, dtype: torch.dtype
) -> None:
    found = solve(CG(), torch.tensor([matrix], dtype=dtype), torch.tensor([b], dtype=dtype))
    assert found.status.tolist() == [status]
    assert float(found.x.abs().max()) <= 1.0 + 1e-6


@dtypes
def test_a_conjugate_direction_is_built_from_the_new_residual(dtype: torch.dtype) -> None:
    # In exact arithmetic n steps end it, whatever the spectrum; built from the old residual they do not.
    A, b = with_spectrum(torch.tensor([1.0, 2.0, 5.0, 7.0, 10.0]), 3, dtype), right(1, 5, 3, dtype)
    found = solve(CG(5), A, b, delta_prime=1e-10 if dtype == F64 else 1e-4)
    assert found.status.tolist() == [Status.CONVERGED]


def test_an_indefinite_preconditioner_is_never_called_success() -> None:
    A, b = with_spectrum(torch.logspace(0, -1, 8), 0), right(1, 8, 0)
    signs = torch.tensor([1.0, -1.0] * 4, dtype=F64)
    found = solve(CG(preconditioner=lambda r: signs * r), A, b)
    true = float((b - (A @ found.x.unsqueeze(-1)).squeeze(-1)).norm())
    assert (found.status.tolist() == [Status.CONVERGED]) == (true <= float(found.threshold[0]))
    assert bool(torch.isfinite(found.x).all())


def test_a_budget_is_spent_to_the_step() -> None:
    A, b = with_spectrum(torch.logspace(0, -6, 50), 0), right(1, 50, 0)
    products = 0

    def apply(v: torch.Tensor) -> torch.Tensor:
        nonlocal products
        products += 1
        return (A @ v.unsqueeze(-1)).squeeze(-1)

    operator = FunctionOperator(apply, b, symmetric=True)
    solution = CG(5).solve(operator, b, torch.zeros(1, dtype=F64))
    assert solution.iterations.tolist() == [5]
    assert products == 5


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("budget", [None, 5])
def test_an_unverified_solve_makes_one_product_less_and_has_its_residual(budget: int | None, count: int) -> None:
    A, b = with_spectrum(torch.logspace(0, -2, 20), 0), right(1, 20, 0).repeat(count, 1)
    products = 0

    def apply(v: torch.Tensor) -> torch.Tensor:
        nonlocal products
        products += 1
        return (A @ v.unsqueeze(-1)).squeeze(-1)

    operator, target = FunctionOperator(apply, b, symmetric=True), Target(relative=1e-3, asked=True)
    verified = solve_linear(CG(budget), operator, b, target)
    before, products = products, 0
    found = solve_linear(CG(budget), operator, b, target, verify=False)
    assert found.iterations.tolist() == [products] * count == [before - 1] * count
    assert found.status.tolist() == verified.status.tolist()
    torch.testing.assert_close(found.x, verified.x)
    torch.testing.assert_close(found.residual, b - (A @ found.x.unsqueeze(-1)).squeeze(-1))


def spread(
    seed: int, log_condition: float, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return matrices (4, 30, 30) with such a condition number, right-hand sides, and a μ just below their eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(4, 30, 30, generator=generator, dtype=torch.float64))[0]
    values = 10 ** (-log_condition * torch.rand(4, 30, generator=generator, dtype=torch.float64))
    values[:, 0], values[:, 1] = 10**-log_condition, 1.0
    matrix = ((q * values[:, None]) @ q.mT).to(dtype)
    matrix = 0.5 * (matrix + matrix.mT)
    mu = float(torch.linalg.eigvalsh(matrix.double())[:, 0].min()) * (1 - 1e-6)
    return matrix, torch.randn(4, 30, generator=generator, dtype=torch.float64).to(dtype), mu


@given(st.integers(0, 10_000), st.floats(0, 5), st.floats(-8, 0), st.booleans())
def test_the_quadrature_bound_holds_and_is_what_the_solve_stops_by(seed, log_condition, log_delta, double):
    dtype = torch.float64 if double else torch.float32
    matrix, rhs, mu = spread(seed, min(log_condition, 5 if double else 4), dtype)
    exact = torch.linalg.solve(matrix.double(), rhs.double().unsqueeze(-1)).squeeze(-1)
    # Not below the rounding of float32 residuals: there b − A x can be zero at an x that is further away, which the error bound says.
    delta = 10 ** max(log_delta, -8 if double else -6) * float(exact.norm(dim=1).mean())
    target = Target(absolute=mu * delta, asked=True, strong_convexity=mu)
    outcome = solve_linear(CG(), DenseOperator(matrix, symmetric=True), rhs, target)
    error = (outcome.x.double() - exact).norm(dim=1)
    # The reference's own error.
    floor = 1e-13 * 10**log_condition * exact.norm(dim=1)
    assert bool((error <= outcome.error_bound.double() + floor).all())
    assert not bool((outcome.status == Status.REFUTED).any())
    converged = outcome.status == Status.CONVERGED
    assert bool((error[converged] <= delta + floor[converged]).all())


def test_the_quadrature_bound_ends_a_solve_early():
    steps, saved, shares = 0, 0, []
    for seed in range(10):  # where one solve ends hangs on the last digits, which are the processor's
        matrix, rhs, mu = spread(seed, 4.0)
        exact = torch.linalg.solve(matrix, rhs.unsqueeze(-1)).squeeze(-1)
        operator = DenseOperator(matrix, symmetric=True)
        target = Target(absolute=mu * 1e-4 * float(exact.norm(dim=1).min()), asked=True, strong_convexity=mu)
        told = solve_linear(CG(), operator, rhs, target)
        untold = solve_linear(CG(), operator, rhs, replace(target, strong_convexity=None))
        assert bool((told.status == Status.CONVERGED).all())
        assert bool(((told.x - exact).norm(dim=1) <= told.error_bound).all())
        steps += int(told.iterations.sum())
        saved += int(untold.iterations.sum()) - int(told.iterations.sum())
        shares.append(told.error_bound / (told.residual_norm / mu))
        # By the residual alone one would have to go on.
        assert bool((told.residual_norm > told.threshold).any())
    assert saved > 0.01 * steps and float(torch.cat(shares).median()) < 0.5
    assert float(torch.cat(shares).max()) < 1.01


def test_a_preconditioned_solve_is_bounded_by_its_residual():
    matrix, rhs, mu = spread(1, 2.0)
    target = Target(absolute=mu * 1e-4, asked=True, strong_convexity=mu)
    outcome = solve_linear(CG(preconditioner=lambda r: 0.5 * r), DenseOperator(matrix, symmetric=True), rhs, target)
    torch.testing.assert_close(outcome.error_bound, outcome.residual_norm / mu, rtol=1e-3, atol=1e-10)


def test_a_mu_that_is_too_large_is_refuted_by_a_ritz_value():
    matrix, rhs, mu = spread(2, 3.0)
    operator = DenseOperator(matrix, symmetric=True)
    for factor, refuted in ((0.99, 0), (1.5, 4), (30.0, 4)):
        target = Target(absolute=1e-8, asked=True, strong_convexity=factor * mu)
        outcome = solve_linear(CG(), operator, rhs, target)
        assert int((outcome.status == Status.REFUTED).sum()) == refuted
        assert bool(torch.isnan(outcome.error_bound[outcome.status == Status.REFUTED]).all())
