"""The defects that a diagnosis can name, each with its remedy."""

from __future__ import annotations

import enum

__all__ = ["Defect"]


class Defect(enum.Enum):
    """A defect of a problem. The value describes it, and :attr:`remedy` says what to do.

    Examples
    --------
    >>> from bilevel.testing import Defect
    >>> Defect.SADDLE.value, len(Defect)
    ('the inner point is not a minimum', 31)
    """

    UNUSABLE = "cannot be evaluated"
    NOT_FINITE = "meets NaN or infinity"
    STOCHASTIC = "is random"
    CHANGES_STATE = "changes its arguments or buffers"
    CAPTURED_TENSOR = "reaches a tensor that requires grad through its closure"
    INNER_DISCONNECTED = "does not depend on the unknown"
    WRONG_GRADIENT = "has a gradient that is not that of its values"
    NOT_SYMMETRIC = "has a Hessian that is not symmetric"
    UNCONVERGED = "the inner point is not stationary"
    DIVERGED = "the inner solve runs away"
    SADDLE = "the inner point is not a minimum"
    KINK = "the inner point is at a kink"
    DEGENERATE = "the derivative at the solution is one-sided"
    INFEASIBLE = "no point fulfils the constraints"
    UNBOUNDED = "the objective falls without end"
    INFEASIBLE_START = "the start violates a constraint"
    DUPLICATED = "a constraint repeats others"
    FIXED = "the bounds leave an unknown one value"
    SINGULAR = "the solution is not unique"
    SINGULAR_SEARCH = "a singular matrix stopped the search"
    MINIMUM_NORM = "the solution is not unique, and the outcome does not depend on it"
    ILL_CONDITIONED = "the inner problem is ill-conditioned"
    BADLY_SCALED = "the unknowns are badly scaled"
    OUTER_IGNORES_INNER = "the outer loss does not depend on the inner solution"
    DISCONNECTED = "an outer tensor is not used"
    ZERO_GRADIENT = "an outer tensor is used, and its gradient is exactly zero"
    LINEAR_SOLVE = "the linear solve of the derivative is not accurate"
    UNFIT_LINEAR_SOLVER = "the linear solver needs a symmetric matrix"
    UNREACHABLE_TOLERANCE = "the accuracy asked is below rounding"
    LOW_PRECISION = "the dtype is too coarse"
    MIXED_DTYPES = "the tensors have several dtypes"

    @property
    def remedy(self) -> str:
        """The remedy, as half a sentence."""
        return _REMEDIES[self]


_REMEDIES = {
    Defect.UNUSABLE: "call the function by itself with these arguments, and mend what it says",
    Defect.NOT_FINITE: "look for a log, square root or division outside its domain, start elsewhere, or lower the step size",
    Defect.STOCHASTIC: "switch dropout off with .eval(), or draw the noise outside and pass it as an argument",
    Defect.CHANGES_STATE: "use batch statistics (track_running_stats=False) or .eval(), and no operation that ends in an underscore",
    Defect.CAPTURED_TENSOR: "pass it as an argument (a module's parameters with torch.func.functional_call), or detach it",
    Defect.INNER_DISCONNECTED: "look for .detach(), .item(), numpy or torch.no_grad inside the function",
    Defect.WRONG_GRADIENT: "look for .detach(), rounding, or a custom backward inside the function",
    Defect.NOT_SYMMETRIC: "mend the custom backward that makes it, or state the equations as bilevel.root",
    Defect.UNCONVERGED: "raise max_steps, take Newton() or LBFGS(), or start nearer the solution",
    Defect.DIVERGED: "lower the step size, or take a solver with a line search",
    Defect.SADDLE: "add regularisation or start elsewhere; if that is intended, linear_solver=Exact(indefinite=True) or GMRES()",
    Defect.KINK: "start elsewhere if the point is no minimum; otherwise smooth the kink, or pass the term that has it as prox=, for example "
    "prox=bilevel.prox.L1(strength)",
    Defect.DEGENERATE: "change the arguments a little, for example a strength by a relative 1e-3, or take the derivative of one side with "
    "on_failure='ignore'",
    Defect.INFEASIBLE: "loosen the constraints with nonzero solution.multipliers (on_failure='ignore' returns them)",
    Defect.UNBOUNDED: "add a bound, or a term that grows with x, such as a small ridge",
    Defect.INFEASIBLE_START: "nothing needs doing for the library's own solvers, which need no feasible start; start inside for a solver of your "
    "own, or if a function is not defined outside",
    Defect.DUPLICATED: "leave one of them out; a derivative exists only with respect to arguments that move them together",
    Defect.FIXED: "nothing needs doing if that is meant; a derivative by either bound is half of that by both",
    Defect.SINGULAR: "add a small ridge term, pin or remove redundant unknowns, or differentiate what does not depend on the free directions",
    Defect.SINGULAR_SEARCH: "start elsewhere, for example at init + 1e-3 * torch.randn_like(init), and look for equations that contradict each other",
    Defect.MINIMUM_NORM: "nothing needs doing: the gradient is that of the solution of smallest change, and right for this outcome; to make the "
    "solution unique, pin one unknown or add a small ridge term",
    Defect.ILL_CONDITIONED: "add regularisation, use float64, and take Exact() or a preconditioner",
    Defect.BADLY_SCALED: "divide each unknown by its typical size, standardise the inputs, or pass CG(preconditioner=...)",
    Defect.OUTER_IGNORES_INNER: "check that outer_objective uses its first argument, without .detach()",
    Defect.DISCONNECTED: "use it in an objective, or leave it out; look for .detach() and integer conversions on its way",
    Defect.ZERO_GRADIENT: "look for clamps, dead ReLUs and rounding on its way, or begin at another value",
    Defect.LINEAR_SOLVE: "raise max_steps, or take Exact() where the matrix is small and GMRES() where it is not definite",
    Defect.UNFIT_LINEAR_SOLVER: "take Exact(), GMRES() or BiCGStab()",
    Defect.UNREACHABLE_TOLERANCE: "use float64, loosen the tolerance, or leave it out",
    Defect.LOW_PRECISION: "use float32 or float64 for the solve",
    Defect.MIXED_DTYPES: "convert the unknown and the arguments to one dtype: the coarsest limits the accuracy of all",
}
