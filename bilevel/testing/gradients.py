"""Are these gradients right? The library's derivatives of your own problem, against four that know nothing of it."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import bilevel
from bilevel.testing._differences import differences
from bilevel.testing._evidence import Evidence
from bilevel.testing._subject import Subject, of_call
from bilevel.testing.comparisons import Allowance, Comparison, GradientCheck, Verdict
from bilevel.testing.references import Reference

__all__ = ["assert_gradients", "check_gradients"]

# A comparison held to more than this share of what it compares proves nothing.
_MOST_SHARE, _LEAST_NATURAL = 0.1, 0.01
_DENSE_ORDER = 512


def check_gradients(
    target: bilevel.Layer | bilevel.BilevelProblem,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    init: Any = None,
    in_dims: Any = None,
    step: float | None = None,
    rtol: float | None = None,
    seed: int = 0,
) -> GradientCheck:
    r"""Compare the library's gradients on your own problem with dense, unrolled and finite-difference ones.

    Let c be the outer loss of a problem, or for a layer ⟨cotangent, x⟩ with seeded random cotangents. For each tensor θ of
    the call, dc/dθ by ``torch.autograd.grad`` is compared with

    dense
        ∂_θ c − (∂_θ R)ᵀ J⁻ᵀ ∂_x c at the solution returned, J formed row by row and solved by a factorisation;
    unrolled
        the derivative through an iteration from the exact solution: heavy-ball descent at well-conditioned minima, the
        mapping itself for contractions, Newton's iteration elsewhere;
    differences
        central differences, extrapolated, of c at solutions for displaced θ; entry by entry, or in random directions
        where there are more than 12 entries.

    The derivative by ``torch.func.jvp`` along a random direction is compared with the dense one. The references are
    computed in float64 whatever the dtype of the call, from the user's functions alone, one problem of a batch at a time.
    The tolerance of each comparison is derived, not chosen: see :class:`Allowance`. A comparison whose tolerance would
    accept an error of a tenth is :attr:`Verdict.INCONCLUSIVE`, and does not count as passed.

    Parameters
    ----------
    target
        A layer, or a bilevel problem.
    args
        What it is called with: ``(init, *args)`` for a layer, ``(outer, data)`` for a problem, ``(data,)`` for
        :class:`~bilevel.HyperparameterOptimization`, ``(batch,)`` for :class:`~bilevel.IMAML`. Of a layer's tensors those that
        require grad are checked, or all floating-point ones where none does; of a problem's, those of ``outer``.
    kwargs
        Keyword arguments of a layer.
    init
        Where a problem's inner search begins; by default its own ``initial``. Its memory of earlier solves is
        forgotten.
    in_dims
        For a layer: axes of ``args`` as in ``torch.func.vmap``, to check a batch. A problem has its ``batch_dims``.
    step
        Step of the differences, relative to each entry; by default eps^(1/5) of the references' dtype, 7e-4.
    rtol
        Hold every comparison to this relative error instead.
    seed
        Of cotangents and directions.

    Returns
    -------
    GradientCheck
        ``.passed``, ``.comparisons``, and a table when printed.

    Raises
    ------
    SolveError
        If a solve fails and the target's policy is ``"raise"``; likewise its other errors.
    ArgumentError
        If the arguments do not fit; if there are proximal terms, bounds or constraints, which the references do not know; or if one
        problem has more than 512 unknowns, for which dense references are no check but a calculation of their own: check a smaller
        instance of the same problem.

    Examples
    --------
    >>> import torch, bilevel
    >>> ridge = bilevel.argmin(lambda w, X, y, s: ((X @ w - y) ** 2).sum() + s.exp() * (w**2).sum())
    >>> X = torch.tensor([[1.0, 0.5], [0.0, 2.0], [1.0, 1.0]], dtype=torch.float64)
    >>> y, s = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    >>> check = bilevel.testing.check_gradients(ridge, (torch.zeros(2, dtype=torch.float64), X, y, s))
    >>> check.passed, len(check.comparisons), check.worst.relative < 1e-8
    (True, 12, True)
    """
    subject = of_call(target, args, {} if kwargs is None else kwargs, init, in_dims)
    if subject.layer.structure is not None:
        raise bilevel.ArgumentError(
            f"check_gradients: expected a layer or problem without proximal terms, bounds or constraints, which its references do not know, got "
            f"{subject.where}; compare by torch.autograd.gradcheck(lambda *args: layer(init, *args), args) in float64 instead"
        )
    if rtol is not None and not (math.isfinite(rtol) and rtol > 0):
        raise bilevel.ArgumentError(f"check_gradients: expected rtol > 0 or None, got {rtol!r}; pass a number")
    if step is not None and not 0 < step < 1:
        raise bilevel.ArgumentError(f"check_gradients: expected 0 < step < 1 or None, got {step!r}; it is relative")
    return _Check(subject, step, rtol, torch.Generator().manual_seed(seed)).run()


def assert_gradients(
    target: bilevel.Layer | bilevel.BilevelProblem,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    **settings: Any,
) -> None:
    """Raise AssertionError with the table unless :func:`check_gradients` passes.

    Parameters
    ----------
    target, args, kwargs
        See :func:`check_gradients`.
    settings
        Its keyword arguments.

    Raises
    ------
    AssertionError
        If a comparison failed or was inconclusive.

    Examples
    --------
    >>> import torch, bilevel
    >>> layer = bilevel.argmin(lambda x, a: ((x - a) ** 2).sum() + 0.0 * (x * a.detach()).sum())
    >>> args = torch.zeros(2, dtype=torch.float64), torch.tensor([1.0, 3.0], dtype=torch.float64)
    >>> bilevel.testing.assert_gradients(layer, args)
    >>> cut = bilevel.argmin(lambda x, a: ((x - a.detach()) ** 2).sum() + (x * a).sum())  # a.detach() loses a part
    >>> bilevel.testing.assert_gradients(cut, args)
    Traceback (most recent call last):
        ...
    AssertionError: ...
    """
    check = check_gradients(target, args, kwargs, **settings)
    if not check.passed:
        raise AssertionError(f"\n{check}")


@dataclass(frozen=True, eq=False)
class _Check:
    """One check: the library's derivatives first, then the references, then the comparisons."""

    subject: Subject
    step: float | None
    rtol: float | None
    generator: torch.Generator

    def run(self) -> GradientCheck:
        subject = self.subject
        problem = subject.problem
        if problem is not None:
            problem.reset()
        try:
            found = subject.solution()
            largest = sum(leaf.numel() for leaf in found) // max(subject.count or 1, 1)
            if largest > _DENSE_ORDER:
                raise bilevel.ArgumentError(
                    f"{subject.where}: expected at most {_DENSE_ORDER} unknowns for dense references, got {largest}; check "
                    "a smaller instance of the same problem"
                )
            cotangents = () if problem is not None else tuple(self._random(leaf) for leaf in found)
            gradients, backward = self._reverse(cotangents)
            directions = [self._direction(point) for point in subject.points]
            tangents = [self._forward(place, direction) for place, direction in enumerate(directions)]
        finally:
            if problem is not None:
                problem.reset()
        reference = Reference.of(subject, cotangents)
        evidence = Evidence.of(reference, reference.rows(found))
        rows = self._reverse_rows(evidence, gradients, backward)
        for place, (direction, (tangent, residuals)) in enumerate(zip(directions, tangents, strict=True)):
            rows.append(self._forward_row(evidence, place, direction, tangent, residuals))
        order = {name: number for number, name in enumerate(subject.names)}
        rows.sort(key=lambda row: order[row.argument])
        return self._result(evidence, gradients, rows)

    def _random(self, like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=self.generator, dtype=torch.float64).to(like)

    def _direction(self, point: torch.Tensor) -> torch.Tensor:
        signs = torch.randint(0, 2, point.shape, generator=self.generator).to(point) * 2 - 1
        typical = float(point.abs().max()) if point.numel() else 1.0
        return signs * (typical or 1.0)

    # The library's derivatives.

    def _reverse(self, cotangents: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
        leaves = [point.detach().clone().requires_grad_(True) for point in self.subject.points]
        with bilevel.record() as reports, torch.enable_grad():
            outputs = self.subject.outputs(*leaves)
            # What does not depend on any of the tensors has the gradient zero.
            gradients = [torch.zeros_like(leaf) for leaf in leaves]
            if any(output.requires_grad for output in outputs):
                weights = list(cotangents) or [torch.ones_like(outputs[0])]
                gradients = list(
                    torch.autograd.grad(outputs, leaves, weights, allow_unused=True, materialize_grads=True)
                )
        return gradients, self._linear_residuals(reports)

    def _forward(self, place: int, direction: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        points = self.subject.points

        def along(moved: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return self.subject.outputs(*points[:place], moved, *points[place + 1 :])

        with bilevel.record() as reports:
            made: Any = torch.func.jvp(along, (points[place],), (direction,))
        return tuple(part.detach() for part in made[1]), self._linear_residuals(reports)

    def _linear_residuals(self, reports: bilevel.Recording) -> torch.Tensor:
        """Return what the linear solves of this layer left, per problem (K,)."""
        count = self.subject.count or 1
        own = [report for report in reports.backward if report.where == self.subject.layer.where]
        total = torch.zeros(count, dtype=torch.float64)
        for report in own:
            left = report.residual_norm.double().cpu().reshape(-1)
            total = torch.maximum(total, left if len(left) == count else left.max().expand(count))
        return total

    # The comparisons.

    def _reverse_rows(
        self, evidence: Evidence, gradients: Sequence[torch.Tensor], residuals: torch.Tensor
    ) -> list[Comparison]:
        reference, rows = evidence.reference, []
        for place, name in enumerate(self.subject.names):
            mine = gradients[place].to(reference.dtype)
            dense, exact, unrolled = evidence.at_found[place], evidence.at_exact[place], evidence.unrolled
            inner = 2 * float((dense - exact).norm()) + evidence.wobble(place)
            allowed = evidence.allow(place, self.subject.eps, residuals)
            natural = evidence.natural(place)
            compare = functools.partial(self._compare, name, "reverse", natural=natural)
            rows.append(compare("dense", mine, dense, allowed))
            other = unrolled.gradients[place]
            cut = unrolled.remainder * natural
            rows.append(compare("unrolled", mine, other, allowed.scaled(1.0, inner=inner, step=cut)))
            found = differences(
                reference, place, evidence.exact, evidence.exact_adjoints, self.generator, self.step, evidence.terms
            )
            flat = found.directions.reshape(len(found.directions), mine.numel())
            along = flat @ mine.reshape(-1)
            spread = float(flat.norm())
            budget = allowed.scaled(spread, inner=inner, step=float(found.errors.norm()))
            scale = max(natural * spread, abs(evidence.value))
            rows.append(self._compare(name, "reverse", "differences", along, found.derivatives, budget, natural=scale))
        return rows

    def _forward_row(
        self,
        evidence: Evidence,
        place: int,
        direction: torch.Tensor,
        tangent: Sequence[torch.Tensor],
        residuals: torch.Tensor,
    ) -> Comparison:
        reference = evidence.reference
        toward = direction.to(reference.dtype)
        dense = reference.dense_tangents(evidence.found, place, toward, evidence.found_adjoints)
        allowed, natural = evidence.allow_forward(place, toward, dense, self.subject.eps, residuals)
        if self.subject.problem is None:
            mine, expected = torch.cat(reference.rows(tangent)), torch.cat(dense)
        else:
            mine = tangent[0].to(reference.dtype)
            through = [(a.rhs * w).sum() for a, w in zip(evidence.found_adjoints, dense, strict=True)]
            expected = torch.stack(through).sum() + (evidence.direct[place] * toward).sum()
        return self._compare(self.subject.names[place], "forward", "dense", mine, expected, allowed, natural=natural)

    def _compare(
        self,
        argument: str,
        derivative: str,
        reference: str,
        mine: torch.Tensor,
        other: torch.Tensor,
        allowance: Allowance,
        *,
        natural: float,
    ) -> Comparison:
        error, size = float((mine - other).norm()), float(other.norm())
        least = max(_MOST_SHARE * size, _MOST_SHARE * _LEAST_NATURAL * natural)
        held_to = allowance.total if self.rtol is None else self.rtol * max(size, _LEAST_NATURAL * natural)
        if not (math.isfinite(size) and math.isfinite(held_to)):
            verdict = Verdict.INCONCLUSIVE
        elif not error <= held_to:
            verdict = Verdict.FAILED
        else:
            verdict = Verdict.PASSED if self.rtol is not None or held_to <= least else Verdict.INCONCLUSIVE
        return Comparison(argument, derivative, reference, error, size, allowance, held_to, verdict)

    def _result(
        self, evidence: Evidence, gradients: Sequence[torch.Tensor], rows: Sequence[Comparison]
    ) -> GradientCheck:
        subject, reference = self.subject, evidence.reference

        def named(tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
            return dict(zip(subject.names, tensors, strict=True))

        coarsest = {float(torch.finfo(d).eps): d for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
        dtypes = tuple(str(d).removeprefix("torch.") for d in (coarsest[subject.eps], reference.dtype))
        notes = [f"unrolled: {evidence.unrolled.method}"]
        if reference.dtype != torch.float64:
            notes.append(f"references in {dtypes[1]}: the function takes no float64")
        return GradientCheck(
            subject.where,
            tuple(rows),
            evidence.distance,
            (dtypes[0], dtypes[1]),
            {
                "reverse": named(gradients),
                "dense": named(evidence.at_exact),
                "unrolled": named(evidence.unrolled.gradients),
            },
            tuple(notes),
        )
