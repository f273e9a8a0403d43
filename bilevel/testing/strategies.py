"""Random problems for property-based tests, as `hypothesis <https://hypothesis.readthedocs.io>`_ strategies.

Every strategy draws a :class:`RandomProblem`: a layer's function with a start, arguments, and a closed form of the
solution that torch can differentiate. Numbers come from a seeded generator and sizes from hypothesis,
so that drawing is quick and a failing example shrinks to a small one.

This module needs ``hypothesis``, which ``pip install ".[test]"`` in a clone brings.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import bilevel
from bilevel.testing._input_strategies import batch_sizes, dtypes, generators, shapes, tensors, trees

__all__ = [
    "RandomBatch",
    "RandomProblem",
    "badly_scaled",
    "batch_sizes",
    "batches",
    "contractions",
    "dtypes",
    "ill_conditioned",
    "merely_convex",
    "nonconvex",
    "problems",
    "roots",
    "shapes",
    "strongly_convex",
    "tensors",
    "trees",
]

_F64 = torch.float64


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


def _normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=_F64)


def _rotation(generator: torch.Generator, n: int) -> torch.Tensor:
    return torch.linalg.qr(_normal(generator, n, n))[0]


def _symmetric(generator: torch.Generator, n: int, digits: float) -> torch.Tensor:
    """Return a positive definite matrix with eigenvalues from 10^−digits to 1."""
    V = _rotation(generator, n)
    A = V @ torch.diag(torch.logspace(0, -digits, n, dtype=_F64)) @ V.mT
    return 0.5 * (A + A.mT)


# Functions of all examples of a family: plain torch, in the dtype of their arguments.


def _quadratic(x: torch.Tensor, A: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return 0.5 * x @ A @ x - b @ x


def _well(x: torch.Tensor, A: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    # Strictly convex around A⁻¹(b + c): a quadratic, a quartic and log cosh of the distance from there.
    away = A @ x - b - c
    return 0.5 * away @ away + 0.25 * (away**4).sum() + (away + torch.nn.functional.softplus(-2 * away)).sum()


def _pseudo_huber(x: torch.Tensor, A: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    return (1 + (A @ x - b - c) ** 2).sqrt().sum()


def _wells(x: torch.Tensor, Q: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    # Each coordinate of Qx has wells at ±a and a maximum between.
    return 0.25 * (((Q @ x) ** 2 - a**2) ** 2).sum()


def _curved(x: torch.Tensor, A: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    # Monotone along each row, and A far from symmetric.
    away = A @ x - b - c
    return away + away**3


def _skewed(x: torch.Tensor, M: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    # The fixed point is b + c; ∂T = M diag(1 − tanh²) there is M.
    return M @ torch.tanh(x - b - c) + b + c


def _linear_solution(A: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    return torch.linalg.solve(A, b + c)


def _measured(problem: RandomProblem) -> RandomProblem:
    """Return the problem, of a vector, with its ``reach``."""
    x, init = problem.solution(*problem.args), problem.init
    residual = torch.func.grad(problem.function) if problem.make is bilevel.argmin else problem.function
    made: Any = torch.func.jvp(lambda at: residual(at, *problem.args), (x,), (x - init,))
    expected = float(made[1].norm())
    return replace(problem, reach=max(1.0, float(residual(init, *problem.args).norm()) / max(expected, 1e-300)))


@st.composite
def strongly_convex(draw: st.DrawFn, *, most: int = 6, digits: float = 2.0, least: int = 1) -> RandomProblem:
    """Draw an argmin with a globally positive definite Hessian: quadratic or not.

    Parameters
    ----------
    most, least
        Bounds of n.
    digits
        The condition number is at most 10^digits (squared for the family that is not quadratic).
    """
    n, generator = draw(st.integers(least, most)), draw(generators())
    spread = draw(st.floats(0, digits)) if n > 1 else 0.0
    A, b, c = _symmetric(generator, n, spread), _normal(generator, n), 0.5 * _normal(generator, n)
    start = torch.zeros(n, dtype=_F64)
    if draw(st.booleans()):
        return RandomProblem(
            "quadratic", bilevel.argmin, _quadratic, start, (A, b),
            lambda A, b: torch.linalg.solve(0.5 * (A + A.mT), b), 10**spread,
        )  # fmt: skip
    A = _symmetric(generator, n, 0.5 * spread)
    return _measured(RandomProblem("well", bilevel.argmin, _well, start, (A, b, c), _linear_solution, 10**spread))


@st.composite
def merely_convex(draw: st.DrawFn, *, most: int = 5) -> RandomProblem:
    """Draw an argmin that is convex with no modulus: its curvature vanishes far away, and is regular at the solution."""
    n, generator = draw(st.integers(1, most)), draw(generators())
    A, b, c = _rotation(generator, n), _normal(generator, n), 0.5 * _normal(generator, n)
    scales = 0.5 + torch.rand(n, generator=generator, dtype=_F64)
    start = torch.zeros(n, dtype=_F64)
    return RandomProblem(
        "pseudo-Huber", bilevel.argmin, _pseudo_huber, start, (scales.unsqueeze(-1) * A, b, c), _linear_solution, 9.0
    )


@st.composite
def nonconvex(draw: st.DrawFn, *, most: int = 5) -> RandomProblem:
    """Draw an argmin with 2^n minima, and a start near one at which the Hessian is positive definite."""
    n, generator = draw(st.integers(1, most)), draw(generators())
    Q = _rotation(generator, n)
    a = 0.7 + torch.rand(n, generator=generator, dtype=_F64)
    signs = torch.where(_normal(generator, n) > 0, 1.0, -1.0).to(_F64)
    start = Q.mT @ (signs * (a + 0.1 * (torch.rand(n, generator=generator, dtype=_F64) - 0.5)))

    def solution(Q: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve(Q, signs.to(a) * a)

    return RandomProblem("wells", bilevel.argmin, _wells, start, (Q, a), solution, 6.0)


@st.composite
def ill_conditioned(draw: st.DrawFn, *, most: int = 6, least_digits: float = 4.0, digits: float = 8.0) -> RandomProblem:
    """Draw a quadratic whose condition number is 10^least_digits to 10^digits."""
    n, generator = draw(st.integers(2, most)), draw(generators())
    spread = draw(st.floats(least_digits, digits))
    A = _symmetric(generator, n, spread)
    # A right-hand side for which x is of size one, not as large as the inverse.
    b = A @ _normal(generator, n)
    return RandomProblem(
        "ill-conditioned quadratic", bilevel.argmin, _quadratic, torch.zeros(n, dtype=_F64), (A, b),
        lambda A, b: torch.linalg.solve(0.5 * (A + A.mT), b), 10**spread,
    )  # fmt: skip


@st.composite
def badly_scaled(draw: st.DrawFn, *, most: int = 5, digits: float = 3.0) -> RandomProblem:
    """Draw a well-conditioned quadratic in units that differ by up to 10^(2 digits) between the unknowns."""
    n, generator = draw(st.integers(2, most)), draw(generators())
    units = 10 ** ((2 * torch.rand(n, generator=generator, dtype=_F64) - 1) * draw(st.floats(1.0, digits)))
    A = _symmetric(generator, n, 0.5)
    A = units.unsqueeze(-1) * A * units
    b = A @ (_normal(generator, n) / units)
    kappa = float(torch.linalg.cond(A))
    return RandomProblem(
        "badly scaled quadratic", bilevel.argmin, _quadratic, torch.zeros(n, dtype=_F64), (A, b),
        lambda A, b: torch.linalg.solve(0.5 * (A + A.mT), b), kappa,
    )  # fmt: skip


@st.composite
def roots(draw: st.DrawFn, *, most: int = 5, digits: float = 1.0) -> RandomProblem:
    """Draw a root of a monotone function whose Jacobian is far from symmetric, of condition up to 10^digits."""
    n, generator = draw(st.integers(1, most)), draw(generators())
    spread = draw(st.floats(0, digits)) if n > 1 else 0.0
    A = _rotation(generator, n) @ torch.diag(torch.logspace(0, -spread, n, dtype=_F64)) @ _rotation(generator, n)
    b, c = _normal(generator, n), 0.5 * _normal(generator, n)
    return _measured(
        RandomProblem(
            "root", bilevel.root, _curved, torch.zeros(n, dtype=_F64), (A, b, c), _linear_solution, 10**spread
        )
    )


@st.composite
def contractions(draw: st.DrawFn, *, most: int = 5, factor: float = 0.9) -> RandomProblem:
    """Draw a fixed point of a mapping with a Lipschitz constant of at most ``factor``, and no symmetry."""
    n, generator = draw(st.integers(1, most)), draw(generators())
    M = _normal(generator, n, n)
    lipschitz = draw(st.floats(0.05, factor))
    M = lipschitz * M / torch.linalg.matrix_norm(M, 2).clamp_min(1e-12)
    b, c = _normal(generator, n), 0.5 * _normal(generator, n)
    kappa = (1 + lipschitz) / (1 - lipschitz)
    return RandomProblem(
        "contraction", bilevel.fixed_point, _skewed, torch.zeros(n, dtype=_F64), (M, b, c), lambda M, b, c: b + c, kappa
    )


def problems(*, regular: bool = False, most: int = 5) -> st.SearchStrategy[RandomProblem]:
    """Draw a problem of any family; with ``regular`` none that is ill-conditioned or badly scaled."""
    families = [
        strongly_convex(most=most), merely_convex(most=most), nonconvex(most=most), roots(most=most),
        contractions(most=most),
    ]  # fmt: skip
    if not regular:
        families += [ill_conditioned(most=max(most, 2)), badly_scaled(most=max(most, 2))]
    return st.one_of(families)


@dataclass(frozen=True, eq=False)
class RandomBatch:
    """A batch of problems of one family, for ``torch.func.vmap``. They differ in some of their arguments.

    Parameters
    ----------
    problem
        The first problem.
    args
        The arguments of all problems. Those that differ have a batch axis.
    in_dims
        The batch axis of each argument, or None.
    size
        The number of problems.
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


@st.composite
def batches(draw: st.DrawFn, of: st.SearchStrategy[RandomProblem], *, most: int = 4) -> RandomBatch:
    """Draw up to ``most`` problems like one that ``of`` draws: some arguments differ, along any of their axes, others are shared."""
    problem, size, generator = draw(of), draw(batch_sizes(most)), draw(generators())
    flags = draw(st.lists(st.booleans(), min_size=len(problem.args), max_size=len(problem.args)).filter(any))
    args: list[torch.Tensor] = []
    dims: list[int | None] = []
    for number, (argument, flag) in enumerate(zip(problem.args, flags, strict=True)):
        if not flag:
            args.append(argument)
            dims.append(None)
            continue
        dim = draw(st.integers(0, argument.ndim))
        noise = torch.rand(size, generator=generator, dtype=_F64).to(argument)
        # A matrix is scaled, which keeps what makes the problem regular; vectors are moved.
        rows = [argument * (1 - 0.1 * r) if number == 0 else argument + 0.1 * r * argument.sign() for r in noise]
        args.append(torch.stack(rows, dim))
        dims.append(dim)
    return RandomBatch(problem, tuple(args), tuple(dims), size)
