"""The bridges to scipy.optimize."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.linalg
import torch

import bilevel
from bilevel.reports import Status
from bilevel.tolerance import Tolerance

from . import support
from .support import F64, statuses

METHODS = ("CG", "BFGS", "Newton-CG", "L-BFGS-B", "TNC", "SLSQP", "trust-constr", "dogleg", "trust-ncg", "trust-krylov",
           "trust-exact", "Nelder-Mead", "Powell", "COBYLA", "COBYQA")  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_minimize(method):
    a = torch.tensor([[1.0, 3.0], [0.1, -2.0], [0.0, 0.0]], dtype=F64)

    def objective(x, a):
        return ((x - a) ** 2).sum() + (x**4).sum()

    solver, start = bilevel.ScipyMinimize(method), torch.zeros(3, 2, dtype=F64)
    outcome = support.minimize(solver, objective, start, a, batched=True, tolerance=Tolerance(delta=1e-5))
    assert statuses(outcome) == [Status.CONVERGED] * 3
    x = outcome.x
    torch.testing.assert_close(2 * (x - a) + 4 * x**3, torch.zeros_like(x), atol=1e-5, rtol=0)
    assert outcome.iterations[2] == 0


@pytest.mark.parametrize("method", ["hybr", "lm", "broyden1", "broyden2", "anderson", "krylov", "df-sane"])
@pytest.mark.parametrize("kind", [support.RootSystem, support.FixedPointSystem])
def test_methods_of_root(method, kind):
    M = torch.randn(4, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    c = torch.randn(3, 4, dtype=F64, generator=torch.Generator().manual_seed(1))

    def function(x, c):
        moved = c - 0.2 * torch.tanh(M @ x)
        return moved if kind is support.FixedPointSystem else x - moved

    outcome = support.solve(bilevel.ScipyRoot(method), kind, function, torch.zeros(3, 4, dtype=F64), c, batched=True)
    assert statuses(outcome) == [Status.CONVERGED] * 3
    x = outcome.x
    torch.testing.assert_close(x + 0.2 * torch.tanh(x @ M.mT), c, atol=1e-9, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_that_numpy_does_not_have(dtype):
    a = torch.tensor([1.0, -2.0], dtype=dtype)
    found = bilevel.argmin(lambda x, a: ((x - a) ** 2).sum(), solver=bilevel.ScipyMinimize("Newton-CG"))(0 * a, a)
    torch.testing.assert_close(found, a, atol=0.02, rtol=0)
    found = bilevel.root(lambda x, a: 2 * x - a, solver=bilevel.ScipyRoot())(0 * a, a)
    torch.testing.assert_close(found, a / 2, atol=0.02, rtol=0)
    matrix = bilevel.operators.DenseOperator(2 * torch.eye(2, dtype=dtype)[None], symmetric=True)
    x = bilevel.ScipyLinear(scipy.sparse.linalg.cg)(matrix, a[None])
    torch.testing.assert_close(x, a[None] / 2, atol=0.02, rtol=0)


@pytest.mark.parametrize("method", ["Newton-CG", "trust-ncg", "trust-exact"])
def test_an_objective_without_curvature(method):
    layer = bilevel.argmin(lambda x, a: (x - a).abs().sum(), solver=bilevel.ScipyMinimize(method), on_failure="ignore")
    assert bool(torch.isfinite(layer(torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64))).all())


@pytest.mark.parametrize("solver", [bilevel.ScipyMinimize("trust-ncg"), bilevel.ScipyRoot("broyden1")])
def test_what_scipy_s_own_linear_algebra_refuses_is_a_failed_solve(monkeypatch, solver):
    """Whether it gets there depends on numpy's version: an older one divides by a curvature of zero without a word."""

    def refuse(function, *args, **kwargs):
        np.asarray_chkfinite([np.inf])

    monkeypatch.setattr("scipy.optimize.minimize", refuse)
    monkeypatch.setattr("scipy.optimize.root", refuse)
    kind = bilevel.argmin if isinstance(solver, bilevel.ScipyMinimize) else bilevel.root
    layer = kind(lambda x: (x**4).sum() if kind is bilevel.argmin else x**3, solver=solver)
    with pytest.raises(bilevel.SolveError, match="Scipy"):
        layer(torch.ones(2, dtype=F64))


def test_no_root_is_a_failure():
    outcome = support.solve(bilevel.ScipyRoot(), support.RootSystem, lambda x: x**2 + 1, torch.ones(2, dtype=F64))
    assert not statuses(outcome)[0].success


@pytest.mark.parametrize(
    "solver", [bilevel.ScipyMinimize(options={"bogus": 1}), bilevel.ScipyRoot(options={"bogus": 1})]
)
def test_unknown_options_are_refused(solver):
    minimizes = isinstance(solver, bilevel.ScipyMinimize)
    kind = support.ArgminSystem if minimizes else support.RootSystem
    with pytest.raises(bilevel.ArgumentError, match="bogus"):
        support.solve(solver, kind, lambda x: (x**2).sum() if minimizes else x, torch.ones(2, dtype=F64))


def test_root_refuses_an_argmin():
    with pytest.raises(bilevel.ArgumentError, match=r"ScipyMinimize\(\)"):
        support.minimize(bilevel.ScipyRoot(), lambda x: (x**2).sum(), torch.ones(2, dtype=F64))


def test_options_are_copied_and_cannot_be_changed():
    options = {"maxcor": 5}
    solver = bilevel.ScipyMinimize(options=options)
    options["maxcor"] = 7
    assert dict(solver.options) == {"maxcor": 5}
    with pytest.raises(TypeError):
        solver.options["maxcor"] = 7
    assert hash(solver) == hash(bilevel.ScipyMinimize())


def test_only_the_slices_of_one_problem_are_evaluated():
    shapes = set()

    def objective(x, a):
        shapes.add((tuple(x.shape), tuple(a.shape)))
        return ((x - a) ** 2).sum()

    a = torch.arange(6, dtype=F64).reshape(3, 2)
    problem, _ = support.build(support.ArgminSystem, objective, torch.zeros(3, 2, dtype=F64), a, batched=True)
    one = problem.single(1)
    assert one.batch == 1
    torch.testing.assert_close(one.residual(torch.zeros(1, 2, dtype=F64)), -2 * a[1:2])


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("L-BFGS-B", {"bounds": [(0, 1)] * 2}, "'bounds'.*lower= and upper= to bilevel.argmin"),
        ("SLSQP", {"constraints": ()}, "'constraints'"),
        ("BFGS", {"jac": True}, "taken from the layer's function"),
        ("BFGS", {"x0": 3.0}, "the layer's init"),
        ("CG", {"callback": print}, "'callback'"),
        ("BFGS", {"tol": 1e-3}, "Tolerance"),
        ("L-BFGS-B", {"gtoll": 1e-3}, "gtoll; leave out what it does not know"),
        ("L-BFGS-B", {"maxcor": "three"}, "change or leave out"),
        ("BFGS", {"c1": 5.0}, "c1"),
        ("Nelder-Mead", {"initial_simplex": [1.0]}, "initial_simplex"),
        ("trust-exact", {"max_trust_radius": -1.0}, "radius"),
    ],
)
def test_options_that_scipy_cannot_use_are_one_sentence(method: str, options: dict[str, object], said: str) -> None:
    init, a = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    with pytest.raises(bilevel.ArgumentError, match=said):
        bilevel.argmin(
            lambda x, a: ((x - a) ** 4).sum() + (x * x).sum(), solver=bilevel.ScipyMinimize(method, options=options)
        )(init, a)


def test_bounds_written_as_the_refusal_says() -> None:
    layer = bilevel.argmin(lambda x, a: ((x - a) ** 2).sum(), upper=0.5, solver=bilevel.ScipyMinimize("L-BFGS-B"))
    x = layer(torch.zeros(2, dtype=torch.float64), torch.tensor([0.2, 0.7], dtype=torch.float64))
    torch.testing.assert_close(x, torch.tensor([0.2, 0.5], dtype=torch.float64), rtol=1e-6, atol=1e-8)


def test_a_type_error_of_the_users_own_is_not_taken_for_scipys() -> None:
    def objective(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        if float(x.detach().sum()) != 0.0:
            raise TypeError("the user's own")
        return ((x - a) ** 2).sum()

    with pytest.raises(TypeError, match="the user's own"):
        bilevel.argmin(objective, solver=bilevel.ScipyMinimize("BFGS", options={"gtol": 1e-9}))(
            torch.zeros(2), torch.ones(2)
        )


@pytest.mark.parametrize("options", [{"jac": True}, {"foo": 1}, {"factor": "q"}])
def test_options_of_roots_likewise(options: dict[str, object]) -> None:
    with pytest.raises(bilevel.ArgumentError, match="leave"):
        bilevel.root(lambda x, a: x**3 + x - a, solver=bilevel.ScipyRoot(options=options))(torch.ones(1), torch.ones(1))
