"""Bounds and constraints as a structure: minimise f(x, θ) subject to h(x, θ) = 0, c(x, θ) ≤ 0, lower(θ) ≤ x ≤ upper(θ).

The unknown is z = (x, ν, λ). At a polished solution λ_i = 0 exactly where c_i is inactive, and x is exactly on its active bounds. Near it the
local model is the Lagrangian of the active set,

    𝓛(z, θ) = f(Π(x)) + νᵀh(Π(x)) + Σ_A λ_i c_i(Π(x)) − ½ Σ_{not A} λ_i² + ½‖x − Π(x)‖²,     A = {λ_i > 0},

where Π puts x on its active bounds, which may depend on θ. ∇_z 𝓛 = 0 is the KKT system of the active set, its Jacobian the KKT matrix: the
usual rule gives the derivatives of x, ν and λ, of every order (Fiacco 1976). With smoothing τ the model is that of the central path,

    𝓛_τ(z, θ) = f(x) + νᵀh(x) + λᵀc(x) + τ Σ log λ_i − τ Σ log(x_j − lower_j) − τ Σ log(upper_j − x_j).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch.func import vmap
from torch.utils import _pytree as pytree

from bilevel._torch.promotion import Promoted
from bilevel._torch.reverse import grad, vjp
from bilevel.equations.problem import Problem
from bilevel.equations.structured import LocalModel, Parts, objective_of
from bilevel.equations.system import RootSystem, System
from bilevel.errors import ArgumentError, BilevelError
from bilevel.layers.constraints import (
    Bounds,
    Constraints,
    PerConstraint,
    place_of,
    ravel_values,
    unravel_flags,
)
from bilevel.linear._base import LinearSolver
from bilevel.linear.exact import Exact
from bilevel.linear.gmres import GMRES
from bilevel.operators import LinearOperator
from bilevel.pytree import Raveler
from bilevel.reports import Basis, Status
from bilevel.solvers._base import CallableSolver, InnerSolver
from bilevel.solvers.constrained.bridges import by_callable, by_scipy
from bilevel.solvers.constrained.one_sided import Sides
from bilevel.solvers.constrained.program import Answer, ConstrainedSolver, Program
from bilevel.solvers.constrained.solve import solve_constrained
from bilevel.solvers.judging.outcome import InnerOutcome, nothing_to_solve, with_spent_budget
from bilevel.solvers.scipy_minimize import ScipyMinimize
from bilevel.tolerance import Target

__all__ = ["ConstrainedSystem"]

# An x this many units in the last place from a bound is on it: a bound that is computed may be rounded differently at another place.
_ON_BOUND = 4.0
_MOST_ROWS = 64
_DENSE_ORDER = 2048


@dataclass(frozen=True, eq=False, kw_only=True)
class ConstrainedSystem(LocalModel):
    """R = ∇_z 𝓛, see the module.

    Parameters
    ----------
    constraints
        The constraints, or a function of the arguments that returns them.
    equality, inequality
        The structures of the two functions' values; None where there is none.
    smoothing
        τ, or None.
    """

    besides: ClassVar[str] = "a constraint or bound"

    constraints: Constraints | Callable[..., Constraints | None]
    equality: Raveler | None = None
    inequality: Raveler | None = None
    smoothing: float | None = None

    minimizes = False

    @property
    def unknowns(self) -> int:
        """N, the number of unknowns without multipliers."""
        return self.ordinary.raveler.size

    @cached_property
    def counts(self) -> tuple[int, int]:
        """P and m, the numbers of equality and inequality constraints."""
        return tuple(0 if part is None else part.size for part in (self.equality, self.inequality))  # type: ignore[return-value]

    def split(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return x (..., n), ν (..., p), λ (..., m)."""
        n, p = self.unknowns, self.counts[0]
        return z[..., :n], z[..., n : n + p], z[..., n + p :]

    def begun(self, z: torch.Tensor, multipliers: Mapping[str, Any]) -> torch.Tensor:
        """Return the start ``z`` (n + p + m,) with the multipliers of an earlier solution, if they fit."""
        if self.smoothing is not None:
            return z
        leaves = [pytree.tree_leaves(multipliers[name]) for name in ("equality", "inequality") if name in multipliers]
        parts = [leaf.reshape(-1) for part in leaves for leaf in part]
        if not parts or sum(part.numel() for part in parts) != sum(self.counts):
            return z
        return torch.cat([z[: self.unknowns], *parts]).to(z.dtype)

    def stated(self, tensors: Sequence[torch.Tensor]) -> Constraints:
        """Return the constraints of a call with these tensors."""
        if isinstance(self.constraints, Constraints):
            return self.constraints
        args, kwargs = self.arguments.rebuild(tensors)
        return self.constraints(*args, **kwargs) or Constraints()

    def stack(self, x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        """Return (f, h, c) (1 + p + m,) of one problem at ``x`` (n,)."""
        stated = self.stated(tensors)
        parts = [self.ordinary.output(x, *tensors).reshape(1).to(x.dtype)]
        for function, known, name in (
            (stated.equality, self.equality, "equality"),
            (stated.inequality, self.inequality, "inequality"),
        ):
            if known is not None:
                assert function is not None
                parts.append(
                    ravel_values(
                        replace(self.ordinary, function=function).call(x, *tensors), known, self.where, name
                    ).to(x.dtype)
                )
        return torch.cat(parts)

    def bounds(self, x: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return lower and upper (n,) of one problem, in the dtype of ``x``."""
        stated, (args, kwargs) = self.stated(tensors), self.arguments.rebuild(tensors)
        unknown = self.ordinary.raveler
        lower = Bounds(self.where, "lower", stated.lower, -math.inf, unknown)
        upper = Bounds(self.where, "upper", stated.upper, math.inf, unknown)
        return lower.vector(args, kwargs, x.dtype), upper.vector(args, kwargs, x.dtype)

    def model(self, z: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        """Return 𝓛 or 𝓛_τ () of one problem, see the module."""
        x, equality, inequality = self.split(z)
        lower, upper = self.bounds(x, *tensors)
        f, h, c = self._split(self.stack(y := self._on_bounds(x, lower, upper), *tensors))
        off = x - y
        value = f + (equality * h).sum() + 0.5 * (off * off).sum()
        if self.smoothing is None:
            active = (inequality > 0).to(x)
            return value + (active * inequality * c - 0.5 * (1 - active) * inequality * inequality).sum()
        free = lower < upper
        value = value + (inequality * c).sum() + self.smoothing * inequality.log().sum()
        for gap, bound in ((x - lower, lower), (upper - x, upper)):
            there = free & torch.isfinite(bound)
            value = value - self.smoothing * torch.where(there, gap, torch.ones_like(gap)).log().sum()
        return value

    def _split(self, parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        p = self.counts[0]
        return parts[0], parts[1 : 1 + p], parts[1 + p :]

    def _active(self, x: torch.Tensor, lower: torch.Tensor, upper: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which lower and upper bounds x (n,) is on."""
        if self.smoothing is not None:
            fixed = lower >= upper
            return fixed, fixed
        unit = _ON_BOUND * torch.finfo(x.dtype).eps
        return x <= lower + unit * lower.abs().nan_to_num(0.0, 0.0), x >= upper - unit * upper.abs().nan_to_num(
            0.0, 0.0
        )

    def _on_bounds(self, x: torch.Tensor, lower: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
        """Return Π(x): x with its active bounds in their places. Where both are active, their mean."""
        at_lower, at_upper = self._active(x, lower, upper)
        # Products, and not where: an adjoint of NaN, that of a problem without a derivative, must reach every argument.
        both = 0.5 * (at_lower & at_upper).to(x)
        zero = torch.zeros_like(x)
        to_lower = (at_lower.to(x) - both) * (torch.where(torch.isfinite(lower), lower, zero) - x)
        to_upper = (at_upper.to(x) - both) * (torch.where(torch.isfinite(upper), upper, zero) - x)
        return x + to_lower + to_upper

    def parts(self, z: torch.Tensor, *tensors: torch.Tensor) -> Parts:
        """Return x, the multipliers and the active set of one problem, in the user's structures."""
        x, equality, inequality = self.split(z)
        stated, unravel = self.stated(tensors), self.ordinary.raveler.unravel
        multipliers: dict[str, Any] = {}
        active: dict[str, Any] = {}
        if self.equality is not None:
            multipliers["equality"] = self.equality.unravel(equality)
            active["equality"] = unravel_flags(self.equality, torch.ones_like(equality, dtype=torch.bool))
        if self.inequality is not None:
            multipliers["inequality"] = self.inequality.unravel(inequality)
            on = inequality > 0
            if self.smoothing is not None:
                on = inequality > -self._split(self.stack(x, *tensors))[2]
            active["inequality"] = unravel_flags(self.inequality, on)
        if stated.lower is not None or stated.upper is not None:
            of_lower, of_upper, at_lower, at_upper = self._bound_multipliers(x, equality, inequality, tensors)
            for name, values, on in (("lower", of_lower, at_lower), ("upper", of_upper, at_upper)):
                if getattr(stated, name) is not None:
                    multipliers[name], active[name] = unravel(values), unravel_flags(self.ordinary.raveler, on)
        return Parts(x, PerConstraint(**multipliers), PerConstraint(**active))

    def _bound_multipliers(
        self, x: torch.Tensor, equality: torch.Tensor, inequality: torch.Tensor, tensors: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        zero = torch.zeros_like(x)
        lower, upper = self.bounds(x, *tensors)
        at_lower, at_upper = self._active(x, lower, upper)
        if self.smoothing is not None:
            there_low, there_high = torch.isfinite(lower) & ~at_lower, torch.isfinite(upper) & ~at_upper
            low = torch.where(there_low, self.smoothing / torch.where(there_low, x - lower, zero + 1), zero)
            high = torch.where(there_high, self.smoothing / torch.where(there_high, upper - x, zero + 1), zero)
            return low, high, low > (x - lower), high > (upper - x)

        def lagrangian(point: torch.Tensor) -> torch.Tensor:
            f, h, c = self._split(self.stack(point, *tensors))
            # An inactive constraint may be infinite at x, where its gradient times zero is NaN.
            return f + (equality * h).sum() + torch.where(inequality > 0, inequality * c, torch.zeros_like(c)).sum()

        slope = grad(lagrangian, x)[0]
        both = at_lower & at_upper
        low = torch.where(at_lower, torch.where(both, slope.clamp_min(0), slope), zero)
        high = torch.where(at_upper, torch.where(both, (-slope).clamp_min(0), -slope), zero)
        return low, high, at_lower, at_upper

    def linear_solver(self, operator: LinearOperator) -> LinearSolver | None:
        """Return a solver that takes indefinite matrices; None for bounds alone, whose matrix is positive definite."""
        if sum(self.counts) == 0:
            return None
        distinct = operator.distinct
        fits = distinct.size <= _DENSE_ORDER and distinct.batch * distinct.size**2 <= 2**27
        return Exact() if fits else GMRES()

    def in_x(self) -> System:
        """Return equations in x alone, see :class:`ConstraintReach`."""
        unknown = self.ordinary.raveler
        return ConstraintReach(
            self.where, self.function, unknown, self.arguments, self.levels, self.autocast, self.mode, whole=self
        )

    def name(self, kind: str, index: int) -> str:
        """Return how a user would write the constraint of a ``kind`` at ``index`` of its flat vector."""
        if kind in ("lower", "upper"):
            return f"the {kind} bound of {place_of(self.ordinary.raveler, 'x', index)}"
        known = self.equality if kind == "equality" else self.inequality
        assert known is not None
        return place_of(known, kind, index)

    def program(self, problem: Problem, *, promoted: bool = False) -> Program:
        """Return the batch ``problem``, of this system or of the same at other levels, as solvers of constrained problems see it.

        ``promoted``: operations on tensors of several dtypes are done in the widest.
        """
        system = problem.system.for_second_derivatives()
        assert isinstance(system, ConstrainedSystem)
        n, (p, m) = self.unknowns, self.counts

        def batched(name: str, one: Callable[..., Any], *vectors: torch.Tensor) -> list[torch.Tensor]:
            sizes = [vector.shape[-1] for vector in vectors]

            def packed(flat: torch.Tensor, *tensors: torch.Tensor) -> Any:
                return one(*torch.split(flat, sizes), *tensors)

            def evaluation(joined: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
                with torch.no_grad(), Promoted() if promoted else nullcontext():
                    made = system.lifted(packed)(joined.reshape(*system.batch_shape, sum(sizes)), *tensors)
                return [part.detach() for part in (made if isinstance(made, tuple) else (made,))]

            joined = vectors[0] if len(vectors) == 1 else torch.cat(vectors, dim=-1)
            axes = len(system.batch_shape)
            made = problem.evaluate(("constrained", name), evaluation, joined)
            return [part.reshape(problem.batch, *part.shape[axes:]) for part in made]

        def rows(x: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            value, pull = vjp(lambda point: system.stack(point, *tensors), x)
            return value, _pulled(pull, value)

        def curvature(x: torch.Tensor, weights: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
            slope, pull = vjp(lambda point: grad(lambda q: (weights * system.stack(q, *tensors)).sum(), point)[0], x)
            return _pulled(pull, slope)

        def product(x: torch.Tensor, v: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
            _, pull = vjp(lambda point: grad(lambda q: system.stack(q, *tensors)[0], point)[0], x)
            pushed: torch.Tensor = pull(v)[0]
            return pushed

        unknown = system.ordinary.raveler
        probe = torch.zeros(problem.batch, n, dtype=unknown.dtype, device=unknown.device)
        lower, upper = batched("bounds", system.bounds, probe)
        return Program(
            lower, upper, p, m,
            parts=lambda x: batched("parts", system.stack, x)[0],
            jacobian=lambda x: tuple(batched("jacobian", rows, x)),  # type: ignore[arg-type, return-value]
            hessian=lambda x, weights: batched("hessian", curvature, x, weights)[0],
            product=lambda x, v: batched("product", product, x, v)[0],
            single=lambda number: self.program(problem.single(number), promoted=promoted),
        )  # fmt: skip

    def find(self, problem: Problem, init: torch.Tensor, target: Target, solver: InnerSolver | None) -> InnerOutcome:
        """Return the solutions z (batch, n + p + m), polished and judged by the KKT conditions."""
        if not problem.batch or not self.unknowns:
            return nothing_to_solve(init, Basis.RESIDUAL, "none")
        program = self._widened(problem)
        start, *duals = (part.to(program.lower) for part in self.split(init))
        # Multipliers of zero are none: see ConstraintStructure.attach.
        known = (duals[0], duals[1]) if bool((init[:, self.unknowns :] != 0).any()) else None
        chosen = self._chosen(problem, solver)
        found = solve_constrained(program, start, chosen, self.smoothing, self.name, self.where, known)
        z = torch.cat([found.x, found.equality, found.inequality], dim=-1).to(init)
        residual = problem.residual(z)
        norm = residual.norm(dim=-1)
        status = with_spent_budget(solver, target, found.status)
        scale = 1 + z.abs().amax(-1)
        threshold = torch.clamp(max(target.relative, torch.finfo(init.dtype).eps ** 0.5) * scale, min=target.absolute)
        broken = ~torch.isfinite(z).all(-1)
        status = torch.where(broken, int(Status.NOT_FINITE), status)
        sides = None
        if found.weak is not None:
            active = self._active(z[:, : self.unknowns], program.lower.to(z), program.upper.to(z))
            sides = Sides.at(program, found, torch.stack(active).any(0))
        return InnerOutcome(
            z, status, found.iterations, norm, threshold, torch.full_like(norm, math.nan), Basis.RESIDUAL, residual,
            solver=found.solver, degenerate=found.degenerate, words=found.words, sides=sides,
        )  # fmt: skip

    def _widened(self, problem: Problem) -> Program:
        """Return the program in float64, if the functions allow that: active sets are told apart by half the digits."""
        if self.ordinary.raveler.dtype == torch.float64:
            return self.program(problem)
        wide = problem.to(torch.float64)
        system = wide.system
        assert isinstance(system, ConstrainedSystem)
        # Tensors that a function reaches through its closure keep their dtype.
        for promoted in (False, True):
            try:
                program = system.program(wide, promoted=promoted)
                x = program.inside(torch.zeros_like(program.lower))
                program.hessian(x, x.new_ones(len(x), 1 + sum(self.counts)))
            except (RuntimeError, BilevelError):
                continue
            return program
        return self.program(problem)

    def _chosen(
        self, problem: Problem, solver: InnerSolver | None
    ) -> ConstrainedSolver | Callable[[Program, torch.Tensor], Answer] | None:
        if solver is None or isinstance(solver, ConstrainedSolver):
            return solver
        if self.smoothing is not None:
            raise ArgumentError(
                f"{self.where}: expected bilevel.InteriorPoint() with smoothing, which follows the central path, got {solver.name}; leave "
                "solver or smoothing out"
            )
        if isinstance(solver, ScipyMinimize):
            return by_scipy(solver, self.where)
        if isinstance(solver, CallableSolver):
            return by_callable(solver, objective_of(problem), self._multipliers_of, self.counts)
        raise ArgumentError(
            f"{self.where}: expected a solver that takes constraints, got {solver.name}; leave it out, or pass bilevel.InteriorPoint(), "
            "bilevel.ProjectedNewton() for bounds alone, bilevel.ScipyMinimize('SLSQP'), or a function (objective, init, *args) -> x"
        )

    def _multipliers_of(self, given: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return ν (p,) and λ (m,) of what a user's solver returned as multipliers: a mapping, or an object with these attributes."""
        made: list[torch.Tensor | None] = []
        for name, known in (("equality", self.equality), ("inequality", self.inequality)):
            value = given.get(name) if isinstance(given, dict) else getattr(given, name, None)
            made.append(
                None
                if value is None or known is None
                else ravel_values(value, known, self.where, f"multipliers.{name}")
            )
        return made[0], made[1]


@dataclass(frozen=True, eq=False, kw_only=True)
class ConstraintReach(RootSystem):
    """Equations in x alone that depend on what the constrained problem depends on, by which unused arguments are found. Their root means nothing."""

    whole: ConstrainedSystem

    def output(self, flat: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        """Return n numbers that depend on all that the objective, the bounds and the constraints depend on."""
        lower, upper = self.whole.bounds(flat, *tensors)
        zero = torch.zeros_like(flat)
        bounds = sum(torch.where(torch.isfinite(bound), bound, zero) for bound in (lower, upper))
        return flat + bounds + self.whole.stack(flat, *tensors).sum()


def _pulled(pull: Callable[..., Any], like: torch.Tensor) -> torch.Tensor:
    """Return the rows of a Jacobian; ``pull`` makes products with cotangents ``like`` its value."""
    count = like.shape[0]
    units = torch.eye(count, dtype=like.dtype, device=like.device)
    (rows,) = vmap(pull, chunk_size=None if count <= _MOST_ROWS else _MOST_ROWS)(units)
    matrix: torch.Tensor = rows
    return matrix
