"""Bounds and constraints as a user states them, and what a solution says of each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bilevel.errors import ArgumentError, BilevelError, DtypeError, ShapeError
from bilevel.pytree import Raveler, moves

__all__ = ["Bounds", "Constraints", "PerConstraint", "flatten_values", "place_of", "ravel_values", "unravel_flags"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Constraints:
    """The constraints lower ≤ x ≤ upper, equality(x, ...) = 0 and inequality(x, ...) ≤ 0; None: no such constraint.

    Parameters
    ----------
    lower, upper
        A number, a tensor that broadcasts to x, or a pytree like x (None or ±inf: no bound). A function of the arguments may return one.
    equality, inequality
        Functions of x and the arguments that return a tensor, or a pytree of tensors.
    smoothing
        τ > 0: take the value and the derivative from the central path, on which λ_i c_i = −τ for every inequality and bound. The solution is off by
        O(τ), and its derivative exists everywhere. None: take them from the solution itself.

    Raises
    ------
    ArgumentError
        If ``equality`` or ``inequality`` is not a function, or ``smoothing`` not a positive number.

    Examples
    --------
    >>> Constraints(lower=0.0, equality=lambda x: x.sum() - 1).lower
    0.0
    """

    lower: Any = None
    upper: Any = None
    equality: Callable[..., Any] | None = None
    inequality: Callable[..., Any] | None = None
    smoothing: float | None = None

    def __post_init__(self) -> None:
        for name, sign in (("equality", "="), ("inequality", "<=")):
            given = getattr(self, name)
            if given is not None and not callable(given):
                raise ArgumentError(
                    f"expected {name} to be a function of (x, *args, **kwargs) whose value is to be {sign} 0, got {given!r}; "
                    f"pass for example {name}=lambda x: x.sum() - 1, and for several constraints one function that returns a tuple"
                )
        tau = self.smoothing
        if tau is not None and (isinstance(tau, bool) or not isinstance(tau, (int, float)) or not 0 < tau < math.inf):
            raise ArgumentError(
                f"expected smoothing to be a positive number or None, got {tau!r}; pass for example 1e-3"
            )

    @property
    def present(self) -> tuple[str, ...]:
        """The names of the bounds and constraints that are not None."""
        names = ("lower", "upper", "equality", "inequality")
        return tuple(name for name in names if getattr(self, name) is not None)


@dataclass(frozen=True, eq=False)
class PerConstraint:
    """One value for each constraint, such as its multiplier or whether it is active; None where the problem has no such constraints.

    Parameters
    ----------
    equality, inequality
        Of the shape that the function of this name returns.
    lower, upper
        Of the shape of x, a value for each entry's bound.

    Examples
    --------
    >>> import torch, bilevel
    >>> nearest = bilevel.argmin(lambda x, a: ((x - a) ** 2).sum(), lower=0.0)
    >>> solution = nearest.solve(torch.ones(2), torch.tensor([1.0, -1.0]))
    >>> solution.active.lower, round(solution.multipliers.lower[1].item(), 4), solution.active.upper
    (tensor([False,  True]), 2.0, None)
    """

    equality: Any = None
    inequality: Any = None
    lower: Any = None
    upper: Any = None


def _flatten(values: PerConstraint) -> tuple[list[Any], tuple[str, ...]]:
    names = tuple(item.name for item in fields(values) if getattr(values, item.name) is not None)
    return [getattr(values, name) for name in names], names


pytree.register_pytree_node(
    PerConstraint,
    _flatten,
    lambda children, names: PerConstraint(**dict(zip(names, children, strict=True))),
    serialized_type_name="bilevel.PerConstraint",
)


def flatten_values(made: Any, where: str, name: str) -> Raveler:
    """Return the structure of what ``equality`` or ``inequality`` returned, or say what is wrong about it."""
    raveler = Raveler.of(made, where, f"the value of {name}")
    if any(dtype.is_complex for dtype in raveler.dtypes):
        raise DtypeError(
            f"{where}: expected {name} to return real tensors, got a complex one; return its .real and .imag, or torch.view_as_real of it"
        )
    return raveler


@dataclass(frozen=True, eq=False)
class Bounds:
    """A bound as the user gave it, made a vector (n,) for each call.

    Parameters
    ----------
    where, name
        For messages: the layer's name, and ``"lower"`` or ``"upper"``.
    given
        See :class:`Constraints`.
    absent
        −inf or inf.
    unknown
        The structure of x.
    """

    where: str
    name: str
    given: Any
    absent: float
    unknown: Raveler

    def vector(self, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype) -> torch.Tensor:
        """Return the bound (n,) for a call with these arguments."""
        value = self.given
        if callable(value):
            try:
                value = value(*args, **kwargs)
            except TypeError as error:
                if isinstance(error, BilevelError):
                    raise
                raise ArgumentError(
                    f"{self.where}: expected {self.name} to be a function of the layer's arguments without x, and calling it failed: {error}; "
                    "give it the parameters of the objective after x"
                ) from error
        unknown = self.unknown
        leaves = self._leaves(value)
        parts = [self._part(leaf, shape, dtype) for leaf, shape in zip(leaves, unknown.real_shapes, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _leaves(self, value: Any) -> list[Any]:
        unknown = self.unknown
        if any(dtype.is_complex for dtype in unknown.dtypes) and value is not None:
            raise DtypeError(
                f"{self.where}: expected a real unknown with {self.name}, got a complex one, which has no order; make the real and imaginary "
                "parts the unknown"
            )
        count = len(unknown.shapes)
        if value is None or isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and value.ndim == 0):
            return [value] * count
        if unknown.is_tensor:
            if type(value).__module__ == "numpy" or isinstance(value, (list, tuple)):
                value = torch.as_tensor(value, device=unknown.device)
            return [value]
        leaves, structure = pytree.tree_flatten(value)
        if structure != unknown.structure:
            raise ShapeError(
                f"{self.where}: expected {self.name} to be a number, or to have the structure of init, {unknown.structure}, got {structure}; "
                "pass a pytree like init, with None for a tensor without a bound"
            )
        return leaves

    def _part(self, leaf: Any, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        device = self.unknown.device
        if leaf is None:
            return torch.full((shape.numel(),), self.absent, dtype=dtype, device=device)
        if isinstance(leaf, (int, float)):
            return torch.full((shape.numel(),), float(leaf), dtype=dtype, device=device)
        if not isinstance(leaf, torch.Tensor) or leaf.is_complex():
            raise DtypeError(
                f"{self.where}: expected {self.name} to be numbers or real tensors, got {type(leaf).__name__}; wrap it in torch.tensor(...)"
            )
        try:
            whole = torch.broadcast_to(leaf, shape)
        except RuntimeError as error:
            raise ShapeError(
                f"{self.where}: expected {self.name} to have a shape that can be broadcast to that of x, {tuple(shape)}, got "
                f"{tuple(leaf.shape)}; give it the shape of x"
            ) from error
        assert moves(leaf) or not leaf.is_floating_point()
        return whole.reshape(shape.numel()).to(dtype)


def ravel_values(made: Any, known: Raveler, where: str, name: str) -> torch.Tensor:
    """Return the values of a constraint as one vector, or say that their structure has changed."""
    leaves, structure = pytree.tree_flatten(made)
    fits = structure == known.structure and all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    if not fits or [leaf.shape for leaf in leaves] != list(known.shapes):
        raise ShapeError(
            f"{where}: expected {name} to have the structure and shapes {[tuple(shape) for shape in known.shapes]} that it has at init, got "
            f"{[tuple(getattr(leaf, 'shape', ())) for leaf in leaves]}; give it one shape for all x"
        )
    return torch.cat([leaf.reshape(-1) for leaf in leaves]) if len(leaves) != 1 else leaves[0].reshape(-1)


def unravel_flags(known: Raveler, flags: torch.Tensor) -> Any:
    """Return boolean ``flags`` in the structure that ``known`` describes."""
    parts = torch.split(flags, [shape.numel() for shape in known.shapes])
    return pytree.tree_unflatten(
        [part.reshape(shape) for part, shape in zip(parts, known.shapes, strict=True)], known.structure
    )


def place_of(known: Raveler, name: str, index: int) -> str:
    """Return how the entry at ``index`` of the flat vector is written, such as ``inequality['capacity'][0, 2]``."""
    numbered = pytree.tree_unflatten(list(range(len(known.shapes))), known.structure)
    for (path, _), shape in zip(pytree.tree_flatten_with_path(numbered)[0], known.shapes, strict=True):
        if index < shape.numel():
            position: list[str] = []
            for length in reversed(shape):
                index, at = divmod(index, length)
                position.insert(0, str(at))
            return f"{name}{pytree.keystr(path)}" + (f"[{', '.join(position)}]" if position else "")
        index -= shape.numel()
    raise AssertionError("no such constraint")
