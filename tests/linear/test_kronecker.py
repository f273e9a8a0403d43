"""Kronecker factors beside their definition, dense; as a preconditioner of a network's Hessian; and kept from matrix to matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian

import bilevel
from bilevel import Status, Tolerance
from bilevel.linear._base import solve_linear
from bilevel.operators import DenseOperator, FunctionOperator, RepeatedOperator

F64 = torch.float64
SILENT = Tolerance(delta_prime=None).linear(F64)


def spd(n: int, seed: int, batch: int = 1) -> torch.Tensor:
    root = torch.randn(batch, n, n, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return root @ root.mT / n + 0.1 * torch.eye(n, dtype=F64)


def right(batch: int, n: int) -> torch.Tensor:
    return torch.randn(batch, n, generator=torch.Generator().manual_seed(1), dtype=F64)


def root(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.mT


def by_definition(H: torch.Tensor, shapes: list[tuple[int, ...]], probes: int, seed: int) -> torch.Tensor:
    """Return M, dense, of one matrix: the formula of the docstring."""
    n = len(H)
    Y = torch.from_numpy(np.random.default_rng(seed).standard_normal((probes, n))) @ H
    M, begin = torch.zeros(n, n, dtype=F64), 0
    for shape in shapes:
        size = int(np.prod(shape))
        here, y = slice(begin, begin + size), Y[:, begin : begin + size]
        if size in (1, *shape):
            M[here, here] = (y * y).mean(0).sqrt().diag()
        else:
            y = y.reshape(probes, shape[0], -1)
            left, across = (y @ y.mT).mean(0), (y.mT @ y).mean(0)
            M[here, here] = torch.kron(root(left), root(across)) / left.trace().sqrt()
        begin += size
    return M


@pytest.mark.parametrize("shapes", [[(3, 4)], [(2, 3), (2,)], [(2, 2, 1, 2), (), (3,)], [(5, 1), (1, 4)]])
def test_the_formula(shapes: list[tuple[int, ...]]) -> None:
    n = sum(int(np.prod(shape)) for shape in shapes)
    H, b, rho = spd(n, 0, batch=3), right(3, n), 0.3
    solver = bilevel.Kronecker(shapes, probes=5, rho=rho, seed=4)
    found = solve_linear(solver, DenseOperator(H, symmetric=True), b, SILENT)
    for k in range(3):
        M = by_definition(H[k], shapes, 5, 4) + rho * torch.eye(n, dtype=F64)
        torch.testing.assert_close(found.x[k], torch.linalg.solve(M, b[k]), rtol=1e-7, atol=1e-9)
    assert found.status.tolist() == [Status.BUDGET_SPENT] * 3
    assert found.iterations.tolist() == [5] * 3
    torch.testing.assert_close(found.residual_norm, (b - (H @ found.x.unsqueeze(-1)).squeeze(-1)).norm(dim=-1))


def test_a_kronecker_product_is_found() -> None:
    A, B = spd(4, 1)[0], spd(3, 2)[0]
    H, b = torch.kron(B, A), right(1, 12)
    found = bilevel.Kronecker([(3, 4)], probes=4000, rho=1e-6)(
        DenseOperator(H.unsqueeze(0), symmetric=True), b, Tolerance(delta_prime=None)
    )
    exact = torch.linalg.solve(H, b[0])
    assert float((found[0] - exact).norm() / exact.norm()) < 0.1


def test_signs_of_eigenvalues_do_not_matter() -> None:
    H = DenseOperator(torch.tensor([[[-2.0, 0.0], [0.0, 2.0]]], dtype=F64), symmetric=True)
    positive = DenseOperator(torch.tensor([[[2.0, 0.0], [0.0, 2.0]]], dtype=F64), symmetric=True)
    solver, b = bilevel.Kronecker([(2,)]), torch.ones(1, 2, dtype=F64)
    torch.testing.assert_close(solver.preconditioner(H)(b), solver.preconditioner(positive)(b))


def test_products_are_made_once_for_all_right_hand_sides() -> None:
    H, products = spd(6, 0), []

    def apply(v: torch.Tensor) -> torch.Tensor:
        products.append(1)
        return (H @ v.unsqueeze(-1)).squeeze(-1)

    operator = FunctionOperator(apply, torch.zeros(1, 6, dtype=F64), symmetric=True)
    solver = bilevel.Kronecker([(2, 3)], probes=7)
    for _ in range(3):
        solve_linear(solver, operator, right(1, 6), SILENT, seen=False)
    assert len(products) == 7
    many = solve_linear(solver, RepeatedOperator(operator, 4), right(4, 6), SILENT)
    torch.testing.assert_close(many.x[:1], solve_linear(solver, operator, right(4, 6)[:1], SILENT).x)


def network() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the weights of a small network, and the Hessian of its ridge-regularised loss there."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 4)).double()
    X, y = torch.randn(200, 12, dtype=F64) * torch.logspace(0, -1.5, 12, dtype=F64), torch.randint(0, 4, (200,))
    weights = {name: parameter.detach() for name, parameter in net.named_parameters()}
    names, sizes = list(weights), [w.numel() for w in weights.values()]

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = zip(names, flat.split(sizes), strict=True)
        params = {name: part.reshape(weights[name].shape) for name, part in parts}
        return nn.functional.cross_entropy(functional_call(net, params, (X,)), y)

    flat = torch.cat([w.reshape(-1) for w in weights.values()])
    H = hessian(loss)(flat)
    values, vectors = torch.linalg.eigh(H)
    return weights, (vectors * (values.abs() + 1e-4)) @ vectors.mT


def test_as_a_preconditioner_it_saves_steps_and_has_no_bias() -> None:
    weights, H = network()
    operator, b, target = DenseOperator(H.unsqueeze(0), symmetric=True), right(1, len(H)), Tolerance().linear(F64)
    plain = solve_linear(bilevel.CG(), operator, b, target)
    helped = solve_linear(bilevel.CG(preconditioner=bilevel.Kronecker.like(weights, rho=1e-3)), operator, b, target)
    exact = torch.linalg.solve(H, b[0])
    assert float((helped.x[0] - exact).norm() / exact.norm()) < 1e-8
    assert int(helped.iterations) < 0.7 * int(plain.iterations), (helped.iterations, plain.iterations)


def test_in_a_layer_in_float32_and_under_vmap() -> None:
    X, y = torch.randn(30, 6, generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 1, 30)

    def loss(W: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ((X @ W.reshape(-1) - y) ** 2).sum() + (W**2).sum()

    init, linear = torch.zeros(2, 3), bilevel.CG(preconditioner=bilevel.Kronecker.like(torch.zeros(2, 3)))
    ys = torch.stack([y, y.flip(0), 2 * y])

    def slope(layer: bilevel.Layer) -> torch.Tensor:
        return torch.func.vmap(torch.func.jacrev(lambda y: layer(init, y)))(ys)

    torch.testing.assert_close(
        slope(bilevel.argmin(loss, linear_solver=linear)), slope(bilevel.argmin(loss)), rtol=1e-4, atol=1e-5
    )


def test_a_long_side_has_a_diagonal_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bilevel.linear.kronecker._LONGEST_SIDE", 3)
    H, solver = spd(12, 0), bilevel.Kronecker([(4, 3)])
    block = solver.factor(DenseOperator(H, symmetric=True)).blocks[0]
    assert block.left is None and block.right is not None


def test_matrices_that_are_not_finite_are_a_failure_of_their_own() -> None:
    H = spd(6, 0, batch=2)
    H[0, 0, 0] = float("nan")
    found = solve_linear(bilevel.Kronecker([(2, 3)]), DenseOperator(H, symmetric=True), right(2, 6), SILENT)
    assert [Status(int(code)).success for code in found.status] == [False, True]


def test_kept_makes_a_preconditioner_for_several_matrices() -> None:
    made = []

    class Counted(bilevel.Nystrom):
        def factor(self, base: bilevel.LinearOperator):  # type: ignore[no-untyped-def]
            made.append(base.size)
            return super().factor(base)

    kept = bilevel.Kept(Counted(rank=3, rho=0.1), refresh=3)
    linear, target = bilevel.CG(preconditioner=kept), Tolerance().linear(F64)
    for k in range(7):
        H, b = spd(6, k), right(1, 6)
        operator = DenseOperator(H, symmetric=True)
        for _ in range(2):  # the same matrix again counts once
            found = solve_linear(linear, operator, b, target)
        torch.testing.assert_close(found.x, torch.linalg.solve(H, b.unsqueeze(-1)).squeeze(-1))
    assert made == [6, 6, 6]
    solve_linear(linear, DenseOperator(spd(4, 0), symmetric=True), right(1, 4), target)
    assert made == [6, 6, 6, 4]


def test_kept_does_not_keep_what_is_not_finite() -> None:
    kept = bilevel.Kept(bilevel.Nystrom(rank=2, rho=0.1))
    bad = torch.full((1, 4, 4), float("nan"), dtype=F64)
    kept.preconditioner(DenseOperator(bad, symmetric=True))
    assert bool(torch.isfinite(kept.preconditioner(DenseOperator(spd(4, 0), symmetric=True))(right(1, 4))).all())


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="expected probes"):
        bilevel.Kronecker([(2,)], probes=0)
    with pytest.raises(ValueError, match="expected rho"):
        bilevel.Kronecker([(2,)], rho=0.0)
    with pytest.raises(ValueError, match=r"Kronecker\.like"):
        bilevel.Kronecker(3)  # type: ignore[arg-type]
    with pytest.raises(bilevel.ShapeError, match="expected shapes with 3 numbers"):
        bilevel.Kronecker([(2, 2)])(DenseOperator(torch.eye(3), symmetric=True), torch.ones(1, 3))
    with pytest.raises(ValueError, match="expected a symmetric"):
        bilevel.Kronecker([(3,)])(DenseOperator(torch.eye(3)), torch.ones(1, 3))
    with pytest.raises(ValueError, match="expected approximation"):
        bilevel.Kept(bilevel.CG())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected refresh"):
        bilevel.Kept(bilevel.Nystrom(), refresh=0)
