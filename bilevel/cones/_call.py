"""One call of a cone program: its solve and the verdict on derivatives, for the rule of :mod:`bilevel.implicit`."""

from __future__ import annotations

import torch

from bilevel.cones._conditions import Conditions
from bilevel.cones._cone import Nonnegative, Zero
from bilevel.cones._solve import solve_cones
from bilevel.cones._sparse import FactorisedJacobians
from bilevel.cones._wording import forward_words
from bilevel.equations.problem import Problem
from bilevel.layers.call import SolveCall
from bilevel.layers.inspector import Inspector
from bilevel.layers.settings import SolveSettings
from bilevel.linear._base import LinearSolver
from bilevel.linear.exact import Exact
from bilevel.linear.gmres import GMRES
from bilevel.operators import LinearOperator, TransposedOperator
from bilevel.quadratic_programs._call import NO_DERIVATIVE
from bilevel.quadratic_programs._clarabel import Clarabel
from bilevel.reports import Basis, Status
from bilevel.solvers.judging.outcome import InnerOutcome

__all__ = ["ConeCall"]

_THRESHOLD = 1e-8
# To tell whether a derivative depends on the side of a kink: points beside it, their distance, and the share of a solution that is the same.
_SIDES, _BESIDE, _SAME = 4, 1e-7, 1e-6
_DENSE_ORDER, _DENSE_NUMBERS = 2048, 2**27


class ConeCall(SolveCall):
    """The solves of one call. Our own equations need no inspection."""

    def __init__(self, settings: SolveSettings, conditions: Conditions, solver: Clarabel, where: str) -> None:
        super().__init__(settings, Inspector(), conditions, where, False, torch.float64)
        self.conditions, self.solver = conditions, solver
        self.certificate: torch.Tensor | None = None
        self.kinked: tuple[torch.Tensor, list[torch.Tensor]] | None = None  # z (batch, n + m) and A of each problem

    def solve(self, problem: Problem, init: torch.Tensor) -> torch.Tensor:
        """Return z (*batch, n + m): solve, judge, report and apply the policy."""
        axes = problem.system.batch_shape
        if not problem.batch:
            self.certificate = init.reshape(*axes, problem.size)
            zeros, codes = init.new_zeros(0), torch.zeros(0, dtype=torch.int64)
            nothing = InnerOutcome(
                init, codes, codes, zeros, zeros, zeros, Basis.RESIDUAL, init, solver=self.solver.name
            )
            return self._reported(problem, nothing, {}, silent=False)
        found = solve_cones(self.conditions, problem, self.solver)
        self.certificate = found.certificate.reshape(*axes, problem.size)
        words = forward_words(self.conditions.product, found)
        status, asked = found.status, self.settings.tolerance.inner(self.dtype)
        threshold = _THRESHOLD
        if asked.asked and asked.absolute:
            threshold = asked.absolute
            short = (status == Status.CONVERGED) & ~(found.lack <= threshold)
            status = torch.where(short, int(Status.NOT_CONVERGED), status)
        if bool((found.kink >= 0).any()):
            self.degenerate, self.messages = (found.kink >= 0).reshape(axes), words
            self.kinked = found.z.nan_to_num(), [problem.single(i).tensors[2] for i in range(problem.batch)]
        if found.jacobians is not None:
            self.reduced = FactorisedJacobians(tuple(found.jacobians))
        outcome = InnerOutcome(
            found.z, status, found.iterations, found.lack, torch.full_like(found.lack, threshold),
            torch.full_like(found.lack, float("nan")), Basis.RESIDUAL, found.residual, solver=self.solver.name,
        )  # fmt: skip
        z = self._reported(problem, outcome, words, silent=asked.silent)
        lost = torch.stack([status == one for one in NO_DERIVATIVE]).any(0).reshape(axes)
        if bool(lost.any()):
            self.nan_mask = lost if self.nan_mask is None else self.nan_mask | lost
        return z

    def _own_solver(self, operator: LinearOperator) -> LinearSolver | None:
        if self.reduced is not None and self.reduced.serves(operator):
            return self.reduced
        base = operator.distinct
        fits = base.size <= _DENSE_ORDER and base.batch * base.size**2 <= _DENSE_NUMBERS
        return Exact() if fits else GMRES()

    def depends_on_side(self, operator: LinearOperator, x: torch.Tensor, *, first: bool) -> torch.Tensor:
        """Return for which x (repeats · batch, n + m) the slopes of Π on the sides of a kink differ.

        x solves J x = r or Jᵀ x = r, J = [[P, Aᵀ(D − 1)], [A, D]] with D the Jacobian of Π. D meets the second part of x in the first case,
        A x₁ + x₂ in the other. Where all D beside the kink give the same, the derivative does not depend on the side. Higher derivatives
        may, if a cone is curved.
        """
        assert self.kinked is not None
        z, matrices = self.kinked
        n, product = self.conditions.unknowns, self.conditions.product
        if not first and any(not isinstance(cone, (Nonnegative, Zero)) for cone in product.cones):
            return super().depends_on_side(operator, x, first=first)
        v, size = z[:, n:], 1 + z.abs().amax(-1, keepdim=True)
        met = []
        for rows in x.reshape(-1, *z.shape):
            u = rows[:, n:]
            if isinstance(operator.distinct, TransposedOperator):
                u = u + torch.stack(
                    [self.conditions.of_A.times(A, one) for A, one in zip(matrices, rows[:, :n], strict=True)]
                )
            here = product.slopes(v, u)
            most = torch.zeros_like(u[:, 0])
            for place in range(_SIDES):
                # Fixed directions, so that a derivative can be repeated.
                aside = torch.cos(torch.arange(1.0, v.shape[-1] + 1, dtype=v.dtype) * (1 + place) ** 2 + place)
                for sign in (-1.0, 1.0):
                    change = product.slopes(v + sign * _BESIDE * size * aside, u) - here
                    most = torch.maximum(most, change.norm(dim=-1))
            met.append(~(most <= _SAME * rows.norm(dim=-1)))
        return torch.cat(met)
