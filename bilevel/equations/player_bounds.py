"""Bounds on the unknowns of each player of a game: one entry for each player, each a value or a function of the arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bilevel.errors import ArgumentError, ShapeError

__all__ = ["PlayerBounds", "SharedFunction", "own_functions", "shared"]


@dataclass(frozen=True)
class SharedFunction:
    """One player's part of what a function of the arguments returns for all players."""

    function: Callable[..., Any]
    name: str
    player: int
    players: int

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the player's entry."""
        made = self.function(*args, **kwargs)
        if not isinstance(made, (list, tuple)) or len(made) != self.players:
            raise ShapeError(
                f"equilibrium: expected {self.name}(*args) to return a tuple of {self.players} entries, one for each player, got {made!r}; return "
                "None for a player without one"
            )
        return made[self.player]


def shared(name: str, entries: Any, players: int) -> Any:
    """Return a function of the arguments that returns the entries of all players as a list of functions, one for each; other entries as they are."""
    if not callable(entries):
        return entries
    return [SharedFunction(entries, name, player, players) for player in range(players)]


def own_functions(entries: tuple[Any, ...]) -> tuple[Callable[..., Any], ...]:
    """Return the functions among ``entries``, as the user wrote them."""
    return tuple(entry.function if isinstance(entry, SharedFunction) else entry for entry in entries if callable(entry))


@dataclass(frozen=True)
class PlayerBounds:
    """``lower`` or ``upper`` of a game.

    Parameters
    ----------
    name
        ``"lower"`` or ``"upper"``.
    entries
        For each player: None, a number, a tensor, a pytree of tensors like the player's unknown, or a function of ``(*args, **kwargs)`` that
        returns one.
    """

    name: str
    entries: tuple[Any, ...]

    @classmethod
    def of(cls, name: str, entries: Any, players: int) -> PlayerBounds | None:
        """Return ``entries`` checked, or None where no player has a bound."""
        if entries is None:
            return None
        entries = [entries] * players if _is_number(entries) else shared(name, entries, players)
        if not isinstance(entries, (list, tuple)) or len(entries) != players:
            raise ArgumentError(
                f"equilibrium: expected {name} to be a number for all players, a function of the arguments, or a list of {players} entries, one for "
                f"each player, got {entries!r}; write None for a player without a bound"
            )
        for player, entry in enumerate(entries):
            wrong = [leaf for leaf in pytree.tree_leaves(entry) if not _is_number(leaf) and leaf is not None]
            if wrong and not callable(entry):
                raise ArgumentError(
                    f"equilibrium: expected {name}[{player}] to be None, a number, a tensor or a function of the arguments, got {entry!r}; "
                    f"write for example {name}=[0.0, None]"
                )
            if any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(entry)):
                raise ArgumentError(
                    f"equilibrium: expected {name}[{player}] not to require grad, as no gradient reaches it; pass it as an argument of the layer, "
                    f"and {name}[{player}] as a function of the arguments"
                )
        return None if all(entry is None for entry in entries) else cls(name, tuple(entries))

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """The entries that are functions."""
        return own_functions(self.entries)

    def __call__(
        self, where: str, players: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """Return the bounds of all unknowns (n,), infinite where there is none."""
        parts: list[torch.Tensor] = []
        for number, (own, entry) in enumerate(zip(players, self.entries, strict=True)):
            made = entry(*args, **kwargs) if callable(entry) else entry
            leaves = pytree.tree_leaves(own)
            values = [made] * len(leaves) if made is None or _is_number(made) else pytree.tree_leaves(made)
            if len(values) != len(leaves):
                raise ShapeError(
                    f"{where}: expected {self.name}[{number}] to have one bound for each of the {len(leaves)} tensors of the player, got "
                    f"{len(values)}; give it the structure of the player's unknown"
                )
            parts += [self._like(where, number, value, leaf) for value, leaf in zip(values, leaves, strict=True)]
        return torch.cat(parts)

    def _like(self, where: str, number: int, value: Any, leaf: torch.Tensor) -> torch.Tensor:
        if leaf.is_complex():
            raise ArgumentError(
                f"{where}: expected real unknowns for player {number}, as complex numbers have no order, got {leaf.dtype}; bound the real and "
                "imaginary parts as two tensors"
            )
        if value is None:
            value = -math.inf if self.name == "lower" else math.inf
        if not _is_number(value):
            raise ArgumentError(
                f"{where}: expected {self.name}[{number}] to be numbers or tensors, got {value!r}; return a tensor"
            )
        bound = torch.as_tensor(value, device=leaf.device).to(leaf.dtype)
        try:
            return bound.expand(leaf.shape).reshape(-1)
        except RuntimeError as error:
            raise ShapeError(
                f"{where}: expected {self.name}[{number}] to fit unknowns of shape {tuple(leaf.shape)}, got {tuple(bound.shape)}; give it a shape "
                "that broadcasts to that"
            ) from error


def _is_number(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, (int, float)) and not isinstance(value, bool))
