"""The solvers of quadratic programs that a user may choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bilevel.quadratic_programs._dense import solve_dense
from bilevel.quadratic_programs._kkt import Factor, KKTFactor
from bilevel.quadratic_programs._program import Found, Limits, Program
from bilevel.quadratic_programs._rule import Structure
from bilevel.setting_checks import check_steps

__all__ = ["Mehrotra"]


@dataclass(frozen=True, kw_only=True)
class Mehrotra:
    """Mehrotra's predictor–corrector on a batch of dense programs, with a polish on the active set.

    All problems of a batch take their steps together, each with its own step length and its own end. It computes in float64.

    Parameters
    ----------
    max_steps
        Steps of the interior-point method. Ten are usual.

    Raises
    ------
    ArgumentError
        If a setting is out of its range.

    References
    ----------
    S. Mehrotra, "On the implementation of a primal-dual interior point method", SIAM J. Optim. 2 (1992). E. M. Gertz, S. J. Wright,
    "Object-oriented software for quadratic programming", ACM TOMS 29 (2003).

    Examples
    --------
    >>> Mehrotra(max_steps=50)
    Mehrotra(max_steps=50)
    """

    max_steps: int = 100

    def __post_init__(self) -> None:
        check_steps("Mehrotra", "max_steps", self.max_steps)

    @property
    def name(self) -> str:
        """The name in reports."""
        return "Mehrotra"

    def solve(self, structure: Structure, tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> Found:
        """Return what was found of each problem of a batch with one axis, in float64."""
        return solve_dense(Program.of(tensors, dtype), Limits(max_steps=self.max_steps, smoothing=structure.smoothing))

    def factor(
        self,
        structure: Structure,
        matrices: Sequence[torch.Tensor],
        damping: torch.Tensor | None,
        active: torch.Tensor,
    ) -> Factor:
        """Return the factorised KKT matrix."""
        Q, A, G = matrices
        return KKTFactor(structure.sizes, Q, A, G, active, damping)
