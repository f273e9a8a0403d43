"""Equilibria: each player's x_i minimises its own objective f_i(x_1, …, x_N, θ), given the others.

The first-order conditions ∇_{x_i} f_i = 0 are stacked to one residual R(x, θ) = 0 of as many equations as unknowns. ∂_x R is not symmetric. The
blocks on its diagonal are the Hessians of the players, positive semi-definite at an equilibrium.

With bounds l ≤ x ≤ u and F = (∇_{x_i} f_i), the conditions are a variational inequality. The natural map vanishes at its solutions::

    R(x, θ) = x − Π(Π x − F(Π x)),      Π the projection onto the box [l, u]

A player with a proximal term g_i has prox_{g_i} in place of the outer projection, and none in place of the inner one.

Newton's method on it is the semismooth one. Near a solution where no bound is active with a zero slope, R is smooth, and ∂_x R is regular where the
Jacobian of F on the free unknowns is: the usual rule gives derivatives of every order, also by the bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from bilevel._torch.double_backward import Repeatable
from bilevel._torch.factorisations import eigvalsh
from bilevel._torch.norms import WrittenNorms
from bilevel._torch.reverse import grad
from bilevel._torch.tree_spec import children
from bilevel.equations.player_bounds import PlayerBounds
from bilevel.equations.player_terms import PlayerTerms, margins_of, prox_of
from bilevel.equations.problem import Problem
from bilevel.equations.system import RootSystem
from bilevel.errors import DtypeError, ShapeError
from bilevel.operators import LinearOperator
from bilevel.prox._base import already_checked
from bilevel.prox._flat import FlatTerm

__all__ = [
    "BoundState",
    "EquilibriumSystem",
    "Players",
    "SlopeSystem",
    "bound_state",
    "check_players",
    "player_at_fault",
]

# Up to these sizes the players' Hessians are materialised.
_DENSE_ORDER, _DENSE_NUMBERS = 512, 2**24
# Products for each player's least curvature, where they are not.
_PRODUCTS = 30


@dataclass(frozen=True)
class Players:
    """The objectives, as one function (players, *args, **kwargs) ↦ tuple of values; ``players`` is the tuple of unknowns."""

    objectives: tuple[Callable[..., torch.Tensor], ...]
    lower: PlayerBounds | None = None
    upper: PlayerBounds | None = None
    terms: PlayerTerms | None = None

    @property
    def bounded(self) -> bool:
        """Whether a player has a bound or a proximal term."""
        return self.lower is not None or self.upper is not None or self.terms is not None

    def __call__(self, players: tuple[Any, ...], *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        return tuple(objective(*players, *args, **kwargs) for objective in self.objectives)


@dataclass(frozen=True, eq=False)
class EquilibriumSystem(RootSystem):
    """R = (∇_{x_1} f_1, …, ∇_{x_N} f_N), or with bounds the natural map of these."""

    noun = "objectives"
    label = "equilibrium"

    @property
    def players(self) -> int:
        """N."""
        assert isinstance(self.function, Players)
        return len(self.function.objectives)

    def as_a(self, kind: type[EquilibriumSystem]) -> EquilibriumSystem:
        """Return another function of the same players and tensors, of this ``kind``."""
        return kind(**{field.name: getattr(self, field.name) for field in fields(self)})

    @property
    def has_kinks(self) -> bool:
        """Whether a player has a bound or a proximal term."""
        assert isinstance(self.function, Players)
        return self.function.bounded

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many unknowns each player has."""
        shapes, sizes = iter(self.raveler.real_shapes), []
        for part in children(self.raveler.structure):
            sizes.append(sum(next(shapes).numel() for _ in range(part.num_leaves)))
        return tuple(sizes)

    def value(self, player: int, flat: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        """Return f_i () of one problem."""
        assert isinstance(self.function, Players)
        objective = self.function.objectives[player]

        def own(players: tuple[Any, ...], *args: Any, **kwargs: Any) -> Any:
            return objective(*players, *args, **kwargs)

        found = replace(self, function=own).call(flat, *tensors)
        if not isinstance(found, torch.Tensor) or found.ndim or not found.dtype.is_floating_point:
            got = f"{tuple(found.shape)} {found.dtype}" if isinstance(found, torch.Tensor) else type(found).__name__
            kind = DtypeError if isinstance(found, torch.Tensor) and found.is_complex() else ShapeError
            raise kind(
                f"{self.where}: expected the objective of player {player} to return a floating-point scalar tensor of shape (), got {got}; reduce "
                "it, for example with .sum() or .mean()"
            )
        return found

    def output(self, flat: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        """Return R (n,) of one problem."""
        assert isinstance(self.function, Players)
        if not self.function.bounded:
            return self.slopes(flat, *tensors)
        lower, upper = self.bounds(flat, *tensors)
        inside = torch.minimum(torch.maximum(flat, lower), upper)
        moved = inside - self.slopes(inside, *tensors)
        return flat - self.landed(moved, lower, upper, *tensors)

    def landed(
        self,
        moved: torch.Tensor,
        lower: torch.Tensor,
        upper: torch.Tensor,
        *tensors: torch.Tensor,
        step: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the projections, or the proximal points with this ``step`` (), by default 1, of the players' ``moved`` (n,)."""
        inside = torch.minimum(torch.maximum(moved, lower), upper)
        terms = self.terms(moved, *tensors)
        return inside if terms is None else prox_of(terms, self.sizes, inside, step)

    def terms(self, flat: torch.Tensor, *tensors: torch.Tensor) -> list[FlatTerm | None] | None:
        """Return the players' terms of one problem, or None."""
        game = self.function
        assert isinstance(game, Players)
        if game.terms is None:
            return None
        made = game.terms

        def own(players: tuple[Any, ...], *args: Any, **kwargs: Any) -> list[FlatTerm | None]:
            return made(self.where, players, args, kwargs)

        with already_checked():
            found: list[FlatTerm | None] = replace(self, function=own).call(flat, *tensors)
        return found

    def bounds(self, flat: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the lower and upper bounds (n,) of one problem."""
        game = self.function
        assert isinstance(game, Players)

        def own(players: tuple[Any, ...], *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
            infinite = torch.full_like(flat, torch.inf)
            low = -infinite if game.lower is None else game.lower(self.where, players, args, kwargs)
            high = infinite if game.upper is None else game.upper(self.where, players, args, kwargs)
            return low, high

        found: tuple[torch.Tensor, torch.Tensor] = replace(self, function=own).call(flat, *tensors)
        return found

    def slopes(self, flat: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        """Return F (n,) of one problem."""
        parts = list(torch.split(flat, list(self.sizes)))
        slopes = []
        for player, part in enumerate(parts):

            def own(moved: torch.Tensor, player: int = player) -> torch.Tensor:
                return self.value(player, torch.cat([*parts[:player], moved, *parts[player + 1 :]]), *tensors)

            # These are differentiated from outside again.
            with WrittenNorms(), Repeatable():
                slopes.append(grad(own, part)[0])
        return torch.cat(slopes)


@dataclass(frozen=True, eq=False)
class BoundState:
    """How ``x`` stands to its bounds and terms; every tensor (batch, n).

    ``degenerate``: on a bound with a zero slope. ``at_kink``: of a player whose term is at a kink. ``landed``: x, exactly on its bounds and on the
    manifolds of its terms.
    """

    lower: torch.Tensor
    upper: torch.Tensor
    degenerate: torch.Tensor
    at_kink: torch.Tensor
    landed: torch.Tensor


def bound_state(problem: Problem, x: torch.Tensor) -> BoundState | None:
    """Return how the solution ``x`` (batch, n) stands to its bounds and terms, to half of the digits.

    None without bounds.
    """
    system = problem.system
    assert isinstance(system, EquilibriumSystem) and isinstance(system.function, Players)
    if not system.function.bounded:
        return None
    lower, upper, slopes, margins, landed = _pieces_of(system, x, problem)
    tiny = torch.finfo(x.dtype).eps ** 0.5
    close = tiny * (1 + x.abs())
    at_lower, at_upper = x - lower <= close, upper - x <= close
    flat = slopes.abs() <= tiny * (1 + slopes.abs().amax(-1, keepdim=True))
    pinned = upper - lower <= close  # a slope of any sign is right there
    degenerate = (at_lower | at_upper) & flat & ~pinned
    return BoundState(lower, upper, degenerate, margins <= tiny, landed)


def _pieces_of(system: EquilibriumSystem, x: torch.Tensor, problem: Problem) -> tuple[torch.Tensor, ...]:
    """Return the lower bounds, the upper bounds and F at ``x``, and what terms say of it (each (batch, n)): see :class:`_Pieces`."""
    pieces = system.as_a(_Pieces)
    made = pieces.outputs(problem.shaped(x), *problem.tensors).detach()  # (*batch, 5, n)
    return made.reshape(len(x), 5, x.shape[-1]).unbind(1)


@dataclass(frozen=True, eq=False)
class _Pieces(EquilibriumSystem):
    """What R is made of, in place of R: bounds, F, the distances from kinks, and x on its manifold."""

    def output(self, flat: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        lower, upper = self.bounds(flat, *tensors)
        slopes, terms = self.slopes(flat, *tensors), self.terms(flat, *tensors)
        landed = torch.minimum(torch.maximum(flat, lower), upper)
        margins = torch.ones_like(flat)
        if terms is not None:
            mine = torch.cat([part.new_full(part.shape, term is not None, dtype=torch.bool) for term, part in zip(
                terms, torch.split(flat, list(self.sizes)), strict=True)])  # fmt: skip
            landed = torch.where(mine, prox_of(terms, self.sizes, flat - slopes), landed)
            margins = margins_of(terms, self.sizes, landed, slopes)
        return torch.stack([lower, upper, slopes, margins, landed])


def player_at_fault(problem: Problem, x: torch.Tensor, doubtful: torch.Tensor) -> torch.Tensor:
    """Return, per problem, the first player whose own Hessian has a negative eigenvalue beyond rounding at ``x`` (batch, n), or −1.

    Only directions count in which the player can move. With the derivative D of the proximal point, and K the curvature of the player's term along
    its manifold, D is the inverse of I + K there, and zero across it. So D J_i, transposed, is D (H_i + K) D: J_i = I − D + D H_i is the player's
    block of the natural map's Jacobian.

    Small Hessians are decomposed. Of large ones, the least Ritz value of a short Lanczos run, which can only overestimate the least eigenvalue.
    """
    system = problem.system
    assert isinstance(system, EquilibriumSystem)
    found = torch.full(doubtful.shape, -1, dtype=torch.int64, device=x.device)
    if not bool(doubtful.any()):
        return found
    dense = problem.size <= _DENSE_ORDER and problem.batch * problem.size**2 <= _DENSE_NUMBERS
    operator = (problem.linearize_dense if dense else problem.linearize)(x).operator
    landing = _landing(problem, x, dense=dense) if system.has_kinks else None
    first = 0
    for player, size in enumerate(system.sizes):
        rows = slice(first, first + size)
        first += size
        if not size:
            continue
        if dense:
            hessian = operator.dense()[:, rows, rows]
            hessian = hessian if landing is None else hessian @ landing.dense()[:, rows, rows].mT
        else:
            hessian = _projected(operator.matvec, None if landing is None else landing.rmatvec, x, rows)
        values = eigvalsh(0.5 * (hessian + hessian.mT))
        largest = values.abs().amax(dim=-1)
        # The natural map's Jacobian is a difference of matrices of size 1.
        largest = largest if landing is None else largest.clamp_min(1.0)
        doubt = 1e3 * size * torch.finfo(x.dtype).eps * largest
        found = torch.where((found < 0) & doubtful & (values[:, 0] < -doubt), player, found)
    return found


def _landing(problem: Problem, x: torch.Tensor, *, dense: bool) -> LinearOperator:
    """Return the derivative of the players' projections and proximal points at x − F(x)."""
    system = problem.system
    assert isinstance(system, EquilibriumSystem)
    slopes, landed = (Problem(system.as_a(kind), problem.tensors) for kind in (SlopeSystem, _Landed))
    moved = x - slopes.residual(x)
    return (landed.linearize_dense if dense else landed.linearize)(moved).operator


@dataclass(frozen=True, eq=False)
class SlopeSystem(EquilibriumSystem):
    """F = 0."""

    def output(self, flat: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        return self.slopes(flat, *tensors)


@dataclass(frozen=True, eq=False)
class _Landed(EquilibriumSystem):
    """The proximal points of the players, in place of R."""

    def output(self, flat: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        return self.landed(flat, *self.bounds(flat, *tensors), *tensors)


def _projected(
    matvec: Callable[[torch.Tensor], torch.Tensor],
    landing: Callable[[torch.Tensor], torch.Tensor] | None,
    x: torch.Tensor,
    rows: slice,
) -> torch.Tensor:
    """Return a player's Hessian, behind the transpose of ``landing``, projected on a Krylov space (batch, k, k)."""
    basis: list[torch.Tensor] = []
    products: list[torch.Tensor] = []
    size = rows.stop - rows.start
    places = torch.arange(1, size + 1, dtype=torch.float64, device=x.device)
    v = (torch.frac(places * 0.7548776662466927) - 0.5).to(x).expand(len(x), size)
    for _ in range(min(_PRODUCTS, size)):
        for _ in range(2):
            for known in basis:
                v = v - torch.linalg.vecdot(v, known).unsqueeze(-1) * known
        length = v.norm(dim=-1, keepdim=True)
        v = v / torch.where(length > 0, length, 1.0)
        whole = torch.zeros_like(x)
        whole[:, rows] = v
        basis.append(v)
        v = matvec(whole if landing is None else landing(whole))[:, rows]
        products.append(v)
    return torch.stack(basis, 1) @ torch.stack(products, 2)


def check_players(where: str, objectives: Sequence[Any], init: Any) -> None:
    """Raise unless ``init`` is a tuple or list with one part for each objective."""
    if not isinstance(init, (tuple, list)) or len(init) != len(objectives):
        got = f"{type(init).__name__} of {len(init)}" if isinstance(init, (tuple, list)) else type(init).__name__
        raise ShapeError(
            f"{where}: expected init to be a tuple of {len(objectives)}, one part for each player, got {got}; write layer((x_1, x_2), *args)"
        )
