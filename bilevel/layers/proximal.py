"""Proximal terms as a structure: minimise f(x, θ) + g(x; θ), where g has a proximal operator and need not be smooth.

Near a nondegenerate solution, x moves on a smooth manifold M, and g is smooth on M. With the retraction Π of M, the local model

    Φ(y, θ) = f(Π(y), θ) + g(Π(y), θ) + ½‖y − Π(y)‖²

is smooth and has the same solution. Its Hessian there is P (H + K) P + (I − P): P projects on the tangent space of M, H is the Hessian of f, and K
is the curvature of g along M. The usual rule then gives derivatives of every order. A term without a manifold is differentiated by autograd, through
the root of x − prox(x − s ∇f(x)).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch.func import vmap
from torch.utils import _pytree as pytree

from bilevel._torch.grad_mode import no_graph
from bilevel._torch.reverse import vjp
from bilevel._torch.transforms import without_gradient
from bilevel.equations.problem import Problem
from bilevel.equations.structured import LocalModel, Structure, StructuredSystem, flat_raveler, objective_of
from bilevel.equations.system import RootSystem, System
from bilevel.errors import ArgumentError, DtypeError
from bilevel.prox._base import Demand, Term, already_checked, postponed_checks
from bilevel.prox._flat import FlatTerm
from bilevel.pytree import Raveler
from bilevel.reports import Status
from bilevel.solvers._base import InnerSolver
from bilevel.solvers.composite.judge import solve_composite, solve_fixed_point
from bilevel.solvers.composite.problem import Composite
from bilevel.solvers.judging.outcome import InnerOutcome
from bilevel.tolerance import Target

__all__ = ["Proximal", "ProximalRoot", "ProximalSystem"]

_WRITE = "pass one, as in prox=bilevel.prox.L1(0.1), or a function of the arguments, as in prox=lambda X, y, s: bilevel.prox.L1(s)"


@dataclass(frozen=True, eq=False)
class _Terms:
    """g as a sum of one term for each leaf of x; None for a leaf without one.

    Parameters
    ----------
    where
        The layer's name, for messages.
    given
        The user's argument: a term, a pytree of terms, or a function that returns one.
    """

    where: str
    given: Any
    raveler: Raveler

    def of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Term | None]:
        """Return the terms for a call with these arguments, one for each leaf."""
        made = self.given
        if _is_function(made):
            try:
                made = made(*args, **kwargs)
            except TypeError as error:
                if _fits(self.given, args, kwargs):
                    raise
                raise ArgumentError(
                    f"{self.where}: expected prox to be a function of the layer's arguments, without x, got one that cannot be called with "
                    f"them: {error}; give it the parameters of the objective after x"
                ) from error
        if made is None:
            return [None] * len(self.raveler.shapes)
        terms = [made] if isinstance(made, Term) else pytree.tree_leaves(made)
        for term in terms:
            if term is not None and not isinstance(term, Term):
                raise ArgumentError(
                    f"{self.where}: expected prox to be a term of bilevel.prox, got {type(term).__name__}; {_WRITE}"
                )
        if len(terms) != len(self.raveler.shapes):
            raise ArgumentError(
                f"{self.where}: expected prox to hold one term for each of the {len(self.raveler.shapes)} tensors of init, got {len(terms)}; "
                "pass a pytree of terms that is like init, with None for a tensor without a term"
            )
        if not isinstance(made, Term) and pytree.tree_structure(made) != self.raveler.structure:
            raise ArgumentError(
                f"{self.where}: expected prox to have the structure of init, {self.raveler.structure}, got {pytree.tree_structure(made)}; "
                "pass a pytree of terms that is like init, with None for a tensor without a term"
            )
        return list(terms)


def _is_function(given: Any) -> bool:
    return callable(given) and not isinstance(given, Term)


def _fits(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return False
    except ValueError:  # a function without a signature
        return True
    return True


@dataclass(frozen=True, eq=False, kw_only=True)
class _Termed(StructuredSystem):
    """A system with proximal terms: what of it one problem needs, flat."""

    besides: ClassVar[str] = "prox"

    terms: _Terms
    entrywise: bool

    def term(self, tensors: Sequence[torch.Tensor]) -> FlatTerm:
        """Return g of tensors that :meth:`Proximal.attach` has checked."""
        with already_checked():
            return FlatTerm(self.terms.of(*self.arguments.rebuild(tensors)), self.terms.raveler.shapes)

    def composite(self, problem: Problem) -> Composite:
        """Return what solvers see."""
        known = None if self.levels else self.term(problem.tensors)

        def of_batch(one: Callable[..., torch.Tensor], *vectors: torch.Tensor) -> torch.Tensor:
            """Return ``one`` of each problem, of its term, its rows of ``vectors`` (batch, k) and its tensors, without a graph."""
            with no_graph():
                if known is not None:
                    return one(known, *(vector[0] for vector in vectors), *problem.tensors).unsqueeze(0)
                return self._of_levels(problem, one, vectors)

        return self.composite_of(problem, of_batch, known)

    def named(self, problem: Problem, outcome: InnerOutcome) -> InnerOutcome:
        """Return ``outcome`` with words for ``NOT_FINITE`` if a term of a problem that met a NaN has a parameter out of its range."""
        met = outcome.status == Status.NOT_FINITE
        if not self.levels or not bool(met.any()):
            return outcome
        demands: list[Demand] = []

        def met_all(_: FlatTerm, flat: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
            with postponed_checks() as asked:
                self.terms.of(*self.arguments.rebuild(tensors))
            demands[:] = asked
            return torch.stack([flat.new_zeros(()), *(demand.broken.to(flat) for demand in demands)])

        broken = self._of_levels(problem, met_all, [outcome.x])[int(met.nonzero()[0]), 1:] > 0
        names = [
            f"{demand.name} of {demand.where}" for demand, bad in zip(demands, broken.tolist(), strict=True) if bad
        ]
        if not names:
            return outcome
        kinds = {demand.kind for demand, bad in zip(demands, broken.tolist(), strict=True) if bad}
        meaning = f"was given {', '.join(names)} that has to be {' or '.join(sorted(kinds))} and is not"
        words = {Status.NOT_FINITE: (meaning, "pass one that is; a positive one is exp of a free one")}
        return replace(outcome, words={**outcome.words, **words})

    def _of_levels(
        self, problem: Problem, one: Callable[..., torch.Tensor], vectors: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        sizes = [vector.shape[-1] for vector in vectors]
        packed = vectors[0] if len(vectors) == 1 else torch.cat(list(vectors), dim=-1)

        def single(flat: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
            return one(self.term(tensors), *torch.split(flat, sizes), *tensors)

        shaped = packed.reshape(*self.batch_shape, packed.shape[-1])
        made: torch.Tensor = self.lifted(single)(shaped, *problem.tensors)
        return made.reshape(problem.batch, *made.shape[len(self.batch_shape) :])

    def composite_of(
        self, problem: Problem, of_batch: Callable[..., torch.Tensor], known: FlatTerm | None
    ) -> Composite:
        """Return what solvers see, of a function that applies others to all problems; ``known`` is the term of a single one."""
        return Composite(objective_of(problem), problem, _prox_of(of_batch))


def _prox_of(of_batch: Callable[..., torch.Tensor]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda v, step: of_batch(lambda g, v, s, *_: g.prox(v, s[0]), v, step.unsqueeze(-1))


@dataclass(frozen=True, eq=False, kw_only=True)
class ProximalSystem(_Termed, LocalModel):
    """∇_y Φ = 0, with the local model Φ of f + g on the manifold that contains y."""

    def model(self, z: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        manifold = self.term(tensors).manifold(z)
        # A NaN, as on_failure="nan" puts it for an answer, stays one.
        x = torch.where(z.isnan(), z, manifold.retract(z))
        return self.ordinary.output(x, *tensors) + manifold.value(x) + 0.5 * ((z - x) ** 2).sum()

    def find(self, problem: Problem, init: torch.Tensor, target: Target, solver: InnerSolver | None) -> InnerOutcome:
        return self.named(problem, solve_composite(self.composite(problem), init, target, solver))

    def composite_of(
        self, problem: Problem, of_batch: Callable[..., torch.Tensor], known: FlatTerm | None
    ) -> Composite:
        n = self.raveler.size

        def entries(g: FlatTerm, x: torch.Tensor, places: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
            numbers = places.long()  # whole numbers, packed as floats
            made: Any = vjp(lambda point: self.residual_and_value(point, *tensors)[0], x)
            units = (numbers.unsqueeze(-1) == torch.arange(n, device=x.device)).to(x.dtype)
            (rows,) = vmap(made[1])(units)
            return rows.gather(-1, numbers.expand(len(numbers), -1))

        return Composite(
            objective_of(problem),
            problem,
            _prox_of(of_batch),
            value=lambda x: of_batch(lambda g, x, *_: g.value(x), x),
            margin=lambda x, slope, step: of_batch(
                lambda g, x, slope, s, *_: g.margin(x, slope, s[0]), x, slope, step.unsqueeze(-1)
            ),
            retract=lambda x, y: of_batch(lambda g, x, y, *_: g.manifold(x).retract(y), x, y),
            free=lambda x: of_batch(lambda g, x, *_: g.manifold(x).free, x),
            entries=lambda x, places: of_batch(entries, x, places.to(x.dtype)),
            proven_zero=lambda slope, move: of_batch(lambda g, s, m, *_: g.proven_zero(s, m), slope, move),
            proven_nonzero=lambda x, e: of_batch(lambda g, x, e, *_: g.proven_nonzero(x, e[0]), x, e.unsqueeze(-1)),
            convexity=lambda x: of_batch(lambda g, x, *_: g.convexity(x), x),
            separable=known if known is not None and self.entrywise else None,
            entrywise=self.entrywise,
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class ProximalRoot(_Termed, RootSystem):
    """x − prox_{sg}(x − s ∇f(x)) = 0, for terms that name no manifold; z = (x, s), as any step s > 0 has the same root."""

    def output(self, flat: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        size = self.ordinary.raveler.size
        x, step = flat[:size], without_gradient(flat[-1]) if len(flat) > size else flat.new_ones(())
        term, slope = self.term(tensors), self.ordinary.at_levels(()).residual(x, *tensors)
        if len(flat) == size:
            return x - term.prox(x - slope, step)
        return torch.cat([x - term.prox(x - step * slope, step), (flat[-1] - step)[None]])

    def in_x(self) -> System:
        return replace(self, raveler=flat_raveler(self.ordinary.raveler.size, self.raveler))

    def find(self, problem: Problem, init: torch.Tensor, target: Target, solver: InnerSolver | None) -> InnerOutcome:
        return self.named(problem, solve_fixed_point(self.composite(problem), init, target, solver))


@dataclass(frozen=True, eq=False, kw_only=True)
class Proximal(Structure):
    """The structure of a layer with ``prox=``.

    Parameters
    ----------
    given
        A term, a pytree of terms, or a function of the layer's arguments that returns one.
    written
        Returns the user's function, if ``given`` wraps it.
    """

    given: Any
    written: Any = None

    @property
    def functions(self) -> tuple[Any, ...]:
        return (self.given if self.written is None else self.written(),)

    def attach(
        self, ordinary: System, init: torch.Tensor, tensors: Sequence[torch.Tensor]
    ) -> tuple[StructuredSystem, torch.Tensor]:
        raveler = ordinary.raveler
        if any(dtype.is_complex for dtype in raveler.dtypes):
            raise DtypeError(
                f"{ordinary.where}: expected init to be real where there is a proximal term, got a complex tensor; solve for its real and "
                "imaginary parts, as torch.view_as_real gives them"
            )
        terms = _Terms(ordinary.where, self.given, raveler)
        made = terms.of(*ordinary.arguments.rebuild(tensors))
        term = FlatTerm(made, raveler.shapes)
        smooth = term.has_manifold
        size = raveler.size if smooth else raveler.size + 1
        kind: Any = ProximalSystem if smooth else ProximalRoot
        system = kind(
            ordinary.where, ordinary.function, flat_raveler(size, raveler), ordinary.arguments, ordinary.levels,
            ordinary.autocast, ordinary.mode, ordinary=ordinary, terms=terms,
            entrywise=term.separable,
        )  # fmt: skip
        return system, init if smooth else torch.cat([init, init.new_ones(1)])
