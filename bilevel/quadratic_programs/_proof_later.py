"""The error bound of a report, which is computed when it is first read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bilevel.quadratic_programs._program import Found, Program
from bilevel.quadratic_programs._proof import distance_bound
from bilevel.quadratic_programs._rule import Structure
from bilevel.reports import Basis, Proof, Status

__all__ = ["ProofLater"]


class ProofLater:
    """The proof of an error bound; where no problem of the batch has one, an estimate.

    Parameters
    ----------
    backend
        Factorises K for an estimate.
    structure
        What the tensors stand for.
    flat
        The tensors of a batch with one axis, in float64. The proof is of their numbers in the call: if one is changed in place, nothing is known.
    found, status
        What the solver found, and the status that is reported.
    point
        The point as it is returned (*batch, length), rounded to the dtype of the data.
    """

    def __init__(
        self,
        backend: Any,
        structure: Structure,
        flat: Sequence[torch.Tensor],
        found: Found,
        status: torch.Tensor,
        point: torch.Tensor,
    ) -> None:
        self._backend, self._structure, self._flat = backend, structure, flat
        self._versions = [-1 if t.is_inference() else t._version for t in flat]
        self._dtype, self._batch = point.dtype, point.shape[:-1]
        self._active, self._solved = found.active, status == Status.CONVERGED
        self._point = point.to(torch.float64).reshape(len(status), structure.length)

    @torch.no_grad()
    def __call__(self) -> Proof:
        unknown = torch.full(self._batch, torch.nan, dtype=self._dtype, device=self._point.device)
        if any(t.is_inference() or t._version != v for t, v in zip(self._flat, self._versions, strict=True)):
            return Proof(unknown, Basis.RESIDUAL)
        program = Program.of(self._flat, self._dtype)
        bound, basis = distance_bound(program, self._point, self._active), Basis.CERTIFIED
        if not bool((self._solved & torch.isfinite(bound)).any()):
            bound, basis = self._estimate(program), Basis.ESTIMATED
        known = self._solved & torch.isfinite(bound)
        # Rounding to a narrower dtype must not make a bound smaller.
        bound = (bound * (1 + 2 * torch.finfo(self._dtype).eps)).to(self._dtype)
        return Proof(torch.where(known, bound, torch.nan).reshape(self._batch), basis)

    def _estimate(self, program: Program) -> torch.Tensor:
        """Return the lengths (B,) of Newton's next steps for x; NaN where K is singular."""
        factor = self._backend.factor(self._structure, [program.Q, program.A, program.G], None, self._active)
        step = factor.solve(program.residual(self._point, self._active))
        return torch.where(factor.singular, torch.nan, step[:, : program.sizes.n].norm(dim=-1))
