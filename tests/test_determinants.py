"""det: rewritten, it is the same function, with right second derivatives where singular values are equal or zero."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import hessian, jacfwd, jacrev, vmap

import bilevel
from bilevel._torch.double_backward import Repeatable

F64 = torch.float64
Tensor = torch.Tensor


def triple(x: Tensor) -> Tensor:
    return (x[..., 0, :] * torch.linalg.cross(x[..., 1, :], x[..., 2, :], dim=-1)).sum(-1)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=F64)


MATRICES = {
    "identity": torch.eye(3, dtype=F64),
    "zero": torch.zeros(3, 3, dtype=F64),
    "rank 1": torch.ones(3, 3, dtype=F64),
    "rank 2": torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=F64)),
    "two nearly equal": torch.diag(torch.tensor([1.0, 1.0 + 1e-9, 2.0], dtype=F64)),
    "random": random(3, 3),
}


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 9])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_sizes(n: int, batch: tuple[int, ...]) -> None:
    x = random(*batch, n, n).requires_grad_()
    theirs = torch.linalg.det(x)
    with Repeatable():
        for det in (torch.linalg.det, torch.det, torch.Tensor.det):
            torch.testing.assert_close(det(x), theirs, rtol=1e-9, atol=1e-12)
        if n < 5:
            assert gradcheck(torch.linalg.det, (x,))
            assert gradgradcheck(torch.linalg.det, (x,))


def test_complex_and_empty() -> None:
    x = torch.complex(random(2, 4, 4), random(2, 4, 4) + 1)
    theirs = torch.linalg.det(x)
    with Repeatable():
        torch.testing.assert_close(torch.linalg.det(x), theirs)
        assert float(torch.linalg.det(torch.zeros(0, 0))) == 1.0
        with pytest.raises(RuntimeError, match="square"):
            torch.linalg.det(torch.zeros(2, 3))


@pytest.mark.parametrize("name", MATRICES)
def test_second_and_third_derivatives(name: str) -> None:
    x = MATRICES[name]
    for order in (lambda f: jacrev(jacrev(f)), hessian, lambda f: jacfwd(jacfwd(f)), lambda f: jacrev(hessian(f))):
        right = order(triple)(x)
        with Repeatable():
            torch.testing.assert_close(order(torch.linalg.det)(x), right, rtol=1e-12, atol=1e-14)
            both = vmap(order(torch.linalg.det))(torch.stack([x, x]))
        torch.testing.assert_close(both[1], right, rtol=1e-12, atol=1e-14)


def test_second_derivatives_of_a_larger_one() -> None:
    """∂²det/∂a_ii ∂a_jj of the identity is 1."""
    with Repeatable():
        found = hessian(lambda d: torch.linalg.det(torch.diag(d)))(torch.ones(8, dtype=F64))
    torch.testing.assert_close(found, 1 - torch.eye(8, dtype=F64))


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("a", [1.05, 0.5, 0.0])
def test_a_minimum_at_equal_singular_values(a: float, dtype: torch.dtype) -> None:
    theta, start = (a * torch.eye(3, dtype=dtype)).requires_grad_(), torch.eye(3, dtype=dtype)
    weights = random(3, 3).to(dtype)
    slopes = []
    for det in (torch.linalg.det, triple):
        x = bilevel.argmin(lambda x, a, det=det: ((x - a) ** 2).sum() + 0.1 * det(x))(start, theta)
        slopes.append(torch.autograd.grad((x * weights).sum(), theta)[0])
    torch.testing.assert_close(*slopes, rtol=1e-7 if dtype == F64 else 1e-3, atol=1e-7 if dtype == F64 else 1e-3)
