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
    """Base of every error that this library raises on purpose.

    Examples
    --------
    >>> import torch, bilevel
    >>> layer = bilevel.root(lambda x, a: x**2 - a)
    >>> try:
    ...     layer(torch.tensor(1.0), torch.tensor(-1.0))  # no real root
    ... except bilevel.BilevelError as error:
    ...     print(type(error).__name__, error.report.status.name, error.report.status.value)
    SolveError SINGULAR 8
    """


class ArgumentError(BilevelError, ValueError):
    """An argument has a value that cannot be used, such as a negative step size.

    Examples
    --------
    >>> import bilevel
    >>> try:
    ...     bilevel.CG(max_steps=-1)
    ... except ValueError as error:
    ...     print(error)
    CG: expected max_steps to be an integer of at least 1, got -1; write for example max_steps=10, or leave it out
    """


class DtypeError(BilevelError, TypeError):
    """A tensor has a dtype that cannot be optimised or differentiated, such as int64.

    Examples
    --------
    >>> import torch, bilevel
    >>> layer = bilevel.argmin(lambda x, a: ((x - a) ** 2).sum())
    >>> try:
    ...     layer(torch.zeros(2, dtype=torch.int64), torch.ones(2))
    ... except TypeError as error:
    ...     print(str(error).partition("; ")[2])
    convert it with .to(torch.float64) or .float()
    """


class ShapeError(BilevelError, ValueError):
    """A function returned, or was given, tensors whose shapes do not fit.

    Examples
    --------
    >>> import torch, bilevel
    >>> layer = bilevel.argmin(lambda x, a: (x - a) ** 2)  # the sum is forgotten
    >>> try:
    ...     layer(torch.zeros(2), torch.ones(2))
    ... except ValueError as error:
    ...     print(str(error).partition("; ")[2])
    reduce it, for example with .sum() or .mean()
    """


class CapturedTensorError(BilevelError, RuntimeError):
    """A tensor that the function captures requires grad, and would receive no gradient.

    Examples
    --------
    >>> import torch, bilevel
    >>> a = torch.ones(2, requires_grad=True)
    >>> layer = bilevel.argmin(lambda x: ((x - a) ** 2).sum())  # a is no argument
    >>> try:
    ...     layer(torch.zeros(2))
    ... except bilevel.CapturedTensorError as error:
    ...     print(str(error).partition("; ")[2].partition(" (")[0])
    pass it as an argument
    """


class InitGradientError(BilevelError, RuntimeError):
    """The initial guess requires grad, but a solution does not depend on it.

    Examples
    --------
    >>> import torch, bilevel
    >>> layer = bilevel.argmin(lambda x, a: ((x - a) ** 2).sum())
    >>> try:
    ...     layer(torch.zeros(2, requires_grad=True), torch.ones(2))
    ... except bilevel.InitGradientError as error:
    ...     print(str(error).partition("; ")[2])
    pass init.detach(), for a dict {name: x.detach() for name, x in init.items()}, or pass the tensor as an argument
    """


class StochasticObjectiveError(BilevelError, RuntimeError):
    """Two evaluations at one point differ, so that no solution is defined.

    Examples
    --------
    >>> import torch, bilevel
    >>> layer = bilevel.argmin(lambda x, a: ((torch.dropout(x, 0.5, True) - a) ** 2).sum())
    >>> try:
    ...     layer(torch.ones(20), torch.ones(20))
    ... except bilevel.StochasticObjectiveError as error:
    ...     print(str(error).partition("; ")[2])
    switch dropout off with .eval(), or draw the noise outside and pass it as an argument
    """


class NonFiniteError(BilevelError, ArithmeticError):
    """A direction of a stochastic method is infinite or not a number.

    Examples
    --------
    >>> import torch, bilevel
    >>> losses = lambda w, theta, data: (w * theta / 0).sum(), lambda w, theta, data: w.sum()
    >>> method = bilevel.stochastic.SOBA(losses, torch.ones(1), torch.ones(1))
    >>> try:
    ...     method.step(None, None)
    ... except ArithmeticError as error:
    ...     print(str(error).partition("; ")[2])
    lower the learning rates, clip with StepOptions(max_norm=..., inner_max_norm=...), or pass StepOptions(on_nonfinite='skip')
    """


class ConstantsError(BilevelError, ValueError):
    """A constant that was given cannot be true: what was computed refutes it.

    Examples
    --------
    >>> import torch, bilevel
    >>> class Tuning(bilevel.BilevelProblem):
    ...     def constants(self, outer, data):
    ...         return bilevel.Constants(strong_convexity=3.0)
    ...     def inner_objective(self, inner, outer, data):
    ...         return (inner - outer) ** 2  # of curvature 2
    ...     def outer_objective(self, inner, outer, data):
    ...         return inner**2
    >>> one = torch.tensor(1.0, dtype=torch.float64)
    >>> try:
    ...     Tuning().hypergradient(one, None, init=0 * one).error_bound
    ... except bilevel.ConstantsError as error:
    ...     print(str(error).partition("; ")[0])
    `Tuning`: expected constants that hold near the solution, got strong_convexity=3, where the Hessian at the returned point has curvature 2
    """


class TransformError(BilevelError, RuntimeError):
    """A nesting of transforms that PyTorch would silently differentiate wrongly, or an operation that it cannot batch.

    Examples
    --------
    >>> import torch, bilevel
    >>> from torch.func import jvp
    >>> layer = bilevel.argmin(lambda x, a: ((x - a) ** 2).sum())
    >>> def forward(a):
    ...     return jvp(lambda a: layer(torch.zeros(1), a), (a,), (a,))[1]
    >>> try:
    ...     jvp(forward, (torch.ones(1),), (torch.ones(1),))
    ... except bilevel.TransformError as error:
    ...     print(str(error).partition("; ")[2])
    write jacfwd(jacrev(f)) or torch.func.hessian(f) instead of jacfwd(jacfwd(f))
    """


class SolveError(BilevelError, RuntimeError):
    """A solve failed; :attr:`report` says for which problems and how.

    Parameters
    ----------
    message
        One sentence with the remedy.
    report
        The report of the failed solve.

    Examples
    --------
    >>> import torch, bilevel
    >>> layer = bilevel.argmin(lambda x, a: a * (x[0] ** 2 - x[1] ** 2))
    >>> try:
    ...     layer(torch.zeros(2), torch.tensor(1.0))
    ... except bilevel.SolveError as error:
    ...     print(error.report.status.name, error.report.status.value)
    INDEFINITE 7
    """

    def __init__(self, message: str, report: SolveReport) -> None:
        super().__init__(message)
        self.report = report


class FailureWarning(UserWarning):
    """Base of the warnings given where ``on_failure="warn"`` turned an error into one.

    Examples
    --------
    >>> import warnings, torch, bilevel
    >>> layer = bilevel.root(lambda x, a: x**2 - a, on_failure="warn")
    >>> with warnings.catch_warnings(record=True) as given:
    ...     warnings.simplefilter("always")
    ...     x = layer(torch.tensor(1.0), torch.tensor(-1.0))
    >>> len(given), isinstance(given[0].message, bilevel.FailureWarning)
    (1, True)
    """


class SolveWarning(FailureWarning):
    """A solve failed and the caller asked to be warned instead of stopped.

    Examples
    --------
    >>> import warnings, torch, bilevel
    >>> layer = bilevel.root(lambda x, a: x**2 - a, on_failure="warn")
    >>> with warnings.catch_warnings(record=True) as given:
    ...     warnings.simplefilter("always")
    ...     x = layer(torch.tensor(1.0), torch.tensor(-1.0))
    >>> len(given), given[0].category.__name__
    (1, 'SolveWarning')
    """


class BudgetWarning(UserWarning):
    """A step budget ended short of the default accuracy, and no accuracy was asked for.

    Examples
    --------
    >>> import warnings, torch, bilevel
    >>> layer = bilevel.argmin(lambda x, a: ((x - a) ** 2).sum(), solver=bilevel.GradientDescent(0.01, max_steps=5))
    >>> with warnings.catch_warnings(record=True) as given:
    ...     warnings.simplefilter("always")
    ...     x = layer(torch.zeros(2), torch.ones(2))
    >>> len(given), given[0].category.__name__
    (1, 'BudgetWarning')
    """
