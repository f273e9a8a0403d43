"""Both objectives linearised at an inner point φ: everything in the bounds that does not depend on an adjoint."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from bilevel._torch.factorisations import eigh, eigvalsh
from bilevel._torch.reverse import reverse_pass
from bilevel.certificates._second_derivatives import SecondDerivatives
from bilevel.equations.linearization import Linearization
from bilevel.equations.problem import Problem
from bilevel.linear._base import solve_linear
from bilevel.linear.cg import CG
from bilevel.tolerance import Target

__all__ = ["MOST_NUMBERS", "InnerPoint"]

# Matrices up to this many numbers are formed and factorised. For larger ones only products are used.
MOST_NUMBERS = 2**20
# The relative residual of solves for a refinement where there is no factorisation.
_KRYLOV_RELATIVE = 1e-6
# The largest number of halvings of a step that makes ‖∇G‖ larger.
_MOST_HALVINGS = 30


@dataclass(frozen=True, eq=False)
class InnerPoint:
    """G, F and their derivatives at φ, per problem of a batch of K.

    Parameters
    ----------
    lower, upper
        The inner objective G and the outer objective F, as problems of one list of tensors.
    x
        φ (K, n).
    needs_grad
        Which tensors make up θ, with p numbers in all.
    """

    lower: Problem
    upper: Problem
    x: torch.Tensor
    needs_grad: tuple[bool, ...]

    @property
    def eps(self) -> float:
        """The relative rounding of one operation."""
        return torch.finfo(self.x.dtype).eps

    @property
    def _second(self) -> SecondDerivatives:
        return SecondDerivatives(self.lower, self.upper, self.needs_grad)

    @cached_property
    def linear(self) -> Linearization:
        """∇_φ G with its graph."""
        return self.lower.linearize(self.x, self.needs_grad)

    @cached_property
    def residual(self) -> torch.Tensor:
        """∇_φ G (K, n)."""
        return self.linear.residual.detach()

    @cached_property
    def v(self) -> torch.Tensor:
        """∇_φ F (K, n), zero where F does not depend on φ."""
        with torch.enable_grad():
            point = self.x.detach().requires_grad_(True)
            shaped = point.reshape(*self.upper.system.batch_shape, self.upper.size)
            values = self.upper.system.outputs(shaped, *self.upper.tensors)
            if not values.requires_grad:
                return torch.zeros_like(self.x)
            (slope,) = torch.autograd.grad(values.sum(), point, allow_unused=True, materialize_grads=True)
        return slope

    @property
    def outer_size(self) -> int:
        """p: the number of outer variables of one problem."""
        levels = self.lower.system.levels
        count = 0
        for number, (tensor, want) in enumerate(zip(self.lower.tensors, self.needs_grad, strict=True)):
            shared = tensor.numel()
            for level in levels:
                shared //= level.size if level.batched[number] and level.size else 1
            count += shared if want else 0
        return count

    @property
    def factorable(self) -> bool:
        """Whether H is small enough to be formed."""
        return self.lower.batch * self.lower.size**2 <= MOST_NUMBERS

    @property
    def eigenvalues(self) -> torch.Tensor:
        """The computed eigenvalues of H (K, n), ascending, if H is formed."""
        return self._eigen[0]

    @cached_property
    def _eigen(self) -> tuple[torch.Tensor, torch.Tensor]:
        return eigh(self.linear.operator.dense())

    @cached_property
    def least(self) -> torch.Tensor:
        """A lower bound of the eigenvalues of H (K,), with a margin for rounding."""
        values = self._eigen[0]
        slack = (16 + self.lower.size) * self.eps * values.abs().amax(-1)
        return values[:, 0] - slack

    def solve(self, b: torch.Tensor, start: torch.Tensor | None = None) -> torch.Tensor:
        """Return H⁻¹ b for b (K, n): by the eigenvectors if H can be formed, else by conjugate gradients."""
        if self.factorable:
            values, vectors = self._eigen
            once = _spectral_solve(values, vectors, b)
            return once + _spectral_solve(values, vectors, b - self.linear.operator.matvec(once))
        target = Target(relative=_KRYLOV_RELATIVE, silent=True)
        return solve_linear(CG(), self.linear.operator, b, target, start).x

    @cached_property
    def cross(self) -> torch.Tensor | None:
        """B (K, n, p), or None if it is too large."""
        if self.lower.batch * self.lower.size * self.outer_size > MOST_NUMBERS:
            return None
        return self._second.cross(self.x, by_columns=self.outer_size < self.lower.size)

    @cached_property
    def cross_norm(self) -> torch.Tensor | None:
        """‖B‖ (K,), the spectral norm, or None if B is too large."""
        return None if self.cross is None else _spectral_norm(self.cross)

    def cross_square(self, u: torch.Tensor) -> torch.Tensor:
        """Return B Bᵀ u for u (K, n), problem by problem."""
        if self.lower.batch > 1:
            return self._second.cross_square(self.x, u)
        pulled = [part for part in self.linear.pullback(u) if part is not None]
        parts, dummy = self._pulled_graph
        return reverse_pass(parts, [dummy], pulled)[0]

    @cached_property
    def _pulled_graph(self) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Bᵀd and the auxiliary vector d with the graph between them, whose transpose is B."""
        with torch.enable_grad():
            dummy = torch.zeros_like(self.x, requires_grad=True)
            leaves = [leaf for leaf, want in zip(self.linear.leaves, self.needs_grad, strict=True) if want]
            parts = reverse_pass([self.linear.residual], leaves, [dummy], create_graph=True)
            return [part + 0 * dummy.sum() for part in parts], dummy

    @cached_property
    def sensitivity(self) -> torch.Tensor | None:
        """BᵀH⁻¹ (K, p, n), the negative derivative of φ*, or None if it is too large."""
        if not self.factorable or self.cross is None:
            return None
        values, vectors = self._eigen
        return ((vectors / values.unsqueeze(-2)) @ (vectors.mT @ self.cross)).mT

    @cached_property
    def sensitivity_norm(self) -> torch.Tensor | None:
        """‖BᵀH⁻¹‖ (K,), the spectral norm."""
        return None if self.sensitivity is None else _spectral_norm(self.sensitivity)

    def gradient(self, q: torch.Tensor) -> torch.Tensor:
        """Return ∇_θ F − Bᵀ q (K, p) for the adjoint q (K, n), problem by problem."""
        return self._second.lagrangian(self.x, q)

    def pulled(self, u: torch.Tensor) -> torch.Tensor:
        """Return Bᵀu (K, p) for u (K, n), problem by problem."""
        if self.factorable and self.cross is not None:
            return torch.einsum("kn,knp->kp", u, self.cross)
        return self.gradient(torch.zeros_like(u)) - self.gradient(u)

    def descended(self) -> InnerPoint:
        """Return the point after one steepest-descent step: a second point to compare with, for one product."""
        product = torch.linalg.vecdot(self.residual, self.linear.operator.matvec(self.residual))
        length = torch.linalg.vecdot(self.residual, self.residual) / product
        length = torch.where(torch.isfinite(length) & (product > 0), length, torch.zeros_like(length))
        return replace(self, x=self.x - length.unsqueeze(-1) * self.residual)

    def stepped(self, step: torch.Tensor, noise: torch.Tensor) -> InnerPoint:
        """Return the point minus ``step`` (K, n), shortened per problem until ‖∇G‖ is smaller, or at most ``noise`` (K,)."""
        length = torch.isfinite(step).all(-1).to(self.x)
        step = torch.where((length > 0).unsqueeze(-1), step, torch.zeros_like(step))
        r = self.residual.norm(dim=-1)
        for _ in range(_MOST_HALVINGS):
            moved = replace(self, x=self.x - length.unsqueeze(-1) * step)
            left = moved.residual.norm(dim=-1)
            longer = ~((left < r) | (left <= noise)) & (length > 0)
            if not bool(longer.any()):
                return moved
            length = torch.where(longer, 0.5 * length, length)
        return replace(self, x=self.x - torch.where(longer, 0.0, length).unsqueeze(-1) * step)

    def newton_contraction(self, before: InnerPoint, noise: torch.Tensor) -> torch.Tensor:
        """Return ‖H⁻¹∇G(φ⁺)‖/‖φ⁺ − φ‖ (K,) with H at φ: the length of the next Newton step relative to the step from ``before``.

        It is half of L_H ‖φ⁺ − φ‖/λ as observed along the step, and does not depend on the scale of φ. It is zero where ‖∇G‖ is
        at most ``noise`` (K,).

        References
        ----------
        Deuflhard, "Newton Methods for Nonlinear Problems", 2004, section 3.3: the natural monotonicity test.
        """
        step = (self.x - before.x).norm(dim=-1)
        again = before.solve(self.residual).norm(dim=-1)
        return torch.where(self.residual.norm(dim=-1) <= noise, torch.zeros_like(step), again / step)


def _spectral_solve(values: torch.Tensor, vectors: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (vectors @ ((vectors.mT @ b.unsqueeze(-1)) / values.unsqueeze(-1))).squeeze(-1)


def _spectral_norm(matrix: torch.Tensor) -> torch.Tensor:
    """Return the spectral norms (K,) of matrices (K, a, b), by the smaller of their Gram matrices."""
    gram = matrix @ matrix.mT if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT @ matrix
    if gram.shape[-1] == 0:
        return matrix.new_zeros(len(matrix))
    slack = 1 + 8 * gram.shape[-1] * torch.finfo(matrix.dtype).eps
    return eigvalsh(gram)[..., -1].clamp_min(0).sqrt() * slack
