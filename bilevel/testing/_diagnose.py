"""The diagnosis of a problem in one call. A defect of the problem never makes the call fail."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import bilevel
from bilevel.testing import _steps_constraints, _steps_function, _steps_gradient, _steps_solution
from bilevel.testing._advice import advise
from bilevel.testing._examination import Examination
from bilevel.testing._subject import of_call
from bilevel.testing.defects import Defect
from bilevel.testing.diagnosis import Diagnosis, Finding

__all__ = ["diagnose"]

_STEPS = (
    (_steps_function.prepare, "the function in float64"),
    (_steps_function.dtypes, "the dtypes"),
    (_steps_function.function, "the function"),
    (_steps_function.misuse, "what the library refuses"),
    (_steps_solution.solve, "the inner solve"),
    (_steps_function.derivatives, "the function's derivatives"),
    (_steps_solution.curve, "the curvature"),
    (_steps_solution.stationary, "whether the inner point is stationary"),
    (_steps_gradient.outer_loss, "the outer loss"),
    (_steps_gradient.tensors, "the outer tensors"),
    (_steps_gradient.linear_solve, "the linear solve"),
    (_steps_solution.price, "the cost"),
    (_steps_gradient.whole, "a hypergradient"),
)


# With proximal terms or constraints, the curvature of the objective alone says little of the solution.
_STRUCTURED_STEPS = (
    *_STEPS[:5],
    (_steps_function.derivatives, "the function's derivatives"),
    (_steps_constraints.constraints, "the constraints"),
    (_steps_constraints.arguments, "the outer tensors"),
    (_steps_gradient.one_sided, "the linear solve"),
    (_steps_gradient.outer_loss, "the outer loss"),
    (_steps_gradient.whole, "a hypergradient"),
)


def diagnose(
    target: bilevel.Layer | bilevel.BilevelProblem,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    init: Any = None,
    in_dims: Any = None,
) -> Diagnosis:
    """Examine a problem: find its defects, and recommend solvers and tolerances with their costs.

    It examines the function and the outer loss: whether they are finite, deterministic, differentiated rightly by autograd and free
    of captured tensors. It examines the inner solve: how it ends, and whether its point is stationary. It computes the extreme
    eigenvalues of the Hessian, or singular values of a Jacobian, from the matrix up to 512 unknowns and by Lanczos beyond.
    It checks the connection of each outer tensor, the accuracy of the linear solve, dtypes and scales. Of a batch the first
    8 problems are examined. With proximal terms or constraints it examines how the inner solve ends, and whether the
    derivative at the solution is one-sided. With constraints it looks whether the start violates one, and whether they repeat each
    other or a bound. It names unknowns that bounds fix. Where nothing is found, it takes a derivative as a user would: what the library refuses
    is a finding.

    It costs two solves, two gradients, and n reverse passes for each problem examined (60 products where n is large).

    Parameters
    ----------
    target
        A layer, or a bilevel problem. Its warm starts are cleared.
    args
        The arguments of the call: ``init, *args`` for a layer, ``outer, data`` for a problem, ``data`` for
        :class:`~bilevel.HyperparameterOptimization`, a batch of tasks for :class:`~bilevel.IMAML`.
    kwargs, init, in_dims
        See :func:`~bilevel.testing.check_gradients`.

    Returns
    -------
    Diagnosis
        ``print`` it for one page of text; ``.findings``, ``.as_dict()``. What stops the examination is a finding itself.

    Raises
    ------
    ArgumentError
        If ``target`` is neither a layer nor a problem.

    Examples
    --------
    >>> import torch, bilevel
    >>> saddle = bilevel.argmin(lambda x, a: (x[0] - a) ** 2 - (x[1] - a) ** 2)
    >>> found = bilevel.testing.diagnose(saddle, torch.ones(2, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    >>> [defect.name for defect in found.defects], found.curvature.smallest
    (['SADDLE'], -2.0)
    """
    if not isinstance(target, (bilevel.Layer, bilevel.BilevelProblem)):
        raise bilevel.ArgumentError(
            f"diagnose: expected a layer or a bilevel problem, got {target!r}; wrap the function with bilevel.argmin, "
            "bilevel.root or bilevel.fixed_point"
        )
    try:
        if isinstance(target, bilevel.BilevelProblem):
            target.reset()
        subject = of_call(target, args, {} if kwargs is None else kwargs, init, in_dims)
    except Exception as error:  # the arguments do not fit: that is the finding
        sentence = f"the call cannot be made: {type(error).__name__}: {str(error).strip()}"
        finding = Finding(Defect.UNUSABLE, sentence, Defect.UNUSABLE.remedy)
        where = getattr(target, "where", "the problem")
        return Diagnosis(where, "argmin", 0, 0, "none", (finding,), None, None, (), None, None, None, None)
    try:
        return _examined(Examination(subject))
    finally:
        if isinstance(target, bilevel.BilevelProblem):
            target.reset()


def _examined(seen: Examination) -> Diagnosis:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        structured = seen.subject.layer.structure is not None
        for step, what in _STRUCTURED_STEPS if structured else _STEPS:
            seen.attempt(step, what)
            if seen.has(Defect.UNUSABLE, Defect.INNER_DISCONNECTED):
                seen.unexamined.append("what depends on it")
                break
    if structured:
        return seen.diagnosis(None)
    sound = seen.rows and not seen.has(Defect.UNUSABLE, Defect.NOT_FINITE)
    return seen.diagnosis(advise(seen) if sound else None)
