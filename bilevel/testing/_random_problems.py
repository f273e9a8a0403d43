"""A random problem, and a batch of them: what the strategies draw."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

import bilevel

__all__ = ["RandomBatch", "RandomProblem"]


@dataclass(frozen=True, eq=False)
class RandomProblem:
    """A problem that a strategy drew.

    Parameters
    ----------
    name
        Its family.
    make
        :func:`bilevel.argmin`, :func:`bilevel.root` or :func:`bilevel.fixed_point`.
    function
        The function for ``make``, of ``(x, *args)``.
    init
        An initial guess from which default solvers reach the solution.
    args
        The arguments: floating-point tensors.
    solution
        args ↦ x*, in closed form, by one dense solve that torch differentiates; the pytree of ``init``.
    condition
        Condition number of the Jacobian at the solution, about.
    reach
        How much larger the residual at the start is than the Jacobian at the solution would make it: solves stop relative
        to the first.

    Examples
    --------
    >>> import bilevel, torch
    >>> double = RandomProblem(
    ...     "double", bilevel.root, lambda x, a: x - 2 * a, torch.zeros(1), (torch.ones(1),), lambda a: 2 * a
    ... )
    >>> double.layer()(double.init, *double.args)
    tensor([2.])
    """

    name: str
    make: Callable[..., bilevel.Layer]
    function: Callable[..., Any]
    init: Any
    args: tuple[torch.Tensor, ...]
    solution: Callable[..., Any]
    condition: float = 1.0
    reach: float = 1.0

    def __repr__(self) -> str:
        leaves = pytree.tree_leaves(self.init)
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves)
        return f"RandomProblem({self.name}, x: {shapes} {leaves[0].dtype if leaves else ''}, condition {self.condition:.1e})"

    def layer(self, **settings: Any) -> bilevel.Layer:
        """Return the layer with ``settings`` (solver, linear_solver, tolerance, on_failure)."""
        return self.make(self.function, **settings)

    @property
    def size(self) -> int:
        """n, the number of unknowns."""
        return sum(leaf.numel() for leaf in pytree.tree_leaves(self.init))

    @property
    def dtype(self) -> torch.dtype:
        """Of the unknown."""
        return pytree.tree_leaves(self.init)[0].dtype

    @property
    def stated_error(self) -> float:
        """The relative error that x and its derivatives may have with the default tolerances.

        A solve leaves a residual of up to eps^(3/4) of that at the start, which the condition number κ may enlarge, in x and
        through it in the derivative; rounding adds some hundred units. Four times the first, for constants:
        κ (4 reach eps^(3/4) + 100 √n eps).
        """
        eps = torch.finfo(self.dtype).eps
        return self.condition * (4 * self.reach * eps**0.75 + 100 * math.sqrt(max(self.size, 1)) * eps)

    def to(self, dtype: torch.dtype) -> RandomProblem:
        """Return the problem with start and arguments in ``dtype``."""
        convert = functools.partial(torch.Tensor.to, dtype=dtype)
        return replace(
            self, init=pytree.tree_map(convert, self.init), args=tuple(convert(argument) for argument in self.args)
        )

    def in_terms_of(self, like: Any) -> RandomProblem:
        """Return the same problem of the pytree ``like`` in place of a vector x (n,), n being the numbers in ``like``.

        Raises
        ------
        ShapeError
            If x is not a vector, or ``like`` holds another number of entries.
        """
        leaves, structure = pytree.tree_flatten(like)
        sizes = [leaf.numel() for leaf in leaves]
        if not isinstance(self.init, torch.Tensor) or self.init.shape != (sum(sizes),):
            raise bilevel.ShapeError(
                f"RandomProblem: expected a pytree of {self.size} numbers for a vector of as many, got {sum(sizes)}; draw it "
                "with trees(size=...)"
            )

        def build(flat: torch.Tensor) -> Any:
            parts = torch.split(flat, sizes)
            shaped = [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
            return pytree.tree_unflatten(shaped, structure)

        def function(tree: Any, *args: torch.Tensor) -> Any:
            flat = torch.cat([leaf.reshape(-1) for leaf in pytree.tree_leaves(tree)])
            value = self.function(flat, *args)
            return value if self.make is bilevel.argmin else build(value)

        return replace(
            self, function=function, init=build(self.init), solution=lambda *args: build(self.solution(*args))
        )


@dataclass(frozen=True, eq=False)
class RandomBatch:
    """A batch of problems of one family, for ``torch.func.vmap``. They differ in some of their arguments.

    Parameters
    ----------
    problem
        The first problem.
    args
        The arguments of all problems: floating-point tensors. Those that differ have a batch axis.
    in_dims
        The batch axis of each argument, or None.
    size
        The number of problems.

    Examples
    --------
    >>> import bilevel, torch
    >>> double = RandomProblem(
    ...     "double", bilevel.root, lambda x, a: x - 2 * a, torch.zeros(1), (torch.ones(1),), lambda a: 2 * a
    ... )
    >>> RandomBatch(double, (torch.tensor([[1.0], [3.0]]),), (0,), 2).single(1)
    (tensor([3.]),)
    """

    problem: RandomProblem
    args: tuple[torch.Tensor, ...]
    in_dims: tuple[int | None, ...]
    size: int

    def __repr__(self) -> str:
        return f"RandomBatch({self.size} of {self.problem!r}, in_dims={self.in_dims})"

    def single(self, number: int) -> tuple[torch.Tensor, ...]:
        """Return the arguments of one problem."""
        return tuple(
            argument if dim is None else argument.select(dim, number)
            for argument, dim in zip(self.args, self.in_dims, strict=True)
        )
