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
from bilevel.linear.bicgstab import BiCGStab
from bilevel.linear.cg import CG
from bilevel.linear.exact import Exact
from bilevel.linear.gmres import GMRES
from bilevel.linear.neumann import Neumann
from bilevel.linear.scipy_bridge import ScipyLinear
from bilevel.operators import LinearOperator
from bilevel.problem import BilevelProblem, Hypergradient, HypergradientReport
from bilevel.reports import Basis, Pass, Recording, SolveReport, Status, record
from bilevel.solvers.anderson import Anderson
from bilevel.solvers.fixed_point import FixedPointIteration
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.lbfgs import LBFGS
from bilevel.solvers.newton import Newton
from bilevel.solvers.scipy_minimize import ScipyMinimize
from bilevel.solvers.scipy_root import ScipyRoot
from bilevel.solvers.torch_optimizer import TorchOptimizer
from bilevel.tolerance import AUTO, Tolerance

# An application: it imports the names above from here, and so comes last.
from bilevel.hyperopt.problem import HyperparameterOptimization  # isort: skip

__all__ = [
    "AUTO",
    "CG",
    "GMRES",
    "LBFGS",
    "Anderson",
    "ArgumentError",
    "Basis",
    "BiCGStab",
    "BilevelError",
    "BilevelProblem",
    "Bound",
    "BudgetWarning",
    "CapturedTensorError",
    "Constants",
    "DtypeError",
    "Exact",
    "FailureWarning",
    "FixedPointIteration",
    "GradientDescent",
    "Hypergradient",
    "HypergradientReport",
    "HyperparameterOptimization",
    "InitGradientError",
    "Layer",
    "LinearOperator",
    "Neumann",
    "Newton",
    "Pass",
    "Recording",
    "ScipyLinear",
    "ScipyMinimize",
    "ScipyRoot",
    "ShapeError",
    "Solution",
    "SolveError",
    "SolveReport",
    "SolveWarning",
    "Status",
    "StochasticObjectiveError",
    "Tolerance",
    "TorchOptimizer",
    "TransformError",
    "__version__",
    "argmin",
    "fixed_point",
    "record",
    "root",
]
