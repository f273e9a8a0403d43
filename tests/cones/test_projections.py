"""Projections onto cones: Moreau's decomposition against samples of the cones, derivatives in each region, kinks."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import vmap

import bilevel
from bilevel import cone_program, cones
from bilevel.cones import Cone
from tests.cones.programs import F64

ALL: list[Cone] = [
    cones.Zero(3),
    cones.Nonnegative(3),
    cones.SecondOrder(3),
    cones.PSDTriangle(2),
    cones.Exponential(),
    cones.Power(0.5),
    cones.Power(0.2),
    cones.Power(0.9),
]


def members(cone: Cone, count: int, generator: torch.Generator) -> torch.Tensor:
    """Return vectors of length one in the cone (count, 3), on its boundary and inside."""
    a, b, c = torch.randn(3, count, dtype=F64, generator=generator)
    more = torch.rand(count, dtype=F64, generator=generator) < 0.5
    if isinstance(cone, cones.Exponential):
        y = b.abs() + 1e-3
        made = torch.stack([3 * a * y, y, y * torch.exp(3 * a) + more * c.abs()], -1)
    elif isinstance(cone, cones.Power):
        x, y = torch.exp(3 * a), torch.exp(3 * b)
        z = x**cone.exponent * y ** (1 - cone.exponent)
        made = torch.stack([x, y, torch.where(more, torch.tanh(c), c.sign()) * z], -1)
    elif isinstance(cone, cones.PSDTriangle):
        root = (
            torch.randn(count, 2, 2, dtype=F64, generator=generator) * torch.stack([1 + 0 * a, 1.0 * more], -1)[:, None]
        )
        made = cone.vector(root @ root.mT)
    elif isinstance(cone, cones.SecondOrder):
        made = torch.stack([(a * a + b * b).sqrt() + more * c.abs(), a, b], -1)
    else:
        made = torch.stack([a, b, c], -1).abs() * float(isinstance(cone, cones.Nonnegative))
    return made / made.norm(dim=-1, keepdim=True).clamp(min=1e-300)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("cone", ALL, ids=repr)
def test_moreau_decomposition(cone: Cone, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.exp(torch.randn(2000, 3, dtype=F64, generator=generator))
    v = scale * torch.randn(2000, 3, dtype=F64, generator=generator) * spread
    size = v.norm(dim=-1, keepdim=True)
    s, k = cone.project(v), members(cone, 500, generator)
    assert torch.isfinite(s).all()
    # s and y are orthogonal, y has no negative product with a member, and s is a member: it is its own projection.
    assert ((s * (s - v)).sum(-1).abs() <= 1e-13 * size[:, 0] ** 2).all()
    assert (((s - v) / size) @ k.mT).min() >= -1e-12
    assert ((cone.project(s) - s).abs() <= 1e-7 * size).all()
    assert (cone.project(k) - k).abs().max() <= 1e-12
    torch.testing.assert_close(vmap(cone.project)(v), s, rtol=1e-10, atol=1e-12 * scale)


@pytest.mark.parametrize("cone", ALL[2:], ids=repr)
def test_derivatives_where_there_is_no_kink(cone: Cone) -> None:
    v = torch.randn(40, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
    v = v[cone.edges(v).abs().amin(-1) > 0.1][:12].requires_grad_()
    assert len(v) == 12
    assert gradcheck(cone.project, v, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(cone.project, v, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize(
    ("cone", "point"),
    [
        (cones.Exponential(), (1.0, 1.0, 2.718281828459045)),  # on the cone
        (cones.Exponential(), (1.0, 1.0, -1.0)),  # on the polar cone
        (cones.Exponential(), (-1.0, 0.0, 1.0)),  # on the face y = 0
        (cones.Exponential(), (-1.0, -1.0, 0.0)),
        (cones.Exponential(), (0.0, 0.0, 0.0)),
        (cones.Power(0.5), (4.0, 1.0, 2.0)),
        (cones.Power(0.5), (-2.0, -0.5, 2.0)),
        (cones.Power(0.5), (-1.0, 1.0, 0.0)),
        (cones.Power(0.5), (0.0, 0.0, 0.0)),
    ],
    ids=str,
)
def test_kinks_have_an_edge_of_zero(cone: Cone, point: tuple[float, ...]) -> None:
    v = torch.tensor(point, dtype=F64)
    assert cone.edges(v).abs().min() < 1e-12
    slack = cone.project(v).requires_grad_(False)
    torch.testing.assert_close(cone.project(slack), slack, rtol=1e-9, atol=1e-9)
    one = torch.eye(3, dtype=F64)
    q = (-v).requires_grad_()
    with pytest.raises(bilevel.SolveError, match=r"strict complementarity|not unique"):
        cone_program(one, q, -one, 0.0, [cone]).sum().backward()


def test_the_entropy_of_a_distribution_gives_softmax() -> None:
    # max c·p + Σ tᵢ with pᵢ e^(tᵢ/pᵢ) ≤ 1, that is tᵢ ≤ −pᵢ log pᵢ, and Σ p = 1.
    n, c = 4, torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=F64)
    A, b = torch.zeros(1 + 3 * n, 2 * n, dtype=F64), torch.zeros(1 + 3 * n, dtype=F64)
    A[0, :n], b[0] = 1.0, 1.0
    for i in range(n):
        A[1 + 3 * i, n + i], A[2 + 3 * i, i], b[3 + 3 * i] = -1.0, -1.0, 1.0
    factors = [cones.Zero(1), *[cones.Exponential()] * n]
    ours = lambda c: cone_program(None, torch.cat([-c, -torch.ones(n, dtype=F64)]), A, b, factors)[:n]
    closed = lambda c: torch.softmax(c, 0)
    for transform in (lambda f: f, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        torch.testing.assert_close(transform(ours)(c), transform(closed)(c), rtol=1e-8, atol=1e-9)


def test_cobb_douglas_demand() -> None:
    # max x^α y^(1−α) at prices p and the income 1: x = α/p₀, y = (1 − α)/p₁.
    alpha = 0.3
    A = torch.tensor([[-1.0, 0, 0], [0, -1, 0], [0, 0, -1]], dtype=F64)
    b = torch.tensor([1.0, 0, 0, 0], dtype=F64)

    def ours(p: torch.Tensor) -> torch.Tensor:
        rows = torch.cat([torch.cat([p, p.new_zeros(1)]).unsqueeze(0), A])
        q = p.new_tensor([0.0, 0.0, -1.0])
        return cone_program(None, q, rows, b, [cones.Zero(1), cones.Power(alpha)])[:2]

    closed = lambda p: torch.tensor([alpha, 1 - alpha], dtype=F64) / p
    p = torch.tensor([0.7, 2.0], dtype=F64)
    for transform in (lambda f: f, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        torch.testing.assert_close(transform(ours)(p), transform(closed)(p), rtol=1e-8, atol=1e-9)


def test_cones_without_a_product_have_no_central_path() -> None:
    one, q = torch.eye(3, dtype=F64), torch.tensor([1.0, -1.0, 0.5], dtype=F64)
    with pytest.raises(bilevel.ArgumentError, match="symmetric cones with smoothing"):
        cone_program(one, q, -one, 0.0, [cones.Exponential()], smoothing=1e-3)
    with pytest.raises(bilevel.ArgumentError, match=r"in \(0.0, 1.0\)"):
        cones.Power(1.0)
