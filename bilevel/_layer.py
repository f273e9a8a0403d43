"""A call of a layer: what it is given is checked, what was left to it chosen, the rule applied, the policy kept.

A layer checks what it is given, chooses what was left to it, and applies the differentiation rule
(:mod:`bilevel._implicit`). What a solve did is reported, and what failed is treated as the caller's policy says,
in the forward pass and in every derivative alike.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch
from torch.utils import _pytree as pytree

from bilevel._implicit import Rule, Solve
from bilevel._inspection import captured_error, look, on_trust
from bilevel._problem import Problem
from bilevel._straight import Memory
from bilevel._system import FixedPointSystem, System
from bilevel._transforms import (
    autocast_to,
    carries_gradient,
    differentiating,
    eager,
    forward_levels,
    transforms_active,
    without_gradient,
)
from bilevel._tree import Raveler, flatten_arguments
from bilevel.errors import (
    ArgumentError,
    BilevelError,
    DtypeError,
    InitGradientError,
    StochasticObjectiveError,
    TransformError,
)
from bilevel.linear._base import LinearOutcome, LinearSolver, LinearSolverLike, as_linear_solver, solve_linear
from bilevel.linear.bicgstab import BiCGStab
from bilevel.linear.cg import CG
from bilevel.linear.exact import Exact, lend
from bilevel.linear.gmres import GMRES
from bilevel.operators import LinearOperator
from bilevel.reports import (
    OnFailure,
    Pass,
    SolveReport,
    active_recordings,
    check_policy,
    enforce,
    misuse,
)
from bilevel.solvers._base import InnerOutcome, InnerSolver, InnerSolverLike, as_inner_solver, solve_inner
from bilevel.solvers.anderson import Anderson
from bilevel.solvers.lbfgs import LBFGS
from bilevel.solvers.newton import Newton
from bilevel.tolerance import Tolerance

__all__ = ["Adjoint", "Layer", "Run", "Solution", "default_linear_solver", "default_solver"]

T = TypeVar("T")

# Up to this order, and this much memory for a batch, a factorisation beats products; found by timing.
_DENSE_ORDER = 512
_DENSE_NUMBERS = 2**25
# LU has no forward factorisation to begin with, and Krylov methods are quick on the Jacobians of contractions.
_DENSE_JACOBIAN_NUMBERS = 2**20


def _dense_fits(batch: int, size: int, dtype: torch.dtype) -> bool:
    # There are no factorisations in half precision.
    fits = size <= _DENSE_ORDER and batch * size * size <= _DENSE_NUMBERS
    return fits and torch.finfo(dtype).bits >= 32


def default_solver(problem: Problem) -> InnerSolver:
    """Return the inner solver used where none is given.

    Newton's method where the matrices are small, L-BFGS for a large argmin, Anderson acceleration for a fixed
    point, and Newton–Krylov for a large root.
    """
    if problem.is_fixed_point:
        return Anderson()
    dtype = problem.system.raveler.dtype
    if problem.minimizes:
        return Newton() if _dense_fits(problem.batch, problem.size, dtype) else LBFGS()
    return Newton() if torch.finfo(dtype).bits >= 32 else Newton(linear_solver=BiCGStab())


def default_linear_solver(operator: LinearOperator) -> LinearSolver:
    """Return the linear solver used where none is given: a factorisation if small, else CG, or GMRES if not symmetric."""
    distinct = operator.distinct
    fits = _dense_fits(distinct.batch, distinct.size, operator.dtype)
    if operator.symmetric:
        return Exact() if fits else CG()
    if torch.finfo(operator.dtype).bits < 32:
        return BiCGStab()
    return Exact() if fits and distinct.batch * distinct.size**2 <= _DENSE_JACOBIAN_NUMBERS else GMRES()


@dataclass(frozen=True, eq=False)
class Solution(Generic[T]):
    """A layer's result with its report.

    It is a pytree node whose only child is :attr:`value`, so that ``torch.func.vmap(layer.solve)`` returns one, with
    a report of the whole batch.

    Parameters
    ----------
    value
        x, the same pytree as init, differentiable as ``layer(...)`` is.
    report
        What the forward solve did, per problem.
    """

    value: T
    report: SolveReport


pytree.register_pytree_node(
    Solution,
    lambda solution: ([solution.value], solution.report),
    lambda children, report: Solution(next(iter(children)), cast(SolveReport, report)),
    serialized_type_name="bilevel.Solution",
)


class Layer:
    """A differentiable solve: a function of ``(init, *args, **kwargs)``. Made by :func:`argmin`, :func:`root`, :func:`fixed_point`."""

    def __init__(
        self,
        kind: type[System],
        function: Callable[..., Any],
        *,
        solver: InnerSolverLike | None,
        linear_solver: LinearSolverLike | None,
        tolerance: Tolerance | None,
        on_failure: OnFailure,
    ) -> None:
        noun = kind.noun
        if not callable(function):
            raise ArgumentError(
                f"bilevel layer: expected {noun} to be a function of (x, *args, **kwargs), got {function!r}; pass one"
            )
        if tolerance is not None and not isinstance(tolerance, Tolerance):
            raise ArgumentError(f"expected tolerance to be a bilevel.Tolerance, got {tolerance!r}; wrap it in one")
        self.kind = kind
        self.function = function
        self.solver = None if solver is None else as_inner_solver(solver)
        self.linear_solver = None if linear_solver is None else as_linear_solver(linear_solver)
        self.tolerance = Tolerance() if tolerance is None else tolerance
        self.on_failure = check_policy(on_failure)
        self.adjoint = Adjoint()
        self.inspects = True
        self.written: Callable[[], Callable[..., Any]] | None = (
            None  # what the user wrote, where that is not the function itself
        )
        self.looked = Memory()
        functools.update_wrapper(self, function, updated=())
        self.where = f"`{kind.label}` layer `{getattr(function, '__name__', type(function).__name__)}`"

    @contextmanager
    def trusted(self) -> Iterator[None]:
        """Leave out the look at the function in the calls made meanwhile, where one just before has had it."""
        before, self.inspects = self.inspects, False
        try:
            yield
        finally:
            self.inspects = before

    def look(
        self, problem: Problem, x: torch.Tensor, memory: Memory, *, captures: bool
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Inspect the function at ``x`` (batch, n) unless ``memory`` has it; return what was found at its first row, or None."""
        written = self.function if self.written is None else self.written()
        return look(problem, x, written, memory, captures=captures)

    @property
    def minimizes(self) -> bool:
        """Whether the function is an objective to minimise."""
        return self.kind.minimizes

    @property
    def is_fixed_point(self) -> bool:
        """Whether the function is a mapping whose fixed point is sought."""
        return issubclass(self.kind, FixedPointSystem)

    def __repr__(self) -> str:
        return f"<{self.where}, solver={self.solver!r}, linear_solver={self.linear_solver!r}, {self.tolerance!r}>"

    @eager
    def __call__(self, init: T, *args: Any, **kwargs: Any) -> T:
        r"""Return x, the same pytree as ``init``, differentiable with respect to every tensor in args and kwargs.

        Parameters
        ----------
        init
            Where the search begins: a tensor, or a pytree of tensors, of floating-point dtype. No gradient flows to it.
        args, kwargs
            Passed on to the function, as pytrees. Every floating-point tensor in them can be differentiated.

        Raises
        ------
        SolveError
            If the solve, or in a backward pass the linear solve, did not reach the tolerance (policy ``"raise"``).
        DtypeError, ShapeError
            If ``init`` cannot be an unknown, or the function returns the wrong shapes.
        CapturedTensorError, InitGradientError, StochasticObjectiveError
            If a gradient would silently be wrong or missing (policy ``"raise"``).
        TransformError
            If two nested forward-mode transforms meet here: torch would return zero.
        """
        return self.solve(init, *args, **kwargs).value

    @eager
    def solve(self, init: T, *args: Any, **kwargs: Any) -> Solution[T]:
        """Return a :class:`Solution`: what calling the layer returns, with the report of the forward solve."""
        raveler = Raveler.of(init, self.where)
        system, tensors = self._system(raveler, args, kwargs)
        self._refuse_forward_twice(tensors)
        watched = torch.is_grad_enabled()
        spoiled = (
            self._check_edge(init, system, tensors) if watched or differentiating() or transforms_active() else False
        )
        run = Run(self, system.where, watched, raveler.coarsest)
        flat = raveler.ravel(init).detach()
        x = Solve.apply(Rule(system, run.solve, run.solve_linear, followed=watched), flat, *tensors)
        if spoiled or run.spoiled:
            x = x * self._poison(init, system, tensors)
        assert run.report is not None
        return Solution(raveler.unravel(x), run.report)

    def _system(
        self, raveler: Raveler, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[System, list[torch.Tensor]]:
        """Return what is to be solved, and the tensors that it depends on, once they are found usable."""
        tensors, arguments = flatten_arguments(args, kwargs)
        for tensor, name in zip(tensors, arguments.names, strict=True):
            if tensor.is_complex() or (tensor.dtype.is_floating_point and tensor.device != raveler.device):
                got = f"{tensor.dtype}" if tensor.is_complex() else f"{tensor.device}"
                wanted = "a real tensor" if tensor.is_complex() else f"a tensor on init's device, {raveler.device}"
                raise DtypeError(f"{self.where}: expected {wanted} at {name}, got {got}; convert it or move init")
            if tensor.layout not in (torch.strided, torch.sparse_coo):
                raise DtypeError(
                    f"{self.where}: expected a dense tensor or a sparse one of coordinates at {name}, as torch.func takes no other, got "
                    f"{str(tensor.layout).removeprefix('torch.')}; convert it with .to_sparse_coo() or .to_dense()"
                )
        precision = autocast_to(raveler.device)
        where = self.where
        if precision is not None:
            where += f" under autocast to {str(precision).removeprefix('torch.')}"
        return self.kind(where, self.function, raveler, arguments, autocast=precision), tensors

    def _refuse_forward_twice(self, tensors: list[torch.Tensor]) -> None:
        if forward_levels(tensors) > 1:
            raise TransformError(
                f"{self.where}: expected at most one forward-mode transform around the layer, got two, for which torch "
                "silently returns zero (pytorch/pytorch#197867); write jacfwd(jacrev(f)) or torch.func.hessian(f) "
                "instead of jacfwd(jacfwd(f))"
            )

    def _check_edge(self, init: Any, system: System, tensors: list[torch.Tensor]) -> bool:
        """Find what the primitive cannot see from inside; return whether the policy asks for NaN."""
        spoiled = False
        leaves = pytree.tree_leaves(init)
        if any(carries_gradient(leaf) for leaf in leaves):
            error: BilevelError = InitGradientError(
                f"{self.where}: expected init not to require grad, and it does: a solution does not depend on where the "
                "search began, so that its gradient would be none; pass init.detach(), or pass the tensor as an argument"
            )
            spoiled |= misuse(error, self.on_failure)
        return spoiled | self._check_captures(init, system, tensors)

    def _check_captures(self, init: Any, system: System, tensors: list[torch.Tensor]) -> bool:
        """Find tensors of a transform outside that the function reaches; return whether the policy asks for NaN."""
        if differentiating():
            # Inside the primitive a captured tensor of a transform looks like a plain one: look at it here.
            detached = [without_gradient(tensor) for tensor in tensors]
            flat = system.raveler.ravel(pytree.tree_map(without_gradient, init))
            try:
                with torch.enable_grad():
                    output = system.first_output(flat, *detached)
            except RuntimeError as problem:
                if "randomness" not in str(problem):
                    raise
                raise StochasticObjectiveError(
                    f"{self.where}: expected {system.noun} to be deterministic, and it draws random numbers inside vmap; "
                    "switch dropout off with .eval(), or draw the noise outside and pass it as an argument"
                ) from problem
            if carries_gradient(output):
                error = captured_error(self.where, system.noun, "is being differentiated by a transform outside")
                return misuse(error, self.on_failure)
        return False

    def _poison(self, init: Any, system: System, tensors: list[torch.Tensor]) -> torch.Tensor:
        """Return a NaN whose derivatives are NaN too, for whatever the function reaches and for init."""
        with torch.enable_grad():
            flat = system.raveler.ravel(init)
            try:
                reached = system.output(flat.detach(), *(tensor.detach() for tensor in tensors)).sum()
            except RuntimeError as problem:
                # vmap refuses random numbers, which is what the function was found at fault for.
                if "randomness" not in str(problem):
                    raise
                reached = torch.zeros_like(flat.sum())
        return float("nan") * (reached + flat.sum())


class Adjoint:
    """The adjoint of the last first derivative, kept by those who start the next linear solve from it.

    Attributes
    ----------
    warm
        Whether to start from it.
    value
        q (batch, n), or None.
    report
        What the linear solve reported.
    residual
        ∇_x G (batch, n) at the solution that the adjoint belongs to.
    """

    def __init__(self) -> None:
        self.warm = False
        self.value: torch.Tensor | None = None
        self.report: SolveReport | None = None
        self.residual: torch.Tensor | None = None

    def start(self, like: torch.Tensor) -> torch.Tensor | None:
        """Return where to begin a solve for the right-hand side ``like``, or None."""
        kept = self.value
        if not self.warm or kept is None or kept.shape != like.shape or not bool(torch.isfinite(kept).all()):
            return None
        return kept.to(like)


class Run:
    """One call of a layer: solves, judges, reports and applies the policy, forward and in every derivative."""

    def __init__(self, layer: Layer, where: str, watched: bool, dtype: torch.dtype) -> None:
        self.layer = layer
        self.where = where
        self.watched = watched
        self.dtype = dtype  # what accuracies are of that nobody asked for
        self.recordings = active_recordings()
        self.report: SolveReport | None = None
        self.spoiled = False
        self.lost: torch.Tensor | None = None  # (*batch,) bool: whose derivatives the policy wants to be NaN
        self.factor: torch.Tensor | None = None
        self.one_step = False  # whether that is of the Hessians at init, and a step with them was the last

    def inspect(self, problem: Problem, init: torch.Tensor, memory: Memory) -> bool:
        """Look for what would make gradients wrong, at ``init`` (batch, n); return whether that was left to ``memory``."""
        try:
            if problem.batch and self.layer.inspects:
                return self.layer.look(problem, init, memory, captures=self.watched) is None
        except BilevelError as error:
            # Wrong shapes, and tensors of a vmap outside, cannot be gone on with.
            if isinstance(error, ValueError) or error.__cause__ is not None:
                raise
            self.spoiled = misuse(error, self.layer.on_failure)
        return False

    def solve(self, problem: Problem, init: torch.Tensor) -> torch.Tensor:
        """Return x (*batch, n), inspected, solved for, judged, reported and treated as the policy says."""
        layer = self.layer
        trusted = self.inspect(problem, init, layer.looked)
        solver = layer.solver or default_solver(problem)
        target = layer.tolerance.inner(self.dtype)
        with on_trust(init.device, lambda: self.inspect(problem, init, Memory())) if trusted else nullcontext():
            outcome = solve_inner(solver, problem, init, target)
        axes = problem.system.batch_shape
        self.one_step = outcome.factor is not None and bool((outcome.iterations <= 1).all())
        self.factor, layer.adjoint.residual = outcome.factor, outcome.residual if layer.adjoint.warm else None
        self.report = _report(Pass.FORWARD, self.where, solver.name, outcome, axes)
        self.lost = ~self.report.success if layer.on_failure == "nan" else None
        x = outcome.x.reshape(*axes, problem.size)
        return enforce(self.report, x, layer.on_failure, self.recordings, silent_budget=target.silent)

    def solve_linear(
        self,
        operator: LinearOperator,
        rhs: torch.Tensor,
        axes: tuple[int, ...],
        product: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Return A⁻¹ rhs (*axes, n), solved for, judged, reported and treated as the policy says.

        ``product``, v ↦ A v for the first answer, is there for the adjoint of a first derivative alone.
        """
        layer = self.layer
        if self.factor is not None:
            lend(operator, self.factor, exact=self.one_step)
        kept = layer.adjoint if product is not None else None
        target, direction = layer.tolerance.linear(self.dtype), Pass.BACKWARD
        if self.report is None:  # a linear layer's own solve
            target, direction = layer.tolerance.inner(self.dtype), Pass.FORWARD
        solver = layer.linear_solver or default_linear_solver(operator)
        reported = self.report is None or self.recordings or active_recordings() or (kept is not None and kept.warm)
        begun = None if kept is None else kept.start(rhs)
        outcome = solve_linear(solver, operator, rhs, target, begun, product=product, seen=bool(reported))
        report = _report(direction, self.where, solver.name, outcome, axes)
        self.report = self.report or report
        if kept is not None and kept.warm:
            kept.value, kept.report = outcome.x, report
        shaped = outcome.x.reshape(*axes, operator.size)
        shaped = enforce(report, shaped, layer.on_failure, self.recordings, silent_budget=target.silent)
        if self.lost is None:
            return shaped
        # A quadratic's matrices are the same at a NaN: without this, what has failed would get a finite derivative.
        # Axes that a transform has added since stand in front of those of the forward pass.
        return torch.where(self.lost.unsqueeze(-1), torch.full_like(shaped, float("nan")), shaped)


def _report(
    direction: Pass, where: str, solver: str, outcome: InnerOutcome | LinearOutcome, axes: tuple[int, ...]
) -> SolveReport:
    def shaped(numbers: torch.Tensor) -> torch.Tensor:
        return numbers if numbers.shape == axes else numbers.reshape(axes)

    return SolveReport(
        direction,
        where,
        solver,
        shaped(outcome.status),
        shaped(outcome.iterations),
        shaped(outcome.residual_norm),
        shaped(outcome.threshold),
        shaped(outcome.error_bound),
        outcome.basis,
        shaped(outcome.scale) if isinstance(outcome, LinearOutcome) else torch.full(axes, float("nan")),
    )
