"""What a report proves of a solution with a proximal term: its distance, and which of its entries are zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import bilevel
from bilevel import prox
from bilevel.reports import Basis

F64 = torch.float64


def squares(w: torch.Tensor, X: torch.Tensor, y: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    return ((X @ w - y) ** 2).sum() / (2 * len(y))


def regression(n: int, d: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, d, generator=generator, dtype=F64)
    w = torch.zeros(d, dtype=F64)
    w[: d // 4] = torch.randn(d // 4, generator=generator, dtype=F64)
    return X, X @ w + 0.3 * torch.randn(n, generator=generator, dtype=F64)


GROUPS = [[0, 1, 2], [3, 4], [5], [6, 7, 8, 9]]


def by_blocks(X: torch.Tensor, y: torch.Tensor, l1: float, l2: float, groups: list[list[int]], positive: bool) -> Any:
    """Return the solution by descent along blocks: exactly in blocks of one unknown, else by proximal steps."""
    n, d = X.shape
    H, b = (X.T @ X / n).numpy() + l2 * np.eye(d), (X.T @ y / n).numpy()
    blocks = [*groups, *([i] for i in range(d) if all(i not in g for g in groups))]
    steps = [1 / np.linalg.eigvalsh(H[np.ix_(g, g)])[-1] for g in blocks]
    w = np.zeros(d)
    for _ in range(6000):
        before = w.copy()
        for g, s in zip(blocks, steps, strict=True):
            v = w[g] - s * (H[g] @ w - b[g])
            size = np.linalg.norm(v)
            w[g] = np.maximum(v, 0) if positive else v * max(0.0, 1 - s * l1 / size) if size else 0 * v
        if np.abs(w - before).max() <= 4e-16 * np.abs(w).max():
            break
    return torch.as_tensor(w)


Case = tuple[Callable[..., prox.Term], float, float, list[list[int]], bool]
CASES: dict[str, Case] = {
    "lasso": (lambda X, y, s: prox.L1(s), 0.1, 0.0, [], False),
    "elastic net": (lambda X, y, s: prox.ElasticNet(s, 0.5), 0.1, 0.5, [], False),
    "groups": (lambda X, y, s: prox.GroupL2(s, GROUPS), 0.3, 0.0, GROUPS, False),
    "nonnegative": (lambda X, y, s: prox.NonNegative(), 0.0, 0.0, [], True),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("steps", [3, 10, 40, None])
def test_proofs_hold_and_grow_with_the_accuracy(name: str, steps: int | None) -> None:
    term, l1, l2, groups, positive = CASES[name]
    decided = []
    for seed in range(6):
        X, y = regression(30, 10, seed)
        if name == "groups":  # entries in no group have no term
            X, y = X[:, :10], y
        reference = by_blocks(X, y, l1, l2, groups, positive)
        solver = None if steps is None else bilevel.ProximalGradient(max_steps=steps, polish=False)
        tolerance = None if steps is None else bilevel.Tolerance(delta=None)
        layer = bilevel.argmin(squares, prox=term, solver=solver, tolerance=tolerance)
        found = layer.solve(torch.zeros(10, dtype=F64), X, y, torch.tensor(l1, dtype=F64))
        report = found.report
        assert bool(report.certified) and report.basis is Basis.CERTIFIED
        assert (found.value - reference).norm() <= report.error_bound + 1e-14
        zero = reference.abs() < 1e-13
        for group in groups:
            zero[group] = zero[group].all()
        assert not bool((report.proven_zero & ~zero).any())
        assert not bool((report.proven_nonzero & zero).any())
        decided.append((report.proven_zero | report.proven_nonzero).double().mean())
    share = float(torch.stack(decided).mean())
    if steps is None:
        assert share == 1.0
    elif steps == 40:
        assert share > 0.5


def test_an_elastic_net_with_more_unknowns_than_rows_is_convex_enough() -> None:
    X, y = regression(20, 60, 0)
    layer = bilevel.argmin(squares, prox=lambda X, y, s: prox.ElasticNet(s, torch.full((60,), 0.2, dtype=F64)))
    found = layer.solve(torch.zeros(60, dtype=F64), X, y, torch.tensor(0.1, dtype=F64))
    reference = by_blocks(X, y, 0.1, 0.2, [], False)
    assert bool(found.report.certified) and (found.value - reference).norm() <= found.report.error_bound + 1e-13
    assert torch.equal(found.report.proven_zero, reference == 0)
    assert torch.equal(found.report.proven_nonzero, reference != 0)


def test_a_lasso_with_more_unknowns_than_rows_is_estimated() -> None:
    X, y = regression(20, 60, 0)
    report = (
        bilevel.argmin(squares, prox=prox.L1(0.1)).solve(torch.zeros(60, dtype=F64), X, y, torch.tensor(0.0)).report
    )
    assert report.basis is Basis.ESTIMATED and not bool(report.certified)
    assert not bool(report.proven_zero.any()) and not bool(report.proven_nonzero.any())
    assert "estimated" in str(report)


def test_an_entry_at_its_threshold_is_not_decided() -> None:
    a = torch.tensor([0.5, 0.25, -2.0], dtype=F64)
    layer = bilevel.argmin(lambda x, a: 0.5 * ((x - a) ** 2).sum(), prox=lambda a: prox.L1(0.5), on_failure="ignore")
    report = layer.solve(torch.zeros(3, dtype=F64), a).report
    assert report.proven_zero.tolist() == [False, True, False]
    assert report.proven_nonzero.tolist() == [False, False, True]


def logistic(w: torch.Tensor, X: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.softplus(-y * (X @ w)).mean() + 0.05 * (w**2).sum()


def test_declared_constants_prove_what_no_structure_does() -> None:
    X, y = regression(50, 8, 3)
    y = y.sign()
    most = float(torch.linalg.eigvalsh(X.T @ X)[-1]) / 50 / 4 + 0.1
    start, term = torch.zeros(8, dtype=F64), prox.L1(0.05)
    alone = bilevel.argmin(logistic, prox=term).solve(start, X, y).report
    assert alone.basis is Basis.ESTIMATED and not bool(alone.proven_zero.any())
    fine = bilevel.argmin(logistic, prox=term)(start, X, y)
    declared = bilevel.Tolerance(strong_convexity=0.1, smoothness=most)
    report = bilevel.argmin(logistic, prox=term, tolerance=declared).solve(start, X, y).report
    assert bool(report.certified) and torch.equal(report.proven_zero, fine == 0)
    assert torch.equal(report.proven_nonzero, fine != 0) and bool((fine == 0).any())
    half = bilevel.Tolerance(strong_convexity=0.1)
    report = bilevel.argmin(logistic, prox=term, tolerance=half).solve(start, X, y).report
    assert bool(report.certified) and not bool(report.proven_zero.any()) and bool(report.proven_nonzero.any())


def test_a_batch_under_vmap_and_in_float32() -> None:
    X, y = regression(40, 6, 1)
    X, y = X.float(), y.float()
    layer = bilevel.argmin(squares, prox=lambda X, y, s: prox.L1(s))
    strengths = torch.tensor([0.05, 0.2, 1.0])
    found = torch.func.vmap(lambda s: layer.solve(torch.zeros(6), X, y, s))(strengths)
    for i, s in enumerate(strengths.double()):
        reference = by_blocks(X.double(), y.double(), float(s), 0.0, [], False)
        assert (found.value[i].double() - reference).norm() <= found.report.error_bound[i]
        assert not bool((found.report.proven_zero[i] & (reference != 0)).any())
        assert not bool((found.report.proven_nonzero[i] & (reference == 0)).any())
    decided = found.report.proven_zero | found.report.proven_nonzero
    assert decided.double().mean() > 0.8


def test_what_has_changed_since_proves_nothing() -> None:
    X, y = regression(40, 6, 1)
    strength = torch.tensor(0.2, dtype=F64)
    layer = bilevel.argmin(squares, prox=lambda X, y, s: prox.L1(s))
    report = layer.solve(torch.zeros(6, dtype=F64), X, y, strength).report
    strength += 0.1
    assert report.basis is Basis.RESIDUAL and report.proven_zero is None
    captured = torch.tensor(0.2, dtype=F64)
    report = bilevel.argmin(squares, prox=lambda X, y: prox.L1(captured)).solve(torch.zeros(6, dtype=F64), X, y).report
    captured += 0.1
    assert report.basis is Basis.RESIDUAL and report.proven_zero is None


def test_a_bilevel_problem_reports_them_too() -> None:
    X, y = regression(40, 6, 1)

    class Sparse(bilevel.BilevelProblem):
        def inner_objective(self, inner: Any, outer: Any, data: Any) -> torch.Tensor:
            return squares(inner, *data)

        def inner_prox(self, outer: Any, data: Any) -> prox.Term:
            return prox.L1(outer.exp())

        def outer_objective(self, inner: Any, outer: Any, data: Any) -> torch.Tensor:
            return (inner**2).sum()

    result = Sparse().hypergradient(torch.tensor(-1.5, dtype=F64), (X, y), init=torch.zeros(6, dtype=F64))
    forward = result.report.forward
    assert bool(forward.certified) and bool((forward.proven_zero | forward.proven_nonzero).all())
    assert bool(forward.proven_zero.any())
