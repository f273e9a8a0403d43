"""The KKT matrix of sparse programs on their active sets, factorised by SuperLU: the counterpart of :mod:`bilevel.quadratic_programs._kkt`.

The factorised matrix has δ added to its diagonal, with the sign of a quasi-definite matrix, so that pivots may stay on the diagonal and the
order of elimination goes by sparsity alone. Refinement takes δ out of the solutions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from bilevel.quadratic_programs._balance import sparse_balance
from bilevel.quadratic_programs._kkt import Sizes

__all__ = ["SparseFactor"]

_SHIFT = 1e-9  # δ, relative to a scaled matrix with entries of at most one
_NULL = 1e-2  # a solution of a random right-hand side that is this times 1/δ large shows a null vector
_REFINEMENTS = 6


class SparseFactor:
    """The factorised K of a batch of sparse programs, one by one.

    Parameters
    ----------
    sizes
        n, p, m.
    matrices
        For each problem Q, A and G as scipy's CSR matrices.
    active
        (B, m + 2n) bool.
    """

    def __init__(self, sizes: Sizes, matrices: Sequence[tuple[Any, Any, Any]], active: np.ndarray) -> None:
        self._keep(
            sizes, [OneFactor(sizes, *each, marks) for each, marks in zip(matrices, active, strict=True)], active
        )

    @classmethod
    def of(cls, sizes: Sizes, ones: list[OneFactor], active: np.ndarray) -> SparseFactor:
        """Return the factors ``ones`` as one."""
        made = cls.__new__(cls)
        made._keep(sizes, ones, active)
        return made

    def _keep(self, sizes: Sizes, ones: list[OneFactor], active: np.ndarray) -> None:
        self.sizes, self.ones, self.active = sizes, ones, torch.from_numpy(active)
        self.singular = torch.tensor([one.singular for one in self.ones], dtype=torch.bool)
        self.by_inequalities = torch.tensor([one.by_inequalities for one in self.ones], dtype=torch.bool)

    def solve(self, right: torch.Tensor) -> torch.Tensor:
        """Return K⁻¹ r (B, length)."""
        return torch.from_numpy(np.stack([one.solve(r) for one, r in zip(self.ones, right.numpy(), strict=True)]))

    def times(self, d: torch.Tensor) -> torch.Tensor:
        """Return K d (B, length)."""
        return torch.from_numpy(np.stack([one.times(v) for one, v in zip(self.ones, d.numpy(), strict=True)]))

    def in_units(self, right: torch.Tensor) -> torch.Tensor:
        """Return r (B, length) in units in which the largest entries of the rows of K are near one."""
        return torch.from_numpy(np.stack([one.units() for one in self.ones])) * right

    def changes(self, d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return by how much d would be another if an inequality (B, m + 2n) were of the other kind, and the size of d (B, 1)."""
        n, p = self.sizes.n, self.sizes.p
        rows = np.stack([one.G @ v[:n] for one, v in zip(self.ones, d.numpy(), strict=True)])
        inactive = torch.cat([torch.from_numpy(rows), d[:, :n], d[:, :n]], -1).abs()
        return torch.where(self.active, d[:, n + p :].abs(), inactive), d.abs().amax(-1, keepdim=True)


class OneFactor:
    """The factorised K of one program."""

    def __init__(self, sizes: Sizes, Q: Any, A: Any, G: Any, active: np.ndarray) -> None:
        self.sizes, self.Q, self.A, self.G = sizes, Q, A, G
        n, m = sizes.n, sizes.m
        self.rows = np.flatnonzero(active[:m])
        self.low, self.up = active[m : m + n], active[m + n :] & ~active[m : m + n]
        self.held = self.low | self.up
        self.free = np.flatnonzero(~self.held)
        self.tight = G[self.rows]
        self._factorise()

    def _factorise(self) -> None:
        import scipy.sparse as sp
        from scipy.sparse.linalg import splu

        free, k = self.free, self.sizes.p + len(self.rows)
        self.block = sp.vstack([self.A, self.tight], format="csr")
        E = self.block[:, free]
        self.K = sp.bmat([[self.Q[free][:, free], E.T], [E, sp.csr_matrix((k, k))]], format="csc")
        self.scale = sparse_balance(self.Q[free][:, free], E)
        stretch = sp.diags(self.scale)
        self.sign = np.concatenate([np.ones(len(free)), -np.ones(k)])
        scaled = (stretch @ self.K @ stretch + _SHIFT * sp.diags(self.sign)).tocsc()
        self.lu: Any = None
        self.singular = self.by_inequalities = False
        if not self.K.shape[0]:
            return
        options = {"SymmetricMode": True, "Equil": False}
        self.lu = splu(scaled, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=1e-8, options=options)
        self._look_for_null_vectors()

    def _look_for_null_vectors(self) -> None:
        start = np.random.default_rng(0).standard_normal(self.K.shape[0])
        vector = self.lu.solve(start / np.linalg.norm(start))
        length = np.linalg.norm(vector)
        self.singular = not np.isfinite(length) or bool(length > _NULL / _SHIFT / np.sqrt(len(start)))
        if self.singular:
            null = vector * self.scale / max(length, 1e-300)
            nu, lam = np.split(null[len(self.free) :], [self.sizes.p])
            rows = self.block.T @ np.concatenate([nu, lam])
            size = np.abs(null).max()
            found = np.abs(lam).max(initial=0.0), np.abs(rows[self.held]).max(initial=0.0)
            self.by_inequalities = bool(max(found) > 1e-6 * size)

    def _reduced(self, right: np.ndarray) -> np.ndarray:
        if self.lu is None:
            return right
        right = self.scale * right
        best = d = np.asarray(self.scale * self.lu.solve(right))
        smallest = float("inf")
        for _ in range(_REFINEMENTS):
            left = right - self.scale * (self.K @ d)
            size = float(np.linalg.norm(left))
            if not size < 0.5 * smallest:
                break
            best, smallest = d, size
            if size <= 1e-16 * np.linalg.norm(right):
                break
            d = d + self.scale * self.lu.solve(left)
        return best

    def solve(self, right: np.ndarray) -> np.ndarray:
        """Return K⁻¹ r (length,)."""
        n, p, m = self.sizes.n, self.sizes.p, self.sizes.m
        r_x, r_nu, r_lam, r_low, r_up = np.split(right, np.cumsum(self.sizes.parts)[:-1])
        dx = np.where(self.low, -r_low, np.where(self.up, r_up, 0.0))
        top = (r_x - self.Q @ dx)[self.free]
        rest = np.concatenate([r_nu, r_lam[self.rows]]) - self.block @ dx
        found = self._reduced(np.concatenate([top, rest]))
        dx[self.free] = found[: len(self.free)]
        weights = found[len(self.free) :]
        dlam = -r_lam
        dlam[self.rows] = weights[p:]
        left = r_x - self.Q @ dx - self.block.T @ weights
        low, up = np.where(self.low, -left, -r_low), np.where(self.up, left, -r_up)
        assert len(dlam) == m and len(dx) == n
        return np.concatenate([dx, weights[:p], dlam, low, up])

    def units(self) -> np.ndarray:
        """Return a unit for each row of K (length,)."""
        n, p, m = self.sizes.n, self.sizes.p, self.sizes.m
        of_free, of_block = np.split(self.scale, [len(self.free)])
        of_x, of_lam = np.zeros(n), np.ones(m)
        of_x[self.free] = of_free
        reach = abs(self.Q).multiply(of_x).tocsr().max(axis=1).toarray().ravel()
        if len(of_block):
            reach = np.maximum(reach, abs(self.block).multiply(of_block[:, None]).tocsr().max(axis=0).toarray().ravel())
        of_x[self.held] = np.where(reach > 0, 1 / np.where(reach > 0, reach, 1.0), 1.0)[self.held]
        of_lam[self.rows] = of_block[p:]
        return np.concatenate([of_x, of_block[:p], of_lam, np.ones(2 * n)])

    def times(self, d: np.ndarray) -> np.ndarray:
        """Return K d (length,)."""
        dx, dnu, dlam, low, up = np.split(d, np.cumsum(self.sizes.parts)[:-1])
        top = self.Q @ dx + self.A.T @ dnu + self.tight.T @ dlam[self.rows]
        top = top - np.where(self.low, low, 0.0) + np.where(self.up, up, 0.0)
        rows = -dlam
        rows[self.rows] = self.tight @ dx
        return np.concatenate([top, self.A @ dx, rows, np.where(self.low, -dx, -low), np.where(self.up, dx, -up)])
