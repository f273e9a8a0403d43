"""Support vector machines, bilevel problems with inner constraints, and a property that all problems share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import jacrev

import bilevel

F64 = torch.float64


def data(seed: int, n: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.where(torch.arange(n) % 2 == 0, 1.0, -1.0).to(F64)
    X = torch.randn(n, 3, dtype=F64, generator=generator) + 0.6 * y[:, None]
    return X, y


def test_support_vector_machine_is_scikit_learns() -> None:
    svm = pytest.importorskip("sklearn.svm")
    X, y = data(0)
    dual = bilevel.argmin(
        lambda a, X, y, C: 0.5 * ((y * a) @ X).square().sum() + 5e-4 * a.square().sum() - a.sum(),
        lower=0.0,
        upper=lambda X, y, C: C,
        equality=lambda a, X, y, C: y @ a,
    )
    C = torch.tensor(0.7, dtype=F64)
    solution = dual.solve(torch.zeros(30, dtype=F64), X, y, C)
    K = (X @ X.T + 1e-3 * torch.eye(30, dtype=F64)).numpy()
    reference = svm.SVC(C=0.7, kernel="precomputed", tol=1e-10).fit(K, y.numpy())
    expected = np.zeros(30)
    expected[reference.support_] = np.abs(reference.dual_coef_[0])
    np.testing.assert_allclose(solution.value.numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(abs(solution.multipliers.equality.item()), abs(reference.intercept_[0]), atol=1e-6)
    call = lambda C: dual(torch.zeros(30, dtype=F64), X, y, C)
    differences = (call(C + 1e-6) - call(C - 1e-6)) / 2e-6
    torch.testing.assert_close(jacrev(call)(C), differences, rtol=1e-5, atol=1e-7)


class Capped(bilevel.BilevelProblem):
    def inner_objective(self, inner: Any, outer: Any, data: Any) -> torch.Tensor:
        return ((inner - data) ** 2).sum()

    def outer_objective(self, inner: Any, outer: Any, data: Any) -> torch.Tensor:
        return (inner**3).sum()

    def inner_constraints(self, outer: Any, data: Any) -> bilevel.Constraints:
        return bilevel.Constraints(upper=outer[0], equality=lambda x, outer, data: x.sum() - outer[1])


def test_a_problem_with_inner_constraints() -> None:
    outer, target = torch.tensor([1.0, 2.0], dtype=F64), torch.tensor([3.0, 0.2, 0.1], dtype=F64)
    init = torch.zeros(3, dtype=F64)
    problem = Capped()
    # x = (cap, t + 0.05, t − 0.05), 2 t = total − cap
    closed = lambda o: o[0] ** 3 + ((o[1] - o[0]) / 2 + 0.05) ** 3 + ((o[1] - o[0]) / 2 - 0.05) ** 3
    theta = outer.clone().requires_grad_(True)
    loss = problem(theta, target, init=init)
    loss.backward()
    torch.testing.assert_close(loss.detach(), closed(outer))
    torch.testing.assert_close(theta.grad, jacrev(closed)(outer))
    result = problem.hypergradient(outer, target, init=init)
    torch.testing.assert_close(result.grad, jacrev(closed)(outer))
    assert not result.certified
    assert "error not known" in str(result)
    both = Capped(batch_dims=0).hypergradient(
        outer, torch.stack([target, target + 1]), init=torch.zeros(2, 3, dtype=F64)
    )
    torch.testing.assert_close(both.grad, jacrev(closed)(outer))


def test_a_goal_for_a_problem_with_constraints_is_refused() -> None:
    problem = Capped(tolerance=bilevel.Tolerance(hypergradient=1e-3))
    outer = torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True)
    with pytest.raises(bilevel.ArgumentError, match="inner_constraints, got the goal"):
        problem(outer, torch.zeros(3, dtype=F64), init=torch.zeros(3, dtype=F64))


@given(seed=st.integers(0, 10**6), n=st.integers(1, 5), m=st.integers(0, 4), p=st.integers(0, 2))
def test_kkt_conditions_and_derivatives(seed: int, n: int, m: int, p: int) -> None:
    """Random convex problems: KKT residuals, complementarity, and the derivative against differences unless refused."""
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, dtype=F64, generator=generator)
    p = min(p, n - 1)
    root, q, G, B = random(n, n), random(n), random(m, n), random(p, n)
    inside = 0.3 * random(n)
    h, b = G @ inside + random(m).abs(), B @ inside

    def f(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return 0.5 * (root @ x).square().sum() + 0.1 * (x**4).sum() + 3 * q @ x

    stated: dict[str, Any] = {"lower": -1.5, "upper": 1.5}
    if m:
        stated["inequality"] = lambda x, q: G @ x - h
    if p:
        stated["equality"] = lambda x, q: B @ x - b
    layer = bilevel.argmin(f, **stated)
    call = lambda q: layer(torch.zeros(n, dtype=F64), q)
    solution = layer.solve(torch.zeros(n, dtype=F64), q)
    x, multipliers = solution.value, solution.multipliers
    slope = jacrev(f)(x, q) - multipliers.lower + multipliers.upper
    if m:
        slope = slope + G.T @ multipliers.inequality
        assert bool((G @ x - h <= 1e-9).all())
        assert bool((multipliers.inequality >= 0).all())
        assert float((multipliers.inequality * (G @ x - h)).abs().max()) <= 1e-8
    if p:
        slope = slope + B.T @ multipliers.equality
        assert float((B @ x - b).abs().max()) <= 1e-9
    assert float(slope.abs().max()) <= 1e-7
    assert bool(((x >= -1.5) & (x <= 1.5)).all())
    try:
        found = jacrev(call)(q)
    except bilevel.SolveError as error:
        if error.report.status is not bilevel.Status.DEGENERATE:
            raise
        return
    step = 1e-6
    active = [_active(layer.solve(x, q + sign * step * e)) for sign in (1, -1) for e in torch.eye(n, dtype=F64)]
    if any(other != _active(solution) for other in active):
        return  # a constraint changes within the step of the differences
    columns = [(call(q + step * e) - call(q - step * e)) / (2 * step) for e in torch.eye(n, dtype=F64)]
    torch.testing.assert_close(found, torch.stack(columns, -1), rtol=1e-4, atol=1e-6)


def _active(solution: bilevel.Solution[torch.Tensor]) -> list[list[bool]]:
    kept = solution.active
    return [part.tolist() for part in (kept.lower, kept.upper, kept.inequality) if part is not None]
