"""½‖a‖² of a vector, in every order and mode."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from bilevel.meta.proximal import half_square

F64 = torch.float64


@pytest.mark.parametrize("at_zero", [False, True])
def test_against_the_plain_formula(at_zero: bool) -> None:
    a = torch.zeros(4, dtype=F64) if at_zero else torch.linspace(-1, 2, 4, dtype=F64)
    u = torch.linspace(1, 3, 4, dtype=F64)

    def plain(a: torch.Tensor) -> torch.Tensor:
        return 0.5 * (a * a).sum()

    for transform in (grad, hessian, lambda f: jacfwd(grad(f)), lambda f: jacrev(jacrev(f)), lambda f: f):
        torch.testing.assert_close(transform(half_square)(a), transform(plain)(a))
    torch.testing.assert_close(jvp(half_square, (a,), (u,)), jvp(plain, (a,), (u,)))
    wrapped = jacrev(hessian(lambda a: half_square(a.sin())))(a)
    torch.testing.assert_close(wrapped, jacrev(hessian(lambda a: plain(a.sin())))(a))


def test_mapped_and_checked() -> None:
    a = torch.randn(3, 2, 5, dtype=F64, generator=torch.Generator().manual_seed(0))
    expected = 0.5 * (a * a).sum(-1)
    torch.testing.assert_close(vmap(vmap(half_square))(a), expected)
    torch.testing.assert_close(vmap(half_square, in_dims=1)(a[0].mT), expected[0])
    torch.testing.assert_close(vmap(vmap(grad(half_square)))(a), a)
    b = a[0].clone().requires_grad_(True)
    assert gradcheck(lambda b: vmap(half_square)(b), b, check_forward_ad=True)
    assert gradgradcheck(lambda b: vmap(half_square)(b), b)
