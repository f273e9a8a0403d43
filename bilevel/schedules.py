"""Accuracies that tighten from one outer step to the next: k ↦ Tolerance, k = 1, 2, ...

A tolerance policy is any function of the number of the outer step; these are the three of HOAG. An outer loop with
inexact hypergradients converges if their errors can be summed, Σ ε_k < ∞. All three fulfil this.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from bilevel.errors import ArgumentError
from bilevel.setting_checks import check_number
from bilevel.tolerance import Tolerance

__all__ = ["CubicSchedule", "ExponentialSchedule", "QuadraticSchedule"]


@dataclass(frozen=True, kw_only=True)
class _Schedule(ABC):
    """δ = δ′ = max(ε_k, ``least``), with ε_k of the subclass.

    Parameters
    ----------
    start
        ε in front of the decay.
    least
        Where tightening ends: what float64 still reaches, by default.
    strong_convexity
        μ, as in :class:`~bilevel.Tolerance`.
    """

    start: float = 0.1
    least: float = 1e-10
    strong_convexity: float | None = None

    def __post_init__(self) -> None:
        check_number(type(self).__name__, "start", self.start)
        check_number(type(self).__name__, "least", self.least)

    def __call__(self, k: int) -> Tolerance:
        """Return the tolerance of outer step ``k``, counted from 1."""
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ArgumentError(
                f"{type(self).__name__}: expected the number of an outer step, which starts at 1, got {k!r}; count steps from 1"
            )
        epsilon = max(self.start * self.decay(k), self.least)
        return Tolerance(delta=epsilon, delta_prime=epsilon, strong_convexity=self.strong_convexity)

    @abstractmethod
    def decay(self, k: int) -> float:
        """Return ε_k / ``start``."""


@dataclass(frozen=True, kw_only=True)
class QuadraticSchedule(_Schedule):
    """ε_k = 0.1 k⁻².

    Parameters
    ----------
    start
        In place of 0.1.
    least
        Where tightening ends, by default 1e-10, which float64 still reaches.
    strong_convexity
        μ, as in :class:`Tolerance`.

    Raises
    ------
    ArgumentError
        If a setting is out of its range.

    References
    ----------
    Pedregosa, "Hyperparameter optimization with approximate gradient", ICML 2016, section 4.

    Examples
    --------
    >>> [QuadraticSchedule()(k).delta for k in (1, 2, 10)]
    [0.1, 0.025, 0.001]
    """

    def decay(self, k: int) -> float:
        """Return k⁻²."""
        return float(k) ** -2


@dataclass(frozen=True, kw_only=True)
class CubicSchedule(_Schedule):
    """ε_k = 0.1 k⁻³.

    Parameters
    ----------
    start
        In place of 0.1.
    least
        Where tightening ends, by default 1e-10, which float64 still reaches.
    strong_convexity
        μ, as in :class:`Tolerance`.

    Raises
    ------
    ArgumentError
        If a setting is out of its range.

    References
    ----------
    Pedregosa, "Hyperparameter optimization with approximate gradient", ICML 2016, section 4.

    Examples
    --------
    >>> [CubicSchedule()(k).delta_prime for k in (1, 2, 10)]
    [0.1, 0.0125, 0.0001]
    """

    def decay(self, k: int) -> float:
        """Return k⁻³."""
        return float(k) ** -3


@dataclass(frozen=True, kw_only=True)
class ExponentialSchedule(_Schedule):
    """ε_k = 0.1 · 0.9^k.

    Parameters
    ----------
    start
        In place of 0.1.
    rate
        In place of 0.9, in (0, 1).
    least
        Where tightening ends, by default 1e-10, which float64 still reaches.
    strong_convexity
        μ, as in :class:`Tolerance`.

    Raises
    ------
    ArgumentError
        If a setting is out of its range.

    References
    ----------
    Pedregosa, "Hyperparameter optimization with approximate gradient", ICML 2016, section 4.

    Examples
    --------
    >>> [round(ExponentialSchedule()(k).delta, 6) for k in (1, 2, 10)]
    [0.09, 0.081, 0.034868]
    """

    rate: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("ExponentialSchedule", "rate", self.rate, below=1.0)

    def decay(self, k: int) -> float:
        """Return rateᵏ."""
        return float(self.rate**k)
