"""Singular systems: the solution of smallest norm where the right-hand side is in the range, and a refusal where it is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import scipy.sparse.linalg
import torch
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import bilevel
from bilevel import Status, Tolerance
from bilevel._torch import factorisations
from bilevel.linear._base import as_linear_solver, solve_linear
from bilevel.linear._judge import eigenvalue_uncertainty
from bilevel.linear._solution import LinearOutcome
from bilevel.operators import DenseOperator, FunctionOperator, LinearOperator, RepeatedOperator

F64, F32 = torch.float64, torch.float32
SYMMETRIC = {
    "exact": bilevel.Exact(),
    "cg": bilevel.CG(),
    "cg, orthogonalised": bilevel.CG(reorthogonalize=True),
    "gmres": bilevel.GMRES(),
    "bicgstab": bilevel.BiCGStab(),
    "neumann": bilevel.Neumann(4000),
    "scipy cg": bilevel.ScipyLinear(scipy.sparse.linalg.cg),
    "a function": lambda operator, rhs: torch.linalg.lstsq(operator.dense(), rhs.unsqueeze(-1), driver="gelsd")[0].squeeze(-1),
}  # fmt: skip
symmetric = pytest.mark.parametrize("name", SYMMETRIC)
dtypes = pytest.mark.parametrize("dtype", [F64, F32])


def system(n: int, null: int, *, like_hessian: bool = True, consistent: bool = True) -> tuple[torch.Tensor, ...]:
    """Three matrices, the first and the last with a null space, right-hand sides, and the solutions of smallest norm."""
    generator = torch.Generator().manual_seed(n)
    U = torch.linalg.qr(torch.randn(3, n, n, generator=generator, dtype=F64))[0]
    V = U if like_hessian else torch.linalg.qr(torch.randn(3, n, n, generator=generator, dtype=F64))[0]
    spectrum = torch.linspace(1.0, 0.2, n, dtype=F64).repeat(3, 1)
    spectrum[::2, n - null :] = 0.0
    inverse = torch.where(spectrum > 0, 1 / spectrum, 0.0)
    b = torch.randn(3, n, generator=generator, dtype=F64)
    if consistent:
        b = torch.einsum("bij,bj,bkj,bk->bi", U, (spectrum > 0).double(), U, b)
    return (U * spectrum.unsqueeze(-2)) @ V.mT, b, torch.einsum("bij,bj,bkj,bk->bi", V, inverse, U, b)


def solve(solver: object, A: torch.Tensor, b: torch.Tensor, *, like_hessian: bool = True) -> LinearOutcome:
    operator = DenseOperator(0.5 * (A + A.mT) if like_hessian else A, symmetric=like_hessian)
    operator.expect_definite = like_hessian
    return solve_linear(as_linear_solver(solver), operator, b, Tolerance().linear(b.dtype))  # type: ignore[arg-type]


@symmetric
@dtypes
@pytest.mark.parametrize(("n", "null"), [(1, 1), (3, 1), (12, 6), (50, 1)])
def test_a_consistent_system_gets_the_solution_of_smallest_norm(
    name: str, dtype: torch.dtype, n: int, null: int
) -> None:
    A, b, x = (t.to(dtype) for t in system(n, null))
    found = solve(SYMMETRIC[name], A, b)
    assert all(Status(code).success for code in found.status.tolist())
    assert found.status[1] == Status.CONVERGED
    if name == "exact":
        assert found.status.tolist()[::2] == [Status.MINIMUM_NORM] * 2
    torch.testing.assert_close(found.x, x, atol=1e-10 if dtype == F64 else 2e-4, rtol=0)


@symmetric
@dtypes
@pytest.mark.parametrize(("n", "null"), [(3, 1), (12, 6), (50, 1)])
def test_an_inconsistent_system_is_refused_alike(name: str, dtype: torch.dtype, n: int, null: int) -> None:
    A, b, _ = (t.to(dtype) for t in system(n, null, consistent=False))
    found = solve(SYMMETRIC[name], A, b)
    assert found.status.tolist() == [Status.SINGULAR, Status.CONVERGED, Status.SINGULAR]


@dtypes
@pytest.mark.parametrize(("n", "null"), [(3, 1), (12, 6)])
def test_a_matrix_without_symmetry(dtype: torch.dtype, n: int, null: int) -> None:
    for consistent in (True, False):
        A, b, x = (t.to(dtype) for t in system(n, null, like_hessian=False, consistent=consistent))
        found = solve(bilevel.Exact(), A, b, like_hessian=False)
        singular = Status.MINIMUM_NORM if consistent else Status.SINGULAR
        assert found.status.tolist() == [singular, Status.CONVERGED, singular]
        if consistent:
            torch.testing.assert_close(found.x, x, atol=1e-10 if dtype == F64 else 2e-4, rtol=0)
            continue
        for solver in (bilevel.GMRES(), bilevel.BiCGStab(), bilevel.ScipyLinear(scipy.sparse.linalg.lsmr)):
            refused = solve(solver, A, b, like_hessian=False).status
            assert refused.tolist()[::2] == [Status.SINGULAR] * 2


def test_the_smallest_norm_is_that_of_the_unknowns_as_they_are() -> None:
    # The rank is decided after scaling; the norm is not that of the scaled unknowns.
    A, _, _ = system(6, 2)
    units = 2.0 ** torch.linspace(-12, 12, 6, dtype=F64).round()
    A = units[:, None] * A * units
    generator = torch.Generator().manual_seed(0)
    b = (A @ (torch.randn(3, 6, generator=generator, dtype=F64) / units).unsqueeze(-1)).squeeze(-1)
    found = solve(bilevel.Exact(), A, b)
    assert found.status.tolist() == [Status.MINIMUM_NORM, Status.CONVERGED, Status.MINIMUM_NORM]
    for k in (0, 2):
        null = torch.linalg.eigh((1 / units[:, None]) * A[k] * (1 / units))[1][:, :2] / units[:, None]
        Q = torch.linalg.qr(null)[0]
        assert (Q.mT @ found.x[k]).norm() < 1e-6 * found.x[k].norm()
        torch.testing.assert_close((A[k] @ found.x[k]) / units, b[k] / units, atol=1e-5, rtol=1e-5)


def test_many_right_hand_sides_of_a_singular_matrix() -> None:
    A, b, x = system(5, 2)
    operator = RepeatedOperator(DenseOperator(0.5 * (A + A.mT), symmetric=True), 2)
    found = solve_linear(bilevel.Exact(), operator, torch.cat([b, 3 * b]), Tolerance().linear(F64))
    torch.testing.assert_close(found.x, torch.cat([x, 3 * x]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("solver", [bilevel.CG(), bilevel.CG(preconditioner=lambda r: r / 2), bilevel.Exact()])
def test_a_null_space_that_rounding_leads_into_is_no_failure(solver: bilevel.CG) -> None:
    # As much accuracy as there is: the residual's part in the null space is all that is left of it.
    A, b, x = system(30, 10)
    operator = DenseOperator(0.5 * (A + A.mT), symmetric=True)
    found = solve_linear(solver, operator, b, Tolerance(delta_prime=None).linear(F64))
    assert all(Status(code).success for code in found.status.tolist())
    torch.testing.assert_close(found.x, x, atol=1e-12, rtol=0)


def test_the_tolerance_decides_what_is_consistent() -> None:
    A, b, _ = system(4, 1)
    null = torch.linalg.eigh(A)[1][..., 0]
    for solver in (bilevel.Exact(), bilevel.CG()):
        for off, status in ((1e-4, Status.SINGULAR), (1e-6, Status.CONVERGED)):
            operator = DenseOperator(0.5 * (A + A.mT), symmetric=True)
            found = solve_linear(solver, operator, b + off * null, Tolerance(delta_prime=1e-5).linear(F64))
            reached = Status.MINIMUM_NORM if isinstance(solver, bilevel.Exact) else Status.CONVERGED
            assert int(found.status[0]) == (status if status is Status.SINGULAR else reached)
    beyond = solve_linear(bilevel.Exact(), operator, b, Tolerance(delta_prime=1e-300).linear(F64))
    assert beyond.status.tolist() == [Status.STAGNATED] * 3  # which is the dtype's fault, not the right-hand side's


def test_a_singular_matrix_refutes_a_strong_convexity() -> None:
    A, b, _ = system(4, 1)
    operator = DenseOperator(0.5 * (A + A.mT), symmetric=True)
    found = solve_linear(bilevel.Exact(), operator, b, Tolerance(strong_convexity=0.1).linear(F64))
    assert found.status.tolist() == [Status.REFUTED, Status.CONVERGED, Status.REFUTED]
    assert found.error_bound.isnan().tolist() == [True, False, True]


@pytest.mark.parametrize("bend", [1e-3, 1e-9])
def test_a_saddle_beside_a_null_space_stays_indefinite(bend: float) -> None:
    A = torch.diag(torch.tensor([1.0, 2.0, 0.0, -bend], dtype=F64)).expand(3, 4, 4)
    b = torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=F64).expand(3, 4)
    for solver in (bilevel.Exact(), bilevel.CG()):
        assert solve(solver, A, b).status.tolist() == [Status.INDEFINITE] * 3
    # The remedy that is named.
    meant = solve(bilevel.Exact(indefinite=True), A, b)
    assert meant.status.tolist() == [Status.MINIMUM_NORM] * 3
    torch.testing.assert_close(meant.x[0], torch.tensor([1.0, 0.5, 0.0, -1 / bend], dtype=F64))


@dtypes
def test_a_negative_eigenvalue_within_the_accuracy_of_the_solution_is_zero(dtype: torch.dtype) -> None:
    A, b, x = system(12, 3)
    null = torch.linalg.eigh(A[0])[1][:, :3]
    wrong = torch.tensor([-0.9, 0.5, 0.7], dtype=F64) * eigenvalue_uncertainty(12, dtype)
    A[0] = A[0] + null @ torch.diag(wrong) @ null.mT
    for solver in (bilevel.Exact(), bilevel.CG()):
        found = solve(solver, A.to(dtype), b.to(dtype))
        assert all(Status(code).success for code in found.status.tolist())
        torch.testing.assert_close(found.x, x.to(dtype), atol=1e-9 if dtype == F64 else 2e-4, rtol=0)


# Problems whose solution is unique up to a symmetry.


def cross_entropy(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.logsumexp(x, 0) - (t.softmax(0) * x).sum()


def mean_class(x: torch.Tensor) -> torch.Tensor:
    return (x.softmax(0) * torch.linspace(0, 1, len(x), dtype=x.dtype)).sum()


def logits(n: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=F64).to(dtype)


@dtypes
@pytest.mark.parametrize("n", [3, 50, 512, 513, 600])
def test_softmax_with_a_free_shift(n: int, dtype: torch.dtype) -> None:
    layer, t = bilevel.argmin(cross_entropy), logits(n, dtype)
    with bilevel.record() as reports:
        found = grad(lambda t: mean_class(layer(torch.zeros(n, dtype=dtype), t)))(t)
    right = grad(mean_class)(t)
    assert (found - right).norm() <= (1e-8 if dtype == F64 else 1e-3) * right.norm()
    assert bool(reports.backward[-1].success.all())
    with pytest.raises(bilevel.SolveError, match=r"singular to working precision .* depends on a free direction"):
        grad(lambda t: layer(torch.zeros(n, dtype=dtype), t)[0])(t)


@pytest.mark.parametrize("solver", [None, bilevel.Exact(), bilevel.CG(), bilevel.GMRES(), bilevel.BiCGStab()])
def test_second_derivatives_and_forward_mode(solver: bilevel.CG | None) -> None:
    layer, t = bilevel.argmin(cross_entropy, linear_solver=solver), logits(4, F64)

    def outcome(t: torch.Tensor) -> torch.Tensor:
        return mean_class(layer(torch.zeros(4, dtype=F64), t))

    right = hessian(mean_class)(t)
    torch.testing.assert_close(jacfwd(outcome)(t), grad(mean_class)(t), atol=1e-8, rtol=0)
    for found in (jacrev(jacrev(outcome))(t), hessian(outcome)(t)):
        torch.testing.assert_close(found, right, atol=1e-8, rtol=0)


def test_units_do_not_hide_a_symmetry() -> None:
    units, t = torch.tensor([1e-4, 1.0, 1e4], dtype=F64), logits(3, F64)
    layer = bilevel.argmin(lambda x, t: cross_entropy(units * x, t))
    outcome = lambda t: mean_class(units * layer(torch.zeros(3, dtype=F64), t))
    with bilevel.record() as reports:
        torch.testing.assert_close(grad(outcome)(t), grad(mean_class)(t), atol=1e-9, rtol=0)
    assert reports.backward[0].status is Status.MINIMUM_NORM
    torch.testing.assert_close(hessian(outcome)(t), hessian(mean_class)(t), atol=1e-8, rtol=0)


def lennard_jones(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    atoms = x.reshape(-1, 3)
    i, j = torch.triu_indices(len(atoms), len(atoms), 1)
    s6 = (sigma**2 / ((atoms[i] - atoms[j]) ** 2).sum(-1)) ** 3
    return 4 * (s6**2 - s6).sum()


def bond(x: torch.Tensor) -> torch.Tensor:
    return (x[:3] - x[3:6]).norm()


def cluster(dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    tetrahedron = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    shifts = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
    return (0.4 * tetrahedron + 0.02 * shifts).reshape(-1).to(dtype)


@dtypes
@pytest.mark.parametrize("inner", [None, bilevel.LBFGS()])
def test_a_cluster_that_may_move_and_turn(dtype: torch.dtype, inner: bilevel.LBFGS | None) -> None:
    layer, start, sigma = bilevel.argmin(lennard_jones, solver=inner), cluster(dtype), torch.tensor(1.0, dtype=dtype)
    close = {"rtol": 1e-9 if dtype == F64 else 1e-4, "atol": 0.0}
    with bilevel.record() as reports:
        found = grad(lambda s: bond(layer(start, s)))(sigma)
    torch.testing.assert_close(found, torch.tensor(2 ** (1 / 6), dtype=dtype), **close)
    assert reports.backward[-1].status is Status.MINIMUM_NORM
    # (2^(1/6) σ)³ has the derivatives 3√2 σ², 6√2 σ and 6√2.
    cubed = lambda s: bond(layer(start, s)) ** 3
    torch.testing.assert_close(jacfwd(cubed)(sigma), torch.tensor(3 * 2**0.5, dtype=dtype), **close)
    torch.testing.assert_close(grad(grad(cubed))(sigma), torch.tensor(6 * 2**0.5, dtype=dtype), **close)
    torch.testing.assert_close(hessian(cubed)(sigma), torch.tensor(6 * 2**0.5, dtype=dtype), **close)
    with pytest.raises(bilevel.SolveError, match="pin one unknown, add a small ridge term such as"):
        grad(lambda s: layer(start, s)[0])(sigma)


@pytest.mark.parametrize(("scale", "dtype"), [(1e-3, F64), (1.0, F64), (1e3, F64), (1e-3, F32), (1.0, F32)])
def test_an_objective_that_does_not_depend_on_the_scale(scale: float, dtype: torch.dtype) -> None:
    # At zero, Rayleigh's quotient is not defined.
    generator = torch.Generator().manual_seed(3)
    S, w, start = (torch.randn(*shape, generator=generator, dtype=F64) for shape in ((4, 4), (4,), (4,)))
    layer = bilevel.argmin(lambda x, S: (x @ S @ x) / (x @ x))

    def found(S: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        x = layer(start, S + S.mT)
        return (x @ w.to(dtype)) ** 2 / (x @ x)

    right = grad(lambda S: (torch.linalg.eigh(S + S.mT)[1][:, 0] @ w) ** 2)(S)
    close = {"rtol": 1e-6 if dtype == F64 else 1e-2, "atol": 1e-6 if dtype == F64 else 1e-3}
    begun = (scale * start).to(dtype)
    torch.testing.assert_close(grad(found)(S.to(dtype), begun).double(), right, **close)
    torch.testing.assert_close(grad(found)(S.to(dtype), layer(begun, (S + S.mT).to(dtype))).double(), right, **close)


def test_a_batch_of_clusters_and_a_third_derivative() -> None:
    layer, sigma = bilevel.argmin(lennard_jones), torch.tensor([0.9, 1.0, 1.2], dtype=F64)
    starts = torch.stack([cluster(F64, seed) for seed in range(3)])
    bonds = lambda s: vmap(bond)(vmap(layer)(starts, s))
    for jacobian in (jacrev(bonds)(sigma), jacfwd(bonds)(sigma)):
        torch.testing.assert_close(jacobian, 2 ** (1 / 6) * torch.eye(3, dtype=F64), atol=1e-9, rtol=0)
    cubed = lambda s: bond(layer(starts[0], s)) ** 3
    third = grad(grad(grad(cubed)))(sigma[1])
    torch.testing.assert_close(third, torch.tensor(6 * 2**0.5, dtype=F64), atol=1e-6, rtol=0)


def test_the_remedies_of_a_refusal_work() -> None:
    start, sigma = cluster(F64), torch.tensor(1.0, dtype=F64)
    ridge = bilevel.argmin(lambda x, s: lennard_jones(x, s) + 1e-3 * ((x - start) ** 2).sum())
    assert bool(grad(lambda s: ridge(start, s)[0])(sigma).isfinite())
    # Pinned: the shift is gone, and the derivative is that of the differences.
    layer, t = bilevel.argmin(lambda x, t: cross_entropy(torch.cat([x.new_zeros(1), x]), t)), logits(4, F64)
    found = grad(lambda t: layer(torch.zeros(3, dtype=F64), t)[0])(t)
    torch.testing.assert_close(found, torch.tensor([-1.0, 1.0, 0.0, 0.0], dtype=F64), atol=1e-9, rtol=0)
    damped = bilevel.argmin(cross_entropy, linear_solver=bilevel.Damped(damping=1e-3))
    with pytest.warns(bilevel.BudgetWarning, match="backward solve by Damped CG"):
        biased = grad(lambda t: mean_class(damped(torch.zeros(4, dtype=F64), t)))(t)
    torch.testing.assert_close(biased, grad(mean_class)(t), atol=1e-2, rtol=0)


def test_an_orbit_that_is_curved_gets_the_smallest_tangent() -> None:
    # Newton's last matrix is regular, that of the solution is not: the one nearby answers for a direction of its own.
    for dtype, a in ((F32, 3.01), (F32, 3.1), (F64, 3.1), (F64, 2.9)):
        layer = bilevel.argmin(lambda x, a: (x[0] * x[1] - a) ** 2)
        at, start = torch.tensor(a, dtype=dtype), torch.tensor([3.0, 1.0], dtype=dtype)
        x, tangent = layer(start, at), jacfwd(lambda a: layer(start, a))(at)
        torch.testing.assert_close(tangent, x.flip(0) / (x @ x), atol=1e-5, rtol=1e-4)


@dtypes
def test_sinkhorn_potentials(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(3, 4, generator=generator, dtype=F64)
    a, b = torch.full((3,), 1 / 3, dtype=F64), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64)

    def plan(f: torch.Tensor, g: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
        return torch.exp((f[:, None] + g - C) / 0.2) * a.to(C)[:, None] * b.to(C)

    def dual(fg: tuple[torch.Tensor, torch.Tensor], C: torch.Tensor) -> torch.Tensor:
        f, g = fg
        return 0.2 * plan(f, g, C).sum() - f @ a.to(C) - g @ b.to(C)

    def unrolled(C: torch.Tensor) -> torch.Tensor:
        f = torch.zeros(3, dtype=F64)
        for _ in range(200):
            g = -0.2 * torch.logsumexp((f[:, None] - C) / 0.2 + a.log()[:, None], 0)
            f = -0.2 * torch.logsumexp((g - C) / 0.2 + b.log(), 1)
        return (plan(f, g, C) * C).sum()

    layer = bilevel.argmin(dual)
    zeros = torch.zeros(3, dtype=dtype), torch.zeros(4, dtype=dtype)
    found = grad(lambda C: (plan(*layer(zeros, C), C) * C).sum())(cost.to(dtype))
    torch.testing.assert_close(found.double(), grad(unrolled)(cost), atol=1e-9 if dtype == F64 else 1e-4, rtol=0)


def test_rank_deficient_least_squares() -> None:
    X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    X = torch.cat([X, X[:, :1] + X[:, 1:2]], 1)
    layer = bilevel.argmin(lambda w, y: 0.5 * ((X @ w - y) ** 2).sum())
    y, start = torch.linspace(-1, 1, 8, dtype=F64), torch.zeros(4, dtype=F64)
    torch.testing.assert_close(jacfwd(lambda y: layer(start, y))(y), torch.linalg.pinv(X), atol=1e-10, rtol=0)
    fitted = jacrev(lambda y: X @ layer(start, y))(y)
    torch.testing.assert_close(fitted, X @ torch.linalg.pinv(X), atol=1e-10, rtol=0)
    with pytest.raises(bilevel.SolveError, match="depends on a free direction"):
        jacrev(lambda y: layer(start, y))(y)


@pytest.mark.parametrize("n", [3, 50, 512, 513, 600])
def test_a_linear_solve_with_a_graph_laplacian(n: int) -> None:
    # x is free in its mean; on a complete graph, x = b / n where b has none.
    def laplacian(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return w * (n * x - x.sum())

    b, w = logits(n, F64), torch.tensor(1.0, dtype=F64)
    layer = bilevel.linear_solve(laplacian, symmetric=True)
    torch.testing.assert_close(layer(b - b.mean(), w), (b - b.mean()) / n, atol=1e-12, rtol=0)
    slope = grad(lambda w: layer(b - b.mean(), w) @ (b - b.mean()))(w)
    torch.testing.assert_close(slope, -((b - b.mean()) ** 2).sum() / n, atol=1e-10, rtol=0)
    with pytest.raises(bilevel.SolveError, match="outside the range of a matrix that is singular"):
        layer(b + 1.0, w)


def test_the_report_says_so() -> None:
    layer = bilevel.linear_solve(lambda x, A: A @ x, symmetric=True)
    A = torch.stack([torch.eye(2, dtype=F64), torch.ones(2, 2, dtype=F64)])
    b = torch.ones(2, 2, dtype=F64)
    for on_failure in ("raise", "warn", "nan"):
        careful = bilevel.linear_solve(lambda x, A: A @ x, symmetric=True, on_failure=on_failure)
        torch.testing.assert_close(vmap(careful)(b, A), torch.tensor([[1.0, 1.0], [0.5, 0.5]], dtype=F64))
    with bilevel.record() as reports:
        vmap(layer)(b, A)
    report = reports[-1]
    assert report.status == (Status.CONVERGED, Status.MINIMUM_NORM)
    assert report.converged.tolist() == report.success.tolist() == [True, True]
    assert "smallest Euclidean norm" in str(report) and "pin one unknown" in str(report)


# One problem's trouble stays its own.


def test_a_decomposition_that_fails_spoils_its_own_problem_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    A, b, x = system(4, 1)
    A[2] = torch.diag(torch.tensor([1.0, 0.0, -0.0625, 0.5], dtype=F64))  # the only one with a zero in its first row

    def failing(function: Callable[..., object]) -> Callable[..., object]:
        def decompose(matrix: torch.Tensor, **settings: object) -> object:
            if bool((matrix[..., 0, 1] == 0).any()) and not torch.equal(matrix, torch.eye(4, dtype=F64)):
                raise factorisations.LinAlgError("did not converge")
            return function(matrix, **settings)

        return decompose

    for name in ("eigh", "eigvalsh", "svd", "svdvals"):
        monkeypatch.setattr(torch.linalg, name, failing(getattr(torch.linalg, name)))
    for like_hessian in (True, False):
        found = solve(bilevel.Exact(), A, b, like_hessian=like_hessian)
        assert found.status.tolist()[:2] == [Status.MINIMUM_NORM, Status.CONVERGED]
        assert not Status(int(found.status[2])).success
        torch.testing.assert_close(found.x[:2], x[:2], atol=1e-12, rtol=0)


def test_a_function_that_raises_fails_as_a_solve() -> None:
    def direct(operator: LinearOperator, rhs: torch.Tensor) -> torch.Tensor:
        solved: torch.Tensor = torch.linalg.solve(operator.dense(), rhs)
        return solved

    layer = bilevel.linear_solve(lambda x, A: A @ x, symmetric=True, linear_solver=direct)
    singular, b = torch.diag(torch.tensor([1.0, 0.0], dtype=F64)), torch.ones(2, dtype=F64)
    with pytest.raises(bilevel.SolveError, match=r"solve by direct met a division by zero|outside the range"):
        layer(b, singular)
    torch.testing.assert_close(layer(b, torch.eye(2, dtype=F64)), b)


def test_a_matrix_that_has_no_transpose_is_refused_as_it_was() -> None:
    # Without products with the transpose nothing more can be found out.
    A = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=F64)
    operator = FunctionOperator(lambda v: v @ A.T, torch.zeros(1, 2, dtype=F64))
    b = torch.tensor([[1.0, 0.0]], dtype=F64)
    found = solve_linear(bilevel.BiCGStab(), operator, b, Tolerance().linear(F64))
    assert not Status(int(found.status[0])).success
