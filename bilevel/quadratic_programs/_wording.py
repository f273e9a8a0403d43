"""What reports of quadratic programs say: which rows, why, and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from bilevel.reports import Status, StatusMessages

if TYPE_CHECKING:
    from bilevel.quadratic_programs._program import Found
    from bilevel.quadratic_programs._rule import Structure

__all__ = ["backward_words", "forward_words", "infeasible_words", "name_of_row"]

_MOST_NAMES = 4

_SMOOTHING = "pass smoothing=1e-6, which differentiates a point of the central path, or on_failure='ignore' for the derivative of one side"
_NONCONVEX = (
    "met a matrix Q that is not positive semidefinite, so that the program is not convex",
    "add a multiple of the identity to Q, or use bilevel.argmin with constraints for a local minimum",
)
_NOT_FINITE = (
    "was given a NaN, or an infinity where none is allowed",
    "no argument may have a NaN, and h, lower and upper alone may be infinite: check them",
)
_NOT_UNIQUE = (
    "met a solution that is not unique in a direction that is differentiated",
    "add a small multiple of the identity to Q, or pass smoothing=1e-6 if the set of solutions is bounded",
)
_DEPENDENT = (
    "met active constraints that depend on each other: the derivative with respect to them is one-sided",
    "leave out a constraint that follows from the others, as one sum of a transport plan does, loosen one if together they leave no interior, or "
    f"{_SMOOTHING}",
)


def name_of_row(structure: Structure, row: int) -> str:
    """Return what row number ``row`` of the m + 2n inequalities is.

    The rows of G come first, then the lower and the upper bounds.
    """
    m, n = structure.sizes.m, structure.sizes.n
    if row < m:
        return f"row {row} of G x <= h"
    return f"the lower bound of x[{row - m}]" if row < m + n else f"the upper bound of x[{row - m - n}]"


def forward_words(structure: Structure, found: Found, status: torch.Tensor) -> StatusMessages:
    """Return the words for the statuses of a solve."""
    words: dict[Status, tuple[str, str]] = {}
    if bool((status == Status.CONVERGED).all()):
        return words
    words[Status.INDEFINITE], words[Status.NOT_FINITE] = _NONCONVEX, _NOT_FINITE
    refuted = (status == Status.INFEASIBLE).nonzero()
    if len(refuted):
        words[Status.INFEASIBLE] = infeasible_words(_multipliers(structure, found.certificate[int(refuted[0])]), ", ")
    return words


def infeasible_words(multipliers: dict[str, float], separator: str) -> tuple[str, str]:
    """Return (meaning, remedy) for constraints that contradict each other: those with the largest ``multipliers`` of a proof are named."""
    largest = sorted(multipliers, key=lambda name: multipliers[name], reverse=True)[:_MOST_NAMES]
    names = separator.join(name for name in multipliers if name in largest)
    more = f" and {len(multipliers) - _MOST_NAMES} more" if len(multipliers) > _MOST_NAMES else ""
    if len(multipliers) == 1:
        return (
            f"proved that no point fulfils the constraints: none fulfils {names}",
            "loosen it, or correct its data (on_failure='ignore' returns the solution)",
        )
    return (
        f"proved that no point fulfils the constraints: {names}{more} contradict each other",
        "loosen those with the largest multipliers, which are named; solution.certificate has all multipliers, which prove it "
        "(on_failure='ignore' returns the solution)",
    )


def _multipliers(structure: Structure, ray: torch.Tensor) -> dict[str, float]:
    """Return the rows that a proof of infeasibility combines, with their multipliers."""
    n, p = structure.sizes.n, structure.sizes.p
    nu, rows = ray[n : n + p].abs(), ray[n + p :].abs()
    most = torch.cat([nu, rows]).amax()
    sizes = {f"row {int(i)} of A x = b": float(nu[i]) for i in (nu > 1e-6 * most).nonzero()}
    sizes |= {name_of_row(structure, int(i)): float(rows[i]) for i in (rows > 1e-6 * most).nonzero()}
    return sizes


def backward_words(structure: Structure, status: torch.Tensor, culprit: torch.Tensor) -> StatusMessages:
    """Return the words for the statuses of a derivative; ``culprit`` is the weakly active row, or −1."""
    if bool((status == Status.CONVERGED).all()):
        return {}
    words = {Status.SINGULAR: _NOT_UNIQUE, Status.DEGENERATE: _DEPENDENT}
    degenerate = (status.reshape(-1) == Status.DEGENERATE).nonzero()
    if len(degenerate):
        row = int(culprit.reshape(-1)[int(degenerate[0])])
        if row >= 0:
            words[Status.DEGENERATE] = (
                f"met a weakly active constraint, {name_of_row(structure, row)}: it is active with a multiplier of zero, so that "
                "the derivative is one-sided",
                _SMOOTHING,
            )
    return words
