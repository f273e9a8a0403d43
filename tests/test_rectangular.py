"""``linear_solve(unknown=...)``: rectangular systems beside pseudo-inverses, of full and of constant rank, and where the rank changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.func import hessian, jacfwd, jacrev, vmap

import bilevel
from bilevel import Status

F64, F32 = torch.float64, torch.float32
SOLVERS = {
    "default": None,
    "QR": bilevel.QR(),
    "SVD": bilevel.SVD(),
    "LSMR": bilevel.LSMR(),
    "MINRES": bilevel.MINRES(),
    "CG": bilevel.CG(),
    "Exact": bilevel.Exact(),
}
solvers = pytest.mark.parametrize("name", SOLVERS)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def layer(n: int, **settings: Any) -> Any:
    return bilevel.linear_solve(lambda x, A: A @ x, unknown=torch.zeros(n, dtype=F64), **settings)


def closed(b: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    return torch.linalg.pinv(A, rtol=1e-10) @ b


@solvers
@pytest.mark.parametrize(("m", "n"), [(6, 3), (3, 6), (4, 4), (5, 1), (1, 4)])
def test_full_rank_with_all_derivatives(name: str, m: int, n: int) -> None:
    A, b = randn(m, n), randn(m, seed=1)
    solve = layer(n, linear_solver=SOLVERS[name])
    torch.testing.assert_close(solve(b, A), closed(b, A), rtol=1e-8, atol=1e-9)
    for argnum in (0, 1):
        expected = jacrev(closed, argnums=argnum)(b, A)
        for mode in (jacrev, jacfwd):
            torch.testing.assert_close(mode(solve, argnums=argnum)(b, A), expected, rtol=1e-7, atol=1e-8)
    Ar, br = A.clone().requires_grad_(), b.clone().requires_grad_()
    weights = randn(n, seed=2)
    (weights @ solve(br, Ar)).backward()
    torch.testing.assert_close(
        Ar.grad, torch.einsum("i,ijk->jk", weights, jacrev(closed, argnums=1)(b, A)), rtol=1e-7, atol=1e-8
    )
    torch.testing.assert_close(br.grad, torch.linalg.pinv(A).mT @ weights, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(("m", "n"), [(5, 3), (3, 5)])
def test_second_derivatives(m: int, n: int) -> None:
    A, b = randn(m, n), randn(m, seed=1)
    solve = layer(n)
    found = hessian(lambda A: solve(b, A).sum())(A)
    torch.testing.assert_close(found, hessian(lambda A: closed(b, A).sum())(A), rtol=1e-7, atol=1e-7)
    inputs = (b.clone().requires_grad_(), A.clone().requires_grad_())
    assert gradcheck(solve, inputs) and gradgradcheck(solve, inputs)


@solvers
@pytest.mark.parametrize(("m", "n"), [(6, 4), (4, 6), (5, 5)])
def test_constant_rank_is_golub_and_pereyra_s_derivative(name: str, m: int, n: int) -> None:
    U, V, b = randn(m, 2), randn(2, n, seed=1), randn(m, seed=2)
    solve = bilevel.linear_solve(lambda x, U, V: U @ (V @ x), unknown=b.new_zeros(n), linear_solver=SOLVERS[name])

    def expected(b: torch.Tensor, U: torch.Tensor, V: torch.Tensor) -> torch.Tensor:  # full ranks have inverses
        return V.mT @ torch.linalg.solve(V @ V.mT, torch.linalg.solve(U.mT @ U, U.mT @ b))

    torch.testing.assert_close(solve(b, U, V), expected(b, U, V), rtol=1e-7, atol=1e-8)
    for argnum in (0, 1, 2):
        for mode in (jacrev, jacfwd):
            torch.testing.assert_close(
                mode(solve, argnums=argnum)(b, U, V), jacrev(expected, argnums=argnum)(b, U, V), rtol=1e-6, atol=1e-7
            )
    given = [t.clone().requires_grad_() for t in (U, V)]
    solve(b, *given).sum().backward()
    for argnum, tensor in enumerate(given, 1):
        torch.testing.assert_close(tensor.grad, jacrev(expected, argnums=argnum)(b, U, V).sum(0), rtol=1e-6, atol=1e-7)


def test_second_derivatives_at_constant_rank() -> None:
    U, V, b = randn(5, 2), randn(2, 4, seed=1), randn(5, seed=2)
    solve = bilevel.linear_solve(lambda x, U, V: U @ (V @ x), unknown=b.new_zeros(4))

    def expected(V: torch.Tensor) -> torch.Tensor:
        return (V.mT @ torch.linalg.solve(V @ V.mT, torch.linalg.solve(U.mT @ U, U.mT @ b))).sum()

    torch.testing.assert_close(hessian(lambda V: solve(b, U, V).sum())(V), hessian(expected)(V), rtol=1e-6, atol=1e-6)


def test_what_was_computed_outside_keeps_the_rank() -> None:
    U, V, b = randn(5, 2), randn(2, 4, seed=1), randn(5, seed=2)
    given = V.clone().requires_grad_()
    layer(4)(b, U @ given).sum().backward()

    def expected(V: torch.Tensor) -> torch.Tensor:
        return (V.mT @ torch.linalg.solve(V @ V.mT, torch.linalg.solve(U.mT @ U, U.mT @ b))).sum()

    torch.testing.assert_close(given.grad, jacrev(expected)(V), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["default", "SVD", "LSMR"])
def test_where_an_argument_changes_the_rank_there_is_no_derivative(name: str) -> None:
    A = randn(5, 2) @ randn(2, 4, seed=1)
    b = randn(5, seed=2)
    solve = layer(4, linear_solver=SOLVERS[name])
    torch.testing.assert_close(jacrev(solve)(b, A), torch.linalg.pinv(A, rtol=1e-10), rtol=1e-7, atol=1e-8)
    with pytest.raises(bilevel.SolveError, match="changes the rank"):
        jacrev(solve, argnums=1)(b, A)
    given = A.clone().requires_grad_()
    x = solve(b, given)
    torch.testing.assert_close(x.detach(), closed(b, A), rtol=1e-7, atol=1e-8)
    with pytest.raises(bilevel.SolveError, match=r"changes the rank.*append rows"):
        x.sum().backward()
    poisoned = layer(4, linear_solver=SOLVERS[name], on_failure="nan")(b, given)
    poisoned.sum().backward()
    assert given.grad is not None and bool(torch.isnan(given.grad).all())


def test_vmap_is_a_loop() -> None:
    A, b = randn(3, 5, 2), randn(3, 5, seed=1)
    solve = layer(2)
    torch.testing.assert_close(vmap(solve)(b, A), torch.stack([closed(y, B) for y, B in zip(b, A, strict=True)]))
    torch.testing.assert_close(vmap(solve, in_dims=(0, None))(b, A[0]), torch.stack([closed(y, A[0]) for y in b]))
    torch.testing.assert_close(vmap(jacrev(solve, argnums=1))(b, A)[1], jacrev(closed, argnums=1)(b[1], A[1]))
    wide = layer(5)
    B, c = A.mT.contiguous(), b[:, :2].contiguous()
    torch.testing.assert_close(vmap(jacrev(wide, argnums=1))(c, B)[2], jacrev(closed, argnums=1)(c[2], B[2]))


def test_a_batch_that_mixes_ranks() -> None:
    A = torch.stack([randn(5, 3), randn(5, 1) @ randn(1, 3, seed=4), randn(5, 3, seed=5)])
    b = randn(3, 5, seed=1)
    with bilevel.record() as reports:
        x = vmap(layer(3))(b, A)
    assert reports[0].status == (Status.CONVERGED, Status.MINIMUM_NORM, Status.CONVERGED)
    torch.testing.assert_close(x, torch.stack([closed(y, B) for y, B in zip(b, A, strict=True)]), rtol=1e-8, atol=1e-9)


@given(
    st.integers(0, 10_000), st.integers(1, 7), st.integers(1, 7), st.integers(1, 7), st.sampled_from(sorted(SOLVERS))
)
def test_any_rank_is_numpy_s_answer(seed: int, m: int, n: int, rank: int, name: str) -> None:
    A, b = randn(m, rank, seed=seed) @ randn(rank, n, seed=seed + 1), randn(m, seed=seed + 2)
    values = torch.linalg.svdvals(A)[: min(m, n, rank)]
    if float(values[-1]) < 1e-2 * float(values[0]):
        return
    torch.testing.assert_close(layer(n, linear_solver=SOLVERS[name])(b, A), closed(b, A), rtol=1e-6, atol=1e-7)


def test_an_ill_conditioned_matrix_keeps_its_digits() -> None:
    U, V = torch.linalg.qr(randn(20, 5))[0], torch.linalg.qr(randn(5, 5, seed=1))[0]
    A = U @ torch.diag(torch.logspace(0, -6, 5, dtype=F64)) @ V.mT
    x = randn(5, seed=2)
    found = layer(5)(A @ x, A)  # through AᵀA it would be wrong by 1e-4
    assert float((found - x).norm() / x.norm()) < 1e-9


def test_pytrees_on_both_sides() -> None:
    solve = bilevel.linear_solve(
        lambda x, A: {"fit": A @ x["w"] + x["c"], "ridge": 0.1 * x["w"]},
        unknown=lambda A: {"w": A.new_zeros(A.shape[1]), "c": A.new_zeros(())},
    )
    A, y = randn(6, 2), randn(6, seed=1)
    found = solve({"fit": y, "ridge": torch.zeros(2, dtype=F64)}, A)
    matrix = torch.cat(
        [torch.cat([torch.ones(6, 1, dtype=F64), A], 1), torch.tensor([[0.0, 0.1, 0], [0, 0, 0.1]], dtype=F64)]
    )
    expected = closed(torch.cat([y, torch.zeros(2, dtype=F64)]), matrix)
    torch.testing.assert_close(torch.cat([found["c"].reshape(1), found["w"]]), expected)


@pytest.mark.parametrize("mode", [jacrev, jacfwd])
def test_transforms_of_pytrees_and_of_complex_unknowns(mode: Any) -> None:
    A, y, s = randn(6, 3), randn(6, seed=1), torch.tensor(1.3, dtype=F64)
    tree = bilevel.linear_solve(
        lambda x, A: A[:, 1:] @ x["w"] + A[:, 0] * x["c"],
        unknown={"w": torch.zeros(2, dtype=F64), "c": torch.zeros((), dtype=F64)},
    )

    def by_tree(s: torch.Tensor) -> torch.Tensor:
        x = tree(y, A + s)
        return torch.cat([x["c"].reshape(1), x["w"]])

    torch.testing.assert_close(mode(by_tree)(s), mode(lambda s: closed(y, A + s))(s))
    C, z = torch.complex(A, randn(6, 3, seed=2)), torch.complex(y, randn(6, seed=3))
    solve = bilevel.linear_solve(lambda x, C: C @ x, unknown=lambda C: C.new_zeros(3))
    found, expected = (mode(lambda s, f=f: torch.view_as_real(f(s * z, C + s)))(s) for f in (solve, closed))
    torch.testing.assert_close(found, expected)


def test_float32() -> None:
    A, b = randn(6, 3).float(), randn(6, seed=1).float()
    solve = bilevel.linear_solve(lambda x, A: A @ x, unknown=torch.zeros(3))
    x = solve(b, A)
    assert x.dtype == F32
    torch.testing.assert_close(x.double(), closed(b.double(), A.double()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: layer(3, symmetric=True), "got both"),
        (lambda: layer(3)(randn(6), randn(5, 3)), "rhs, of shapes"),
        (lambda: layer(4)(randn(6), randn(6, 3)), "fit together"),
        (lambda: bilevel.linear_solve(lambda x: x[:2] + 1, unknown=randn(3))(randn(2)), "linear in its first argument"),
        (lambda: bilevel.linear_solve(lambda x: x[:2] ** 2, unknown=randn(3))(randn(2)), "linear in its first argument"),
        (lambda: bilevel.linear_solve(lambda x: x[:2], unknown=torch.arange(3))(randn(2)), "unknown to be a floating"),
        (lambda: bilevel.QR(max_bytes=8).solve(*operands()), "at most"),
        (lambda: bilevel.LSMR(0), "expected max_steps"),
        (lambda: bilevel.MINRES(-1), "expected max_steps"),
        (lambda: bilevel.linear_solve(lambda x, A: A @ x, linear_solver=bilevel.MINRES())(randn(3), randn(3, 3)), "expected a symmetric"),
    ],
)  # fmt: skip
def test_mistakes_are_named(make: Any, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        make()


def operands() -> Any:
    return bilevel.operators.DenseOperator(torch.eye(3)), torch.ones(1, 3), torch.zeros(1)
