"""``bilevel.quadratic_program``: the solution of a quadratic program, as a differentiable function of its data."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch.utils import _pytree as pytree

from bilevel._torch.empty_batches import apply_rule
from bilevel._torch.transforms import eager
from bilevel.errors import ArgumentError
from bilevel.layers.arguments import refuse_forward_twice
from bilevel.layers.solution import Solution
from bilevel.policy import OnFailure, check_policy
from bilevel.quadratic_programs._arguments import Arguments, arguments_of
from bilevel.quadratic_programs._call import Backend, ProgramCall
from bilevel.quadratic_programs._clarabel import Clarabel
from bilevel.quadratic_programs._in_units import InUnits
from bilevel.quadratic_programs._interface import ProgramFunction, checked_settings, with_arguments_of
from bilevel.quadratic_programs._rule import ProgramSolve, Rule, Structure
from bilevel.quadratic_programs._solvers import Mehrotra
from bilevel.reports import SolveReport
from bilevel.tolerance import Auto, Tolerance

__all__ = ["ActiveSet", "Certificate", "Multipliers", "ProgramSolution", "QuadraticProgram", "quadratic_program"]

_WHERE = "`quadratic_program`"


class Multipliers(NamedTuple):
    """The multipliers of a program: Qx + q + Aᵀν + Gᵀλ − μ_l + μ_u = 0. Those of inactive inequalities are exactly zero.

    ``equality`` is ν (..., p), ``inequality`` λ (..., m), ``lower`` μ_l and ``upper`` μ_u (..., n). All but ν are not negative.
    """

    equality: torch.Tensor
    inequality: torch.Tensor
    lower: torch.Tensor
    upper: torch.Tensor


class ActiveSet(NamedTuple):
    """Which inequalities are active, bool: rows of G (..., m), lower and upper bounds (..., n)."""

    inequality: torch.Tensor
    lower: torch.Tensor
    upper: torch.Tensor


class Certificate(NamedTuple):
    """Proofs that problems have no solution; zero for problems that have one.

    ``direction`` is d (..., n) of an unbounded problem: qᵀd = −1, Qd = 0, Ad = 0, Gd ≤ 0 where h is finite, and no bound ends it.

    ``equality``, ``inequality``, ``lower`` and ``upper`` are a Farkas ray (ν, λ, μ_l, μ_u) of an infeasible problem:
    Aᵀν + Gᵀλ − μ_l + μ_u = 0 with λ, μ_l, μ_u ≥ 0 and bᵀν + hᵀλ − lᵀμ_l + uᵀμ_u < 0, which no feasible point allows.

    Examples
    --------
    >>> import torch, bilevel
    >>> program = torch.zeros(1, 1), -torch.ones(1)  # minimise −x
    >>> solution = bilevel.quadratic_program.solve(*program, lower=0.0, on_failure="ignore")
    >>> solution.report.status.name, solution.certificate.direction
    ('UNBOUNDED', tensor([1.]))
    """

    direction: torch.Tensor
    equality: torch.Tensor
    inequality: torch.Tensor
    lower: torch.Tensor
    upper: torch.Tensor


@dataclass(frozen=True, eq=False)
class ProgramSolution(Solution[torch.Tensor]):
    """The solution of a program, with its multipliers, its active set and its certificate.

    Parameters
    ----------
    value
        x (..., n), differentiable.
    report
        What the solver did, per problem.
    multipliers
        Differentiable as ``value`` is.
    active
        The active set.
    aux
        None: a program has no other output.
    certificate
        Proofs that problems have no solution, for the whole batch, as the report.

    Examples
    --------
    >>> import torch, bilevel
    >>> solution = bilevel.quadratic_program.solve(torch.eye(2), torch.tensor([1.0, -1.0]), lower=0.0)
    >>> solution.value, solution.multipliers.lower, solution.active.lower
    (tensor([0., 1.]), tensor([1., 0.]), tensor([ True, False]))
    """

    multipliers: Multipliers = field()
    active: ActiveSet = field()
    certificate: Certificate = field(kw_only=True)


pytree.register_pytree_node(
    ProgramSolution,
    lambda s: ([s.value, s.multipliers, s.active], (s.report, s.certificate)),
    lambda children, context: _rebuilt(list(children), context),
    serialized_type_name="bilevel.ProgramSolution",
)


def _rebuilt(children: list[Any], context: Any) -> ProgramSolution:
    value, multipliers, active = children
    report, certificate = cast("tuple[SolveReport, Certificate]", context)
    return ProgramSolution(value, report, multipliers, active, certificate=certificate)


class QuadraticProgram(ProgramFunction):
    """The type of ``bilevel.quadratic_program``, which is its only instance."""

    __name__ = "quadratic_program"

    @eager
    def solve(
        self,
        Q: torch.Tensor,
        q: torch.Tensor,
        A: torch.Tensor | None = None,
        b: torch.Tensor | float | None = None,
        G: torch.Tensor | None = None,
        h: torch.Tensor | float | None = None,
        lower: torch.Tensor | float | None = None,
        upper: torch.Tensor | float | None = None,
        *,
        tolerance: Tolerance | None = None,
        on_failure: OnFailure = "raise",
        smoothing: float | None = None,
        solver: Backend | None = None,
    ) -> ProgramSolution:
        """Return a :class:`ProgramSolution`: x with its multipliers, active set, report and certificates. The arguments are those of the call.

        Examples
        --------
        >>> import torch, bilevel
        >>> solution = bilevel.quadratic_program.solve(torch.eye(2), torch.tensor([1.0, -1.0]), lower=0.0)
        >>> solution.value, solution.multipliers.lower, solution.report.status.name
        (tensor([0., 1.]), tensor([1., 0.]), 'CONVERGED')
        """
        settings = _Settings(tolerance, on_failure, smoothing, solver)
        return _solution(settings, Q=Q, q=q, A=A, b=b, G=G, h=h, lower=lower, upper=upper)

    @with_arguments_of(solve)
    @eager
    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        r"""Return x of min ½ xᵀQx + qᵀx subject to Ax = b, Gx ≤ h, lower ≤ x ≤ upper, differentiable in all of them.

        Parameters
        ----------
        Q
            (..., n, n), positive semidefinite, float32 or float64. Only its symmetric part counts. Zero for a linear program.
        q
            (..., n).
        A, b
            (..., p, n) and (..., p): equations. None for no equations.
        G, h
            (..., m, n) and (..., m): inequalities. An infinite entry of ``h`` stands for no inequality.
        lower, upper
            (..., n) or numbers: bounds, infinite where there is none. Two equal bounds fix an unknown.
        tolerance
            ``delta`` and ``delta_prime`` are the largest relative residuals of the optimality conditions, and of the linear system of a
            derivative, that are let pass. The default lets 1e-8 and 1e-7 pass; the polish reaches rounding where the active set is clear.
        on_failure
            What becomes of a failed solve or derivative: "raise", "warn", "nan" or "ignore". An infeasible, unbounded or non-convex
            problem has no derivative, which is NaN if the policy does not raise.
        smoothing
            τ > 0: return the point of the central path with λ_i (Gx − h)_i = −τ, and its derivative, which exists for degenerate
            problems too. Its distance to the solution is O(τ) where the solution is not degenerate.
        solver
            :class:`~bilevel.Mehrotra` for dense data, which is the default for them, or :class:`~bilevel.Clarabel`, the default where
            Q, A or G is a sparse tensor.

        Returns
        -------
        torch.Tensor
            x (..., n) in the dtype of the data. Leading axes of all arguments are broadcast: each problem is solved, and may fail, by
            itself. ``quadratic_program.solve``, with the same arguments, returns a :class:`~bilevel.ProgramSolution` with multipliers,
            the active set, the report and certificates.

        Raises
        ------
        SolveError
            If a problem has no solution, or a derivative does not exist (policy ``"raise"``). ``report.status`` says which and why:
            INFEASIBLE, UNBOUNDED and INDEFINITE (Q is not positive semidefinite) for solves; DEGENERATE and SINGULAR for derivatives.
        ArgumentError, ShapeError, DtypeError
            If an argument cannot be used.
        TransformError
            If two nested forward-mode transforms meet here: torch would return zero.

        Notes
        -----
        The derivative is that of the KKT conditions on the active set (Amos and Kolter 2017), of every order and in both modes, under
        ``vmap`` too. It costs one linear solve with the factors of the forward pass. It exists where the active constraints are
        linearly independent, none of them has a multiplier of zero, and Q is positive definite along them; elsewhere the derivative's
        report says DEGENERATE, with the constraint, or SINGULAR. Redundant equations are allowed: the derivative with respect to them is
        that within the perturbations that keep them consistent.

        References
        ----------
        B. Amos, J. Z. Kolter, "OptNet: Differentiable optimization as a layer in neural networks", ICML 2017. A. V. Fiacco,
        "Sensitivity analysis for nonlinear programming using penalty methods", Math. Programming 10 (1976).

        Examples
        --------
        The projection of (1, 2) onto the simplex, and its derivative:

        >>> import torch, bilevel
        >>> point = torch.tensor([0.4, 0.8], requires_grad=True)
        >>> x = bilevel.quadratic_program(torch.eye(2), -point, torch.ones(1, 2), 1.0, lower=0.0)
        >>> x.detach()
        tensor([0.3000, 0.7000])
        >>> x[0].backward()
        >>> point.grad
        tensor([ 0.5000, -0.5000])
        """
        return self.solve(*args, **kwargs).value


class _Settings:
    """The settings of a call, checked."""

    def __init__(
        self, tolerance: Tolerance | None, on_failure: str, smoothing: float | None, solver: Backend | None
    ) -> None:
        given, self.smoothing = checked_settings("quadratic_program", tolerance, smoothing)
        if solver is not None and not (hasattr(solver, "solve") and hasattr(solver, "factor")):
            raise ArgumentError(
                f"{_WHERE}: expected solver to be bilevel.Mehrotra(...) or bilevel.Clarabel(...), got {solver!r}; pass one of them"
            )
        self.on_failure = check_policy(on_failure)
        self.solver = solver
        self.delta, self.delta_prime = (
            None if d is None or isinstance(d, Auto) else float(d) for d in (given.delta, given.delta_prime)
        )

    def backend(self, arguments: Arguments) -> Backend:
        """Return the solver for these arguments."""
        if arguments.sparse and isinstance(self.solver, Mehrotra):
            raise ArgumentError(
                f"{_WHERE}: expected dense tensors with solver=Mehrotra(), got sparse ones; convert them with .to_dense()"
            )
        if self.solver is not None:
            return self.solver
        return Clarabel() if arguments.sparse else Mehrotra()


def _solution(settings: _Settings, **given: Any) -> ProgramSolution:
    arguments = arguments_of(_WHERE, given)
    refuse_forward_twice(_WHERE, list(arguments.tensors))
    sparse = tuple(
        given[name]
        for name in ("Q", "A", "G")
        if arguments.sparse and given[name] is not None and given[name].requires_grad
    )
    structure = Structure(arguments.sizes, *arguments.patterns, settings.smoothing)
    backend = InUnits(settings.backend(arguments))
    call = ProgramCall(backend, _WHERE, settings.on_failure, settings.delta, settings.delta_prime)
    rule = Rule(structure, call, sparse)
    output = apply_rule(partial(ProgramSolve.apply, rule), *arguments.tensors)
    assert call.report is not None and call.certificate is not None
    x, nu, lam, low, up = structure.sizes.split(output[..., : structure.length])
    marks = output[..., structure.length :].detach() % 2 > 0
    active = ActiveSet(*marks.split(structure.sizes.rows, -1))
    certificate = Certificate(*structure.sizes.split(call.certificate))
    return ProgramSolution(x, call.report, Multipliers(nu, lam, low, up), active, certificate=certificate)


quadratic_program = QuadraticProgram()
