"""A batch of flat problems R(x, θ) = 0, made from one user's function and lifted a level by each ``vmap``.

An argmin, a root and a fixed point differ only here: in R, and in whether its Jacobian is symmetric.

A :class:`System` is the description, without tensors. Its methods are differentiable under every transform. Solvers see it with its
tensors, as a :class:`bilevel.equations.problem.Problem`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch.func import vmap
from torch.utils import _pytree as pytree

from bilevel._torch.convolution import FastHVP
from bilevel._torch.double_backward import Repeatable
from bilevel._torch.norms import OneImageNorms, WrittenNorms
from bilevel._torch.reverse import grad, grad_and_value, vjp
from bilevel._torch.transforms import autocasting, hooks_refused
from bilevel.equations.domain import leaves_domain
from bilevel.equations.function_errors import explain, unconnected
from bilevel.errors import (
    ArgumentError,
    BilevelError,
    DtypeError,
    ShapeError,
    TransformError,
)
from bilevel.pytree import Arguments, Raveler, ravel_like, unravelled

__all__ = [
    "ArgminSystem",
    "FixedPointSystem",
    "Level",
    "LinearSystem",
    "RootSystem",
    "SymmetricLinearSystem",
    "System",
]

# The largest number of rows of a Jacobian in one vmapped pass, which limits the memory of its intermediate results.
_MOST_ROWS = 64


@dataclass(frozen=True)
class Level:
    """One ``vmap``: the number of problems, and which of the call's tensors carry the axis (always axis 0)."""

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
        Rebuild the user's pytrees from a flat unknown and a list of tensors.
    levels
        The ``vmap`` levels, innermost first; a tensor batched in several has the outermost axis first.
    autocast
        The dtype of autocast around the call, or None. The function runs under it in every derivative too.
    mode
        The context in which the function runs.
    """

    where: str
    function: Callable[..., Any]
    raveler: Raveler
    arguments: Arguments
    levels: tuple[Level, ...] = ()
    autocast: torch.dtype | None = None
    mode: Callable[[], AbstractContextManager[Any]] = nullcontext

    symmetric: ClassVar[bool] = False
    minimizes: ClassVar[bool] = False
    has_value: ClassVar[bool] = False
    is_fixed_point: ClassVar[bool] = False
    noun: ClassVar[str] = "residual"
    label: ClassVar[str] = "root"

    @cached_property
    def batch_shape(self) -> tuple[int, ...]:
        """The batch's axes, outermost first; () for a single problem."""
        return tuple(level.size for level in reversed(self.levels))

    def lift(self, size: int, batched: tuple[bool, ...]) -> System:
        """Return the system of ``size`` such problems. Tensors with ``batched`` carry a new axis 0."""
        return replace(self, levels=(*self.levels, Level(size, batched)))

    def at_levels(self, levels: tuple[Level, ...]) -> System:
        """Return the system with other ``vmap`` levels."""
        return replace(self, levels=levels)

    def in_dtype(self, dtype: torch.dtype) -> System:
        """Return the system with the unknown in the real ``dtype``, or in the complex dtype of the same precision."""
        return replace(self, raveler=self.raveler.in_dtype(dtype))

    def sparse(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Return the sparse tensors among ``tensors``, or those that they are the entries of."""
        return [tensor for tensor in tensors if tensor.layout is not torch.strided]

    def call(self, flat: torch.Tensor, *tensors: torch.Tensor) -> Any:
        """Call the user's function for one problem with the unknown ``flat`` (n,)."""
        args, kwargs = self.arguments.rebuild(tensors)
        cast, rewritten = autocasting(self.raveler.device, self.autocast), Repeatable.around(self.function)
        with cast, rewritten, self.mode(), unravelled(self.raveler, flat) as unknown:
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
        """Return :meth:`output` of the whole batch: (*batch,) or (*batch, n)."""
        try:
            result: torch.Tensor = self.lifted(self.output)(x, *tensors)
        except RuntimeError as error:
            if isinstance(error, BilevelError) or "Batching rule not implemented" not in str(error):
                raise
            raise TransformError(
                f"{self.where}: expected {self.noun} of operations that torch can batch, as several problems are solved as one, and it "
                f"says: {' '.join(str(error).split())}; write that of others (such as torch.nn.LSTMCell in a loop for torch.nn.LSTM), or "
                "solve the problems one by one"
            ) from error
        return result

    def for_gradients(self) -> System:
        """Return the same with norms of one image written out, if there may be any: torch's own first derivatives are wrong in one layout."""
        norms = self.autocast is None and FastHVP.normalises(self.function)
        return replace(self, mode=OneImageNorms) if norms else self

    def for_second_derivatives(self) -> System:
        """Return the system with norms written out, if it has any: torch's own are wrong in rare layouts."""
        return replace(self, mode=WrittenNorms) if FastHVP.normalises(self.function) else self

    def rows(self, flat: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return one problem's R (n,), the rows of ∂_x R (n, n), and its value (), or R again if it has no value."""
        made: Any = vjp(lambda point: self.residual_and_value(point, *tensors), flat, has_aux=True)
        residual, pull, value = made
        n = flat.shape[0]
        if not n:  # vmap takes no empty batch
            return residual, residual.new_zeros(0, 0), value
        units = torch.eye(n, dtype=residual.dtype, device=residual.device)
        (matrix,) = vmap(pull, chunk_size=None if n <= _MOST_ROWS else _MOST_ROWS)(units)
        return residual, matrix, value

    def residual_and_value(self, flat: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one problem's R (n,) and its value (), or R again if it has no value."""
        residual = self.output(flat, *tensors)
        return residual, residual

    def first_output(self, flat: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        """Return :meth:`output`; name the shapes or dtypes of the user's tensors if they do not fit together.

        Raises
        ------
        ArgumentError
            If the user's function takes another number of arguments.
        ShapeError, DtypeError
            Where torch refused an operation for a shape or a dtype.
        """
        try:
            return self.output(flat, *tensors)
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
            if isinstance(error, BilevelError) or leaves_domain(error):
                raise
            explanation = explain(
                error, self.where, self.noun, self.function, self.raveler, flat, self.arguments, tensors
            )
            if explanation is None:
                raise
            raise explanation from error

    def lifted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function`` of one problem's (x, *tensors) as a function of the whole batch."""
        for level in self.levels:
            if level.size == 1:
                function = _alone(function, level.batched)
                continue
            in_dims = (0, *(0 if flag else None for flag in level.batched))
            # vmap would refuse random numbers with a message about vmap. Our own check has a better message.
            function = _without_hooks(vmap(function, in_dims=in_dims, randomness="different"))
        return function

    @property
    def has_kinks(self) -> bool:
        """Whether terms, bounds or constraints make kinks, at which steps of a solver have no derivative."""
        return False

    @property
    def examined(self) -> str:
        """How messages name what an examination of this system finds at fault."""
        return self.noun

    def inspect(  # noqa: B027  # most kinds promise nothing more
        self, residual: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
    ) -> None:
        """Raise if ``residual`` at points like ``x`` (1, n) does not fit an equation of this kind."""


class ArgminSystem(System):
    """R = ∇_x G, symmetric Jacobian."""

    symmetric = True
    minimizes = True
    has_value = True
    noun = "objective"
    label = "argmin"

    def output(self, flat: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        value = self.call(flat, *tensors)
        if not isinstance(value, torch.Tensor) or value.ndim != 0 or not value.dtype.is_floating_point:
            got = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__
            expected = (
                f"{self.where}: expected objective to return a floating-point scalar tensor of shape (), got {got}"
            )
            if isinstance(value, torch.Tensor) and value.is_complex():
                raise DtypeError(
                    f"{expected}; a minimum is one of real numbers: return .real of it, or (torch.view_as_real(z) ** 2).sum() of a complex z"
                )
            raise ShapeError(f"{expected}; reduce it, for example with .sum() or .mean()")
        return value

    def residual(self, x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        # The gradient of the batch's sum, with vmap inside: torch 2.13 differentiates vmap(grad(f)) wrongly
        # from outside when f holds a batch norm.
        with WrittenNorms(), Repeatable():
            return grad(lambda point: self.outputs(point, *tensors).sum(), x)[0]

    def residual_and_value(self, flat: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (gradient,), value = grad_and_value(lambda point: self.output(point, *tensors), flat)
        return gradient, value

    def plain_residual(self, x: torch.Tensor, tensors: Sequence[torch.Tensor], *, graph: bool) -> torch.Tensor:
        return self.plain_values(x, tensors, graph=graph)[1]

    def plain_values(
        self, x: torch.Tensor, tensors: Sequence[torch.Tensor], *, graph: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (values, R) at a leaf ``x`` by ordinary autograd."""
        quick = FastHVP.around(self.function) if graph and self.autocast is None else nullcontext()
        with quick:
            values = (self if graph else self.for_gradients()).outputs(x, *tensors)
            if not values.requires_grad:
                raise unconnected(self.where, self.noun)
            total = values.sum() if values.ndim else values
            (gradient,) = torch.autograd.grad(total, x, create_graph=graph, allow_unused=True, materialize_grads=True)
        return values, gradient


class RootSystem(System):
    """R as the user wrote it."""

    def output(self, flat: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        return ravel_like(self.call(flat, *tensors), self.raveler, self.where, self.noun)

    def residual(self, x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        with WrittenNorms(), Repeatable():
            return self.outputs(x, *tensors)

    def plain_residual(self, x: torch.Tensor, tensors: Sequence[torch.Tensor], *, graph: bool) -> torch.Tensor:
        residual = self.for_gradients().outputs(x, *tensors)
        if not residual.requires_grad and x.requires_grad:
            raise unconnected(self.where, self.noun)
        return residual


class FixedPointSystem(RootSystem):
    """R = x − T(x)."""

    is_fixed_point = True
    noun = "mapping"
    label = "fixed_point"

    def output(self, flat: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        return flat - super().output(flat, *tensors)


class LinearSystem(RootSystem):
    """R = A x, for A x = b. The linear primitive receives the right-hand side separately."""

    noun = "matvec"
    label = "linear_solve"

    def inspect(self, residual: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> None:
        # Irregular numbers without a generator: an outer vmap of older torch does not support generators.
        places = torch.arange(1, self.raveler.size + 1, dtype=torch.float64, device=x.device)
        u, v = (
            torch.frac(places * irrational).sub(0.5).to(x).reshape(x.shape)
            for irrational in (0.7548776662, 0.5698402910)
        )
        nothing, Au, Av, both = (residual(point) for point in (torch.zeros_like(x), u, v, 3 * u + v))
        size = torch.maximum(Au.norm(), Av.norm())
        # Half the digits of the function's dtype: rounding is far below, and a nonlinear function far above.
        doubt = torch.finfo(self.autocast or self.raveler.coarsest).eps ** 0.5
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


def _without_hooks(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` of a batch, in which hooks are refused: a checkpoint's would unpack outside of the batch what was saved inside."""

    def refusing(*inputs: torch.Tensor) -> Any:
        with hooks_refused():
            return function(*inputs)

    return refusing


def _alone(function: Callable[..., Any], batched: tuple[bool, ...]) -> Callable[..., Any]:
    """Return ``function`` for a batch of one: removing and restoring an axis costs less than ``vmap``."""

    def alone(x: torch.Tensor, *tensors: torch.Tensor) -> Any:
        made = function(x[0], *(t[0] if flag else t for t, flag in zip(tensors, batched, strict=True)))
        return pytree.tree_map(lambda t: t.unsqueeze(0), made)

    return alone
