"""What has no solution or no derivative is named, problem by problem, with a proof or a remedy."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch.func import vmap

import bilevel
from bilevel import Status, quadratic_program
from tests.quadratic_programs.programs import F64, integer_program, random_program, tensor

EYE = torch.eye(3, dtype=F64)
NONE = torch.zeros(3, 3, dtype=F64)
ONES = torch.ones(1, 3, dtype=F64)
Q3 = torch.tensor([1.0, -2.0, 0.5], dtype=F64)


def vector(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=F64)


INFEASIBLE = {
    "rows": {"Q": EYE, "q": Q3, "G": torch.cat([ONES, -ONES]), "h": vector(1.0, -2.0)},
    "simplex": {"Q": EYE, "q": Q3, "A": ONES, "b": vector(-1.0), "lower": vector(0, 0, 0)},
    "equations": {"Q": EYE, "q": Q3, "A": torch.cat([ONES, ONES]), "b": vector(1.0, 1.5)},
    "crossed bounds": {"Q": EYE, "q": Q3, "lower": vector(0, 2, 0), "upper": vector(1, 1, 1)},
    "a row of zeros": {"Q": EYE, "q": Q3, "G": 0 * ONES, "h": vector(-1.0)},
    "a linear program": {"Q": NONE, "q": Q3, "G": torch.cat([ONES, -ONES]), "h": vector(1.0, -2.0)},
    "bounds and a row": {"Q": EYE, "q": Q3, "G": ONES, "h": vector(1.0), "lower": vector(1, 1, 1)},
    "far": {"Q": EYE, "q": Q3, "A": ONES, "b": vector(1e6), "upper": vector(1e5, 1e5, 1e5)},
}


@pytest.mark.parametrize("name", INFEASIBLE)
def test_infeasible_problems_have_a_farkas_ray(name: str) -> None:
    data = INFEASIBLE[name]
    solution = quadratic_program.solve(**data, on_failure="ignore")
    assert solution.report.status is Status.INFEASIBLE
    ray = solution.certificate
    held, value = ray.upper - ray.lower, torch.zeros((), dtype=F64)
    for matrix, side, y in (("A", "b", ray.equality), ("G", "h", ray.inequality)):
        if matrix in data:
            held, value = held + data[matrix].T @ y, value + data[side] @ y
    for side, y, sign in (("lower", ray.lower, -1), ("upper", ray.upper, 1)):
        if side in data:
            value = value + sign * data[side] @ y
    assert value < 0 and held.abs().max() <= 1e-7 * max(float(y.abs().max()) for y in ray if y.numel())
    assert all((y >= 0).all() for y in (ray.inequality, ray.lower, ray.upper))
    with pytest.raises(bilevel.SolveError, match=r"contradict each other|none fulfils"):
        quadratic_program(**data)


UNBOUNDED = {
    "linear": {"Q": NONE, "q": Q3},
    "one direction": {"Q": torch.diag(vector(1, 0, 1)), "q": Q3},
    "in a cone": {"Q": NONE, "q": -Q3.abs(), "lower": vector(0, 0, 0)},
    "on a plane": {"Q": NONE, "q": Q3, "A": ONES, "b": vector(1.0)},
    "between rows": {"Q": NONE, "q": Q3, "G": torch.cat([ONES, -ONES]), "h": vector(1.0, 1.0)},
}


@pytest.mark.parametrize("name", UNBOUNDED)
def test_unbounded_problems_have_a_direction(name: str) -> None:
    data = UNBOUNDED[name]
    solution = quadratic_program.solve(**data, on_failure="ignore")
    assert solution.report.status is Status.UNBOUNDED
    d = solution.certificate.direction
    assert data["q"] @ d == pytest.approx(-1.0)
    rounding = 1e-7 * float(d.abs().max())
    assert (data["Q"] @ d).abs().max() <= rounding
    assert "A" not in data or (data["A"] @ d).abs().max() <= rounding
    assert "G" not in data or (data["G"] @ d).max() <= rounding
    assert "lower" not in data or (d >= -rounding).all()
    with pytest.raises(bilevel.SolveError, match="falls without end"):
        quadratic_program(**data)


def mixed() -> tuple[dict[str, torch.Tensor], list[Status]]:
    """A batch of: a plain problem, an infeasible, an unbounded, a non-convex, a not finite one, duplicated rows, a zero-width box, no rows."""
    good = {
        "Q": EYE, "q": Q3, "G": torch.cat([ONES, -EYE[:1]]), "h": vector(5.0, 4.0), "lower": vector(-3, -3, -3), "upper": vector(3, 3, 3),
    }  # fmt: skip
    free = {"lower": vector(*[-torch.inf] * 3), "upper": vector(*[torch.inf] * 3)}
    changes: list[dict[str, torch.Tensor]] = [
        {}, {"G": torch.cat([ONES, -ONES]), "h": vector(1.0, -2.0)}, {"Q": NONE, "q": -Q3.abs(), **free, "h": vector(torch.inf, torch.inf)},
        {"Q": -EYE}, {"q": vector(1.0, torch.nan, 0.0)}, {"G": torch.cat([ONES, ONES]), "h": vector(-1.0, -1.0)},
        {"lower": vector(1, 1, 1), "upper": vector(1, 1, 1)}, {"h": vector(torch.inf, torch.inf), **free},
    ]  # fmt: skip
    problems = [{**good, **change} for change in changes]
    ok = Status.CONVERGED
    expected = [ok, Status.INFEASIBLE, Status.UNBOUNDED, Status.INDEFINITE, Status.NOT_FINITE, ok, ok, ok]
    return {name: torch.stack([one[name] for one in problems]) for name in good}, expected


@pytest.mark.parametrize("batched", [False, True])
def test_each_problem_of_a_batch_has_its_own_status(batched: bool) -> None:
    data, expected = mixed()
    names = list(data)
    solve = lambda *args: quadratic_program.solve(**dict(zip(names, args, strict=True)), on_failure="nan")
    solution = vmap(solve)(*data.values()) if batched else solve(*data.values())
    assert list(solution.report.status) == expected
    for i, status in enumerate(expected):
        assert bool(torch.isnan(solution.value[i]).any()) == (status is not Status.CONVERGED)
        if status is Status.CONVERGED:
            single = quadratic_program(**{name: t[i] for name, t in data.items()})
            torch.testing.assert_close(solution.value[i], single, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("policy", ["nan", "ignore", "warn"])
def test_no_derivative_comes_out_of_what_has_no_solution(policy: str) -> None:
    data, expected = mixed()
    q = data.pop("q").requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bilevel.SolveWarning)
        x = quadratic_program(q=q, **data, on_failure=policy)
        (grad,) = torch.autograd.grad(torch.where(torch.isnan(x), 0.0, x).sum(), q)
    for i, status in enumerate(expected):
        assert bool(torch.isnan(grad[i]).any()) == (status is not Status.CONVERGED)


def test_the_message_names_the_rows() -> None:
    with pytest.raises(bilevel.SolveError, match=r"row 0 of G x <= h, row 1 of G x <= h contradict each other"):
        quadratic_program(**INFEASIBLE["rows"])
    with pytest.raises(bilevel.SolveError, match="Q that is not positive semidefinite"):
        quadratic_program(-EYE, Q3, lower=0.0, upper=1.0)


def test_a_weakly_active_constraint_is_named_and_smoothing_helps() -> None:
    q = vector(0.0, 1.0, -1.0).requires_grad_()
    x = quadratic_program(EYE, q, lower=0.0)
    with pytest.raises(bilevel.SolveError, match=r"the lower bound of x\[0\].*smoothing") as raised:
        x.sum().backward()
    assert raised.value.report.status is Status.DEGENERATE
    # A gradient that does not depend on that unknown exists.
    (grad,) = torch.autograd.grad(quadratic_program(EYE, q, lower=0.0)[1:].sum(), q)
    torch.testing.assert_close(grad, vector(0.0, 0.0, -1.0))
    (grad,) = torch.autograd.grad(quadratic_program(EYE, q, lower=0.0, smoothing=1e-8).sum(), q)
    torch.testing.assert_close(grad, vector(-0.5, 0.0, -1.0), rtol=1e-3, atol=1e-3)
    one_sided = quadratic_program(EYE, q, lower=0.0, on_failure="ignore")
    assert torch.isfinite(torch.autograd.grad(one_sided.sum(), q)[0]).all()


@pytest.mark.parametrize(("n", "seed"), [(2, 290), (2, 354), (3, 107), (4, 4), (4, 45), (4, 167)])
def test_a_weakly_active_constraint_at_zero_is_named(n: int, seed: int) -> None:
    """The side is zero, and so is x but for rounding: the slack is all of both, and yet it is rounding."""
    data = integer_program(n, seed)
    x = quadratic_program(**{**data, "q": data["q"].requires_grad_()})
    with pytest.raises(bilevel.SolveError, match="weakly active"):
        (x * torch.arange(1.0, n + 1, dtype=F64)).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_weakly_active_row_is_named_in_a_batch(dtype: torch.dtype) -> None:
    G = torch.tensor([[1.0, 1.0, 0.0]], dtype=dtype)
    points = torch.tensor([[0.3, 0.7, 0.0], [1.0, 1.0, 0.0], [0.1, 0.1, 0.0]], dtype=dtype, requires_grad=True)
    x = quadratic_program(EYE.to(dtype), -points, G=G, h=1.0, on_failure="nan")
    assert torch.isfinite(x).all()
    with bilevel.record() as reports:
        (grad,) = torch.autograd.grad(x.sum(), points)
    assert [s.name for s in reports.backward[0].status] == ["DEGENERATE", "CONVERGED", "CONVERGED"] if reports else True
    assert torch.isnan(grad[0]).all() and torch.isfinite(grad[1:]).all()


def test_duplicated_rows_have_no_derivative_of_their_own() -> None:
    rows = torch.cat([ONES, ONES])
    q, h = Q3.clone().requires_grad_(), vector(-1.0, -1.0).requires_grad_()
    (grad,) = torch.autograd.grad(quadratic_program(EYE, q, G=rows, h=h.detach())[0], q)
    (once,) = torch.autograd.grad(quadratic_program(EYE, q, G=ONES, h=vector(-1.0))[0], q)
    torch.testing.assert_close(grad, once, rtol=1e-10, atol=1e-11)
    x = quadratic_program(EYE, Q3, G=rows, h=h)
    with pytest.raises(bilevel.SolveError, match="depend on each other"):
        x[0].backward()


def test_a_solution_that_is_not_unique_has_no_derivative() -> None:
    q = vector(0.0, 0.0, 1.0).requires_grad_()
    x = quadratic_program(NONE, q, lower=0.0, upper=1.0)
    with pytest.raises(bilevel.SolveError, match="not unique"):
        x[0].backward()


def test_reports_are_recorded() -> None:
    data = random_program(4, 1, 5, 3)
    q = data.pop("q").requires_grad_()
    with bilevel.record() as reports:
        quadratic_program(q=q, **data).sum().backward()
    assert [report.direction.value for report in reports] == ["forward", "backward"]
    assert all(report.converged.all() and report.status_code.shape == (3,) for report in reports)
    assert (reports[0].residual_norm <= reports[0].threshold).all()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": Q3.long()}, bilevel.DtypeError, "q of dtype float32 or float64, got torch.int64"),
        ({"Q": torch.eye(2, dtype=F64)}, bilevel.ShapeError, r"Q of shape \(..., n, n\) with n = 3"),
        ({"A": ONES}, bilevel.ArgumentError, "got A alone; pass b too"),
        ({"h": 1.0}, bilevel.ArgumentError, "got h alone; pass G too"),
        ({"G": torch.ones(3, dtype=F64), "h": 1.0}, bilevel.ShapeError, "G of shape"),
        ({"G": ONES, "h": vector(1, 2)}, bilevel.ShapeError, "h of shape .*one entry per row"),
        ({"lower": vector(1, 2)}, bilevel.ShapeError, "one entry per unknown"),
        ({"lower": "low"}, bilevel.ArgumentError, "lower to be a tensor or a number"),
        ({"Q": 1.0}, bilevel.ArgumentError, "Q to be a tensor"),
        (
            {"q": torch.zeros(2, 3, dtype=F64), "Q": torch.zeros(4, 3, 3, dtype=F64)},
            bilevel.ShapeError,
            "batch axes that broadcast",
        ),
        ({"smoothing": -1.0}, bilevel.ArgumentError, "smoothing"),
        ({"on_failure": "no"}, bilevel.ArgumentError, "on_failure"),
        ({"tolerance": 1e-8}, bilevel.ArgumentError, "bilevel.Tolerance"),
        ({"solver": "osqp"}, bilevel.ArgumentError, "bilevel.Mehrotra"),
    ],
)
def test_what_cannot_be_used_is_said(change: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        quadratic_program(**{"Q": EYE, "q": Q3, **change})


def test_a_tolerance_that_is_not_reached_is_said() -> None:
    data = random_program(4, 1, 5)
    with pytest.raises(bilevel.SolveError, match="asked 1e-30"):
        quadratic_program(**data, tolerance=bilevel.Tolerance(delta=1e-30))


def test_it_can_be_pickled() -> None:
    assert pickle.loads(pickle.dumps(quadratic_program)) is quadratic_program


@pytest.mark.parametrize("sizes", [(3, 5, 0), (4, 6, 1), (5, 8, 2)])
def test_small_integer_linear_programs_have_the_status_of_highs(sizes: tuple[int, int, int]) -> None:
    """Ties, empty interiors, infeasible and unbounded programs, all in one batch."""
    n, m, p = sizes
    rng = np.random.default_rng(n)
    shapes = {"q": (60, n), "A": (60, p, n), "b": (60, p), "G": (60, m, n), "h": (60, m)}
    data = {name: tensor(rng.integers(-2, 4, shape)) for name, shape in shapes.items()}
    data["A"] = data["A"].clamp(-1, 1)
    solution = quadratic_program.solve(torch.zeros(60, n, n, dtype=F64), **data, lower=-3.0, on_failure="ignore")
    meant = {0: Status.CONVERGED, 2: Status.INFEASIBLE, 3: Status.UNBOUNDED}
    for i in range(60):
        one = {name: t[i].numpy() for name, t in data.items()}
        theirs = linprog(
            one["q"], one["G"], one["h"], one["A"] if p else None, one["b"] if p else None, bounds=(-3, None)
        )  # fmt: skip
        assert solution.report.status[i] is meant[theirs.status]
        if theirs.status == 0:
            assert float(data["q"][i] @ solution.value[i]) == pytest.approx(theirs.fun, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", ["Q", "q"])
def test_a_missing_matrix_or_vector_is_refused_with_a_sentence(name: str) -> None:
    given = {"Q": torch.eye(2, dtype=torch.float64), "q": torch.ones(2, dtype=torch.float64), name: None}
    with pytest.raises(bilevel.ArgumentError, match=f"expected {name} to be a tensor, got None; pass torch.zeros"):
        bilevel.quadratic_program(**given)


def test_a_single_row_that_nothing_fulfils_is_named() -> None:
    eye = torch.eye(2, dtype=torch.float64)
    with pytest.raises(bilevel.SolveError, match=r"none fulfils row 0 of A x = b"):
        bilevel.quadratic_program(eye, eye[0], 0 * eye[:1], eye[0, :1])


def test_units_of_rows_under_vmap() -> None:
    units = torch.tensor([1.0, 1e-12, 1e9], dtype=torch.float64)
    rows, sides = units[:, None, None] * torch.ones(1, 2, dtype=torch.float64), units[:, None]
    eye, q = torch.eye(2, dtype=torch.float64), torch.tensor([-1.0, -2.0], dtype=torch.float64)
    solve = lambda A, b: bilevel.quadratic_program(eye, q, A, b, lower=-5.0)
    slopes = torch.func.vmap(torch.func.jacrev(solve, argnums=1))(rows, sides) * units[:, None, None]
    torch.testing.assert_close(slopes, torch.full((3, 2, 1), 0.5, dtype=torch.float64))


def test_a_message_counts_the_problems_that_it_speaks_of() -> None:
    Q, G = torch.stack([EYE, EYE, EYE, NONE]), torch.cat([ONES, -ONES])
    h = torch.stack([vector(1.0, 2.0), vector(1.0, -2.0), vector(1.0, -2.0), vector(1.0, 2.0)])
    with pytest.raises(bilevel.SolveError, match=r"in 2 of 4 problems, first in number 1, beside UNBOUNDED in 1 \("):
        quadratic_program(Q, Q3.expand(4, 3), G=G.expand(4, 2, 3), h=h)
