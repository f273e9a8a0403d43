"""The contract of a proximal term, and of the manifold on which its solution lies.

Minimise f(x) + g(x). Near a solution that is not degenerate, the solution stays on a smooth manifold M, on which g is smooth: for the L1 norm, the
vectors with the same zeros. A term names M from the zeros, bounds and ties that its prox makes exactly.
The retraction Π maps every y near x onto M, with Π(y) = y on M. The problem min f(Π(y)) + g(Π(y)) + ½‖y − Π(y)‖² is smooth
and has the same solution, so its gradient is the equation to differentiate.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, TypeAlias

import torch

from bilevel._torch.transforms import layers, without_gradient
from bilevel.errors import ArgumentError, DtypeError, ShapeError
from bilevel.prox._entries import Entries

__all__ = [
    "Demand",
    "Manifold",
    "Parameter",
    "Term",
    "already_checked",
    "as_parameter",
    "broadcast_to",
    "check_finite",
    "check_nonnegative",
    "check_numbers",
    "check_positive",
    "demand",
    "detached",
    "entry_numbers",
    "no_value",
    "positive_of",
    "postponed_checks",
    "readable",
    "rounding",
    "strength_of",
]

Parameter: TypeAlias = float | torch.Tensor

detached = without_gradient


def no_value(y: torch.Tensor) -> torch.Tensor:
    """Return the value of an indicator function on its set: 0."""
    return y.new_zeros(())


@dataclass(frozen=True, eq=False)
class Manifold:
    """The manifold M of a solution: its retraction, and g on M.

    Parameters
    ----------
    retract
        Π: maps y, of the shape of x, onto M. Π(y) = y for y on M, whatever the parameters of the term are; at x, its derivative is the
        projector on the tangent space. Π is smooth near x, in y and in the parameters.
    value
        g(y) of shape () for y on M, smooth near x, in y and in the parameters. 0 for indicator functions.
    free
        Where M is a set of vectors some of whose entries are fixed: which entries are not (bool, of the shape of x). None for any other manifold.

    Examples
    --------
    >>> import torch
    >>> from bilevel import prox
    >>> manifold = prox.L1(1.0).manifold(torch.tensor([2.0, 0.0]))  # the first entry is free, the second is zero
    >>> manifold.retract(torch.tensor([3.0, 0.1]))
    tensor([3., 0.])
    """

    retract: Callable[[torch.Tensor], torch.Tensor]
    value: Callable[[torch.Tensor], torch.Tensor] = no_value
    free: torch.Tensor | None = None


class Term(ABC):
    """A convex function g with a proximal operator, for one problem: x has the shape of the unknown, without a batch axis.

    The methods consist of tensor operations that ``torch.func.vmap`` can batch, over x and over the parameters of the term.
    Parameters are numbers or tensors. They are converted to the dtype and device of x when they are used.

    Examples
    --------
    >>> import torch
    >>> from bilevel import prox
    >>> term = prox.L1(1.0)
    >>> term.value(torch.tensor([1.0, -2.0])), term.prox(torch.tensor([3.0, -0.5]))
    (tensor(3.), tensor([2., 0.]))
    """

    has_manifold: ClassVar[bool] = (
        True  #: Whether :meth:`manifold` and :meth:`margin` are there. If not, differentiate the fixed point.
    )
    separable: ClassVar[bool] = False  #: Whether g is a sum of functions of one entry of x each.

    @abstractmethod
    def value(self, x: torch.Tensor) -> torch.Tensor:
        """Return g(x), of shape (); 0 for an indicator function, whose set x is taken to be in."""

    @abstractmethod
    def prox(self, v: torch.Tensor, step: Parameter = 1.0) -> torch.Tensor:
        """Return argmin_x ½‖x − v‖² + step · g(x), of the shape of v, with exact zeros, bounds and ties."""

    def _entries(self, like: torch.Tensor) -> Entries | None:
        """Return the term of vectors of the shape of ``like`` as numbers for each entry; None if it is no such term."""
        return None

    @abstractmethod
    def manifold(self, x: torch.Tensor) -> Manifold:
        """Return the manifold that x, made by :meth:`prox`, lies on; only the values of x count, not its derivatives."""

    @abstractmethod
    def margin(self, x: torch.Tensor, slope: torch.Tensor, step: Parameter = 1.0) -> torch.Tensor:
        """Return how far x is from the nearest point at which the prox is not differentiable, of shape (), relative, at most 1.

        The margin is small where −``slope`` is near the boundary of ∂g(x), and where x is near a smaller manifold.
        At a margin of the size of rounding the solution is degenerate: it has one-sided derivatives only.

        Parameters
        ----------
        x
            The solution, made by :meth:`prox`.
        slope
            ∇f(x), of the shape of x.
        step
            The step of the prox, about 1/L. It makes ``slope`` comparable to x.
        """

    def proven_zero(self, slope: torch.Tensor, move: torch.Tensor) -> torch.Tensor:
        """Return which entries of a minimiser x* of f + g have to be zero, bool of the shape of x.

        They are those for which −∇f(x*) is inside ∂g(0), wherever ∇f(x*) is. A term that proves nothing returns False for all.

        Parameters
        ----------
        slope
            ∇f at a point, of the shape of x.
        move
            Bounds of the sizes of the entries of ∇f(x*) − ``slope``.
        """
        return torch.zeros_like(slope, dtype=torch.bool)

    def proven_nonzero(self, x: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
        """Return which entries of a point x* are not zero, bool of the shape of x, if ‖x − x*‖ ≤ ``distance`` ()."""
        return x.abs() > distance

    def convexity(self, x: torch.Tensor) -> torch.Tensor:
        """Return c ≥ 0, of the shape of x, so that g(x) − ½ Σ c_j x_j² is convex."""
        return torch.zeros_like(x)

    @property
    def where(self) -> str:
        """How messages name the term."""
        return f"prox.{type(self).__name__}"

    def tensors(self) -> list[torch.Tensor]:
        """Return the parameters that are tensors."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]  # each term is a dataclass
        return [value for field in fields if isinstance(value := getattr(self, field.name), torch.Tensor)]


_checked: ContextVar[bool] = ContextVar("checked", default=False)


@contextmanager
def already_checked() -> Iterator[None]:
    """Inside, terms do not read the values of their parameters, which a call has checked once.

    A check costs as much as a singular value decomposition, and reading a value would end the recording of an evaluation. The scope is
    that of a context, and not an argument, because the user's own function stands between the layer and the term's constructor.
    """
    token = _checked.set(True)
    try:
        yield
    finally:
        _checked.reset(token)


@dataclass(frozen=True, eq=False)
class Demand:
    """A condition on a parameter that ``vmap`` batches: it has to be ``kind``. ``broken``, () bool, tells where it is not."""

    where: str
    name: str
    kind: str
    broken: torch.Tensor


_demands: ContextVar[list[Demand] | None] = ContextVar("demands", default=None)


@contextmanager
def postponed_checks() -> Iterator[list[Demand]]:
    """Inside, terms list what they ask of parameters whose values cannot be read."""
    asked: list[Demand] = []
    token = _demands.set(asked)
    try:
        yield asked
    finally:
        _demands.reset(token)


def demand(where: str, name: str, kind: str, broken: torch.Tensor) -> None:
    """Add to the list of :func:`postponed_checks`, if there is one."""
    asked = _demands.get()
    if asked is not None:
        asked.append(Demand(where, name, kind, broken))


def readable(tensor: torch.Tensor) -> bool:
    """Return whether the values of a tensor can be read: not those that ``vmap`` batches."""
    if _checked.get():
        return False
    if not torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return True
    return not any(torch._C._functorch.is_batchedtensor(layer) for layer in layers(tensor))


def rounding(x: torch.Tensor, factor: float = 16.0) -> float:
    """Return the relative rounding error of a sum of the entries of x."""
    return factor * torch.finfo(x.dtype).eps * max(x.numel(), 1) ** 0.5


def as_parameter(value: Parameter, like: torch.Tensor) -> torch.Tensor:
    """Return a number or tensor as a tensor of the dtype and on the device of ``like``."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype=like.dtype, device=like.device)
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)


def entry_numbers(value: Parameter, like: torch.Tensor) -> float | torch.Tensor:
    """Return a parameter in the dtype of ``like``, detached: a number, or a vector with one for each entry of ``like``."""
    found = detached(as_parameter(value, like))
    return float(found) if found.ndim == 0 else found.expand(like.shape).reshape(-1)


def broadcast_to(where: str, name: str, value: torch.Tensor, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
    """Return ``value`` expanded to ``shape``, or raise :class:`ShapeError`."""
    try:
        return value.expand(shape)
    except RuntimeError:
        raise ShapeError(
            f"{where}: expected {name} to be a number or of a shape that expands to {tuple(shape)}, got the shape "
            f"{tuple(value.shape)}; pass one number, or one for each"
        ) from None


def strength_of(where: str, value: Parameter, like: torch.Tensor, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
    """Return a strength, of ``shape``, in the dtype of ``like``; NaN where a batched one is negative."""
    strength = broadcast_to(where, "strength", as_parameter(value, like), shape)
    if readable(strength):
        return strength
    return torch.where(strength < 0, float("nan"), strength)


def positive_of(
    where: str, name: str, value: Parameter, like: torch.Tensor, shape: torch.Size | tuple[int, ...]
) -> torch.Tensor:
    """Return a parameter that has to be positive, of ``shape``, in the dtype of ``like``; NaN where a batched one is not."""
    found = broadcast_to(where, name, as_parameter(value, like), shape)
    return found if readable(found) else torch.where(found > 0, found, float("nan"))


def _check(where: str, name: str, value: Parameter, kind: str, fits: Callable[[Any], Any]) -> None:
    """Raise unless all values ``fit``; those of a batched tensor cannot be read."""
    if isinstance(value, torch.Tensor):
        if value.is_complex() or value.dtype == torch.bool:
            raise DtypeError(f"{where}: expected {name} to be real, got a tensor of {value.dtype}; convert it")
        if not readable(value):
            demand(where, name, kind, ~fits(value).all())
            return
        numbers = detached(value)
        if bool(fits(numbers).all()):
            return
        wrong = numbers[~fits(numbers)].reshape(-1)[0].item()
    elif isinstance(value, bool) or not isinstance(value, Real):
        raise ArgumentError(
            f"{where}: expected {name} to be a number or a tensor, got {value!r}; convert it with torch.as_tensor(...)"
        )
    elif fits(value):
        return
    else:
        wrong = value
    raise ArgumentError(f"{where}: expected {name} to be {kind}, got {wrong:g}; pass such a value")


def check_nonnegative(where: str, name: str, value: Parameter) -> None:
    """Raise :class:`ArgumentError` unless all values, where they can be read, are finite and at least 0."""
    _check(where, name, value, "finite and at least 0", lambda v: (v >= 0) & (v < math.inf))


def check_positive(where: str, name: str, value: Parameter) -> None:
    """Raise :class:`ArgumentError` unless all values, where they can be read, are finite and above 0."""
    _check(where, name, value, "finite and above 0", lambda v: (v > 0) & (v < math.inf))


def check_finite(where: str, name: str, value: Parameter) -> None:
    """Raise :class:`ArgumentError` unless all values, where they can be read, are finite."""
    _check(where, name, value, "finite", lambda v: (v > -math.inf) & (v < math.inf))


def check_numbers(where: str, name: str, value: Parameter) -> None:
    """Raise :class:`ArgumentError` if a value, where they can be read, is NaN."""
    _check(where, name, value, "a number", lambda v: v == v)
