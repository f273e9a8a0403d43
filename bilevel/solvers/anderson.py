"""Safeguarded Anderson acceleration of fixed-point iteration."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from bilevel.equations.problem import Problem
from bilevel.reports import Status
from bilevel.setting_checks import check_number, check_steps
from bilevel.solvers._anderson_history import History
from bilevel.solvers._base import Goal, InnerSolution, InnerSolver, is_lone, iterate
from bilevel.solvers.fixed_point import CHECK_EVERY, check_fixed_point, rounding_verdict

__all__ = ["Anderson"]

# The numbers of steps of the accelerated run, the plain run, the accelerated run, and so on: 10,000 of each in all. As
# they double, the solve costs at most about three times the better run, plus 1,000 steps.
_STRETCHES = (1000, 1000, 2000, 2000, 4000, 4000, 3000, 3000)
# A mixture is rejected if its residual exceeds the smallest one since the last restart by this factor: before any
# restart, and after.
_GROWTH, _STRICT_GROWTH = 10.0, 1.5
# After a rejection come 1, 2, 4, ... plain steps, at most this many.
_PLAIN_STEPS = 16
# A run diverges if its residual exceeds the first one by this factor, as in a plain iteration.
_DIVERGED = 1e10
# T(z) replaces a mixture z that meets the threshold. After this many failed trials z itself is returned.
_POLISHES = 3
# The share of the allowed error of an unknown to reach, and the number of further steps for it.
_SHARE, _EXTRA_STEPS = 0.3, 20
# A constant residual counts as a drift if it is this many times the rounding.
_DRIFT = 4.0
# A stride of so many steps that ends where x hides R has run away.
_FAR_STRIDE = 1000.0
# Plain iteration also runs away if an unknown moves in one direction from step 256 to 1,024, or from any step to four times that step, and its R
# shrinks no faster than 1/steps: the sum of such steps is infinite. Of R, a little less than a quarter is then left.
_EARLY_STEPS, _LONGER, _SHARE_LEFT = 256, 4, 0.22


@dataclass(frozen=True)
class Anderson(InnerSolver):
    """Step to the mixture of the last iterates whose residuals cancel best to first order; keep only steps that reduce the residual.

    With R = x − T(x) and the last differences ΔR, ΔX as columns,

        γ = argmin ‖R − ΔR γ‖²,   z = x − β R − (ΔX − β ΔR) γ.

    Gram–Schmidt keeps the differences orthonormal. Then γ = ΔRᵀ R: no matrix is solved, and no condition number is squared.
    For a symmetric linear mapping no information is lost. A Tikhonov term damps each difference relative to its own
    size. Differences at rounding level are not used.

    A mixture is rejected if its residual is not finite, or exceeds the least one since the last restart tenfold (1.5-fold after the
    first rejection). Then the history is dropped, and 1, 2, 4, ..., 16 plain steps x ← x − β R follow. The same happens if 64
    steps bring no lower residual.

    The answer is in the range of T. Once a mixture z meets the threshold, T(z) is evaluated, and returned if it meets the
    threshold too. Probabilities stay probabilities, and the zeros of a proximal step stay zeros. If three T(z) do not meet
    it, z is returned; this needs a mapping that expands.

    Sometimes the residual is constant, as for a projection of x − c until the face is reached. Mixtures then learn nothing.
    Steps are 2, 4, 8, ... times as long while it stays constant, so that a few reach the face. If the rounding of x hides the
    residual before that, x runs away, and plain iteration takes 1,000 steps. The status is ``DIVERGED`` if these steps keep one
    direction and shrink so slowly that their sum is infinite.

    A plain iteration from the same initial guess is the safeguard. After 1,000 steps it takes 1,000 of its own, then the
    accelerated run continues, and so on, in stretches that double. It takes over at once if the accelerated run diverges or
    meets a NaN. The solver therefore converges wherever plain iteration converges in 10,000 steps.

    One evaluation of T for each step, 8 · ``history`` · n operations and 2 · ``history`` · n numbers of
    memory for each problem.

    Parameters
    ----------
    max_steps
        The largest number of steps; None: 20,000, half of them plain, and spending them all is a failure. A number is a
        budget: spending it without a tolerance is a success. The last step of a budget is T itself.
    history
        The number of differences that are kept (at most n).
    mixing
        β in (0, 1]: the step along the residual.
    regularization
        λ ≥ 0: a difference of which orthogonalisation leaves the share s counts s²/(s² + λ²); None for 100 eps of the dtype.

    Raises
    ------
    ArgumentError
        If a setting is out of its range; on use, for an argmin or a root.

    References
    ----------
    Walker & Ni, "Anderson acceleration for fixed-point iterations", SIAM J. Numer. Anal. 2011; Tang, Xu, He,
    Saad, Xi, "Anderson acceleration with truncated Gram–Schmidt", 2024 (the orthonormal form); Zhang, O'Donoghue, Boyd,
    "Globally convergent type-I Anderson acceleration for nonsmooth fixed-point iterations", SIAM J. Optim. 2020 (restarts
    and plain steps as safeguards; the rules here are others).

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
        check_number("Anderson", "mixing", self.mixing, below=1.0, at_most=True)
        if self.regularization is not None:
            check_number("Anderson", "regularization", self.regularization, below=1.0, closed=True)

    def solve(self, problem: Problem, init: torch.Tensor, goal: Goal) -> InnerSolution:
        check_fixed_point(problem, "Anderson")
        runs = _Runs(self, problem, init, goal)
        solution = iterate(runs.start, runs.step, goal, runs.budget)[0]
        return replace(solution, iterations=solution.iterations + 1) if runs.polished else solution


@dataclass(frozen=True, eq=False)
class _State:
    """The current result: the best T(z) so far, or the initial guess, with its residual."""

    x: torch.Tensor
    residual: torch.Tensor


class _Runs:
    """The accelerated and the plain run of each problem. One of them steps while the other waits.

    A point x is stored as (R, x − βR), (batch, 2n), because linear operations apply to both. All other state is one
    number per problem, (batch,). Switches and checks depend on the number of steps, which all problems share. A problem
    therefore steps as it would alone.
    """

    def __init__(self, settings: Anderson, problem: Problem, init: torch.Tensor, goal: Goal) -> None:
        n = init.shape[-1]
        self.problem, self.threshold, self.n, self.beta = problem, goal.threshold, n, settings.mixing
        self.goal = goal
        self.budget = settings.max_steps or sum(_STRETCHES)
        self.steps = 0
        self.turns = {end + 1 for end in accumulate(_STRETCHES)}
        eps = torch.finfo(init.dtype).eps
        share = 100 * eps if settings.regularization is None else settings.regularization
        self.memory = History(init, min(settings.history, n), share)
        residual = problem.residual(init)
        norm = residual.norm(dim=-1)
        self.start = _State(init, residual)
        self.both = self.parked = self._both(init, residual)
        self.ceiling = _DIVERGED * torch.maximum(norm, self.threshold)
        self.growth = torch.full_like(norm, _GROWTH)
        self.bound = self.seen = (
            self.growth * norm
        )  # the largest residual of an accepted mixture; its value at the last check
        self.lowest = torch.full_like(norm, torch.inf)  # ‖R‖ at the current result
        self.waiting = torch.ones_like(norm, dtype=torch.int64)  # plain steps before the next mixture
        self.penalty = torch.ones_like(self.waiting)  # plain steps after the next rejection
        self.polishes = torch.zeros_like(self.waiting)
        self.met = torch.zeros_like(self.waiting)  # the step at which the goal's threshold was met
        self.deadlines: set[int] = set()
        self.polished = False  # whether the last step of a single problem was two steps: to the mixture z, and to T(z)
        self.plain = torch.zeros_like(norm, dtype=torch.bool)  # whether the plain run steps
        self.alone = self.plain  # whether the other run has diverged
        self.whole = self.plain  # whether the next step is T itself
        self.mixing = False  # whether every active problem steps to a mixture
        # The length of the next step in plain steps: 1 unless the residual is constant; 0 if that is not watched.
        self.stride = torch.zeros_like(norm)
        self.watched = False
        self.fled = self.drifts = self.plain  # whether the accelerated run ran away; whether it drifts in rounding
        # Where the run was at the last check; where the plain run was after so many steps, and how many it has taken.
        self.anchor = self.early = self.both
        self.early_at, self.walked = torch.full_like(self.waiting, _EARLY_STEPS), torch.zeros_like(self.waiting)

    def _both(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return torch.cat((residual, torch.sub(x, residual, alpha=self.beta)), dim=-1)

    def step(self, state: _State, active: torch.Tensor) -> tuple[_State, torch.Tensor | None]:
        """Evaluate T once at every problem's next point."""
        self.steps += 1
        verdict = None
        if self.steps in self.turns:
            self._switch(active & ~self.alone)
        if self.steps % CHECK_EVERY == 0:
            verdict = self._check(state, active)
        if self.steps == self.budget:
            self.whole, self.mixing = torch.ones_like(self.whole), False
        if self.steps in self.deadlines:
            late = (self.met > 0) & (self.steps >= self.met + _EXTRA_STEPS)
            self.threshold = torch.where(late, self.goal.threshold, self.threshold)
        x = self.memory.mixture(self.both[:, self.n :])
        mixed: torch.Tensor | None = None  # all
        if not self.mixing:
            mixed = ~(self.plain | (self.waiting > 0) | self.whole)
            x = torch.where(mixed.unsqueeze(1), x, self._unmixed())
        striding: torch.Tensor | None = None
        if self.watched:
            striding = (self.stride > 1) & ~(self.plain | self.whole)
            mixed = None if mixed is None else mixed | striding
            further = (self.stride - 1).unsqueeze(1) * self.beta * self.both[:, : self.n]
            x = torch.where(striding.unsqueeze(1), self.both[:, self.n :] - further, x)
        residual = self.problem.residual(x)
        norm = torch.linalg.vector_norm(residual, dim=-1)
        size = torch.linalg.vector_norm(x, dim=-1)
        if bool((norm <= torch.finfo(x.dtype).eps * size).any()):
            norm = torch.where(self._is_blind(size) & (True if striding is None else ~striding), torch.inf, norm)
        both = self._both(x, residual)
        if self.mixing and striding is None:
            usual = (norm <= self.bound) & (norm > self.threshold)
            if not bool(usual.all()) and self.goal.target.rtol:
                self._tighten(x, residual, norm)
                usual = (norm <= self.bound) & (norm > self.threshold)
            if (
                is_lone(norm)
                and float(norm) <= float(torch.minimum(self.threshold, self.bound))
                and self.steps < self.budget
            ):
                # The result is T(z). If it meets the threshold too, the bookkeeping is not needed any more.
                mapped = torch.sub(x, residual)
                left = self.problem.residual(mapped)
                if float(left.norm()) <= float(self.threshold):
                    self.polished = True
                    return _State(mapped, left), verdict
            if bool(usual.all()) or bool((usual | ~active).all()):
                if self.steps & (self.steps - 1) == 0:  # x may grow, and its rounding grows with it
                    self.memory.measure(both)
                self.memory.learn(both, both - self.both)
                self.both = both
                self.bound = torch.minimum(self.bound, self.growth * norm)
                return state, verdict
        mixed = torch.ones_like(self.plain) if mixed is None else mixed
        good = norm <= torch.where(mixed, self.bound, self.ceiling)  # not where it is NaN
        failed = active & mixed & ~good
        if striding is not None:
            self._stride(both, norm, good, striding)
            failed = failed & ~striding
        self._move(both, good)
        state = self._report(state, x, residual, norm, good, mixed)
        self._count(norm, good, mixed)
        self._restart(failed)
        lost = active & ~mixed & ~good
        if striding is not None:
            fled = active & striding & good & (self.stride > _FAR_STRIDE)
            fled = fled & (norm <= _DRIFT * self.memory.rounding.squeeze(-1))
            self.fled, lost = self.fled | fled, lost | fled
        if bool(lost.any()):
            verdict = self._take_over(lost, norm, verdict)
        self.mixing = not bool((active & (self.plain | (self.waiting > 0) | self.whole)).any())
        return state, verdict

    def _is_blind(self, size: torch.Tensor) -> torch.Tensor:
        """Return where a mixture of this ``size`` (batch,) is so far away that its rounding would hide the last residual, (batch,) bool."""
        left, last = (torch.linalg.vector_norm(part, dim=-1) for part in self.both.split(self.n, dim=-1))
        return (size > 2 * last) & (torch.finfo(size.dtype).eps * size > left)

    def _tighten(self, x: torch.Tensor, residual: torch.Tensor, norm: torch.Tensor) -> None:
        """Lower the thresholds where single unknowns are not accurate enough although R as a whole is small enough.

        ‖x − x₀‖ / ‖R(x₀)‖ estimates the ratio of errors to residuals. A run that ended here and were resumed would have
        no history.
        """
        target, base = self.goal.target, self.goal.threshold
        larger = (x - self.start.x).norm(dim=-1) / self.start.residual.norm(dim=-1)
        allowed = _SHARE * (target.rtol * x.abs() + target.atol)
        excess = larger.nan_to_num(1.0).clamp(min=1.0) * (residual.abs() / allowed).amax(dim=-1)
        closer = torch.maximum(norm / excess, 8 * torch.finfo(x.dtype).eps * x.norm(dim=-1))
        self.met = torch.where((self.met == 0) & (norm <= base), self.steps, self.met)
        on = (norm <= self.threshold) & (excess > 1) & (self.steps < self.met + _EXTRA_STEPS)
        self.threshold = torch.where(on, torch.minimum(closer, base), self.threshold)
        self.deadlines.add(self.steps + _EXTRA_STEPS)

    def _unmixed(self) -> torch.Tensor:
        """Return x − βR, or x − R for the problems whose next step is T itself."""
        n = self.n
        damped = self.both[:, n:]
        if self.beta == 1.0:
            return damped
        mapped = torch.sub(damped, self.both[:, :n], alpha=1 - self.beta)
        return torch.where((self.plain | self.whole).unsqueeze(1), mapped, damped)

    def _stride(self, both: torch.Tensor, norm: torch.Tensor, good: torch.Tensor, striding: torch.Tensor) -> None:
        """Double the steps where the residual at ``both`` is the same as before, and shorten those that were too long."""
        changed = torch.linalg.vector_norm((both - self.both)[:, : self.n], dim=-1)
        rounding = self.memory.rounding.squeeze(-1)
        # A drift continues until rounding of x hides it: x has then diverged.
        drifts = (norm > _DRIFT * rounding) | striding | self.drifts
        still = good & (changed <= rounding) & drifts & ~self.plain
        one = self.stride.clamp(max=1.0)  # 0 if it is not watched
        stride = torch.where(still, 2 * self.stride, one)
        self.stride = torch.where(striding & ~good, torch.maximum(0.25 * self.stride, one), stride)

    def _drifted(self, since: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """Return where some unknown went on one way from ``since`` (batch, 2n), ``steps`` (batch,) plain steps ago, (batch,) bool."""
        n, eps = self.n, torch.finfo(since.dtype).eps
        residual, before, x = self.both[:, :n], since[:, :n], self.both[:, n:]
        along = (since[:, n:] - x) * residual.sign()
        steady = (residual != 0) & (residual * before.sign() >= _SHARE_LEFT * before.abs())
        moved = (along >= 0.5 * steps.unsqueeze(1) * residual.abs()) & (along > 16 * eps * x.abs())
        return (steady & moved).any(dim=-1)

    def _move(self, both: torch.Tensor, good: torch.Tensor) -> None:
        """Move to the ``good`` points, and add them to the history of the accelerated runs."""
        both = torch.where(good.unsqueeze(1), both, self.both)
        difference = torch.where((good & ~self.plain).unsqueeze(1), both - self.both, torch.zeros_like(both))
        self.memory.measure(both)
        self.memory.learn(both, difference)
        self.both = both

    def _report(
        self,
        state: _State,
        x: torch.Tensor,
        residual: torch.Tensor,
        norm: torch.Tensor,
        good: torch.Tensor,
        mixed: torch.Tensor,
    ) -> _State:
        """Return the current result. If a mixture meets the threshold, the next step is T itself."""
        mapped = good & ~mixed if self.beta == 1.0 else good & (self.plain | self.whole)
        self.whole = good & ~mapped & (norm <= self.threshold)
        better = mapped & (norm < self.lowest) | self.whole & (self.polishes >= _POLISHES)
        self.polishes = self.polishes + self.whole
        self.lowest = torch.where(better, norm, self.lowest)
        column = better.unsqueeze(1)
        return _State(torch.where(column, x, state.x), torch.where(column, residual, state.residual))

    def _count(self, norm: torch.Tensor, good: torch.Tensor, mixed: torch.Tensor) -> None:
        """Update the bound by the new points, and count the plain steps."""
        bound = self.growth * norm
        lower = good & mixed & (bound < self.bound)
        self.penalty = torch.where(lower, (self.penalty // 2).clamp(min=1), self.penalty)
        self.bound = torch.where(lower | (good & ~mixed), bound, self.bound)
        self.waiting = torch.where(good & ~mixed, (self.waiting - 1).clamp(min=0), self.waiting)

    def _restart(self, which: torch.Tensor) -> None:
        """Drop the history and prescribe plain steps."""
        if bool(which.any()):
            self.memory.forget(which)
            self.growth = torch.where(which, _STRICT_GROWTH, self.growth)
            self.waiting = torch.where(which, self.penalty, self.waiting)
            self.penalty = torch.where(which, (2 * self.penalty).clamp(max=_PLAIN_STEPS), self.penalty)
            self.mixing = False

    def _switch(self, which: torch.Tensor) -> None:
        """Pause the run that steps, and continue with the other."""
        column = which.unsqueeze(1)
        here, there = self.both, self.parked
        self.both, self.parked = torch.where(column, there, here), torch.where(column, here, there)
        self.plain = self.plain ^ which
        self.memory.forget(which)
        self.waiting = torch.where(which, torch.ones_like(self.waiting), self.waiting)
        self.whole = self.whole & ~which
        self.anchor = torch.where(column, self.both, self.anchor)
        self.mixing = False

    def _take_over(self, lost: torch.Tensor, norm: torch.Tensor, verdict: torch.Tensor | None) -> torch.Tensor | None:
        """Continue the ``lost`` problems with their other run. Return a final status where that is lost too."""
        over = lost & self.alone
        self.alone = self.alone | lost
        self._switch(lost & ~over)
        if not bool(over.any()):
            return verdict
        codes = torch.full_like(self.waiting, int(Status.RUNNING)) if verdict is None else verdict
        how = torch.where(norm.isnan(), int(Status.NOT_FINITE), int(Status.DIVERGED))
        return torch.where(over, how, codes)

    def _check(self, state: _State, active: torch.Tensor) -> torch.Tensor | None:
        """Restart the problems without progress since the last check. Return a final status where rounding is the reason."""
        measure = torch.where(self.plain, self.lowest, self.bound)
        stalled = active & ~(measure < self.seen)
        self.seen = measure
        self.memory.measure(self.both)
        anchor, self.anchor = self.anchor, self.both
        drifting = self._walk(stalled)
        if not bool(stalled.any()):
            return None
        if drifting is not None:
            return torch.where(drifting, int(Status.DIVERGED), int(Status.RUNNING))
        every = torch.full_like(self.walked, CHECK_EVERY)
        self.drifts = stalled & ~self.plain & self._drifted(anchor, every)
        self._restart(stalled)
        self.stride, self.watched = torch.where(stalled, self.stride.clamp(min=1.0), self.stride), True
        return rounding_verdict(self.problem, state.x, state.residual, stalled, self.threshold)

    def _walk(self, stalled: torch.Tensor) -> torch.Tensor | None:
        """Count the plain run's steps; return which problems run away in it as in the accelerated run, (batch,) bool; None for none."""
        self.walked = self.walked + CHECK_EVERY * self.plain
        late = self.plain & (self.walked >= _LONGER * self.early_at)
        drifting = stalled & late & self.fled
        if bool(drifting.any()):
            drifting = drifting & self._drifted(self.early, self.walked - self.early_at)
        self.early_at = torch.where(late, self.walked, self.early_at)
        early = self.plain & (self.walked <= self.early_at)
        self.early = torch.where(early.unsqueeze(1), self.both, self.early)
        return drifting if bool(drifting.any()) else None
