"""One case for each term: how it is made from its parameters, random parameters, and proximal points of another solver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bilevel import prox
from tests.prox import reference

Draw = Callable[[torch.Generator], tuple[torch.Tensor, ...]]
GROUPS = [[0, 3], [1], [4, 5, 2]]
ROWS = [[0, 1, 2], [3, 4, 5]]


@dataclass(frozen=True)
class Case:
    """A term.

    Parameters
    ----------
    name
        For the test's name.
    build
        Makes the term from its parameters.
    draw
        Draws parameters (float64).
    shape
        Of x.
    solve
        (v, step, *parameters) -> the proximal point, in numpy.
    is_set
        Whether the term is the indicator function of a set.
    curved
        Whether the manifold, or the term on it, is curved.
    """

    name: str
    build: Callable[..., prox.Term]
    draw: Draw
    shape: tuple[int, ...]
    solve: Callable[..., Any]
    is_set: bool = False
    curved: bool = False

    def __str__(self) -> str:
        return self.name


def uniform(*shape: int, low: float = 0.2, high: float = 1.0) -> Draw:
    def draw(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        return (low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64),)

    return draw


def both(*draws: Draw) -> Draw:
    return lambda generator: tuple(value for draw in draws for value in draw(generator))


def normal(*shape: int) -> Draw:
    return lambda generator: (torch.randn(shape, generator=generator, dtype=torch.float64),)


def nothing(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    return ()


def marginals(rows: int, columns: int) -> Draw:
    """Draw the marginals by their logarithms, so that they have one sum."""
    return both(normal(rows), normal(columns))


def transport(row: torch.Tensor, column: torch.Tensor) -> prox.Term:
    return prox.TransportPolytope(row.softmax(0), column.softmax(0))


def solve_transport(v: Any, step: float, row: Any, column: Any) -> Any:
    n, m = v.shape
    row, column = np.exp(row) / np.exp(row).sum(), np.exp(column) / np.exp(column).sum()

    def blocks(x: Any) -> Any:
        cells = x.reshape(n, m, n * m)
        return [
            reference.positive(x), reference.zero(cells.sum(1), -row), reference.zero(cells.sum(0)[:-1], -column[:-1]),
        ]  # fmt: skip

    return reference.projection(v, blocks)


def project(blocks: Callable[..., Any]) -> Callable[..., Any]:
    return lambda v, step, *parameters: reference.projection(v, lambda x: blocks(x, *parameters))


def box_blocks(x: Any, lower: Any, upper: Any) -> Any:
    return [reference.positive(x, -lower), reference.positive(-x, upper)]


def simplex_blocks(x: Any, radius: Any) -> Any:
    cells = x.reshape(2, 3, -1)
    return [reference.positive(x), reference.zero(cells.sum(1), -radius)]


def cone_blocks(x: Any) -> Any:
    return [reference.second_order(part) for part in x.reshape(2, -1, x.shape[-1])]


def ball_blocks(x: Any, radius: Any, centre: Any) -> Any:
    rows = np.concatenate([np.zeros_like(x[:1]), x])
    return [reference.second_order(rows, np.concatenate([[float(radius)], -centre]))]


CASES = [
    Case("L1", prox.L1, uniform(), (5,), reference.l1),
    Case("L1 each", prox.L1, uniform(2, 3), (2, 3), reference.l1),
    Case("ElasticNet", prox.ElasticNet, both(uniform(), uniform(5)), (5,), reference.l1, curved=True),
    Case(
        "GroupL2", lambda s: prox.GroupL2(s, groups=GROUPS), uniform(3), (7,),
        lambda v, step, s: reference.group_l2(v, step, s, GROUPS), curved=True,
    ),
    Case(
        "GroupL2 rows", prox.GroupL2, uniform(), (2, 3),
        lambda v, step, s: reference.group_l2(v, step, s, ROWS), curved=True,
    ),
    Case("LInf", prox.LInf, uniform(low=0.5, high=2.0), (5,), reference.linf),
    Case("NuclearNorm", prox.NuclearNorm, uniform(), (3, 4), reference.nuclear, curved=True),
    Case("NuclearNorm square", prox.NuclearNorm, uniform(low=1.0, high=2.0), (4, 4), reference.nuclear, curved=True),
    Case("TotalVariation1D", prox.TotalVariation1D, uniform(), (9,), reference.total_variation),
    Case("NonNegative", prox.NonNegative, nothing, (5,), project(lambda x: [reference.positive(x)]), is_set=True),
    Case(
        "Box", prox.Box, both(uniform(low=-1.0, high=0.0), uniform(5, low=0.1, high=0.9)), (5,), project(box_blocks),
        is_set=True,
    ),
    Case("Simplex", prox.Simplex, uniform(2, low=0.5, high=2.0), (2, 3), project(simplex_blocks), is_set=True),
    Case(
        "L1Ball", prox.L1Ball, uniform(low=0.5, high=3.0), (5,), lambda v, step, r: reference.l1_ball(v, r), is_set=True
    ),
    Case(
        "L2Ball", prox.L2Ball, both(uniform(low=0.5, high=3.0), normal(5)), (5,), project(ball_blocks), is_set=True,
        curved=True,
    ),
    Case(
        "AffineSet", prox.AffineSet, both(normal(2, 6), normal(2)), (2, 3),
        project(lambda x, A, b: [reference.zero(A @ x, -b)]), is_set=True,
    ),
    Case(
        "HalfSpace", prox.HalfSpace, both(normal(5), normal()), (5,),
        project(lambda x, a, b: [reference.positive(-a @ x, float(b))]), is_set=True,
    ),
    Case("SecondOrderCone", prox.SecondOrderCone, nothing, (2, 4), project(cone_blocks), is_set=True, curved=True),
    Case("PSDCone", prox.PSDCone, nothing, (4, 4), lambda v, step: reference.psd(v), is_set=True, curved=True),
    Case("TransportPolytope", transport, marginals(3, 4), (3, 4), solve_transport, is_set=True),
    Case("Zero", prox.Zero, nothing, (3,), lambda v, step: v),
]  # fmt: skip


def draws(case: Case, seed: int, scale: float = 1.0) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Return a random v of the case's shape, and parameters."""
    generator = torch.Generator().manual_seed(seed)
    parameters = case.draw(generator)
    return scale * torch.randn(case.shape, generator=generator, dtype=torch.float64), parameters
