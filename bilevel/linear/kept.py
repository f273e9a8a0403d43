"""A preconditioner that is made of one matrix and used for the next ones too."""

from __future__ import annotations

from typing import Any

import torch

from bilevel.errors import ArgumentError
from bilevel.linear._approximation import Approximation, Factor, as_preconditioner
from bilevel.linear._preconditioner import Preconditioner
from bilevel.operators import LinearOperator
from bilevel.setting_checks import check_steps

__all__ = ["Kept"]


class Kept:
    """A preconditioner for a sequence of similar matrices: made of one of them, and used for the next ``refresh`` − 1.

    The Hessian changes little from one outer step to the next. An old preconditioner does not change the answer of conjugate
    gradients, only the number of their steps. Matrices of another batch size, order, dtype or device get a new one at once.

    Give each problem a ``Kept`` of its own.

    Parameters
    ----------
    approximation
        ``bilevel.Nystrom(...)`` or ``bilevel.Kronecker(...)``.
    refresh
        How many matrices share a preconditioner.

    Raises
    ------
    ArgumentError
        If ``approximation`` makes no preconditioner, or ``refresh`` is not a positive whole number.

    Examples
    --------
    >>> import torch, bilevel
    >>> from bilevel.operators import DenseOperator
    >>> linear = bilevel.CG(preconditioner=bilevel.Kept(bilevel.Nystrom(rank=2, rho=0.1), refresh=10))
    >>> for k in range(2):  # two products in all make the preconditioner of both matrices
    ...     H = DenseOperator(torch.diag(torch.tensor([4.0, 1.0 + k])).unsqueeze(0), symmetric=True)
    ...     print([round(float(entry), 2) for entry in linear(H, torch.ones(1, 2))[0]])
    [0.25, 1.0]
    [0.25, 0.5]
    """

    def __init__(self, approximation: Approximation, refresh: int = 10) -> None:
        if not isinstance(approximation, Approximation):
            raise ArgumentError(
                f"Kept: expected approximation to be bilevel.Nystrom(...) or bilevel.Kronecker(...), got {approximation!r}; "
                "write for example bilevel.Kept(bilevel.Nystrom(rank=20))"
            )
        check_steps("Kept", "refresh", refresh)
        self.approximation, self.refresh = approximation, refresh
        self._factor: Factor | None = None
        self._fits: tuple[Any, ...] = ()
        self._uses = 0

    def preconditioner(self, operator: LinearOperator) -> Preconditioner:
        """Return r ↦ M⁻¹ r on tensors (batch, n)."""
        base = operator.distinct
        if self not in base.memo:
            base.memo[self] = self._for(base)
        return as_preconditioner(base.memo[self], operator)

    def _for(self, base: LinearOperator) -> Factor:
        fits = (base.batch, base.size, base.dtype, str(base.device))
        if self._factor is None or self._uses >= self.refresh or self._fits != fits:
            made = self.approximation.checked_factor(base)
            ones = torch.ones(1, base.batch, base.size, dtype=base.dtype, device=base.device)
            if not bool(torch.isfinite(made.solve(ones)).all()):
                return made  # of a matrix that is not finite: not one for the next
            self._factor, self._fits, self._uses = made, fits, 0
        self._uses += 1
        return self._factor

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on bit for bit. The methods of ``bilevel.stochastic`` save it with their own state."""
        if self._factor is None:
            return {}
        return {"factor": self._factor.state(), "fits": list(self._fits), "uses": self._uses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict` of the same approximation.

        Parameters
        ----------
        state
            What :meth:`state_dict` returned.
        """
        self._factor = self.approximation.restored(state["factor"]) if state else None
        self._fits, self._uses = (tuple(state["fits"]), state["uses"]) if state else ((), 0)

    def __repr__(self) -> str:
        return f"Kept({self.approximation!r}, refresh={self.refresh})"
