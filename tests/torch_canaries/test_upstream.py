"""One test for each repair in ``bilevel/_torch``: it shows torch's fault, and fails once torch is mended.

If a test here fails, torch no longer has the fault: delete the repair that the test names as soon as no supported version of torch needs it,
and the test with it. Faults are shown on plain torch, without the library.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd.function import once_differentiable
from torch.func import hessian, jacfwd, jacrev, vmap
from torch.nn import functional as F

F64 = torch.float64
Tensor = torch.Tensor


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def along(function: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor, order: int) -> float:
    """Return the derivative of this order of t ↦ function(x + t · direction) at 0, by reverse passes."""
    x = x.clone().requires_grad_()
    value = function(x)
    for _ in range(order):
        value = (torch.autograd.grad(value, x, create_graph=True)[0] * direction).sum()
    return float(value.detach())


def standardised(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    centred = x - x.mean(axes, keepdim=True)
    return centred / ((centred**2).mean(axes, keepdim=True) + 1e-5).sqrt()


NORMS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "batch norm": (lambda x: F.batch_norm(x, None, None, training=True), (0,)),
    "layer norm": (lambda x: F.layer_norm(x, (3,)), (1,)),
    "instance norm": (lambda x: F.instance_norm(x.unsqueeze(0)).squeeze(0), (1,)),
}


@pytest.mark.parametrize("name", NORMS)
def test_third_derivatives_of_norms(name: str) -> None:
    """``_torch/norms.py``: pytorch/pytorch#175754, #186256."""
    theirs, axes = NORMS[name]
    x, direction, weights = (random(4, 3, seed=seed) for seed in range(3))
    orders = [
        [along(lambda x, f=f: (f(x) * weights).sum(), x, direction, order) for order in (1, 2, 3)]
        for f in (theirs, lambda x: standardised(x, axes))
    ]
    assert orders[0][:2] == pytest.approx(orders[1][:2])
    assert orders[0][2] != pytest.approx(orders[1][2], rel=1e-3)


def test_second_derivatives_of_small_factors() -> None:
    """``_torch/products.py``: no issue was found; #106789 mended factors that are exactly zero."""
    x = torch.tensor([1e-9, 1e-17, 3.0, 1.0], dtype=F64, requires_grad=True)
    for product in (torch.prod, lambda x: x.cumprod(0)[-1]):
        (slope,) = torch.autograd.grad(product(x), x, create_graph=True)
        rows = torch.stack([torch.autograd.grad(part, x, retain_graph=True)[0] for part in slope])
        direct = abs(float(along(product, x.detach(), torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=F64), 2)))
        assert direct > 0 or abs(float(rows[1, 1])) > 0  # both are zero: a product is linear in each factor


def test_nested_forward_mode_of_cumprod() -> None:
    """``_torch/products.py``: #196701."""

    def cube(t: Tensor) -> Tensor:
        return torch.stack([t, t - 1, t + 1]).cumprod(0).sum()

    # t + t (t − 1) + t (t² − 1), whose second derivative is 2 + 6 t
    assert float(jacfwd(jacfwd(cube))(torch.tensor(1.0, dtype=F64))) != pytest.approx(8.0)


def test_solve_under_vmap_of_hessian() -> None:
    """``factorisations.inverse`` in place of ``torch.linalg.solve``: #192540."""
    A, B = torch.tensor([[2.1, 0.3], [-0.2, 2.4]], dtype=F64), torch.tensor([[1.0, 0.5], [0.2, 0.7]], dtype=F64)

    def solved(t: Tensor) -> Tensor:
        return torch.linalg.solve(A + t[0] * B, torch.stack([t[0] ** 2 + 1, t[1]])).sum()

    t = torch.tensor([[0.3, 0.2], [0.5, -0.1]], dtype=F64)
    right = torch.stack([jacrev(jacrev(solved))(row) for row in t])
    assert not torch.allclose(vmap(hessian(solved))(t), right, rtol=1e-3)


def test_second_derivative_of_weight_norm() -> None:
    """``_torch/double_backward.py``: no issue was found."""
    v = random(3, 4).requires_grad_()
    g = random(3, 1, seed=1).abs().requires_grad_()
    written = lambda v: v * (g.detach() / v.norm(dim=1, keepdim=True))
    weights, direction = random(3, 4, seed=2), random(3, 4, seed=3)
    found, right = (
        along(lambda v, f=f: (f(v) * weights).sum(), v.detach(), direction, 2)
        for f in (lambda v: torch._weight_norm(v, g, 0), written)
    )
    assert found != pytest.approx(right, rel=1e-3)


def test_second_derivative_of_attention() -> None:
    """``_torch/double_backward.py``: fused kernels have none."""
    x = random(1, 1, 3, 2).requires_grad_()
    (slope,) = torch.autograd.grad((F.scaled_dot_product_attention(x, x, x) ** 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.autograd.grad(slope.sum(), x)


def test_second_derivative_by_the_values_of_a_sparse_tensor() -> None:
    """``_torch/sparse.py`` and ``_torch/once_differentiable.py``: no issue was found."""
    v = torch.tensor([1.0, 2.0], dtype=F64)
    places = torch.tensor([[0, 1], [1, 0]])
    with torch.sparse.check_sparse_tensor_invariants():
        found = along(
            lambda v: (torch.sparse_coo_tensor(places, v**2, (2, 2)).to_dense() ** 2).sum(), v, torch.ones(2).to(v), 2
        )
    assert found != pytest.approx(12.0 + 48.0, rel=1e-3)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * grad


def test_a_once_differentiable_part_is_taken_for_a_constant() -> None:
    """``_torch/once_differentiable.py``: #90224 says that this is meant."""
    found = along(lambda x: Cube.apply(x) * x, torch.tensor(2.0, dtype=F64), torch.tensor(1.0, dtype=F64), 2)
    assert found != pytest.approx(48.0)


class Square(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * tangent


def test_forward_over_forward_of_a_custom_function_is_zero() -> None:
    """``transforms.forward_levels``: #197867."""
    assert float(jacfwd(jacfwd(Square.apply))(torch.tensor(3.0, dtype=F64))) == 0


def test_torch_func_grad_imports_the_compiler() -> None:
    """``_torch/reverse.py``: no issue was found."""
    program = (
        "import sys, torch; torch.func.grad(lambda x: x.sum())(torch.ones(2)); "
        "sys.exit('torch._dynamo' in sys.modules or 'sympy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 1
