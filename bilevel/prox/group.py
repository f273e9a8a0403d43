"""The group Lasso's norm: a term that makes whole groups of entries zero."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from bilevel.errors import ArgumentError, ShapeError
from bilevel.prox._base import (
    Manifold,
    Parameter,
    Term,
    as_parameter,
    check_nonnegative,
    detached,
    rounding,
    strength_of,
)
from bilevel.prox._margins import largest, least, relative

if TYPE_CHECKING:
    from numpy.typing import NDArray  # its import takes some milliseconds

__all__ = ["GroupL2"]


@dataclass(frozen=True, eq=False)
class GroupL2(Term):
    """g(x) = Σ_g s_g ‖x_g‖₂, the group Lasso's term.

    Parameters
    ----------
    strength
        s ≥ 0: a number or a tensor of shape (), or one for each group.
    groups
        Lists of indices into the entries of x in their order in memory (``x.reshape(-1)``), without overlaps. Entries in no group are
        not penalised. None: the groups are the rows of x, along its last axis, and strengths have the shape of x without it.

    Raises
    ------
    ArgumentError
        If a strength is negative or not finite, a group is empty, or an index is negative or occurs twice; on use, if an index is too large.
    ShapeError
        On use, if there are neither one strength nor one for each group.

    References
    ----------
    Yuan and Lin, Model selection and estimation in regression with grouped variables, 2006.

    Examples
    --------
    >>> import torch
    >>> from bilevel import prox
    >>> prox.GroupL2(1.0, groups=[[0, 1], [2]]).prox(torch.tensor([3.0, 4.0, 0.5]))
    tensor([2.4000, 3.2000, 0.0000])
    """

    strength: Parameter
    groups: Sequence[Sequence[int]] | None = None

    def __post_init__(self) -> None:
        check_nonnegative(self.where, "strength", self.strength)
        if self.groups is None:
            return
        try:
            groups = [[operator.index(entry) for entry in group] for group in self.groups]
        except TypeError:
            raise ArgumentError(
                f"{self.where}: expected groups to be lists of indices, got {self.groups!r}; pass such as [[0, 1], [2]]"
            ) from None
        seen: set[int] = set()
        for group in groups:
            if not group:
                raise ArgumentError(f"{self.where}: expected groups that are not empty, got {group!r}; leave it out")
            for entry in group:
                if entry < 0 or entry in seen:
                    raise ArgumentError(
                        f"{self.where}: expected each index in groups once and at least 0, got {entry} "
                        f"{'again' if entry in seen else 'below 0'}; give groups that do not overlap"
                    )
                seen.add(entry)

    @cached_property
    def _members(self) -> NDArray[np.int64]:
        """Return the indices in groups, and the number of the group of each, in two rows."""
        # No tensors: one made inside of a transform cannot be used outside of it.
        pairs = [(int(index), number) for number, group in enumerate(self.groups or ()) for index in group]
        return np.array(pairs, dtype=np.int64).reshape(-1, 2).T

    def _labels(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
        """Return the group of each entry (n,), one past the last for entries in none, and the shape of the groups."""
        if self.groups is None:
            if x.ndim == 0:
                raise ShapeError(f"{self.where}: expected x with at least one axis, got a number; pass L1 for it")
            shape, count, width = tuple(x.shape[:-1]), x.shape[:-1].numel(), x.shape[-1]
            return torch.arange(count, device=x.device).repeat_interleave(width), shape
        index, number = self._members
        if index.size and int(index.max()) >= x.numel():
            raise ArgumentError(
                f"{self.where}: expected indices below {x.numel()}, the number of entries of x, got {int(index.max())}; "
                "give groups of this x"
            )
        labels = np.full(x.numel(), len(self.groups), dtype=np.int64)
        labels[index] = number
        return torch.as_tensor(labels, device=x.device), (len(self.groups),)

    def _strength(self, x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        return strength_of(self.where, self.strength, x, shape).reshape(-1)

    def value(self, x: torch.Tensor) -> torch.Tensor:
        labels, shape = self._labels(x)
        strength = self._strength(x, shape)
        return (strength * _norms(x, labels, strength.numel())).sum()

    def prox(self, v: torch.Tensor, step: Parameter = 1.0) -> torch.Tensor:
        labels, shape = self._labels(v)
        threshold = as_parameter(step, v) * self._strength(v, shape)
        norms = _norms(v, labels, threshold.numel())
        kept = (norms > threshold) | threshold.isnan()
        factor = torch.where(kept, 1 - threshold / torch.where(kept, norms, 1.0), 0.0)
        return (v.reshape(-1) * _of_entries(factor, labels, 1.0)).reshape(v.shape)

    def manifold(self, x: torch.Tensor) -> Manifold:
        labels, shape = self._labels(x)
        strength = self._strength(x, shape)
        used = _norms(detached(x), labels, strength.numel()) > 0
        free = _of_entries(used | (detached(strength) == 0), labels, True).reshape(x.shape)

        def value(y: torch.Tensor) -> torch.Tensor:
            return torch.where(used, strength * _norms(y, labels, strength.numel()), 0.0).sum()

        return Manifold(lambda y: torch.where(free, y, 0.0), value, free)

    def margin(self, x: torch.Tensor, slope: torch.Tensor, step: Parameter = 1.0) -> torch.Tensor:
        labels, shape = self._labels(x)
        strength = self._strength(x, shape)
        norms, slopes = (_norms(part, labels, strength.numel()) for part in (x, slope))
        at_zero = 1 - slopes / torch.where(strength == 0, 1.0, strength)
        margins = torch.where(norms == 0, at_zero, relative(norms, largest(x)))
        return least(torch.where(strength == 0, float("inf"), margins))

    def proven_zero(self, slope: torch.Tensor, move: torch.Tensor) -> torch.Tensor:
        labels, shape = self._labels(slope)
        strength = self._strength(slope, shape)
        slopes, moves = (_norms(part, labels, strength.numel()) for part in (slope, move))
        rounded = 1 + rounding(slope)
        return _of_entries((slopes + moves) * rounded < strength, labels, False).reshape(slope.shape)

    def proven_nonzero(self, x: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
        """Return the entries of groups that are not zero, and those in no group that are not zero."""
        labels, shape = self._labels(x)
        norms = _norms(x, labels, self._strength(x, shape).numel()) * (1 - rounding(x))
        whole = _of_entries(norms > distance, labels, False).reshape(x.shape)
        return whole | (x.abs() > distance)


def _of_entries(values: torch.Tensor, labels: torch.Tensor, other: float) -> torch.Tensor:
    """Return the value of the group of each entry (n,), ``other`` for an entry in none."""
    return torch.cat([values, values.new_full((1,), other)])[labels]


def _norms(x: torch.Tensor, labels: torch.Tensor, count: int) -> torch.Tensor:
    """Return ‖x_g‖₂ (count,), with derivative 0 where it is 0. Squares do not underflow: x is divided by its largest entry."""
    scale = largest(detached(x))
    scale = torch.where(scale > 0, scale, 1.0)
    squares = (x.reshape(-1) / scale).square()
    sums = torch.zeros(count + 1, dtype=x.dtype, device=x.device).index_add(0, labels, squares)[:count]
    empty = sums == 0
    return torch.where(empty, 0.0, torch.where(empty, 1.0, sums).sqrt()) * scale
