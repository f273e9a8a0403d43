"""The history of Anderson acceleration: the last differences, kept orthonormal."""

from __future__ import annotations

import torch

__all__ = ["History"]

# A difference of residuals below this many eps ‖(R, x)‖ counts as rounding.
_ROUNDING = 2.0


class History:
    """The last differences (ΔR, ΔX − βΔR), (batch, history, 2n), with orthonormal ΔR. Unused rows are zero."""

    def __init__(self, like: torch.Tensor, history: int, share: float) -> None:
        batch, n = like.shape
        self.n, self.share = n, share
        self.pairs = like.new_zeros(batch, history, 2 * n)
        self.changes = self.pairs[:, :, :n]
        self.moves = self.pairs[:, :, n:]
        self.gamma = like.new_zeros(batch, 1, history)
        self.rounding = like.new_zeros(batch, 1)
        self.next = 0

    def measure(self, both: torch.Tensor) -> None:
        """Measure at ``both`` the length of a difference of residuals that rounding alone can cause."""
        eps = torch.finfo(both.dtype).eps
        self.rounding = _ROUNDING * eps * torch.linalg.vector_norm(both, dim=-1, keepdim=True)

    def mixture(self, plain: torch.Tensor) -> torch.Tensor:
        """Return x − βR − (ΔX − βΔR) γ, given x − βR."""
        return torch.baddbmm(plain.unsqueeze(1), self.gamma, self.moves, alpha=-1).squeeze(1)

    def learn(self, both: torch.Tensor, difference: torch.Tensor) -> None:
        """Replace the oldest difference by ``difference`` (batch, 2n), made orthogonal to the others; update γ = ΔRᵀR.

        The products of the others with R serve twice: their changes since the last step are the products with the new
        difference. The length ℓ of the new difference becomes ℓ/√(ℓ² + ν²), where ν is a share of its length before
        orthogonalisation. It enters γ and the step alike, so this gives the minimum of ‖R − ΔR γ‖² + ν² γ² over its γ.
        """
        n, at = self.n, self.next
        residual, place = both[:, :n], self.pairs[:, at]
        place.zero_()
        self.gamma[:, :, at] = 0.0
        gamma = torch.bmm(residual.unsqueeze(1), self.changes.mT)  # (batch, 1, history)
        before = torch.linalg.vector_norm(difference[:, :n], dim=-1, keepdim=True)
        fresh = torch.baddbmm(difference.unsqueeze(1), gamma - self.gamma, self.pairs, alpha=-1).squeeze(1)
        length = torch.linalg.vector_norm(fresh[:, :n], dim=-1, keepdim=True)
        inverse = torch.hypot(length, self.share * before).reciprocal()
        torch.mul(fresh, torch.where(length > self.rounding, inverse, 0.0), out=place)
        gamma[:, 0, at] = torch.linalg.vecdot(place[:, :n], residual)
        self.gamma = gamma
        self.next = (at + 1) % self.pairs.shape[1]

    def forget(self, which: torch.Tensor) -> None:
        """Drop the history of the problems ``which`` (batch,)."""
        self.pairs.masked_fill_(which.reshape(-1, 1, 1), 0.0)
        self.gamma.masked_fill_(which.reshape(-1, 1, 1), 0.0)
