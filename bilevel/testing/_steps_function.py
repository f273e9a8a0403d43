"""What is wrong with a problem's function: dtypes, values, randomness, captured tensors, derivatives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils import _pytree as pytree

import bilevel
from bilevel.testing._examination import Examination, first_line
from bilevel.testing._probes import Probe, argument_mismatch, captured_tensors, gradient_mismatch, probe, state_of
from bilevel.testing.defects import Defect
from bilevel.testing.references import Reference

__all__ = ["MISMATCH", "derivatives", "dtypes", "function", "misuse", "prepare"]

# Derivatives and differences that disagree by more than this are not of the same function.
MISMATCH = 1e-3


def prepare(seen: Examination) -> None:
    """See whether there is an unknown, and take the widest dtype that the function accepts."""
    for leaf in pytree.tree_leaves(seen.subject.init):
        if not isinstance(leaf, torch.Tensor) or not leaf.dtype.is_floating_point:
            got = leaf.dtype if isinstance(leaf, torch.Tensor) else type(leaf).__name__
            seen.find(Defect.UNUSABLE, f"the unknown has to be floating-point tensors, and one is {got}", "convert it")
    seen.wide = Reference.of(seen.subject, seen.narrow.cotangents)


def dtypes(seen: Examination) -> None:
    """See whether the call's dtypes are fine enough, and one."""
    tensors = [*pytree.tree_leaves(seen.subject.init), *seen.subject.leaves]
    found = {t.dtype for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point()}
    named = sorted(str(dtype).removeprefix("torch.") for dtype in found)
    if any(torch.finfo(dtype).bits < 32 for dtype in found):
        seen.find(Defect.LOW_PRECISION, f"tensors of {', '.join(named)}: 2 to 3 digits, of which a solve leaves none")
    elif len(found) > 1:
        seen.find(Defect.MIXED_DTYPES, f"tensors of {' and '.join(named)}")


def function(seen: Examination) -> None:
    """Evaluate the function of each problem at its start, and beside it twice."""
    subject, narrow = seen.subject, seen.narrow
    before = state_of(narrow)
    starts = narrow.rows(pytree.tree_leaves(subject.init))
    for number in seen.numbers():
        x = starts[number]
        here = probe(narrow, number, x)
        _finite(seen, here, number)
        if here.residual is None and x.numel():
            seen.find(Defect.INNER_DISCONNECTED, "no graph leads from what the function returns to its first argument")
        if here.leaves:
            what = ", ".join(captured_tensors(here.leaves, subject.function))
            seen.find(Defect.CAPTURED_TENSOR, f"the inner function reaches {what}, which would get no gradient")
        # Dropout leaves a zero alone: look beside the start.
        beside = x + 0.01 * (1 + x.abs())
        pair = [probe(narrow, number, beside) for _ in range(2)]
        same = _agree(pair[0], pair[1])
        seen.deterministic = same and seen.deterministic is not False
    if seen.deterministic is False:
        seen.find(Defect.STOCHASTIC, "two evaluations of the inner function at one point differ")
    if state_of(narrow) != before:
        seen.find(Defect.CHANGES_STATE, "evaluating the inner function changes an argument or a buffer in place")


def _finite(seen: Examination, here: Probe, number: int) -> None:
    if not bool(torch.isfinite(here.value).all()):
        seen.find(Defect.NOT_FINITE, f"the inner function is not finite at the start{seen.of(number)}")
    elif here.residual is not None and not bool(torch.isfinite(here.residual).all()):
        seen.find(Defect.NOT_FINITE, f"the inner function's gradient is not finite at the start{seen.of(number)}")


def misuse(seen: Examination) -> None:
    """Let the library refuse what it would refuse, with a solver that does nothing."""
    if seen.has(Defect.NOT_FINITE):
        return
    idle = seen.layer(
        solver=lambda function, init, *args, **kwargs: init,
        tolerance=bilevel.Tolerance(delta=None, delta_prime=None),
        on_failure="raise",
    )
    leaves = [point.clone().requires_grad_(True) for point in seen.subject.points]
    try:
        with torch.enable_grad():
            seen.subject.solve(idle, leaves)
    except bilevel.SolveError:
        return
    except bilevel.StochasticObjectiveError as error:
        seen.find(Defect.CHANGES_STATE if "in place" in str(error) else Defect.STOCHASTIC, first_line(error))


def derivatives(seen: Examination) -> None:
    """Compare derivatives by autograd with differences, beside the inner solution."""
    if seen.has(Defect.STOCHASTIC, Defect.INNER_DISCONNECTED):
        return
    for number in seen.usable()[:2]:
        first, second = gradient_mismatch(seen.wide, number, seen.rows[number])
        if first > MISMATCH:
            text = f"the gradient by autograd and differences of the values disagree by {first:.0%}"
            seen.find(Defect.WRONG_GRADIENT, text)
        elif second > MISMATCH:
            text = f"second derivatives by autograd and differences of the first disagree by {second:.0%}"
            if not seen.subject.layer.minimizes:
                text = f"derivatives by autograd and differences of the residual disagree by {second:.0%}"
            seen.find(Defect.WRONG_GRADIENT, text)
        _by_arguments(seen, number)


def _by_arguments(seen: Examination, number: int) -> None:
    """Compare the inner function's derivatives by its arguments with differences."""
    x = seen.rows[number]
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)

    def weighed(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return (seen.wide.residual(number, x, tensors) * weights).sum()

    errors = argument_mismatch(weighed, seen.wide.points, seen.wide.eps)
    what = "its gradient" if seen.subject.layer.minimizes else "its values"
    for name, error in zip(seen.subject.names, errors, strict=True):
        if error > MISMATCH:
            text = f"the inner function's derivative by {name} and differences of {what} disagree by {error:.0%}"
            seen.find(Defect.WRONG_GRADIENT, text)


def _agree(first: Probe, second: Probe) -> bool:
    pairs = [(first.value, second.value)]
    if first.residual is not None and second.residual is not None:
        pairs.append((first.residual, second.residual))
    for a, b in pairs:
        scale = float(torch.maximum(a.abs(), b.abs()).nan_to_num().max()) if a.numel() else 0.0
        bound = torch.finfo(a.dtype).eps ** 0.5 * scale
        if a.numel() and not bool(((a - b).abs().nan_to_num() <= bound).all()):
            return False
    return True
