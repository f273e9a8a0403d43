"""The filter of a line search: a step must not be worse than any of its pairs of violation and barrier objective (Fletcher & Leyffer 2002)."""

from __future__ import annotations

import math

import torch

__all__ = ["Filter"]

# Wächter & Biegler 2006, section 2.3: γ_θ = γ_φ, δ, s_θ, s_φ, η_φ.
_MARGIN, _SWITCH, _POWER_VIOLATION, _POWER_SLOPE, _ARMIJO = 1e-5, 1.0, 1.1, 2.3, 1e-4
_MOST_VIOLATION, _SMALL_VIOLATION = 1e4, 1e-4
_ENTRIES = 64


class Filter:
    """A filter for every problem of a batch.

    Parameters
    ----------
    violation
        θ at the initial guess (K,). The limits are relative to it.
    """

    def __init__(self, violation: torch.Tensor) -> None:
        size = violation.clamp_min(1.0)
        self.most, self.small = _MOST_VIOLATION * size, _SMALL_VIOLATION * size
        self._violations = violation.new_full((len(violation), _ENTRIES), math.inf)
        self._values = torch.full_like(self._violations, math.inf)
        self._count = torch.zeros(len(violation), dtype=torch.int64, device=violation.device)

    def clear(self, these: torch.Tensor) -> None:
        """Forget the entries of ``these`` problems (K,)."""
        self._violations[these], self._values[these], self._count[these] = math.inf, math.inf, 0

    def add(self, these: torch.Tensor, violation: torch.Tensor, value: torch.Tensor) -> None:
        """Add the pair (θ, φ), (K,) each, to the filters of ``these`` problems. A full filter drops its oldest entry."""
        rows = these.nonzero().reshape(-1)
        places = self._count[rows] % _ENTRIES
        self._violations[rows, places] = (1 - _MARGIN) * violation[rows]
        self._values[rows, places] = value[rows] - _MARGIN * violation[rows]
        self._count[rows] += 1

    def allows(self, violation: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return whether the pairs (θ, φ) are acceptable to the filters (K,)."""
        dominated = (violation.unsqueeze(-1) >= self._violations) & (value.unsqueeze(-1) >= self._values)
        return ~dominated.any(-1) & (violation <= self.most) & torch.isfinite(value)

    def accepts(
        self, alpha: torch.Tensor, slope: torch.Tensor, old: tuple[torch.Tensor, torch.Tensor],
        new: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Return which steps are accepted (K,), and for which of them the old pair enters the filter.

        Parameters
        ----------
        alpha, slope
            The step lengths and the derivative of φ along the direction (K,).
        old, new
            (θ, φ) before and after, (K,) each.
        """
        theta, phi = old
        after, value = new
        noise = 10 * torch.finfo(phi.dtype).eps * phi.abs()
        descends = -slope.clamp_max(0)
        by_objective = (slope < 0) & (alpha * descends**_POWER_SLOPE > _SWITCH * theta**_POWER_VIOLATION)
        by_objective = by_objective & (theta <= self.small)
        armijo = value <= phi + _ARMIJO * alpha * slope + noise
        better = (after <= (1 - _MARGIN) * theta) | (value <= phi - _MARGIN * theta + noise)
        good = self.allows(after, value) & torch.where(by_objective, armijo, better)
        return good, good & ~(by_objective & armijo)
