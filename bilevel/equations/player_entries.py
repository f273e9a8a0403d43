"""What is said of each player of a game: one entry for each player, each a value or a function of the arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.utils import _pytree as pytree
from typing_extensions import Self

from bilevel.errors import ArgumentError, ShapeError
from bilevel.prox._base import Term

__all__ = ["PlayerEntries"]


@dataclass(frozen=True)
class _SharedFunction:
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


@dataclass(frozen=True)
class PlayerEntries:
    """An argument of a game: ``name``, and for each player None, a value, a pytree of values like its unknown, or a function that returns one."""

    name: str
    entries: tuple[Any, ...]

    kinds: ClassVar[tuple[type, ...]]  # of values
    words: ClassVar[
        tuple[str, str, str, str]
    ]  # what a player may be without, a value for all players, a value, an example

    @classmethod
    def of(cls, name: str, entries: Any, players: int) -> Self | None:
        """Return ``entries`` checked, or None where no player has any."""
        noun, one, kind, example = cls.words
        if entries is None:
            return None
        if cls.is_value(entries):
            entries = [entries] * players
        elif callable(entries):
            entries = [_SharedFunction(entries, name, player, players) for player in range(players)]
        if not isinstance(entries, (list, tuple)) or len(entries) != players:
            raise ArgumentError(
                f"equilibrium: expected {name} to be a {one} for all players, a function of the arguments, or a list of {players} entries, one for "
                f"each player, got {entries!r}; write None for a player without a {noun}"
            )
        for player, entry in enumerate(entries):
            values = [] if cls.is_function(entry) else [v for v in pytree.tree_leaves(entry) if v is not None]
            if not all(map(cls.is_value, values)):
                raise ArgumentError(
                    f"equilibrium: expected {name}[{player}] to be None, {kind} or a function of the arguments, got {entry!r}; write for example "
                    f"{name}=[{example}, None]"
                )
            held = [t for v in values for t in (v.tensors() if isinstance(v, Term) else [v])]
            if any(isinstance(t, torch.Tensor) and t.requires_grad for t in held):
                raise ArgumentError(
                    f"equilibrium: expected {name}[{player}] not to require grad, as no gradient reaches it; pass its tensors as arguments of the "
                    f"layer, and {name}[{player}] as a function of the arguments"
                )
        return None if all(entry is None for entry in entries) else cls(name, tuple(entries))

    @classmethod
    def is_value(cls, entry: Any) -> bool:
        """Return whether ``entry`` is one value."""
        return isinstance(entry, cls.kinds) and not isinstance(entry, bool)

    @classmethod
    def is_function(cls, entry: Any) -> bool:
        """Return whether ``entry`` is a function of the arguments."""
        return callable(entry) and not cls.is_value(entry)

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """The entries that are functions, as the user wrote them."""
        found = [entry for entry in self.entries if self.is_function(entry)]
        return tuple(entry.function if isinstance(entry, _SharedFunction) else entry for entry in found)

    def evaluated(
        self, players: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[tuple[str, Any, list[torch.Tensor]]]:
        """Yield for each player the name of its entry, the entry without functions, and the tensors of its unknown."""
        for number, (own, entry) in enumerate(zip(players, self.entries, strict=True)):
            made = entry(*args, **kwargs) if self.is_function(entry) else entry
            yield f"{self.name}[{number}]", made, pytree.tree_leaves(own)
