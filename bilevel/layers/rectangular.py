"""A call of a layer for rectangular linear systems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch.utils import _pytree as pytree

from bilevel._torch.reverse import grad
from bilevel._torch.transforms import carries_gradient, differentiating, innermost, transforms_active, without_gradient
from bilevel.equations.problem import Problem
from bilevel.equations.pullbacks import Pullback, is_final, pullbacks_of
from bilevel.equations.rectangular import NormalSystem, SquaredSystem, WideSystem, rectangular
from bilevel.implicit import ImplicitContext, LinearSolve
from bilevel.layers.arguments import check_captures, nan_of, refuse_forward_twice
from bilevel.layers.linear_layer import LinearCall, LinearLayer
from bilevel.layers.settings import SolveSettings
from bilevel.layers.solution import Solution
from bilevel.linear._base import LinearSolver, LinearSolverLike, solve_linear
from bilevel.linear._rectangular import OnTheRange
from bilevel.linear.lsmr import LSMR
from bilevel.linear.orthogonal import QR, SVD
from bilevel.operators import LinearOperator
from bilevel.operators._rectangular import rectangular_of
from bilevel.policy import OnFailure, apply_policy
from bilevel.pytree import Raveler, moves
from bilevel.reports import Pass, SolveReport, Status
from bilevel.tolerance import Tolerance

__all__ = ["RectangularLayer"]

T = TypeVar("T")

_DENSE_NUMBERS = 2**23
_DENSE_COLUMNS = 512


class RectangularLayer(LinearLayer):
    """A differentiable least-squares solve of a rectangular linear system. Made by :func:`linear_solve` with ``unknown``.

    The solution is x = A⁺ b: the minimiser of ‖A x − b‖ that has the smallest norm.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        unknown: Any,
        linear_solver: LinearSolverLike | None,
        tolerance: Tolerance | None,
        on_failure: OnFailure,
    ) -> None:
        super().__init__(
            function,
            symmetric=False,
            linear_solver=linear_solver,
            tolerance=tolerance,
            on_failure=on_failure,
        )
        self.kind = NormalSystem
        self.unknown = unknown

    def _unknown(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        made = self.unknown(*args, **kwargs) if callable(self.unknown) else self.unknown
        return pytree.tree_map(lambda leaf: without_gradient(leaf) if isinstance(leaf, torch.Tensor) else leaf, made)

    def _solution(
        self,
        settings: SolveSettings,
        init: T,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        value_only: bool = False,
    ) -> Solution[T]:
        image = Raveler.of(init, self.where, "rhs")
        raveler = Raveler.of(self._unknown(args, kwargs), self.where, "unknown")
        system, tensors = self._system(raveler, args, kwargs)
        assert isinstance(system, NormalSystem)
        system = replace(system, image=image)
        b = image.ravel(init)
        inside = differentiating()
        if inside:
            refuse_forward_twice(self.where, [b, *tensors])
        watched = torch.is_grad_enabled()
        point = torch.zeros(raveler.size, dtype=raveler.dtype, device=raveler.device)
        checked = watched or transforms_active()
        start = raveler.unravel(point)
        poisoned = check_captures(system, point, tensors, settings.on_failure) if inside else False
        call = _RectangularCall(settings, self.inspector, self.function, system.where, watched, raveler.coarsest)
        solve = _Solves(call, system, tensors)
        try:
            normal_rhs = system.transposed(b, *tensors)
        except (RuntimeError, ValueError, IndexError, TypeError):
            system.first_output(point, *map(without_gradient, tensors))  # says it in its own words
            raise
        x = solve.normal(normal_rhs)
        if isinstance(call.solver, (QR, SVD)):
            # Aᵀ b has lost digits where A is ill-conditioned, which b itself has not.
            plain = [without_gradient(t) for t in tensors]
            missed = without_gradient(b) - system.forward(without_gradient(x), *plain)
            call.refines = True
            x = x + without_gradient(solve.normal(system.transposed(missed, *plain)))
            call.refines = False
        if checked and call.may_be_deficient and any(carries_gradient(t) for t in (b, *tensors) if moves(t)):
            x = self._differentiable(solve, b, x)
        if poisoned or call.poisoned:
            x = x * nan_of(system, start, tensors)
        assert call.report is not None
        return Solution(raveler.unravel(x), call.report)

    def _differentiable(self, solve: _Solves, b: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return ``x`` with its whole derivative, also where A has not full column rank; see :mod:`bilevel.equations.rectangular`.

        The derivative fails where an argument changes the rank of A to first order: with u and v in the null spaces of Aᵀ and A, uᵀ ∂A v has to
        vanish for each argument, or for what the arguments were computed from.
        """
        system, tensors = solve.system, solve.tensors
        plain = [without_gradient(t) for t in tensors]
        assert system.image is not None
        z, g = _irregular(system.raveler, 0.7548776662), _irregular(system.image, 0.5698402910)
        v = without_gradient(z - solve.normal(system.normal(z, *plain)))
        u = without_gradient(g - system.forward(without_gradient(solve.normal(system.transposed(g, *plain))), *plain))
        doubt = 10 * torch.finfo(x.dtype).eps ** 0.5
        deficient, wide = (float(innermost(w).abs().max()) > doubt for w in (v, u))
        if not deficient:
            return x
        if not wide:
            along = system.transposed(solve.wide(b), *tensors)
            return along + (without_gradient(x) - without_gradient(along))
        along = system.normal(solve.squared(system.transposed(b, *tensors)), *tensors)
        x = along + (without_gradient(x) - without_gradient(along))
        return self._refused_where_the_rank_changes(solve.call, system, tensors, (z, g, v, u), x)

    def _refused_where_the_rank_changes(
        self,
        call: _RectangularCall,
        system: NormalSystem,
        tensors: list[torch.Tensor],
        vectors: tuple[torch.Tensor, ...],
        x: torch.Tensor,
    ) -> torch.Tensor:
        z, g, v, u = vectors
        plain, doubt = [without_gradient(t) for t in tensors], 10 * torch.finfo(x.dtype).eps ** 0.5
        inside = transforms_active()
        needs_grad = [
            move and (not inside or is_final(t))
            for t, move in zip(tensors, map(_is_differentiated, tensors), strict=True)
        ]
        if not any(needs_grad):
            return x

        def slopes(left: torch.Tensor, right: torch.Tensor) -> list[torch.Tensor | None]:
            chosen = [t for t, want in zip(plain, needs_grad, strict=True) if want]

            def paired(*moved: torch.Tensor) -> torch.Tensor:
                feed = iter(moved)
                others = [next(feed) if want else t for t, want in zip(plain, needs_grad, strict=True)]
                return (left * system.forward(right, *others)).sum()

            found = iter(grad(paired, *chosen))
            return [next(found).detach() if want else None for want in needs_grad]

        at_null, at_any = slopes(u, v), slopes(g, z)

        def changes() -> bool:
            kept = tensors if not inside else plain
            every = pullbacks_of(lambda which: at_null if float(which) == 0 else at_any, kept, needs_grad)
            return not any(_vanishes(pull, doubt) for pull in every)

        if inside:
            return call.refused(x) if changes() else x
        if x.requires_grad:
            x.register_hook(lambda cotangent: call.refused(cotangent) if changes() else None)
        return x


@dataclass(frozen=True, eq=False)
class _Solves:
    """The linear solves of a call, differentiable, each system with its rule."""

    call: _RectangularCall
    system: NormalSystem
    tensors: list[torch.Tensor]

    @cached_property
    def _rule(self) -> ImplicitContext:
        return self._rule_of(self.system)

    def normal(self, d: torch.Tensor) -> torch.Tensor:
        """Return N⁺ d (n,)."""
        return self._solved(self._rule, d)

    def squared(self, d: torch.Tensor) -> torch.Tensor:
        """Return a solution of N² w = d (n,)."""
        kept = {item.name: getattr(self.system, item.name) for item in fields(self.system)}
        return self._solved(self._rule_of(SquaredSystem(**kept)), d)

    def wide(self, b: torch.Tensor) -> torch.Tensor:
        """Return the solution of A Aᵀ y = b (m,)."""
        kept = {item.name: getattr(self.system, item.name) for item in fields(self.system)}
        kept["raveler"], kept["image"] = self.system.image, self.system.raveler
        return self._solved(self._rule_of(WideSystem(**kept)), b)

    def _rule_of(self, system: NormalSystem) -> ImplicitContext:
        return ImplicitContext(system, self.call.solve, self.call.solve_linear, self.call.look)

    def _solved(self, rule: ImplicitContext, d: torch.Tensor) -> torch.Tensor:
        like = rule.system.raveler
        point = torch.zeros(like.size, dtype=like.dtype, device=like.device)
        made: torch.Tensor = LinearSolve.apply(rule, False, d, point, *self.tensors)
        return made


def _is_differentiated(tensor: torch.Tensor) -> bool:
    return moves(tensor) and carries_gradient(tensor)


def _vanishes(pull: Pullback, doubt: float) -> bool:
    pairs = zip(pull(torch.zeros(())), pull(torch.ones(())), strict=True)
    return all(float(innermost(a).norm()) <= doubt * float(innermost(b).norm()) for (_, a), (_, b) in pairs)


def _irregular(raveler: Raveler, irrational: float) -> torch.Tensor:
    places = torch.arange(1, raveler.size + 1, dtype=torch.float64, device=raveler.device)
    return torch.frac(places * irrational).sub(0.5).to(raveler.dtype)


class _RectangularCall(LinearCall):
    """A call whose operators AᵀA come with A."""

    problem: Problem | None = None
    solver: LinearSolver | None = None
    is_wide = False
    refines = False  # whether the right-hand side is a residual that may be rounding, which no accuracy is asked of

    def look(self, problem: Problem) -> None:
        super().look(problem)
        self.problem = problem

    @property
    def may_be_deficient(self) -> bool:
        """Whether A may have less than full column rank: a product alone cannot tell."""
        assert self.report is not None
        exact = isinstance(self.solver, (QR, SVD))
        return self.is_wide or not exact or bool((self.report.status_code == Status.MINIMUM_NORM).any())

    def solve_linear(
        self,
        operator: LinearOperator,
        rhs: torch.Tensor,
        axes: tuple[int, ...],
        product: Callable[[torch.Tensor], torch.Tensor] | None = None,
        pullbacks: Callable[[], Sequence[Pullback]] = tuple,
        unsure: Sequence[Pullback] = (),
        reverse: bool = False,
    ) -> torch.Tensor:
        assert self.problem is not None
        A = rectangular_of(operator)
        if A is None:
            A = rectangular(self.problem)
            A.keep_with(operator)
        if self.solver is None:
            dense = A.columns <= _DENSE_COLUMNS and A.batch * A.rows * A.columns <= _DENSE_NUMBERS
            self.solver = self.settings.linear_solver or (QR() if dense else LSMR())
            system = self.problem.system
            assert isinstance(system, NormalSystem) and system.image is not None
            self.is_wide = system.image.size < system.raveler.size
        if self.refines:
            target = self.settings.tolerance.linear(self.dtype)
            return solve_linear(self.solver, operator, rhs, target).x.reshape(*axes, operator.size)
        squared = isinstance(self.problem.system, SquaredSystem)
        self.settings = replace(self.settings, linear_solver=OnTheRange(self.solver, squared))
        return super().solve_linear(operator, rhs, axes, product, pullbacks, unsure, reverse)

    def refused(self, x: torch.Tensor) -> torch.Tensor:
        """Treat a derivative that does not exist as the policy says."""
        assert self.report is not None
        plain = self.report
        status = torch.full_like(plain.status_code, Status.SINGULAR)
        nothing = torch.full_like(plain.residual_norm, float("nan"))
        report = SolveReport(
            Pass.BACKWARD, self.where, plain.solver, status, plain.iterations, nothing, nothing, nothing, plain.basis, nothing, _WORDS
        )  # fmt: skip
        poisoned = apply_policy(report, nothing.unsqueeze(-1), self.settings.on_failure, self.recordings)
        return x * float("nan") if self.settings.on_failure == "nan" and poisoned.numel() else x


_WORDS = {
    Status.SINGULAR: (
        "found no derivative: an argument changes the rank of the matrix, where the solution of minimum norm jumps",
        "append rows that make the rank full, such as 1e-3 * x with zeros on the right, or pass that argument detached if its gradient is not wanted",
    )
}
