"""Which solver, linear solver and tolerance suit a problem, from its size and curvature, and what they cost."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from bilevel.testing.defects import Defect
from bilevel.testing.diagnosis import Advice, Cost, Curvature

if TYPE_CHECKING:
    from bilevel.testing._examination import Examination

__all__ = ["advise"]

_DENSE_ORDER = 512
# The relative accuracy of a hypergradient that optimisers have a use for.
_WANTED = 1e-6


def advise(seen: Examination) -> Advice:
    """Return what to choose for the problem examined."""
    subject, cost, curve = seen.subject, seen.cost, seen.curvature
    size = len(seen.rows[0])
    symmetric = subject.layer.minimizes
    small = size <= _DENSE_ORDER
    slow = curve is not None and curve.condition > 1e4
    if symmetric:
        solver = "Newton()" if small else "Newton(dense_limit=0)" if slow else "LBFGS()"
        linear = "Exact()" if small else "CG(preconditioner=...)" if slow else "CG()"
    else:
        solver = "Anderson()" if subject.layer.is_fixed_point and not slow else "Newton()"
        linear = "Exact()" if small else "GMRES()"
    if any(finding.defect is Defect.SADDLE for finding in seen.findings):
        linear = "Exact(indefinite=True)" if small else "GMRES()"
    return Advice(solver, linear, _tolerance(seen, curve), _price(small, size, cost))


def _tolerance(seen: Examination, curve: Curvature | None) -> str:
    """Return δ = goal · ‖x‖ and δ′ = goal of the adjoint, with μ where the Hessian is known to be definite."""
    if seen.has(Defect.MINIMUM_NORM):  # the condition number is that of the free directions
        return "Tolerance()"
    eps = seen.subject.eps
    kappa = 1.0 if curve is None else min(curve.condition, 1e30)
    goal = max(_WANTED, 10 * kappa * eps)
    if goal >= 0.1:
        return "Tolerance(): the condition number leaves no digit in this dtype"
    mu = ""
    if curve is not None and curve.exact and curve.smallest > 0:
        mu = f", strong_convexity={0.5 * curve.smallest:.1g}"
    delta = goal * (seen.scale if seen.scale else 1.0)
    return f"Tolerance(delta={delta:.0e}, delta_prime={goal:.0e}{mu}) for {-math.log10(goal):.0f} digits, Tolerance() for all"


def _price(small: bool, size: int, cost: Cost | None) -> str:
    if cost is None:
        return ""
    if small:
        return f"a hypergradient then takes about {size} products, {size * cost.product_seconds:.1e} s a problem"
    seconds = cost.cg_products * cost.product_seconds
    return f"a hypergradient then takes about {cost.cg_products} products, {seconds:.1e} s a problem, and no matrix"
