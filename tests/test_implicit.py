"""The differentiation rule, in every argument, against an oracle that knows nothing of it; ``transforms/`` has the transforms."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import bilevel

from .problems import FAMILIES, Family, arguments

family = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)


@family
def test_gradcheck_in_both_modes_and_batched(family: Family) -> None:
    inputs = [t.clone().requires_grad_(True) for t in arguments()]
    assert gradcheck(family.implicit(), inputs, check_forward_ad=True, check_batched_grad=True, atol=1e-6, rtol=1e-4)


@family
def test_gradgradcheck_reverse_and_forward_over_reverse(family: Family) -> None:
    inputs = [t.clone().requires_grad_(True) for t in arguments()]
    assert gradgradcheck(
        family.implicit(), inputs, check_fwd_over_rev=True, check_batched_grad=True, atol=1e-5, rtol=1e-4
    )


TRANSFORMS = {
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "hessian": hessian,
    "jacrev of jacrev": lambda f: jacrev(jacrev(f)),
    "jacrev of jacfwd": lambda f: jacrev(jacfwd(f)),
    "jacrev of hessian": lambda f: jacrev(hessian(f)),
}


@family
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("number", [0, 1, 2], ids=["X", "y", "s"])
def test_transforms_agree_with_the_unrolled_oracle(family: Family, name: str, number: int) -> None:
    if name == "jacrev of hessian" and number == 0:
        number = 2  # 18³ entries of a third derivative prove no more than one does
    inputs = list(arguments())

    def through(function):
        return TRANSFORMS[name](lambda t: function(*inputs[:number], t, *inputs[number + 1 :]))(inputs[number])

    torch.testing.assert_close(through(family.implicit()), through(family.reference), atol=1e-9, rtol=1e-8)


@family
@pytest.mark.parametrize("in_dims", [(0, None, None), (None, 0, None), (None, None, 0), (1, 0, 0)])
@pytest.mark.parametrize("inner", ["value", "jacrev", "jacfwd", "hessian"])
def test_vmap_equals_a_loop(family: Family, in_dims: tuple[int | None, ...], inner: str) -> None:
    size = 4
    X, y, s = arguments()
    generator = torch.Generator().manual_seed(5)

    def widen(t: torch.Tensor, dim: int | None) -> torch.Tensor:
        if dim is None:
            return t
        return torch.stack(
            [t + 0.1 * torch.randn(t.shape, generator=generator, dtype=t.dtype) for _ in range(size)], dim
        )

    inputs = [widen(t, dim) for t, dim in zip((X, y, s), in_dims, strict=True)]
    f = family.implicit()
    one = f if inner == "value" else TRANSFORMS[inner](f, argnums=2)
    looped = torch.stack(
        [one(*(t if d is None else t.select(d, k) for t, d in zip(inputs, in_dims, strict=True))) for k in range(size)]
    )
    torch.testing.assert_close(vmap(one, in_dims=in_dims)(*inputs), looped, atol=1e-9, rtol=1e-9)


@family
def test_forward_over_forward_of_different_arguments_is_refused_not_zero(family: Family) -> None:
    X, y, s = arguments()
    f = family.implicit()
    with pytest.raises(bilevel.TransformError):
        jvp(lambda y: jvp(lambda s: f(X, y, s), (s,), (torch.ones_like(s),))[1], (y,), (y,))


@family
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_dtypes_are_those_of_the_arguments(family: Family, dtype: torch.dtype) -> None:
    inputs = [t.requires_grad_(True) for t in arguments(dtype=dtype)]
    x = family.implicit()(*inputs)
    x.sum().backward()
    assert x.dtype == dtype
    exact = [t.detach().double().requires_grad_(True) for t in inputs]
    family.reference(*exact).sum().backward()
    tolerance = 2e-4 if dtype == torch.float32 else 1e-9
    for mine, reference in zip(inputs, exact, strict=True):
        assert mine.grad is not None and mine.grad.dtype == dtype
        torch.testing.assert_close(mine.grad.double(), reference.grad, atol=tolerance, rtol=tolerance)


def test_float64_data_with_a_float32_unknown() -> None:
    X, y, s = (t.requires_grad_(True) for t in arguments())
    layer = bilevel.argmin(lambda w, X, y, s: ((X @ w.double() - y) ** 2).sum() + s.exp() * (w**2).sum())
    w = layer(torch.zeros(3, dtype=torch.float32), X, y, s)
    w.sum().backward()
    assert w.dtype == torch.float32
    assert X.grad.dtype == torch.float64 and bool(torch.isfinite(X.grad).all())


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e30])
def test_the_pullback_is_linear_in_tiny_and_huge_cotangents(scale: float) -> None:
    X, y, s = arguments()
    y.requires_grad_(True)
    w = FAMILIES[0].implicit()(X, y, s)
    (unit,) = torch.autograd.grad(w, y, torch.ones_like(w), retain_graph=True)
    (scaled,) = torch.autograd.grad(w, y, torch.full_like(w, scale), retain_graph=True)
    torch.testing.assert_close(scaled / scale, unit, atol=1e-12, rtol=1e-10)
    (zero,) = torch.autograd.grad(w, y, torch.zeros_like(w))
    assert bool((zero == 0).all())


def test_one_linearisation_serves_every_right_hand_side(monkeypatch: pytest.MonkeyPatch) -> None:
    from bilevel.operators import HessianOperator

    formed = []
    original = HessianOperator.dense
    monkeypatch.setattr(HessianOperator, "dense", lambda self: formed.append(self) or original(self))
    X, y, s = arguments()
    layer = FAMILIES[0].implicit(
        solver=lambda objective, init, *a: FAMILIES[0].reference(*a), linear_solver=bilevel.Exact()
    )
    y.requires_grad_(True)
    w = layer(X, y, s)
    for entry in w:
        torch.autograd.grad(entry, y, retain_graph=True)
    assert len(formed) == 1
    formed.clear()
    jacrev(lambda y: layer(X, y, s))(y.detach())
    assert len(formed) == 1


def test_the_forward_factorisation_serves_the_adjoint(monkeypatch: pytest.MonkeyPatch) -> None:
    from bilevel._system import Problem

    formed = []
    original = Problem._dense
    monkeypatch.setattr(Problem, "_dense", lambda self, x: formed.append(x) or original(self, x))
    X, y, s = arguments()
    layer = bilevel.argmin(lambda w, X, y, s: ((X @ w - y) ** 2).sum() + s.exp() * (w**2).sum())
    free = y.clone().requires_grad_(True)
    w = vmap(layer, in_dims=(None, 0, None, None))(torch.zeros(3, dtype=X.dtype), torch.stack([X, 2 * X]), free, s)
    w.sum().backward()
    assert len(formed) == 1  # Newton's one step; the adjoint borrows its factor
    expected = sum(torch.linalg.solve(Z.T @ Z + s.exp() * torch.eye(3, dtype=X.dtype), Z.T).sum(0) for Z in (X, 2 * X))
    torch.testing.assert_close(free.grad, expected, atol=1e-13, rtol=1e-12)


def test_a_borrowed_factorisation_that_does_not_fit_is_given_back() -> None:
    from bilevel.linear.exact import Exact, lend
    from bilevel.operators import DenseOperator

    generator = torch.Generator().manual_seed(0)
    A = torch.randn(2, 5, 5, generator=generator, dtype=torch.float64)
    A = A @ A.mT + torch.eye(5, dtype=torch.float64)
    b = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    for wrong in (A + 1e-6 * torch.eye(5), 3 * A, torch.eye(5, dtype=torch.float64).expand(2, 5, 5)):
        operator = DenseOperator(A, symmetric=True)
        lend(operator, torch.linalg.cholesky(wrong))
        torch.testing.assert_close(Exact()(operator, b), torch.linalg.solve(A, b), atol=1e-12, rtol=1e-11)


def test_batch_norm_in_the_objective_is_differentiated_rightly() -> None:
    # torch 2.13: a vjp or jvp of vmap(grad(f)) is silently 2 % wrong where f holds a BatchNorm2d.
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm2d(2, affine=False, track_running_stats=False).double()
    images = torch.randn(3, 5, 2, 4, 4, dtype=torch.float64)

    def objective(w: torch.Tensor, images: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        features = norm(images * w.reshape(1, 2, 1, 1) + s * images**2)
        return ((features - images) ** 2).mean() + 0.5 * (w**2).sum() + s * w.sum()

    layer = bilevel.argmin(objective, tolerance=bilevel.Tolerance(delta=1e-10))
    s = torch.tensor(0.3, dtype=torch.float64)
    start = torch.full((2,), 0.1, dtype=torch.float64)

    def looped(s: torch.Tensor) -> torch.Tensor:
        return torch.stack([layer(start, image, s) for image in images])

    def batched(s: torch.Tensor) -> torch.Tensor:
        return vmap(lambda image: layer(start, image, s))(images)

    # A hand-written norm is right under every transform; it is the oracle for the first order.
    def by_hand(w: torch.Tensor, images: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        z = images * w.reshape(1, 2, 1, 1) + s * images**2
        centred = z - z.mean((0, 2, 3), keepdim=True)
        features = centred / (centred.pow(2).mean((0, 2, 3), keepdim=True) + norm.eps).sqrt()
        return ((features - images) ** 2).mean() + 0.5 * (w**2).sum() + s * w.sum()

    from . import oracles

    expected = torch.stack(
        [
            jacrev(lambda s, image=image: oracles.newton_argmin(by_hand, layer(start, image, s).detach(), image, s))(s)
            for image in images
        ]
    )
    torch.testing.assert_close(jacrev(batched)(s), expected, atol=1e-8, rtol=1e-7)
    torch.testing.assert_close(jacfwd(batched)(s), expected, atol=1e-8, rtol=1e-7)
    torch.testing.assert_close(jacrev(jacrev(batched))(s), jacrev(jacrev(looped))(s), atol=1e-8, rtol=1e-7)
    free = s.clone().requires_grad_(True)
    (plain,) = torch.autograd.grad(batched(free).sum(), free)
    torch.testing.assert_close(plain, expected.sum(), atol=1e-8, rtol=1e-7)


def test_a_quartic_is_differentiated_by_its_hessian_not_by_gauss_newton() -> None:
    # argmin (a − x)⁴ + (a − x)² is a: the derivative is 1, where Gauss–Newton of the quartic alone would say 1.5.
    layer = bilevel.argmin(lambda x, a: (a - x) ** 4 + (a - x) ** 2)
    a = torch.tensor(2.0, dtype=torch.float64)
    assert grad(lambda a: layer(torch.tensor(0.0, dtype=torch.float64), a))(a).item() == pytest.approx(1.0, abs=1e-9)


def test_a_layer_inside_an_objective() -> None:
    inner = bilevel.argmin(lambda u, x: ((u - x.sin()) ** 2).sum() + (u**4).sum())
    start = torch.zeros(2, dtype=torch.float64)

    def objective(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return ((inner(start, x) - a) ** 2).sum() + 0.5 * (x**2).sum()

    outer = bilevel.argmin(objective)
    a = torch.tensor([0.2, -0.1], dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda a: outer(start, a), a, atol=1e-6, rtol=1e-4)
    batch = torch.stack([a.detach(), 2 * a.detach()])
    torch.testing.assert_close(
        vmap(lambda a: outer(start, a))(batch), torch.stack([outer(start, row) for row in batch]), atol=1e-10, rtol=1e-9
    )
