"""What reports of cone programs say: which cones, why, and what to do."""

from __future__ import annotations

from bilevel.cones._product import Product
from bilevel.cones._solve import Found
from bilevel.quadratic_programs._wording import infeasible_words
from bilevel.reports import Status, StatusMessages

__all__ = ["backward_words", "forward_words"]

_SMOOTHING = "pass smoothing=1e-6, which differentiates a point of the central path, or on_failure='ignore' for a one-sided derivative"
_NONCONVEX = (
    "met a matrix P that is not positive semidefinite, so that the program is not convex",
    "add a multiple of the identity to P, or use bilevel.argmin with constraints for a local minimum",
)
_NOT_FINITE = ("was given a NaN or an infinity", "check P, q, A and b; leave out rows that are no constraint")
_UNBOUNDED = (
    "proved that the objective falls without end inside the constraints",
    "add a constraint or a quadratic term; solution.certificate has the direction (on_failure='ignore' returns the solution)",
)
_NOT_UNIQUE = (
    "met a solution or multipliers that are not unique in a direction that is differentiated",
    "add a small multiple of the identity to P, remove redundant rows, or loosen the constraints if they leave a single point; a program whose "
    "constraints leave more than one point may also take smoothing=1e-6, which differentiates a point of the central path",
)


def forward_words(product: Product, found: Found) -> StatusMessages:
    """Return the words for the statuses of a solve, and for derivatives at a kink."""
    if bool((found.status == Status.CONVERGED).all()) and not bool((found.kink >= 0).any()):
        return {}
    words = {
        Status.INDEFINITE: _NONCONVEX,
        Status.NOT_FINITE: _NOT_FINITE,
        Status.UNBOUNDED: _UNBOUNDED,
    }
    refuted = (found.status == Status.INFEASIBLE).nonzero()
    if len(refuted):
        ray = found.certificate[int(refuted[0]), -product.size :].abs()
        sizes: dict[str, float] = {}
        for row in (ray > 1e-6 * ray.amax()).nonzero():
            name = product.name(int(row))
            sizes[name] = max(sizes.get(name, 0.0), float(ray[int(row)]))
        words[Status.INFEASIBLE] = infeasible_words(sizes, "; ")
    kinks = found.kink[found.kink >= 0]
    if len(kinks):
        words[Status.DEGENERATE] = (
            f"met a solution without strict complementarity in {product.name(int(kinks[0]))}: slack and multiplier are both on the boundary of "
            "their cones there, so that the derivative is one-sided or does not exist",
            _SMOOTHING,
        )
    return words


def backward_words() -> StatusMessages:
    """Return the words for the linear systems of derivatives."""
    return {Status.SINGULAR: _NOT_UNIQUE}
