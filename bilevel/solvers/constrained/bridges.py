"""Bridges for constrained problems to scipy and to a user's functions."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from bilevel.equations.problem import Problem
from bilevel.errors import ArgumentError
from bilevel.pytree import ravel_like
from bilevel.reports import Status
from bilevel.solvers._base import CallableSolver
from bilevel.solvers.constrained.program import Answer, Program
from bilevel.solvers.parts.scipy_bridge import Array, as_array, overflowed, own_warnings
from bilevel.solvers.scipy_minimize import ScipyMinimize

__all__ = ["by_callable", "by_scipy"]

_TAKES_BOUNDS = frozenset({"l-bfgs-b", "tnc", "slsqp", "trust-constr"})
_TAKES_CONSTRAINTS = frozenset({"slsqp", "trust-constr"})
_DEFAULTS: dict[str, dict[str, Any]] = {
    "slsqp": {"ftol": 1e-14, "maxiter": 500},
    "trust-constr": {"gtol": 1e-9, "xtol": 1e-12, "maxiter": 2000},
    "l-bfgs-b": {"gtol": 1e-10, "ftol": 0.0, "maxls": 50, "maxiter": 15000},
    "tnc": {"gtol": 0.0, "ftol": 0.0, "xtol": 0.0, "maxfun": 15000},
}


def by_scipy(solver: ScipyMinimize, where: str) -> Callable[[Program, torch.Tensor], Answer]:
    """Return the solver as a function of a program. Its multipliers have to be recovered."""
    method = solver.method.lower()

    def solve(program: Program, init: torch.Tensor) -> Answer:
        allowed = _TAKES_BOUNDS if program.only_bounds else _TAKES_CONSTRAINTS
        if method not in allowed:
            raise ArgumentError(
                f"{where}: expected a scipy method that takes {'bounds' if program.only_bounds else 'constraints'}, got {solver.method}; "
                "pass ScipyMinimize('SLSQP') or ScipyMinimize('trust-constr')"
            )
        assert program.single is not None
        rows, steps = [], []
        for number in range(len(init)):
            x, count = _one(solver, method, where, program.single(number), init[number : number + 1])
            rows.append(x)
            steps.append(count)
        return _unknown(torch.cat(rows), program, steps)

    solve.__name__ = solver.name
    return solve


def by_callable(
    solver: CallableSolver,
    problem: Problem,
    multipliers_of: Callable[[Any], tuple[torch.Tensor | None, torch.Tensor | None]],
    counts: tuple[int, int],
) -> Callable[[Program, torch.Tensor], Answer]:
    """Return a user's function (objective, init, *args, **kwargs) -> x, or (x, multipliers), as a function of a program."""

    def solve(program: Program, init: torch.Tensor) -> Answer:
        raveler = problem.system.raveler
        rows, given = [], []
        for found in solver.answers(problem, init.to(raveler.dtype)):
            multipliers: Any = None
            if isinstance(found, tuple) and len(found) == 2 and pytree.tree_structure(found) != raveler.structure:
                found, multipliers = found
            rows.append(ravel_like(found, raveler, problem.where, f"solver {solver.name}").detach())
            given.append((None, None) if multipliers is None else multipliers_of(multipliers))
        answer = _unknown(torch.stack(rows).to(init), program, [0] * len(rows))
        if any((a is None and counts[0]) or (b is None and counts[1]) for a, b in given):
            return answer
        equality = [a.detach().to(init) if a is not None else init.new_zeros(0) for a, _ in given]
        inequality = [b.detach().to(init) if b is not None else init.new_zeros(0) for _, b in given]
        return Answer(
            answer.x,
            torch.stack(equality),
            torch.stack(inequality),
            answer.status,
            answer.iterations,
            known=bool(sum(counts)),
        )

    solve.__name__ = solver.name
    return solve


def _unknown(x: torch.Tensor, program: Program, steps: list[int]) -> Answer:
    status = torch.full((len(x),), int(Status.NOT_CONVERGED), dtype=torch.int64, device=x.device)
    status = torch.where(torch.isfinite(x).all(-1), status, int(Status.NOT_FINITE))
    counted = torch.tensor(steps, dtype=torch.int64, device=x.device)
    return Answer(
        x,
        x.new_zeros(len(x), program.equalities),
        x.new_zeros(len(x), program.inequalities),
        status,
        counted,
        known=False,
    )


def _one(
    solver: ScipyMinimize, method: str, where: str, program: Program, start: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """Return scipy's x (1, n) and its number of iterations."""
    import scipy.optimize

    lower, upper = as_array(program.lower[0]), as_array(program.upper[0])
    if bool((program.lower > program.upper).any()):
        return start, 0

    def at(x: Array) -> torch.Tensor:
        return torch.as_tensor(np.array(x)).to(start).unsqueeze(0)

    def value(x: Array) -> tuple[float, Array]:
        parts, rows = program.jacobian(at(x))
        return float(parts[0, 0]), as_array(rows[0, 0])

    p = program.equalities
    constraints = []
    for kind, places, sign, present in (
        ("eq", slice(1, 1 + p), 1.0, p),
        ("ineq", slice(1 + p, None), -1.0, program.inequalities),
    ):
        if present:
            constraints.append(
                {
                    "type": kind,
                    "fun": lambda x, s=places, k=sign: k * as_array(program.parts(at(x))[0, s]),
                    "jac": lambda x, s=places, k=sign: k * as_array(program.jacobian(at(x))[1][0, s]),
                }
            )
    settings = dict(_DEFAULTS[method])
    if solver.max_steps is not None:
        settings["maxfun" if method == "tnc" else "maxiter"] = solver.max_steps
    settings.update(solver.options or {})
    more: dict[str, Any] = {"constraints": constraints} if constraints else {}
    if method == "trust-constr":
        weights = torch.zeros_like(program.parts(start))
        weights[:, 0] = 1.0
        more["hess"] = lambda x: as_array(program.hessian(at(x), weights)[0])
    bounded = np.isfinite(lower).any() or np.isfinite(upper).any()
    inside = as_array(program.inside(start)[0])
    try:
        with own_warnings(where, solver.options), np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", category=RuntimeWarning)
            warnings.simplefilter("ignore", category=UserWarning)
            result = scipy.optimize.minimize(
                value, inside, jac=True, method=solver.method, options=settings,
                bounds=scipy.optimize.Bounds(lower, upper) if bounded else None, **more,
            )  # fmt: skip
    except (ArithmeticError, ValueError) as error:
        if not overflowed(error):
            raise
        return start, 0
    return program.inside(at(result.x)), int(getattr(result, "nit", 0))
