"""Differentiate through any optimisation problem, root or fixed point, and know how wrong the derivative is."""

from bilevel._certificate import Bound, Constants
from bilevel._version import __version__
from bilevel.errors import (
    ArgumentError,
    BilevelError,
    BudgetWarning,
    CapturedTensorError,
    DtypeError,
    FailureWarning,
    InitGradientError,
    ShapeError,
    SolveError,
    SolveWarning,
    StochasticObjectiveError,
    TransformError,
)
from bilevel.layers import Layer, Solution, argmin, fixed_point, root
from bilevel.linear.exact import Exact
from bilevel.operators import LinearOperator
from bilevel.problem import BilevelProblem, Hypergradient, HypergradientReport
from bilevel.reports import Basis, Pass, Recording, SolveReport, Status, record
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.tolerance import AUTO, Tolerance
