"""The scale of a loss in float16: smaller after an overflow, larger after many steps without one."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["LossScale"]


class LossScale:
    """Drive a ``torch.amp.GradScaler`` by whole steps, for directions that no single optimiser sees.

    Parameters
    ----------
    scaler
        None: losses are not scaled.
    """

    def __init__(self, scaler: torch.amp.GradScaler | None) -> None:
        self._scaler = scaler
        self._good_steps = 0

    @property
    def enabled(self) -> bool:
        """Whether losses are scaled."""
        return self._scaler is not None and self._scaler.is_enabled()

    def shrink(self) -> None:
        """Reduce the scale after an overflow."""
        assert self._scaler is not None
        self._good_steps = 0
        self._scaler.update(self._scaler.get_scale() * self._scaler.get_backoff_factor())

    def grow(self) -> None:
        """Count a step without an overflow, and enlarge the scale after the scaler's growth interval."""
        if not self.enabled:
            return
        assert self._scaler is not None
        self._good_steps += 1
        if self._good_steps == self._scaler.get_growth_interval():
            self._good_steps = 0
            self._scaler.update(self._scaler.get_scale() * self._scaler.get_growth_factor())

    def state(self) -> dict[str, Any]:
        """Return the scale and the count."""
        scaler = None if self._scaler is None else self._scaler.state_dict()
        return {"scaler": scaler, "good_steps": self._good_steps}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self._good_steps = state["good_steps"]
        if self._scaler is not None and state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])
