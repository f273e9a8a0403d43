"""Every method of scipy.optimize.minimize as an inner solver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from bilevel.equations.problem import Problem
from bilevel.errors import ArgumentError
from bilevel.reports import Status
from bilevel.solvers._base import Goal, InnerSolution
from bilevel.solvers.parts.scipy_bridge import (
    Array,
    ScipyResult,
    ScipySolver,
    as_array,
    overflowed,
    own_warnings,
    solve_each,
    status_of,
)

__all__ = ["ScipyMinimize"]

# The largest number of times that a run is resumed after rounding ended it, and how near to a solution it has to be.
_MOST_POLISHES = 4
_NEAR = 1e-3

_WITHOUT_GRADIENT = frozenset({"nelder-mead", "powell", "cobyla", "cobyqa"})
_WITH_PRODUCTS = frozenset({"newton-cg", "trust-ncg", "trust-krylov", "trust-constr"})
_WITH_HESSIAN = frozenset({"dogleg", "trust-exact"})
_KNOWN = _WITHOUT_GRADIENT | _WITH_PRODUCTS | _WITH_HESSIAN | {"cg", "bfgs", "l-bfgs-b", "tnc", "slsqp"}


@dataclass(frozen=True)
class ScipyMinimize(ScipySolver):
    """Solve each problem with ``scipy.optimize.minimize``.

    Scipy gets float64, the gradient and, where the method takes them, Hessian products (Newton-CG, trust-ncg,
    trust-krylov, trust-constr) or the Hessian (dogleg, trust-exact). A run ends when ‖∇G‖ meets the threshold; scipy's
    own tolerances are tighter. If rounding of the objective ends it earlier, it is resumed with differences that are
    computed from gradients. A method without gradients ends by its own tolerances. The true residual decides whether a
    problem has converged.

    The problems of a batch are solved one after another. scipy works on the CPU.

    Parameters
    ----------
    method
        The name of scipy's method, in any case.
    max_steps
        The largest number of iterations (scipy's ``maxiter``); None: scipy's own limit.
    options
        scipy's ``options`` for the method. They override the options set here. Bounds and constraints are refused.
        Options refer to the scaled objective, whose first gradient has norm one.

    Raises
    ------
    ArgumentError
        If the method is unknown to scipy; on use, if an option is, or for a root or a fixed point.

    References
    ----------
    https://docs.scipy.org/doc/scipy/reference/generated/scipy.optimize.minimize.html

    Examples
    --------
    >>> import torch, bilevel
    >>> layer = bilevel.argmin(lambda x, a: ((x - a) ** 4).sum() + (x**2).sum(), solver=ScipyMinimize("BFGS"))
    >>> layer(torch.zeros(2, dtype=torch.float64), torch.tensor([1.0, 3.0], dtype=torch.float64))
    tensor([0.4102, 2.0000], dtype=torch.float64)
    """

    method: str = "L-BFGS-B"

    known: ClassVar[frozenset[str]] = _KNOWN

    def solve(self, problem: Problem, init: torch.Tensor, goal: Goal) -> InnerSolution:
        if not problem.minimizes:
            raise ArgumentError(
                f"{problem.where}: expected an argmin for ScipyMinimize, got a {problem.system.noun} equation; take "
                "ScipyRoot() or Newton()"
            )
        return solve_each(problem, init, goal, lambda one, x, threshold: self._solve_one(one, init, x, threshold))

    def _solve_one(
        self, problem: Problem, like: torch.Tensor, start: Array, threshold: float
    ) -> tuple[Array, int, Status]:
        run = _Run(problem, like, start, threshold)
        if self.method.lower() in _WITHOUT_GRADIENT:
            status = self._minimize(run, start, run.value)
            return run.found(status)
        status = self._minimize(run, start, run.value_and_gradient)
        for _ in range(_MOST_POLISHES):
            before = run.best_norm
            if status is not Status.STAGNATED:
                break
            # scipy's line searches compare values. Near a minimum, rounding hides their differences. Gradients give
            # them: G(x) − G(c) = ½ (∇G(x) + ∇G(c))ᵀ (x − c) up to the third power of the distance.
            run.centre()
            status = self._minimize(run, run.best, run.difference_and_gradient)
            if run.best_norm > 0.5 * before:
                break
        return run.found(status)

    def _minimize(self, run: _Run, start: Array, function: Callable[[Array], Any]) -> Status:
        import scipy.optimize

        method = self.method.lower()
        try:
            with own_warnings(run.problem.where, self.options), np.errstate(all="ignore"):
                result = scipy.optimize.minimize(
                    function,
                    start,
                    method=self.method,
                    jac=None if method in _WITHOUT_GRADIENT else True,
                    hess=run.hessian if method in _WITH_HESSIAN else None,
                    hessp=run.product if method in _WITH_PRODUCTS else None,
                    callback=run.count,
                    options=self._settings(method, run.threshold / run.unit, start.size, run.steps),
                )
        except ScipyResult as reached:
            run.best, run.best_norm = reached.x, 0.0
            return Status.CONVERGED
        except (ArithmeticError, ValueError) as error:
            if not overflowed(error):
                raise
            return Status.NOT_CONVERGED
        run.steps = max(run.steps, int(getattr(result, "nit", 0)))
        status = status_of(result, run.steps, self.max_steps)
        if method not in _WITHOUT_GRADIENT and status is Status.NOT_CONVERGED:
            status = Status.STAGNATED  # the tolerances are as tight as possible, so only rounding remains
        if status is Status.STAGNATED and run.best_norm > _NEAR * run.first_norm:
            return Status.LINE_SEARCH_FAILED
        if status is not Status.STAGNATED:
            run.best = np.asarray(result.x)
        return status

    def _settings(self, method: str, threshold: float, size: int, spent: int) -> dict[str, Any]:
        eps = float(np.finfo(np.float64).eps)
        norm = 0.5 * threshold / size**0.5  # scipy compares the largest entry
        settings: dict[str, Any] = {
            "nelder-mead": {"xatol": 1e-9, "fatol": 1e-15},
            "powell": {"xtol": 1e-9, "ftol": 1e-15},
            "cobyla": {"tol": 1e-9},
            "cobyqa": {"final_tr_radius": 1e-9},
            "cg": {"gtol": norm},
            "bfgs": {"gtol": norm},
            "l-bfgs-b": {"gtol": norm, "ftol": 0.0, "maxls": 50},
            "tnc": {"gtol": 0.0, "ftol": 0.0, "xtol": 0.0},
            "slsqp": {"ftol": eps**2},
            "newton-cg": {"xtol": eps},
            "trust-constr": {"gtol": norm, "xtol": eps},
        }.get(method, {"gtol": norm})
        if self.max_steps is not None:
            settings["maxfun" if method == "tnc" else "maxiter"] = max(self.max_steps - spent, 1)
        assert self.options is not None
        return {**settings, **self.options}


class _Run:
    """The functions that scipy calls for one problem, and the point with the smallest gradient so far."""

    def __init__(self, problem: Problem, like: torch.Tensor, start: Array, threshold: float) -> None:
        self.problem, self.like, self.threshold = problem, like, threshold
        value, gradient = problem.value_and_residual(self.tensor(start))
        self.first_norm = self.best_norm = float(gradient.norm())
        self.unit = self.first_norm  # the objective is divided by this, because scipy's line searches assume a scale
        self.best, self.best_gradient = start, as_array(gradient[0])
        # A stationary trial point above the initial value is not accepted as a minimum.
        self.highest = float(value) + 1e3 * float(torch.finfo(like.dtype).eps) * abs(float(value))
        self.steps = 0
        self.centre()

    def tensor(self, x: Array) -> torch.Tensor:
        return torch.as_tensor(x).to(self.like).unsqueeze(0)

    def count(self, *args: Any) -> None:
        self.steps += 1

    def centre(self) -> None:
        """Measure differences from the best point from now on."""
        self.at, self.gradient_there = self.best, self.best_gradient

    def value(self, x: Array) -> float:
        return float(self.problem.value(self.tensor(x))) / self.unit

    def value_and_gradient(self, x: Array) -> tuple[float, Array]:
        value, gradient = self.problem.value_and_residual(self.tensor(x))
        norm, found, flat = float(gradient.norm()), float(value), as_array(gradient[0])
        if found <= self.highest:
            if norm <= self.threshold:
                raise ScipyResult(np.array(x))
            if norm < self.best_norm:
                self.best, self.best_norm, self.best_gradient = np.array(x), norm, flat
        return found / self.unit, flat / self.unit

    def difference_and_gradient(self, x: Array) -> tuple[float, Array]:
        _, gradient = self.value_and_gradient(x)
        return float(0.5 * (gradient + self.gradient_there / self.unit) @ (x - self.at)), gradient

    def product(self, x: Array, v: Array) -> Array:
        return as_array(self.problem.linearize(self.tensor(x)).operator.matvec(self.tensor(v))[0]) / self.unit

    def hessian(self, x: Array) -> Array:
        return as_array(self.problem.linearize_dense(self.tensor(x)).operator.dense()[0]) / self.unit

    def found(self, status: Status) -> tuple[Array, int, Status]:
        return self.best, max(self.steps, 1), status
