"""Moore–Penrose inverses of singular matrices whose rows and columns have very different units."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel._torch.factorisations import eigh, svd
from bilevel.linear._judge import eigenvalue_uncertainty

__all__ = ["PseudoInverse"]


@dataclass(frozen=True, eq=False)
class PseudoInverse:
    """A⁺ of the singular matrices A = R⁻¹ S C⁻¹ of a batch. The scaled S decides the rank; norms are those of A's own coordinates.

    With S = U Σ Vᵀ, the null space of A is spanned by the columns of C V that belong to zeros of Σ, that of Aᵀ by those of R U. The
    generalised inverse C V Σ⁺ Uᵀ R solves A x = b where b is in the range; projections orthogonal to the null spaces, in coordinates that are
    not scaled, on either side make A⁺ of it (Ben-Israel & Greville, "Generalized Inverses", 2003, chapter 2).

    Parameters
    ----------
    singular
        Bool (batch,): which matrices of the batch these are.
    left, inverse, right
        C V, Σ⁺ and R U of those: (k, n, n), (k, n) and (k, n, n).
    null, conull
        Orthonormal bases of the null spaces of A and Aᵀ, in the columns of (k, n, n) that are not zero.
    cutoff
        The share of the largest singular value of S up to which a singular value counts as zero.
    """

    singular: torch.Tensor
    left: torch.Tensor
    inverse: torch.Tensor
    right: torch.Tensor
    null: torch.Tensor
    conull: torch.Tensor
    cutoff: float

    @classmethod
    def of(
        cls, scaled: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, singular: torch.Tensor, symmetric: bool
    ) -> PseudoInverse:
        """Decompose the ``singular`` ones of the matrices ``scaled``, S (batch, n, n); ``rows`` and ``columns`` are diagonals (batch, n)."""
        S, R, C = scaled[singular], rows[singular].unsqueeze(-1), columns[singular].unsqueeze(-1)
        if symmetric:
            eigenvalues, U = eigh(S)
            order = eigenvalues.abs().argsort(dim=-1)  # zeros come first
            values = eigenvalues.gather(-1, order)
            U = V = U.gather(-1, order.unsqueeze(-2).expand_as(U))
        else:
            U, values, Vt = svd(S)
            U, values, V = U.flip(-1), values.flip(-1), Vt.mT.flip(-1)
        # If one singular value is zero to rounding, all that cannot be distinguished from zero count as zero.
        cutoff = eigenvalue_uncertainty(S.shape[-1], S.dtype)
        zero = values.abs() <= cutoff * values.abs().amax(-1, keepdim=True)  # (k, n)
        inverse = torch.where(zero, 0.0, 1 / values)
        return cls(singular, C * V, inverse, R * U, _orthonormal(C, V, zero), _orthonormal(R, U, zero), cutoff)

    def apply(self, right: torch.Tensor) -> torch.Tensor:
        """Return A⁺ times ``right`` (k, n, columns)."""
        solved = self.left @ (self.inverse.unsqueeze(-1) * (self.right.mT @ _without(self.conull, right)))
        return _without(self.null, solved)


def _without(basis: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    return vectors - basis @ (basis.mT @ vectors)


def _orthonormal(scale: torch.Tensor, basis: torch.Tensor, these: torch.Tensor) -> torch.Tensor:
    """Return an orthonormal basis (k, n, n) of the span of ``scale`` times the first columns of ``basis``, which ``these`` (k, n) are; else zeros."""
    # The scale would amplify entries that are only rounding.
    noise = 4 * basis.shape[-1] * torch.finfo(basis.dtype).eps
    chosen = scale * torch.where(these.unsqueeze(-2) & (basis.abs() > noise), basis, 0.0)
    size = chosen.norm(dim=-2, keepdim=True)
    Q = torch.linalg.qr(chosen / torch.where(size > 0, size, 1.0))[0]
    return torch.where(these.unsqueeze(-2), Q, 0.0)
