"""Sparse programs by Clarabel: the same answers, derivatives and refusals as dense ones."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck
from torch.func import jacfwd, jacrev, vmap

import bilevel
from bilevel import Status, quadratic_program
from tests.quadratic_programs.programs import F64, OSQP_CLASSES, Data, random_program
from tests.quadratic_programs.test_failures import INFEASIBLE, UNBOUNDED

pytest.importorskip("clarabel", reason="Clarabel is an extra, and is not installed")


def sparse(data: Data, layout: torch.layout = torch.sparse_coo) -> Data:
    return {name: t.to_sparse(layout=layout) if name in "QAG" else t for name, t in data.items()}


def scattered(seed: int = 0) -> Data:
    """A program whose matrices have zeros."""
    torch.manual_seed(seed)
    data = random_program(8, 2, 6)
    hide = torch.rand(6, 8) < 0.5
    data["G"] = torch.where(hide, 0.0, data["G"])
    data["Q"] = (
        torch.where(torch.eye(8) + torch.eye(8).roll(1, 0) + torch.eye(8).roll(1, 1) > 0, data["Q"], 0.0)
        + torch.eye(8) * 3
    )
    middle = (data["lower"] + data["upper"]) / 2
    data["h"], data["b"] = data["G"] @ middle + torch.rand(6, dtype=F64), data["A"] @ middle
    return data


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.parametrize("name", OSQP_CLASSES)
def test_sparse_is_dense(name: str, layout: torch.layout) -> None:
    data = OSQP_CLASSES[name](np.random.default_rng(0))
    vectors = {k: v for k, v in data.items() if k not in "QAG"}
    grads = []
    solutions = []
    for matrices in (data, sparse(data, layout)):
        leaves = {k: v.clone().requires_grad_() for k, v in vectors.items()}
        solution = quadratic_program.solve(**{**matrices, **leaves})
        weights = torch.arange(1.0, len(data["q"]) + 1, dtype=F64)
        grads.append(
            torch.autograd.grad((weights * solution.value).sum(), list(leaves.values()), materialize_grads=True)
        )
        solutions.append(solution)
    torch.testing.assert_close(solutions[1].value, solutions[0].value, rtol=1e-9, atol=1e-10)
    assert torch.equal(solutions[1].active.inequality, solutions[0].active.inequality)
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def test_gradients_of_the_entries() -> None:
    data = scattered()
    dense = {name: t.clone().requires_grad_() for name, t in data.items()}
    quadratic_program(**dense).square().sum().backward()
    leaves = {name: (t.to_sparse_coo() if name in "QAG" else t.clone()).requires_grad_() for name, t in data.items()}
    quadratic_program(**leaves).square().sum().backward()
    for name, leaf in leaves.items():
        expected, found = dense[name].grad, leaf.grad
        assert expected is not None and found is not None
        if name in "QAG":
            expected, found = torch.where(data[name] != 0, expected, 0.0), found.to_dense()
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


def test_gradcheck_through_the_values_in_both_modes() -> None:
    data = scattered()
    places = data["G"].nonzero().T
    values = data["G"][tuple(places)]
    others = {name: t for name, t in sparse(data).items() if name not in ("G", "q")}

    def f(v: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return quadratic_program(
            q=q, G=torch.sparse_coo_tensor(places, v, data["G"].shape, check_invariants=True), **others
        )

    q = data["q"].clone().requires_grad_()
    assert gradcheck(f, (values.clone().requires_grad_(), q), fast_mode=True)
    others["G"] = data["G"].to_sparse_coo()
    by_q = lambda v: quadratic_program(q=v, **others)
    torch.testing.assert_close(jacfwd(by_q)(data["q"]), jacrev(by_q)(data["q"]), rtol=1e-9, atol=1e-10)
    qs = torch.randn(3, 8, dtype=F64)
    torch.testing.assert_close(vmap(by_q)(qs), torch.stack([by_q(one) for one in qs]), rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(quadratic_program(q=qs, **others), vmap(by_q)(qs), rtol=1e-10, atol=1e-11)


def test_second_derivatives() -> None:
    data = scattered()
    others = {name: t for name, t in sparse(data).items() if name != "q"}
    second = jacrev(jacrev(lambda q: quadratic_program(q=q, **others).square().sum()))(data["q"])
    again = scattered()
    expected = jacrev(jacrev(lambda q: quadratic_program(**{**again, "q": q}).square().sum()))(again["q"])
    torch.testing.assert_close(second, expected, rtol=1e-8, atol=1e-9)
    places = again["G"].nonzero().T
    values = again["G"][tuple(places)].requires_grad_()
    G = torch.sparse_coo_tensor(places, values, again["G"].shape, check_invariants=True)
    x = quadratic_program(**{**sparse(again), "G": G})
    with pytest.raises(bilevel.ArgumentError, match="differentiated twice"):
        torch.autograd.grad(x.sum(), values, create_graph=True)


@pytest.mark.parametrize("name", [name for name in INFEASIBLE if name != "far"])
def test_infeasible_programs(name: str) -> None:
    solution = quadratic_program.solve(**sparse(INFEASIBLE[name]), on_failure="ignore")
    assert solution.report.status is Status.INFEASIBLE
    assert any(float(part.abs().max()) > 0 for part in solution.certificate[1:] if part.numel())


@pytest.mark.parametrize("name", UNBOUNDED)
def test_unbounded_programs(name: str) -> None:
    data = UNBOUNDED[name]
    solution = quadratic_program.solve(**sparse(data), on_failure="ignore")
    assert solution.report.status is Status.UNBOUNDED
    assert data["q"] @ solution.certificate.direction == pytest.approx(-1.0)


def test_faults_are_named() -> None:
    eye, q = torch.eye(3, dtype=F64), torch.tensor([0.0, 1.0, -1.0], dtype=F64, requires_grad=True)
    tilted = torch.tensor([[1.0, 3.0, 0.0], [3.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=F64)
    for Q in (-eye, tilted):
        with pytest.raises(bilevel.SolveError, match="not positive semidefinite"):
            quadratic_program(Q.to_sparse(), q, lower=0.0)
    with pytest.raises(bilevel.SolveError, match=r"the lower bound of x\[0\]"):
        quadratic_program(eye.to_sparse(), q, lower=0.0).sum().backward()
    with pytest.raises(bilevel.SolveError, match="not unique"):
        quadratic_program(0 * eye.to_sparse(), q, lower=0.0, upper=1.0)[0].backward()
    with pytest.raises(bilevel.ArgumentError, match="to_dense"):
        quadratic_program(eye.to_sparse(), q, lower=0.0, smoothing=1e-3)
    with pytest.raises(bilevel.ArgumentError, match="to_dense"):
        quadratic_program(eye.to_sparse(), q, solver=bilevel.Mehrotra())
    with pytest.raises(bilevel.ShapeError, match="without batch axes"):
        quadratic_program(eye.expand(2, 3, 3).to_sparse(), q)
    with pytest.raises(bilevel.DtypeError, match="to_sparse_coo"):
        quadratic_program(eye.to_sparse_csc(), q)


def test_fixed_unknowns_and_dense_programs() -> None:
    data = scattered()
    data["lower"] = torch.where(torch.arange(8) < 3, data["upper"], data["lower"])
    del data["G"], data["h"], data["A"], data["b"]
    expected = quadratic_program(**data)
    torch.testing.assert_close(quadratic_program(**sparse(data)), expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(quadratic_program(**data, solver=bilevel.Clarabel()), expected, rtol=1e-9, atol=1e-10)


def test_without_clarabel_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "clarabel", None)  # as where it is not installed
    with pytest.raises(bilevel.ArgumentError, match=r"pip install '\.\[qp\]'"):
        quadratic_program(torch.eye(3, dtype=F64).to_sparse(), torch.ones(3, dtype=F64))


@pytest.mark.parametrize("seed", [15, 27, 28, 29])
def test_active_sets_that_go_round_in_a_circle_are_left(seed: int) -> None:
    """Many constraints meet at the solution. Changed all at once, the active sets of these programs repeat."""
    draw = torch.Generator().manual_seed(seed)
    B = torch.randn(4, 12, generator=draw, dtype=F64)
    G = torch.randn(16, 12, generator=draw, dtype=F64).sign()
    weights = torch.rand(16, generator=draw, dtype=F64) * (torch.rand(16, generator=draw) < 0.4)
    Q, q, h = B.T @ B, -(G.T @ weights), torch.zeros(16, dtype=F64)
    solution = quadratic_program.solve(Q.to_sparse(), q, G=G.to_sparse(), h=h, lower=-1.0, upper=1.0)
    dense = quadratic_program(Q, q, G=G, h=h, lower=-1.0, upper=1.0)
    value = lambda x: 0.5 * x @ Q @ x + q @ x
    assert solution.report.status is Status.CONVERGED
    assert float(value(solution.value)) == pytest.approx(float(value(dense)), abs=1e-9)


def test_a_proof_of_infeasibility_names_few_rows() -> None:
    torch.manual_seed(0)
    eye = torch.eye(4, dtype=F64)
    G = torch.cat([eye[:1], -eye[:1], torch.randn(12, 4, dtype=F64)])
    h = torch.cat([torch.tensor([0.0, -1.0], dtype=F64), torch.full((12,), 0.5, dtype=F64)])
    arguments = (eye.to_sparse(), torch.zeros(4, dtype=F64))
    with pytest.raises(bilevel.SolveError, match=r"row 0 of G x <= h, row 1 of G x <= h contradict each other"):
        quadratic_program(*arguments, G=G.to_sparse(), h=h)
    proof = quadratic_program.solve(*arguments, G=G.to_sparse(), h=h, on_failure="ignore").certificate.inequality
    torch.testing.assert_close(proof @ G, torch.zeros(4, dtype=F64), rtol=0, atol=1e-9)
    assert float(proof @ h) == pytest.approx(-1) and int((proof > 1e-9).sum()) == 2


@pytest.mark.parametrize("unit", [1e-20, 1e-12, 1e12])
@pytest.mark.parametrize("layout", ["dense", "sparse"])
def test_rows_in_any_unit_are_the_same_constraints(unit: float, layout: str) -> None:
    """x₀ + x₁ = 1, or at most 1, in small and large units: x = (0, 1), dx₀/db = ½, ν = 1 in units of one."""
    given = (lambda t: t.to_sparse()) if layout == "sparse" else (lambda t: t)
    Q, q = given(torch.eye(2, dtype=F64)), torch.tensor([-1.0, -2.0], dtype=F64)
    rows = given(torch.full((1, 2), unit, dtype=F64))
    for names in (("A", "b"), ("G", "h")):
        side = torch.tensor([unit], dtype=F64, requires_grad=True)
        solution = quadratic_program.solve(Q, q, **dict(zip(names, (rows, side), strict=True)))
        torch.testing.assert_close(solution.value.detach(), torch.tensor([0.0, 1.0], dtype=F64))
        (slope,) = torch.autograd.grad(solution.value[0], side)
        assert slope.item() * unit == pytest.approx(0.5)
        multipliers = solution.multipliers.equality if names[0] == "A" else solution.multipliers.inequality
        assert multipliers.item() * unit == pytest.approx(1.0)
