"""Terms that act on each entry by itself, as four numbers for each entry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import numpy as np
import torch

__all__ = ["Entries"]

# A number, or a vector of torch or of numpy with one for each entry.
Numbers: TypeAlias = Any


@dataclass(frozen=True, eq=False)
class Entries:
    """g(x) = Σ l1_j |x_j| + ½ l2_j x_j² on lower_j ≤ x_j ≤ upper_j, of detached numbers.

    Each field is a float, or a vector with one for each entry, or None for 0 and for no bound. The vectors are tensors,
    and so are the arguments of all methods; after :meth:`at`, all of them are numpy arrays, whose operations cost less.
    """

    l1: Numbers = None
    l2: Numbers = None
    lower: Numbers = None
    upper: Numbers = None

    def __post_init__(self) -> None:
        # A strength of zero is none.
        vars(self).update(l1=self.l1 or None) if isinstance(self.l1, float) else None

    def prox(self, v: Any, step: float) -> Any:
        """Return prox_{step·g}(v) (n,)."""
        if self.l1 is not None:
            threshold = step * self.l1
            v = v - _between(v, -threshold, threshold)
        if self.l2 is not None:
            v = v / (1 + step * self.l2)
        return v if self.lower is None and self.upper is None else _between(v, self.lower, self.upper)

    def free(self, x: Any) -> Any:
        """Return which entries of x are not fixed on its manifold: those besides kinks and bounds, bool (n,)."""
        if self.l1 is None:
            free = x == x
        else:
            free = x != 0 if isinstance(self.l1, float) else (x != 0) | (self.l1 == 0)
        if self.lower is not None:
            free = free & (x > self.lower)
        return free if self.upper is None else free & (x < self.upper)

    def value(self, x: Any) -> Any:
        """Return g(x) () of an x between the bounds."""
        value = 0.0
        if self.l1 is not None:
            value = value + (self.l1 * abs(x)).sum()
        return value if self.l2 is None else value + 0.5 * (self.l2 * x * x).sum()

    def slope(self, x: Any, sign: Any) -> Any:
        """Return the derivative of g on the manifold of x, where the entries have this sign."""
        slope = 0.0 if self.l1 is None else self.l1 * sign
        return slope if self.l2 is None else slope + self.l2 * x

    @staticmethod
    def joined(parts: Sequence[Entries], sizes: Sequence[int], like: torch.Tensor) -> Entries:
        """Return the term of a vector (n,) like ``like``, which consists of ``parts`` with so many entries."""
        if len(parts) == 1:
            return parts[0]
        made = {}
        for name, absent in (("l1", 0.0), ("l2", 0.0), ("lower", -float("inf")), ("upper", float("inf"))):
            numbers = [getattr(part, name) for part in parts]
            if any(number is not None for number in numbers):
                known = [
                    like.new_tensor(absent) if number is None else torch.as_tensor(number).to(like)
                    for number in numbers
                ]
                made[name] = torch.cat([number.expand(size) for number, size in zip(known, sizes, strict=True)])
        return Entries(**made)

    def at(self, places: torch.Tensor) -> Entries:
        """Return the term of the entries at ``places`` (k,) alone, for arrays of numpy."""
        values = (getattr(self, field.name) for field in fields(self))
        return Entries(*(v[places].cpu().double().numpy() if isinstance(v, torch.Tensor) else v for v in values))


def _between(v: Any, lower: Any, upper: Any) -> Any:
    if isinstance(v, torch.Tensor):
        return v.clamp(lower, upper)
    if lower is not None:
        v = np.maximum(v, lower)
    return v if upper is None else np.minimum(v, upper)
