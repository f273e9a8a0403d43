"""Batches of convex quadratic programs with dense data, and the iterates of searches on them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TypeVar

import torch

__all__ = ["DenseProgram", "Iterate", "ProgramBatch", "Rows", "largest", "mv", "tmv"]

T = TypeVar("T", bound="ProgramBatch")


def mv(matrix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return the products (B, m) of matrices (B, m, n) and vectors (B, n)."""
    # A row times a matrix: torch's product of many small matrices with a column takes three times as long.
    return torch.bmm(x.unsqueeze(1), matrix.mT).squeeze(1)


def tmv(matrix: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the products (B, n) of transposed matrices (B, m, n) and vectors (B, m)."""
    return torch.bmm(y.unsqueeze(1), matrix).squeeze(1)


class ProgramBatch:
    """A dataclass of tensors whose first axis is the batch."""

    def at(self: T, index: torch.Tensor) -> T:
        """Return the problems at ``index``."""
        chosen = {}
        for entry in fields(self):  # type: ignore[arg-type]
            value = getattr(self, entry.name)
            chosen[entry.name] = (
                None if value is None else value.at(index) if isinstance(value, ProgramBatch) else value[index]
            )
        return replace(self, **chosen)  # type: ignore[type-var]

    def put(self: T, index: torch.Tensor, other: T) -> None:
        """Write the problems of ``other`` to ``index``."""
        for entry in fields(self):  # type: ignore[arg-type]
            value = getattr(self, entry.name)
            if isinstance(value, ProgramBatch):
                value.put(index, getattr(other, entry.name))
            elif value is not None:
                value[index] = getattr(other, entry.name)


@dataclass(frozen=True, eq=False)
class Rows(ProgramBatch):
    """The rows C of Cx ≤ d: G, then −x on the side of lower bounds, then x on the side of upper bounds.

    Parameters
    ----------
    general
        G (B, m, n). A row of zeros stands for no constraint.
    below, above
        (B, n): 1 where the variable has the bound, 0 where the row is zero. None where no problem has such bounds.
    """

    general: torch.Tensor
    below: torch.Tensor | None
    above: torch.Tensor | None

    @property
    def splits(self) -> list[int]:
        """The numbers of rows of the three kinds."""
        n = self.general.shape[-1]
        return [self.general.shape[-2], 0 if self.below is None else n, 0 if self.above is None else n]

    def present(self) -> torch.Tensor:
        """Return which rows (B, rows) are not zero."""
        general = self.general.ne(0).any(-1)
        return torch.cat([general, *(side > 0 for side in (self.below, self.above) if side is not None)], -1)

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """Return C x (B, rows)."""
        parts = [mv(self.general, x)] if self.general.shape[-2] else []
        if self.below is not None:
            parts.append(-self.below * x)
        if self.above is not None:
            parts.append(self.above * x)
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0] if parts else x[:, :0]

    def transposed(self, z: torch.Tensor) -> torch.Tensor:
        """Return Cᵀ z (B, n)."""
        general, below, above = z.split(self.splits, -1)
        total = tmv(self.general, general) if self.general.shape[-2] else z.new_zeros(len(z), self.general.shape[-1])
        if self.below is not None:
            total = total - self.below * below
        if self.above is not None:
            total = total + self.above * above
        return total

    def gram(self, weights: torch.Tensor, onto: torch.Tensor) -> torch.Tensor:
        """Return ``onto`` + Cᵀ diag(weights) C, in new memory."""
        general, below, above = weights.split(self.splits, -1)
        if self.general.shape[-2]:
            made = torch.baddbmm(onto, self.general.mT, self.general * general.unsqueeze(-1))
        else:
            made = onto.clone()
        diagonal = made.diagonal(dim1=-2, dim2=-1)
        if self.below is not None:
            diagonal += self.below * below
        if self.above is not None:
            diagonal += self.above * above
        return made


@dataclass(frozen=True, eq=False)
class DenseProgram(ProgramBatch):
    """A batch of quadratic programs.

    Parameters
    ----------
    Q, q
        (B, n, n), symmetric positive semidefinite, and (B, n).
    A, b
        (B, p, n) and (B, p).
    rows, d
        C, and (B, rows) finite.
    """

    Q: torch.Tensor
    q: torch.Tensor
    A: torch.Tensor
    b: torch.Tensor
    rows: Rows
    d: torch.Tensor

    @cached_property
    def slope(self) -> torch.Tensor:
        """The largest entry (B,) of q."""
        return largest(self.q)

    @cached_property
    def sides(self) -> torch.Tensor:
        """The largest entry (B,) of b and d."""
        return largest(self.b, self.d)


@dataclass(frozen=True, eq=False)
class Iterate(ProgramBatch):
    """An iterate of a search.

    Parameters
    ----------
    x, y, s, z
        Unknowns (B, n), multipliers of the equations (B, p), slacks and multipliers of the rows (B, rows), both positive.
    steps
        (B,) int64.
    error
        (B,): the largest of the relative residuals of the optimality conditions.
    escaped
        (B,) bool: the iterate diverges along a ray that proves the problem or its dual infeasible.
    stuck
        (B,) bool: no step is possible, or none makes progress.
    best, idle
        (B,): the smallest error so far, and the number of steps since.
    tight
        (B, rows) bool: z > s in the scaled program. These rows seem active.
    """

    x: torch.Tensor
    y: torch.Tensor
    s: torch.Tensor
    z: torch.Tensor
    steps: torch.Tensor
    error: torch.Tensor
    escaped: torch.Tensor
    stuck: torch.Tensor
    best: torch.Tensor
    idle: torch.Tensor
    tight: torch.Tensor


def largest(*parts: torch.Tensor) -> torch.Tensor:
    """Return the largest absolute value (B,) in tensors (B, k), 0 of none."""
    found = [part.abs().amax(-1) for part in parts if part.shape[-1]]
    total = found[0] if found else parts[0].new_zeros(len(parts[0]))
    for other in found[1:]:
        total = torch.maximum(total, other)
    return total
