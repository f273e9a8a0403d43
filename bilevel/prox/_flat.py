"""The terms of one problem as one term of a flat vector: a sum of a term for each leaf of the unknown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bilevel.prox._base import Manifold, Term
from bilevel.prox._entries import Entries
from bilevel.prox.box import Box, NonNegative
from bilevel.prox.l1 import L1, ElasticNet

__all__ = ["FlatTerm"]

# Terms that :meth:`Term._entries` describes. A class derived from one of them may have another prox.
_OF_ENTRIES = (L1, ElasticNet, NonNegative, Box)


@dataclass(frozen=True, eq=False)
class FlatTerm:
    """g(x) = Σ g_i(x_i) of a vector (n,), whose leaves x_i have ``shapes``; ``terms`` holds None for leaves without a term."""

    terms: Sequence[Term | None]
    shapes: Sequence[torch.Size]

    @property
    def separable(self) -> bool:
        """Whether g is a sum of functions of one entry each."""
        return all(term is None or term.separable for term in self.terms)

    @property
    def has_manifold(self) -> bool:
        """Whether all terms name their manifolds."""
        return all(term is None or term.has_manifold for term in self.terms)

    def entries(self, like: torch.Tensor) -> Entries | None:
        """Return g of vectors like ``like`` (n,) as numbers for each entry; None if a term is no such term."""
        parts = []
        for term, part in zip(self.terms, self._split(like), strict=True):
            if term is not None and type(term) not in _OF_ENTRIES:
                return None
            made = Entries() if term is None else term._entries(part)
            assert made is not None
            parts.append(made)
        return Entries.joined(parts, [shape.numel() for shape in self.shapes], like)

    def prox(self, v: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """Return prox_{step·g}(v) (n,)."""
        return self._each(lambda term, part: part if term is None else term.prox(part, step), v)

    def value(self, x: torch.Tensor) -> torch.Tensor:
        """Return g(x) ()."""
        return _sum_of([t.value(part) for t, part in zip(self.terms, self._split(x), strict=True) if t is not None], x)

    def margin(self, x: torch.Tensor, slope: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """Return the least margin of the terms, ()."""
        leaves = zip(self.terms, self._split(x), self._split(slope), strict=True)
        margins = [term.margin(part, s, step) for term, part, s in leaves if term is not None]
        if len(margins) == 1:
            return margins[0]
        return torch.stack(margins).min() if margins else x.new_ones(())

    def proven_zero(self, slope: torch.Tensor, move: torch.Tensor) -> torch.Tensor:
        """Return which entries of a minimiser are proven to be zero, bool (n,); see :meth:`Term.proven_zero`."""
        leaves = zip(self.terms, self._split(slope), self._split(move), strict=True)
        return _joined(
            [torch.zeros_like(s, dtype=torch.bool) if t is None else t.proven_zero(s, m) for t, s, m in leaves]
        )

    def proven_nonzero(self, x: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
        """Return which entries of a point within ``distance`` () of ``x`` are not zero, bool (n,)."""
        return self._each(lambda t, part: part.abs() > distance if t is None else t.proven_nonzero(part, distance), x)

    def convexity(self, x: torch.Tensor) -> torch.Tensor:
        """Return c (n,) so that g(x) − ½ Σ c_j x_j² is convex."""
        return self._each(lambda t, part: torch.zeros_like(part) if t is None else t.convexity(part), x)

    def manifold(self, x: torch.Tensor) -> Manifold:
        """Return the manifold of x; of its ``free`` entries, those of a leaf whose manifold fixes no single entries are all."""
        found = [
            None if term is None else term.manifold(part) for term, part in zip(self.terms, self._split(x), strict=True)
        ]
        if len(found) == 1 and found[0] is not None and len(self.shapes[0]) == 1 and found[0].free is not None:
            return found[0]

        def retract(y: torch.Tensor) -> torch.Tensor:
            parts = zip(found, self._split(y), strict=True)
            return _joined([part if m is None else m.retract(part) for m, part in parts])

        def value(y: torch.Tensor) -> torch.Tensor:
            parts = zip(found, self._split(y), strict=True)
            return _sum_of([m.value(part) for m, part in parts if m is not None], y)

        flags = [
            torch.ones_like(part, dtype=torch.bool) if m is None or m.free is None else m.free
            for m, part in zip(found, self._split(x), strict=True)
        ]
        return Manifold(retract, value, _joined(flags))

    def _split(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Return the leaves of a vector (n,), all in its dtype."""
        if len(self.shapes) == 1:
            return [flat.reshape(self.shapes[0])]
        parts = torch.split(flat, [shape.numel() for shape in self.shapes])
        return [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def _each(self, function: Callable[[Term | None, torch.Tensor], torch.Tensor], flat: torch.Tensor) -> torch.Tensor:
        return _joined([function(term, part) for term, part in zip(self.terms, self._split(flat), strict=True)])


def _sum_of(values: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    if len(values) == 1:
        return values[0]
    return torch.stack(list(values)).sum() if values else like.new_zeros(())


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0].reshape(-1) if len(parts) == 1 else torch.cat([part.reshape(-1) for part in parts])
