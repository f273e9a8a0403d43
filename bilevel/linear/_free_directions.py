"""Whether an argument changes the free directions of a solution. The solution then has no derivative.

Where J = ∂_x R is singular at the solution, a small change dθ moves the solution by a small dx only if J dx = −∂_θR dθ has a solution, that is if
uᵀ ∂_θR dθ = 0 for every u with uᵀ J = 0. Reverse mode solves Jᵀ q = x̄ and does not see ∂_θR dθ. This module computes
(∂_θR)ᵀ u instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from bilevel.equations.pullbacks import Pullback
from bilevel.linear._null_space import NullSpace, known_null_space
from bilevel.linear._pseudo_inverse import PseudoInverse
from bilevel.linear._solution import LinearOutcome
from bilevel.linear.exact import pseudo_inverse_of
from bilevel.operators import LinearOperator
from bilevel.reports import Status, StatusMessages

__all__ = ["changes_free_directions", "unsure_derivative_messages", "without_derivative"]

_IRRATIONAL = (0.7548776662466927, 0.5698402909980532, 0.8191725133961645)


def changes_free_directions(
    operator: LinearOperator, status: torch.Tensor, pullbacks: Sequence[Pullback]
) -> torch.Tensor:
    """Return, per problem, whether an argument changes the free directions. It costs up to three pullbacks if a matrix is singular, else none.

    Parameters
    ----------
    operator
        Jᵀ (batch, n, n), the operator of the adjoint's solve.
    status
        The status of that solve (batch,). Problems with ``Status.MINIMUM_NORM`` are examined if a null vector is known.
    pullbacks
        The pullbacks to the arguments, and to the tensors that these were computed from, if known. A problem has no
        derivative if (∂_θR)ᵀ u vanishes in none of them.
    """
    found = torch.zeros_like(status, dtype=torch.bool)
    singular = status == Status.MINIMUM_NORM
    if not pullbacks or not bool(singular.any()):
        return found
    base, pseudo, null = operator.distinct, pseudo_inverse_of(operator), known_null_space(operator)
    probe = None if null is None else _probe_of_products(null)
    if pseudo is not None:
        probe = _probe_of_factors(pseudo, base.batch)
    if probe is None:
        return found
    suspects = singular.reshape(operator.repeats, base.batch).any(0) & probe.singular  # (batch,)
    # First all problems at once. If the sum does not vanish, one by one, because they may share an argument.
    for pullback in pullbacks:
        if _vanishes(pullback, suspects, probe):
            return found
        numbers = suspects.nonzero().reshape(-1)
        if len(numbers) > 1:
            each = torch.nn.functional.one_hot(numbers, len(suspects)).bool()
            kept = [not _vanishes(pullback, this, probe) for this in each]
            suspects = suspects.index_put((numbers,), torch.tensor(kept, device=suspects.device))
    return suspects.repeat(operator.repeats) & singular


@dataclass(frozen=True, eq=False)
class _Probe:
    """Null vectors of the singular matrices of a batch, and the vectors that (∂_θR)ᵀ u is compared with.

    Parameters
    ----------
    singular
        Bool (batch,).
    vectors
        A null vector u of each singular matrix, u with irregular signs, and an irregular vector of the same scaled norm (each (batch, n)).
    doubt
        Problems (batch,) ↦ the relative error of u.
    scale
        The largest scale of a row.
    """

    singular: torch.Tensor
    vectors: tuple[torch.Tensor, ...]
    doubt: Callable[[torch.Tensor], float]
    scale: float


def _probe_of_products(null: NullSpace) -> _Probe:
    """Return the probe of null vectors that were found by products. The gap to the other singular values is unknown."""
    u = null.vector
    places = torch.arange(1, u.shape[-1] + 1, dtype=torch.float64, device=u.device)
    v, w = (torch.frac(places * irrational).sub(0.5).to(u) for irrational in _IRRATIONAL[1:])
    other = (w / w.norm()).expand_as(u)
    doubt = torch.finfo(u.dtype).eps ** 0.25
    return _Probe(null.singular, (u, torch.sign(v) * u, other), lambda _: doubt, 1.0)


def _probe_of_factors(pseudo: PseudoInverse, batch: int) -> _Probe:
    """Return the probe of null vectors from a decomposition.

    The relative error of a null vector is about the cutoff of the rank, divided by the gap to the other singular
    values. It is limited to the range from the square root of eps to 0.1.
    """
    eps = torch.finfo(pseudo.left.dtype).eps

    def doubt(these: torch.Tensor) -> float:
        kept = pseudo.inverse[these[pseudo.singular]].abs()  # 1 / σ; zero if σ counts as zero
        spread = torch.where(kept > 0, kept.amax(-1, keepdim=True) / kept, 0.0)
        return min(max(eps**0.5, pseudo.cutoff * float(spread.amax())), 0.1)

    scale = float(pseudo.right.norm(dim=-1).amax())
    return _Probe(pseudo.singular, _vectors(pseudo, batch), doubt, scale)


def _vectors(pseudo: PseudoInverse, batch: int) -> tuple[torch.Tensor, ...]:
    """Return the vectors of a :class:`_Probe`."""
    left = pseudo.left  # (k, n, n): the scale of each row times an orthogonal matrix
    # No random generator is used: a transform around this call may refuse random numbers.
    places = torch.arange(1, left.shape[-1] * len(left) + 1, dtype=torch.float64, device=left.device)
    u, v, w = (torch.frac(places * irrational).sub(0.5).to(left).reshape(left.shape[:2]) for irrational in _IRRATIONAL)

    def of_scaled_norm_one(numbers: torch.Tensor) -> torch.Tensor:
        return (left @ (numbers / numbers.norm(dim=-1, keepdim=True)).unsqueeze(-1)).squeeze(-1)

    null = of_scaled_norm_one(torch.where(pseudo.inverse == 0, u, 0.0))
    made = []
    for some in (null, torch.sign(v) * null, of_scaled_norm_one(w)):
        every = torch.zeros(batch, null.shape[-1], dtype=null.dtype, device=null.device)
        every[pseudo.singular] = some.nan_to_num(0.0, 0.0, 0.0)
        made.append(every)
    return tuple(made)


def _vanishes(pullback: Pullback, these: torch.Tensor, probe: _Probe) -> bool:
    """Return, for each argument θ, whether (∂_θR)ᵀ u of ``these`` problems (batch,) is zero up to the error of u and rounding.

    If all of ∂_θR is rounding, ratios say nothing. An example is a θ that shifts x along a free direction. There ∂_θR
    is at most as large as ∂_x R, and 64 eps of that counts as zero.
    """
    vectors = probe.vectors
    found = pullback(torch.where(these.unsqueeze(-1), vectors[0], 0.0))
    if not any(bool((_entries(slope) != 0).any()) for _, slope in found):
        return True
    sizes = [pullback(torch.where(these.unsqueeze(-1), v, 0.0)) for v in vectors[1:]]
    doubt, unit = probe.doubt(these), 64 * torch.finfo(vectors[0].dtype).eps / probe.scale
    for (theta, slope), *others in zip(found, *sizes, strict=True):
        size = max(_norm(other) for _, other in others)
        values = _entries(theta.detach())
        largest = max(1.0, float(values.abs().amax())) if values.numel() else 1.0
        if _norm(slope) > max(doubt * size, unit / largest):
            return False
    return True


def _entries(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.coalesce().values() if tensor.is_sparse else tensor


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(_entries(tensor)))


def _free_direction_messages(*, symmetric: bool) -> StatusMessages:
    """Return the message for ``Status.SINGULAR`` if an argument changes the free directions."""
    meaning = "found no derivative: an argument changes which directions of the solution are free"
    if symmetric:
        remedy = "pin one unknown, add a small ridge term such as 1e-3 * ((x - x0) ** 2).sum() with a fixed x0 to the objective"
    else:
        remedy = "put an equation that pins one unknown, such as x[0] - c, in the place of an equation that follows from the others"
    return {Status.SINGULAR: (meaning, f"{remedy}, or pass that argument detached if its gradient is not wanted")}


def unsure_derivative_messages() -> StatusMessages:
    """Return the message for ``Status.MINIMUM_NORM`` if a computed argument may change the free directions."""
    meaning = (
        "found the solution of smallest Euclidean norm; by an argument that the transform computes, "
        "the derivative may not exist, which was not checked"
    )
    remedy = (
        "differentiate by torch.autograd.grad, which checks what the argument was computed from, or pin one unknown"
    )
    return {Status.MINIMUM_NORM: (meaning, remedy)}


def without_derivative(
    operator: LinearOperator,
    outcome: LinearOutcome,
    pullbacks: Callable[[], Sequence[Pullback]],
    words: StatusMessages,
) -> tuple[LinearOutcome, StatusMessages]:
    """Return ``outcome`` and ``words`` with ``Status.SINGULAR`` for problems in which an argument changes the free directions of the solution."""
    if not bool((outcome.status == Status.MINIMUM_NORM).any()):
        return outcome, words
    changed = changes_free_directions(operator, outcome.status, pullbacks())
    if not bool(changed.any()):
        return outcome, words
    status = torch.where(changed, int(Status.SINGULAR), outcome.status)
    first = (status == Status.SINGULAR).nonzero()[0]  # a report has one message for each status
    if bool(changed[first]):
        words = {**_free_direction_messages(symmetric=operator.symmetric), **words}
    return replace(outcome, status=status), words
