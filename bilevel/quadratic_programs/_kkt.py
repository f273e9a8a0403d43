"""The KKT matrix of a batch of dense programs on their active sets: factorised once, for the polish and for every derivative.

With a the active rows of G, l and u the active bounds, K acts on (x, ν, λ, μ_l, μ_u)::

    Q dx + Aᵀdν + Gᵀ(a dλ) − l dμ_l + u dμ_u
    A dx
    a G dx  − (1 − a) dλ
    − l dx  − (1 − l) dμ_l
    u dx    − (1 − u) dμ_u

and is symmetric. On the central path all rows are active, and −D dλ is added to them, with D = τ/λ².

Unknowns at a bound and rows that are not active are eliminated. What is left is factorised by LU. Where that is singular to working
precision, the pseudo-inverse by eigenvalues stands in its place, and the null vectors tell which derivatives exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from bilevel._torch.factorisations import eigh
from bilevel.quadratic_programs._balance import balance
from bilevel.solvers.programs.dense_program import mv, tmv

__all__ = ["Factor", "KKTFactor", "Sizes"]

_SUSPECT = 1e-9  # a ratio of pivots below which the eigenvalues are looked at
_MODERATE = 1e3  # a ratio of the rows' largest entries up to which the scaling of rows and columns is enough
_SINGULAR = 1e-11  # eigenvalues this small, relative to the largest, count as zero


@dataclass(frozen=True)
class Sizes:
    """n unknowns, p equations, m rows: how a point (..., n + p + m + n + n) is laid out."""

    n: int
    p: int
    m: int

    @property
    def parts(self) -> list[int]:
        """The lengths of x, ν, λ, μ_l, μ_u."""
        return [self.n, self.p, self.m, self.n, self.n]

    @property
    def rows(self) -> list[int]:
        """The lengths of λ, μ_l, μ_u: the order of everything that is said of inequalities."""
        return [self.m, self.n, self.n]

    def split(self, point: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return x, ν, λ, μ_l, μ_u."""
        return point.split(self.parts, -1)


class Factor(Protocol):
    """A factorised K of a batch.

    Attributes
    ----------
    singular, by_inequalities
        (B,) bool: whether K is singular to working precision, and whether dependent inequalities are among the reasons.
    """

    singular: torch.Tensor
    by_inequalities: torch.Tensor

    def solve(self, right: torch.Tensor) -> torch.Tensor:
        """Return K⁻¹ r (B, length)."""

    def times(self, d: torch.Tensor) -> torch.Tensor:
        """Return K d (B, length)."""

    def in_units(self, right: torch.Tensor) -> torch.Tensor:
        """Return r (B, length) in units in which the largest entries of the rows of K are near one."""

    def changes(self, d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return by how much d would be another if an inequality (B, m + 2n) were of the other kind, and the size of d (B, 1)."""


class KKTFactor:
    """The factorised K of a batch.

    Parameters
    ----------
    sizes
        n, p, m.
    Q, A, G
        (B, n, n), (B, p, n), (B, m, n) in the dtype that is computed in. Rows of G that are no constraint may hold anything.
    active
        (B, m + 2n) bool.
    damping
        D (B, m + 2n) on the central path, None else.
    """

    def __init__(
        self,
        sizes: Sizes,
        Q: torch.Tensor,
        A: torch.Tensor,
        G: torch.Tensor,
        active: torch.Tensor,
        damping: torch.Tensor | None = None,
    ) -> None:
        self.sizes, self.Q, self.A, self.G, self.active, self.damping = sizes, Q, A, G, active, damping
        general, below, above = active.split(sizes.rows, -1)
        self.below, self.above = below & ~above if damping is None else below, above
        self.bounds = bool((below | above).any())
        self.held = (below | above) & (damping is None)
        self.some_held = self.bounds and damping is None
        self._choose_rows(general)
        self._factorise(self._matrix())

    @property
    def batch(self) -> int:
        """How many problems."""
        return len(self.Q)

    def _choose_rows(self, general: torch.Tensor) -> None:
        """Bring the active rows of G to the front, as many as the problem with the most has."""
        count = int(general.sum(-1).amax()) if general.numel() else 0
        self.general, self.count = general, count
        self.order = general.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, :count]
        self.chosen = general.gather(-1, self.order)
        rows = self.G.gather(1, self.order.unsqueeze(-1).expand(-1, -1, self.sizes.n))
        self.rows = torch.where(self.chosen.unsqueeze(-1), rows, torch.zeros_like(rows))

    def _matrix(self) -> torch.Tensor:
        """Return what is left of K (B, k, k) without unknowns at bounds and rows that are not active."""
        n, p, k = self.sizes.n, self.sizes.p, self.count
        matrix = self.Q.new_zeros(self.batch, n + p + k, n + p + k)
        matrix[:, :n, :n] = self.Q
        matrix[:, n : n + p, :n] = self.A
        matrix[:, n + p :, :n] = self.rows
        if self.some_held:
            matrix[:, :, :n] *= (~self.held).unsqueeze(1)
            matrix[:, :n, :n] *= (~self.held).unsqueeze(-1)
        matrix[:, :n, n:] = matrix[:, n:, :n].mT
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        if self.some_held:
            diagonal[:, :n] += self.held.to(matrix.dtype)
        lowest = (~self.chosen).to(matrix.dtype)
        if self.damping is not None:
            general, below, above = self.damping.split(self.sizes.rows, -1)
            lowest = torch.where(self.chosen, general.gather(-1, self.order), lowest)
            diagonal[:, :n] += torch.where(self.below, 1 / below, 0.0) + torch.where(self.above, 1 / above, 0.0)
        diagonal[:, n + p :] -= lowest
        return matrix

    def _factorise(self, matrix: torch.Tensor) -> None:
        norm = matrix.abs().amax(-1)
        self.scale = torch.where(norm > 0, norm.clamp_min(1e-300).rsqrt(), 1.0)
        if self.damping is None and norm.shape[-1]:
            curvature = self.Q.diagonal(dim1=-2, dim2=-1)
            curvature = torch.where(self.held, 0.0, curvature).amax(-1) if self.some_held else curvature.amax(-1)
            curvature = torch.where(curvature > 0, curvature, norm.amax(-1))
            apart = torch.maximum(norm.amax(-1), curvature) > _MODERATE * torch.minimum(norm.amin(-1), curvature)
            if bool(apart.any()):
                self.scale = torch.where(apart.unsqueeze(-1), self._balanced(matrix), self.scale)
        matrix.mul_(self.scale.unsqueeze(-1)).mul_(self.scale.unsqueeze(-2))
        self.lu, self.pivots, failed = torch.linalg.lu_factor_ex(matrix)
        size = self.lu.diagonal(dim1=-2, dim2=-1).abs()
        suspect = (failed != 0) | ~torch.isfinite(size).all(-1)
        if size.shape[-1]:
            suspect |= size.amin(-1) < _SUSPECT * size.amax(-1)
        self.suspect = suspect.nonzero().squeeze(-1)
        self.singular = torch.zeros_like(suspect)
        self.by_inequalities = torch.zeros_like(suspect)
        if len(self.suspect):
            self._pseudo_invert(matrix[self.suspect])

    def _balanced(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return scales (B, k) for units that differ by many orders of magnitude."""
        n = self.sizes.n
        # Unknowns at bounds and rows that are not active have a diagonal of one, which is no curvature.
        free = ~self.held if self.some_held else torch.ones_like(self.held)
        Q, rows = torch.where(free.unsqueeze(-1), matrix[:, :n, :n], 0.0), matrix[:, n:, :n]
        plain = torch.cat([free, rows.ne(0).any(-1)], -1)
        return torch.where(plain, balance(Q, rows), 1.0)

    def _pseudo_invert(self, matrix: torch.Tensor) -> None:
        """Keep the pseudo-inverses and null vectors of those of the suspect problems that are singular.

        LU is more accurate for the others: eigenvectors of small eigenvalues of both signs mix, unknowns with multipliers.
        """
        values, vectors = eigh(matrix)
        null = values.abs() <= _SINGULAR * values.abs().amax(-1, keepdim=True)
        singular = null.any(-1)
        self.suspect, values, vectors, null = (t[singular] for t in (self.suspect, values, vectors, null))
        inverse = torch.where(null, torch.zeros_like(values), 1 / values)
        self.inverse = torch.bmm(vectors * inverse.unsqueeze(-2), vectors.mT)
        self.singular[self.suspect] = True
        self.by_inequalities[self.suspect] = self._involves_inequalities(vectors * null.unsqueeze(-2))

    def _involves_inequalities(self, null: torch.Tensor) -> torch.Tensor:
        """Return whether a null vector (K, k, k), as columns, has inequalities in it: rows of G, or bounds that hold an unknown."""
        n, p = self.sizes.n, self.sizes.p
        null = null * self.scale[self.suspect].unsqueeze(-1)
        size = null.abs().flatten(1).amax(-1)
        part = null[:, n + p :].abs().flatten(1)
        found = part.amax(-1) > 1e-8 * size if part.shape[-1] else torch.zeros_like(size, dtype=torch.bool)
        if self.some_held:
            pulled = torch.bmm(self.A[self.suspect].mT, null[:, n : n + p]) * self.held[self.suspect].unsqueeze(-1)
            found |= pulled.abs().flatten(1).amax(-1) > 1e-8 * size
        return found

    def solve(self, right: torch.Tensor) -> torch.Tensor:
        """Return K⁻¹ r for r (B, n + p + m + 2n), the least-squares solution of least norm in scaled unknowns where K is singular."""
        r_x, r_nu, r_lam, r_low, r_up = self.sizes.split(right)
        n, p = self.sizes.n, self.sizes.p
        fixed = torch.zeros_like(r_x)
        if self.some_held:
            fixed = torch.where(self.below, -r_low, torch.where(self.above, r_up, fixed))
            r_x = torch.where(self.held, fixed, r_x - mv(self.Q, fixed))
            r_nu = r_nu - mv(self.A, fixed) if p else r_nu
        elif self.damping is not None and self.bounds:
            _, low, up = self.damping.split(self.sizes.rows, -1)
            r_x = r_x - torch.where(self.below, r_low / low, 0.0) + torch.where(self.above, r_up / up, 0.0)
        r_rows = torch.where(self.chosen, r_lam.gather(-1, self.order), 0.0)
        if self.some_held and self.count:
            r_rows = r_rows - mv(self.rows, fixed)
        reduced = self._reduced(torch.cat([r_x, r_nu, r_rows], -1))
        dx, dnu, drows = reduced.split([n, p, self.count], -1)
        dlam = (-r_lam).scatter(-1, self.order, torch.where(self.chosen, drows, -r_lam.gather(-1, self.order)))
        low, up = self._bound_parts(right, dx, dnu, drows)
        return torch.cat([dx, dnu, dlam, low, up], -1)

    def _bound_parts(
        self, right: torch.Tensor, dx: torch.Tensor, dnu: torch.Tensor, drows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the parts of μ_l and μ_u in a solution, by their own rows of K or by that of x."""
        r_x, _, _, r_low, r_up = self.sizes.split(right)
        if not self.bounds:
            return -r_low, -r_up
        if self.damping is not None:
            _, low, up = self.damping.split(self.sizes.rows, -1)
            return torch.where(self.below, -(r_low + dx) / low, -r_low), torch.where(
                self.above, (dx - r_up) / up, -r_up
            )
        left = r_x - mv(self.Q, dx)
        left = left - tmv(self.A, dnu) if self.sizes.p else left
        left = left - tmv(self.rows, drows) if self.count else left
        return torch.where(self.below, -left, -r_low), torch.where(self.above, left, -r_up)

    def _reduced(self, right: torch.Tensor) -> torch.Tensor:
        scaled = right * self.scale
        found = torch.linalg.lu_solve(self.lu, self.pivots, scaled.unsqueeze(-1)).squeeze(-1)
        if len(self.suspect):
            found[self.suspect] = mv(self.inverse, scaled[self.suspect])
        return found * self.scale

    def in_units(self, right: torch.Tensor) -> torch.Tensor:
        """Return r (B, length) in units in which the largest entries of the rows of K are near one."""
        r_x, r_nu, r_lam, r_low, r_up = self.sizes.split(right)
        of_x, of_nu, of_rows = self.scale.split([self.sizes.n, self.sizes.p, self.count], -1)
        if self.some_held:
            reach = (self.Q.abs() * of_x.unsqueeze(-2)).amax(-1)
            for rows, of_row in ((self.A, of_nu), (self.rows, of_rows)):
                if rows.shape[-2]:
                    reach = torch.maximum(reach, (rows.abs() * of_row.unsqueeze(-1)).amax(-2))
            of_x = torch.where(self.held & (reach > 0), 1 / reach.clamp_min(1e-300), of_x)
        chosen = torch.where(self.chosen, of_rows, 1.0)
        of_lam = torch.ones_like(r_lam).scatter(-1, self.order, chosen)
        return torch.cat([of_x * r_x, of_nu * r_nu, of_lam * r_lam, r_low, r_up], -1)

    def changes(self, d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return by how much d (B, length) would be another if an inequality (B, m + 2n) were of the other kind, and the size of d (B, 1)."""
        dx = d[:, : self.sizes.n]
        inactive = torch.cat([mv(self.G, dx), dx, dx], -1).abs()
        change = torch.where(self.active, d[:, self.sizes.n + self.sizes.p :].abs(), inactive)
        return change, d.abs().amax(-1, keepdim=True)

    def times(self, d: torch.Tensor) -> torch.Tensor:
        """Return K d (B, n + p + m + 2n)."""
        dx, dnu, dlam, low, up = self.sizes.split(d)
        general = self.general
        top = mv(self.Q, dx)
        if self.sizes.p:
            top = top + tmv(self.A, dnu)
        rows = -dlam
        if self.count:
            chosen = torch.where(self.chosen, dlam.gather(-1, self.order), 0.0)
            top = top + tmv(self.rows, chosen)
            rows = rows.scatter(
                -1, self.order, torch.where(self.chosen, mv(self.rows, dx), -dlam.gather(-1, self.order))
            )
        below, above = -low, -up
        if self.bounds:
            top = top - torch.where(self.below, low, 0.0) + torch.where(self.above, up, 0.0)
            below, above = torch.where(self.below, -dx, -low), torch.where(self.above, dx, -up)
        if self.damping is not None:
            d_rows, d_low, d_up = self.damping.split(self.sizes.rows, -1)
            rows = torch.where(general, rows - d_rows * dlam, rows)
            below = torch.where(self.below, below - d_low * low, below)
            above = torch.where(self.above, above - d_up * up, above)
        return torch.cat([top, mv(self.A, dx) if self.sizes.p else dnu, rows, below, above], -1)
