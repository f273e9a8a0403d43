"""The product of the cones of a program. Equal neighbours are projected on as one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.func import vmap

from bilevel._torch.reverse import vjp
from bilevel.cones._cone import Cone, Nonnegative, Zero
from bilevel.errors import ArgumentError

__all__ = ["Product", "cones_of"]


@dataclass(frozen=True)
class _Run:
    """``count`` copies of one cone, from row ``start`` on."""

    cone: Cone
    count: int
    start: int

    @property
    def size(self) -> int:
        return self.cone.rows * self.count


class Product:
    """K = K₁ × K₂ × …, for vectors (..., m).

    Parameters
    ----------
    cones
        The factors, in the order of the rows.
    smoothing
        τ of the central path, or 0.
    """

    def __init__(self, cones: tuple[Cone, ...], smoothing: float) -> None:
        self.cones, self.smoothing = cones, smoothing
        self.size = sum(cone.rows for cone in cones)
        self.runs = tuple(_runs(cones))
        if smoothing:  # a cone that has no smoothing says so
            for run in self.runs:
                run.cone.smoothed(torch.zeros(run.cone.rows), smoothing)

    def project(self, v: torch.Tensor) -> torch.Tensor:
        """Return Π(v), or the point of the central path in its place."""
        return self._joined(v, self._one)

    def onto(self, v: torch.Tensor) -> torch.Tensor:
        """Return Π(v), without smoothing."""
        return self._joined(v, lambda cone, part: cone.project(part))

    def _one(self, cone: Cone, part: torch.Tensor) -> torch.Tensor:
        return cone.smoothed(part, self.smoothing) if self.smoothing else cone.project(part)

    def _joined(self, v: torch.Tensor, function: Callable[[Cone, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        parts = [function(run.cone, part).flatten(-2) for run, part in self._parts(v)]
        return torch.cat(parts, -1) if parts else v

    def _parts(self, v: torch.Tensor) -> Iterator[tuple[_Run, torch.Tensor]]:
        """Yield each run with its vectors (..., count, size)."""
        for run in self.runs:
            part = v[..., run.start : run.start + run.size]
            yield run, part.unflatten(-1, (run.count, run.cone.rows))

    def jacobian(self, v: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the blocks (batch, count, d, d) of the Jacobian of :meth:`project` at ``v`` (batch, m), and the rows (count, d) of each."""
        for run, part in self._parts(v):
            d = run.cone.rows
            _, pull = vjp(lambda p, run=run: self._one(run.cone, p), part)
            units = torch.eye(d, dtype=v.dtype, device=v.device)[:, None, None].expand(d, *part.shape)
            (block,) = vmap(pull)(units)
            rows = torch.arange(run.start, run.start + run.size, device=v.device).unflatten(-1, (run.count, d))
            yield block.movedim(0, -2), rows

    def slopes(self, v: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Return the products of the Jacobians of Π at ``v`` (batch, m), which are symmetric, with ``u`` (batch, m)."""
        parts = []
        for (run, part), (_, along) in zip(self._parts(v), self._parts(u), strict=True):
            _, pull = vjp(lambda p, run=run: run.cone.project(p), part)
            parts.append(pull(along)[0].flatten(-2))
        return torch.cat(parts, -1) if parts else u

    def kinks(self, v: torch.Tensor, primal: torch.Tensor, dual: torch.Tensor) -> torch.Tensor:
        """Return the first row (batch,) of a factor that ``v`` (batch, m) is at a kink of, or −1.

        An edge counts as zero that is below ``primal`` (batch,) if positive and a slack, or below ``dual`` (batch,) if it is a multiplier.
        """
        found = torch.full(v.shape[:1], -1, dtype=torch.int64, device=v.device)
        for run, part in reversed(list(self._parts(v))):
            edges = run.cone.edges(part)  # (batch, count, r)
            low, high = -dual[:, None, None], primal[:, None, None]
            near = ((edges >= low) & (edges <= high)).any(-1)
            first = near.to(torch.int8).argmax(-1) * run.cone.rows + run.start
            found = torch.where(near.any(-1), first, found)
        return found

    def name(self, row: int) -> str:
        """Return how a user would call the factor that ``row`` belongs to."""
        start = 0
        for number, cone in enumerate(self.cones):
            if row < start + cone.rows:
                of = f"row {row} of A x + s = b, in " if isinstance(cone, (Nonnegative, Zero)) else ""
                return f"{of}cones[{number}], {cone!r}"
            start += cone.rows
        raise AssertionError("no such row")

    def owners(self) -> list[int]:
        """Return a number for each row: that of the smallest factor that it belongs to."""
        numbers: list[int] = []
        for run in self.runs:
            first = numbers[-1] + 1 if numbers else 0
            numbers += [first + place // run.cone.rows for place in range(run.size)]
        return numbers

    def of_clarabel(self, clarabel: Any) -> list[Any]:
        """Return the factors in Clarabel's words."""
        return [cone.of_clarabel(clarabel) for cone in self.cones if cone.rows]


def _runs(cones: Iterable[Cone]) -> Iterator[_Run]:
    last: _Run | None = None
    start = 0
    for cone in cones:
        one, count = cone.copies()
        if last is not None and last.cone == one:
            last = _Run(one, last.count + count, last.start)
        else:
            if last is not None and last.count:
                yield last
            last = _Run(one, count, start)
        start += cone.rows
    if last is not None and last.count:
        yield last


def cones_of(where: str, given: Any, rows: int) -> tuple[Cone, ...]:
    """Return the cones that were given for ``rows`` rows, or say what is wrong with them."""
    if isinstance(given, Cone):
        given = (given,)
    if not isinstance(given, (list, tuple)) or not all(isinstance(cone, Cone) for cone in given):
        raise ArgumentError(
            f"{where}: expected cones to be a list of cones, got {given!r}; pass, for example, [bilevel.cones.Zero(1), bilevel.cones.SecondOrder(3)]"
        )
    total = sum(cone.rows for cone in given)
    if total != rows:
        raise ArgumentError(
            f"{where}: expected cones that take the {rows} rows of A, got {list(given)}, which take {total}; give each row a cone, in the order "
            "of the rows"
        )
    return tuple(given)
