"""The derivative of a quadratic program: the implicit function theorem for the KKT conditions on the active set.

With z = (x, ν, λ, μ_l, μ_u), R(z, θ) = 0 the conditions and K = ∂_z R, which is symmetric (:mod:`bilevel.quadratic_programs._kkt`)::

    reverse   θ̄ = −(∂_θ R)ᵀ d    where  K d = z̄
    forward   ż = −K⁻¹ (∂_θ R · θ̇)

∂_θ R is written out. :class:`ProgramSolve` is z(θ), :class:`KKTSolve` is d = K⁻¹ r; the rules of both are torch operations and
:class:`KKTSolve` again, so that all orders and both modes follow, as in :mod:`bilevel.implicit`. The factors of K are
computed once a problem, and kept in the :class:`Rule` of the call.

Which inequalities are active is a constant. It comes with the point, as numbers behind it: 1 active, 2 weakly active, 3 both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from bilevel._torch.graph_features import nodes
from bilevel._torch.once_differentiable import once_only
from bilevel._torch.transforms import (
    batch_axis_first,
    eager,
    grads_batched,
    is_differentiated_again,
    isolated,
    layers,
    outside_autocast,
    signed,
    tangents_batched,
    without_tangent,
)
from bilevel.errors import ArgumentError
from bilevel.quadratic_programs._kkt import Sizes
from bilevel.quadratic_programs._matrices import Dense, Pattern

__all__ = ["KKTSolve", "ProgramSolve", "Rule", "Structure"]

Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True, eq=False)
class Structure:
    """The meaning of the tensors of a program.

    Parameters
    ----------
    sizes
        n, p, m.
    Q, A, G
        What the values of the matrices stand for.
    smoothing
        τ, or 0.
    """

    sizes: Sizes
    Q: Pattern
    A: Pattern
    G: Pattern
    smoothing: float

    @property
    def length(self) -> int:
        """The length of a point, without what stands behind it."""
        return sum(self.sizes.parts)

    @property
    def dense(self) -> bool:
        """Whether all matrices are given by all of their entries."""
        return all(isinstance(pattern, Dense) for pattern in (self.Q, self.A, self.G))

    def active(self, marks: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return 1 for active inequalities and 0 for others (..., m + 2n), in the dtype of ``like``."""
        return (marks % 2).to(like.dtype)

    def damping(self, point: torch.Tensor, marks: torch.Tensor) -> torch.Tensor | None:
        """Return D = τ/λ² (..., m + 2n) on the central path, or None."""
        if not self.smoothing:
            return None
        weights = point[..., self.sizes.n + self.sizes.p : self.length]
        return self.smoothing / torch.where(marks % 2 > 0, weights, 1.0) ** 2


class Calls(Protocol):
    """The two solves of a call, with their reports and the policy."""

    def solve(self, structure: Structure, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        """Return points (*batch, length) and marks (*batch, m + 2n)."""

    def solve_kkt(
        self,
        structure: Structure,
        right: torch.Tensor,
        matrices: Tensors,
        damping: torch.Tensor | None,
        marks: torch.Tensor,
        asked: Asked,
    ) -> torch.Tensor:
        """Return K⁻¹ r (*repeats, *batch, length)."""


@dataclass(frozen=True)
class Asked:
    """The derivative for which K d = r is solved: in reverse mode or not, with respect to the constraints or not."""

    reverse: bool
    constraints: bool


@dataclass(frozen=True, eq=False)
class Rule:
    """The parts of a call that are not tensors."""

    structure: Structure
    calls: Calls
    sparse: tuple[torch.Tensor, ...] = ()  # the sparse tensors that the values were taken from
    asked: Asked = field(default_factory=lambda: Asked(reverse=False, constraints=False))


def _over_repeats(made: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return ``made`` summed over the axes that ``values`` does not have: right-hand sides that share matrices."""
    more = made.ndim - values.ndim
    return made.sum(dim=tuple(range(more))) if more > 0 else made


def _refuse_once_only(sparse: Tensors) -> None:
    """Raise if a sparse tensor was made of values in a way that torch differentiates once only, and silently wrong a second time."""
    for tensor in sparse:
        for layer in layers(tensor):
            for node in nodes(layer, ()):
                name = once_only(node)
                if name is not None:
                    raise ArgumentError(
                        f"`quadratic_program`: expected sparse tensors that can be differentiated twice, and {name} made one, whose second "
                        "derivative torch takes for zero; pass dense matrices for second derivatives, or detach the sparse one"
                    )


@signed
class ProgramSolve(torch.autograd.Function):
    """The point (*batch, length), and behind it the marks of the inequalities."""

    @staticmethod
    @eager
    @isolated
    def forward(rule: Rule, *tensors: torch.Tensor) -> torch.Tensor:
        return torch.cat(rule.calls.solve(rule.structure, tensors), -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        rule, Q, _, A, _, G, *_ = inputs
        ctx.rule = rule
        ctx.save_for_backward(output, Q, A, G)
        ctx.save_for_forward(output, Q, A, G)

    @staticmethod
    @eager
    @outside_autocast
    @grads_batched
    def backward(ctx: Any, cotangent: torch.Tensor) -> tuple[Any, ...]:
        wanted = ctx.needs_input_grad[1:]
        if not any(wanted):
            return (None,) * 9
        output, *matrices = ctx.saved_tensors
        structure: Structure = ctx.rule.structure
        if ctx.rule.sparse and is_differentiated_again((output, cotangent, *matrices)):
            _refuse_once_only(ctx.rule.sparse)
        rule = replace(ctx.rule, asked=Asked(reverse=True, constraints=any(wanted[2:])))
        marks = output[..., structure.length :].detach()
        damping = structure.damping(output, marks)
        d = KKTSolve.apply(rule, cotangent[..., : structure.length], *matrices, damping, marks)
        x, nu, lam, _, _ = structure.sizes.split(output[..., : structure.length])
        dx, dnu, *dweights = structure.sizes.split(d)
        a_general, a_low, a_up = structure.active(marks, d).split(structure.sizes.rows, -1)
        dlam = a_general * dweights[0]
        Q, A, G = structure.Q, structure.A, structure.G
        return (
            None,
            Q.outer(-dx, x) if wanted[0] else None,
            -dx if wanted[1] else None,
            A.outer(-nu, dx) - A.outer(dnu, x) if wanted[2] else None,
            dnu if wanted[3] else None,
            G.outer(-lam, dx) - G.outer(dlam, x) if wanted[4] else None,
            dlam if wanted[5] else None,
            -a_low * dweights[1] if wanted[6] else None,
            a_up * dweights[2] if wanted[7] else None,
        )

    @staticmethod
    @eager
    @outside_autocast
    @tangents_batched
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> torch.Tensor:
        output, *matrices = map(without_tangent, ctx.saved_tensors)
        structure: Structure = ctx.rule.structure
        marks = output[..., structure.length :].detach()
        x, nu, lam, _, _ = structure.sizes.split(output[..., : structure.length])
        a_general, a_low, a_up = structure.active(marks, output).split(structure.sizes.rows, -1)
        Q, q, A, b, G, h, low, up = tangents[1:]
        top, equations, rows = torch.zeros_like(x), torch.zeros_like(nu), torch.zeros_like(lam)
        if Q is not None:
            top = top + structure.Q.times(Q, x)
        if q is not None:
            top = top + q
        if A is not None:
            top, equations = top + structure.A.transposed(A, nu), equations + structure.A.times(A, x)
        if b is not None:
            equations = equations - b
        if G is not None:
            top, rows = top + structure.G.transposed(G, lam), rows + structure.G.times(G, x)
        if h is not None:
            rows = rows - torch.where(a_general > 0, h, 0.0)
        below = torch.zeros_like(x) if low is None else a_low * low
        above = torch.zeros_like(x) if up is None else -a_up * up
        moved = torch.cat([top, equations, a_general * rows, below, above], -1)
        pushed = KKTSolve.apply(ctx.rule, -moved, *matrices, structure.damping(output, marks), marks)
        return torch.cat([pushed, torch.zeros_like(marks)], -1)

    @staticmethod
    @eager
    def vmap(info: Any, in_dims: tuple[Any, ...], rule: Rule, *tensors: torch.Tensor) -> Any:
        lifted = (batch_axis_first(t, dim, info.batch_size) for t, dim in zip(tensors, in_dims[1:], strict=True))
        return ProgramSolve.apply(rule, *lifted), 0


@signed
class KKTSolve(torch.autograd.Function):
    """d = K⁻¹ r, (*repeats, *batch, length); the right-hand sides of one repeat share the matrices."""

    @staticmethod
    @eager
    @isolated
    def forward(
        rule: Rule,
        right: torch.Tensor,
        Q: torch.Tensor,
        A: torch.Tensor,
        G: torch.Tensor,
        damping: torch.Tensor | None,
        marks: torch.Tensor,
    ) -> torch.Tensor:
        return rule.calls.solve_kkt(rule.structure, right, (Q, A, G), damping, marks, rule.asked)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.rule, _, *rest = inputs
        ctx.save_for_backward(output, *rest)
        ctx.save_for_forward(output, *rest)

    @staticmethod
    @eager
    @outside_autocast
    @grads_batched
    def backward(ctx: Any, cotangent: torch.Tensor) -> tuple[Any, ...]:
        d, Q, A, G, damping, marks = ctx.saved_tensors
        structure: Structure = ctx.rule.structure
        w = KKTSolve.apply(ctx.rule, cotangent, Q, A, G, damping, marks)
        wanted = ctx.needs_input_grad[2:]
        active = structure.active(marks, d)
        dx, dnu, *dweights = structure.sizes.split(d)
        wx, wnu, *wweights = structure.sizes.split(w)
        general = active[..., : structure.sizes.m]
        dlam, wlam = general * dweights[0], general * wweights[0]
        grads: list[torch.Tensor | None] = [None] * 5
        if wanted[0]:
            grads[0] = _over_repeats(-structure.Q.outer(wx, dx), Q)
        if wanted[1]:
            grads[1] = _over_repeats(-(structure.A.outer(dnu, wx) + structure.A.outer(wnu, dx)), A)
        if wanted[2]:
            grads[2] = _over_repeats(-(structure.G.outer(dlam, wx) + structure.G.outer(wlam, dx)), G)
        if damping is not None and wanted[3]:
            head = structure.sizes.n + structure.sizes.p
            grads[3] = _over_repeats(active * w[..., head:] * d[..., head:], damping)
        return (None, w, *grads)

    @staticmethod
    @eager
    @outside_autocast
    @tangents_batched
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> torch.Tensor:
        d, Q, A, G, marks = (without_tangent(ctx.saved_tensors[i]) for i in (0, 1, 2, 3, 5))
        damping = ctx.saved_tensors[4]
        damping = damping if damping is None else without_tangent(damping)
        structure: Structure = ctx.rule.structure
        right, Q_dot, A_dot, G_dot, damping_dot, _ = tangents[1:]
        dx, dnu, *dweights = structure.sizes.split(d)
        active = structure.active(marks, d)
        general = active[..., : structure.sizes.m]
        top, equations, rows = torch.zeros_like(dx), torch.zeros_like(dnu), torch.zeros_like(dweights[0])
        if Q_dot is not None:
            top = top + structure.Q.times(Q_dot, dx)
        if A_dot is not None:
            top, equations = top + structure.A.transposed(A_dot, dnu), structure.A.times(A_dot, dx)
        if G_dot is not None:
            top = top + structure.G.transposed(G_dot, general * dweights[0])
            rows = general * structure.G.times(G_dot, dx)
        weights = torch.cat([rows, torch.zeros_like(dweights[1]), torch.zeros_like(dweights[2])], -1)
        if damping_dot is not None:
            weights = weights - active * damping_dot * torch.cat(dweights, -1)
        moved = -torch.cat([top, equations, weights], -1)
        moved = moved if right is None else moved + right
        return KKTSolve.apply(ctx.rule, moved, Q, A, G, damping, marks)

    @staticmethod
    @eager
    def vmap(info: Any, in_dims: tuple[Any, ...], rule: Rule, right: torch.Tensor, *rest: torch.Tensor | None) -> Any:
        size, dims = info.batch_size, in_dims[2:]
        first = batch_axis_first(right, in_dims[1], size)
        if all(dim is None for dim in dims):
            return KKTSolve.apply(rule, first, *rest), 0
        # The axes of right-hand sides that share matrices stay in front.
        matrix = rest[1]
        assert matrix is not None
        own = matrix.ndim - (dims[1] is not None) - rule.structure.A.axes
        at = first.ndim - 2 - own
        others = [None if t is None else batch_axis_first(t, dim, size) for t, dim in zip(rest, dims, strict=True)]
        return KKTSolve.apply(rule, first.movedim(0, at), *others), at
