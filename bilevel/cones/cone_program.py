"""``bilevel.cone_program``: the solution of a cone program, as a differentiable function of its data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch.utils import _pytree as pytree

from bilevel._torch.empty_batches import apply_rule
from bilevel._torch.transforms import eager
from bilevel.cones._arguments import Arguments, arguments_of
from bilevel.cones._call import ConeCall
from bilevel.cones._conditions import Conditions
from bilevel.cones._cone import Cone
from bilevel.cones._product import Product, cones_of
from bilevel.cones._wording import backward_words
from bilevel.equations.structured import flat_raveler
from bilevel.equations.system import RootSystem
from bilevel.errors import ArgumentError
from bilevel.implicit import ImplicitContext, Solve
from bilevel.layers.arguments import refuse_forward_twice
from bilevel.layers.settings import SolveSettings
from bilevel.layers.solution import Solution
from bilevel.policy import OnFailure, check_policy
from bilevel.pytree import Raveler, flatten_arguments
from bilevel.quadratic_programs._clarabel import Clarabel
from bilevel.quadratic_programs._interface import ProgramFunction, checked_settings, with_arguments_of
from bilevel.reports import SolveReport
from bilevel.tolerance import Tolerance

__all__ = ["ConeCertificate", "ConeProgram", "ConeSolution", "cone_program"]

_WHERE = "`cone_program`"


class ConeCertificate(NamedTuple):
    """Proofs that problems have no solution; zero for problems that have one.

    ``direction`` is d (..., n) of an unbounded problem: qᵀd = −1, P d = 0 and −A d ∈ K.

    ``multipliers`` is y (..., m) of an infeasible problem: Aᵀy = 0 and bᵀy = −1 with y in the dual cone, which no s = b − A x in K allows.

    Examples
    --------
    >>> import torch, bilevel
    >>> A, b = torch.tensor([[-1.0], [1.0]]), torch.tensor([-1.0, 0.0])  # x ≥ 1 and x ≤ 0
    >>> cones = [bilevel.cones.Nonnegative(2)]
    >>> solution = bilevel.cone_program.solve(None, torch.ones(1), A, b, cones, on_failure="ignore")
    >>> solution.report.status.name, solution.certificate.multipliers.round(decimals=4)
    ('INFEASIBLE', tensor([1., 1.]))
    """

    direction: torch.Tensor
    multipliers: torch.Tensor


@dataclass(frozen=True, eq=False)
class ConeSolution(Solution[torch.Tensor]):
    """The solution of a cone program, with its multipliers, its slacks and its certificate.

    Parameters
    ----------
    value
        x (..., n), differentiable.
    report
        What the solver did, per problem.
    multipliers
        y (..., m) in the dual cone: P x + q + Aᵀy = 0. Differentiable as ``value`` is.
    active, aux
        None: the slacks say which face of the cone the solution is on, and a program has no other output.
    slacks
        s = b − A x (..., m), in K. Differentiable.
    certificate
        Proofs that problems have no solution, for the whole batch, as the report.

    Examples
    --------
    >>> import torch, bilevel
    >>> A, b = -torch.eye(2), torch.zeros(2)
    >>> cones = [bilevel.cones.Nonnegative(2)]
    >>> solution = bilevel.cone_program.solve(torch.eye(2), torch.tensor([1.0, -1.0]), A, b, cones)
    >>> solution.value, solution.slacks, solution.multipliers
    (tensor([0., 1.]), tensor([0., 1.]), tensor([1., 0.]))
    """

    slacks: torch.Tensor = field(kw_only=True)
    certificate: ConeCertificate = field(kw_only=True)


pytree.register_pytree_node(
    ConeSolution,
    lambda s: ([s.value, s.multipliers, s.slacks], (s.report, s.certificate)),
    lambda children, context: _rebuilt(list(children), context),
    serialized_type_name="bilevel.ConeSolution",
)


def _rebuilt(children: list[Any], context: Any) -> ConeSolution:
    value, multipliers, slacks = children
    report, certificate = cast("tuple[SolveReport, ConeCertificate]", context)
    return ConeSolution(value, report, multipliers, slacks=slacks, certificate=certificate)


class ConeProgram(ProgramFunction):
    """The type of ``bilevel.cone_program``, which is its only instance."""

    __name__ = "cone_program"

    @eager
    def solve(
        self,
        P: torch.Tensor | None,
        q: torch.Tensor,
        A: torch.Tensor,
        b: torch.Tensor | float,
        cones: Sequence[Cone],
        *,
        tolerance: Tolerance | None = None,
        on_failure: OnFailure = "raise",
        smoothing: float | None = None,
        solver: Clarabel | None = None,
    ) -> ConeSolution:
        """Return a :class:`ConeSolution`: x with its multipliers, slacks, report and certificates. The arguments are those of the call.

        Examples
        --------
        >>> import torch, bilevel
        >>> one = torch.eye(2, dtype=torch.float64)
        >>> solution = bilevel.cone_program.solve(one, torch.tensor([1.0, -1.0]), -one, 0.0, [bilevel.cones.Nonnegative(2)])
        >>> solution.value, solution.multipliers, solution.report.status.name
        (tensor([0., 1.], dtype=torch.float64), tensor([1., 0.], dtype=torch.float64), 'CONVERGED')
        """
        settings = _Settings(tolerance, on_failure, smoothing, solver)
        return _solution(settings, cones, P=P, q=q, A=A, b=b)

    @with_arguments_of(solve)
    @eager
    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        r"""Return x of min ½ xᵀPx + qᵀx subject to A x + s = b with s ∈ K = K₁ × K₂ × …, differentiable in P, q, A and b.

        Needs Clarabel: ``pip install '.[qp]'`` in a clone.

        Parameters
        ----------
        P
            (..., n, n), positive semidefinite, float32 or float64. Only its symmetric part counts. None for a linear objective.
        q
            (..., n).
        A, b
            (..., m, n) and (..., m), or a number for b. P and A may be sparse tensors without batch axes.
        cones
            The factors of K from :mod:`bilevel.cones`, in the order of the rows of A, which they take all.
        tolerance
            ``delta`` is the largest relative residual of the optimality conditions that is let pass, ``delta_prime`` that of the linear
            system of a derivative. By default 1e-8, which Newton's steps reach after Clarabel's where the solution is not degenerate.
        on_failure
            What becomes of a failed solve or derivative: "raise", "warn", "nan" or "ignore". An infeasible, unbounded or non-convex
            problem has no derivative, which is NaN if the policy does not raise.
        smoothing
            τ > 0: return the point of the central path with s ∘ y = τ e, and its derivative, which exists for degenerate problems too.
            Its distance to the solution is O(τ) where the solution is not degenerate. For zero, nonnegative, second-order and
            semidefinite cones.
        solver
            :class:`~bilevel.Clarabel` with settings of your own.

        Returns
        -------
        torch.Tensor
            x (..., n) in the dtype of the data; all is computed in float64. Leading axes of all arguments are broadcast: each problem is
            solved, and may fail, by itself. ``cone_program.solve``, with the same arguments, returns a :class:`~bilevel.ConeSolution`
            with multipliers, slacks, the report and certificates.

        Raises
        ------
        SolveError
            If a problem has no solution, or a derivative does not exist (policy ``"raise"``). ``report.status`` says which and why:
            INFEASIBLE, UNBOUNDED and INDEFINITE (P is not positive semidefinite) for solves; DEGENERATE and SINGULAR for derivatives.
        ArgumentError, ShapeError, DtypeError
            If an argument cannot be used, or Clarabel is not installed.
        TransformError
            If two nested forward-mode transforms meet here: torch would return zero.

        Notes
        -----
        With v = s − y, the conditions of optimality are P x + q + Aᵀ(Π(v) − v) = 0 and A x + Π(v) = b, Π the projection on K. Their implicit
        derivative is of every order and in both modes, under ``vmap`` too. It exists where Π is smooth at v (strict complementarity) and
        the Jacobian is regular (the solution and its multipliers are unique); elsewhere its report says DEGENERATE, with the cone, or
        SINGULAR. The problems of a batch are solved one after another, and differentiated together.

        References
        ----------
        A. Agrawal, S. Barratt, S. Boyd, E. Busseti, W. Moursi, "Differentiating through a cone program", J. Applied and Numerical
        Optimization 1 (2019). P. J. Goulart, Y. Chen, "Clarabel: An interior-point solver for conic programs with quadratic
        objectives", 2024.

        Examples
        --------
        The largest step from the origin in the direction (3, 4) inside of a disc of radius r: min −3x₀ − 4x₁ with (r, x) in a second-order cone.

        >>> import torch, bilevel
        >>> A = -torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
        >>> r = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        >>> q = torch.tensor([-3.0, -4.0], dtype=torch.float64)
        >>> x = bilevel.cone_program(None, q, A, torch.stack([r, 0 * r, 0 * r]), [bilevel.cones.SecondOrder(3)])
        >>> x.detach().round(decimals=6)
        tensor([1.2000, 1.6000], dtype=torch.float64)
        >>> x[0].backward()
        >>> r.grad.round(decimals=6)
        tensor(0.6000, dtype=torch.float64)
        """
        return self.solve(*args, **kwargs).value


class _Settings:
    """The settings of a call, checked."""

    def __init__(
        self, tolerance: Tolerance | None, on_failure: str, smoothing: float | None, solver: Clarabel | None
    ) -> None:
        given, self.smoothing = checked_settings("cone_program", tolerance, smoothing)
        if solver is not None and not isinstance(solver, Clarabel):
            raise ArgumentError(
                f"{_WHERE}: expected solver to be bilevel.Clarabel(...), got {solver!r}; pass one, or leave it out"
            )
        self.solver = Clarabel() if solver is None else solver
        self.of_call = SolveSettings(
            tolerance=given,
            on_failure=check_policy(on_failure),
            backward_messages=backward_words(),
        )


def _solution(settings: _Settings, cones: Any, **given: Any) -> ConeSolution:
    arguments = arguments_of(_WHERE, given)
    product = Product(cones_of(_WHERE, cones, arguments.rows), settings.smoothing)
    refuse_forward_twice(_WHERE, list(arguments.tensors))
    n = arguments.unknowns
    conditions = Conditions(product, n, *arguments.patterns)
    system = _system(arguments, conditions)
    call = ConeCall(settings.of_call, conditions, settings.solver, _WHERE)
    context = ImplicitContext(system, call.solve, call.solve_linear)
    init = torch.zeros(*arguments.batch, n + arguments.rows, dtype=torch.float64)
    z = apply_rule(partial(Solve.apply, context), init, *arguments.tensors)
    assert call.report is not None and call.certificate is not None
    x, v = z[..., :n], z[..., n:]
    s = product.project(v)
    x, s, y = (part.to(arguments.dtype) for part in (x, s, s - v))
    certificate = ConeCertificate(*call.certificate.to(arguments.dtype).split([n, arguments.rows], -1))
    return ConeSolution(x, call.report, y, slacks=s, certificate=certificate)


@dataclass(frozen=True, eq=False)
class ConeSystem(RootSystem):
    """The conditions of optimality of a batch of programs.

    Parameters
    ----------
    given
        The sparse matrices that the tensors have the entries of.
    """

    given: tuple[torch.Tensor, ...] = ()

    noun = "the matrices"

    def sparse(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Return the matrices that the user gave."""
        return self.given


def _system(arguments: Arguments, conditions: Conditions) -> ConeSystem:
    n, m = arguments.unknowns, arguments.rows
    _, places = flatten_arguments(arguments.tensors, {})
    unknown = flat_raveler(n + m, Raveler.of(torch.zeros(1, dtype=torch.float64), _WHERE))
    return ConeSystem(_WHERE, conditions, unknown, places, arguments.levels, given=arguments.sparse)


cone_program = ConeProgram()
