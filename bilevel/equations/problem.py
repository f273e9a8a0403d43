"""A system with its tensors, as solvers see it: in shapes (batch, n), without a graph, linearised once for many products."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch.func import vmap

from bilevel._torch.grad_mode import no_graph
from bilevel._torch.graph_features import nodes, record_graph_features
from bilevel._torch.reverse import vjp
from bilevel._torch.thin_products import ThinProducts
from bilevel.equations.domain import leaves_domain, row_by_row
from bilevel.equations.linearization import PRODUCT, Linearization, LinearizationSlot, NoPullback, ReplayedLinearization
from bilevel.equations.system import ArgminSystem, System
from bilevel.errors import ArgumentError
from bilevel.operators import DenseOperator, FunctionOperator, HessianOperator, JacobianOperator, LinearOperator
from bilevel.pytree import moves
from bilevel.replay import Program, ReplayCache

__all__ = ["Problem"]

# 1 − ∂T is rounding below this multiple of eps.
_LOST = 8.0


@dataclass(frozen=True, eq=False)
class Problem:
    """A batch of flat problems, as solvers see them: every tensor is (batch, n) or (batch,), and no graph is kept.

    Parameters
    ----------
    system
        The description of the equations.
    tensors
        θ, tensors of any shape and dtype, detached.
    linearization_slot
        Receives the linearisation at the solution, if derivatives will follow.
    replays
        The recorded evaluations of the function, if it is branch-free and depends on its arguments alone.
    objective
        Of a structured system: the problem of its objective alone, with replays of its own.

    Attributes
    ----------
    batch_shape, batch, size
        The batch's axes, outermost first; the number of problems; and n, the number of unknowns of each.
    minimizes
        Whether there is an objective, so that :meth:`value` can be called.
    has_value
        Whether R is the gradient of a function. The function need not have a minimum.
    is_fixed_point
        Whether R = x − T(x), so that T(x) = x − R.
    is_lone
        Whether this is a single problem on the CPU, whose numbers cost less in Python than as tensors.

    Examples
    --------
    >>> import torch, bilevel
    >>> class Gradient(bilevel.InnerSolver):
    ...     def solve(self, problem, init, goal):
    ...         print(problem.batch, problem.size, problem.value(init), problem.residual(init))
    ...         return bilevel.Newton().solve(problem, init, goal)
    >>> layer = bilevel.argmin(lambda x, a: ((x - a) ** 2).sum(), solver=Gradient())
    >>> layer(torch.zeros(2), torch.tensor([1.0, 3.0]))
    1 2 tensor([10.]) tensor([[-2., -6.]])
    tensor([1.0000, 3.0000])
    """

    system: System
    tensors: list[torch.Tensor] = field(repr=False)
    linearization_slot: LinearizationSlot | None = field(default=None, repr=False)
    replays: ReplayCache | None = field(default=None, repr=False)
    objective: Problem | None = field(default=None, repr=False)
    batch_shape: tuple[int, ...] = field(init=False, repr=False)
    batch: int = field(init=False, repr=False)
    size: int = field(init=False, repr=False)
    minimizes: bool = field(init=False, repr=False)
    has_value: bool = field(init=False, repr=False)
    is_fixed_point: bool = field(init=False, repr=False)
    is_lone: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        system, raveler = self.system, self.system.raveler
        shape = tuple([level.size for level in reversed(system.levels)])
        batch = math.prod(shape)
        vars(self).update(
            batch_shape=shape, batch=batch, size=raveler.size, minimizes=system.minimizes, has_value=system.has_value,
            is_fixed_point=system.is_fixed_point, is_lone=batch == 1 and raveler.device.type == "cpu",
        )  # fmt: skip

    @staticmethod
    def of(system: System, tensors: Sequence[torch.Tensor], slot: LinearizationSlot | None = None) -> Problem:
        """Bind ``tensors``, detached."""
        # Tensors born under inference_mode cannot take part in autograd; a copy can.
        return Problem(system, [t.clone() if t.is_inference() else t.detach() for t in tensors], slot)

    def replayed_from(self, replays: ReplayCache | None, objective: Problem | None = None) -> Problem:
        """Return the problem with ``replays``, which the linearisation slot receives too, and with this ``objective``, if one is given."""
        objective = self.objective if objective is None else objective
        if replays is self.replays and objective is self.objective:
            return self
        if self.linearization_slot is not None:
            self.linearization_slot.replays = replays
        return replace(self, replays=replays, objective=objective)

    @property
    def where(self) -> str:
        """The layer's name, for messages."""
        return self.system.where

    def value(self, x: torch.Tensor) -> torch.Tensor:
        """Return the objectives (batch,) at ``x`` (batch, n)."""
        try:
            return self.evaluate("output", self._output, x)[0].reshape(self.batch)
        except (RuntimeError, ValueError) as error:
            if not leaves_domain(error):
                raise
            return row_by_row(self, x, lambda one, row: (one.value(row),), [()])[0]

    def value_and_residual(self, x: torch.Tensor, *, last: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the objectives (batch,) and their gradients (batch, n).

        ``last``: ``x`` is probably the final iterate. If a derivative follows, the graph is kept for it.
        """
        if not self.has_value:
            raise ArgumentError(
                f"{self.where}: expected an argmin for a solver that minimises, got a {self.system.noun} equation; take "
                "Newton(), Anderson(), FixedPointIteration() or ScipyRoot()"
            )
        try:
            if last and self.linearization_slot is not None:
                self.linearization_slot.linearization = linear = self.linearize(x, self.linearization_slot.needs_grad)
                assert linear.value is not None
                return linear.value, linear.residual.detach()
            values, gradient = self.evaluate("gradient", self._gradient, x)
        except (RuntimeError, ValueError) as error:
            if not leaves_domain(error):
                raise
            values, gradient = row_by_row(self, x, lambda one, row: one.value_and_residual(row), [(), x.shape[1:]])
        return values, gradient

    def residual(self, x: torch.Tensor) -> torch.Tensor:
        """Return R (batch, n): ∇G, the residual, or x − T(x)."""
        if self.has_value:
            return self.value_and_residual(x)[1]
        try:
            return self.evaluate("output", self._output, x)[0].reshape(x.shape)
        except (RuntimeError, ValueError) as error:
            if not leaves_domain(error):
                raise
            return row_by_row(self, x, lambda one, row: (one.residual(row),), [x.shape[1:]])[0]

    def evaluate(
        self, name: Hashable, evaluation: Callable[..., Sequence[torch.Tensor]], x: torch.Tensor
    ) -> Sequence[torch.Tensor]:
        """Return ``evaluation`` at ``x`` (batch, k) and the tensors, or its replay. ``name`` identifies the evaluation."""
        known = self._trusted(name, evaluation, x)
        if known is None:
            return evaluation(x, *self.tensors)
        program, captured = known
        with no_graph():
            return program.run(x.contiguous(), *self.tensors, *captured)

    def _trusted(
        self,
        name: Hashable,
        evaluation: Callable[..., Sequence[torch.Tensor]],
        x: torch.Tensor,
        late: Callable[[], Sequence[torch.Tensor]] = tuple,
    ) -> tuple[Program, list[torch.Tensor]] | None:
        if self.replays is None:
            return None
        return self.replays.program(name, evaluation, lambda: (x.detach().contiguous(), *self.tensors), late)

    def _output(self, x: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor]:
        with no_graph():
            return (self.system.outputs(self.shaped(x), *tensors),)

    def _gradient(self, x: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert isinstance(self.system, ArgminSystem)
        with torch.enable_grad():
            point = self.shaped(x).detach().requires_grad_(True)
            values, gradient = self.system.plain_values(point, tensors, graph=False)
        return values.detach().reshape(self.batch), gradient.reshape(x.shape)

    def mapping(self, x: torch.Tensor) -> torch.Tensor:
        """Return T(x) (batch, n) of a fixed point."""
        return x - self.residual(x)

    def linearize(self, x: torch.Tensor, needs_grad: Sequence[bool] | None = None) -> Linearization:
        """Return R at ``x`` (batch, n) with its graph, the operator ∂_x R and the pullback to ``needs_grad`` tensors.

        With replays there is no graph: R is detached, and products and the pullback are replayed too. For a problem whose
        function has no value at its x, all results are NaN.
        """
        try:
            return self._linearize(x, needs_grad)
        except (RuntimeError, ValueError) as error:
            if not leaves_domain(error):
                raise
            return self._linearize_each(x, error)

    def _linearize_each(self, x: torch.Tensor, error: Exception) -> Linearization:
        """Return the linearisation at ``x`` (batch, n) problem by problem, if some leave their domain, as ``error`` says. It has no pullback."""
        made: list[Linearization | None] = []

        def linearized(one: Problem, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            made.append(None)
            made[-1] = linear = one._linearize(row)
            value = torch.zeros_like(row[:, 0]) if linear.value is None else linear.value
            return linear.residual.detach(), value

        residual, value = row_by_row(self, x, linearized, [x.shape[1:], ()])
        operators = [None if one is None else one.operator for one in made] or [None]

        def rows(v: torch.Tensor, *, transposed: bool = False) -> torch.Tensor:
            products = []
            for number, operator in enumerate(operators):
                row = v[number : number + 1]
                if operator is None:
                    products.append(torch.full_like(row, float("nan")))
                else:
                    products.append(operator.rmatvec(row) if transposed else operator.matvec(row))
            return torch.cat(products)

        whole = FunctionOperator(
            rows, x, partial(rows, transposed=True), symmetric=self.system.symmetric, expect_definite=self.minimizes
        )
        none = NoPullback(self.where, self.system.noun, error)
        return Linearization(residual, whole, (), value if self.has_value else None, x.detach(), none)

    def _linearize(self, x: torch.Tensor, needs_grad: Sequence[bool] | None = None) -> Linearization:
        chosen = tuple(needs_grad or [False] * len(self.tensors))
        known = self._trusted(("linear", chosen), partial(self._linear, chosen), x, partial(_any_two, x))
        if known is not None:
            return self._replayed(*known, chosen, x)
        system = self.system
        with torch.enable_grad():
            point = x.detach().requires_grad_(True)
            leaves = tuple(
                tensor.detach().requires_grad_(True) if want else tensor
                for tensor, want in zip(self.tensors, chosen, strict=True)
            )
            value: torch.Tensor | None = None
            if isinstance(system, ArgminSystem):
                values, residual = system.plain_values(self.shaped(point), leaves, graph=True)
                value = values.detach().reshape(self.batch)
            else:
                values = residual = system.plain_residual(self.shaped(point), leaves, graph=True)
            if any(chosen):
                # Later derivatives need to know which operations θ passes through.
                record_graph_features(system.function, nodes(values))
            residual = residual.reshape(x.shape)
        # Detach x first: a saved output would make a reference cycle through its own node, which is never collected.
        at = x.detach()
        materialize = self._materialize(at)
        operator: LinearOperator
        if system.symmetric:
            operator = HessianOperator(residual, point, expect_definite=system.minimizes, materialize=materialize)
        else:
            operator = JacobianOperator(residual, point, materialize=materialize)
        return Linearization(residual, operator, leaves, value, at)

    def _materialize(self, at: torch.Tensor) -> Callable[[], torch.Tensor]:
        # Without the slot: its linearisation would refer to itself through the operator, and keep the graph until a collection.
        plain = Problem(self.system, self.tensors, None, self.replays)
        return lambda: plain._dense(at)[1]

    def _replayed(
        self, program: Program, captured: list[torch.Tensor], needs_grad: tuple[bool, ...], x: torch.Tensor
    ) -> Linearization:
        at = x.detach()
        materialize = self._materialize(at)
        with no_graph():
            begun = program.begin(at.contiguous(), *self.tensors, *captured)
        value, residual = begun.outputs[:PRODUCT]
        assert value is not None
        assert residual is not None
        symmetric = self.system.symmetric
        replayed = ReplayedLinearization(begun, needs_grad, symmetric)
        operator = FunctionOperator(
            replayed.forward, at, replayed.transposed, symmetric=symmetric, expect_definite=self.minimizes, materialize=materialize
        )  # fmt: skip
        return Linearization(residual, operator, (), value if self.has_value else None, at, replayed)

    def _linear(self, needs_grad: tuple[bool, ...], x: torch.Tensor, *others: torch.Tensor) -> list[torch.Tensor]:
        """Return the results of a linearisation at ``x``; ``others`` are the tensors and two vectors (batch, n)."""
        *tensors, q, v = others
        linear = replace(self, tensors=tensors, linearization_slot=None, replays=None).linearize(x, needs_grad)
        product, pulled = linear.pull(q)
        made = [linear.residual if linear.value is None else linear.value, linear.residual, product]
        made += [gradient for gradient in pulled if gradient is not None]
        made += [] if self.system.symmetric else [linear.operator.matvec(v)]
        return [tensor.detach() for tensor in made]

    def linearize_dense(self, x: torch.Tensor) -> Linearization:
        """Return R and the objectives at ``x`` (batch, n) without a graph, and ∂_x R as matrices, from one pass.

        The directions are vmapped inside, and the problems outside. The other order, which a graph of the whole batch needs,
        would copy every matrix of the objective n times.
        """
        try:
            residual, matrix, value = self._dense(x.detach())
        except (RuntimeError, ValueError) as error:
            # An operation in the function cannot be transformed, for example because it has no batching rule.
            plain = self._linearize_each(x, error) if leaves_domain(error) else self.linearize(x)
            plain.operator.materialize = None
            residual, matrix, value = plain.residual.detach(), plain.operator.dense(), plain.value
        operator = DenseOperator(matrix, symmetric=self.system.symmetric, expect_definite=self.minimizes)
        return Linearization(residual, operator, (), value)

    def _dense(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        residual, matrix, values = self.evaluate("dense", self._rows, x)
        matrix = matrix.reshape(self.batch, self.size, self.size)
        if self.system.symmetric:
            matrix = (matrix + matrix.mT).mul_(0.5)
        if self.is_fixed_point:
            # If an entry of ∂T is one up to rounding, 1 − ∂T is zero: nothing is known of what is left.
            diagonal = matrix.diagonal(dim1=-2, dim2=-1)
            lost = diagonal.abs() <= _LOST * torch.finfo(x.dtype).eps
            if bool(lost.any()):
                matrix = matrix - torch.diag_embed(torch.where(lost, diagonal, 0.0))
        return residual.reshape(x.shape), matrix, values.reshape(self.batch) if self.has_value else None

    def _rows(self, x: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
        with no_graph():
            system = self.system.for_second_derivatives()
            made = system.lifted(system.rows)(self.shaped(x), *tensors)
        return [tensor.detach() for tensor in made]

    def some_rows(self, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Return the rows (k, n) of ∂_x R at ``x`` (1, n) for the ``places`` (k,), of a single problem without levels."""
        packed = torch.cat([x[0], places.to(x.dtype)])
        return self.evaluate(("rows", len(places)), self._some_rows, packed.unsqueeze(0))[0]

    def _some_rows(self, packed: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Return the rows at the point ``packed[0, :n]`` for the places that follow it, whole numbers packed as floats."""
        with no_graph():
            point, places = packed[0, : self.size], packed[0, self.size :].long()
            units = (places.unsqueeze(-1) == torch.arange(self.size, device=places.device)).to(packed.dtype)
            system = self.system.for_second_derivatives()
            made: Any = vjp(lambda x: system.residual_and_value(x, *tensors)[0], point)
            with ThinProducts(units, places):
                (rows,) = vmap(made[1])(units)
        return [rows.detach()]

    def to(self, dtype: torch.dtype) -> Problem:
        """Return the problem with its floating-point tensors in ``dtype``."""
        wide = {True: dtype.to_complex(), False: dtype}  # complex are sparse tensors alone
        tensors = [t.to(wide[t.is_complex()]) if moves(t) else t for t in self.tensors]
        return Problem(self.system.in_dtype(dtype), tensors)

    def single(self, number: int) -> Problem:
        """Return the problem at ``number`` of the batch as a batch of one, with its own slice of every tensor."""
        return Problem(self.system.at_levels(()), self.slices(number))

    def slices(self, number: int) -> list[torch.Tensor]:
        """Return the tensors of the problem at ``number`` of the batch."""
        position = []  # innermost level first, as in system.levels
        for level in self.system.levels:
            number, at = divmod(number, level.size)
            position.append(at)
        tensors = list(self.tensors)
        # Outermost axes come first in a tensor, so they are taken off first.
        for level, at in zip(reversed(self.system.levels), reversed(position), strict=True):
            tensors = [t[at] if flag else t for t, flag in zip(tensors, level.batched, strict=True)]
        return tensors

    def shaped(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x`` (batch, n) with an axis for each level of the batch in place of the first."""
        return x.reshape(*self.batch_shape, self.size)


def _any_two(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two vectors like ``x`` of irregular numbers."""
    places = torch.arange(1, 1 + x.numel(), dtype=x.dtype, device=x.device).reshape(x.shape)
    return torch.frac(places * 0.7548776662) - 0.5, torch.frac(places * 0.5698402910) - 0.5
