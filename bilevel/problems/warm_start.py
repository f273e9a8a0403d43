"""The initial guesses of the next call of a problem: a frozen value, which each call replaces as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bilevel.problems.adaptive.state import SearchState

__all__ = ["WarmStart"]


@dataclass(frozen=True, eq=False)
class WarmStart:
    """The last inner solution and adjoint, and the measurements of searches for goals. None where there is none yet.

    It decides where a solve begins, and never how accurate it becomes. Calls in several threads may replace it in any order.

    Parameters
    ----------
    inner
        φ, a pytree of tensors without a graph.
    multipliers
        ``equality`` and ``inequality``: the multipliers that belong to ``inner``; empty where there are no such constraints.
    adjoint
        q (K, n) for the mean over the K problems: 1/K of each problem's own.
    known
        The measurements of searches. A search changes a copy.
    """

    inner: Any = None
    multipliers: Mapping[str, Any] = field(default_factory=dict)
    adjoint: torch.Tensor | None = None
    known: SearchState | None = None

    def fits(self, count: int | None) -> bool:
        """Return whether there is an inner solution, of ``count`` problems if that is a number."""
        if self.inner is None:
            return False
        return count is None or all(leaf.ndim and len(leaf) == count for leaf in pytree.tree_leaves(self.inner))

    def inner_like(self, cold: Any) -> Any:
        """Return the inner solution in the dtypes and on the devices of ``cold``; None if its structure or shapes are others."""
        (leaves, structure), (others, another) = pytree.tree_flatten(self.inner), pytree.tree_flatten(cold)
        if structure != another or any(a.shape != b.shape for a, b in zip(leaves, others, strict=True)):
            return None
        return pytree.tree_unflatten([a.to(b) for a, b in zip(leaves, others, strict=True)], structure)

    def adjoints(self, x: torch.Tensor) -> torch.Tensor | None:
        """Return each problem's own adjoint, or None if there is none of the shape of ``x`` (K, n)."""
        if self.adjoint is None or self.adjoint.shape != x.shape or not bool(torch.isfinite(self.adjoint).all()):
            return None
        return self.adjoint.to(x) * len(x)

    def learned(self) -> SearchState | None:
        """Return a copy of what goals have learned, for a search to change."""
        return None if self.known is None else SearchState.of(self.known.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Return copies of everything, in types that can be loaded without running code."""
        known = None if self.known is None else self.known.state_dict()
        state = {"inner": self.inner, "multipliers": self.multipliers, "adjoint": self.adjoint, "known": known}
        copies: dict[str, Any] = _copied(state)
        return copies

    @staticmethod
    def of(state: dict[str, Any]) -> WarmStart:
        """Return what :meth:`state_dict` described."""
        state = _copied(state)
        known = None if state["known"] is None else SearchState.of(state["known"])
        return WarmStart(state["inner"], state.get("multipliers", {}), state["adjoint"], known)


def _copied(tree: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, tree)
