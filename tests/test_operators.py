"""Every linear operator against its dense matrices: products, transposes, blocks of vectors, flags, misuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.func import hessian as dense_hessian
from torch.func import jacrev, vmap

import bilevel
from bilevel.operators import (
    DampedOperator,
    DenseOperator,
    FunctionOperator,
    LinearOperator,
    RepeatedOperator,
    ScaledOperator,
    SumOperator,
    TransposedOperator,
    gauss_newton,
    hessian,
    jacobian,
)

BATCH, N, M = 3, 4, 6


def matrices(dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(BATCH, N, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def points(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(BATCH, N, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)


def value(x: torch.Tensor) -> torch.Tensor:
    """One problem's objective."""
    return (x.cosh() * torch.arange(1, N + 1, dtype=x.dtype)).sum() + (x[0] * x[1:]).sum() ** 2


def equations(x: torch.Tensor) -> torch.Tensor:
    """One problem's residual, with a Jacobian that is not symmetric."""
    return torch.sin(x) * x.roll(1) + torch.arange(N, dtype=x.dtype) * x**2


def outputs(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x.sin(), x[:2] * x[2:]])


def loss(z: torch.Tensor) -> torch.Tensor:
    return torch.logsumexp(z, -1) + 0.5 * (z**2).sum(-1)


def made_dense(dtype: torch.dtype) -> tuple[LinearOperator, torch.Tensor]:
    return DenseOperator(matrices(dtype)), matrices(dtype)


def made_function(dtype: torch.dtype) -> tuple[LinearOperator, torch.Tensor]:
    A = matrices(dtype)
    forward = lambda v: torch.einsum("bij,bj->bi", A, v)
    backward = lambda v: torch.einsum("bij,bi->bj", A, v)
    return FunctionOperator(forward, points(dtype), backward), A


def made_hessian(dtype: torch.dtype) -> tuple[LinearOperator, torch.Tensor]:
    x = points(dtype)
    return hessian(vmap(value), x), vmap(dense_hessian(value))(x)


def made_jacobian(dtype: torch.dtype) -> tuple[LinearOperator, torch.Tensor]:
    x = points(dtype)
    return jacobian(vmap(equations), x), vmap(jacrev(equations))(x)


def made_gauss_newton(dtype: torch.dtype) -> tuple[LinearOperator, torch.Tensor]:
    x = points(dtype)
    J = vmap(jacrev(outputs))(x)
    return gauss_newton(vmap(outputs), loss, x), J.mT @ vmap(dense_hessian(loss))(vmap(outputs)(x)) @ J


def made_transposed(dtype: torch.dtype) -> tuple[LinearOperator, torch.Tensor]:
    return TransposedOperator(made_jacobian(dtype)[0]), made_jacobian(dtype)[1].mT


def made_damped(dtype: torch.dtype) -> tuple[LinearOperator, torch.Tensor]:
    A = made_jacobian(dtype)
    return DampedOperator(A[0], 0.7), A[1] + 0.7 * torch.eye(N, dtype=dtype)


def made_damped_each(dtype: torch.dtype) -> tuple[LinearOperator, torch.Tensor]:
    A, damping = made_hessian(dtype), torch.tensor([0.1, 2.0, 3.0], dtype=dtype)
    return DampedOperator(A[0], damping), A[1] + damping[:, None, None] * torch.eye(N, dtype=dtype)


def made_scaled(dtype: torch.dtype) -> tuple[LinearOperator, torch.Tensor]:
    A = made_jacobian(dtype)
    return ScaledOperator(A[0], -1.5), -1.5 * A[1]


def made_sum(dtype: torch.dtype) -> tuple[LinearOperator, torch.Tensor]:
    a, b, c = made_jacobian(dtype), made_hessian(dtype), made_dense(dtype)
    return SumOperator([a[0], b[0], c[0]]), a[1] + b[1] + c[1]


def made_repeated(dtype: torch.dtype) -> tuple[LinearOperator, torch.Tensor]:
    A = made_jacobian(dtype)
    return RepeatedOperator(A[0], 2), A[1].repeat(2, 1, 1)


def made_nested(dtype: torch.dtype) -> tuple[LinearOperator, torch.Tensor]:
    a, b = made_hessian(dtype), made_jacobian(dtype)
    operator = RepeatedOperator((a[0] * 2.0 + DampedOperator(b[0].T, 0.5)).T, 3)
    A = (2.0 * a[1] + b[1].mT + 0.5 * torch.eye(N, dtype=dtype)).mT
    return operator, A.repeat(3, 1, 1)


MAKERS: dict[str, Callable[[torch.dtype], tuple[LinearOperator, torch.Tensor]]] = {
    name.removeprefix("made_"): maker for name, maker in sorted(globals().items()) if name.startswith("made_")
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", MAKERS)
def test_products_equal_those_of_the_matrices(name: str, dtype: torch.dtype) -> None:
    operator, A = MAKERS[name](dtype)
    close = {"rtol": 1e-11, "atol": 1e-12} if dtype is torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    assert operator.shape == A.shape and operator.dtype == A.dtype == dtype
    assert operator.device == torch.device("cpu")
    vs = torch.randn(2, operator.batch, N, dtype=dtype)
    v = vs[0]
    torch.testing.assert_close(operator.dense(), A, **close)
    for times in (operator, operator.T.T):
        torch.testing.assert_close(times.matvec(v), torch.einsum("bij,bj->bi", A, v), **close)
        torch.testing.assert_close(times @ v, torch.einsum("bij,bj->bi", A, v), **close)
        torch.testing.assert_close(times.rmatvec(v), torch.einsum("bij,bi->bj", A, v), **close)
        torch.testing.assert_close(times.matmat(vs), torch.einsum("bij,kbj->kbi", A, vs), **close)
        torch.testing.assert_close(times.rmatmat(vs), torch.einsum("bij,kbi->kbj", A, vs), **close)
    torch.testing.assert_close(operator.T.dense(), A.mT, **close)
    torch.testing.assert_close(operator.T.matvec(v), torch.einsum("bij,bi->bj", A, v), **close)
    assert operator.symmetric <= bool(torch.allclose(A, A.mT, rtol=1e-4, atol=1e-5))
    if operator.symmetric:
        assert operator.T is operator
    if operator.positive_definite:
        assert (torch.linalg.eigvalsh(A) > 0).all()
    products = operator.matvec(v)
    assert not products.requires_grad
    torch.testing.assert_close(operator.matvec(v), products)  # linearised once, applied many times


def test_flags_of_what_is_built_from_others() -> None:
    A = matrices(torch.float64)
    S = A @ A.mT + torch.eye(N, dtype=A.dtype)
    definite = DenseOperator(S, symmetric=True, positive_definite=True)
    general = DenseOperator(A)
    assert (definite * 2.0).positive_definite and not (definite * -2.0).positive_definite
    assert (definite * -2.0).symmetric and not (general * 2.0).symmetric
    assert DampedOperator(definite, 1.0).positive_definite and not DampedOperator(definite, -1.0).positive_definite
    assert not DampedOperator(definite, torch.tensor([1.0, -1.0, 1.0])).positive_definite
    assert (definite + definite).positive_definite and not (definite + general).symmetric
    assert RepeatedOperator(definite, 2).positive_definite and RepeatedOperator(definite, 2).distinct is definite
    assert RepeatedOperator(definite, 2).repeats == 2 and definite.repeats == 1 and definite.distinct is definite
    assert "symmetric" in repr(definite) or "definite" in repr(definite)


def test_a_gauss_newton_matrix_is_not_the_hessian() -> None:
    x = torch.tensor([[2.0]], dtype=torch.float64)
    outer = lambda z: (z**4).sum(-1)
    gn = gauss_newton(lambda x: x - 1.0, outer, x)
    assert gn.dense().item() == pytest.approx(12.0)
    linear = hessian(lambda x: ((x - 1.0) ** 4).sum(-1), x)
    assert linear.dense().item() == pytest.approx(12.0)
    curved = gauss_newton(lambda x: x**2, lambda z: 0.5 * (z**2).sum(-1), x)
    assert curved.dense().item() == pytest.approx(16.0)  # (2x)², where the Hessian is 6x² = 24


def test_what_is_no_operator() -> None:
    with pytest.raises(bilevel.ShapeError):
        DenseOperator(torch.zeros(3, 4))
    with pytest.raises(bilevel.ShapeError):
        DenseOperator(torch.zeros(2, 3, 4))
    operator = DenseOperator(matrices(torch.float64))
    with pytest.raises(bilevel.ShapeError, match=r"shape|vectors"):
        operator @ torch.zeros(N, dtype=torch.float64)
    with pytest.raises(bilevel.ShapeError, match="one shape and dtype"):
        operator + DenseOperator(torch.zeros(1, N, N, dtype=torch.float64))
    with pytest.raises(bilevel.ShapeError, match="one shape and dtype"):
        operator + DenseOperator(matrices(torch.float32))
    one_way = FunctionOperator(lambda v: v, points(torch.float64))
    with pytest.raises(bilevel.ShapeError, match="transpos"):
        one_way.rmatvec(torch.zeros(BATCH, N, dtype=torch.float64))


def test_a_zero_curvature_is_zero_and_no_error() -> None:
    x = points(torch.float64)
    linear = hessian(lambda x: x.sum(-1), x)
    assert torch.equal(linear.dense(), torch.zeros(BATCH, N, N, dtype=torch.float64))
    constant = jacobian(lambda x: x.detach() * 2 + 0 * x, x)
    assert torch.equal(constant.dense(), torch.zeros(BATCH, N, N, dtype=torch.float64))


def test_the_hessian_of_a_constant_is_zero() -> None:
    operator = bilevel.operators.hessian(
        lambda x: torch.ones(len(x), dtype=x.dtype), torch.ones(2, 3, dtype=torch.float64)
    )
    assert bool((operator.matvec(torch.ones(2, 3, dtype=torch.float64)) == 0).all())
    assert bool((operator.dense() == 0).all())
