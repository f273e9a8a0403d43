"""The differentiation rule: derivatives of x*(θ) with R(x*, θ) = 0, of every order and in both modes.

The implicit function theorem, with J = ∂_x R at the solution, says::

    reverse   θ̄ = −(∂_θ R)ᵀ q      where  Jᵀ q = x̄       (q is the adjoint)
    forward   ẋ = −w               where  J w = ∂_θ R · θ̇

Two primitives are enough. :class:`Solve` is x*(θ). Its rules above call :class:`LinearSolve`, z = J(x, θ)⁻¹ b
(or with Jᵀ), whose own rules, from J z = b, call it again::

    reverse   b̄ = J⁻ᵀ z̄,     (x̄, θ̄) = −∇_(x,θ) ⟨b̄, J z⟩  with b̄ and z held fixed
    forward   ż = J⁻¹ (ḃ − J̇ z)

Everything else in a rule is ordinary differentiable torch code, so that a rule can itself be differentiated. Derivatives
of J enter only through the scalar ⟨left, J right⟩ = ⟨Jᵀ left, right⟩, which one reverse pass computes. This module
imports no solver: an :class:`ImplicitContext` carries the inner solver and the linear solver.

``vmap`` lifts the system: its tensors gain an axis, and the same primitive is applied to the batch. A ``vmap`` over
right-hand sides alone (as in ``jacrev``) does not repeat the matrices. ``repeats`` counts such axes, so that each
matrix is linearised and factorised once.

A directional derivative takes two reverse passes (the derivative of u ↦ Jᵀu is J), because torch's dual numbers do
not nest inside a custom Function. For the same reason the layers refuse forward mode over forward mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.func import vmap

from bilevel._torch.once_differentiable import refuse_once_only
from bilevel._torch.reverse import grad, vjp
from bilevel._torch.transforms import (
    batch_axis_first,
    eager,
    grads_batched,
    is_differentiated_again,
    isolated,
    outside_autocast,
    signed,
    tangents_batched,
    transforms_active,
    without_tangent,
)
from bilevel.equations.domain import defined
from bilevel.equations.linearization import JointProduct, Linearization
from bilevel.equations.linearization_cache import LinearizationCache
from bilevel.equations.problem import Problem
from bilevel.equations.pullbacks import Pullback, is_final, pullbacks_of
from bilevel.equations.system import System
from bilevel.operators import RepeatedOperator
from bilevel.pytree import moves, usable

__all__ = ["ImplicitContext", "LinearSolve", "Solve"]

Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True, eq=False)
class ImplicitContext:
    """The parts of a layer's call that are not tensors.

    Parameters
    ----------
    system
        R.
    solve
        (problem, init (batch, n)) ↦ x (batch, n): the inner solver, its judge and the failure policy.
    solve_linear
        (operator, rhs (batch, n), axes of the batch) ↦ (batch, n). For the adjoint of a first derivative it also receives
        the product v ↦ A v as a :class:`JointProduct`. For any adjoint it receives pullbacks through ∂_θ R, which tell
        whether the derivative exists where A is singular.
    inspect
        Checks the problem before its first linear solve, if there was no inner solve.
    repeats
        Axes of right-hand sides that share the matrices, outermost first. They precede the system's own axes.
    followed
        Whether a derivative may follow. If so, the solver's last linearisation is kept.
    checked
        For an adjoint whose derivative is differentiated again: the tensors for which the derivative has to exist.
    unsure
        Likewise, for tensors computed in a graph that cannot be walked: the derivative may exist for the tensors behind them alone.
    arguments
        The tensors in the graph that computed them, if that graph can be walked.
    compare
        (problem, x (batch, n), R(x)) ↦ None: compares R in a derivative with R in the forward pass, at the same x.
    """

    system: System
    solve: Callable[[Problem, torch.Tensor], torch.Tensor]
    solve_linear: Callable[..., torch.Tensor]
    inspect: Callable[[Problem], None] | None = None
    repeats: tuple[int, ...] = ()
    followed: bool = False
    checked: tuple[bool, ...] = ()
    unsure: tuple[bool, ...] = ()
    arguments: tuple[torch.Tensor, ...] = ()
    compare: Callable[[Problem, torch.Tensor, torch.Tensor], None] | None = None
    memo: LinearizationCache = field(default_factory=LinearizationCache)

    def linearize(self, x: torch.Tensor, tensors: Tensors, needs_grad: Sequence[bool]) -> Linearization:
        """Return the linearisation at the solution ``x``, the last one if it still serves."""
        return self.memo.linearize(self.system, x, tensors, needs_grad, self.compare)

    def lift(self, size: int, batched: Sequence[bool]) -> ImplicitContext:
        """Return the rule for ``size`` problems at once."""
        return replace(self, system=self.system.lift(size, tuple(batched)), memo=LinearizationCache())


@signed
class Solve(torch.autograd.Function):
    """x*(θ) of shape (*batch, n)."""

    @staticmethod
    @eager
    @isolated
    def forward(rule: ImplicitContext, init: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        needs_grad = tuple([t.requires_grad for t in tensors])
        problem = Problem.of(rule.system, tensors, rule.memo.look(needs_grad) if rule.followed else None)
        start = init.detach().clone().reshape(problem.batch, problem.size)
        return rule.solve(problem, start).reshape(init.shape).clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        rule, _, *tensors = inputs
        ctx.rule = rule
        rule.memo.adopt(output, tensors)
        ctx.save_for_backward(output, *tensors)
        ctx.save_for_forward(output, *tensors)

    @staticmethod
    @eager
    @outside_autocast
    @grads_batched
    def backward(ctx: Any, cotangent: torch.Tensor) -> tuple[Any, ...]:
        rule: ImplicitContext = ctx.rule
        x, *tensors = ctx.saved_tensors
        needs_grad = ctx.needs_input_grad[2:]
        if not any(needs_grad):
            return (None,) * (2 + len(needs_grad))
        if not torch.is_grad_enabled() and not transforms_active():
            # A first derivative: one retained graph serves the adjoint's products and the pullback.
            linearization = rule.linearize(x, tensors, needs_grad)
            rhs = cotangent.reshape(linearization.residual.shape)
            both = JointProduct(linearization)
            operator, axes = linearization.operator.T, cotangent.shape[:-1]
            adjoint = rule.solve_linear(
                operator, rhs, axes, both, lambda: pullbacks_of(both.pullback, tensors, needs_grad)
            )
            return (None, None, *both.pullback(-adjoint.reshape(rhs.shape)))
        q = LinearSolve.apply(_checking(rule, tensors, needs_grad), True, cotangent, x, *tensors)
        again = _is_differentiated_again(rule.system, (x, cotangent, *tensors))
        chosen, residual = _residual_in(rule.system, x, tensors, needs_grad, again=again)
        made, pull = vjp(residual, *chosen)
        if rule.compare is not None and not transforms_active():
            problem = Problem.of(rule.system, tensors)
            shape = problem.batch, problem.size
            rule.compare(problem, x.detach().reshape(shape), made.detach().reshape(shape))
        pulled = iter(pull(-q))
        return (None, None, *(next(pulled) if want else None for want in needs_grad))

    @staticmethod
    @eager
    @outside_autocast
    @tangents_batched
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> torch.Tensor:
        rule: ImplicitContext = ctx.rule
        x, *tensors = map(without_tangent, ctx.saved_tensors)
        moving = [t is not None and moves(s) for t, s in zip(tangents[2:], tensors, strict=True)]
        if not any(moving):
            return torch.zeros_like(x)
        # A tangent takes two reverse passes, so the recorded graph is differentiated twice.
        chosen, residual = _residual_in(rule.system, x, tensors, moving, again=True)
        directions = tuple(t for t, move in zip(tangents[2:], moving, strict=True) if t is not None and move)
        pushed = _push(lambda u: vjp(residual, *chosen)[1](u), x, directions)
        return LinearSolve.apply(rule, False, -pushed, x, *tensors)

    @staticmethod
    @eager
    def vmap(
        info: Any, in_dims: tuple[Any, ...], rule: ImplicitContext, init: torch.Tensor, *tensors: torch.Tensor
    ) -> Any:
        dims = in_dims[2:]
        lifted = rule.lift(info.batch_size, [dim is not None for dim in dims])
        start = batch_axis_first(init, in_dims[1], info.batch_size)
        return Solve.apply(lifted, start, *(batch_axis_first(t, dim) for t, dim in zip(tensors, dims, strict=True))), 0


@signed
class LinearSolve(torch.autograd.Function):
    """z = J(x, θ)⁻¹ b, or J⁻ᵀ b where ``transposed``; b and z are (*repeats, *batch, n)."""

    @staticmethod
    @eager
    @isolated
    def forward(
        rule: ImplicitContext, transposed: bool, rhs: torch.Tensor, x: torch.Tensor, *tensors: torch.Tensor
    ) -> torch.Tensor:
        if rule.inspect is not None:
            rule.inspect(Problem.of(rule.system, tensors))
        linearization = rule.linearize(usable(x), tensors, [False] * len(tensors))
        operator = linearization.operator.T if transposed else linearization.operator
        if not (transposed or rule.system.symmetric):
            # A product J v takes two reverse passes.
            refuse_once_only(rule.system.where, rule.system.noun, linearization.residual)
        if rule.repeats:
            operator = RepeatedOperator(operator, math.prod(rule.repeats))
        flat = usable(rhs).detach().reshape(operator.batch, operator.size)
        axes = rule.repeats + rule.system.batch_shape
        unsure = _unsure_pullbacks_later(rule, x, tensors)
        solved = rule.solve_linear(
            operator, flat, axes, pullbacks=lambda: _pullbacks_later(rule, x, tensors), unsure=unsure,
            reverse=bool(rule.checked or rule.unsure),
        )  # fmt: skip
        return solved.reshape(rhs.shape).clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        rule, transposed, _, x, *tensors = inputs
        once = rule.checked or rule.unsure
        ctx.rule, ctx.transposed = replace(rule, checked=(), unsure=(), arguments=()) if once else rule, transposed
        ctx.save_for_backward(output, x, *tensors)
        ctx.save_for_forward(output, x, *tensors)

    @staticmethod
    @eager
    @outside_autocast
    @grads_batched
    def backward(ctx: Any, cotangent: torch.Tensor) -> tuple[Any, ...]:
        rule: ImplicitContext = ctx.rule
        z, x, *tensors = ctx.saved_tensors
        b_bar = LinearSolve.apply(rule, not ctx.transposed, cotangent, x, *tensors)
        needs_grad = ctx.needs_input_grad[3:]
        if not any(needs_grad):
            return (None, None, b_bar, *(None for _ in needs_grad))
        left, right = (z, b_bar) if ctx.transposed else (b_bar, z)
        again = _is_differentiated_again(rule.system, (x, z, cotangent, *tensors))
        chosen, pairing = _pairing(rule, x, tensors, needs_grad, again=again)
        pulled = iter(grad(lambda *moved: -pairing(left, right, *moved), *chosen))
        return (None, None, b_bar, *(next(pulled) if want else None for want in needs_grad))

    @staticmethod
    @eager
    @outside_autocast
    @tangents_batched
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> torch.Tensor:
        rule: ImplicitContext = ctx.rule
        z, x, *tensors = map(without_tangent, ctx.saved_tensors)
        rhs_tangent = tangents[2]
        moving = [t is not None and moves(s) for t, s in zip(tangents[3:], (x, *tensors), strict=True)]
        change = torch.zeros_like(z) if rhs_tangent is None else rhs_tangent
        if any(moving):
            chosen, pairing = _pairing(rule, x, tensors, moving, again=True)
            directions = tuple(t for t, move in zip(tangents[3:], moving, strict=True) if t is not None and move)

            def pull(u: torch.Tensor) -> tuple[torch.Tensor, ...]:
                left, right = (z, u) if ctx.transposed else (u, z)
                return grad(lambda *moved: pairing(left, right, *moved), *chosen)

            change = change - _push(pull, z, directions)
        return LinearSolve.apply(rule, ctx.transposed, change, x, *tensors)

    @staticmethod
    @eager
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        rule: ImplicitContext,
        transposed: bool,
        rhs: torch.Tensor,
        x: torch.Tensor,
        *tensors: torch.Tensor,
    ) -> Any:
        size = info.batch_size
        if all(dim is None for dim in in_dims[3:]):
            # Only right-hand sides are batched: the matrices stay as they are.
            repeated = replace(rule, repeats=(size, *rule.repeats))
            return LinearSolve.apply(repeated, transposed, batch_axis_first(rhs, in_dims[2], size), x, *tensors), 0
        lifted = rule.lift(size, [dim is not None for dim in in_dims[4:]])
        at = len(rule.repeats)
        moved = batch_axis_first(rhs, in_dims[2], size).movedim(0, at)
        point = batch_axis_first(x, in_dims[3], size)
        others = (batch_axis_first(t, dim) for t, dim in zip(tensors, in_dims[4:], strict=True))
        return LinearSolve.apply(lifted, transposed, moved, point, *others), at


def _checking(rule: ImplicitContext, tensors: Tensors, needs_grad: Sequence[bool]) -> ImplicitContext:
    """Return the rule for an adjoint of :class:`LinearSolve`.

    A transform's graph cannot be walked from inside. There, the tensors at which the gradient ends decide. For computed tensors a message says
    that the derivative may not exist.
    """
    if not transforms_active():
        return replace(rule, checked=tuple(needs_grad), arguments=tuple(tensors))
    final = [is_final(t) for t in tensors]
    checked = tuple(want and ends for want, ends in zip(needs_grad, final, strict=True))
    unsure = tuple(want and not ends for want, ends in zip(needs_grad, final, strict=True))
    return replace(rule, checked=checked, unsure=unsure)


def _pullbacks_later(rule: ImplicitContext, x: torch.Tensor, tensors: Tensors) -> tuple[Pullback, ...]:
    """Return :func:`~bilevel.equations.pullbacks.pullbacks_of` through a linearisation that is made when one is first called."""
    if not any(rule.checked):
        return ()

    def pullback(v: torch.Tensor) -> list[torch.Tensor | None]:
        return rule.linearize(usable(x), tensors, rule.checked).pullback(v)

    return pullbacks_of(pullback, rule.arguments or tensors, rule.checked)


def _unsure_pullbacks_later(rule: ImplicitContext, x: torch.Tensor, tensors: Tensors) -> tuple[Pullback, ...]:
    """Return the pullback to the ``unsure`` tensors alone."""
    if not any(rule.unsure):
        return ()

    def pullback(v: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        slopes = rule.linearize(usable(x), tensors, rule.unsure).pullback(v)
        return [(t, s) for t, s, want in zip(tensors, slopes, rule.unsure, strict=True) if want and s is not None]

    return (pullback,)


def _is_differentiated_again(system: System, tensors: Tensors) -> bool:
    """Return whether another derivative may follow.

    If so, raise for a sparse tensor that was made from its values by an operation that is differentiable once only.
    """
    again = is_differentiated_again(tensors)
    for tensor in system.sparse(tensors) if again else ():
        refuse_once_only(system.where, system.noun, tensor)
    return again


def _residual_in(
    system: System, x: torch.Tensor, tensors: Tensors, needs_grad: Sequence[bool], *, again: bool
) -> tuple[tuple[torch.Tensor, ...], Callable[..., torch.Tensor]]:
    """Return the tensors that need a gradient, and R as a function of them. ``again``: whether its derivative may be differentiated again."""
    chosen = tuple(t for t, want in zip(tensors, needs_grad, strict=True) if want)

    def residual(*moved: torch.Tensor) -> torch.Tensor:
        feed = iter(moved)
        others = [next(feed) if want else t for t, want in zip(tensors, needs_grad, strict=True)]
        with defined(system.where, system.noun):
            made = system.residual(x, *others)
        if again:
            refuse_once_only(system.where, system.noun, made, (x, *others))
        return made

    return chosen, residual


def _pairing(
    rule: ImplicitContext, x: torch.Tensor, tensors: Tensors, needs_grad: Sequence[bool], *, again: bool
) -> tuple[tuple[torch.Tensor, ...], Callable[..., torch.Tensor]]:
    """Return the wanted of (x, *tensors), and (left, right, *wanted) ↦ Σ ⟨left, J right⟩ over repeats and batch.

    Its derivative may be differentiated ``again``.
    """
    everything = (x, *tensors)
    chosen = tuple(t for t, want in zip(everything, needs_grad, strict=True) if want)

    def pairing(left: torch.Tensor, right: torch.Tensor, *moved: torch.Tensor) -> torch.Tensor:
        feed = iter(moved)
        point, *others = (next(feed) if want else t for t, want in zip(everything, needs_grad, strict=True))

        def residual(p: torch.Tensor) -> torch.Tensor:
            with defined(rule.system.where, rule.system.noun):
                made = rule.system.residual(p, *others)
            # J is a first derivative with respect to x, and is differentiated again here.
            refuse_once_only(rule.system.where, rule.system.noun, made, (p, *others), innermost_only=not again)
            return made

        pull = vjp(residual, point)[1]
        if not rule.repeats:
            return (pull(left)[0] * right).sum()
        lefts = left.reshape(math.prod(rule.repeats), *point.shape)  # (repeats, *batch, n)
        return (vmap(lambda u: pull(u)[0])(lefts) * right.reshape(lefts.shape)).sum()

    return chosen, pairing


def _push(
    pull: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], like: torch.Tensor, directions: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """Return the transpose of the linear map ``pull`` at ``directions``: a forward product by two reverse passes."""
    return vjp(pull, torch.zeros_like(like))[1](directions)[0]
