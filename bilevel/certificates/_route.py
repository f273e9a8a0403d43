"""Tight bounds where H is known by its products alone: refine, recheck, and add the distance (C6).

From the returned (φ, q) conjugate gradients lead to better points (φ⁺, q⁺). The formulas hold at each of them. With the distance they bound the
errors at (φ, q): ‖φ − φ*‖ ≤ ‖φ − φ⁺‖ + ‖∇G(φ⁺)‖/μ, and so on. Only the recheck matters for the proof. The accuracy of the solves decides how tight
the bound is. Each solve therefore stops when the remainder at φ⁺ is a tenth of the bound.
"""

from __future__ import annotations

import math

import torch

from bilevel.certificates._bounds import Split
from bilevel.certificates._errors import Errors, Spectral, errors_at, number, through
from bilevel.certificates._point import Point, Rounding
from bilevel.certificates.constants import Constants
from bilevel.certificates.refuting import contradicted
from bilevel.linear.cg import CG
from bilevel.operators import LinearOperator

__all__ = ["Route"]

# What the formulas may leave at the better point, of the whole bound: it is then at most 11/9 of the error.
_SMALL = 0.1
_MOST_PASSES = 20
# Relative residuals: of the first Newton step and of an adjoint before anything is known of the errors, and the least of a later
# step, whose second-order part is likely to be larger.
_FIRST, _ADJOINT, _FORCING = 1e-2, 5e-2, 1e-4
# A pass that leaves more than this of everything that is not tight yet has met rounding, or a method that does not work here.
_PROGRESS = 0.9
_CARE = 0.5
# How much of the products left a solve may take, so that none goes without.
_SHARES = (0.25, 0.5, 0.5)
# Rounding is measured anew where φ or q has changed by more than this of itself, and taken for that much larger where not.
_SAME_ROUNDING = 0.1


class Route:
    """Points better than ``exact`` and the bounds that follow from them; :meth:`follow` continues.

    Parameters
    ----------
    exact
        The point whose errors are bounded.
    known
        The problem's constants.
    spectral
        The results of Lanczos runs at ``exact``.
    products
        The largest number of products.
    """

    def __init__(self, exact: Point, known: Constants, spectral: Spectral, products: int) -> None:
        self.exact, self.known, self.spectral = exact, known, spectral
        self.left = products
        self.at = self._measured = exact
        self.there: Errors | None = None
        self._part = 0.8  # of what may be left, that one of the residuals may leave; halved before its first use
        self._turned = torch.zeros_like(exact.q)
        self._best: Errors | None = None
        self._like = exact.x.new_zeros(len(exact.x))
        self.contradicted = torch.zeros_like(self._like, dtype=torch.bool)

    def follow(self, direct: Errors, spectral: Spectral, gradient: bool) -> Errors:
        """Return the bounds of φ and q, and of ĝ if ``gradient``, once they are tight or the products are spent.

        ``direct`` are the bounds at ``exact`` that are already known, with everything in ``spectral``.
        """
        self._best = direct if self._best is None else self._best.better(direct)
        if spectral is not self.spectral:
            self.spectral = spectral
            if self.there is not None:
                self._recheck()
        names = self._attainable(gradient)
        for _ in range(_MOST_PASSES):
            loose = self._loose(names)
            if self.left <= 0 or not bool(loose.any()):
                break
            before = self.there
            self._advance(loose, gradient)
            if before is not None and not self._gained(before, names, loose):
                break
        return self._best

    def _attainable(self, gradient: bool) -> list[str]:
        """Return which bounds can be computed from the known constants."""
        known, names = self.known, []
        if known.strong_convexity is not None or self.spectral.curvature is not None:
            names.append("inner")
            if None not in (known.outer_smoothness, known.hessian_lipschitz):
                names.append("adjoint")
                constants = (known.cross_lipschitz, known.outer_cross_lipschitz, self.spectral.cross_norm)
                if gradient and not any(constant is None for constant in constants):
                    names.append("gradient")
        return names

    def _loose(self, names: list[str]) -> torch.Tensor:
        """Bool (K,): some bound of ``names`` is not tight yet."""
        there, best = self.there, self._best
        loose = torch.full(self._like.shape, there is None and bool(names), device=self._like.device)
        if there is None or best is None:
            return loose
        for name in names:
            remainder, whole = getattr(there, name).value, getattr(best, name).value
            loose = loose | ~(remainder <= _SMALL * whole)  # where nothing is known of either, neither can be had
        return loose

    def _gained(self, before: Errors, names: list[str], loose: torch.Tensor) -> bool:
        for name in names:
            now, then = getattr(self.there, name).value, getattr(before, name).value
            if bool((loose & (now < _PROGRESS * then)).any()):
                return True
        return False

    def _advance(self, loose: torch.Tensor, gradient: bool) -> None:
        """Take the ``loose`` problems an inexact Newton step and an adjoint further, and recheck."""
        at, first, rounding = self.at, self.there is None, self._rounding
        r, rho = at.inner.residual.norm(dim=-1), at.rho.norm(dim=-1)
        l_f, l_h = number(self.known.outer_smoothness, r), number(self.known.hessian_lipschitz, r)
        mu = self._curvature_at(at)
        if first:
            # What ρ accounts for; as well a good begin for the adjoint.
            want = torch.maximum(_ADJOINT * rho, rounding.rho)
            self._turned = self._solve(at.inner.linear.operator, at.rho, loose, want, _SHARES[0])
            want_r = _FIRST * r
            want_rho = torch.zeros_like(r)
        else:
            want_r, want_rho = self._targets(mu, gradient)
            want_r = torch.where(l_h == 0, want_r, torch.maximum(want_r, _FORCING * r))
        want = torch.maximum(want_r, rounding.residual)
        step = self._solve(at.inner.linear.operator, at.inner.residual, loose, want, _SHARES[1])
        inner = at.inner.stepped(step, torch.zeros_like(r)) if bool((step != 0).any()) else at.inner
        at = Point(inner, at.q + self._turned if first else at.q)
        rho = at.rho.norm(dim=-1)
        # No more of ρ need go than what φ's own error adds to it.
        beside = (l_f + l_h * at.q.norm(dim=-1)) * at.inner.residual.norm(dim=-1) / mu
        enough = (
            _ADJOINT * rho if first else torch.minimum(_ADJOINT * rho, _SMALL * beside.nan_to_num(nan=float("inf")))
        )
        threshold = torch.maximum(torch.maximum(want_rho, enough), self.exact.rounding.rho)
        change = self._solve(at.inner.linear.operator, at.rho, loose, threshold, _SHARES[2] if first else 1.0)
        further = at.with_q(at.q + change)
        closer = further.rho.norm(dim=-1) < rho
        self.at = further if bool(closer.all()) else at.with_q(torch.where(closer.unsqueeze(-1), further.q, at.q))
        self._recheck()

    def _recheck(self) -> None:
        """Bound the errors at the current point, and through it those at ``exact``."""
        exact, at = self.exact, self.at
        if not (self._near(at.x, self._measured.x) and self._near(at.q, self._measured.q)):
            self._measured = at
        known, spectral = self.spectral.at_point(self.known, exact, at)
        self.there = errors_at(at, known, spectral, self._rounding)
        assert self._best is not None
        self.contradicted = self.contradicted | contradicted(exact, at, self._best, self.there)
        # Without convexity the bounds there are finite only where L_H ‖φ − φ⁺‖, and the radius there, leave λ_min(H(φ)) positive: G is
        # convex as far as that, and the minimum near φ⁺ the one near φ.
        self._best = self._best.better(through(exact, at, self.there, self._turned))

    @property
    def _rounding(self) -> Rounding:
        """The rounding errors at the current point: measured there, or at a nearby point and taken for a little larger."""
        measured = self._measured.rounding
        return measured if self.at is self._measured else measured.times(1 + _SAME_ROUNDING)

    @staticmethod
    def _near(a: torch.Tensor, b: torch.Tensor) -> bool:
        return bool(((a - b).norm(dim=-1) <= _SAME_ROUNDING * b.norm(dim=-1)).all())

    def _targets(self, mu: torch.Tensor, gradient: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the norms of ∇G and of ρ (K,) at which the formulas leave a tenth of each bound."""
        best, known = self._best, self.known
        assert best is not None
        size = self.at.q.norm(dim=-1)
        bend = number(known.outer_smoothness, mu) + number(known.hessian_lipschitz, mu) * size
        norm_b = number(self.spectral.at_point(known, self.exact, self.at)[1].cross_norm, mu)
        turn = norm_b * bend / mu + number(known.cross_lipschitz, mu) * size + number(known.outer_cross_lipschitz, mu)

        # The formulas leave more than this plan says where ‖q‖ grows, or the bounds are not tight yet.
        self._part *= _CARE

        def share(bound: Split, factor: torch.Tensor) -> torch.Tensor:
            # A bound that cannot be had asks for nothing.
            part = self._part * _SMALL * bound.value / factor
            return torch.where(torch.isfinite(factor) & torch.isfinite(part), part, torch.full_like(part, float("inf")))

        epsilon = torch.minimum(2 * share(best.inner, torch.ones_like(mu)), share(best.adjoint, bend / mu))
        rho = share(best.adjoint, 1 / mu)
        if gradient:
            epsilon = torch.minimum(epsilon, share(best.gradient, turn))
            rho = torch.minimum(rho, share(best.gradient, norm_b / mu))
        return mu * epsilon, rho

    def _curvature_at(self, at: Point) -> torch.Tensor:
        """Return the lower bound of H's eigenvalues in the formulas' denominators, if there is one (K,)."""
        _, spectral = self.spectral.at_point(self.known, self.exact, at)
        mu = number(self.known.strong_convexity, self._like)
        mu = torch.zeros_like(mu) if self.known.strong_convexity is None else mu
        if spectral.curvature is not None:
            mu = torch.maximum(mu, spectral.curvature)
        return mu.clamp_min(torch.finfo(mu.dtype).tiny)

    def _solve(
        self, operator: LinearOperator, rhs: torch.Tensor, loose: torch.Tensor, threshold: torch.Tensor, share: float
    ) -> torch.Tensor:
        """Return x (K, n) with ‖b − H x‖ ≤ ``threshold`` where ``loose`` and a ``share`` of the products left suffices; else zero."""
        going = loose & torch.isfinite(rhs).all(-1) & (rhs != 0).any(-1)
        if self.left <= 0 or not bool(going.any()):
            return torch.zeros_like(rhs)
        scale = torch.where(going, rhs.abs().amax(-1), torch.ones_like(threshold))
        unit = torch.where(going.unsqueeze(-1), rhs / scale.unsqueeze(-1), torch.zeros_like(rhs))
        found = CG(max_steps=math.ceil(share * self.left)).solve(operator, unit, threshold / scale)
        self.left -= int(found.iterations.max())
        x = found.x * scale.unsqueeze(-1)
        return torch.where(torch.isfinite(x).all(-1, keepdim=True) & going.unsqueeze(-1), x, torch.zeros_like(x))
