"""Null vectors found by products: alike in every solver and at every size, and no regular matrix is called singular."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, jacfwd, vmap

import bilevel
from bilevel import Status
from bilevel.layers.examinations import Examinations
from bilevel.linear._null_space import find_null_space, known_null_space, without_null_part
from bilevel.operators import DenseOperator, FunctionOperator, LinearOperator, RepeatedOperator

F64, F32 = torch.float64, torch.float32
dtypes = pytest.mark.parametrize("dtype", [F64, F32])
KRYLOV = [None, bilevel.CG(), bilevel.MINRES(), bilevel.GMRES(), bilevel.BiCGStab(), bilevel.LSMR()]
GENERAL = [None, bilevel.GMRES(), bilevel.BiCGStab(), bilevel.LSMR()]


def matrix(
    spectrum: torch.Tensor, *, symmetric: bool, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U, A = U diag(spectrum) Vᵀ and V, each (n, n)."""
    n, generator = len(spectrum), torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=F64))[0]
    # Near the first, so that Krylov methods need fewer than n steps.
    V = U if symmetric else torch.linalg.qr(U + 0.5 * torch.randn(n, n, generator=generator, dtype=F64) / n**0.5)[0]
    A = (U * spectrum) @ V.mT
    return U, 0.5 * (A + A.mT) if symmetric else A, V


def operator_of(A: torch.Tensor, *, symmetric: bool) -> DenseOperator:
    operator = DenseOperator(A.unsqueeze(0), symmetric=symmetric)
    operator.expect_definite = symmetric
    return operator


@dtypes
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("null", [1, 5])
def test_a_null_vector_is_found(symmetric: bool, null: int, dtype: torch.dtype) -> None:
    spectrum = torch.linspace(1.0, 0.1, 80, dtype=F64)
    spectrum[-null:] = 0.0
    _, A, V = matrix(spectrum, symmetric=symmetric)
    found = find_null_space(operator_of(A.to(dtype), symmetric=symmetric), 200)
    assert found.singular.tolist() == [True]
    u = found.vector[0].double()
    torch.testing.assert_close(u.norm(), torch.tensor(1.0, dtype=F64), atol=1e-6, rtol=0)
    assert (V[:, :-null].mT @ u).norm() < (1e-11 if dtype == F64 else 1e-3)


@settings(max_examples=60, deadline=None)
@given(
    digits=st.floats(0.0, 10.0), gap=st.booleans(), symmetric=st.booleans(), n=st.integers(1, 60), single=st.booleans(), seed=st.integers(0, 99)
)  # fmt: skip
def test_an_ill_conditioned_regular_matrix_is_never_called_singular(
    digits: float, gap: bool, symmetric: bool, n: int, single: bool, seed: int
) -> None:
    digits = min(digits, 4.0) if single else digits
    spectrum = torch.logspace(0.0, -digits, n, dtype=F64)
    if gap:  # one small singular value beside large ones
        spectrum[1:-1] = 0.7
    _, A, _ = matrix(spectrum, symmetric=symmetric, seed=seed)
    operator = operator_of(A.to(F32 if single else F64), symmetric=symmetric)
    assert find_null_space(operator, 4 * n + 50).singular.tolist() == [False]


def test_small_units_are_not_a_null_space() -> None:
    for diagonal, singular in (([1e-20, 1.0], False), ([1.0, 0.0], True), ([0.0, 0.0], True), ([3.0], False)):
        A = torch.diag(torch.tensor(diagonal, dtype=F64))
        assert find_null_space(operator_of(A, symmetric=True), 50).singular.tolist() == [singular]
    # A null vector of two entries of opposite signs, whose columns of A are the same.
    X = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    X = torch.cat([X, X[:, :1]], 1)
    assert find_null_space(operator_of(X.mT @ X, symmetric=True), 50).singular.tolist() == [True]


def test_an_indefinite_symmetric_matrix_is_searched_by_least_squares() -> None:
    spectrum = torch.linspace(-1.0, 1.0, 31, dtype=F64)  # with a zero in the middle
    operator = DenseOperator(matrix(spectrum, symmetric=True)[1].unsqueeze(0), symmetric=True)
    assert find_null_space(operator, 200).singular.tolist() == [True]
    regular = DenseOperator(matrix(spectrum + 0.01, symmetric=True)[1].unsqueeze(0), symmetric=True)
    assert find_null_space(regular, 200).singular.tolist() == [False]


def test_each_problem_of_a_batch_by_itself_and_once_for_many_right_hand_sides() -> None:
    spectra = torch.linspace(1.0, 0.3, 20, dtype=F64).repeat(3, 1)
    spectra[1, -2:] = 0.0
    made = [matrix(s, symmetric=False, seed=k) for k, s in enumerate(spectra)]
    operator = DenseOperator(torch.stack([A for _, A, _ in made]))
    repeated = RepeatedOperator(operator, 2)
    assert find_null_space(repeated, 100).singular.tolist() == [False, True, False]
    assert known_null_space(operator) is find_null_space(operator, 100)
    x = torch.ones(6, 20, dtype=F64)
    moved, changed = without_null_part(repeated, x, torch.ones(6, dtype=torch.bool), 100)
    assert changed.tolist() == [False, True, False] * 2
    null = made[1][2][:, -2:]
    torch.testing.assert_close(moved[1], x[1] - null @ (null.mT @ x[1]), atol=1e-12, rtol=0)
    assert torch.equal(moved[0], x[0])


@dtypes
@pytest.mark.parametrize("solver", KRYLOV)
@pytest.mark.parametrize("n", [40, 600])
def test_every_solver_says_that_a_shift_is_free(n: int, solver: object, dtype: torch.dtype) -> None:
    def cross_entropy(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.logsumexp(x, 0) - (t.softmax(0) * x).sum()

    def outcome(x: torch.Tensor) -> torch.Tensor:
        return (x.softmax(0) * torch.linspace(0, 1, n, dtype=dtype)).sum()

    layer = bilevel.argmin(cross_entropy, linear_solver=solver)
    t = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=F64).to(dtype)
    with bilevel.record() as reports:
        found = grad(lambda t: outcome(layer(torch.zeros(n, dtype=dtype), t)))(t)
    assert reports.backward[-1].status is Status.MINIMUM_NORM
    right = grad(outcome)(t)
    assert (found - right).norm() <= (1e-9 if dtype == F64 else 1e-3) * right.norm()


@pytest.mark.parametrize("solver", GENERAL)
@pytest.mark.parametrize("n", [40, 600])
@pytest.mark.parametrize("null", [0, 1, 3])
def test_every_solver_finds_the_minimum_norm_without_symmetry(n: int, null: int, solver: object) -> None:
    spectrum = torch.linspace(1.0, 0.3, n, dtype=F64)
    spectrum[n - null :] = 0.0
    U, A, V = matrix(spectrum, symmetric=False)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(n, generator=generator, dtype=F64) * (spectrum > 0)
    right = V @ torch.where(spectrum > 0, weights / spectrum, 0.0)
    layer = bilevel.linear_solve(lambda x, A: A @ x, linear_solver=solver)
    solution = layer.solve(U @ weights, A)
    assert solution.report.status is (Status.MINIMUM_NORM if null else Status.CONVERGED)
    assert (solution.value - right).norm() <= 1e-9 * right.norm()
    if null:
        with pytest.raises(bilevel.SolveError, match="outside the range of a matrix that is singular"):
            layer(U @ weights + 0.1 * U[:, -1], A)


def test_the_tangent_of_dependent_equations_is_the_smallest_at_every_size() -> None:
    # x is free in its mean, and the matrix has no symmetry: each equation has a weight of its own.
    n = 600
    weights, t = torch.linspace(0.5, 1.0, n, dtype=F64), torch.linspace(-1, 1, n, dtype=F64)
    layer = bilevel.root(lambda x, s: weights * (x - x.mean() - s * (t - t.mean())))
    tangent = jacfwd(lambda s: layer(torch.zeros(n, dtype=F64), s))(torch.tensor(2.0, dtype=F64))
    torch.testing.assert_close(tangent, t - t.mean(), atol=1e-9, rtol=0)


def least_squares(columns: int) -> tuple[Callable[..., torch.Tensor], torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(2 * columns, columns - 1, generator=generator, dtype=F64) / columns**0.5
    X = torch.cat([X, X[:, :1]], 1)
    layer = bilevel.argmin(lambda w, X, y: 0.5 * ((X @ w - y) ** 2).sum())
    y = torch.randn(2 * columns, generator=generator, dtype=F64)
    return lambda X, y: layer(torch.zeros(columns, dtype=F64), X, y), X, y


@pytest.mark.parametrize("columns", [12, 530])
def test_an_argument_that_changes_the_rank_is_refused_at_every_size(columns: int) -> None:
    solution, X, y = least_squares(columns)
    with pytest.raises(bilevel.SolveError, match="no derivative: an argument changes which directions"):
        grad(lambda X: (X @ solution(X, y)) @ y)(X)
    by_y = grad(lambda y: (X @ solution(X, y)) @ y)(y)
    right = 2 * X @ torch.linalg.lstsq(X, y.unsqueeze(-1), driver="gelsd")[0].squeeze(-1)
    torch.testing.assert_close(by_y, right, atol=1e-8, rtol=0)


@pytest.mark.parametrize("columns", [12, 530])
def test_a_transform_that_computes_an_argument_says_what_it_has_not_checked(columns: int) -> None:
    solution, X, y = least_squares(columns)
    with bilevel.record() as reports:
        grad(lambda s: (X @ solution(s * X, y)) @ y)(torch.tensor(1.0, dtype=F64))
    assert "derivative may not exist, which was not checked" in str(reports.backward[-1])
    with bilevel.record() as reports:  # of y it always does
        grad(lambda s: (X @ solution(X, s * y)) @ y)(torch.tensor(1.0, dtype=F64))
    assert reports.backward[-1].status is Status.MINIMUM_NORM
    assert "not checked" not in str(reports.backward[-1])


def counted(n: int) -> tuple[LinearOperator, list[int]]:
    products = [0]
    d = torch.linspace(1.0, 4.0, n, dtype=F64)

    def matvec(v: torch.Tensor) -> torch.Tensor:
        products[0] += 1
        return d * v

    return FunctionOperator(matvec, torch.zeros(1, n, dtype=F64), symmetric=True), products


def test_a_layer_of_regular_systems_pays_in_its_first_calls() -> None:
    operator = counted(700)[0]
    examinations = Examinations()
    due = [examinations.is_due(operator) for _ in range(1000)]
    assert sum(due) == 10 and due[:8] == [True, True, False, True, False, False, False, True]
    examinations.learn(operator, torch.tensor([int(Status.MINIMUM_NORM)]))
    assert all(examinations.is_due(operator) for _ in range(5))


def test_a_regular_matrix_costs_fewer_products_than_a_solve() -> None:
    operator, products = counted(700)
    operator.expect_definite = True
    bilevel.CG()(operator, torch.ones(1, 700, dtype=F64))
    solve, products[0] = products[0], 0
    find_null_space(operator, 2 * solve + 50)
    assert products[0] <= solve


def test_a_declared_strong_convexity_a_budget_and_a_factorisation_are_not_examined() -> None:
    calls = []
    layer = bilevel.argmin(
        lambda x, a: 0.5 * ((x - a) ** 2).sum(), linear_solver=bilevel.CG(max_steps=2), tolerance=bilevel.Tolerance(delta_prime=None)
    )  # fmt: skip
    layer.inspector.examinations.is_due = lambda *_: calls.append(1) or False  # type: ignore[method-assign,func-returns-value]
    grad(lambda a: layer(torch.zeros(3, dtype=F64), a).sum())(torch.ones(3, dtype=F64))
    known = bilevel.argmin(
        lambda x, a: 0.5 * ((x - a) ** 2).sum(), linear_solver=bilevel.CG(), tolerance=bilevel.Tolerance(strong_convexity=1.0)
    )  # fmt: skip
    factorised = bilevel.argmin(lambda x, a: 0.5 * ((x - a) ** 2).sum(), linear_solver=bilevel.Exact())
    for other in (known, factorised):
        other.inspector.examinations.is_due = layer.inspector.examinations.is_due  # type: ignore[method-assign]
        grad(lambda a, other=other: other(torch.zeros(3, dtype=F64), a).sum())(torch.ones(3, dtype=F64))
    assert not calls


def test_a_batch_under_vmap_with_one_singular_problem() -> None:
    layer = bilevel.linear_solve(lambda x, A: A @ x, symmetric=True, linear_solver=bilevel.MINRES())
    A = torch.stack([torch.eye(2, dtype=F64), torch.ones(2, 2, dtype=F64)])
    with bilevel.record() as reports:
        x = vmap(layer)(torch.ones(2, 2, dtype=F64), A)
    torch.testing.assert_close(x, torch.tensor([[1.0, 1.0], [0.5, 0.5]], dtype=F64))
    assert reports[-1].status == (Status.CONVERGED, Status.MINIMUM_NORM)
