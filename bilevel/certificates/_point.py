"""Both objectives linearised at a returned (φ, q), in float64, with the rounding error of each result.

The certificate of a float32 solve is computed in float64: the problem's tensors are exact numbers, and are converted.

The rounding error of a result is measured in two ways. First, the same numbers are evaluated in float32 and in float64. The difference is float32's
rounding, and float64's in proportion. Second, every number is moved by a unit in its last place. The larger change, times a margin, counts as the
rounding error.

The module is above 400 lines because it is one derivation: every quantity of the bounds C1 to C7 at one point, each computed once from the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch.func import vmap

from bilevel._torch.factorisations import eigh, eigvalsh
from bilevel._torch.reverse import grad, reverse_pass, vjp
from bilevel.equations.linearization import Linearization
from bilevel.equations.problem import Problem
from bilevel.linear._base import solve_linear
from bilevel.linear.cg import CG
from bilevel.tolerance import Target

__all__ = ["MOST_NUMBERS", "Point"]

# Matrices up to this many numbers are formed and factorised. For larger ones only products are used.
MOST_NUMBERS = 2**20
# The margin of a measured change, and the largest number of numbers in the copies of a problem that measure it.
_MARGIN = 8.0
# The share of ‖q‖ ‖rounding of ∇G‖ that the rounding of a value has at least: the product is reached if all of it points along q.
_VALUE_SHARE = 0.25
_SCATTERED_NUMBERS = 2**22
# The relative residual of solves for a refinement where there is no factorisation.
_KRYLOV_RELATIVE = 1e-6
# The largest number of halvings of a step that makes ‖∇G‖ larger.
_MOST_HALVINGS = 30
# The properties that do not depend on q.
_OF_X = ("linear", "residual", "v", "_eigen", "least", "cross", "cross_norm", "sensitivity", "sensitivity_norm")
# The properties that depend on q.
_OF_Q = ("hq", "rho", "corrected_value", "gradient")


@dataclass(frozen=True, eq=False)
class Rounding:
    """The rounding errors of the results of a :class:`Point`, per problem (K,)."""

    residual: torch.Tensor
    rho: torch.Tensor
    gradient: torch.Tensor
    value: torch.Tensor

    def larger(self, other: Rounding) -> Rounding:
        """Return the larger of each."""
        return Rounding(
            torch.maximum(self.residual, other.residual), torch.maximum(self.rho, other.rho),
            torch.maximum(self.gradient, other.gradient), torch.maximum(self.value, other.value),
        )  # fmt: skip

    def times(self, factor: float) -> Rounding:
        """Return each error times ``factor``."""
        return Rounding(factor * self.residual, factor * self.rho, factor * self.gradient, factor * self.value)


@dataclass(frozen=True, eq=False)
class Point:
    """G, F and their derivatives at φ with the adjoint q, per problem of a batch of K.

    Parameters
    ----------
    lower, upper
        The inner objective G and the outer objective F, as problems of one list of tensors.
    x, q
        φ and q (K, n).
    needs_grad
        Which tensors make up θ, with p numbers in all.
    """

    lower: Problem
    upper: Problem
    x: torch.Tensor
    q: torch.Tensor
    needs_grad: tuple[bool, ...]

    @property
    def eps(self) -> float:
        """The relative rounding of one operation."""
        return torch.finfo(self.x.dtype).eps

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

    @cached_property
    def hq(self) -> torch.Tensor:
        """H q (K, n)."""
        return self.linear.operator.matvec(self.q)

    @cached_property
    def rho(self) -> torch.Tensor:
        """ρ = v − H q (K, n)."""
        return self.v - self.hq

    @cached_property
    def corrected_value(self) -> torch.Tensor:
        """F − qᵀ∇_φ G (K,)."""
        return self.upper.value(self.x) - (self.q * self.residual).sum(-1)

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
        columns = self.outer_size < self.lower.size  # whichever are fewer
        by_vmap = self._cross_by_columns if columns else self._cross_by_vmap
        return _each(self.lower, self.x[:, None], by_vmap, self._cross_by_passes)

    @cached_property
    def gradient(self) -> torch.Tensor:
        """ĝ = ∇_θ F − Bᵀ q of each problem (K, p)."""
        return _each(self.lower, torch.stack([self.x, self.q], 1), self._gradient_by_vmap, self._gradient_by_passes)

    @cached_property
    def cross_norm(self) -> torch.Tensor | None:
        """‖B‖ (K,), the spectral norm, or None if B is too large."""
        return None if self.cross is None else _spectral_norm(self.cross)

    def cross_square(self, u: torch.Tensor) -> torch.Tensor:
        """Return B Bᵀ u for u (K, n), problem by problem."""
        if self.lower.batch > 1:
            return _each(self.lower, torch.stack([self.x, u], 1), self._square_by_vmap, None)
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

    def pulled(self, u: torch.Tensor) -> torch.Tensor:
        """Return Bᵀu (K, p) for u (K, n), problem by problem."""
        if self.factorable and self.cross is not None:
            return torch.einsum("kn,knp->kp", u, self.cross)
        return self.with_q(torch.zeros_like(u)).gradient - self.with_q(u).gradient

    @cached_property
    def rounding(self) -> Rounding:
        """The measured rounding error of each result in this dtype."""
        eps = self.eps
        sizes = Rounding(
            eps * (self.linear.operator.matvec(self.x).norm(dim=-1) + self.residual.norm(dim=-1)),
            eps * (self.v.norm(dim=-1) + self.hq.norm(dim=-1)),
            eps * self.gradient.norm(dim=-1),
            eps * self.corrected_value.abs(),
        )
        worst = sizes.larger(self._apart(self.perturbed(0)))
        if self.x.dtype != torch.float64:
            return self._least(worst.larger(self._apart(self.perturbed(1))))
        try:
            worst = worst.larger(self._float32_rounding())
        except (
            RuntimeError,
            TypeError,
            ValueError,
        ):  # no evaluation in float32, for a constant of another dtype inside, or no copies
            worst = worst.larger(self._apart(self.perturbed(1)))
        return self._least(worst)

    def _least(self, worst: Rounding) -> Rounding:
        """Return the rounding to count with, where the draws showed ``worst``."""
        # A value is one number, and few draws of one number may all be small. It holds qᵀ∇G, and with it the rounding of ∇G.
        least = _VALUE_SHARE * self.q.norm(dim=-1) * worst.residual
        return replace(worst, value=torch.maximum(worst.value, least)).times(_MARGIN)

    def _float32_rounding(self) -> Rounding:
        """Return the rounding errors in float32, scaled to float64's unit."""
        numbers = sum(t.numel() for t in self.lower.tensors if t.dtype.is_floating_point)
        # With few numbers a single draw may happen to change little, so several are made.
        draws = max(1, min(6, 64 // max(1, self.lower.size), _SCATTERED_NUMBERS // max(1, numbers)))
        lower, (x, q) = self.lower.perturbed_copies(2, draws, self.x, self.q)
        upper = Problem(replace(self.upper.system, levels=lower.system.levels), lower.tensors)
        wide = Point(lower, upper, x, q, self.needs_grad)
        single = torch.float32
        narrow = Point(lower.to(single), upper.to(single), x.to(single), q.to(single), self.needs_grad)
        apart = wide._apart(narrow).times(self.eps / torch.finfo(single).eps)
        return Rounding(
            *(
                part.nan_to_num(nan=0.0, posinf=0.0)
                .reshape(draws, -1)
                .amax(0)  # beyond float32's range nothing is told
                for part in (apart.residual, apart.rho, apart.gradient, apart.value)
            )
        )

    def _apart(self, other: Point) -> Rounding:
        return Rounding(
            (other.residual - self.residual).norm(dim=-1),
            (other.rho - self.rho).norm(dim=-1),
            (other.gradient - self.gradient).norm(dim=-1),
            (other.corrected_value - self.corrected_value).abs(),
        )

    def probe(self) -> Point:
        """Return the point after one steepest-descent step, with the same q: a second point to compare with, for one product."""
        product = torch.linalg.vecdot(self.residual, self.linear.operator.matvec(self.residual))
        length = torch.linalg.vecdot(self.residual, self.residual) / product
        length = torch.where(torch.isfinite(length) & (product > 0), length, torch.zeros_like(length))
        return replace(self, x=self.x - length.unsqueeze(-1) * self.residual)

    def refined(self, noise: torch.Tensor | None = None) -> Point:
        """Return φ⁺ = φ − H⁻¹∇G with the adjoint there, q⁺ = q + H(φ⁺)⁻¹ρ(φ⁺): two solves.

        If the step makes ‖∇G‖ larger, it is halved until it does not; φ is kept if no halving helps. ``noise`` (K,) is the
        rounding error of ∇G, if it is known.
        """
        moved = self.stepped(self.solve(self.residual), self.rounding.residual if noise is None else noise)
        return moved.with_q(self.q + moved.solve(moved.rho).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))

    def stepped(self, step: torch.Tensor, noise: torch.Tensor) -> Point:
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

    def newton_contraction(self, before: Point, noise: torch.Tensor) -> torch.Tensor:
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

    def with_q(self, q: torch.Tensor) -> Point:
        """Return the point with another adjoint. Properties of φ alone are kept."""
        other = replace(self, q=q)
        other.__dict__.update({name: self.__dict__[name] for name in _OF_X if name in self.__dict__})
        return other

    def with_rounding(self, rounding: Rounding) -> Point:
        """Return the point with the rounding errors of a nearby one."""
        other = self.with_q(self.q)
        other.__dict__.update({name: self.__dict__[name] for name in _OF_Q if name in self.__dict__}, rounding=rounding)
        return other

    def perturbed(self, seed: int) -> Point:
        """Return the point with every number moved by a unit in its last place, with random signs."""
        lower, (x, q) = self.lower.perturbed(seed, self.x, self.q)
        return Point(lower, Problem(self.upper.system, lower.tensors), x, q, self.needs_grad)

    def _chosen(
        self, tensors: Sequence[torch.Tensor]
    ) -> tuple[tuple[torch.Tensor, ...], Callable[..., list[torch.Tensor]]]:
        """Return the tensors of θ, and a function that puts others of their shapes in their places."""

        def merged(*moved: torch.Tensor) -> list[torch.Tensor]:
            feed = iter(moved)
            return [next(feed) if want else t for t, want in zip(tensors, self.needs_grad, strict=True)]

        return tuple(t for t, want in zip(tensors, self.needs_grad, strict=True) if want), merged

    # vmap is outermost in both: torch 2.13 differentiates vmap(grad(f)) wrongly from outside when f holds a batch norm.
    def _cross_by_vmap(self, rows: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        chosen, merged = self._chosen(tensors)
        system, x = self.lower.system, rows[0]
        made: Any = vjp(lambda *moved: grad(lambda point: system.output(point, *merged(*moved)), x)[0], *chosen)
        n = x.shape[0]
        pulled = vmap(made[1])(torch.eye(n, dtype=x.dtype, device=x.device))
        return torch.cat([part.reshape(n, -1) for part in pulled], dim=1)

    def _cross_by_columns(self, rows: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        chosen, merged = self._chosen(tensors)
        system, x = self.lower.system, rows[0]
        made: Any = vjp(lambda *moved: grad(lambda point: system.output(point, *merged(*moved)), x)[0], *chosen)

        # B w = ∇_u ⟨w, Bᵀu⟩.
        def column(w: torch.Tensor) -> torch.Tensor:
            return grad(lambda u: torch.dot(w, torch.cat([part.reshape(-1) for part in made[1](u)])), x)[0]

        units = torch.eye(sum(t.numel() for t in chosen), dtype=x.dtype, device=x.device)
        return vmap(column)(units).mT

    def _square_by_vmap(self, rows: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        chosen, merged = self._chosen(tensors)
        system, (x, u) = self.lower.system, rows
        made: Any = vjp(lambda *moved: grad(lambda point: system.output(point, *merged(*moved)), x)[0], *chosen)
        fixed = [part.detach() for part in made[1](u)]
        # B w = ∇_u ⟨w, Bᵀu⟩.
        return grad(lambda v: torch.stack([(a * b).sum() for a, b in zip(fixed, made[1](v), strict=True)]).sum(), u)[0]

    def _cross_by_passes(self, single: Problem, rows: torch.Tensor) -> torch.Tensor:
        linear = single.linearize(rows[:1], self.needs_grad)
        units = torch.eye(self.lower.size, dtype=rows.dtype, device=rows.device)
        return torch.stack([_joined(linear.pullback(unit[None])) for unit in units])

    def _gradient_by_vmap(self, rows: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        chosen, merged = self._chosen(tensors)
        lower, upper = self.lower.system, self.upper.system
        x, q = rows

        def lagrangian(*moved: torch.Tensor) -> torch.Tensor:
            feed = merged(*moved)
            (slope,) = grad(lambda point: lower.output(point, *feed), x)
            return upper.output(x, *feed) - torch.dot(q, slope)

        parts = grad(lagrangian, *chosen)
        return torch.cat([part.reshape(-1) for part in parts])

    def _gradient_by_passes(self, single: Problem, rows: torch.Tensor) -> torch.Tensor:
        pulled = _joined(single.linearize(rows[:1], self.needs_grad).pullback(rows[1:]))
        with torch.enable_grad():
            leaves = [
                t.detach().requires_grad_(True) if want else t
                for t, want in zip(single.tensors, self.needs_grad, strict=True)
            ]
            value = self.upper.system.output(rows[0], *leaves)
            chosen = [leaf for leaf, want in zip(leaves, self.needs_grad, strict=True) if want]
            if not value.requires_grad:
                return -pulled
            slopes = torch.autograd.grad(value, chosen, allow_unused=True, materialize_grads=True)
        return _joined(slopes) - pulled


def _joined(parts: Sequence[torch.Tensor | None]) -> torch.Tensor:
    return torch.cat([part.reshape(-1) for part in parts if part is not None])


def _spectral_solve(values: torch.Tensor, vectors: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (vectors @ ((vectors.mT @ b.unsqueeze(-1)) / values.unsqueeze(-1))).squeeze(-1)


def _spectral_norm(matrix: torch.Tensor) -> torch.Tensor:
    """Return the spectral norms (K,) of matrices (K, a, b), by the smaller of their Gram matrices."""
    gram = matrix @ matrix.mT if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT @ matrix
    if gram.shape[-1] == 0:
        return matrix.new_zeros(len(matrix))
    slack = 1 + 8 * gram.shape[-1] * torch.finfo(matrix.dtype).eps
    return eigvalsh(gram)[..., -1].clamp_min(0).sqrt() * slack


def _each(
    problem: Problem,
    rows: torch.Tensor,
    by_vmap: Callable[..., torch.Tensor],
    by_passes: Callable[[Problem, torch.Tensor], torch.Tensor] | None,
) -> torch.Tensor:
    """Return a function of each problem's ``rows`` (K, k, n) and tensors, all at once if it can be transformed."""
    system = problem.system
    shaped = rows.reshape(*system.batch_shape, *rows.shape[1:])
    try:
        with torch.no_grad():
            found: torch.Tensor = system.lifted(by_vmap)(shaped, *problem.tensors)
        return found.detach().reshape(problem.batch, *found.shape[len(system.batch_shape) :])
    except RuntimeError:
        if by_passes is None:
            raise
        # Something in the function has no rule for a transform; reverse passes can always be made.
        return torch.stack([by_passes(problem.single(k), rows[k]).detach() for k in range(problem.batch)])
