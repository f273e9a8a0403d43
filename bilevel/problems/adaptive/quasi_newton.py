"""A preconditioner for the next solves, from the products and gradients of earlier ones.

A product y = H s of conjugate gradients is a pair (s, y) with H⁻¹ y = s. The change y of the gradient along a step s of an inner solver is one
approximately. The two-loop recursion over such pairs is a symmetric positive definite approximation of H⁻¹ that costs no product. If H is
constant and the pairs are conjugate, it is the inverse of H on their span, and a second right-hand side is solved there at once.
Least squares over all pairs do the same for pairs of a constant H that are not conjugate. H is constant if sᵢᵀyⱼ = sⱼᵀyᵢ.

References
----------
Morales & Nocedal, "Automatic preconditioning by limited memory quasi-Newton updating", SIAM J. Optim. 2000; for the pairs of an inner solver
in the adjoint's system, Ramzi et al., "SHINE: sharing the inverse estimate from the forward pass", ICLR 2022.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from bilevel._torch.factorisations import pinv
from bilevel.equations.problem import Problem
from bilevel.operators import LinearOperator

__all__ = ["JointOperator", "RecordedOperator", "RecordingProblem", "SecantPairs"]

_MOST_PAIRS = 40
_MOST_BYTES = 2**28
# Least squares over m pairs of size n cost m² n operations. Up to this number that is less than a few products.
_MOST_WORK = 2e7
# Combinations of steps below this many times the relative asymmetry of SᵀY are left out.
_MARGIN = 10.0
# The smallest number of pairs whose asymmetry tells whether H is constant.
_FEWEST_TO_TELL = 3


class SecantPairs:
    """Pairs (s, y) with y ≈ H s of a batch of K problems, as a function r ↦ M⁻¹ r. If there is no room, the oldest are dropped."""

    def __init__(self, most: int = _MOST_PAIRS) -> None:
        self.pairs: deque[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = deque(maxlen=most)
        self.scale: torch.Tensor | None = None  # sᵀy / yᵀy of the newest pair (K,), 0 before the first
        self.constant = False  # whether the pairs of the latest fit agree that H does not change
        self.softest = 0.0  # the largest ‖s‖² / sᵀy since it was last set to zero: at most ‖H⁻¹‖

    def add(self, s: torch.Tensor, y: torch.Tensor) -> None:
        """Keep a pair (K, n), for the problems in which sᵀy is positive beyond rounding."""
        room = _MOST_BYTES // max(1, 2 * s.numel() * s.element_size())
        while self.pairs and len(self.pairs) >= room:
            self.pairs.popleft()
        sy, yy = torch.linalg.vecdot(s, y), torch.linalg.vecdot(y, y)
        eps = torch.finfo(s.dtype).eps
        fit = torch.isfinite(sy) & torch.isfinite(yy) & (sy > eps**0.5 * s.norm(dim=-1) * yy.sqrt()) & (yy > 0)
        if not bool(fit.any()):
            return
        zero, keep = torch.zeros_like(s), fit.unsqueeze(-1)
        inverse = torch.where(fit, 1 / sy, torch.zeros_like(sy))
        self.softest = max(self.softest, float((torch.linalg.vecdot(s, s) * inverse).max()))
        self.pairs.append((torch.where(keep, s, zero), torch.where(keep, y, zero), inverse))
        before = torch.zeros_like(sy) if self.scale is None else self.scale
        self.scale = torch.where(fit, sy / yy, before)

    def guess(self, r: torch.Tensor) -> torch.Tensor:
        """Return M⁻¹ r, and zero for problems without a pair. It is a good trial step where the next pass shows how good it was."""
        if self.scale is None:
            return torch.zeros_like(r)
        known, rest = self.fit(r)
        return known + torch.where((self.scale > 0).unsqueeze(-1), self(rest), torch.zeros_like(r))

    def fit(self, r: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the combination s of the steps whose y is nearest to r, and r − y (K, n).

        If H changed on the way, the pairs contradict each other, and SᵀY − YᵀS is not zero. Combinations that nearly cancel then show the change and
        not H, and are left out. So the result is exact for a quadratic objective, and near zero far from one.
        """
        most = int((_MOST_WORK / max(1, r.numel())) ** 0.5)
        pairs = list(self.pairs)[-most:] if most else []
        if not pairs:
            return torch.zeros_like(r), r
        S, Y = (
            torch.stack(vectors, dim=-1) for vectors in zip(*((s, y) for s, y, _ in pairs), strict=True)
        )  # (K, n, m)
        energy = S.mT @ Y
        weight = _inverse_root(energy.diagonal(dim1=-2, dim2=-1))
        doubt = ((energy - energy.mT) * weight.unsqueeze(-1) * weight.unsqueeze(-2)).abs().amax(dim=(-2, -1))
        scale = _inverse_root(torch.linalg.vecdot(Y, Y, dim=-2))
        Q, R = torch.linalg.qr(Y * scale.unsqueeze(-2))
        few = len(pairs) < _FEWEST_TO_TELL
        self.constant = not few and bool((doubt <= torch.finfo(r.dtype).eps ** 0.25).all())
        least = (_MARGIN * doubt.nan_to_num(nan=1.0)).clamp(min=torch.finfo(r.dtype).eps ** 0.5)
        shares = scale.unsqueeze(-1) * (pinv(R, rtol=least) @ (Q.mT @ r.unsqueeze(-1)))
        return (S @ shares).squeeze(-1), r - (Y @ shares).squeeze(-1)

    def __call__(self, r: torch.Tensor) -> torch.Tensor:
        """Return M⁻¹ r for r (K, n): 4 n operations for each pair."""
        q, shares = r, []
        for s, y, inverse in reversed(self.pairs):
            share = (inverse * torch.linalg.vecdot(s, q)).unsqueeze(-1)
            q = q - share * y
            shares.append(share)
        if self.scale is not None:
            q = torch.where(self.scale > 0, self.scale, torch.ones_like(self.scale)).unsqueeze(-1) * q
        z = q
        for (s, y, inverse), share in zip(self.pairs, reversed(shares), strict=True):
            z = z + (share - (inverse * torch.linalg.vecdot(y, z)).unsqueeze(-1)) * s
        return z


class RecordedOperator(LinearOperator):
    """A symmetric operator that keeps its products until :meth:`tell` passes them to a :class:`SecantPairs`.

    It does so after a solve, because a preconditioner that changes during a solve makes its directions lose their conjugacy.
    """

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__(
            operator.batch, operator.size, operator.dtype, operator.device, symmetric=True,
            expect_definite=operator.expect_definite, materialize=operator.dense,
        )  # fmt: skip
        self.memo = operator.memo
        self._operator = operator
        self._made: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._told = 0

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        """Return H v."""
        product = self._operator.matvec(v)
        self._keep(v, product)
        return product

    def _keep(self, v: torch.Tensor, product: torch.Tensor) -> None:
        self._made.append((v.detach().clone(), product))
        dropped = max(0, len(self._made) - _MOST_PAIRS)
        del self._made[:dropped]
        self._told = max(0, self._told - dropped)

    rmatvec = matvec

    def tell(self, secants: SecantPairs) -> None:
        """Pass the products made since the last call to ``secants``."""
        for s, y in self._made[self._told :]:
            secants.add(s, y)
        self._told = len(self._made)

    def on_span(self, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x in the span of the vectors multiplied so far, with b − H x orthogonal to it, and b − H x (K, n). This costs no product.

        So a solve for a second right-hand side need not repeat the products of the first.
        """
        if not self._made:
            return torch.zeros_like(b), b
        return self._combined(b)[:2]

    def conjugate(self, p: torch.Tensor) -> torch.Tensor:
        """Return p (K, n) made conjugate to all vectors multiplied so far. This costs no product."""
        if not self._made:
            return p
        V, W = self._vectors()
        return p - (_shares(V, W, W @ p.unsqueeze(-1)) @ V).squeeze(-2)

    def _combined(self, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return x and b − H x of :meth:`on_span`, and the coefficients of x (K, 1, m)."""
        V, W = self._vectors()
        shares = _shares(V, W, V @ b.unsqueeze(-1))
        return (shares @ V).squeeze(-2), b - (shares @ W).squeeze(-2), shares

    def _vectors(self) -> tuple[torch.Tensor, torch.Tensor]:
        V, W = (torch.stack(vectors, dim=1) for vectors in zip(*self._made, strict=True))  # (K, m, n)
        return V, W


class JointOperator(RecordedOperator):
    """The Hessian of one problem. With each product H v it computes Bᵀv (p,), in the same pass, and keeps both.

    Parameters
    ----------
    operator
        H.
    joint
        v ↦ (H v, Bᵀv).
    """

    def __init__(
        self, operator: LinearOperator, joint: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        super().__init__(operator)
        self._joint = joint
        self._pulled: list[torch.Tensor] = []

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        """Return H v."""
        product, pulled = self._joint(v)
        self._keep(v, product)
        self._pulled = [*self._pulled, pulled][-_MOST_PAIRS:]
        return product

    rmatvec = matvec

    def solve_on_span(self, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return x and b − H x (1, n) of :meth:`on_span`, and Bᵀx (p,). This costs no pass."""
        x, rest, shares = self._combined(b)
        return x, rest, shares[0, 0] @ torch.stack(self._pulled)


def _shares(V: torch.Tensor, W: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return (VᵀHV)⁻¹ ``right`` (K, m, 1) as (K, 1, m), of vectors V and their products W (K, m, n)."""
    gram = V @ W.mT
    scale = _inverse_root(gram.diagonal(dim1=-2, dim2=-1)).unsqueeze(-1)
    gram = 0.5 * scale * (gram + gram.mT) * scale.mT
    if not bool(torch.isfinite(gram).all()):
        return torch.zeros_like(right.mT)
    inverse = pinv(gram, hermitian=True, rtol=torch.finfo(right.dtype).eps ** 0.5)
    return (scale * (inverse @ (scale * right))).mT


def _inverse_root(t: torch.Tensor) -> torch.Tensor:
    return torch.where(t > 0, t.rsqrt(), torch.zeros_like(t))


@dataclass(frozen=True, eq=False)
class RecordingProblem(Problem):
    """A problem that keeps the last points at which a solver evaluated its gradient. A gradient is not evaluated twice in a row."""

    seen: deque[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(
        default_factory=lambda: deque(maxlen=_MOST_PAIRS + 1), repr=False
    )

    def value_and_residual(self, x: torch.Tensor, *, last: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the objectives (K,) and their gradients (K, n)."""
        if self.seen and torch.equal(self.seen[-1][0], x):
            return self.seen[-1][1:]
        value, gradient = super().value_and_residual(x, last=last)
        self.remember(x, value, gradient)
        return value, gradient

    def remember(self, x: torch.Tensor, value: torch.Tensor, gradient: torch.Tensor) -> None:
        """Keep G (K,) and ∇G (K, n) at x (K, n)."""
        self.seen.append((x.detach().clone(), value, gradient))

    def tell(self, secants: SecantPairs) -> None:
        """Pass the differences of successive gradients to ``secants``."""
        for (x, _, g), (x_next, _, g_next) in zip(self.seen, list(self.seen)[1:], strict=False):
            secants.add(x_next - x, g_next - g)
        self.seen.clear()
