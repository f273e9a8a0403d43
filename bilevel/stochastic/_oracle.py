"""Evaluate the two objectives on minibatches: losses, gradients and second-order products, each with the fewest passes.

One place handles what is the same for all methods: parts of a minibatch, autocast, scaled losses, averages over processes,
modules at other parameters, and the count of passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed
from torch.utils._pytree import tree_map_only

from bilevel._torch.double_backward import Repeatable
from bilevel._torch.graph_features import nodes
from bilevel._torch.reverse import Output, gradient_edges, reverse_pass
from bilevel._torch.transforms import autocast_to, autocasting
from bilevel.equations.function_errors import explained
from bilevel.errors import ArgumentError, CapturedTensorError, ShapeError
from bilevel.pytree import usable
from bilevel.stochastic._batches import batch_parts
from bilevel.stochastic._diagnosis import check_dense, check_second_derivatives
from bilevel.stochastic._lists import Tensors, norm
from bilevel.stochastic._options import StepOptions
from bilevel.stochastic._variables import Point, Variables, call_at

__all__ = ["Gradients", "Linearization", "Oracle", "Products"]

Objective = Callable[[Any, Any, Any], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Gradients:
    """A loss (), and its gradients by the inner and outer variables."""

    loss: torch.Tensor
    inner: Tensors
    outer: Tensors


@dataclass(frozen=True, eq=False)
class Products:
    """G, ∇_φ G, H q and Bᵀ q at one point and one minibatch."""

    loss: torch.Tensor
    gradient: Tensors
    hessian: Tensors
    cross: Tensors


class Oracle:
    """The derivatives of G and F that methods are made of.

    Parameters
    ----------
    inner_objective, outer_objective
        (inner, outer, data) ↦ G or F, of shape ().
    inner, outer
        The variables.
    options
        Of the method.
    where
        The method's name, for messages.
    """

    def __init__(
        self,
        inner_objective: Objective,
        outer_objective: Objective,
        inner: Variables,
        outer: Variables,
        options: StepOptions,
        where: str,
    ) -> None:
        self.inner, self.outer, self.options, self.where = inner, outer, options, where
        self._objectives = {"inner_objective": inner_objective, "outer_objective": outer_objective}
        self._unreached = set(range(len(outer.tensors)))
        self._inspected: set[str] = set()
        self._rewritten: dict[str, bool] = {}
        self._differentiated = False
        self._caller_dtype: torch.dtype | None = None
        self.passes = {"forward": 0, "reverse": 0}
        self.synchronize()

    def objective(self, name: str) -> Objective:
        """Return an objective as it was given."""
        return self._objectives[name]

    # Derivatives.

    def inner_gradient(self, batch: Any, at: Point | None = None) -> tuple[torch.Tensor, Tensors]:
        """Return G and ∇_φ G: one forward and one reverse pass."""
        found = self._gradients("inner_objective", batch, at, (True, False))
        return found.loss, found.inner

    def inner_gradients(self, batch: Any, at: Point | None = None) -> Gradients:
        """Return G, ∇_φ G and ∇_θ G: one forward and one reverse pass."""
        return self._gradients("inner_objective", batch, at, (True, True))

    def outer_gradients(self, batch: Any, at: Point | None = None) -> Gradients:
        """Return F, ∇_φ F and ∇_θ F: one forward and one reverse pass."""
        return self._gradients("outer_objective", batch, at, (True, True))

    def products(self, batch: Any, q: Sequence[torch.Tensor], at: Point | None = None) -> Products:
        """Return G, ∇_φ G, H q and Bᵀ q: one forward and two reverse passes.

        The second reverse pass is of ⟨∇_φ G, q⟩ by φ and θ together. The graph of one part of a minibatch is freed before the next.
        """
        z, x = self._leaves(at)

        def parts() -> Iterator[tuple[float, list[torch.Tensor]]]:
            for weight, data in batch_parts(batch):
                loss, gradient, scale = self._linearize(data, at, z)
                found = self._reverse(gradient, [*z, *x], q, retain_graph=False)
                yield weight, [loss, *_unscaled([*_detached(gradient), *found], scale)]

        loss, *rest = self._mean(parts())
        n = len(z)
        return Products(loss, rest[:n], rest[n : 2 * n], rest[2 * n :])

    def linearize(self, batch: Any, at: Point | None = None) -> Linearization:
        """Return ∇_φ G with its graph: one forward and one reverse pass, and one more for each product asked of it."""
        return Linearization(self, batch, at)

    # What they are made of.

    def value(self, name: str, data: Any, at: Point | None) -> torch.Tensor:
        """Return an objective's loss () with its graph."""
        return self.checked(name, self.called(name, self._objectives[name], data, at), at)

    def twice(self, name: str, function: Callable[[Any, Any, Any], Any], data: Any, at: Point | None) -> Any:
        """As :meth:`called`, with a graph that can be differentiated twice.

        Operations whose second derivatives torch does not have, or has wrong, are replaced. What the first evaluation needs decides
        whether later ones are watched for them.
        """
        if not self._rewritten.get(name, True):
            return self.called(name, function, data, at)
        with Repeatable() as mode:
            found = self.called(name, function, data, at)
        self._rewritten[name] = mode.used
        return found

    def called(self, name: str, function: Callable[[Any, Any, Any], Any], data: Any, at: Point | None) -> Any:
        """Return ``function``, a part of the objective ``name``, of the variables and ``data``, with its graph: one forward pass."""
        self.passes["forward"] += 1

        def given() -> dict[str, Any]:
            inner, outer = (dict(zip(one.names, one.tensors, strict=True)) for one in (self.inner, self.outer))
            return {"data": data, "inner": inner, "outer": outer}

        with explained(self.where, name, given), torch.enable_grad(), self._autocast():
            return call_at(function, self.inner, self.outer, tree_map_only(torch.Tensor, usable, data), at)

    def checked(self, name: str, loss: Any, at: Point | None) -> torch.Tensor:
        """Return the ``loss`` that an objective returned, or raise."""
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            got = f"a tensor {tuple(loss.shape)} of {loss.dtype}" if isinstance(loss, torch.Tensor) else repr(loss)
            raise ShapeError(
                f"{self.where}: expected {name} to return a floating-point tensor of shape (), got {got}; return the mean of the losses"
            )
        if not loss.requires_grad:
            raise ArgumentError(
                f"{self.where}: expected {name} to depend on the variables through differentiable operations, and it does not; "
                "compute it from `inner` and `outer` as they are passed, without .detach() or .item()"
            )
        loss = loss.reshape(())
        if at is None and name not in self._inspected:
            self._inspect(name, loss)
        return loss

    def _gradients(self, name: str, batch: Any, at: Point | None, by: tuple[bool, bool]) -> Gradients:
        z, x = self._leaves(at)
        leaves = [*(z if by[0] else []), *(x if by[1] else [])]

        def parts() -> Iterator[tuple[float, list[torch.Tensor]]]:
            for weight, data in batch_parts(batch):
                loss = self.value(name, data, at)
                scaled, scale = self._scaled(loss)
                found = self._reverse([scaled], leaves, [torch.ones_like(scaled)], retain_graph=False)
                yield weight, [loss.detach(), *_unscaled(found, scale)]

        loss, *rest = self._mean(parts())
        count = len(z) if by[0] else 0
        return Gradients(loss, rest[:count], rest[count:])

    def _linearize(self, data: Any, at: Point | None, z: Tensors) -> tuple[torch.Tensor, Tensors, torch.Tensor | None]:
        """Return G, and ∇_φ G times the scale with its graph, for one part of a minibatch."""
        name = "inner_objective"
        return self.gradient_of(self.checked(name, self.twice(name, self._objectives[name], data, at), at), z)

    def gradient_of(self, loss: torch.Tensor, z: Tensors) -> tuple[torch.Tensor, Tensors, torch.Tensor | None]:
        """Return a loss, its gradient by ``z`` times the scale with its graph, and the scale: one reverse pass."""
        scaled, scale = self._scaled(loss)
        first, self._differentiated = not self._differentiated, True
        if first:
            check_second_derivatives(self.where, scaled)
        gradient = self._reverse([scaled], z, [torch.ones_like(scaled)], create_graph=True)
        if first:
            check_second_derivatives(self.where, scaled, gradient)
        return loss.detach(), list(gradient), scale

    def _reverse(
        self,
        outputs: Sequence[Output],
        leaves: Sequence[torch.Tensor],
        cotangents: Sequence[torch.Tensor],
        *,
        retain_graph: bool = True,
        create_graph: bool = False,
    ) -> tuple[torch.Tensor, ...]:
        self.passes["reverse"] += 1
        found = reverse_pass(outputs, leaves, cotangents, retain_graph=retain_graph, create_graph=create_graph)
        check_dense(self.where, found)
        return found

    def _leaves(self, at: Point | None) -> tuple[Tensors, Tensors]:
        return (self.inner.tensors, self.outer.tensors) if at is None else (at.inner, at.outer)

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = self.options.autocast or self._caller_dtype
        if dtype is None:
            return nullcontext()
        # Weights cast for one evaluation must not be reused by the next: theirs would be another graph.
        return torch.autocast(self.inner.tensors[0].device.type, dtype, cache_enabled=False)

    @contextmanager
    def caller_autocast(self) -> Iterator[None]:
        """Take the caller's ``torch.autocast`` for the objectives alone.

        It would keep the weights that it has cast until it ends, so that a step would go on with old ones. And solves and norms would be
        made in 16 bits.
        """
        device = self.inner.tensors[0].device
        self._caller_dtype = autocast_to(device)
        try:
            with autocasting(device, None):
                yield
        finally:
            self._caller_dtype = None

    def _scaled(self, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        scaler = self.options.grad_scaler
        if scaler is None or not scaler.is_enabled():
            return loss, None
        scale = scaler.scale(torch.ones((), device=loss.device))
        return loss.float() * scale, scale

    def _mean(self, parts: Iterator[tuple[float, list[torch.Tensor]]]) -> Tensors:
        """Return the weighted sum over the parts of a minibatch, averaged over processes."""
        total: Tensors = []
        for weight, found in parts:
            part = found if weight == 1.0 else [weight * tensor for tensor in found]
            total = [a + b for a, b in zip(total, part, strict=True)] if total else part
        return self.average(total)

    # Processes.

    @property
    def is_distributed(self) -> bool:
        """Whether there are other processes to average over."""
        return (
            distributed.is_available()
            and distributed.is_initialized()
            and distributed.get_world_size(self.options.process_group) > 1
        )

    def average(self, tensors: Tensors) -> Tensors:
        """Return the mean over the processes, by one message for each dtype."""
        if not self.is_distributed:
            return tensors
        group = self.options.process_group
        result = list(tensors)
        for dtype in {tensor.dtype for tensor in tensors}:
            places = [place for place, tensor in enumerate(tensors) if tensor.dtype == dtype]
            flat = torch.cat([tensors[place].reshape(-1) for place in places])
            distributed.all_reduce(flat, group=group)
            flat /= distributed.get_world_size(group)
            sizes = [tensors[place].numel() for place in places]
            for place, part in zip(places, flat.split(sizes), strict=True):
                result[place] = part.reshape(tensors[place].shape)
        return result

    def synchronize(self) -> None:
        """Give all processes the variables and buffers of the first."""
        if not self.is_distributed:
            return
        group = self.options.process_group
        first = distributed.get_global_rank(group, 0) if group is not None else 0
        for variables in (self.inner, self.outer):
            for tensor in (*variables.tensors, *variables.buffers().values()):
                distributed.broadcast(tensor.detach(), first, group=group)

    # Checks.

    def _inspect(self, name: str, loss: torch.Tensor) -> None:
        """Follow the graph of the first loss to its leaves: no pass, and no wrong gradient goes unseen."""
        self._inspected.add(name)
        reached = [node.variable for node in nodes(loss) if hasattr(node, "variable")]
        inner = {id(tensor) for tensor in self.inner.tensors}
        outer = {id(tensor) for tensor in self.outer.tensors}
        for tensor in reached:
            if id(tensor) not in inner | outer:
                raise CapturedTensorError(
                    f"{self.where}: expected {name} to reach no tensor that requires grad besides inner and outer, and it reaches one of "
                    f"shape {tuple(tensor.shape)}; make it part of inner or outer, or call .requires_grad_(False) on it"
                )
        found = {id(tensor) for tensor in reached}
        if name == "inner_objective" and not found & inner:
            raise ArgumentError(
                f"{self.where}: expected inner_objective to depend on inner, and no graph leads to it; compute the loss from `inner` as "
                "it is passed"
            )
        self._unreached = {place for place in self._unreached if id(self.outer.tensors[place]) not in found}
        if len(self._inspected) == 2 and self._unreached:
            missing = [self.outer.names[place] for place in sorted(self._unreached)]
            raise ArgumentError(
                f"{self.where}: expected an objective to depend on every tensor of outer, and no graph leads to {', '.join(missing)}; use "
                "it in an objective, or call .requires_grad_(False) on it"
            )


class Linearization:
    """∇_φ G at one point and one minibatch with its graph, for products with H and Bᵀ.

    Products need the graph alone: a method that no longer needs ``gradient`` frees its memory by :meth:`norm_of_gradient`.

    Parameters
    ----------
    oracle
        Who counts and averages.
    batch
        The minibatch; the graphs of all its parts are kept.
    at
        Another point than the variables' own.
    """

    def __init__(self, oracle: Oracle, batch: Any, at: Point | None) -> None:
        self._oracle = oracle
        self._z, self._x = oracle._leaves(at)
        self._at = at
        self._parts: list[tuple[float, list[Output], torch.Tensor | None]] = []
        self.loss, *self.gradient = oracle._mean(self._evaluated(batch))

    def _evaluated(self, batch: Any) -> Iterator[tuple[float, Tensors]]:
        for weight, data in batch_parts(batch):
            loss, gradient, scale = self._part(data)
            self._parts.append((weight, gradient_edges(gradient), scale))
            yield weight, [loss, *_unscaled(_detached(gradient), scale)]

    def norm_of_gradient(self) -> torch.Tensor:
        """Return ‖∇_φ G‖, and give up ``gradient``."""
        size, self.gradient = norm(self.gradient), []
        return size

    def _part(self, data: Any) -> tuple[torch.Tensor, Tensors, torch.Tensor | None]:
        return self._oracle._linearize(data, self._at, self._z)

    def hessian(self, q: Sequence[torch.Tensor]) -> Tensors:
        """Return H q: one reverse pass."""
        return self._product(self._z, q)

    def cross(self, q: Sequence[torch.Tensor]) -> Tensors:
        """Return Bᵀ q: one reverse pass."""
        return self._product(self._x, q)

    def products(self, q: Sequence[torch.Tensor]) -> tuple[Tensors, Tensors]:
        """Return H q and Bᵀ q: one reverse pass."""
        found = self._product([*self._z, *self._x], q)
        return found[: len(self._z)], found[len(self._z) :]

    def _product(self, leaves: Tensors, q: Sequence[torch.Tensor]) -> Tensors:
        return self._oracle._mean(
            (weight, _unscaled(self._oracle._reverse(edges, leaves, q), scale)) for weight, edges, scale in self._parts
        )


def _unscaled(tensors: Sequence[torch.Tensor], scale: torch.Tensor | None) -> Tensors:
    return list(tensors) if scale is None else [tensor / scale for tensor in tensors]


def _detached(tensors: Sequence[torch.Tensor]) -> Tensors:
    return [tensor.detach() for tensor in tensors]
