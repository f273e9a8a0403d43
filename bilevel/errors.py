"""Errors and warnings. Each message says where, what was expected, what came, and what to do.

Every class inherits twice: from :class:`BilevelError`, and from the built-in class that a caller
without knowledge of this library would catch.
"""

from __future__ import annotations

from bilevel.reports import SolveReport

__all__ = [
    "ArgumentError",
    "BilevelError",
    "BudgetWarning",
    "CapturedTensorError",
    "ConstantsError",
    "DtypeError",
    "FailureWarning",
    "InitGradientError",
    "NonFiniteError",
    "ShapeError",
    "SolveError",
    "SolveWarning",
    "StochasticObjectiveError",
    "TransformError",
]


class BilevelError(Exception):
    """Base of every error that this library raises on purpose."""


class ArgumentError(BilevelError, ValueError):
    """An argument has a value that cannot be used, such as a negative step size."""


class DtypeError(BilevelError, TypeError):
    """A tensor has a dtype that cannot be optimised or differentiated, such as int64."""


class ShapeError(BilevelError, ValueError):
    """A function returned, or was given, tensors whose shapes do not fit."""


class CapturedTensorError(BilevelError, RuntimeError):
    """A tensor that the function captures requires grad, and would receive no gradient."""


class InitGradientError(BilevelError, RuntimeError):
    """The initial guess requires grad, but a solution does not depend on it."""


class StochasticObjectiveError(BilevelError, RuntimeError):
    """Two evaluations at one point differ, so that no solution is defined."""


class NonFiniteError(BilevelError, ArithmeticError):
    """A direction of a stochastic method is infinite or not a number."""


class ConstantsError(BilevelError, ValueError):
    """A constant that was given cannot be true: what was computed refutes it."""


class TransformError(BilevelError, RuntimeError):
    """A nesting of transforms that PyTorch would silently differentiate wrongly, or an operation that it cannot batch."""


class SolveError(BilevelError, RuntimeError):
    """A solve failed; :attr:`report` says for which problems and how.

    Parameters
    ----------
    message
        One sentence with the remedy.
    report
        The report of the failed solve.
    """

    def __init__(self, message: str, report: SolveReport) -> None:
        super().__init__(message)
        self.report = report


class FailureWarning(UserWarning):
    """Base of the warnings given where ``on_failure="warn"`` turned an error into one."""


class SolveWarning(FailureWarning):
    """A solve failed and the caller asked to be warned instead of stopped."""


class BudgetWarning(UserWarning):
    """A step budget ended short of the default accuracy, and no accuracy was asked for."""
