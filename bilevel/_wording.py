"""What a failed inner solve says, and what to do about it, as the kind of problem and the solver have it.

:mod:`bilevel.reports` has general words for each status. A root has no objective, Newton's method no step size, and an objective that
falls without end needs to be told so.
"""

from __future__ import annotations

from bilevel.reports import Status, Words

__all__ = ["words_of"]

# How many times its size at the start x has to have grown before it counts as having run away.
_FAR = 1e6
_SHORT_OF_IT = (
    Status.MAX_STEPS,
    Status.NOT_CONVERGED,
    Status.STAGNATED,
    Status.DIVERGED,
    Status.NOT_FINITE,
    Status.LINE_SEARCH_FAILED,
)
_NO_MINIMUM = (
    "ended at a saddle or a maximum: the Hessian has a negative eigenvalue there",
    "start elsewhere: start beside it, for example at init + 1e-3 * torch.randn_like(init); or, if any stationary point will do, take "
    "bilevel.root(torch.func.grad(objective))",
)

_ROOT: Words = {
    Status.LINE_SEARCH_FAILED: _NO_LOWER_RESIDUAL,
    Status.DIVERGED: (
        Status.DIVERGED.meaning,
        "the residual may have no root there: check that one exists, and start nearer to it",
    ),
    Status.STAGNATED: (
        Status.STAGNATED.meaning,
        "the residual may have no root near the start: start elsewhere; or rounding is the limit: use float64, rescale the equations, "
        "or loosen the tolerance",
    ),
    Status.NOT_FINITE: (Status.NOT_FINITE.meaning, f"{_DOMAIN}, or start nearer the root"),
}

_FIXED_POINT: Words = {
    Status.MAX_STEPS: (
        Status.MAX_STEPS.meaning,
        "check that the mapping has a fixed point and is smooth near it; start nearer to it, loosen the tolerance, or raise max_steps",
    ),
    Status.LINE_SEARCH_FAILED: (
        "found no step that lowers the residual x - T(x)",
        _ABOUT_ROOTS.replace("the residual may have no root", "the mapping may have no fixed point"),
    ),
    Status.DIVERGED: (
        Status.DIVERGED.meaning,
        "the mapping may not be a contraction there, or have no fixed point: start nearer to it, or take solver=bilevel.Newton(), "
        "which needs no contraction",
    ),
    Status.NOT_FINITE: (Status.NOT_FINITE.meaning, f"{_DOMAIN}, or start nearer the fixed point"),
}
