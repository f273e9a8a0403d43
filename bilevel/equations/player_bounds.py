"""Bounds on the unknowns of each player of a game."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bilevel.equations.player_entries import PlayerEntries
from bilevel.errors import ArgumentError, ShapeError

__all__ = ["PlayerBounds"]


@dataclass(frozen=True)
class PlayerBounds(PlayerEntries):
    """``lower`` or ``upper`` of a game: numbers, or tensors that fit the player's unknown."""

    kinds = (torch.Tensor, int, float)
    words = ("bound", "number", "a number, a tensor", "0.0")

    def __call__(
        self, where: str, players: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """Return the bounds of all unknowns (n,), infinite where there is none."""
        parts: list[torch.Tensor] = []
        for name, made, leaves in self.evaluated(players, args, kwargs):
            values = [made] * len(leaves) if made is None or self.is_value(made) else pytree.tree_leaves(made)
            if len(values) != len(leaves):
                raise ShapeError(
                    f"{where}: expected {name} to have one bound for each of the {len(leaves)} tensors of the player, got "
                    f"{len(values)}; give it the structure of the player's unknown"
                )
            complex_leaf = next((leaf for leaf in leaves if leaf.is_complex()), None)
            if complex_leaf is not None:
                raise ArgumentError(
                    f"{where}: expected real unknowns for {name}, as complex numbers have no order, got {complex_leaf.dtype}; bound the real and "
                    "imaginary parts as two tensors"
                )
            parts += [self._like(where, name, value, leaf) for value, leaf in zip(values, leaves, strict=True)]
        return torch.cat(parts)

    def _like(self, where: str, name: str, value: Any, leaf: torch.Tensor) -> torch.Tensor:
        if value is None:
            value = -math.inf if self.name == "lower" else math.inf
        if not self.is_value(value):
            raise ArgumentError(f"{where}: expected {name} to be numbers or tensors, got {value!r}; return a tensor")
        bound = torch.as_tensor(value, device=leaf.device).to(leaf.dtype)
        try:
            return bound.expand(leaf.shape).reshape(-1)
        except RuntimeError as error:
            raise ShapeError(
                f"{where}: expected {name} to fit unknowns of shape {tuple(leaf.shape)}, got {tuple(bound.shape)}; give it a shape "
                "that broadcasts to that"
            ) from error
