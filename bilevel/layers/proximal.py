"""Proximal terms as a structure: minimise f(x, θ) + g(x; θ), where g has a proximal operator and need not be smooth.

Near a solution that is not degenerate, x moves on a smooth manifold M, on which g is smooth. With the retraction Π of M, the local model

    Φ(y, θ) = f(Π(y), θ) + g(Π(y), θ) + ½‖y − Π(y)‖²

is smooth, has the same solution, and its Hessian there is P (H + K) P + (I − P): P projects on the tangent space of M, H is the Hessian of f, and K
is the curvature of g along M. So the usual rule gives derivatives of every order. A term without a manifold is differentiated by autograd, through
the root of x − prox(x − s ∇f(x)).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.func import vmap
from torch.utils import _pytree as pytree

from bilevel._torch.reverse import vjp
from bilevel._torch.transforms import without_gradient
from bilevel.equations.problem import Problem
from bilevel.equations.structured import LocalModel, Structure, StructuredSystem, flat_raveler, objective_of
from bilevel.equations.system import RootSystem, System
from bilevel.errors import ArgumentError, DtypeError
from bilevel.prox._base import Manifold, Term
from bilevel.pytree import Raveler
from bilevel.solvers._base import InnerSolver
from bilevel.solvers._composite import Composite
from bilevel.solvers._composite_judge import solve_composite, solve_fixed_point
from bilevel.solvers._judge import InnerOutcome
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
        What the user gave: a term, a pytree of terms, or a function that returns one.
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

    def split(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Return the leaves of a vector (n,), all in its dtype."""
        shapes = self.raveler.shapes
        if len(shapes) == 1:
            return [flat.reshape(shapes[0])]
        parts = torch.split(flat, [shape.numel() for shape in shapes])
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


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


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0].reshape(-1) if len(parts) == 1 else torch.cat([part.reshape(-1) for part in parts])


@dataclass(frozen=True, eq=False, kw_only=True)
class _Termed(StructuredSystem):
    """A system with proximal terms: what of it one problem needs, flat."""

    terms: _Terms

    def terms_of(self, tensors: Sequence[torch.Tensor]) -> list[Term | None]:
        """Return the terms, one for each leaf of x."""
        return self.terms.of(*self.arguments.rebuild(tensors))

    def prox(self, v: torch.Tensor, step: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        """Return prox_{step·g}(v) (n,)."""
        made = [
            part if term is None else term.prox(part, step)
            for term, part in zip(self.terms_of(tensors), self.terms.split(v), strict=True)
        ]
        return _joined(made)

    def of_batch(self, problem: Problem, one: Callable[..., torch.Tensor], *vectors: torch.Tensor) -> torch.Tensor:
        """Return ``one`` of each problem, of its rows of ``vectors`` (batch, k) and its tensors, without a graph."""
        sizes = [vector.shape[-1] for vector in vectors]
        packed = vectors[0] if len(vectors) == 1 else torch.cat(vectors, dim=-1)

        def single(flat: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
            return one(*torch.split(flat, sizes), *tensors)

        with torch.no_grad():
            shaped = packed.reshape(*self.batch_shape, packed.shape[-1])
            made: torch.Tensor = self.lifted(single)(shaped, *problem.tensors)
        return made.reshape(problem.batch, *made.shape[len(self.batch_shape) :])

    def composite(self, problem: Problem) -> Composite:
        """Return what solvers see."""

        def prox(v: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
            return self.of_batch(problem, lambda v, s, *t: self.prox(v, s[0], *t), v, step.unsqueeze(-1))

        return Composite(objective_of(problem), problem, prox)


@dataclass(frozen=True, eq=False, kw_only=True)
class ProximalSystem(_Termed, LocalModel):
    """∇_y Φ = 0, whose local model Φ is f + g on the manifold that y lies on."""

    def manifolds(self, y: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, Manifold | None]]:
        """Return each leaf of ``y`` (n,) with the manifold that it lies on."""
        return [
            (part, None if term is None else term.manifold(part))
            for term, part in zip(self.terms_of(tensors), self.terms.split(y), strict=True)
        ]

    def model(self, z: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        points, values = [], []
        for part, manifold in self.manifolds(z, tensors):
            point = part if manifold is None else manifold.retract(part)
            points.append(point)
            if manifold is not None:
                values.append(manifold.value(point))
        x = _joined(points)
        return self.ordinary.output(x, *tensors) + sum(values) + 0.5 * ((z - x) ** 2).sum()

    def find(self, problem: Problem, init: torch.Tensor, target: Target, solver: InnerSolver | None) -> InnerOutcome:
        return solve_composite(self.composite(problem), init, target, solver)

    def composite(self, problem: Problem) -> Composite:
        def value(x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
            parts = zip(self.terms_of(tensors), self.terms.split(x), strict=True)
            return torch.stack([part.new_zeros(()) if term is None else term.value(part) for term, part in parts]).sum()

        def margin(x: torch.Tensor, slope: torch.Tensor, step: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
            leaves = zip(self.terms_of(tensors), self.terms.split(x), self.terms.split(slope), strict=True)
            return torch.stack(
                [p.new_ones(()) if term is None else term.margin(p, s, step[0]) for term, p, s in leaves]
            ).min()

        def retract(x: torch.Tensor, y: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
            found = zip(self.manifolds(x, tensors), self.terms.split(y), strict=True)
            return _joined([part if m is None else m.retract(part) for (_, m), part in found])

        def free(x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
            flags = [
                torch.ones_like(part, dtype=torch.bool) if m is None else _free_of(m, part)
                for part, m in self.manifolds(x, tensors)
            ]
            return _joined(flags)

        n = self.raveler.size

        def entries(x: torch.Tensor, places: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
            numbers = places.long()  # whole numbers, packed as floats
            made: Any = vjp(lambda point: self.residual_and_value(point, *tensors)[0], x)
            units = (numbers.unsqueeze(-1) == torch.arange(n, device=x.device)).to(x.dtype)
            (rows,) = vmap(made[1])(units)
            return rows.gather(-1, numbers.expand(len(numbers), -1))

        of = self.of_batch
        return replace(
            super().composite(problem),
            value=lambda x: of(problem, value, x),
            margin=lambda x, slope, step: of(problem, margin, x, slope, step.unsqueeze(-1)),
            retract=lambda x, y: of(problem, retract, x, y),
            free=lambda x: of(problem, free, x),
            entries=lambda x, places: of(problem, entries, x, places.to(x.dtype)),
        )


def _free_of(manifold: Manifold, part: torch.Tensor) -> torch.Tensor:
    # All entries of a manifold that is not made of single entries move together.
    return torch.ones_like(part, dtype=torch.bool) if manifold.free is None else manifold.free


@dataclass(frozen=True, eq=False, kw_only=True)
class ProximalRoot(_Termed, RootSystem):
    """x − prox_{sg}(x − s ∇f(x)) = 0, for terms that name no manifold; z = (x, s), as any step s > 0 has the same root."""

    def output(self, flat: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        size = self.ordinary.raveler.size
        x, step = flat[:size], without_gradient(flat[-1]) if len(flat) > size else flat.new_ones(())
        slope = self.ordinary.at_levels(()).residual(x, *tensors)
        if len(flat) == size:
            return x - self.prox(x - slope, step, *tensors)
        return torch.cat([x - self.prox(x - step * slope, step, *tensors), (flat[-1] - step)[None]])

    def in_x(self) -> System:
        return replace(self, raveler=flat_raveler(self.ordinary.raveler.size, self.raveler))

    def find(self, problem: Problem, init: torch.Tensor, target: Target, solver: InnerSolver | None) -> InnerOutcome:
        return solve_fixed_point(self.composite(problem), init, target, solver)


@dataclass(frozen=True, eq=False, kw_only=True)
class Proximal(Structure):
    """The structure of a layer with ``prox=``.

    Parameters
    ----------
    given
        A term, a pytree of terms, or a function of the layer's arguments that returns one.
    written
        Returns what the user wrote, where that is not what is given.
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
        smooth = all(term is None or term.has_manifold for term in terms.of(*ordinary.arguments.rebuild(tensors)))
        size = raveler.size if smooth else raveler.size + 1
        kind: Any = ProximalSystem if smooth else ProximalRoot
        system = kind(
            ordinary.where, ordinary.function, flat_raveler(size, raveler), ordinary.arguments, ordinary.levels,
            ordinary.autocast, ordinary.mode, ordinary=ordinary, terms=terms,
        )  # fmt: skip
        return system, init if smooth else torch.cat([init, init.new_ones(1)])
