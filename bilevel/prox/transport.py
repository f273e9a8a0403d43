"""The transport polytope: non-negative matrices with given row and column sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel._torch.factorisations import pinv
from bilevel._torch.transforms import outside_autocast
from bilevel.errors import ArgumentError, ShapeError
from bilevel.prox._base import (
    Manifold,
    Parameter,
    Term,
    as_parameter,
    check_nonnegative,
    detached,
    no_value,
    readable,
)
from bilevel.prox._batched import batched
from bilevel.prox._margins import least, relative, scale_of
from bilevel.prox._transport import SUM_ROUNDING, least_cycle_mean, support_of, system_of

__all__ = ["TransportPolytope"]

# In units of rounding of a sum.
_NO_MASS = 8.0


@dataclass(frozen=True, eq=False)
class TransportPolytope(Term):
    """The indicator function of {X ≥ 0: X 1 = row, Xᵀ 1 = column}, the transport plans between two marginals.

    The projection solves the dual problem by Newton's method, which takes some 10 to 50 factorisations of order n + m.

    A plan whose positive entries do not connect all rows and columns is a special case: some entries of ``row`` and some of ``column``
    have one sum. The derivative is then right only for changes of the marginals that keep these sums equal, and for changes of all else.

    Parameters
    ----------
    row
        (n,), at least 0.
    column
        (m,), at least 0, with the same sum.

    Raises
    ------
    ArgumentError
        If a marginal is negative or not finite, or if the sums differ by more than rounding.
    ShapeError
        If a marginal is not a vector; on use, if x is not of shape (n, m).

    References
    ----------
    Blondel, Seguy and Rolet, Smooth and sparse optimal transport, 2018; Li, Sun and Toh, On the efficient computation of a generalized Jacobian of
    the projector over the Birkhoff polytope, 2020.

    Examples
    --------
    >>> import torch
    >>> from bilevel import prox
    >>> plans = prox.TransportPolytope(torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.5]))
    >>> plans.prox(torch.tensor([[0.8, 0.0], [0.0, 0.8]]))
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]])
    """

    row: torch.Tensor
    column: torch.Tensor

    def __post_init__(self) -> None:
        for name, marginal in (("row", self.row), ("column", self.column)):
            if not isinstance(marginal, torch.Tensor) or marginal.ndim != 1 or not marginal.numel():
                got = tuple(marginal.shape) if isinstance(marginal, torch.Tensor) else repr(marginal)
                raise ShapeError(
                    f"{self.where}: expected {name} to be a vector, got {got}; pass a tensor of shape (n,)"
                )
            check_nonnegative(self.where, name, marginal)
        if not (readable(self.row) and readable(self.column)):
            return
        sums = [detached(marginal).double().sum() for marginal in (self.row, self.column)]
        kinds = [marginal.dtype for marginal in (self.row, self.column) if marginal.is_floating_point()]
        allowed = SUM_ROUNDING * max((torch.finfo(kind).eps for kind in kinds), default=0.0) * sums[0]
        if bool((sums[0] - sums[1]).abs() > allowed) or not bool(sums[0] > 0):
            raise ArgumentError(
                f"{self.where}: expected row and column with one positive sum, got {sums[0].item():g} and "
                f"{sums[1].item():g}; scale one of them"
            )

    def _marginals(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        row, column = as_parameter(self.row, x), as_parameter(self.column, x)
        if x.shape != (row.shape[0], column.shape[0]):
            raise ShapeError(
                f"{self.where}: expected x of shape {(row.shape[0], column.shape[0])}, one row for each entry of row and "
                f"one column for each of column, got {tuple(x.shape)}; exchange row and column, or reshape x"
            )
        return row, column

    def value(self, x: torch.Tensor) -> torch.Tensor:
        return no_value(x)

    def prox(self, v: torch.Tensor, step: Parameter = 1.0) -> torch.Tensor:
        row, column = self._marginals(v)
        support, rest, solved = batched(support_of, v, row, column)
        # The potentials change no projection, and without them a large v has no rounding of its size.
        plan = _with_support(rest + (v - detached(v)), support, _inverse(support), row, column)
        plan = torch.where(_carrying(plan, row, column), plan, 0.0)
        return torch.where(solved, plan, float("nan"))

    def manifold(self, x: torch.Tensor) -> Manifold:
        row, column = self._marginals(x)
        support = _carrying(x, row, column).to(x.dtype)
        inverse = _inverse(support)
        return Manifold(lambda y: _with_support(y, support, inverse, row, column))

    def margin(self, x: torch.Tensor, slope: torch.Tensor, step: Parameter = 1.0) -> torch.Tensor:
        row, column = self._marginals(x)
        move = detached(as_parameter(step, x) * slope)
        support = _carrying(x, row, column).to(x.dtype)
        potentials = _potentials(move, support, _inverse(support))
        # Positive costs off the support prove the plan; only the cycles that leave the support count.
        (dual,) = batched(least_cycle_mean, move - potentials, support)
        primal = torch.where(support > 0, x, float("inf"))
        return least(relative(torch.cat([primal.reshape(-1), dual.reshape(-1)]), scale_of(x, move)))


def _carrying(plan: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """Return which entries carry mass, bool: an entry below the rounding of its row's and its column's sum is a zero that rounding moved."""
    sums = torch.minimum(detached(row).unsqueeze(-1), detached(column).unsqueeze(-2))
    return detached(plan) > _NO_MASS * torch.finfo(plan.dtype).eps * sums


def _inverse(support: torch.Tensor) -> torch.Tensor:
    """Return the pseudo-inverse (n + m, n + m) of the matrix of the equations for the potentials."""
    (inverse,) = batched(_pseudo_inverse, support)
    return inverse


def _pseudo_inverse(support: torch.Tensor) -> tuple[torch.Tensor]:
    matrix = system_of(support)
    rtol = matrix.shape[-1] * torch.finfo(matrix.dtype).eps
    return (pinv(matrix, rtol=rtol, hermitian=True),)


@outside_autocast
def _potentials(y: torch.Tensor, support: torch.Tensor, inverse: torch.Tensor, *sums: torch.Tensor) -> torch.Tensor:
    """Return the α_i + β_j by which y has to be reduced on the support, for its sums to become ``sums`` (rows, columns), or 0."""
    rest = torch.cat([(support * y).sum(-1), (support * y).sum(-2)], -1)
    if sums:
        rest = rest - torch.cat(sums, -1)
    found = (inverse @ rest.unsqueeze(-1)).squeeze(-1)
    return found[: y.shape[-2]].unsqueeze(-1) + found[y.shape[-2] :].unsqueeze(-2)


def _with_support(
    y: torch.Tensor, support: torch.Tensor, inverse: torch.Tensor, row: torch.Tensor, column: torch.Tensor
) -> torch.Tensor:
    """Return the projection of y on the matrices with these sums that are zero off the support; the second pass removes rounding."""
    used = support > 0
    made = torch.where(used, y, 0.0)
    for _ in range(2):
        made = torch.where(used, made - _potentials(made, support, inverse, row, column), 0.0)
    return made
