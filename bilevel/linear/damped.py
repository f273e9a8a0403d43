"""Damping: solve (A + γI) x = b in place of A x = b if A is not positive definite, or nearly singular."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from bilevel.linear._base import LinearSolver, LinearSolverLike, as_linear_solver
from bilevel.linear._solution import LinearSolution
from bilevel.linear.cg import CG
from bilevel.operators import DampedOperator, LinearOperator
from bilevel.reports import Status
from bilevel.setting_checks import check_number

__all__ = ["Damped"]


@dataclass(frozen=True)
class Damped(LinearSolver):
    r"""Solve (A + γI) x = b by another solver. The status refers to the residual of A x = b, which is γ‖x‖ at best.

    If an inner solve ends before a minimum, A may have negative eigenvalues, and methods for positive definite matrices
    fail. With γ above the size of these eigenvalues, the damped system is positive definite. Its solution is biased
    towards b/γ, and the residual shows the bias. With no accuracy asked, the bias is not a failure: the report has
    ``BUDGET_SPENT`` and the residual.

    Parameters
    ----------
    solver
        The solver of the damped system; by default conjugate gradients.
    damping
        γ > 0, in the units of A's eigenvalues.

    Raises
    ------
    ArgumentError
        If the damping is not positive.

    References
    ----------
    Tikhonov; for Hessian-free optimisation Martens, ICML 2010, section 4.1.

    Examples
    --------
    >>> import torch, bilevel
    >>> from bilevel.operators import DenseOperator
    >>> A = DenseOperator(torch.tensor([[1.0, 0.0], [0.0, -0.5]]), symmetric=True)
    >>> budget = bilevel.Tolerance(delta=None, delta_prime=None)
    >>> Damped(bilevel.CG(max_steps=2), damping=1.0)(A, torch.tensor([[1.0, 1.0]]), budget)
    tensor([[0.5000, 2.0000]])
    """

    solver: LinearSolverLike = field(default_factory=CG)
    damping: float = 1.0

    def __post_init__(self) -> None:
        check_number("Damped", "damping", self.damping)
        object.__setattr__(self, "solver", as_linear_solver(self.solver))

    @property
    def has_budget(self) -> bool:
        return True  # whoever chooses damping accepts its bias

    @property
    def name(self) -> str:
        return f"Damped {as_linear_solver(self.solver).name}"

    def solve(
        self, operator: LinearOperator, rhs: torch.Tensor, threshold: torch.Tensor, start: torch.Tensor | None = None
    ) -> LinearSolution:
        solver = as_linear_solver(self.solver)
        damped = solver.solve(DampedOperator(operator, self.damping), rhs, threshold, start)
        if damped.residual is None:
            return damped
        # The damped system was solved, and A x = b was not.
        status = torch.where(damped.status == Status.CONVERGED, int(Status.MAX_STEPS), damped.status)
        # b − A x = [b − (A + γI) x] + γ x needs no further product.
        return LinearSolution(damped.x, damped.iterations, status, damped.residual + self.damping * damped.x)
