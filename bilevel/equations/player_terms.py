"""Proximal terms of the players of a game."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bilevel.equations.player_entries import PlayerEntries
from bilevel.errors import ArgumentError, ShapeError
from bilevel.prox._base import Term
from bilevel.prox._flat import FlatTerm

__all__ = ["PlayerTerms", "margins_of", "prox_of"]


@dataclass(frozen=True)
class PlayerTerms(PlayerEntries):
    """``prox`` of a game: terms."""

    kinds = (Term,)
    words = ("term", "term", "a term of bilevel.prox", "bilevel.prox.L1(1.0)")

    def __call__(
        self, where: str, players: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[FlatTerm | None]:
        """Return the term of each player, flat."""
        found: list[FlatTerm | None] = []
        for name, made, leaves in self.evaluated(players, args, kwargs):
            if made is None:
                found.append(None)
                continue
            terms = [made] if isinstance(made, Term) else pytree.tree_leaves(made)
            wrong = next((term for term in terms if term is not None and not isinstance(term, Term)), None)
            if wrong is not None:
                raise ArgumentError(
                    f"{where}: expected {name} to return a term of bilevel.prox, got {type(wrong).__name__}; return one"
                )
            if len(terms) != len(leaves) or any(leaf.is_complex() for leaf in leaves):
                raise ShapeError(
                    f"{where}: expected {name} to have one term for each of the {len(leaves)} real tensors of the player, got {len(terms)}; "
                    "give it the structure of the player's unknown, with None for a tensor without a term"
                )
            found.append(FlatTerm(terms, [leaf.shape for leaf in leaves]))
        return found


def prox_of(
    terms: list[FlatTerm | None], sizes: tuple[int, ...], v: torch.Tensor, step: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the proximal points (n,) of all players, with this ``step`` (), by default 1; v where a player has no term."""
    step, parts = v.new_ones(()) if step is None else step, zip(terms, torch.split(v, list(sizes)), strict=True)
    return torch.cat([part if term is None else term.prox(part, step) for term, part in parts])


def margins_of(
    terms: list[FlatTerm | None], sizes: tuple[int, ...], x: torch.Tensor, slopes: torch.Tensor
) -> torch.Tensor:
    """Return the distance of each player from a kink (n,), at most 1."""
    margins = []
    for term, part, slope in zip(terms, torch.split(x, list(sizes)), torch.split(slopes, list(sizes)), strict=True):
        one = part.new_ones(())
        margin = one if term is None or not term.has_manifold else term.margin(part, slope, one)
        margins.append(margin.expand(part.shape))
    return torch.cat(margins)
