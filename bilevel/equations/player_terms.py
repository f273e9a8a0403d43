"""Proximal terms of the players of a game: one entry for each player, each a value or a function of the arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bilevel.equations.player_bounds import own_functions, shared
from bilevel.errors import ArgumentError, ShapeError
from bilevel.prox._base import Term
from bilevel.prox._flat import FlatTerm

__all__ = ["PlayerTerms", "state", "step"]


@dataclass(frozen=True)
class PlayerTerms:
    """``prox`` of a game.

    Parameters
    ----------
    entries
        For each player: None, a term, a pytree of terms like the player's unknown, or a function of ``(*args, **kwargs)`` that returns one.
    """

    entries: tuple[Any, ...]

    @classmethod
    def of(cls, entries: Any, players: int) -> PlayerTerms | None:
        """Return ``entries`` checked, or None where no player has a term."""
        if entries is None:
            return None
        entries = [entries] * players if isinstance(entries, Term) else shared("prox", entries, players)
        if not isinstance(entries, (list, tuple)) or len(entries) != players:
            raise ArgumentError(
                f"equilibrium: expected prox to be a term for all players, a function of the arguments, or a list of {players} entries, one for "
                f"each player, got {entries!r}; write None for a player without a term"
            )
        for player, entry in enumerate(entries):
            terms = [] if _is_function(entry) else [leaf for leaf in pytree.tree_leaves(entry) if leaf is not None]
            wrong = next((leaf for leaf in terms if not isinstance(leaf, Term)), None)
            if wrong is not None:
                raise ArgumentError(
                    f"equilibrium: expected prox[{player}] to be None, a term of bilevel.prox or a function of the arguments, got {wrong!r}; pass one"
                )
            if any(tensor.requires_grad for term in terms for tensor in term.tensors()):
                raise ArgumentError(
                    f"equilibrium: expected the parameters of prox[{player}] not to require grad, as no gradient reaches them; pass them as "
                    f"arguments of the layer, and prox[{player}] as a function of the arguments"
                )
        return None if all(entry is None for entry in entries) else cls(tuple(entries))

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """The entries that are functions."""
        return own_functions(tuple(entry for entry in self.entries if _is_function(entry)))

    def __call__(
        self, where: str, players: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[FlatTerm | None]:
        """Return the term of each player, flat."""
        found: list[FlatTerm | None] = []
        for number, (own, entry) in enumerate(zip(players, self.entries, strict=True)):
            made = entry(*args, **kwargs) if _is_function(entry) else entry
            if made is None:
                found.append(None)
                continue
            leaves, terms = pytree.tree_leaves(own), [made] if isinstance(made, Term) else pytree.tree_leaves(made)
            wrong = next((term for term in terms if term is not None and not isinstance(term, Term)), None)
            if wrong is not None:
                raise ArgumentError(
                    f"{where}: expected prox[{number}] to return a term of bilevel.prox, got {type(wrong).__name__}; return one"
                )
            if len(terms) != len(leaves) or any(leaf.is_complex() for leaf in leaves):
                raise ShapeError(
                    f"{where}: expected prox[{number}] to have one term for each of the {len(leaves)} real tensors of the player, got {len(terms)}; "
                    "give it the structure of the player's unknown, with None for a tensor without a term"
                )
            found.append(FlatTerm(terms, [leaf.shape for leaf in leaves]))
        return found


def step(terms: list[FlatTerm | None], sizes: tuple[int, ...], v: torch.Tensor) -> torch.Tensor:
    """Return the proximal points (n,) of all players, with step 1; v where a player has no term."""
    parts = zip(terms, torch.split(v, list(sizes)), strict=True)
    return torch.cat([part if term is None else term.prox(part, part.new_ones(())) for term, part in parts])


def state(
    terms: list[FlatTerm | None], sizes: tuple[int, ...], x: torch.Tensor, slopes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where terms hold unknowns (n,), as ones, and the distance of each player from a kink (n,), at most 1."""
    held, margins = [], []
    for term, part, slope in zip(terms, torch.split(x, list(sizes)), torch.split(slopes, list(sizes)), strict=True):
        if term is None or not term.has_manifold:
            held.append(torch.zeros_like(part))
            margins.append(torch.ones_like(part))
            continue
        free = term.manifold(part).free
        held.append(torch.zeros_like(part) if free is None else (~free).to(part))
        margins.append(term.margin(part, slope, part.new_ones(())).expand(part.shape))
    return torch.cat(held), torch.cat(margins)


def _is_function(entry: Any) -> bool:
    return callable(entry) and not isinstance(entry, Term)
