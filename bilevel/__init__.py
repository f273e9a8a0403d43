"""Differentiate through any optimisation problem, root or fixed point, and know how wrong the derivative is."""

import importlib
from typing import TYPE_CHECKING, Any

from bilevel import certificates, cones, operators, prox, robust
from bilevel._version import __version__
from bilevel.certificates.bound import Bound
from bilevel.certificates.constants import Constants
from bilevel.cones.cone_program import ConeCertificate, ConeSolution, cone_program
from bilevel.equations.problem import Problem
from bilevel.errors import (
    ArgumentError,
    BilevelError,
    BudgetWarning,
    CapturedTensorError,
    ConstantsError,
    DtypeError,
    FailureWarning,
    InitGradientError,
    ShapeError,
    SolveError,
    SolveWarning,
    StochasticObjectiveError,
    TransformError,
)
from bilevel.layers import Layer, LinearLayer, Solution, argmin, fixed_point, linear_solve, root
from bilevel.layers.constraints import Constraints, PerConstraint
from bilevel.layers.differentiation import Differentiation, Implicit, OneStep, PhantomGradient, Truncated, Unrolled
from bilevel.layers.equilibrium import EquilibriumLayer, equilibrium
from bilevel.layers.least_squares import FullHessian, GaussNewtonHessian, LeastSquaresLayer, least_squares
from bilevel.layers.modules import FunctionalModule
from bilevel.layers.rectangular import RectangularLayer
from bilevel.linear._base import LinearSolver
from bilevel.linear._solution import LinearSolution
from bilevel.linear.bicgstab import BiCGStab
from bilevel.linear.cg import CG
from bilevel.linear.damped import Damped
from bilevel.linear.diagonal import Diagonal
from bilevel.linear.exact import Exact
from bilevel.linear.gmres import GMRES
from bilevel.linear.kept import Kept
from bilevel.linear.kronecker import Kronecker
from bilevel.linear.lsmr import LSMR
from bilevel.linear.minres import MINRES
from bilevel.linear.neumann import Neumann
from bilevel.linear.nystrom import Nystrom
from bilevel.linear.orthogonal import QR, SVD
from bilevel.linear.scipy_bridge import ScipyLinear
from bilevel.operators import LinearOperator
from bilevel.outer.methods import HOAG, MAID, OuterMethod
from bilevel.outer.minimize import OuterRun, minimize
from bilevel.outer.result import OuterResult, OuterStatus, OuterStep
from bilevel.problems.adaptive.state import GoalReport
from bilevel.problems.problem import BilevelProblem
from bilevel.problems.result import Hypergradient, HypergradientReport
from bilevel.pytree import ravel
from bilevel.quadratic_programs._clarabel import Clarabel
from bilevel.quadratic_programs._solvers import Mehrotra
from bilevel.quadratic_programs.quadratic_program import Certificate, ProgramSolution, quadratic_program
from bilevel.recording import Recording, record
from bilevel.replay import replaying
from bilevel.reports import Basis, Pass, SolveReport, Status
from bilevel.schedules import CubicSchedule, ExponentialSchedule, QuadraticSchedule
from bilevel.solvers._base import Goal, InnerSolution, InnerSolver
from bilevel.solvers.anderson import Anderson
from bilevel.solvers.batched import BatchedSolver
from bilevel.solvers.bracketing import Bisection, Brent
from bilevel.solvers.fixed_point import FixedPointIteration
from bilevel.solvers.gauss_newton import GaussNewton
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.interior_point import InteriorPoint
from bilevel.solvers.lbfgs import LBFGS
from bilevel.solvers.levenberg_marquardt import LevenbergMarquardt
from bilevel.solvers.newton import Newton
from bilevel.solvers.projected_lbfgs import ProjectedLBFGS
from bilevel.solvers.projected_newton import ProjectedNewton
from bilevel.solvers.proximal_gradient import ProximalGradient
from bilevel.solvers.scipy_minimize import ScipyMinimize
from bilevel.solvers.scipy_root import ScipyRoot
from bilevel.solvers.torch_optimizer import TorchOptimizer
from bilevel.tolerance import AUTO, Tolerance

if TYPE_CHECKING:
    from bilevel import cleaning, display, learnable, loggers, stochastic, testing
    from bilevel.hyperopt.problem import HyperparameterOptimization
    from bilevel.meta.imaml import IMAML

__all__ = [
    "AUTO",
    "CG",
    "GMRES",
    "HOAG",
    "IMAML",
    "LBFGS",
    "LSMR",
    "MAID",
    "MINRES",
    "QR",
    "SVD",
    "Anderson",
    "ArgumentError",
    "Basis",
    "BatchedSolver",
    "BiCGStab",
    "BilevelError",
    "BilevelProblem",
    "Bisection",
    "Bound",
    "Brent",
    "BudgetWarning",
    "CapturedTensorError",
    "Certificate",
    "Clarabel",
    "ConeCertificate",
    "ConeSolution",
    "Constants",
    "ConstantsError",
    "Constraints",
    "CubicSchedule",
    "Damped",
    "Diagonal",
    "Differentiation",
    "DtypeError",
    "EquilibriumLayer",
    "Exact",
    "ExponentialSchedule",
    "FailureWarning",
    "FixedPointIteration",
    "FullHessian",
    "FunctionalModule",
    "GaussNewton",
    "GaussNewtonHessian",
    "Goal",
    "GoalReport",
    "GradientDescent",
    "Hypergradient",
    "HypergradientReport",
    "HyperparameterOptimization",
    "Implicit",
    "InitGradientError",
    "InnerSolution",
    "InnerSolver",
    "InteriorPoint",
    "Kept",
    "Kronecker",
    "Layer",
    "LeastSquaresLayer",
    "LevenbergMarquardt",
    "LinearLayer",
    "LinearOperator",
    "LinearSolution",
    "LinearSolver",
    "Mehrotra",
    "Neumann",
    "Newton",
    "Nystrom",
    "OneStep",
    "OuterMethod",
    "OuterResult",
    "OuterRun",
    "OuterStatus",
    "OuterStep",
    "Pass",
    "PerConstraint",
    "PhantomGradient",
    "Problem",
    "ProgramSolution",
    "ProjectedLBFGS",
    "ProjectedNewton",
    "ProximalGradient",
    "QuadraticSchedule",
    "Recording",
    "RectangularLayer",
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
    "Truncated",
    "Unrolled",
    "__version__",
    "argmin",
    "certificates",
    "cleaning",
    "cone_program",
    "cones",
    "display",
    "equilibrium",
    "fixed_point",
    "learnable",
    "least_squares",
    "linear_solve",
    "loggers",
    "minimize",
    "operators",
    "prox",
    "quadratic_program",
    "ravel",
    "record",
    "replaying",
    "robust",
    "root",
    "stochastic",
    "testing",
]

# The applications and the checks are not every program's: each is imported when it is first asked for.
_IMPORTED_WHEN_USED = {
    "HyperparameterOptimization": "bilevel.hyperopt.problem",
    "IMAML": "bilevel.meta.imaml",
    "cleaning": "bilevel.cleaning",
    "display": "bilevel.display",
    "learnable": "bilevel.learnable",
    "loggers": "bilevel.loggers",
    "stochastic": "bilevel.stochastic",
    "testing": "bilevel.testing",
}


def __getattr__(name: str) -> Any:
    if name not in _IMPORTED_WHEN_USED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_IMPORTED_WHEN_USED[name])
    value = globals()[name] = getattr(module, name, module)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
