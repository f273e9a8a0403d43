"""Common parts of the two bridges to scipy: numpy in float64 outside, the problem's own dtype inside."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from bilevel.equations.problem import Problem
from bilevel.errors import ArgumentError
from bilevel.reports import Status
from bilevel.setting_checks import FrozenOptions, check_steps
from bilevel.solvers._base import Goal, InnerSolution, InnerSolver

__all__ = [
    "Array",
    "ScipyResult",
    "ScipySolver",
    "as_array",
    "overflowed",
    "own_warnings",
    "solve_each",
    "status_of",
]

Array = npt.NDArray[np.float64]
# numpy's message if scipy's linear algebra receives numbers that are not finite.
_CHECKED = ("array must not contain infs or NaNs",)


class ScipyResult(Exception):
    """Ends a run of scipy: the residual at :attr:`x` is at or below the goal's."""

    def __init__(self, x: Array) -> None:
        super().__init__()
        self.x = x


@dataclass(frozen=True)
class ScipySolver(InnerSolver):
    """The settings of both bridges. ``known`` lists scipy's methods."""

    method: str
    max_steps: int | None = None
    options: Mapping[str, Any] | None = field(default=None, hash=False)

    known: ClassVar[frozenset[str]]

    def __post_init__(self) -> None:
        import scipy.optimize  # noqa: F401  # here, so that the first solve does not wait for it

        where = type(self).__name__
        _check_method(where, self.method, self.known)
        check_steps(where, "max_steps", self.max_steps, optional=True)
        object.__setattr__(self, "options", _frozen_options(where, self.options))

    @property
    def name(self) -> str:
        return f"{type(self).__name__}({self.method})"


def _check_method(where: str, method: Any, known: frozenset[str]) -> None:
    """Raise unless ``method`` is one that scipy knows."""
    if not isinstance(method, str) or method.lower() not in known:
        raise ArgumentError(
            f"{where}: expected method to be one of {', '.join(sorted(known))}, got {method!r}; pass one of them"
        )


def _frozen_options(where: str, options: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return a read-only copy of ``options``. Arguments of scipy that are not options of a method are refused."""
    if options is not None and not isinstance(options, Mapping):
        raise ArgumentError(f"{where}: expected options to be a mapping or None, got {options!r}; pass a dict")
    for name in options or {}:
        if name in _ARGUMENTS:
            raise ArgumentError(
                f"{where}: expected options of the scipy method, got {name!r}, which is an argument of scipy.optimize itself; "
                f"{_ARGUMENTS[name]}"
            )
    return FrozenOptions(options or {})


_GIVEN = "leave it out, for it is taken from the layer's function"
_ARGUMENTS = {
    "bounds": "leave it out, and pass lower= and upper= to bilevel.argmin",
    "constraints": "leave it out, and pass equality= and inequality= to bilevel.argmin",
    "jac": _GIVEN,
    "hess": _GIVEN,
    "hessp": _GIVEN,
    "fun": _GIVEN,
    "x0": "leave it out, for it is the layer's init",
    "args": "leave it out, for a layer is called with the arguments of its function",
    "method": "pass it as method=",
    "callback": "leave it out, for steps are counted by it",
    "tol": "pass tolerance=bilevel.Tolerance(delta=...) to the layer",
}


@contextmanager
def own_warnings(where: str, options: Mapping[str, Any] | None) -> Iterator[None]:
    """Silence scipy's warnings, as the residual judges the result, and refuse ``options`` that scipy does not know or cannot use."""
    import scipy.optimize  # imported here because it takes long, and not every program needs it

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="Unknown solver options")
        try:
            yield
        except scipy.optimize.OptimizeWarning as warning:
            raise ArgumentError(
                f"{where}: expected options of the method, and scipy says: {warning}; leave out what it does not know"
            ) from warning
        except Exception as error:
            # scipy cannot use the type or value of an option. The caller handles numerical failures.
            if not options or isinstance(error, ScipyResult) or _is_numeric(error) or not _is_scipys(error):
                raise
            said = " ".join(str(error).split())
            raise ArgumentError(
                f"{where}: expected options of the method, and scipy says: {said}; change or leave out what it names"
            ) from error


def _is_numeric(error: Exception) -> bool:
    return overflowed(error) or "Jacobian inversion" in str(error)


def _is_scipys(error: BaseException) -> bool:
    """Return whether scipy's own code raised ``error``, and not the user's function."""
    trace = error.__traceback__
    last = ""
    while trace is not None:
        last, trace = trace.tb_frame.f_globals.get("__name__", ""), trace.tb_next
    return str(last).startswith(("scipy.", "numpy."))


def overflowed(error: Exception) -> bool:
    """Return whether scipy ended because its own recurrences are not finite, for example after a division by a curvature of zero."""
    return isinstance(error, (ArithmeticError, np.linalg.LinAlgError)) or error.args == _CHECKED


def as_array(tensor: torch.Tensor) -> Array:
    """Return a copy in float64 on the CPU, of any floating-point dtype and of torch's stored zeros too."""
    return np.array(tensor.detach().double().numpy(force=True))


def solve_each(
    problem: Problem,
    init: torch.Tensor,
    goal: Goal,
    solve: Callable[[Problem, Array, float], tuple[Array, int, Status]],
) -> InnerSolution:
    """Solve the problems one by one with ``solve(problem, x₀, threshold)`` ↦ (x, iterations, status)."""
    rows, counts, codes = [], [], []
    for number, (row, threshold) in enumerate(zip(init, goal.threshold.tolist(), strict=True)):
        one = problem.single(number)
        residual = one.residual(row.unsqueeze(0))
        norm = float(residual.norm())
        if norm <= threshold or not np.isfinite(norm):
            found, count = row, 0
            code = Status.CONVERGED if norm <= threshold else Status.NOT_FINITE
        else:
            x, count, code = solve(one, as_array(row), threshold)
            found = torch.as_tensor(x).to(row) if np.isfinite(x).all() else row
        rows.append(found)
        counts.append(count)
        codes.append(int(code))
    device = init.device
    return InnerSolution(
        torch.stack(rows),
        torch.tensor(counts, dtype=torch.int64, device=device),
        torch.tensor(codes, dtype=torch.int64, device=device),
    )


def status_of(result: Any, count: int, max_steps: int | None) -> Status:
    """Return the status of scipy's result. The true residual decides whether it has converged."""
    if not np.isfinite(np.asarray(result.x)).all() or not np.isfinite(np.asarray(result.fun)).all():
        return Status.NOT_FINITE
    message = str(result.message).lower()
    if (max_steps is not None and count >= max_steps) or any(
        word in message for word in ("maximum", "exceed", "limit", "max_nit", "max_nfev")
    ):
        return Status.MAX_STEPS
    if any(word in message for word in ("precision", "abnormal", "line search", "not making good progress")):
        return Status.STAGNATED
    return Status.NOT_CONVERGED
