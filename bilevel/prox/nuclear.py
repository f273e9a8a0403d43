"""The nuclear norm: a term that makes matrices of low rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel._torch.factorisations import inverse
from bilevel._torch.transforms import carries_gradient, outside_autocast
from bilevel.errors import ShapeError
from bilevel.prox._base import Manifold, Parameter, Term, as_parameter, check_nonnegative, detached, strength_of
from bilevel.prox._margins import least, relative
from bilevel.prox._spectral import abs_change, rank_mask, sqrt_trace_change, svd

__all__ = ["NuclearNorm"]


@dataclass(frozen=True, eq=False)
class NuclearNorm(Term):
    """g(x) = s Σ_i σ_i(x), the sum of the singular values of a matrix; its prox is soft thresholding of them.

    Derivatives of the prox and of the value are exact up to the fifth order, with equal singular values too.

    Parameters
    ----------
    strength
        s ≥ 0: a number or a tensor of shape ().

    Raises
    ------
    ArgumentError
        If the strength is negative or not finite.
    ShapeError
        On use, if x is not a matrix.

    References
    ----------
    Cai, Candès and Shen, A singular value thresholding algorithm for matrix completion, 2010; Lewis, Nonsmooth analysis of
    eigenvalues, 1999.

    Examples
    --------
    >>> import torch
    >>> from bilevel import prox
    >>> prox.NuclearNorm(1.0).prox(torch.tensor([[3.0, 0.0], [0.0, 0.5]]))
    tensor([[2., 0.],
            [0., 0.]])
    """

    strength: Parameter

    def __post_init__(self) -> None:
        check_nonnegative(self.where, "strength", self.strength)

    def _strength(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim != 2:
            raise ShapeError(
                f"{self.where}: expected x to be a matrix (n, m), got the shape {tuple(x.shape)}; reshape it, or use torch.func.vmap for several"
            )
        return strength_of(self.where, self.strength, x, ())

    def value(self, x: torch.Tensor) -> torch.Tensor:
        strength = self._strength(x)
        return strength * _nuclear(x, rank_mask(svd(x)[1], max(x.shape)))

    @outside_autocast
    def prox(self, v: torch.Tensor, step: Parameter = 1.0) -> torch.Tensor:
        threshold = as_parameter(step, v) * self._strength(v)
        left, values, right = svd(v)
        thresholded = (left * (values - detached(threshold)).relu()) @ right.mT
        if not (carries_gradient(v) or carries_gradient(threshold)):
            return thresholded
        return thresholded + _soft_change(v, threshold, left, values, right)

    def manifold(self, x: torch.Tensor) -> Manifold:
        strength = self._strength(x)
        left, values, right = svd(x)
        kept = rank_mask(values, max(x.shape))
        left, right = left * kept, right * kept
        smooth = detached(strength) == 0

        @outside_autocast
        def retract(y: torch.Tensor) -> torch.Tensor:
            """Return Y V (Uᵀ Y V)⁻¹ Uᵀ Y, which is Y where Y has the rank of x."""
            columns, inverse_rows = _factors(y, left, right, kept)
            return torch.where(smooth, y, columns @ inverse_rows)

        return Manifold(retract, lambda y: strength * _nuclear(y, kept))

    @outside_autocast
    def margin(self, x: torch.Tensor, slope: torch.Tensor, step: Parameter = 1.0) -> torch.Tensor:
        strength = self._strength(x)
        left, values, right = svd(x)
        kept = rank_mask(values, max(x.shape))
        left, right = left * kept, right * kept
        rest = slope - left @ (left.mT @ slope)
        # −∇f(x)/s = U Vᵀ + W, with ‖W‖₂ < 1 on the complement of the ranges.
        dual = 1 - svd(rest - (rest @ right) @ right.mT)[1] / torch.where(strength == 0, 1.0, strength)
        dual = torch.where(kept.all(), float("inf"), dual)
        primal = torch.where(kept, relative(values, values.amax()), float("inf"))
        return least(torch.where(strength == 0, float("inf"), torch.cat([primal, dual])))


def _soft_change(
    v: torch.Tensor, threshold: torch.Tensor, left: torch.Tensor, values: torch.Tensor, right: torch.Tensor
) -> torch.Tensor:
    """Return zero, with the derivatives of soft thresholding of the singular values, in v and in the threshold t.

    The symmetric B = [[0, V], [Vᵀ, 0]] has the eigenvalues ±σ and 0, on which soft thresholding is λ + |λ − t|/2 − |λ + t|/2.
    """
    n, m = v.shape
    big = torch.cat([torch.cat([v.new_zeros(n, n), v], 1), torch.cat([v.mT, v.new_zeros(m, m)], 1)], 0)
    half = 0.5**0.5
    pairs = torch.cat([torch.cat([left, left], 1), torch.cat([right, -right], 1)], 0) * half  # (n + m, 2k)
    spectrum = torch.cat([values, -values])
    if n != m:
        pairs, spectrum = _completed(pairs, spectrum)
    unit = torch.eye(n + m, dtype=v.dtype, device=v.device)
    level = detached(threshold)
    change = big - detached(big)
    change = change + 0.5 * abs_change(big - threshold * unit, spectrum - level, pairs)
    change = change - 0.5 * abs_change(big + threshold * unit, spectrum + level, pairs)
    return change[:n, n:]


def _completed(basis: torch.Tensor, spectrum: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return orthonormal columns (n, k) completed to a basis (n, n), and the spectrum with zeros for the new ones."""
    size, known = basis.shape
    unit = torch.eye(size, dtype=basis.dtype, device=basis.device)
    more = torch.linalg.qr(torch.cat([basis, unit], 1))[0][:, known:size]
    return torch.cat([basis, more], 1), torch.cat([spectrum, spectrum.new_zeros(size - known)])


def _factors(
    y: torch.Tensor, left: torch.Tensor, right: torch.Tensor, kept: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return C = Y V and M⁻¹ R, with R = Uᵀ Y and M = Uᵀ Y V; columns of U and V beyond the rank are zero."""
    columns, rows = y @ right, left.mT @ y
    core = left.mT @ columns + torch.diag_embed((~kept).to(y.dtype))
    return columns, inverse(core) @ rows


@outside_autocast
def _nuclear(y: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return Σ σ_i(Y) for Y of the rank of x.

    Y = C M⁻¹ R, and (M⁻¹ R)(M⁻¹ R)ᵀ CᵀC has the eigenvalues σ_i². The sum is the trace of its root.
    """
    left, values, right = svd(y)
    values = torch.where(kept, values, 0.0)
    columns, inverse_rows = _factors(y, left * kept, right * kept, kept)
    squares = (inverse_rows @ inverse_rows.mT) @ (columns.mT @ columns)
    return values.sum() + sqrt_trace_change(squares, values)
