"""A call of a linear layer: the linear primitive applied to the user's own matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from bilevel._torch.transforms import differentiating, eager
from bilevel.equations.problem import Problem
from bilevel.equations.system import LinearSystem, SymmetricLinearSystem, System
from bilevel.implicit import ImplicitContext, LinearSolve
from bilevel.layers.arguments import check_captures, nan_of, refuse_forward_twice
from bilevel.layers.call import SolveCall
from bilevel.layers.layer import Layer
from bilevel.layers.settings import SolveSettings
from bilevel.layers.solution import Solution
from bilevel.linear._base import LinearSolverLike
from bilevel.policy import OnFailure
from bilevel.pytree import Raveler
from bilevel.tolerance import Tolerance

__all__ = ["LinearCall", "LinearLayer"]

T = TypeVar("T")


class LinearLayer(Layer):
    """A differentiable linear solve: a function of ``(rhs, *args, **kwargs)``. Made by :func:`linear_solve`.

    There is no initial guess and no inner solver. Each call linearises the matrix once. One factorisation serves the solution and all derivatives;
    right-hand sides that only ``vmap`` batches share it.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        symmetric: bool,
        linear_solver: LinearSolverLike | None,
        tolerance: Tolerance | None,
        on_failure: OnFailure,
    ) -> None:
        super().__init__(
            SymmetricLinearSystem if symmetric else LinearSystem,
            function,
            solver=None,
            linear_solver=linear_solver,
            tolerance=tolerance,
            on_failure=on_failure,
        )

    def __repr__(self) -> str:
        return f"<{self.where}, linear_solver={self.linear_solver!r}, {self.tolerance!r}>"

    @eager
    def __call__(self, rhs: T, *args: Any, **kwargs: Any) -> T:  # type: ignore[override]  # no start, but a right-hand side
        r"""Return x with A(args) x = rhs, the same pytree as ``rhs``, differentiable with respect to every tensor.

        Parameters
        ----------
        rhs
            The right-hand side: a tensor, or a pytree of tensors, of floating-point or complex dtype.
        args, kwargs
            Passed on to ``matvec``, as pytrees.

        Raises
        ------
        SolveError
            If the solve, or in a backward pass that of the adjoint, did not reach the tolerance (policy ``"raise"``).
        ArgumentError
            If ``matvec`` is not linear in its first argument, or not symmetric where it was said to be.
        DtypeError, ShapeError
            If ``rhs`` cannot be a right-hand side, or ``matvec`` returns the wrong shapes.
        CapturedTensorError, StochasticObjectiveError
            If a gradient would silently be wrong or missing (policy ``"raise"``).
        TransformError
            If two nested forward-mode transforms meet here: torch would return zero.
        """
        return self._solution(self._settings, rhs, args, kwargs).value

    @eager
    def solve(self, rhs: T, *args: Any, **kwargs: Any) -> Solution[T]:  # type: ignore[override]  # likewise
        """Return a :class:`Solution`: the result of calling the layer, with the report of the forward solve."""
        return self._solution(self._settings, rhs, args, kwargs)

    def _solution(
        self,
        settings: SolveSettings,
        init: T,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        value_only: bool = False,
    ) -> Solution[T]:
        rhs = init
        raveler = Raveler.of(rhs, self.where, "rhs")
        system, tensors = self._system(raveler, args, kwargs)
        flat = raveler.ravel(rhs)
        inside = differentiating()
        if inside:
            refuse_forward_twice(self.where, [flat, *tensors])
        watched = torch.is_grad_enabled()
        point = torch.zeros(raveler.size, dtype=raveler.dtype, device=raveler.device)
        start = raveler.unravel(point)
        poisoned = check_captures(system, point, tensors, settings.on_failure) if inside else False
        call = self._call(settings, system, watched)
        x = LinearSolve.apply(
            ImplicitContext(system, call.solve, call.solve_linear, call.look), False, flat, point, *tensors
        )
        if poisoned or call.poisoned:
            x = x * nan_of(system, start, tensors)
        assert call.report is not None
        return Solution(raveler.unravel(x), call.report)

    def _call(self, settings: SolveSettings, system: System, watched: bool) -> LinearCall:
        return LinearCall(settings, self.inspector, self.function, system.where, watched, system.raveler.coarsest)


class LinearCall(SolveCall):
    """A call whose first linear solve is its own, and whose function is checked before it."""

    def look(self, problem: Problem) -> None:
        """Check the function before the first linear solve."""
        if self.report is None:
            like = problem.system.raveler
            start = torch.ones(problem.batch, like.size, dtype=like.dtype, device=like.device)
            self.inspect(problem, start)
