"""The result of a hypergradient: value, gradient, adjoint, the reports of both solves, and bounds on their errors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Generic

import torch
from torch.utils import _pytree as pytree
from typing_extensions import TypeVar

from bilevel.certificates._certificate import Certificate
from bilevel.certificates._local import LocalCertificate, NoCertificate
from bilevel.certificates._point import Point
from bilevel.certificates.bound import Bound
from bilevel.certificates.constants import Constants
from bilevel.errors import ArgumentError, ConstantsError
from bilevel.layers.differentiation import Implicit
from bilevel.layers.settings import SolveSettings
from bilevel.problems.adaptive.state import GoalReport
from bilevel.problems.definition import Definition
from bilevel.pytree import joined, parted
from bilevel.reports import Basis, SolveReport, Status

__all__ = ["Hypergradient", "HypergradientReport", "assemble", "certificate_of", "known_constants"]

T = TypeVar("T", default=Any)  # the pytree of the outer variables


@dataclass(frozen=True, eq=False)
class HypergradientReport:
    """The reports of the two solves behind a hypergradient.

    Parameters
    ----------
    forward
        The inner solve's report.
    backward
        The linear solve's report.
    goal
        The outcome of ``Tolerance(hypergradient=...)`` or ``Tolerance(descent=...)``; None without such a goal.

    Examples
    --------
    >>> import torch, bilevel
    >>> class Tuning(bilevel.BilevelProblem):
    ...     def inner_objective(self, inner, outer, data):
    ...         return (inner - 1) ** 2 + outer.exp() * inner**2
    ...     def outer_objective(self, inner, outer, data):
    ...         return (inner - 0.8) ** 2
    >>> zero = torch.tensor(0.0, dtype=torch.float64)
    >>> report = Tuning().hypergradient(zero, None, init=zero).report
    >>> report.forward.solver, int(report.forward.iterations), report.backward.solver, report.status.name
    ('Newton', 1, 'Exact', 'CONVERGED')
    """

    forward: SolveReport
    backward: SolveReport
    goal: GoalReport | None = None

    @property
    def converged(self) -> torch.Tensor:
        """Bool, per problem: both solves reached what was asked."""
        return self.forward.converged & self.backward.converged

    @property
    def status(self) -> Status | tuple[Any, ...]:
        """Per problem, the status of the inner solve if that failed, else of the linear solve."""
        return _worse(self.forward, self.backward).status

    @property
    def iterations(self) -> torch.Tensor:
        """Steps of both solves together, per problem."""
        return self.forward.iterations + self.backward.iterations

    @property
    def residual_norm(self) -> torch.Tensor:
        """The inner residual ‖∇_φ G‖, per problem."""
        return self.forward.residual_norm

    @property
    def error_bound(self) -> torch.Tensor:
        """Bound on ‖φ − φ*‖, per problem; NaN where none is known. That of the gradient is the hypergradient's own."""
        return self.forward.error_bound

    @property
    def certified(self) -> torch.Tensor:
        """Bool, per problem: :attr:`error_bound` is finite and proven."""
        return self.forward.certified

    def moved(self, point: Point) -> HypergradientReport:
        """Return the reports of a refined point: its residuals, and no bounds, which the refined result has itself."""
        return HypergradientReport(
            _moved(self.forward, point.inner.residual, 1), _moved(self.backward, point.rho / max(1, len(point.x)), 1)
        )

    def __str__(self) -> str:
        goal = "" if self.goal is None else f"\n{self.goal}"
        return f"{self.forward}\n{self.backward}{goal}"


def _moved(report: SolveReport, residual: torch.Tensor, steps: int) -> SolveReport:
    norm = residual.norm(dim=-1).reshape(report.residual_norm.shape).to(report.residual_norm)
    unknown = torch.full_like(report.error_bound, float("nan"))
    return replace(
        report, residual_norm=norm, error_bound=unknown, basis=Basis.RESIDUAL, iterations=report.iterations + steps
    )


def _worse(forward: SolveReport, backward: SolveReport) -> SolveReport:
    short = ~forward.converged
    codes = torch.where(short, forward.status_code, backward.status_code)
    return SolveReport(
        forward.direction, forward.where, forward.solver, codes, forward.iterations, forward.residual_norm,
        forward.threshold, forward.error_bound, forward.basis, forward.scale, forward.words if bool(short.any()) else backward.words,
    )  # fmt: skip


# What a hypergradient has of the problem, and leaves behind when it is pickled.
_TIED = ("_certificate", "_rebuild", "_restore")


class _MissingProblem:
    """Stands for the problem in a hypergradient that came from another process, and says so."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise _missing_problem()

    def __call__(self, *args: Any) -> Any:
        raise _missing_problem()


def _missing_problem() -> ArgumentError:
    return ArgumentError(
        "Hypergradient: expected the problem, which this property is computed from, and the result was pickled without it; read "
        "bounds, corrected_grad and the like before you pickle the result: they are then pickled too"
    )


@dataclass(frozen=True, eq=False)
class Hypergradient(Generic[T]):
    """The result of :meth:`BilevelProblem.hypergradient`.

    Parameters
    ----------
    value
        F at the computed inner solution, a scalar (the mean over a batch).
    corrected_value
        F − qᵀ∇_φ G: the outer value at φ* up to second order in the inner error (C4).
    grad
        ĝ = ∇_θ F − Bᵀ q, the pytree of ``outer``; None at leaves that are neither floating-point nor complex tensors.
    inner
        φ, the pytree of init.
    adjoint
        q ≈ H⁻¹ ∇_φ F, the same pytree; for a batch, each problem's own.
    report
        The reports of the two solves.

    Notes
    -----
    A pickled result keeps all of these fields, and the bounds that were computed before. It cannot compute others: they need the
    problem, which stays in its process.
    """

    value: torch.Tensor
    corrected_value: torch.Tensor
    grad: T
    inner: Any
    adjoint: Any
    report: HypergradientReport
    _certificate: Certificate = field(repr=False)
    _rebuild: Callable[[Point, Hypergradient], Hypergradient] = field(repr=False)
    _restore: Callable[[torch.Tensor], Any] = field(repr=False)
    _decided: Bound | None = field(default=None, repr=False)
    _decided_value: Bound | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _TIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, **dict.fromkeys(_TIED, _MissingProblem()))

    def __copy__(self) -> Hypergradient[T]:
        made = object.__new__(type(self))
        vars(made).update(vars(self))
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Hypergradient[T]:
        made = object.__new__(type(self))
        memo[id(self)] = made
        # What it has of the problem changes no more, and is shared.
        vars(made).update(vars(self), **copy.deepcopy(self.__getstate__(), memo))
        return made

    @cached_property
    def bound(self) -> Bound:
        """The bound of ‖ĝ − g‖ (C3); computed when it is first read.

        It costs about as much as the gradient, and where H is too large to be factorised the products that
        ``Tolerance(bound_products=...)`` allows, as far as they tighten it. With a goal, it is the bound or the estimate that decided.
        """
        return self._certificate.bound if self._decided is None else self._decided

    @cached_property
    def inner_bound(self) -> Bound:
        """The bound of ‖φ − φ*‖ (C1, C7); for a batch, the largest."""
        return self._certificate.inner_bound

    @cached_property
    def adjoint_bound(self) -> Bound:
        """The bound of ‖q − q*‖, with q* the adjoint at φ* (C2); for a batch, the largest."""
        return self._certificate.adjoint_bound

    @cached_property
    def value_bound(self) -> Bound:
        """The bound of the difference between F(φ*) and ``corrected_value`` (C4)."""
        return self._certificate.value_bound if self._decided_value is None else self._decided_value

    @cached_property
    def corrected_grad(self) -> T:
        """g̃, a hypergradient with an error of second order (C5), as the pytree of ``outer``. It costs two more linear solves.

        It is the hypergradient at φ⁺ = φ − H⁻¹∇G, with the adjoint solved there. ‖ĝ − g̃‖ estimates ‖ĝ − g‖.
        """
        grad: T = self._restore(self._certificate.corrected_gradient)
        return grad

    @cached_property
    def observed_constants(self) -> Constants:
        """The observed value of each constant between φ and a better point, per problem. No true L is smaller, and no true μ larger.

        They are not bounds: use them as a first guess of the constants. Bounds that use them are estimates.
        """
        return self._certificate.observed

    def refined(self) -> Hypergradient[T]:
        """Return the hypergradient one Newton step further, with bounds of its own (C6: refine and recheck).

        Two linear solves give φ⁺ = φ − H⁻¹∇G, and q⁺, which solves the system there, started at q. The Lipschitz constants in
        its bounds multiply an ε of second order.
        """
        return self._rebuild(self._certificate.refined, self)

    def __str__(self) -> str:
        """Return value, gradient, solution and adjoint, each with its bound and its basis. This computes the bounds."""
        flat = joined(leaf for leaf in pytree.tree_leaves(self.grad) if leaf is not None)
        inner, adjoint = joined(pytree.tree_leaves(self.inner)), joined(pytree.tree_leaves(self.adjoint))
        forward, backward = self.report.forward, self.report.backward
        rows = (
            ("value", f"{float(self.corrected_value):.6g}", "value_bound"),
            ("gradient", f"norm {float(flat.norm()):.4g}", "bound"),
            ("solution", f"norm {float(inner.norm()):.4g}", "inner_bound"),
            ("adjoint", f"norm {float(adjoint.norm()):.4g}", "adjoint_bound"),
        )
        lines = [f"{forward.where}: hypergradient, after {forward.solver} and {backward.solver}"]
        notes = [report.message for report in (forward, backward) if not bool(report.converged.all())]
        for name, shown, attribute in rows:
            try:
                lines.append(f"  {name:9s} {shown}, error {getattr(self, attribute)}")
            except ConstantsError as refuted:
                lines.append(f"  {name:9s} {shown}")
                notes = [str(refuted), *(note for note in notes if note != str(refuted))]
        return "\n".join([*lines, *(f"  {note}" for note in notes)])

    @property
    def error_bound(self) -> float:
        """Bound on ‖ĝ − g‖, or an estimate of it where :attr:`certified` is False."""
        return self.bound.value

    @property
    def certified(self) -> bool:
        """Whether :attr:`error_bound` is proven from known constants."""
        return self.bound.certified


def assemble(
    problem: Definition,
    settings: SolveSettings,
    outer: Any,
    data: Any,
    point: Point,
    inner: Any,
    value: torch.Tensor,
    corrected: torch.Tensor,
    gradient: torch.Tensor,
    report: HypergradientReport,
) -> Hypergradient:
    """Return what was found at ``point`` in the terms of ``outer`` and of the inner variables, with what its bounds are computed from.

    Parameters
    ----------
    outer
        The pytree that ``gradient``, ĝ (p,), belongs to.
    inner
        φ of ``point`` as the pytree of the inner variables.
    value, corrected
        F, and C4 of it.
    """
    restore, where = partial(parted, like=outer), problem.numbering.where
    unravel = partial(problem.numbering.unravel, point.inner.upper.system.raveler)
    tensors = [leaf for leaf in pytree.tree_leaves(data) if isinstance(leaf, torch.Tensor)]
    versions = [(tensor, tensor._version) for tensor in tensors if not tensor.is_inference()]

    def constants() -> Constants:
        if any(tensor._version != version for tensor, version in versions):
            raise ArgumentError(
                f"{where}: expected data to be unchanged since the hypergradient was computed, and a tensor in them was changed "
                "in place, so that no bound can be computed; read the bound before you change data, or pass a copy of data"
            )
        return known_constants(problem, settings, outer, data)

    def made(
        at: Point,
        inner: Any,
        value: torch.Tensor,
        corrected: torch.Tensor,
        flat: torch.Tensor,
        report: HypergradientReport,
        rebuild: Callable[[Point, Hypergradient], Hypergradient],
    ) -> Hypergradient:
        certificate, adjoint = certificate_of(problem, settings, constants, at, flat, corrected), unravel(at.q)
        return Hypergradient(value, corrected, restore(flat), inner, adjoint, report, certificate, rebuild, restore)

    def rebuild(at: Point, before: Hypergradient) -> Hypergradient:
        # In the problem's dtype, as any other result; the certificate then measures what rounding made of it.
        there = Point.at(point.lower, point.upper, at.x.to(point.x), at.q.to(point.x), point.needs_grad)
        worth, found = there.upper.value(there.x).mean().to(value), at.corrected_value.mean().to(value)
        flat = at.gradient.mean(0).to(gradient)
        # This function by its own name would be a circle, which holds all of the problem until a collection.
        return made(there, unravel(there.x), worth, found, flat, before.report.moved(at), before._rebuild)

    return made(point, inner, value, corrected, gradient, report, rebuild)


def known_constants(problem: Definition, settings: SolveSettings, outer: Any, data: Any) -> Constants:
    """Return the constants of the objectives that the user gave."""
    return problem.constants(outer, data).with_mu(settings.tolerance.strong_convexity)


def certificate_of(
    problem: Definition,
    settings: SolveSettings,
    constants: Callable[[], Constants],
    at: Point,
    flat: torch.Tensor,
    corrected: torch.Tensor,
) -> Certificate:
    """Return what bounds the errors of ĝ (p,) and of the ``corrected`` value, found at a point."""
    kind = Certificate
    if not isinstance(settings.differentiation, Implicit):
        kind = NoCertificate
    elif problem.structure is not None:
        kind = LocalCertificate if at.lower.system.symmetric else NoCertificate
    products = 0 if settings.tolerance.has_goal else settings.tolerance.bound_products
    return kind(at, flat, corrected, constants, problem.numbering.where, settings.on_failure, products)
