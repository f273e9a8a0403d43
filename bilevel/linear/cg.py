"""Conjugate gradients for symmetric positive definite matrices, batched with a mask for each problem."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from bilevel.linear._base import LinearSolver
from bilevel.linear._judge import eigenvalue_uncertainty
from bilevel.linear._lone import SingleProblemState, run_single
from bilevel.linear._preconditioner import MakesPreconditioner, Preconditioner, begin, check_preconditioner
from bilevel.linear._radau import RadauBound
from bilevel.linear._solution import LinearSolution
from bilevel.operators import LinearOperator
from bilevel.reports import Status
from bilevel.setting_checks import check_steps

__all__ = ["CG"]

_BASIS_BYTES = 2**28
_MOST_REPLACEMENTS = 8


@dataclass(frozen=True)
class CG(LinearSolver):
    """Conjugate gradients: A symmetric positive definite, one product for each step.

    It differs from the textbook method in three points. A problem ends on its *true* residual. It is recomputed when
    the recursive residual meets the threshold, and the iteration continues from the true one where the two differ.
    Negative curvature, pᵀAp < 0, proves that A is not positive definite: the problem ends there as indefinite, at its
    last iterate. Residuals are kept orthogonal to all former ones in dtypes below float64, and in float64 once the two
    residuals differ. Without this, 20 steps on 20,000 unknowns in float32 lose a third of the answer.

    A positive semidefinite A is not a failure if b lies in its range. From zero, the iterates stay in the range and tend to
    the solution of smallest Euclidean norm. The status is ``MINIMUM_NORM`` if a direction without curvature was met, and
    ``CONVERGED`` if none was. It is ``SINGULAR`` if the residual has too large a part along such a direction. An initial
    guess or a preconditioner can bring in a part of the null space. If this is noticed, the system is solved again without
    them.

    If μ is known, Gauss–Radau quadrature bounds the error at each step. With δ′ asked for, a problem ends as soon as this
    bound, plus the drift of the residual, is below δ′. The test ‖b − A x‖ ≤ μ δ′ would end it later, by up to a factor √κ.

    Parameters
    ----------
    max_steps
        The largest number of steps; None: enough for rounding to end the iteration. A number is a budget: spending it
        without a tolerance is a success.
    preconditioner
        r ↦ M⁻¹r on tensors (batch, n), symmetric positive definite; or a factory that makes it from the operator, such as
        ``bilevel.Nystrom(rank, rho)``.
    reorthogonalize
        Whether residuals are kept orthogonal. It costs the memory of one vector a step. Beyond 256 MiB the latest
        vectors are kept. None: if the dtype or the residuals require it.

    Raises
    ------
    ArgumentError
        If a setting is out of its range.

    References
    ----------
    Hestenes & Stiefel, "Methods of conjugate gradients for solving linear systems", 1952; residual replacement: van der
    Vorst & Ye 2000; reorthogonalisation: Simon, "The Lanczos algorithm with partial reorthogonalization", 1984.

    Examples
    --------
    >>> import torch
    >>> from bilevel.operators import DenseOperator
    >>> A = DenseOperator(torch.tensor([[4.0, 1.0], [1.0, 3.0]]), symmetric=True)
    >>> CG()(A, torch.tensor([[1.0, 2.0]]))
    tensor([[0.0909, 0.6364]])
    """

    max_steps: int | None = None
    preconditioner: Preconditioner | MakesPreconditioner | None = None
    reorthogonalize: bool | None = None

    def __post_init__(self) -> None:
        check_steps("CG", "max_steps", self.max_steps, optional=True)
        check_preconditioner("CG", self.preconditioner)

    def solve(
        self, operator: LinearOperator, rhs: torch.Tensor, threshold: torch.Tensor, start: torch.Tensor | None = None
    ) -> LinearSolution:
        solution = self._run(operator, rhs, threshold, start, None, threshold)
        free = solution.status == Status.MINIMUM_NORM
        if (start is None and self.preconditioner is None) or not bool(free.any()):
            return solution
        plain = replace(self, preconditioner=None)._run(
            operator, torch.where(free.unsqueeze(-1), rhs, 0.0), threshold, None, None, threshold
        )
        status = torch.where(plain.status == Status.CONVERGED, int(Status.MINIMUM_NORM), plain.status)
        return LinearSolution(
            torch.where(free.unsqueeze(-1), plain.x, solution.x),
            solution.iterations + torch.where(free, plain.iterations, 0),
            torch.where(free, status, solution.status),
        )

    def solve_certified(
        self,
        operator: LinearOperator,
        rhs: torch.Tensor,
        threshold: torch.Tensor,
        start: torch.Tensor | None,
        mu: float,
        error: torch.Tensor,
    ) -> LinearSolution:
        """End a problem when Gauss–Radau quadrature proves ‖x − A⁻¹b‖ ≤ ``error``; see :class:`RadauBound`."""
        if self.preconditioner is not None:  # μ bounds A, and quadrature would need a bound of M⁻¹A
            return self.solve(operator, rhs, threshold, start)
        return self._run(operator, rhs, threshold, start, RadauBound.begin(mu, rhs), error)

    def solve_unverified(self, operator: LinearOperator, rhs: torch.Tensor, threshold: torch.Tensor) -> LinearSolution:
        """End on the recursive residual and return it. This saves one product if the caller computes the true residual itself."""
        return self._run(operator, rhs, threshold, None, None, threshold, verify=False)

    def _run(
        self,
        operator: LinearOperator,
        rhs: torch.Tensor,
        threshold: torch.Tensor,
        start: torch.Tensor | None,
        radau: RadauBound | None,
        error: torch.Tensor,
        *,
        verify: bool = True,
    ) -> LinearSolution:
        limit = self.max_steps if self.max_steps is not None else min(max(10 * operator.size, 100), 20_000)
        eps = torch.finfo(rhs.dtype).eps
        given = self.preconditioner
        precondition = given.preconditioner(operator) if isinstance(given, MakesPreconditioner) else given
        keep = self.reorthogonalize if self.reorthogonalize is not None else eps > 1e-12
        basis = _Basis(rhs, limit, precondition is not None) if keep else None

        x, r = begin(operator, rhs, start)
        norm = r.norm(dim=-1)
        # Below this size the recursive residual has no meaning, whatever accuracy was asked.
        goal = torch.maximum(threshold, 0.1 * eps * rhs.norm(dim=-1)) ** 2
        # A quotient below this share of the largest counts as rounding. The share must not grow with n: a float32
        # matrix with a million unknowns would then count as singular at a condition number of ten.
        tiny = min(operator.size, 16) * eps
        begun: SingleProblemState | None = None
        if len(r) == 1 and r.device.type == "cpu" and basis is None and precondition is None and radau is None:
            reach, most = float(threshold), limit - 1 if bool(norm > threshold) else 0
            begun = run_single(operator, rhs, x, r, reach, float(goal), tiny, most, verify=verify)
            if begun.residual is not None:
                steps = torch.full(norm.shape, begun.steps, dtype=torch.int64)
                return LinearSolution(begun.x, steps, torch.full_like(steps, Status.CONVERGED), begun.residual)
        zero = torch.zeros_like(norm)
        running = torch.full(norm.shape, int(Status.RUNNING), dtype=torch.int64, device=rhs.device)
        status = torch.where(norm <= threshold, int(Status.CONVERGED), running)
        iterations = torch.zeros_like(status)
        active = status == Status.RUNNING
        everyone, anyone = bool(active.all()), bool(active.any())
        largest, confirmed = zero, norm  # confirmed: the last true residual norm
        replacements = torch.zeros_like(status)
        true: torch.Tensor | None = None
        z = r if precondition is None else precondition(r)
        p, rz = z, torch.linalg.vecdot(r, z)
        taken, held = 0, None  # steps, and the product of the next
        met = torch.zeros_like(active)  # whether a direction without curvature was met
        if begun is not None:
            x, r, p, held, taken = begun.x, begun.r, begun.p, begun.product, begun.steps
            z, rz, largest = r, torch.full_like(norm, begun.rr), torch.full_like(norm, begun.largest)
        # A step has one product and, on the CPU, reads one flag. The other operations only keep the problems separate.
        for step in range(taken, limit if anyone else 0):
            if basis is not None and step < limit - 1:
                basis.add(r, z, rz, active, everyone)
            Ap, held = operator.matvec(p) if held is None else held, None
            curvature = torch.linalg.vecdot(p, Ap)
            quotient = curvature / torch.linalg.vecdot(p, p)
            # The first direction has no former ones to compare with. The norm of its product replaces them.
            largest = torch.maximum(largest, quotient) if step else Ap.norm(dim=-1) / p.norm(dim=-1)
            curved = active & (quotient > tiny * largest)
            alpha = torch.where(curved, rz / curvature, zero).unsqueeze(-1)
            x, true = torch.addcmul(x, alpha, p), None
            if step == limit - 1 and self.max_steps is not None and radau is None and verify:
                # The budget is spent. The next direction is not needed, and the true residual decides the status.
                iterations = torch.where(active, limit, iterations)
                flat = active & ~curved & torch.isfinite(quotient)
                indefinite = _bent(quotient, Ap.norm(dim=-1) / p.norm(dim=-1), largest, operator.size)
                verdict = torch.where(indefinite, int(Status.INDEFINITE), int(Status.MINIMUM_NORM))
                status = torch.where(flat, verdict, status)
                # A step that was not taken because of a NaN does not change x.
                status = torch.where(active & torch.isnan(quotient), int(Status.NOT_FINITE), status)
                break
            r = torch.addcmul(r, alpha, Ap, value=-1)
            if basis is not None:
                r = basis.remove_from(r)
            z = r if precondition is None else precondition(r)
            fresh = torch.linalg.vecdot(r, z)
            square = fresh if precondition is None else torch.linalg.vecdot(r, r)
            going = curved & (square > goal)
            if radau is not None:
                radau = radau.after(alpha.squeeze(-1), quotient, largest, rz, fresh, curved)
                going = going & ~(radau.error(square) <= error)
            beta = torch.where(active, fresh / rz, zero)  # problems that have ended keep finite numbers
            if not torch.equal(going, active):
                event = active & ~going
                iterations = torch.where(event, step + 1, iterations)
                flat = event & ~curved & torch.isfinite(quotient)
                indefinite = _bent(quotient, Ap.norm(dim=-1) / p.norm(dim=-1), largest, operator.size)
                first, met = flat & ~met, met | (flat & ~indefinite)
                # Rounding leads into the null space too. b is outside the range only if the part of the residual in the
                # null space is large enough. The part of p outside of the null space does not count: ‖Ap‖² ≤ ‖A‖ pᵀAp
                # bounds it.
                inside = torch.linalg.vecdot(r, p) / p.norm(dim=-1)
                outside = (inside > 2 * threshold) & (inside > 16 * tiny**0.5 * r.norm(dim=-1))
                verdict = torch.where(indefinite, int(Status.INDEFINITE), int(Status.MINIMUM_NORM))
                status = torch.where(flat & (indefinite | outside), verdict, status)
                seeming = event & (status == Status.RUNNING)  # the true residual of these problems is needed
                again = seeming & False
                if bool(seeming.any()):
                    true = rhs - operator.matvec(x) if verify else r
                    actual = true.norm(dim=-1)
                    done = seeming & (actual <= threshold)
                    if radau is not None:
                        done = done | (seeming & (radau.error(square, (true - r).norm(dim=-1)) <= error))
                    broken = seeming & ~torch.isfinite(actual + square)
                    # The two residuals differ: continue from the true one while each restart still gains a digit.
                    parted = seeming & ~(done | broken)
                    stuck = parted & (
                        (actual > torch.where(first, 1.0, 0.1) * confirmed) | (replacements >= _MOST_REPLACEMENTS)
                    )
                    solved = torch.where(met, int(Status.MINIMUM_NORM), int(Status.CONVERGED))
                    status = torch.where(done, solved, status)
                    status = torch.where(stuck, torch.where(met, solved, int(Status.STAGNATED)), status)
                    status = torch.where(broken, int(Status.NOT_FINITE), status)
                    again = parted & ~stuck
                active = status == Status.RUNNING
                everyone, anyone = bool(active.all()), bool(active.any())
                if not anyone:
                    break
                if true is not None and bool(again.any()):
                    replacements = replacements + again
                    confirmed = torch.where(again, actual, confirmed)
                    r = torch.where(again.unsqueeze(-1), true, r)
                    radau = None if radau is None else radau.again(again)
                    if self.reorthogonalize is not False:
                        basis = _Basis(rhs, limit, precondition is not None, active & False) if basis is None else basis
                        basis.begin_again(again)
                    z = r if precondition is None else precondition(r)
                    fresh = torch.linalg.vecdot(r, z)
                    beta = torch.where(again, zero, fresh / rz)
                beta = torch.where(active, beta, zero)
            p = torch.addcmul(z, beta.unsqueeze(-1), p)
            rz = fresh
        iterations = torch.where(status == Status.RUNNING, limit, iterations)
        status = torch.where(status == Status.RUNNING, int(Status.MAX_STEPS), status)
        if radau is None:
            return LinearSolution(x, iterations, status, true if verify else r)
        true = rhs - operator.matvec(x) if true is None else true
        proven = radau.error(torch.linalg.vecdot(r, r), (true - r).norm(dim=-1))
        return LinearSolution(x, iterations, status, true, proven, radau.refuted)


def _bent(quotient: torch.Tensor, bend: torch.Tensor, largest: torch.Tensor, order: int) -> torch.Tensor:
    """Return where a direction without positive curvature proves that A is indefinite, and not only singular.

    pᵀAp < 0 is the proof. So is pᵀAp = 0 with Ap ≠ 0: for a semi-definite matrix ‖Ap‖² ≤ ‖A‖ pᵀAp. The matrix itself
    has an error, so a proof needs a margin. Within the margin the matrix counts as singular.

    Parameters
    ----------
    quotient, bend
        pᵀAp / pᵀp and ‖Ap‖ / ‖p‖ (batch,).
    largest
        The largest quotient so far (batch,), at most ‖A‖.
    order
        n.
    """
    size, margin = torch.maximum(largest, bend), eigenvalue_uncertainty(order, quotient.dtype)
    return (quotient < -margin * size) | (bend**2 > 64 * margin * size**2)


class _Basis:
    """The former residuals of a run, to which the current one is made orthogonal. If memory is short, only the latest.

    ``members`` (batch,): the problems whose residuals are kept; by default all. The rows of the others are zero, so
    that one problem's loss of accuracy does not change the steps of another.
    """

    def __init__(
        self, like: torch.Tensor, most: int, preconditioned: bool, members: torch.Tensor | None = None
    ) -> None:
        self.members = members
        room = _BASIS_BYTES // max(1, (1 + preconditioned) * like.numel() * like.element_size())
        self.room = max(2, min(most, int(room)))
        self.count = 0
        self._preconditioned = preconditioned
        self._r: torch.Tensor | None = None
        self._z: torch.Tensor | None = None  # M⁻¹ times each; without a preconditioner the same tensor

    def add(self, r: torch.Tensor, z: torch.Tensor, rz: torch.Tensor, active: torch.Tensor, everyone: bool) -> None:
        """Keep r of the problems that are ``active``. ``everyone``: all of them are, which saves reading the flags."""
        if self._r is None or (self.count >= self._r.shape[1] and self._r.shape[1] < self.room):
            self._r = self._grown(self._r, r)
            self._z = self._grown(self._z, r) if self._preconditioned else self._r
        assert self._r is not None and self._z is not None
        at = self.count % self._r.shape[1]
        self.count += 1
        if everyone and self.members is None and not self._preconditioned:
            # If rᵀr > 0 for all problems, all continue, and no mask is needed.
            torch.mul(r, rz.rsqrt().unsqueeze(-1), out=self._r[:, at])
            return
        # The residual of a problem that has ended no longer changes. Kept at every step, it would spoil the orthonormal
        # set, and a projection by such a set lets vectors grow.
        kept = (active & (rz > 0)) if self.members is None else (active & (rz > 0) & self.members)
        kept, scale = kept.unsqueeze(-1), rz.rsqrt().unsqueeze(-1)
        self._r[:, at] = torch.where(kept, r * scale, torch.zeros_like(r))
        if self._preconditioned:
            self._z[:, at] = torch.where(kept, z * scale, torch.zeros_like(z))

    def remove_from(self, r: torch.Tensor) -> torch.Tensor:
        if self._r is None or self._z is None:
            return r
        used = min(self.count, self._r.shape[1])
        left, right = self._r[:, :used], self._z[:, :used]
        # One pass is enough: the new vector is orthogonal up to the rounding of one step.
        if len(r) == 1:
            return torch.baddbmm(r.unsqueeze(-1), left.mT, right @ r.unsqueeze(-1), alpha=-1).squeeze(-1)
        # For several problems, products of matrices with single columns take four times as long as reading the
        # matrices. With rows, the rounding of a problem would depend on its place in the batch.
        weights = [torch.linalg.vecdot(r, right[:, k]).unsqueeze(-1) for k in range(used)]
        for k, weight in enumerate(weights):
            r = torch.addcmul(r, weight, left[:, k], value=-1)
        return r

    def begin_again(self, these: torch.Tensor) -> None:
        """Forget the residuals of ``these`` problems (batch,), which begin a new run, and keep their new ones."""
        self.members = None if self.members is None else self.members | these
        if self._r is not None and self._z is not None:
            self._r[these] = 0.0
            self._z[these] = 0.0

    def _grown(self, old: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        width = min(self.room, 16 if old is None else 2 * old.shape[1])
        fresh = like.new_empty(like.shape[0], width, like.shape[1])  # every row is written before it is read
        if old is not None:
            fresh[:, : old.shape[1]] = old
        return fresh
