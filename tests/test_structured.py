"""The seam of structured problems: a system that finds its solution by itself, with multipliers, under the one rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import bilevel
from bilevel.equations.structured import LocalModel, Parts, Structure, flat_raveler, objective_of
from bilevel.equations.system import ArgminSystem
from bilevel.layers.layer import Layer
from bilevel.reports import Basis
from bilevel.solvers.judging.outcome import InnerOutcome

DOUBLE = torch.float64


@dataclass(frozen=True, eq=False, kw_only=True)
class SumSystem(LocalModel):
    """min ½‖x − a‖² subject to Σx = b, with z = (x, ν): the Lagrangian's stationary point."""

    minimizes = False

    def model(self, z: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        x, nu = z[:-1], z[-1]
        return self.ordinary.output(x, *tensors) + nu * (x.sum() - tensors[-1])

    def find(self, problem: Any, init: torch.Tensor, target: Any, solver: Any) -> InnerOutcome:
        def solved(z: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            x, nu = closed(a, b)
            return torch.cat([x, nu[None], b[None]])

        found = problem.system.lifted(solved)(problem.shaped(init), *problem.tensors).reshape(problem.batch, -1)
        z, b = found[:, :-1], found[:, -1]
        assert objective_of(problem).size == problem.size - 1
        zeros = init.new_zeros(problem.batch)
        codes = zeros.long()
        return InnerOutcome(
            z, codes, codes, zeros, zeros, zeros, Basis.RESIDUAL, torch.zeros_like(z), solver="closed form",
            degenerate=b == 7.0, words={bilevel.Status.DEGENERATE: ("met b = 7", "take another b")},
        )  # fmt: skip

    def parts(self, z: torch.Tensor, *tensors: torch.Tensor) -> Parts:
        return Parts(z[:-1], {"equality": z[-1:]}, {"equality": torch.ones_like(z[-1:], dtype=torch.bool)})

    def linear_solver(self, operator: Any) -> Any:
        return bilevel.Exact(indefinite=True)


@dataclass(frozen=True, eq=False, kw_only=True)
class Sum(Structure):
    function: Any = None

    @property
    def functions(self) -> tuple[Any, ...]:
        return () if self.function is None else (self.function,)

    def attach(self, ordinary: Any, init: torch.Tensor, tensors: Any) -> Any:
        z = torch.cat([init, init.new_zeros(1)])
        raveler = flat_raveler(len(z), ordinary.raveler)
        system = SumSystem(
            ordinary.where,
            ordinary.function,
            raveler,
            ordinary.arguments,
            autocast=ordinary.autocast,
            ordinary=ordinary,
        )
        return system, z


def layer(f: Any = None, **settings: Any) -> Layer:
    f = (lambda x, a, b: 0.5 * ((x - a) ** 2).sum()) if f is None else f
    return Layer(
        ArgminSystem, f, solver=None, linear_solver=None, tolerance=None, on_failure=settings.pop("on_failure", "raise"),
        structure=Sum(**settings),
    )  # fmt: skip


def closed(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    nu = (a.sum() - b) / len(a)
    return a - nu, nu


a0, b0 = torch.tensor([1.0, -2.0, 4.0], dtype=DOUBLE), torch.tensor(0.5, dtype=DOUBLE)


def test_value_multipliers_and_derivatives_are_those_of_the_closed_form() -> None:
    a, b = a0.clone().requires_grad_(), b0.clone().requires_grad_()
    solution = layer().solve(torch.zeros(3, dtype=DOUBLE), a, b)
    x, nu = closed(a, b)
    torch.testing.assert_close(solution.value, x)
    torch.testing.assert_close(solution.multipliers["equality"], nu[None])
    assert solution.active["equality"].tolist() == [True]
    w = torch.tensor([0.3, -1.0, 2.0], dtype=DOUBLE)
    got = torch.autograd.grad((solution.value * w).sum() + 5 * solution.multipliers["equality"].sum(), (a, b))
    want = torch.autograd.grad((x * w).sum() + 5 * nu, (a, b))
    for g, h in zip(got, want, strict=True):
        torch.testing.assert_close(g, h)


def test_transforms() -> None:
    run, init = layer(), torch.zeros(3, dtype=DOUBLE)
    got = torch.func.jacrev(lambda a: run(init, a, b0))(a0)
    torch.testing.assert_close(got, torch.func.jacrev(lambda a: closed(a, b0)[0])(a0))
    torch.testing.assert_close(torch.func.jacfwd(lambda a: run(init, a, b0))(a0), got)
    bs = torch.tensor([0.5, 1.0, 2.0, -3.0], dtype=DOUBLE)
    many = torch.func.vmap(lambda b: run.solve(init, a0, b))(bs)
    for i, b in enumerate(bs):
        torch.testing.assert_close(many.value[i], closed(a0, b)[0])
        torch.testing.assert_close(many.multipliers["equality"][i, 0], closed(a0, b)[1])
    cubic = lambda x: (x**3).sum()
    hess = torch.func.hessian(lambda a: cubic(run(init, a, b0)))(a0)
    torch.testing.assert_close(hess, torch.func.hessian(lambda a: cubic(closed(a, b0)[0]))(a0))
    both = torch.func.vmap(torch.func.hessian(lambda b: cubic(run(init, a0, b))))(bs)
    want = torch.func.vmap(torch.func.hessian(lambda b: cubic(closed(a0, b)[0])))(bs)
    torch.testing.assert_close(both, want)


def test_a_degenerate_solution_is_refused_in_backward_alone() -> None:
    b = torch.tensor(7.0, dtype=DOUBLE, requires_grad=True)
    init = torch.zeros(3, dtype=DOUBLE)
    solution = layer().solve(init, a0, b)
    assert solution.report.status is bilevel.Status.CONVERGED
    with pytest.raises(bilevel.SolveError, match=r"b = 7.*take another b"):
        solution.value.sum().backward()
    with pytest.warns(bilevel.SolveWarning):
        layer(on_failure="warn")(init, a0, b).sum().backward()
    b.grad = None
    layer(on_failure="nan")(init, a0, b).sum().backward()
    assert torch.isnan(b.grad)
    # One of a batch.
    with bilevel.record() as reports:
        bs = torch.tensor([1.0, 7.0, 2.0], dtype=DOUBLE, requires_grad=True)
        torch.func.vmap(lambda b: layer(on_failure="ignore")(init, a0, b))(bs).sum().backward()
    assert [s.name for s in reports.backward[0].status] == ["CONVERGED", "DEGENERATE", "CONVERGED"]


def test_what_the_objective_or_the_structure_captures_is_found() -> None:
    init, t = torch.zeros(3, dtype=DOUBLE), torch.tensor(1.0, dtype=DOUBLE, requires_grad=True)
    with pytest.raises(bilevel.CapturedTensorError):
        layer(lambda x, a, b: 0.5 * t * ((x - a) ** 2).sum())(init, a0, b0)
    with pytest.raises(bilevel.StochasticObjectiveError):
        layer(lambda x, a, b: 0.5 * ((x - a) ** 2).sum() + torch.rand((), dtype=DOUBLE))(init, a0, b0)
    with pytest.raises(bilevel.ShapeError):
        layer(lambda x, a, b: x - a)(init, a0, b0)
