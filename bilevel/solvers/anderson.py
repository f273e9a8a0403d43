"""Anderson acceleration of fixed-point iteration."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel._checks import check_number, check_steps
from bilevel._problem import Problem
from bilevel.solvers._base import Goal, InnerSolution, InnerSolver, iterate
from bilevel.solvers.fixed_point import check_fixed_point

__all__ = ["Anderson"]

_MAX_STEPS = 1000
# A residual this many times the best one since the last restart means that the history misleads.
_GROWTH = 10.0


@dataclass(frozen=True)
class Anderson(InnerSolver):
    """Step to the mixture of the last iterates whose residuals, to first order, cancel best.

    With R = x − T(x) and the last differences ΔR, ΔX as columns,

        γ = argmin ‖R − ΔR γ‖,   x ← x − β R − (ΔX − β ΔR) γ.

    The differences are kept orthonormal, each new one by Gram–Schmidt against those remembered, so that γ =
    ΔRᵀ R takes no matrix to be solved, does not square a condition number, and remembers, for a symmetric
    linear mapping, everything that was ever learned. A problem whose residual outgrows its best tenfold
    forgets its history.

    One evaluation of T for each step, 8 · ``history`` · n operations and 2 · ``history`` · n numbers of
    memory for each problem.

    Parameters
    ----------
    max_steps
        The most steps; None for 1,000, spending which is a failure, where spending a given budget with no
        tolerance asked is none.
    history
        How many differences are remembered (at most n).
    mixing
        β in (0, 1]: how far along the residual a step goes.
    regularization
        A difference of which orthogonalisation leaves less than this share is not remembered; None for 100
        eps of the dtype.

    Raises
    ------
    ArgumentError
        If a setting is out of its range; on use, for an argmin or a root.

    References
    ----------
    Walker & Ni, "Anderson acceleration for fixed-point iterations", SIAM J. Numer. Anal. 2011; Tang, Xu, He,
    Saad, Xi, "Anderson acceleration with truncated Gram–Schmidt", 2024 (the orthonormal form).

    Examples
    --------
    >>> import torch, bilevel
    >>> layer = bilevel.fixed_point(lambda x, a: torch.cos(a * x), solver=Anderson())
    >>> layer(torch.zeros((), dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    tensor(0.7391, dtype=torch.float64)
    """

    max_steps: int | None = None
    history: int = 5
    mixing: float = 1.0
    regularization: float | None = None

    def __post_init__(self) -> None:
        check_steps("Anderson", "max_steps", self.max_steps, optional=True)
        check_steps("Anderson", "history", self.history)
        check_number("Anderson", "mixing", self.mixing, below=1.0 + 1e-12)
        if self.regularization is not None:
            check_number("Anderson", "regularization", self.regularization, below=1.0, closed=True)

    def solve(self, problem: Problem, init: torch.Tensor, goal: Goal) -> InnerSolution:
        check_fixed_point(problem, "Anderson")
        n = init.shape[-1]
        eps = torch.finfo(init.dtype).eps
        least = 100 * eps if self.regularization is None else self.regularization
        memory = _Memory(init, min(self.history, n), least)

        def step(state: _State, active: torch.Tensor) -> tuple[_State, torch.Tensor | None]:
            x = memory.mixture(state.both[:, n:])
            residual = problem.residual(x)
            norm = torch.linalg.vector_norm(residual, dim=-1)
            # (R, x − βR): what is linear in both is done to both at once.
            both = torch.cat((residual, torch.sub(x, residual, alpha=self.mixing)), dim=-1)
            astray = norm > _GROWTH * state.best
            best = torch.minimum(norm, state.best)
            memory.learn(both, both - state.both)
            if bool(astray.any()):
                memory.forget(astray)
                best = torch.where(astray, norm, best)
            return _State(x, residual, both, best), None

        residual = problem.residual(init)
        both = torch.cat((residual, torch.sub(init, residual, alpha=self.mixing)), dim=-1)
        start = _State(init, residual, both, residual.norm(dim=-1))
        return iterate(start, step, goal, self.max_steps or _MAX_STEPS)[0]


@dataclass(frozen=True, eq=False)
class _State:
    """An iterate, R there, (R, x − βR) and the least ‖R‖ since the last restart."""

    x: torch.Tensor
    residual: torch.Tensor
    both: torch.Tensor
    best: torch.Tensor


class _Memory:
    """The last differences (ΔR, ΔX − βΔR), (batch, history, 2n), ΔR orthonormal; zero where there is none."""

    def __init__(self, like: torch.Tensor, history: int, least: float) -> None:
        batch, n = like.shape
        self.n, self.least = n, least
        self.pairs = like.new_zeros(batch, history, 2 * n)
        self.changes = self.pairs[:, :, :n]
        self.moves = self.pairs[:, :, n:]
        self.gamma = like.new_zeros(batch, 1, history)
        self.next = 0

    def mixture(self, plain: torch.Tensor) -> torch.Tensor:
        """Return x − βR − (ΔX − βΔR) γ, given x − βR."""
        return torch.baddbmm(plain.unsqueeze(1), self.gamma, self.moves, alpha=-1).squeeze(1)

    def learn(self, both: torch.Tensor, difference: torch.Tensor) -> None:
        """Put ``difference`` (batch, 2n), made orthogonal to the others, in the place of the oldest; update γ = ΔRᵀR.

        The products of the others with R serve twice: less those of the step before, they are the products with
        the new difference.
        """
        n, at = self.n, self.next
        residual, place = both[:, :n], self.pairs[:, at]
        place.zero_()
        self.gamma[:, :, at] = 0.0
        gamma = torch.bmm(residual.unsqueeze(1), self.changes.mT)  # (batch, 1, history)
        before = torch.linalg.vector_norm(difference[:, :n], dim=-1, keepdim=True)
        fresh = torch.baddbmm(difference.unsqueeze(1), gamma - self.gamma, self.pairs, alpha=-1).squeeze(1)
        length = torch.linalg.vector_norm(fresh[:, :n], dim=-1, keepdim=True)
        inverse = torch.where(length > self.least * before, length.reciprocal(), torch.zeros_like(length))
        torch.mul(fresh, inverse, out=place)
        gamma[:, 0, at] = torch.linalg.vecdot(place[:, :n], residual)
        self.gamma = gamma
        self.next = (at + 1) % self.pairs.shape[1]

    def forget(self, which: torch.Tensor) -> None:
        """Drop what the problems of ``which`` have learned."""
        self.pairs.masked_fill_(which.reshape(-1, 1, 1), 0.0)
        self.gamma.masked_fill_(which.reshape(-1, 1, 1), 0.0)
