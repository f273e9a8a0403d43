"""The history of Anderson acceleration: the last differences, kept orthonormal."""

from __future__ import annotations

import torch

__all__ = ["History"]

# A difference of residuals below this many eps ‖(R, x)‖ is rounding.
_ROUNDING = 2.0


class History:
    """The last differences (ΔR, ΔX − βΔR), (batch, history, 2n), ΔR orthonormal; zero where there is none."""

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
        """Take from ``both`` how long a difference of residuals is that rounding alone makes."""
        eps = torch.finfo(both.dtype).eps
        self.rounding = _ROUNDING * eps * torch.linalg.vector_norm(both, dim=-1, keepdim=True)

    def mixture(self, plain: torch.Tensor) -> torch.Tensor:
        """Return x − βR − (ΔX − βΔR) γ, given x − βR."""
        return torch.baddbmm(plain.unsqueeze(1), self.gamma, self.moves, alpha=-1).squeeze(1)

    def learn(self, both: torch.Tensor, difference: torch.Tensor) -> None:
        """Put ``difference`` (batch, 2n), made orthogonal to the others, in the place of the oldest; update γ = ΔRᵀR.

        The products of the others with R serve twice: less those of the step before, they are the products with
        the new difference. Its length ℓ becomes ℓ/√(ℓ² + ν²), ν a share of what it was: as it enters γ and the step alike,
        that is the minimum of ‖R − ΔR γ‖² + ν² γ² over its γ.
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
        """Drop what the problems of ``which`` have learned."""
        self.pairs.masked_fill_(which.reshape(-1, 1, 1), 0.0)
        self.gamma.masked_fill_(which.reshape(-1, 1, 1), 0.0)
