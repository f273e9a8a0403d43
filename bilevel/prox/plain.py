"""The zero term, and a term of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bilevel.errors import ArgumentError, ShapeError
from bilevel.prox._base import Manifold, Parameter, Term, as_parameter, no_value

__all__ = ["Custom", "Zero"]


@dataclass(frozen=True, eq=False)
class Zero(Term):
    """g(x) = 0: for the leaves of a pytree that have no term.

    Examples
    --------
    >>> import torch
    >>> from bilevel import prox
    >>> prox.Zero().prox(torch.tensor([1.0, -2.0]))
    tensor([ 1., -2.])
    """

    separable = True

    def value(self, x: torch.Tensor) -> torch.Tensor:
        return no_value(x)

    def prox(self, v: torch.Tensor, step: Parameter = 1.0) -> torch.Tensor:
        return v

    def manifold(self, x: torch.Tensor) -> Manifold:
        return Manifold(lambda y: y, free=torch.ones_like(x, dtype=torch.bool))

    def margin(self, x: torch.Tensor, slope: torch.Tensor, step: Parameter = 1.0) -> torch.Tensor:
        return x.new_ones(())


@dataclass(frozen=True, eq=False, init=False)
class Custom(Term):
    """A term that is given by its prox alone. Autograd differentiates the prox.

    A solution is differentiated as the fixed point x = prox(x − ∇f(x)), because the manifold is unknown. The derivative is right where
    the prox is differentiable at x − ∇f(x). This is not checked.

    Parameters
    ----------
    prox
        A function (v, step) -> argmin_x ½‖x − v‖² + step · g(x), of the shape of v. It consists of differentiable torch operations
        that ``torch.func.vmap`` can batch.
    value
        The function x -> g(x), of shape (); None if it is not known.

    Raises
    ------
    ArgumentError
        If ``prox`` or ``value`` is not a function; from ``value``, if no value was given.
    ShapeError
        On use, if ``prox`` returns another shape.

    Examples
    --------
    >>> import torch
    >>> from bilevel import prox
    >>> halving = prox.Custom(lambda v, step: v / (1 + step), value=lambda x: 0.5 * (x * x).sum())
    >>> halving.prox(torch.tensor([1.0, -2.0]))
    tensor([ 0.5000, -1.0000])
    """

    has_manifold = False
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    value_function: Callable[[torch.Tensor], torch.Tensor] | None

    def __init__(
        self,
        prox: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        value: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        for name, given in (("prox", prox), ("value", value)):
            if not callable(given) and (name, given) != ("value", None):
                example = "lambda v, step: v / (1 + step)" if name == "prox" else "lambda x: 0.5 * (x**2).sum()"
                raise ArgumentError(
                    f"{self.where}: expected {name} to be a function, got {given!r}; write for example {example}"
                )
        object.__setattr__(self, "function", prox)
        object.__setattr__(self, "value_function", value)

    def value(self, x: torch.Tensor) -> torch.Tensor:
        if self.value_function is None:
            raise ArgumentError(f"{self.where}: expected a function for the value of g, got none; pass value=")
        return self.value_function(x)

    def prox(self, v: torch.Tensor, step: Parameter = 1.0) -> torch.Tensor:
        x = self.function(v, as_parameter(step, v))
        if not isinstance(x, torch.Tensor) or x.shape != v.shape:
            got = tuple(x.shape) if isinstance(x, torch.Tensor) else repr(x)
            raise ShapeError(
                f"{self.where}: expected prox to return the shape of v, {tuple(v.shape)}, got {got}; return one number for each entry of v"
            )
        return x

    def manifold(self, x: torch.Tensor) -> Manifold:
        raise ArgumentError(
            f"{self.where}: expected a term that names a manifold, got a prox alone; differentiate the fixed point "
            "x = prox(x − ∇f(x)), or take a term of bilevel.prox"
        )

    def margin(self, x: torch.Tensor, slope: torch.Tensor, step: Parameter = 1.0) -> torch.Tensor:
        raise ArgumentError(
            f"{self.where}: expected a term that knows its margin, got a prox alone; take a term of bilevel.prox"
        )
