"""A batch of flat problems R(x, θ) = 0, made from one user's function and lifted a level by each ``vmap``.

An argmin, a root and a fixed point differ only here: in what R is, and in whether its Jacobian is symmetric.

:class:`System` is the description, without tensors. Its methods are differentiable under every transform.
:class:`Problem` is a system with its tensors bound and cut from any graph: what solvers see, in shapes (batch, n).
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import CellType
from typing import Any, ClassVar

import torch
from torch.func import grad, grad_and_value, vjp, vmap
from torch.utils import _pytree as pytree

from bilevel._norms import WrittenNorms
from bilevel._products import QuickProducts
from bilevel._transforms import autocasting
from bilevel._tree import Arguments, Raveler, ravel_like, unravelled
from bilevel.errors import (
    ArgumentError,
    BilevelError,
    CapturedTensorError,
    DtypeError,
    ShapeError,
    StochasticObjectiveError,
)
from bilevel.operators import DenseOperator, HessianOperator, JacobianOperator, LinearOperator

__all__ = [
    "ArgminSystem",
    "Case",
    "Dice",
    "FixedPointSystem",
    "LastLook",
    "Level",
    "LinearSystem",
    "Linearization",
    "Problem",
    "RootSystem",
    "SymmetricLinearSystem",
    "System",
    "buffers_of",
    "captured_error",
    "reaches_another_leaf",
]

# How torch speaks of operands that do not fit.
_DTYPES = re.compile(r"dtype|scalar type", re.IGNORECASE)
_MISFIT = re.compile(rf"\b(sizes?|shapes?|dimensions?|batch_size)\b|{_DTYPES.pattern}", re.IGNORECASE)
_MOST_LISTED = 8
# The most rows of a Jacobian made by one vmapped pass: bounds the memory of its intermediates.
_MOST_ROWS = 64
# How many more pairs of evaluations have to agree where random numbers were drawn.
_MORE_THROWS = 12


@dataclass(frozen=True)
class Level:
    """One ``vmap``: how many problems, and which of the call's tensors carry the axis (always axis 0)."""

    size: int
    batched: tuple[bool, ...]


@dataclass(frozen=True, eq=False)
class System(ABC):
    """R(x, θ) = 0, described by the user's function of (x, *args, **kwargs).

    Parameters
    ----------
    where
        The layer's name, for messages.
    function
        The objective, residual or mapping.
    raveler, arguments
        How to make the user's pytrees from a flat unknown and a list of tensors.
    levels
        The ``vmap`` levels, innermost first; a tensor batched in several has the outermost axis first.
    autocast
        The dtype that autocast casted to around the call, for the function to run under, in every derivative too; or None.
    """

    where: str
    function: Callable[..., Any]
    raveler: Raveler
    arguments: Arguments
    levels: tuple[Level, ...] = ()
    autocast: torch.dtype | None = None

    symmetric: ClassVar[bool] = False
    minimizes: ClassVar[bool] = False
    noun: ClassVar[str] = "residual"
    label: ClassVar[str] = "root"

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The batch's axes, outermost first; () for a single problem."""
        return tuple(level.size for level in reversed(self.levels))

    def lift(self, size: int, batched: tuple[bool, ...]) -> System:
        """Return the system of ``size`` such problems, whose tensors carry a new axis 0 where ``batched``."""
        return replace(self, levels=(*self.levels, Level(size, batched)))

    def call(self, flat: torch.Tensor, *tensors: torch.Tensor) -> Any:
        """Call the user's function for one problem, ``flat`` being (n,)."""
        args, kwargs = self.arguments.rebuild(tensors)
        with autocasting(self.raveler.device, self.autocast), unravelled(self.raveler, flat) as unknown:
            return self.function(unknown, *args, **kwargs)

    @abstractmethod
    def output(self, flat: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        """Return one problem's value () or residual (n,)."""

    @abstractmethod
    def residual(self, x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        """Return R (*batch, n), differentiable by any transform with respect to ``x`` and ``tensors``."""

    @abstractmethod
    def plain_residual(self, x: torch.Tensor, tensors: Sequence[torch.Tensor], *, graph: bool) -> torch.Tensor:
        """Return R (*batch, n) at a leaf ``x`` by ordinary autograd, with its own graph kept if ``graph``."""

    def outputs(self, x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        """Return the whole batch's :meth:`output`: (*batch,) or (*batch, n)."""
        result: torch.Tensor = self.lifted(self.output)(x, *tensors)
        return result

    def rows(self, flat: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return one problem's R (n,), the rows of ∂_x R (n, n), and its value (), or R again where there is none."""
        made: Any = vjp(lambda point: self.residual_and_value(point, *tensors), flat, has_aux=True)
        residual, pull, value = made
        n = flat.shape[0]
        units = torch.eye(n, dtype=residual.dtype, device=residual.device)
        (matrix,) = vmap(pull, in_dims=1, chunk_size=None if n <= _MOST_ROWS else _MOST_ROWS)(units)
        return residual, matrix, value

    def residual_and_value(self, flat: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one problem's R (n,) and its value (), or R again where there is none."""
        residual = self.output(flat, *tensors)
        return residual, residual

    def first_output(self, flat: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        """Return :meth:`output`, or say which shapes or dtypes the user's function could not put together.

        Raises
        ------
        ShapeError, DtypeError
            Where torch refused an operation for a shape or a dtype.
        """
        try:
            return self.output(flat, *tensors)
        except (RuntimeError, ValueError, IndexError) as error:
            if isinstance(error, BilevelError) or not _MISFIT.search(str(error)):
                raise
            raise self._misfit(flat, tensors, str(error)) from error

    def _misfit(self, flat: torch.Tensor, tensors: Sequence[torch.Tensor], said: str) -> BilevelError:
        paths, _ = pytree.tree_flatten_with_path(self.raveler.unravel(flat.detach()))
        given = [("init" + pytree.keystr(path), leaf) for path, leaf in paths]
        given += zip(self.arguments.names, tensors, strict=True)
        listed = [f"{name} {tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for name, t in given]
        more = f" and {len(listed) - _MOST_LISTED} more" if len(listed) > _MOST_LISTED else ""
        kind, what = (DtypeError, "dtypes") if _DTYPES.search(said) else (ShapeError, "shapes")
        return kind(
            f"{self.where}: expected init and the arguments to have {what} that fit together in {self.noun}, got "
            f"{', '.join(listed[:_MOST_LISTED])}{more}, and torch says: {' '.join(said.split())}; give them {what} that fit"
        )

    def lifted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function`` of one problem's (x, *tensors) as one of the whole batch's."""
        for level in self.levels:
            if level.size == 1:
                function = _alone(function, level.batched)
                continue
            in_dims = (0, *(0 if flag else None for flag in level.batched))
            # Randomness would be refused by vmap in words about vmap; let it through to our own check.
            function = vmap(function, in_dims=in_dims, randomness="different")
        return function

    def inspect(self, problem: Problem, x: torch.Tensor) -> None:  # noqa: B027  # most kinds promise nothing more
        """Raise where one problem's function is not of this kind; ``x`` (1, n) is a point of its domain."""

    def bind(self, tensors: Sequence[torch.Tensor]) -> Problem:
        """Return the problem that solvers see, with ``tensors`` cut from any graph."""
        return Problem(self, [_plain(tensor) for tensor in tensors])


class ArgminSystem(System):
    """R = ∇_x G, symmetric Jacobian."""

    symmetric = True
    minimizes = True
    noun = "objective"
    label = "argmin"

    def output(self, flat: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        value = self.call(flat, *tensors)
        if not isinstance(value, torch.Tensor) or value.ndim != 0 or not value.dtype.is_floating_point:
            got = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise ShapeError(
                f"{self.where}: expected objective to return a floating-point scalar tensor of shape (), got {got}; "
                "reduce it, for example with .sum() or .mean()"
            )
        return value

    def residual(self, x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        # The gradient of the batch's sum, with vmap inside: torch 2.13 differentiates vmap(grad(f)) wrongly
        # from outside when f holds a batch norm.
        with WrittenNorms():
            return grad(lambda point: self.outputs(point, *tensors).sum())(x)

    def residual_and_value(self, flat: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gradient, value = grad_and_value(lambda point: self.output(point, *tensors))(flat)
        return gradient, value

    def plain_residual(self, x: torch.Tensor, tensors: Sequence[torch.Tensor], *, graph: bool) -> torch.Tensor:
        return self.plain_values(x, tensors, graph=graph)[1]

    def plain_values(
        self, x: torch.Tensor, tensors: Sequence[torch.Tensor], *, graph: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (values, R) at a leaf ``x`` by ordinary autograd."""
        mode = QuickProducts.around(self.function) if graph and self.autocast is None else nullcontext()
        with mode:
            values = self.outputs(x, *tensors)
            if not values.requires_grad:
                raise _unconnected(self)
            if graph and not isinstance(mode, QuickProducts):
                QuickProducts.learn(self.function, values)
            (gradient,) = torch.autograd.grad(
                values.sum(), x, create_graph=graph, allow_unused=True, materialize_grads=True
            )
        return values, gradient


class RootSystem(System):
    """R as the user wrote it."""

    def output(self, flat: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        return ravel_like(self.call(flat, *tensors), self.raveler, self.where, self.noun)

    def residual(self, x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        with WrittenNorms():
            return self.outputs(x, *tensors)

    def plain_residual(self, x: torch.Tensor, tensors: Sequence[torch.Tensor], *, graph: bool) -> torch.Tensor:
        residual = self.outputs(x, *tensors)
        if not residual.requires_grad and x.requires_grad:
            raise _unconnected(self)
        return residual


class FixedPointSystem(RootSystem):
    """R = x − T(x)."""

    noun = "mapping"
    label = "fixed_point"

    def output(self, flat: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        return flat - super().output(flat, *tensors)


class LinearSystem(RootSystem):
    """R = A x, for A x = b: the right-hand side is not in it, as the linear primitive takes that apart."""

    noun = "matvec"
    label = "linear_solve"

    def inspect(self, problem: Problem, x: torch.Tensor) -> None:
        # Irregular, but drawn by no generator: torch's older vmap, which may surround this, knows none.
        places = torch.arange(1, self.raveler.size + 1, dtype=torch.float64, device=x.device)
        u, v = (
            torch.frac(places * irrational).sub(0.5).to(x).reshape(x.shape)
            for irrational in (0.7548776662, 0.5698402910)
        )
        nothing, Au, Av, both = (problem.residual(point) for point in (torch.zeros_like(x), u, v, 3 * u + v))
        size = torch.maximum(Au.norm(), Av.norm())
        # Half the digits of what the function computes in: rounding is far below, and what is not linear far above.
        doubt = torch.finfo(self.autocast or x.dtype).eps ** 0.5
        wrong = torch.maximum((both - 3 * Au - Av).norm(), nothing.norm())
        if bool(wrong > doubt * size):
            raise ArgumentError(
                f"{self.where}: expected matvec to be linear in its first argument, and A(3u + v) − 3 A u − A v is "
                f"{float(wrong / size):.1e} of A u in size; leave constant terms to the right-hand side, or state the equations "
                "as bilevel.root"
            )
        if self.symmetric and bool(((u * Av).sum() - (v * Au).sum()).abs() > doubt * size * u.norm()):
            raise ArgumentError(
                f"{self.where}: expected a symmetric matrix, as symmetric=True says, and ⟨u, A v⟩ differs from ⟨v, A u⟩; leave "
                "symmetric=True out"
            )


class SymmetricLinearSystem(LinearSystem):
    """The same with A = Aᵀ."""

    symmetric = True


@dataclass(frozen=True, eq=False)
class Linearization:
    """R at one point with its graph: the operator ∂_x R, and the pullback through ∂_θ R.

    Parameters
    ----------
    residual
        R (batch, n), with its graph.
    operator
        ∂_x R.
    leaves
        The tensors θ that R was computed from; those that require grad can be pulled back to.
    value
        The objectives (batch,) of an argmin, without a graph; None for equations.
    point
        x (batch, n).
    """

    residual: torch.Tensor
    operator: LinearOperator
    leaves: tuple[torch.Tensor, ...]
    value: torch.Tensor | None = None
    point: torch.Tensor | None = None

    def pullback(self, q: torch.Tensor) -> list[torch.Tensor | None]:
        """Return (∂_θ R)ᵀ q for ``q`` (batch, n), summed over the problems that share a tensor: one reverse pass."""
        wanted = [leaf for leaf in self.leaves if leaf.requires_grad]
        if not wanted or not self.residual.requires_grad:
            return [torch.zeros_like(leaf) if leaf.requires_grad else None for leaf in self.leaves]
        gradients = iter(
            torch.autograd.grad(self.residual, wanted, q, retain_graph=True, allow_unused=True, materialize_grads=True)
        )
        return [next(gradients) if leaf.requires_grad else None for leaf in self.leaves]


@dataclass(eq=False)
class LastLook:
    """Where a solver leaves the linearisation at its answer, which a derivative would otherwise begin with.

    Parameters
    ----------
    wanted
        Which of the problem's tensors derivatives will be asked for.
    linearization
        The latest that a solver took for the last, or None.
    """

    wanted: tuple[bool, ...]
    linearization: Linearization | None = None


@dataclass(frozen=True)
class Case:
    """One problem in the user's own terms, for solvers that are not batched: ``function(init, *args, **kwargs)``."""

    function: Callable[..., Any]
    init: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Problem:
    """A batch of flat problems, as solvers see it: every tensor is (batch, n) or (batch,), and no graph is kept.

    Parameters
    ----------
    system
        The description.
    tensors
        θ, cut from any graph.
    last_look
        Where derivatives will follow: takes the linearisation at the answer.
    """

    system: System
    tensors: list[torch.Tensor] = field(repr=False)
    last_look: LastLook | None = field(default=None, repr=False)

    @property
    def where(self) -> str:
        """The layer's name, for messages."""
        return self.system.where

    @property
    def minimizes(self) -> bool:
        """Whether there is an objective, so that :meth:`value` can be called."""
        return self.system.minimizes

    @property
    def is_fixed_point(self) -> bool:
        """Whether R = x − T(x), so that T(x) = x − R."""
        return isinstance(self.system, FixedPointSystem)

    @cached_property
    def batch(self) -> int:
        """How many problems."""
        return math.prod(self.system.batch_shape)

    @property
    def size(self) -> int:
        """n, the number of unknowns of each."""
        return self.system.raveler.size

    def value(self, x: torch.Tensor) -> torch.Tensor:
        """Return the objectives (batch,) at ``x`` (batch, n)."""
        with torch.no_grad():
            return self.system.outputs(self._shaped(x), *self.tensors).reshape(self.batch)

    def value_and_residual(self, x: torch.Tensor, *, last: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the objectives (batch,) and their gradients (batch, n).

        ``last`` says that ``x`` is probably the answer: where a derivative follows, the graph is kept for it.
        """
        system = self.system
        if not isinstance(system, ArgminSystem):
            raise ArgumentError(
                f"{self.where}: expected an argmin for a solver that minimises, got a {system.noun} equation; take "
                "Newton(), Anderson(), FixedPointIteration() or ScipyRoot()"
            )
        if last and self.last_look is not None:
            self.last_look.linearization = linear = self.linearize(x, self.last_look.wanted)
            assert linear.value is not None
            return linear.value, linear.residual.detach()
        with torch.enable_grad():
            point = self._shaped(x).detach().requires_grad_(True)
            values, gradient = system.plain_values(point, self.tensors, graph=False)
        return values.detach().reshape(self.batch), gradient.detach().reshape(x.shape)

    def residual(self, x: torch.Tensor) -> torch.Tensor:
        """Return R (batch, n): ∇G, the residual, or x − T(x)."""
        if not self.minimizes:
            with torch.no_grad():
                return self.system.outputs(self._shaped(x), *self.tensors).reshape(x.shape)
        return self.value_and_residual(x)[1]

    def mapping(self, x: torch.Tensor) -> torch.Tensor:
        """Return T(x) (batch, n) of a fixed point."""
        return x - self.residual(x)

    def linearize(self, x: torch.Tensor, wanted: Sequence[bool] | None = None) -> Linearization:
        """Return R at ``x`` (batch, n) with its graph, the operator ∂_x R and the pullback to ``wanted`` tensors."""
        system = self.system
        with torch.enable_grad():
            point = x.detach().requires_grad_(True)
            leaves = tuple(
                tensor.detach().requires_grad_(True) if want else tensor
                for tensor, want in zip(self.tensors, wanted or [False] * len(self.tensors), strict=True)
            )
            value: torch.Tensor | None = None
            if isinstance(system, ArgminSystem):
                values, residual = system.plain_values(self._shaped(point), leaves, graph=True)
                value = values.detach().reshape(self.batch)
            else:
                residual = system.plain_residual(self._shaped(point), leaves, graph=True)
            residual = residual.reshape(x.shape)
        operator: LinearOperator
        if system.symmetric:
            operator = HessianOperator(residual, point)
            operator.expect_definite = system.minimizes
        else:
            operator = JacobianOperator(residual, point)
        # Cut x off first: a saved output would close a circle through its own node that no collector can see.
        at = x.detach()
        operator.materialize = lambda: self._dense(at)[1]
        return Linearization(residual, operator, leaves, value, at)

    def linearize_dense(self, x: torch.Tensor) -> Linearization:
        """Return R and the objectives at ``x`` (batch, n) without a graph, and ∂_x R as matrices, all from one pass.

        The directions are vmapped inside and the problems outside: the other way round, which a graph of the whole batch
        imposes, every matrix in the objective is copied n times.
        """
        try:
            residual, matrix, value = self._dense(x.detach())
        except RuntimeError:
            # Something in the function cannot be transformed, such as an operation without a batching rule.
            plain = self.linearize(x)
            plain.operator.materialize = None
            residual, matrix, value = plain.residual.detach(), plain.operator.dense(), plain.value
        operator = DenseOperator(matrix, symmetric=self.system.symmetric)
        operator.expect_definite = self.minimizes
        return Linearization(residual, operator, (), value)

    def _dense(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        with torch.no_grad():
            residual, matrix, values = self.system.lifted(self.system.rows)(self._shaped(x), *self.tensors)
        n = self.size
        matrix = matrix.detach().reshape(self.batch, n, n)
        if self.system.symmetric:
            matrix = 0.5 * (matrix + matrix.mT)
        value = values.detach().reshape(self.batch) if self.minimizes else None
        return residual.detach().reshape(x.shape), matrix, value

    def nudged(self, seed: int, *more: torch.Tensor) -> tuple[Problem, list[torch.Tensor]]:
        """Return the problem with every number moved by a unit in its last place, by random signs, and ``more`` tensors likewise.

        What that changes in a result tells what rounding inside can change. Tensors of whole numbers stay: they are labels, counts and
        masks, which are exact, and which a function may compare or convert.
        """
        generator = torch.Generator().manual_seed(seed)

        def nudge(t: torch.Tensor) -> torch.Tensor:
            up = torch.empty(t.shape, dtype=torch.bool).bernoulli_(0.5, generator=generator).to(t.device)
            eps = torch.finfo(t.dtype).eps
            return torch.where(up, t * (1 + eps), t * (1 - eps))

        tensors = [
            t if not t.dtype.is_floating_point or bool((t == t.round()).all()) else nudge(t) for t in self.tensors
        ]
        return Problem(self.system, tensors), [nudge(t) for t in more]

    def to(self, dtype: torch.dtype) -> Problem:
        """Return the problem with its floating-point tensors in ``dtype``."""
        raveler = self.system.raveler
        other = replace(raveler, dtype=dtype, dtypes=(dtype,) * len(raveler.dtypes))
        tensors = [t.to(dtype) if t.dtype.is_floating_point else t for t in self.tensors]
        return Problem(replace(self.system, raveler=other), tensors)

    def scattered(self, seed: int, draws: int, *more: torch.Tensor) -> tuple[Problem, list[torch.Tensor]]:
        """Return ``draws`` copies beside this float64 problem as one batch, of numbers that float32 holds, and ``more`` (K, n) likewise.

        Evaluated in float32 and in float64, they differ by float32's rounding alone, intermediate results included, and that tells
        float64's: it is smaller by the ratio of the two units.
        """
        generator = torch.Generator().manual_seed(seed)
        unit = torch.finfo(torch.float32).eps

        def scatter(t: torch.Tensor) -> torch.Tensor:
            shift = torch.rand((draws, *t.shape), generator=generator, dtype=torch.float64).to(t)
            return (t * (1 + unit * (2 * shift - 1))).float().double()

        moves = [t.dtype.is_floating_point and not bool((t == t.round()).all()) for t in self.tensors]
        tensors = [scatter(t) if move else t for t, move in zip(self.tensors, moves, strict=True)]
        copies = [scatter(t).reshape(-1, t.shape[-1]) for t in more]
        return Problem(self.system.lift(draws, tuple(moves)), tensors), copies

    def cases(self, x: torch.Tensor) -> Iterator[Case]:
        """Yield each problem in the user's terms, with its own slice of every tensor and of ``x`` (batch, n)."""
        for number, row in enumerate(x.reshape(-1, self.size)):
            args, kwargs = self.system.arguments.rebuild(self._slices(number))
            yield Case(self.system.function, self.system.raveler.unravel(row), args, kwargs)

    def single(self, number: int) -> Problem:
        """Return the problem at ``number`` of the batch as a batch of one, with its own slice of every tensor."""
        return Problem(replace(self.system, levels=()), self._slices(number))

    def _slices(self, number: int) -> list[torch.Tensor]:
        position = []  # innermost level first, as in system.levels
        for level in self.system.levels:
            number, at = divmod(number, level.size)
            position.append(at)
        tensors = list(self.tensors)
        # Outermost axes come first in a tensor, so they are taken off first.
        for level, at in zip(reversed(self.system.levels), reversed(position), strict=True):
            tensors = [t[at] if flag else t for t, flag in zip(tensors, level.batched, strict=True)]
        return tensors

    def inspect(self, x: torch.Tensor, *, captures: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Evaluate twice at ``x``, with derivatives, and raise on what would make gradients wrong; return what was found there.

        Raises
        ------
        CapturedTensorError
            If a tensor reached through the closure requires grad (looked for if ``captures``), or belongs to
            a ``vmap`` outside.
        StochasticObjectiveError
            If two evaluations differ, or an argument is changed in place.
        ShapeError, ArgumentError
            If the function returns the wrong shapes, or what it returns does not depend on its first argument.
        """
        noun = self.system.noun
        watched = [t for t in (*self.tensors, *buffers_of(self.system.function)) if not t.is_inference()]
        versions, dice = [t._version for t in watched], Dice(x.device)
        try:
            first = self._probe(x, captures=captures)
        except RuntimeError as error:
            if "escaped from inside a function being vmapped" in str(error):
                raise captured_error(self.where, noun, "belongs to a vmap outside") from error
            raise
        # Dropout leaves a zero input zero: the slopes tell where the values do not.
        agreed = _agree(first, self._probe(x, captures=False), 1e3) or self._agrees_beside(x)
        if agreed and dice.thrown():
            # Two throws of few dice may agree by chance; many do not.
            agreed = all(self._agrees_beside(x) for _ in range(_MORE_THROWS))
        if not agreed:
            raise StochasticObjectiveError(
                f"{self.where}: expected {noun} to be deterministic, and two evaluations at one point differ; switch "
                "dropout off with .eval(), or draw the noise outside and pass it as an argument"
            )
        if versions != [t._version for t in watched]:
            raise StochasticObjectiveError(
                f"{self.where}: expected {noun} to leave its arguments and buffers as they are, and one was changed in "
                "place; for batch norm use batch statistics (track_running_stats=False) or .eval()"
            )
        if x.numel():
            self.system.inspect(self, x)
        return first

    def _agrees_beside(self, x: torch.Tensor) -> bool:
        """Return whether two evaluations a little beside ``x`` agree to half the digits.

        At a solution the slope is rounding, and sums of threads or of a GPU's atomics round as they come: such an
        objective is not a random one.
        """
        generator = torch.Generator().manual_seed(0)
        signs = (torch.randint(0, 2, (self.size,), generator=generator) * 2 - 1).to(x)
        beside = x + 1e-2 * (1 + x.abs()) * signs
        pair = self._probe(beside, captures=False), self._probe(beside, captures=False)
        return _agree(*pair, torch.finfo(x.dtype).eps ** -0.5)

    def _probe(self, x: torch.Tensor, *, captures: bool) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.enable_grad():
            point = x.detach().requires_grad_(True)
            output = self.system.lifted(self.system.first_output)(self._shaped(point), *self.tensors)
            if not output.requires_grad and point.numel():
                raise _unconnected(self.system)
            if not point.numel():
                return output.detach(), point.detach()
            if captures and reaches_another_leaf(output, (point,)):
                raise captured_error(self.where, self.system.noun, "requires grad")
            (slope,) = torch.autograd.grad(output.sum(), point, allow_unused=True, materialize_grads=True)
        return output.detach(), slope

    def _shaped(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(*self.system.batch_shape, self.size)


def _alone(function: Callable[..., Any], batched: tuple[bool, ...]) -> Callable[..., Any]:
    """Return ``function`` as one of a batch of one: an axis taken off and put back costs less than ``vmap``."""

    def alone(x: torch.Tensor, *tensors: torch.Tensor) -> Any:
        made = function(x[0], *(t[0] if flag else t for t, flag in zip(tensors, batched, strict=True)))
        return pytree.tree_map(lambda t: t.unsqueeze(0), made)

    return alone


class Dice:
    """Tells whether random numbers have been drawn from a device's own generator, or the CPU's, since it was made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = self._states()

    def thrown(self) -> bool:
        """Return whether any have been drawn."""
        return any(not torch.equal(a, b) for a, b in zip(self._before, self._states(), strict=True))

    def _states(self) -> list[torch.Tensor]:
        states = [torch.get_rng_state()]
        if self._device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self._device))
        return states


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    # Tensors born under inference_mode cannot take part in autograd; a copy can.
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def buffers_of(function: Callable[..., Any]) -> list[torch.Tensor]:
    """Return the buffers of modules that ``function`` is, is bound to, closes over or names as globals.

    Looks into the functions that it closes over, or that the module it is bound to keeps, too.
    """
    found: dict[int, torch.Tensor] = {}
    pending: list[tuple[Any, int]] = [(function, 0)]
    seen: set[int] = set()
    while pending:
        item, depth = pending.pop()
        if id(item) in seen or depth > 3:
            continue
        seen.add(id(item))
        if isinstance(item, torch.nn.Module):
            found.update((id(buffer), buffer) for buffer in item.buffers())
            pending += [(value, depth + 1) for value in vars(item).values() if inspect.isroutine(value)]
        elif isinstance(item, functools.partial):
            pending += [(value, depth + 1) for value in (item.func, *item.args, *item.keywords.values())]
        elif inspect.isroutine(item) or item is function:
            pending.append((getattr(item, "__self__", None), depth))
            plain = inspect.unwrap(getattr(item, "__func__", item))
            cells = getattr(plain, "__closure__", None) or ()
            reached = [cell.cell_contents for cell in cells if _filled(cell)]
            code = getattr(plain, "__code__", None)
            if code is not None:
                reached += [plain.__globals__.get(name) for name in code.co_names]
            pending += [(value, depth + 1) for value in reached]
    return list(found.values())


def _filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  # an empty cell raises
    except ValueError:
        return False
    return True


def reaches_another_leaf(output: torch.Tensor, known: Sequence[torch.Tensor]) -> bool:
    """Return whether the graph of ``output`` ends in a tensor that requires grad other than through one of ``known``."""
    pending = [output.grad_fn]
    seen = {tensor.grad_fn for tensor in known if tensor.grad_fn is not None}
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and not any(variable is tensor for tensor in known):
            return True
        pending.extend(following for following, _ in node.next_functions)
    return False


def _agree(first: tuple[torch.Tensor, ...], second: tuple[torch.Tensor, ...], units: float) -> bool:
    """Return whether two evaluations agree to ``units`` of the last place of their largest entry."""
    for a, b in zip(first, second, strict=True):
        if a.numel() and not torch.equal(a, b):
            scale = torch.maximum(a.abs(), b.abs()).nan_to_num().max()
            if not bool(((a - b).abs().nan_to_num() <= units * torch.finfo(a.dtype).eps * scale).all()):
                return False
    return True


def captured_error(where: str, noun: str, how: str) -> CapturedTensorError:
    """Return the error for a tensor that ``noun`` reaches through its closure."""
    return CapturedTensorError(
        f"{where}: expected every tensor to differentiate to be an argument, and {noun} reaches one through its "
        f"closure that {how} and would silently receive no gradient; pass it as an argument (a module's "
        "parameters as dict(module.named_parameters()) with torch.func.functional_call), or detach it"
    )


def _unconnected(system: System) -> ArgumentError:
    return ArgumentError(
        f"{system.where}: expected what {system.noun} returns to depend on its first argument, and no graph leads "
        "there; look for .detach(), .item(), numpy or torch.no_grad inside it"
    )
