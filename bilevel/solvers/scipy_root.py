"""Every method of scipy.optimize.root as an inner solver."""

from __future__ import annotations

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

__all__ = ["ScipyRoot"]

_WITH_JACOBIAN = frozenset({"hybr", "lm"})
_LIMITS = {"hybr": "maxfev", "df-sane": "maxfev"}
_KNOWN = _WITH_JACOBIAN | {
    "anderson", "broyden1", "broyden2", "df-sane", "diagbroyden", "excitingmixing", "krylov", "linearmixing",
}  # fmt: skip


@dataclass(frozen=True)
class ScipyRoot(ScipySolver):
    """Solve each root or fixed point with ``scipy.optimize.root``.

    Scipy gets float64 and, for hybr and lm, the exact Jacobian, from n products. A run ends when ‖R‖ meets the
    threshold; scipy's own tolerances are tighter. The true residual decides whether a problem has converged.

    The problems of a batch are solved one after another. scipy works on the CPU.

    Parameters
    ----------
    method
        The name of scipy's method, in any case.
    max_steps
        The most iterations, or evaluations for hybr and df-sane; None for scipy's own limit.
    options
        Scipy's ``options`` for the method, which go before those chosen here.

    Raises
    ------
    ArgumentError
        If the method is unknown to scipy; on use, if an option is, or for an argmin.

    References
    ----------
    https://docs.scipy.org/doc/scipy/reference/generated/scipy.optimize.root.html; hybr is MINPACK's hybrid
    method of Powell, 1970.

    Examples
    --------
    >>> import torch, bilevel
    >>> layer = bilevel.root(lambda x, a: x**3 + x - a, solver=ScipyRoot())
    >>> layer(torch.zeros(2, dtype=torch.float64), torch.tensor([2.0, 9.0], dtype=torch.float64))
    tensor([1.0000, 1.9202], dtype=torch.float64)
    """

    method: str = "hybr"

    known: ClassVar[frozenset[str]] = _KNOWN

    def solve(self, problem: Problem, init: torch.Tensor, goal: Goal) -> InnerSolution:
        if problem.minimizes:
            raise ArgumentError(
                f"{problem.where}: expected a root or a fixed point for ScipyRoot, got an argmin; take ScipyMinimize() "
                "or Newton(), which distinguish a minimum from a saddle"
            )
        return solve_each(problem, init, goal, lambda one, x, threshold: self._solve_one(one, init, x, threshold))

    def _solve_one(
        self, problem: Problem, like: torch.Tensor, start: Array, threshold: float
    ) -> tuple[Array, int, Status]:
        import scipy.optimize

        method = self.method.lower()
        evaluations = [0]
        best, least = [start], [float("inf")]
        # scipy's root leaves its function in a reference cycle until a garbage collection. The problem must not be in
        # it.
        held, dtype, device = [problem], like.dtype, like.device

        def torch_of(x: Array) -> torch.Tensor:
            return torch.as_tensor(x).to(device, dtype).unsqueeze(0)

        def residual(x: Array) -> Array:
            evaluations[0] += 1
            found = held[0].residual(torch_of(x))[0]
            norm = float(found.norm())
            if norm <= threshold:
                raise ScipyResult(np.array(x))
            if norm < least[0]:
                best[0], least[0] = np.array(x), norm
            return as_array(found)

        def jacobian(x: Array) -> Array:
            dense = held[0].linearize_dense(torch_of(x)).operator.dense()[0]
            return as_array(dense)

        exact = method in _WITH_JACOBIAN
        try:
            with own_warnings(problem.where, self.options), np.errstate(all="ignore"):
                result = scipy.optimize.root(
                    residual,
                    start,
                    method=method,
                    jac=jacobian if exact else None,
                    options=self._settings(method, threshold, start.size),
                )
        except ScipyResult as reached:
            return reached.x, evaluations[0], Status.CONVERGED
        except (ArithmeticError, ValueError) as error:
            if overflowed(error):
                return best[0], evaluations[0], Status.DIVERGED
            if "Jacobian inversion" not in str(error):
                raise
            return best[0], evaluations[0], Status.SINGULAR
        finally:
            held.clear()
        return best[0], evaluations[0], status_of(result, evaluations[0], self.max_steps)

    def _settings(self, method: str, threshold: float, size: int) -> dict[str, Any]:
        eps = float(np.finfo(np.float64).eps)
        settings: dict[str, Any] = {
            "hybr": {"xtol": eps},
            "lm": {"xtol": eps, "ftol": eps},
            "df-sane": {"fatol": 0.5 * threshold, "ftol": 0.0},
        }.get(method, {"fatol": max(0.5 * threshold / size**0.5, 1e-300)})
        if self.max_steps is not None:
            settings[_LIMITS.get(method, "maxiter")] = self.max_steps
        assert self.options is not None
        return {**settings, **self.options}
