"""What has no solution or no derivative is named, problem by problem, with a proof or a remedy."""

from __future__ import annotations

import pickle
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch.func import jacfwd, vmap

import bilevel
from bilevel import Status, cone_program, cones
from bilevel.cones import Cone
from tests.cones.programs import CONES, F64, random_program

EYE = torch.eye(3, dtype=F64)
Q3 = torch.tensor([1.0, -2.0, 0.5], dtype=F64)


def vector(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=F64)


# x in a second-order cone: (x₀, x₁, x₂) with ‖(x₁, x₂)‖ ≤ x₀.
INFEASIBLE: dict[str, tuple[torch.Tensor, torch.Tensor, list[Cone]]] = {
    "equations": (torch.ones(2, 3, dtype=F64), vector(1, 2), [cones.Zero(2)]),
    "inequalities": (torch.tensor([[1.0, 0, 0], [-1, 0, 0]], dtype=F64), vector(-1, 0), [cones.Nonnegative(2)]),
    "a norm below zero": (
        torch.cat([EYE[:1], -EYE]),
        vector(-1, 0, 0, 0),
        [cones.Nonnegative(1), cones.SecondOrder(3)],
    ),
    "a negative diagonal": (torch.cat([EYE[:1], -EYE]), vector(-1, 0, 0, 0), [cones.Zero(1), cones.PSDTriangle(2)]),
}


@pytest.mark.parametrize("name", INFEASIBLE)
def test_infeasible_problems_have_a_ray(name: str) -> None:
    A, b, factors = INFEASIBLE[name]
    solution = cone_program.solve(EYE, Q3, A, b, factors, on_failure="ignore")
    assert solution.report.status is Status.INFEASIBLE
    y = solution.certificate.multipliers
    assert b @ y == pytest.approx(-1.0) and (A.mT @ y).abs().max() < 1e-6 * y.abs().max()
    last = y[-3:]
    if isinstance(factors[-1], cones.SecondOrder):
        assert last[1:].norm() <= last[0] + 1e-7
    elif isinstance(factors[-1], cones.PSDTriangle):
        assert torch.linalg.eigvalsh(factors[-1].matrix(last)).min() >= -1e-7
    elif isinstance(factors[-1], cones.Nonnegative):
        assert y.min() >= 0
    with pytest.raises(bilevel.SolveError, match=r"cones\[0\].*contradict each other"):
        cone_program(EYE, Q3, A, b, factors)


UNBOUNDED: dict[str, tuple[torch.Tensor, list[Cone]]] = {
    "free": (torch.zeros(0, 3, dtype=F64), []),
    "second-order": (-EYE, [cones.SecondOrder(3)]),
    "semidefinite": (-EYE, [cones.PSDTriangle(2)]),
}


@pytest.mark.parametrize("name", UNBOUNDED)
def test_unbounded_problems_have_a_direction(name: str) -> None:
    A, factors = UNBOUNDED[name]
    solution = cone_program.solve(None, Q3, A, 0.0, factors, on_failure="ignore")
    assert solution.report.status is Status.UNBOUNDED
    d = solution.certificate.direction
    assert Q3 @ d == pytest.approx(-1.0)
    if factors:
        torch.testing.assert_close(factors[0].project(d), d, rtol=0, atol=1e-6)
    with pytest.raises(bilevel.SolveError, match="falls without end"):
        cone_program(None, Q3, A, 0.0, factors)


def mixed() -> tuple[dict[str, torch.Tensor], list[Status]]:
    """A batch of: a plain problem, an infeasible, an unbounded, a non-convex, one that is not finite."""
    A = torch.cat([EYE[:1], -EYE])
    good = {"P": EYE, "q": Q3, "A": A, "b": vector(5, 0, 0, 0)}
    changes = [
        {}, {"b": vector(-1, 0, 0, 0)}, {"P": 0 * EYE, "A": 0 * A}, {"P": -EYE}, {"q": vector(1, torch.nan, 0)},
    ]  # fmt: skip
    problems = [{**good, **change} for change in changes]
    expected = [Status.CONVERGED, Status.INFEASIBLE, Status.UNBOUNDED, Status.INDEFINITE, Status.NOT_FINITE]
    return {name: torch.stack([one[name] for one in problems]) for name in good}, expected


MIXED: list[Cone] = [cones.Nonnegative(1), cones.SecondOrder(3)]


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("policy", ["nan", "ignore", "warn"])
def test_each_problem_of_a_batch_has_its_own_status(batched: bool, policy: Any) -> None:
    data, expected = mixed()
    q = data["q"].requires_grad_()
    solve = lambda *args: cone_program.solve(*args, MIXED, on_failure=policy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bilevel.SolveWarning)
        solution = (vmap(solve) if batched else solve)(*data.values())
        x = solution.value
        assert list(solution.report.status) == expected
        (grad,) = torch.autograd.grad(torch.where(torch.isnan(x), 0.0, x).sum(), q)
    for i, status in enumerate(expected):
        good = status is Status.CONVERGED
        assert bool(torch.isnan(x[i]).any()) != good and bool(torch.isnan(grad[i]).any()) != good


KINKS: dict[str, tuple[tuple[float, ...], Cone]] = {
    "inequality": ((1.0, 0.0, -1.0), cones.Nonnegative(3)),
    "boundary": ((5.0, 3.0, 4.0), cones.SecondOrder(3)),
    "polar": ((-5.0, 3.0, 4.0), cones.SecondOrder(3)),
    "apex": ((0.0, 0.0, 0.0), cones.SecondOrder(3)),
    "rank": ((1.0, 2**0.5, 1.0), cones.PSDTriangle(2)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", KINKS)
def test_a_kink_is_named_and_smoothing_helps(name: str, dtype: torch.dtype) -> None:
    numbers, cone = KINKS[name]
    point, one = torch.tensor(numbers, dtype=dtype, requires_grad=True), torch.eye(3, dtype=dtype)
    if dtype == torch.float32 and name == "rank":
        pytest.skip("√2 is not a number of single precision")
    x = cone_program(one, -point, -one, 0.0, [cone])
    torch.testing.assert_close(x.detach(), cone.project(point.detach()), rtol=1e-4, atol=1e-4)
    with pytest.raises(bilevel.SolveError, match=r"strict complementarity.*cones\[0\].*smoothing") as raised:
        x.sum().backward()
    assert raised.value.report.status is Status.DEGENERATE
    smooth = cone_program(one, -point, -one, 0.0, [cone], smoothing=1e-6)
    (grad,) = torch.autograd.grad(smooth.sum(), point)
    assert torch.isfinite(grad).all()
    one_sided = cone_program(one, -point, -one, 0.0, [cone], on_failure="ignore")
    assert torch.isfinite(torch.autograd.grad(one_sided.sum(), point)[0]).all()


# Losses whose derivatives meet no kink: those along which the projection is smooth.
SMOOTH: dict[str, tuple[float, ...]] = {
    "inequality": (1.0, 0.0, 2.0),
    "boundary": (0.0, 4.0, -3.0),
    "rank": (1.0, 0.0, -1.0),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_a_derivative_that_meets_no_kink_is_given(name: str) -> None:
    numbers, cone = KINKS[name]
    weights = vector(*SMOOTH[name])
    point = vector(*numbers).requires_grad_()
    loss = lambda p: cone_program(EYE, -p, -EYE, 0.0, [cone], on_failure="ignore") @ weights
    (found,) = torch.autograd.grad(cone_program(EYE, -point, -EYE, 0.0, [cone]) @ weights, point)
    with torch.no_grad():
        sides = [torch.stack([(loss(point + h * e) - loss(point)) / h for e in EYE]) for h in (1e-6, -1e-6)]
    for side in sides:
        torch.testing.assert_close(found, side, rtol=0, atol=5e-6)


def test_a_second_derivative_at_a_curved_kink_is_refused() -> None:
    point = vector(5.0, 3.0, 4.0).requires_grad_()
    x = cone_program(EYE, -point, -EYE, 0.0, [cones.SecondOrder(3)])
    with pytest.raises(bilevel.SolveError, match="strict complementarity"):
        (slope,) = torch.autograd.grad(x @ vector(0.0, 4.0, -3.0), point, create_graph=True)
        slope.sum().backward()


def test_a_proof_of_infeasibility_names_few_rows() -> None:
    torch.manual_seed(0)
    A = torch.cat([EYE[:1], -EYE[:1], torch.randn(12, 3, dtype=F64)])
    b = torch.cat([vector(0, -1), torch.full((12,), 0.5, dtype=F64)])
    with pytest.raises(bilevel.SolveError, match=r"row 0 .*; row 1 .* contradict each other"):
        cone_program(EYE, Q3, A, b, [cones.Nonnegative(14)])
    proof = cone_program.solve(EYE, Q3, A, b, [cones.Nonnegative(14)], on_failure="ignore").certificate.multipliers
    torch.testing.assert_close(proof @ A, torch.zeros(3, dtype=F64), rtol=0, atol=1e-9)
    assert bool((proof >= 0).all()) and float(proof @ b) == pytest.approx(-1)
    assert int((proof > 1e-9).sum()) == 2


def test_a_solution_that_is_not_unique_has_no_derivative() -> None:
    q = vector(1.0, 1.0, 0.0).requires_grad_()
    A, b = torch.cat([-EYE, EYE[2:]]), vector(0, 0, 0, 1)
    with pytest.raises(bilevel.SolveError, match=r"not unique|strict complementarity"):
        cone_program(None, q, A, b, [cones.Nonnegative(4)]).sum().backward()


def test_redundant_equations_leave_the_derivative_in_q() -> None:
    A, b = torch.ones(2, 3, dtype=F64), vector(1, 1).requires_grad_()
    q = Q3.clone().requires_grad_()
    factors = [cones.Zero(2)]
    x = cone_program(EYE, q, A, b.detach(), factors)
    (grad,) = torch.autograd.grad(x[0], q)
    torch.testing.assert_close(grad, vector(-2 / 3, 1 / 3, 1 / 3))
    with pytest.raises(bilevel.SolveError):
        cone_program(EYE, q, A, b, factors)[0].backward()


def test_misuse_is_told_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    data = random_program(4, CONES)
    solve = lambda **change: cone_program(**{**data, "cones": CONES, **change})
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (bilevel.ArgumentError, "expected cones that take the 13 rows", {"cones": CONES[1:]}),
        (bilevel.ArgumentError, "list of cones", {"cones": [("q", 3)]}),
        (bilevel.ArgumentError, "expected q to be a tensor", {"q": None}),
        (bilevel.ArgumentError, "expected A to be a tensor", {"A": [[1.0]]}),
        (bilevel.ShapeError, "expected A of shape", {"A": data["A"][:, :3]}),
        (bilevel.ShapeError, "expected P of shape", {"P": data["P"][:3]}),
        (bilevel.ShapeError, "expected b of shape", {"b": data["b"][:3]}),
        (bilevel.ShapeError, "batch axes that broadcast", {"q": data["q"].expand(2, 4), "b": data["b"].expand(3, 13)}),
        (bilevel.DtypeError, "float32 or float64", {"q": data["q"].long()}),
        (bilevel.ArgumentError, "tolerance to be", {"tolerance": 1e-3}),
        (bilevel.ArgumentError, "solver to be", {"solver": bilevel.Newton()}),
        (bilevel.ArgumentError, "on_failure", {"on_failure": "pass"}),
        (bilevel.ArgumentError, "smoothing", {"smoothing": -1.0}),
    ]
    for error, words, change in cases:
        with pytest.raises(error, match=words):
            solve(**change)
    for make in (lambda: cones.Zero(-1), lambda: cones.SecondOrder(0), lambda: cones.PSDTriangle(0)):
        with pytest.raises(bilevel.ArgumentError, match="integer of at least"):
            make()
    with pytest.raises(bilevel.ShapeError, match="PSDTriangle"):
        cones.PSDTriangle(2).vector(EYE)
    with pytest.raises(bilevel.ShapeError, match="PSDTriangle"):
        cones.PSDTriangle(3).matrix(Q3)
    with pytest.raises(bilevel.TransformError, match="forward-mode"):
        jacfwd(jacfwd(lambda q: solve(q=q).sum()))(data["q"])
    monkeypatch.setitem(sys.modules, "clarabel", None)
    with pytest.raises(bilevel.ArgumentError, match="clarabel to be installed"):
        solve()


def test_tolerances_policies_and_numbers_of_other_kinds() -> None:
    data = random_program(4, CONES)
    exact = cone_program(**data, cones=CONES)
    as_numpy = {name: np.asarray(t) for name, t in data.items()}
    torch.testing.assert_close(cone_program(**as_numpy, cones=tuple(CONES)), exact)
    solution = cone_program.solve(**data, cones=CONES, solver=bilevel.Clarabel(max_steps=2), on_failure="ignore")
    assert solution.report.status in (Status.MAX_STEPS, Status.CONVERGED)
    few = cone_program.solve(**data, cones=CONES, tolerance=bilevel.Tolerance(delta=1e-30), on_failure="ignore")
    assert few.report.status is Status.NOT_CONVERGED
    assert pickle.loads(pickle.dumps(cone_program)) is cone_program and repr(cone_program) == "<bilevel.cone_program>"
    with bilevel.record() as reports:
        cone_program(data["P"], data["q"].requires_grad_(), data["A"], data["b"], CONES).sum().backward()
    assert [report.direction.value for report in reports] == ["forward", "backward"]
