"""Random problems for property-based tests, as `hypothesis <https://hypothesis.readthedocs.io>`_ strategies.

Every strategy draws a :class:`RandomProblem`: a layer's function with a start, arguments, and a closed form of the
solution that torch can differentiate. Numbers come from a seeded generator and sizes from hypothesis,
so that drawing is quick and a failing example shrinks to a small one.

This module needs ``hypothesis``, which ``pip install ".[test]"`` in a clone brings.
"""

from __future__ import annotations

import torch
from hypothesis import strategies as st

import bilevel
from bilevel.testing._families import (
    curved,
    linear_solution,
    measured,
    pseudo_huber,
    quadratic,
    skewed,
    well,
    wells,
)
from bilevel.testing._input_strategies import batch_sizes, dtypes, generators, shapes, tensors, trees
from bilevel.testing._random_problems import RandomBatch, RandomProblem

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


def _normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=_F64)


def _rotation(generator: torch.Generator, n: int) -> torch.Tensor:
    return torch.linalg.qr(_normal(generator, n, n))[0]


def _symmetric(generator: torch.Generator, n: int, digits: float) -> torch.Tensor:
    """Return a positive definite matrix with eigenvalues from 10^−digits to 1."""
    V = _rotation(generator, n)
    A = V @ torch.diag(torch.logspace(0, -digits, n, dtype=_F64)) @ V.mT
    return 0.5 * (A + A.mT)


@st.composite
def strongly_convex(draw: st.DrawFn, *, most: int = 6, digits: float = 2.0, least: int = 1) -> RandomProblem:
    """Draw an argmin with a globally positive definite Hessian: quadratic or not.

    Parameters
    ----------
    most, least
        Bounds of n.
    digits
        The condition number is at most 10^digits (squared for the family that is not quadratic).

    Returns
    -------
    hypothesis.strategies.SearchStrategy
        Of :class:`RandomProblem`.

    Examples
    --------
    >>> from hypothesis import find
    >>> problem = find(strongly_convex(), lambda problem: problem.size >= 3)
    >>> problem.size, problem.condition <= 1e2
    (3, True)
    """
    n, generator = draw(st.integers(least, most)), draw(generators())
    spread = draw(st.floats(0, digits)) if n > 1 else 0.0
    A, b, c = _symmetric(generator, n, spread), _normal(generator, n), 0.5 * _normal(generator, n)
    start = torch.zeros(n, dtype=_F64)
    if draw(st.booleans()):
        return RandomProblem(
            "quadratic", bilevel.argmin, quadratic, start, (A, b),
            lambda A, b: torch.linalg.solve(0.5 * (A + A.mT), b), 10**spread,
        )  # fmt: skip
    A = _symmetric(generator, n, 0.5 * spread)
    return measured(RandomProblem("well", bilevel.argmin, well, start, (A, b, c), linear_solution, 10**spread))


@st.composite
def merely_convex(draw: st.DrawFn, *, most: int = 5) -> RandomProblem:
    """Draw an argmin that is convex with no modulus: its curvature vanishes far away, and is regular at the solution.

    Parameters
    ----------
    most
        The largest n.

    Returns
    -------
    hypothesis.strategies.SearchStrategy
        Of :class:`RandomProblem`.

    Examples
    --------
    >>> from hypothesis import find
    >>> problem = find(merely_convex(), lambda problem: problem.size >= 2)
    >>> problem.name, problem.size
    ('pseudo-Huber', 2)
    """
    n, generator = draw(st.integers(1, most)), draw(generators())
    A, b, c = _rotation(generator, n), _normal(generator, n), 0.5 * _normal(generator, n)
    scales = 0.5 + torch.rand(n, generator=generator, dtype=_F64)
    start = torch.zeros(n, dtype=_F64)
    return RandomProblem(
        "pseudo-Huber", bilevel.argmin, pseudo_huber, start, (scales.unsqueeze(-1) * A, b, c), linear_solution, 9.0
    )


@st.composite
def nonconvex(draw: st.DrawFn, *, most: int = 5) -> RandomProblem:
    """Draw an argmin with 2^n minima, and a start near one at which the Hessian is positive definite.

    Parameters
    ----------
    most
        The largest n.

    Returns
    -------
    hypothesis.strategies.SearchStrategy
        Of :class:`RandomProblem`.

    Examples
    --------
    >>> from hypothesis import find
    >>> problem = find(nonconvex(), lambda problem: problem.size >= 2)
    >>> problem.name, problem.size
    ('wells', 2)
    """
    n, generator = draw(st.integers(1, most)), draw(generators())
    Q = _rotation(generator, n)
    a = 0.7 + torch.rand(n, generator=generator, dtype=_F64)
    signs = torch.where(_normal(generator, n) > 0, 1.0, -1.0).to(_F64)
    start = Q.mT @ (signs * (a + 0.1 * (torch.rand(n, generator=generator, dtype=_F64) - 0.5)))

    def solution(Q: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve(Q, signs.to(a) * a)

    return RandomProblem("wells", bilevel.argmin, wells, start, (Q, a), solution, 6.0)


@st.composite
def ill_conditioned(draw: st.DrawFn, *, most: int = 6, least_digits: float = 4.0, digits: float = 8.0) -> RandomProblem:
    """Draw a quadratic whose condition number is 10^least_digits to 10^digits.

    Parameters
    ----------
    most
        The largest n.
    least_digits, digits
        Bounds of the logarithm of the condition number.

    Returns
    -------
    hypothesis.strategies.SearchStrategy
        Of :class:`RandomProblem`.

    Examples
    --------
    >>> from hypothesis import find
    >>> problem = find(ill_conditioned(), lambda problem: problem.size >= 3)
    >>> problem.condition >= 1e4, problem.size
    (True, 3)
    """
    n, generator = draw(st.integers(2, most)), draw(generators())
    spread = draw(st.floats(least_digits, digits))
    A = _symmetric(generator, n, spread)
    # A right-hand side for which x is of size one, not as large as the inverse.
    b = A @ _normal(generator, n)
    return RandomProblem(
        "ill-conditioned quadratic", bilevel.argmin, quadratic, torch.zeros(n, dtype=_F64), (A, b),
        lambda A, b: torch.linalg.solve(0.5 * (A + A.mT), b), 10**spread,
    )  # fmt: skip


@st.composite
def badly_scaled(draw: st.DrawFn, *, most: int = 5, digits: float = 3.0) -> RandomProblem:
    """Draw a well-conditioned quadratic in units that differ by up to 10^(2 digits) between the unknowns.

    Parameters
    ----------
    most
        The largest n.
    digits
        The largest power of ten of a unit, and the negative of the least.

    Returns
    -------
    hypothesis.strategies.SearchStrategy
        Of :class:`RandomProblem`.

    Examples
    --------
    >>> from hypothesis import find
    >>> problem = find(badly_scaled(), lambda problem: problem.size >= 3)
    >>> problem.name, problem.size
    ('badly scaled quadratic', 3)
    """
    n, generator = draw(st.integers(2, most)), draw(generators())
    units = 10 ** ((2 * torch.rand(n, generator=generator, dtype=_F64) - 1) * draw(st.floats(1.0, digits)))
    A = _symmetric(generator, n, 0.5)
    A = units.unsqueeze(-1) * A * units
    b = A @ (_normal(generator, n) / units)
    kappa = float(torch.linalg.cond(A))
    return RandomProblem(
        "badly scaled quadratic", bilevel.argmin, quadratic, torch.zeros(n, dtype=_F64), (A, b),
        lambda A, b: torch.linalg.solve(0.5 * (A + A.mT), b), kappa,
    )  # fmt: skip


@st.composite
def roots(draw: st.DrawFn, *, most: int = 5, digits: float = 1.0) -> RandomProblem:
    """Draw a root of a monotone function whose Jacobian is far from symmetric, of condition up to 10^digits.

    Parameters
    ----------
    most
        The largest n.
    digits
        The largest logarithm of the condition number.

    Returns
    -------
    hypothesis.strategies.SearchStrategy
        Of :class:`RandomProblem`.

    Examples
    --------
    >>> from hypothesis import find
    >>> problem = find(roots(), lambda problem: problem.size >= 2)
    >>> problem.name, problem.size
    ('root', 2)
    """
    n, generator = draw(st.integers(1, most)), draw(generators())
    spread = draw(st.floats(0, digits)) if n > 1 else 0.0
    A = _rotation(generator, n) @ torch.diag(torch.logspace(0, -spread, n, dtype=_F64)) @ _rotation(generator, n)
    b, c = _normal(generator, n), 0.5 * _normal(generator, n)
    return measured(
        RandomProblem("root", bilevel.root, curved, torch.zeros(n, dtype=_F64), (A, b, c), linear_solution, 10**spread)
    )


@st.composite
def contractions(draw: st.DrawFn, *, most: int = 5, factor: float = 0.9) -> RandomProblem:
    """Draw a fixed point of a mapping with a Lipschitz constant of at most ``factor``, and no symmetry.

    Parameters
    ----------
    most
        The largest n.
    factor
        The largest Lipschitz constant, below 1.

    Returns
    -------
    hypothesis.strategies.SearchStrategy
        Of :class:`RandomProblem`.

    Examples
    --------
    >>> from hypothesis import find
    >>> problem = find(contractions(), lambda problem: problem.size >= 2)
    >>> problem.name, problem.size
    ('contraction', 2)
    """
    n, generator = draw(st.integers(1, most)), draw(generators())
    M = _normal(generator, n, n)
    lipschitz = draw(st.floats(0.05, factor))
    M = lipschitz * M / torch.linalg.matrix_norm(M, 2).clamp_min(1e-12)
    b, c = _normal(generator, n), 0.5 * _normal(generator, n)
    kappa = (1 + lipschitz) / (1 - lipschitz)
    return RandomProblem(
        "contraction", bilevel.fixed_point, skewed, torch.zeros(n, dtype=_F64), (M, b, c), lambda M, b, c: b + c, kappa
    )


def problems(*, regular: bool = False, most: int = 5) -> st.SearchStrategy[RandomProblem]:
    """Draw a problem of any family.

    Parameters
    ----------
    regular
        Whether ill-conditioned and badly scaled problems are left out.
    most
        The largest n.

    Returns
    -------
    hypothesis.strategies.SearchStrategy
        Of :class:`RandomProblem`.

    Examples
    --------
    >>> from hypothesis import find
    >>> problem = find(problems(), lambda problem: problem.size >= 4)
    >>> problem.size
    4
    """
    families = [
        strongly_convex(most=most), merely_convex(most=most), nonconvex(most=most), roots(most=most),
        contractions(most=most),
    ]  # fmt: skip
    if not regular:
        families += [ill_conditioned(most=max(most, 2)), badly_scaled(most=max(most, 2))]
    return st.one_of(families)


@st.composite
def batches(draw: st.DrawFn, of: st.SearchStrategy[RandomProblem], *, most: int = 4) -> RandomBatch:
    """Draw problems like one that ``of`` draws: some arguments differ, along any of their axes, others are shared.

    Parameters
    ----------
    of
        The strategy of one problem.
    most
        The largest number of problems.

    Returns
    -------
    hypothesis.strategies.SearchStrategy
        Of :class:`RandomBatch`.

    Examples
    --------
    >>> from hypothesis import find
    >>> batch = find(batches(roots()), lambda batch: batch.size >= 3)
    >>> batch.size, len(batch.single(2))
    (3, 3)
    """
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
