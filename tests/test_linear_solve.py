"""The linear layer: operators × solvers × transforms beside dense solves, structure, sharing, misuse and failures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import bilevel
from bilevel import Status

F64 = torch.float64


@dataclass(frozen=True)
class Operator:
    """A way to write a matrix that depends on θ (2,), with the matrix itself."""

    name: str
    size: int
    matvec: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    matrix: Callable[[torch.Tensor], torch.Tensor]
    symmetric: bool = False
    definite: bool = False


BASE = torch.tensor([[4.0, 1.0, 0.5], [-1.0, 3.0, 0.2], [0.3, -0.4, 5.0]], dtype=F64)
SPD = BASE @ BASE.mT
SIGNS = torch.diag(torch.tensor([1.0, -2.0, 3.0], dtype=F64))
SHIFT = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]], dtype=F64)


def shifted(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return t[0].exp() * x + 0.5 * t[1] * x.roll(-1) + 0.2 * t[1] ** 2 * x.roll(1)


def tangent(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return jvp(lambda u: torch.sin(t[1] * u) + BASE @ u, (torch.ones(3, dtype=F64),), (x,))[1]


OPERATORS = (
    Operator("one number", 1, lambda x, t: t[0].exp() * x, lambda t: t[0].exp().reshape(1, 1), True, True),
    Operator("a multiple of the identity", 3, lambda x, t: t[0].exp() * x, lambda t: t[0].exp() * torch.eye(3, dtype=F64), True, True),
    Operator("diagonal", 3, lambda x, t: torch.cat([t.exp(), t[:1] + 2]) * x, lambda t: torch.diag(torch.cat([t.exp(), t[:1] + 2])), True, True),
    Operator("positive definite", 3, lambda x, t: SPD @ x + t[0] ** 2 * x, lambda t: SPD + t[0] ** 2 * torch.eye(3, dtype=F64), True, True),
    Operator("symmetric, indefinite", 3, lambda x, t: SIGNS @ x * t[0].exp(), lambda t: SIGNS * t[0].exp(), True),
    Operator("general", 3, lambda x, t: (BASE * t[1]) @ x + t[0] * x, lambda t: BASE * t[1] + t[0] * torch.eye(3, dtype=F64)),
    Operator("triangular", 3, lambda x, t: torch.triu(BASE * t[1]) @ x, lambda t: torch.triu(BASE * t[1])),
    Operator("shifts, with no matrix", 3, shifted, lambda t: t[0].exp() * torch.eye(3, dtype=F64) + 0.5 * t[1] * SHIFT + 0.2 * t[1] ** 2 * SHIFT.mT),
    Operator("a Jacobian", 3, tangent, lambda t: t[1] * torch.cos(t[1]) * torch.eye(3, dtype=F64) + BASE),
)  # fmt: skip
SOLVERS = {
    "default": None,
    "Exact": bilevel.Exact(),
    "CG": bilevel.CG(),
    "GMRES": bilevel.GMRES(),
    "BiCGStab": bilevel.BiCGStab(),
    "a function": lambda operator, rhs: torch.linalg.solve(operator.dense(), rhs),
}
TRANSFORMS: dict[str, Callable[[Callable[..., torch.Tensor]], Callable[..., object]]] = {
    "value": lambda f: f,
    "vjp": lambda f: lambda b, t: vjp(f, b, t)[1](torch.linspace(1, 2, b.shape[0], dtype=F64)),
    "jvp": lambda f: lambda b, t: jvp(f, (b, t), (b.cos(), t.cos()))[1],
    "jacrev of θ": lambda f: jacrev(f, argnums=1),
    "jacfwd of b": lambda f: jacfwd(f, argnums=0),
    "hessian of θ": lambda f: hessian(lambda b, t: f(b, t).sin().sum(), argnums=1),
    "vmap of b": lambda f: lambda b, t: vmap(f, in_dims=(0, None))(torch.stack([b, 2 * b]), t),
    "vmap of θ": lambda f: lambda b, t: vmap(f, in_dims=(None, 0))(b, torch.stack([t, 0.9 * t])),
    "vmap of grad": lambda f: lambda b, t: vmap(grad(lambda t, b: f(b, t).sin().sum()), in_dims=(None, 0))(t, torch.stack([b, 2 * b])),
}  # fmt: skip


def cases() -> list[object]:
    return [
        pytest.param(operator, name, id=f"{operator.name}-{name}")
        for operator in OPERATORS
        for name in SOLVERS
        if name != "CG" or operator.definite
    ]


def dense(A: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return A⁻¹ b by the adjugate: torch 2.13's linalg.solve is wrong in vmap of jacfwd."""
    if len(b) == 1:
        return b / A[0]
    r, s, t = A
    adjugate = torch.stack([torch.linalg.cross(s, t), torch.linalg.cross(t, r), torch.linalg.cross(r, s)], -1)
    return (adjugate @ b) / (r * torch.linalg.cross(s, t)).sum()


@pytest.mark.parametrize(("operator", "solver"), cases())
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_grid(operator: Operator, solver: str, transform: str) -> None:
    b, t = torch.tensor([1.0, -2.0, 0.5], dtype=F64)[: operator.size], torch.tensor([0.3, 0.7], dtype=F64)
    layer = bilevel.linear_solve(operator.matvec, symmetric=operator.symmetric, linear_solver=SOLVERS[solver])
    found = TRANSFORMS[transform](lambda b, t: layer(b, t))(b, t)
    expected = TRANSFORMS[transform](lambda b, t: dense(operator.matrix(t), b))(b, t)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-8)


def test_gradcheck_of_both_orders() -> None:
    layer = bilevel.linear_solve(lambda x, A: A @ x)
    inputs = (torch.tensor([1.0, 2.0, 3.0], dtype=F64, requires_grad=True), BASE.clone().requires_grad_(True))
    assert gradcheck(layer, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(layer, inputs, check_fwd_over_rev=True)


def test_two_coupled_tensors_in_a_pytree() -> None:
    # Only the diagonal blocks kept would be 30 % wrong here.
    def matvec(x, A, coupling):
        u, v = x["u"].reshape(-1), x["v"]
        return {"u": (A @ u + coupling * v.sum()).reshape(2, 1), "v": 3 * v + coupling * u[0]}

    A = torch.tensor([[2.0, 0.5], [0.1, 1.5]], dtype=F64)
    coupling = torch.tensor(0.8, dtype=F64, requires_grad=True)
    rhs = {"u": torch.ones(2, 1, dtype=F64), "v": torch.arange(1.0, 3.0, dtype=F64)}
    x = bilevel.linear_solve(matvec)(rhs, A, coupling)
    zero, one = torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64)
    first = torch.stack([one, zero], 1)

    def whole(c):
        return torch.cat([
            torch.cat([A, c * torch.ones(2, 2, dtype=F64)], 1),
            torch.cat([c * first, 3 * torch.eye(2, dtype=F64)], 1),
        ])  # fmt: skip

    b = torch.cat([rhs["u"].reshape(-1), rhs["v"]])
    expected = torch.linalg.solve(whole(coupling.detach()), b)
    torch.testing.assert_close(torch.cat([x["u"].detach().reshape(-1), x["v"].detach()]), expected)
    (slope,) = torch.autograd.grad(x["u"].sum() + 2 * x["v"].sum(), coupling)
    weights = torch.tensor([1.0, 1.0, 2.0, 2.0], dtype=F64)
    torch.testing.assert_close(slope, grad(lambda c: weights @ torch.linalg.solve(whole(c), b))(coupling.detach()))


@pytest.mark.parametrize("shape", [(0,), (), (1,), (3, 0)])
def test_unusual_shapes(shape: tuple[int, ...]) -> None:
    b = torch.full(shape, 2.0, dtype=F64, requires_grad=True)
    x = bilevel.linear_solve(lambda x: 4 * x)(b)
    x.sum().backward()
    torch.testing.assert_close(x.detach(), torch.full(shape, 0.5, dtype=F64))
    torch.testing.assert_close(b.grad, torch.full(shape, 0.25, dtype=F64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes_and_large_systems(dtype: torch.dtype) -> None:
    n = 800
    d = torch.linspace(1, 3, n, dtype=dtype)
    b = torch.linspace(-1, 1, n, dtype=dtype, requires_grad=True)

    def laplacian(x: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        return d * x - 0.2 * x.roll(1) - 0.2 * x.roll(-1)

    A = torch.func.jacrev(lambda x: laplacian(x, d.double()))(torch.zeros(n, dtype=F64))
    for symmetric, used in ((True, "CG"), (False, "GMRES")):
        with bilevel.record() as reports:
            x = bilevel.linear_solve(laplacian, symmetric=symmetric)(b, d)
            (slope,) = torch.autograd.grad(x.sum(), b)
        assert [report.solver for report in reports] == [used, used]
        assert [report.direction for report in reports] == [bilevel.Pass.FORWARD, bilevel.Pass.BACKWARD]
        close = {"atol": 1e-9, "rtol": 1e-9} if dtype == F64 else {"atol": 2e-5, "rtol": 2e-5}
        torch.testing.assert_close(x.detach().double(), torch.linalg.solve(A, b.detach().double()), **close)
        torch.testing.assert_close(slope.double(), torch.linalg.solve(A.mT, torch.ones(n, dtype=F64)), **close)


def test_one_factorisation_serves_the_solution_its_derivatives_and_every_right_hand_side(monkeypatch) -> None:
    from bilevel.linear import exact

    made = []
    original = exact._factorize
    monkeypatch.setattr(exact, "_factorize", lambda *a: made.append(a) or original(*a))
    layer = bilevel.linear_solve(lambda x, A: A @ x, symmetric=True)
    A = SPD.clone().requires_grad_(True)
    x = vmap(layer, in_dims=(0, None))(torch.eye(3, dtype=F64), A)
    torch.testing.assert_close(x.detach(), torch.linalg.inv(SPD).mT)
    assert len(made) == 1 and made[0][0].shape == (1, 3, 3)
    x.sum().backward()
    assert len(made) == 1


def test_the_decorator_and_the_report() -> None:
    @bilevel.linear_solve(tolerance=bilevel.Tolerance(delta=1e-6, strong_convexity=2.0))
    def twice(x):
        """Double."""
        return 2 * x

    assert twice.__name__ == "twice" and twice.__doc__ == "Double." and "linear_solve" in repr(twice)
    solution = twice.solve(torch.ones(2, dtype=F64))
    assert solution.report.status is Status.CONVERGED and bool(solution.report.certified)
    batched = vmap(twice.solve)(torch.ones(5, 2, dtype=F64))
    assert batched.report.converged.shape == (5,)


def test_what_is_not_linear_or_not_symmetric_is_refused() -> None:
    b = torch.ones(2, dtype=F64)
    for wrong in (lambda x: x + 1, lambda x: x + x**2, lambda x: x.abs() + 2 * x, lambda x: x.clamp(max=0.3)):
        with pytest.raises(bilevel.ArgumentError, match=r"linear in its first argument, .*bilevel\.root"):
            bilevel.linear_solve(wrong)(b)
    with pytest.raises(bilevel.ArgumentError, match="leave symmetric=True out"):
        bilevel.linear_solve(lambda x: torch.stack([2 * x[0] + x[1], x[1]]), symmetric=True)(b)
    with pytest.raises(bilevel.ShapeError, match=r"expected matvec to return shape \(2,\)"):
        bilevel.linear_solve(lambda x: x[:1])(b)
    with pytest.raises(bilevel.DtypeError, match="expected rhs to be a floating-point or complex tensor"):
        bilevel.linear_solve(lambda x: x)(torch.ones(2, dtype=torch.int64))
    with pytest.raises(bilevel.ArgumentError, match="expected matvec to be a function"):
        bilevel.linear_solve(3)
    with pytest.raises(bilevel.ArgumentError, match="no graph leads there"):
        bilevel.linear_solve(lambda x: x.detach() * 2)(b)


@pytest.mark.parametrize("on_failure", ["raise", "warn", "nan", "ignore"])
def test_a_singular_matrix_under_every_policy(on_failure: str) -> None:
    A = torch.stack([SPD, SPD - torch.linalg.eigvalsh(SPD)[0] * torch.eye(3, dtype=F64), SPD])
    A[1] = torch.outer(A[1][0], A[1][0])
    layer = bilevel.linear_solve(lambda x, A: A @ x, symmetric=True, on_failure=on_failure)
    b = torch.ones(3, dtype=F64, requires_grad=True)

    def call() -> torch.Tensor:
        return vmap(layer, in_dims=(None, 0))(b, A)

    if on_failure == "raise":
        with pytest.raises(bilevel.SolveError, match="singular to working precision in 1 of 3 problems"):
            call()
    elif on_failure == "warn":
        with pytest.warns(bilevel.SolveWarning, match="number 1"):
            call()
    else:
        x = call()
        assert torch.isnan(x).any(-1).tolist()[::2] == [False, False]
        assert bool(torch.isnan(x[1]).all()) or on_failure == "ignore"
        torch.testing.assert_close(x[0].detach(), torch.linalg.solve(SPD, torch.ones(3, dtype=F64)))


def test_negative_curvature_is_found_by_cg_and_solved_by_others() -> None:
    b, t = torch.ones(3, dtype=F64), torch.tensor(1.0, dtype=F64)
    bent = lambda x, t: t * (SIGNS @ x)
    with pytest.raises(bilevel.SolveError, match="negative curvature"):
        bilevel.linear_solve(bent, symmetric=True, linear_solver=bilevel.CG())(b, t)
    x = bilevel.linear_solve(bent, symmetric=True)(b, t)
    torch.testing.assert_close(x, torch.linalg.solve(SIGNS, b))


def test_a_budget_is_no_failure_and_an_accuracy_not_reached_is_one() -> None:
    b = torch.ones(3, dtype=F64)
    with pytest.warns(bilevel.BudgetWarning):
        bilevel.linear_solve(lambda x: SPD @ x, symmetric=True, linear_solver=bilevel.CG(1))(b)
    asked = bilevel.Tolerance(delta=1e-8)
    with pytest.raises(bilevel.SolveError, match="ran out of iterations"):
        bilevel.linear_solve(lambda x: SPD @ x, symmetric=True, linear_solver=bilevel.CG(1), tolerance=asked)(b)
