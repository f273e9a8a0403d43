"""What holds for every linear solver because one place scales, measures and judges."""

from __future__ import annotations

import copy
import pickle

import pytest
import scipy.sparse.linalg
import torch

from bilevel import Status, Tolerance
from bilevel.errors import ArgumentError, DtypeError, ShapeError
from bilevel.linear._base import CallableLinearSolver, LinearSolver, as_linear_solver, solve_linear
from bilevel.linear._judge import within_rounding
from bilevel.linear._solution import LinearSolution
from bilevel.linear.bicgstab import BiCGStab
from bilevel.linear.cg import CG
from bilevel.linear.exact import Exact
from bilevel.linear.gmres import GMRES
from bilevel.linear.neumann import Neumann
from bilevel.linear.scipy_bridge import ScipyLinear
from bilevel.operators import DenseOperator, FunctionOperator, LinearOperator
from bilevel.reports import Basis

F64, F32 = torch.float64, torch.float32
SOLVERS: dict[str, LinearSolver] = {
    "cg": CG(),
    "cg, orthogonalised": CG(reorthogonalize=True),
    "gmres": GMRES(),
    "bicgstab": BiCGStab(),
    "neumann": Neumann(20),
    "exact": Exact(),
    "scipy": ScipyLinear(scipy.sparse.linalg.minres, {"maxiter": 50}),
}
every = pytest.mark.parametrize("name", SOLVERS)
TWO = torch.tensor([[[4.0, 1.0], [1.0, 3.0]]], dtype=F64)


class Fixed(LinearSolver):
    """Returns what it was made with."""

    def __init__(self, x: torch.Tensor, status: Status) -> None:
        self.x, self.status = x, status

    def solve(
        self, operator: LinearOperator, rhs: torch.Tensor, threshold: torch.Tensor, start: torch.Tensor | None = None
    ) -> LinearSolution:
        zero = torch.zeros(rhs.shape[0], dtype=torch.int64)
        return LinearSolution(self.x.expand_as(rhs), zero, torch.full_like(zero, self.status))


@every
@pytest.mark.parametrize(("batch", "n"), [(0, 3), (2, 0), (0, 0)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_nothing_to_solve_is_solved(name: str, batch: int, n: int, symmetric: bool) -> None:
    operator = DenseOperator(torch.zeros(batch, n, n, dtype=F64), symmetric=symmetric)
    found = solve_linear(SOLVERS[name], operator, torch.zeros(batch, n, dtype=F64), Tolerance().linear(F64))
    assert found.x.shape == (batch, n) and found.status.tolist() == [Status.CONVERGED] * batch


@every
@pytest.mark.parametrize("shape", [(2,), (3, 2), (1, 3), (1, 1, 2)])
def test_a_right_hand_side_of_another_shape_is_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"expected a right-hand side of shape \(1, 2\).*reshape it"):
        SOLVERS[name](DenseOperator(TWO, symmetric=True), torch.ones(shape, dtype=F64))


@every
@pytest.mark.parametrize("dtype", [F32, torch.int64])
def test_a_right_hand_side_of_another_dtype_is_refused(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(DtypeError, match=r"expected .* dtype, torch\.float64, got"):
        SOLVERS[name](DenseOperator(TWO, symmetric=True), torch.ones(1, 2, dtype=dtype))


@pytest.mark.parametrize("name", ["cg", "gmres", "bicgstab", "exact"])
def test_an_answer_beyond_the_largest_number_is_not_called_solved(name: str) -> None:
    operator = DenseOperator(torch.stack([1e-10 * torch.eye(2), torch.eye(2)]), symmetric=True)
    found = solve_linear(SOLVERS[name], operator, torch.full((2, 2), 1e30), Tolerance().linear(F32))
    assert found.status.tolist() == [Status.NOT_FINITE, Status.CONVERGED]


@every
def test_settings_are_copied_and_pickled(name: str) -> None:
    solver = SOLVERS[name]
    assert copy.deepcopy(solver) == solver
    assert pickle.loads(pickle.dumps(solver)) == solver


@pytest.mark.parametrize("status", [Status.CONVERGED, Status.NOT_CONVERGED, Status.MAX_STEPS, Status.BREAKDOWN])
def test_what_a_solver_believes_is_held_against_the_true_residual(status: Status) -> None:
    b = torch.tensor([[1.0, 2.0]], dtype=F64)
    right = torch.linalg.solve(TWO, b.unsqueeze(-1)).squeeze(-1) / 2.0  # solve_linear scales b to largest entry one
    target = Tolerance(delta_prime=1e-8).linear(F64)
    assert solve_linear(Fixed(right, status), DenseOperator(TWO), b, target).status.tolist() == [Status.CONVERGED]
    wrong = solve_linear(Fixed(right + 1e-3, status), DenseOperator(TWO), b, target)
    assert not Status(int(wrong.status[0])).success
    torch.testing.assert_close(wrong.residual, b - (TWO @ wrong.x.unsqueeze(-1)).squeeze(-1))


def test_a_proof_is_not_overruled_by_a_small_residual() -> None:
    b = torch.tensor([[1.0, 2.0]], dtype=F64)
    right = torch.linalg.solve(TWO, b.unsqueeze(-1)).squeeze(-1) / 2.0
    for status in (Status.INDEFINITE, Status.SINGULAR):
        found = solve_linear(Fixed(right, status), DenseOperator(TWO), b, Tolerance().linear(F64))
        assert found.status.tolist() == [status]


def test_a_bound_is_certified_where_the_curvature_is_known_and_absent_where_it_is_not() -> None:
    b, operator = torch.tensor([[1.0, 2.0]], dtype=F64), DenseOperator(TWO, symmetric=True)
    exact = torch.linalg.solve(TWO, b.unsqueeze(-1)).squeeze(-1)
    known = solve_linear(CG(1), operator, b, Tolerance(delta_prime=1e-9, strong_convexity=2.0).linear(F64))
    assert known.basis is Basis.CERTIFIED
    assert float((known.x - exact).norm()) <= float(known.error_bound[0])
    unknown = solve_linear(CG(1), operator, b, Tolerance(delta_prime=1e-9).linear(F64))
    assert unknown.basis is Basis.RESIDUAL and bool(torch.isnan(unknown.error_bound).all())


def test_the_absolute_accuracy_is_relative_for_small_right_hand_sides() -> None:
    target = Tolerance(delta_prime=1e-3).linear(F64)
    b = torch.tensor([[3.0, 4.0], [3e-6, 4e-6]], dtype=F64)
    found = solve_linear(CG(), DenseOperator(TWO.expand(2, 2, 2), symmetric=True), b, target)
    torch.testing.assert_close(found.threshold, torch.tensor([1e-3, 5e-9], dtype=F64))


def test_a_function_is_a_solver_and_other_things_are_not() -> None:
    solver = as_linear_solver(lambda operator, rhs: rhs / 2)
    assert isinstance(solver, CallableLinearSolver)
    assert as_linear_solver(solver) is solver
    for wrong, said in ((CG, r"write CG\(\.\.\.\)"), ("cg", r"for example bilevel\.CG\(\)")):
        with pytest.raises(ArgumentError, match=said):
            as_linear_solver(wrong)  # type: ignore[arg-type]
    b = torch.ones(1, 2, dtype=F64)
    found = solve_linear(solver, DenseOperator(2 * torch.eye(2, dtype=F64)), b, Tolerance().linear(F64))
    assert found.status.tolist() == [Status.CONVERGED]
    with pytest.raises(ShapeError, match="got NoneType"):
        as_linear_solver(lambda operator, rhs: None)(DenseOperator(TWO), b)


BUDGETS = [CG(1), CG(3), CG(3, reorthogonalize=True), BiCGStab(max_steps=2), Neumann(4, step=0.2)]


class Counting(DenseOperator):
    """Counts its products."""

    products = 0

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        self.products += 1
        return super().matvec(v)


@pytest.mark.parametrize("solver", BUDGETS, ids=repr)
def test_a_spent_budget_that_was_meant_is_not_verified_where_nobody_looks(solver: LinearSolver) -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(2, 12, 12, generator=generator, dtype=F64)
    operator = Counting(torch.eye(12, dtype=F64) + root @ root.mT / 12, symmetric=True)
    b, target = torch.randn(2, 12, generator=generator, dtype=F64), Tolerance(delta_prime=None).linear(F64)
    seen = solve_linear(solver, operator, b, target)
    products, operator.products = operator.products, 0
    unseen = solve_linear(solver, operator, b, target, seen=False)
    assert operator.products == products - 1
    assert torch.equal(unseen.x, seen.x)
    assert unseen.status.tolist() == seen.status.tolist() == [Status.BUDGET_SPENT] * 2
    assert bool(unseen.residual_norm.isnan().all() & seen.residual_norm.isfinite().all())
    for other in (Tolerance(), Tolerance(delta_prime=1e-3), Tolerance(delta_prime=None, strong_convexity=1.0)):
        measured = solve_linear(solver, operator, b, other.linear(F64), seen=False)
        assert bool(measured.residual_norm.isfinite().all()), "an accuracy, or a bound, rests on the residual"


@pytest.mark.parametrize("solver", [*BUDGETS, GMRES(max_steps=3)], ids=repr)
def test_what_is_not_finite_is_found_where_nobody_looks(solver: LinearSolver) -> None:
    matrix = torch.diag_embed(torch.linspace(1.0, 2.0, 12, dtype=F64)).repeat(3, 1, 1)
    matrix[1, 5, 5], matrix[2, 0, 0] = float("nan"), float("inf")
    found = solve_linear(
        solver, DenseOperator(matrix, symmetric=True), torch.ones(3, 12, dtype=F64),
        Tolerance(delta_prime=None).linear(F64), seen=False,
    )  # fmt: skip
    assert found.status[0] == Status.BUDGET_SPENT
    assert not any(Status(int(code)).success for code in found.status[1:])


def test_a_last_product_that_is_not_a_number_is_found_where_nobody_looks() -> None:
    products = 0

    def apply(v: torch.Tensor) -> torch.Tensor:
        nonlocal products
        products += 1
        return v * torch.linspace(1.0, 2.0, 12, dtype=F64) * (float("nan") if products == 3 else 1.0)

    b = torch.ones(1, 12, dtype=F64)
    target = Tolerance(delta_prime=None).linear(F64)
    found = solve_linear(CG(3), FunctionOperator(apply, b, symmetric=True), b, target, seen=False)
    assert products >= 3 and found.status.tolist() == [Status.NOT_FINITE]


@pytest.mark.parametrize("solver", [CG(), Exact()], ids=["CG", "Exact"])
@pytest.mark.parametrize("seed", range(6))
def test_no_delta_is_claimed_that_the_bound_contradicts(seed, solver):
    """In single precision, rounding hides more of the residual than a strict δ′ allows."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
    matrix = ((basis * torch.logspace(0, -3, 6, dtype=torch.float64)) @ basis.mT).float()
    rhs = 100 * torch.randn(1, 6, generator=generator)
    operator = DenseOperator((0.5 * (matrix + matrix.mT))[None], symmetric=True)
    ended = set()
    for delta in (1e4, 1e2, 1e-1, 1e-2, 1e-3, 1e-4):
        target = Tolerance(delta_prime=delta, strong_convexity=9e-4).linear(torch.float32)
        outcome = solve_linear(solver, operator, rhs, target)
        status = Status(int(outcome.status))
        ended.add(status)
        assert status in (Status.CONVERGED, Status.STAGNATED)
        assert status is Status.STAGNATED or float(outcome.error_bound) <= delta * (1 + 1e-5)
    assert ended == {Status.CONVERGED, Status.STAGNATED}


def test_products_for_the_floor_are_made_only_while_they_can_decide():
    products: list[int] = []

    def counted(v: torch.Tensor) -> torch.Tensor:
        products.append(1)
        return (TWO @ v.unsqueeze(-1)).squeeze(-1)

    rhs = torch.tensor([[1.0, 2.0]], dtype=F64)
    x = torch.linalg.solve(TWO, rhs)
    operator = FunctionOperator(counted, rhs, symmetric=True)
    everyone, eps = torch.ones(1, dtype=torch.bool), torch.finfo(F64).eps

    def decided(residual: float, asked: torch.Tensor = everyone) -> tuple[bool, int]:
        products.clear()
        found = within_rounding(operator, x, rhs, torch.tensor([residual], dtype=F64), asked)
        return bool(found), len(products)

    assert decided(0.0) == decided(eps) == (True, 0)
    # The norm of A (s∘x) is at least the least eigenvalue times that of x.
    least = float(torch.linalg.eigvalsh(TWO)[0, 0] * x.norm())
    assert decided(32 * eps * (float(rhs.norm()) + 0.99 * least)) == (True, 1)
    assert decided(1e-6) == (False, 5)
    assert decided(1e-6, ~everyone)[1] == 0, "nobody asks"
