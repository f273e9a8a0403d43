"""The variables of one level: the parameters of a module, or the tensors of a pytree, as one list of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from bilevel.errors import ArgumentError, DtypeError
from bilevel.stochastic._lists import Tensors

__all__ = ["Point", "Variables", "call_at", "check_memory"]


@dataclass(frozen=True, eq=False)
class Point:
    """Values of the inner and outer variables other than their own, as leaves that require grad."""

    inner: Tensors
    outer: Tensors

    @staticmethod
    def of(inner: Sequence[torch.Tensor], outer: Sequence[torch.Tensor]) -> Point:
        """Return copies that share memory with ``inner`` and ``outer``."""
        return Point([t.detach().requires_grad_() for t in inner], [t.detach().requires_grad_() for t in outer])


class Variables:
    """The variables of one level.

    Parameters
    ----------
    given
        A module, whose parameters that require grad are the variables; or a pytree, whose leaf tensors that require grad
        are. Of a pytree in which no tensor requires grad, all floating-point tensors are variables, and are made to
        require grad.
    what
        ``"inner"`` or ``"outer"``.
    where
        The method's name, for messages.
    """

    def __init__(self, given: Any, what: str, where: str) -> None:
        if isinstance(given, nn.parallel.DistributedDataParallel):
            given = given.module  # the engine averages what it computes; DDP's hooks would average something else
        self.given, self.what, self.where = given, what, where
        self.tensors: Tensors = []
        self.names: list[str] = []
        self.is_module = isinstance(given, nn.Module)
        if self.is_module:
            named = [(name, p) for name, p in given.named_parameters() if p.requires_grad]
            if not named:
                raise ArgumentError(
                    f"{where}: expected the module {what} to have a parameter that requires grad, and it has none; unfreeze one"
                )
            for name, p in named:
                if isinstance(p, nn.parameter.UninitializedParameter):
                    raise ArgumentError(
                        f"{where}: expected the module {what} to know its shapes, and {name} is not initialised yet; call the module once before"
                    )
            self.names, self.tensors = [name for name, _ in named], [p for _, p in named]
        else:
            self._read_tree(given)
        self._owners = [given.get_submodule(name.rpartition(".")[0]) for name in self.names] if self.is_module else []
        for name, tensor in zip(self.names, self.tensors, strict=True):
            if tensor.is_complex():
                raise DtypeError(
                    f"{where}: expected {what} to hold real tensors, and {name} is of {tensor.dtype}; keep torch.view_as_real(...) of it, and "
                    "apply torch.view_as_complex where it is used"
                )
            if hasattr(tensor, "device_mesh"):
                raise ArgumentError(
                    f"{where}: expected {what} to hold whole tensors, and {name} is sharded over processes (a DTensor, as fully_shard and "
                    "distribute_tensor make); leave the module as it is, or wrap it in DistributedDataParallel: each process has its own "
                    "batch, and derivatives are averaged"
                )
        self._forms = [_form(tensor) for tensor in self.tensors]
        devices = {tensor.device for tensor in self.tensors}
        if len(devices) > 1:
            raise ArgumentError(
                f"{where}: expected all of {what} on one device, got {sorted(map(str, devices))}; move them together"
            )

    def _read_tree(self, tree: Any) -> None:
        paths, self._structure = pytree.tree_flatten_with_path(tree)
        self._leaves = [leaf for _, leaf in paths]
        tensors = [leaf for leaf in self._leaves if isinstance(leaf, torch.Tensor)]
        if not tensors:
            raise ArgumentError(
                f"{self.where}: expected {self.what} to be a module or a pytree with a tensor, got {tree!r}; pass "
                "torch.tensor(...) of it"
            )
        if not any(tensor.requires_grad for tensor in tensors):
            moving = [tensor for tensor in tensors if tensor.is_floating_point()]
            if not moving:
                raise DtypeError(
                    f"{self.where}: expected {self.what} to hold a floating-point tensor, got "
                    f"{', '.join(str(tensor.dtype) for tensor in tensors)}; convert one with .float()"
                )
            for tensor in moving:
                if tensor.is_inference():
                    raise ArgumentError(
                        f"{self.where}: expected {self.what} to hold tensors with derivatives, got one made in torch.inference_mode; pass "
                        "tensor.clone(), made outside"
                    )
                tensor.requires_grad_()
        self._places = []
        for place, (path, leaf) in enumerate(paths):
            if not isinstance(leaf, torch.Tensor) or not leaf.requires_grad:
                continue
            name = self.what + pytree.keystr(path)
            if not leaf.is_leaf:
                raise ArgumentError(
                    f"{self.where}: expected {name} to be a leaf tensor, which can be updated in place, got the result of an "
                    "operation; pass tensor.detach().requires_grad_() in its place"
                )
            self._places.append(place)
            self.tensors.append(leaf)
            self.names.append(pytree.keystr(path) or self.what)

    def check(self) -> None:
        """Raise :class:`ArgumentError` if a variable has been frozen or converted, or replaced in its module or pytree."""
        for name, tensor, form in zip(self.names, self.tensors, self._forms, strict=True):
            if not tensor.requires_grad:
                self._refuse(name, "has been frozen since the method was made")
            if _form(tensor) != form:
                self._refuse(name, "has another shape, dtype or device since the method was made")
        for name, tensor, owner in zip(self.names, self.tensors, self._owners, strict=self.is_module):
            if owner._parameters.get(name.rpartition(".")[2]) is not tensor:
                self._refuse(name, "has been replaced in its module since the method was made")
        if self.is_module or self.given is self.tensors[0]:
            return
        leaves = pytree.tree_leaves(self.given)
        if len(leaves) != len(self._leaves):
            self._refuse("its structure", "has changed since the method was made")
        for name, tensor, place in zip(self.names, self.tensors, self._places, strict=True):
            if leaves[place] is not tensor:
                self._refuse(name, "has been replaced in its pytree since the method was made")

    def _refuse(self, name: str, what: str) -> None:
        raise ArgumentError(
            f"{self.where}: expected {self.what} to stay as it was given, and {name} {what}; make the method and its optimisers anew after "
            "such a change"
        )

    def tree_of(self, tensors: Sequence[torch.Tensor]) -> Any:
        """Return the pytree given, with ``tensors`` in the places of the variables."""
        leaves = list(self._leaves)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        return pytree.tree_unflatten(leaves, self._structure)

    def buffers(self) -> dict[str, torch.Tensor]:
        """Return the buffers of a module by name."""
        return dict(self.given.named_buffers()) if self.is_module else {}


def _form(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device


def check_memory(inner: Variables, outer: Variables, where: str) -> None:
    """Raise :class:`ArgumentError` if two variables share memory, or one is expanded: a change of one entry is one of another."""
    ranges: list[tuple[int, int, str]] = []
    for variables in (inner, outer):
        for name, tensor in zip(variables.names, variables.tensors, strict=True):
            named = name if name == variables.what else f"{variables.what} {name}"
            if any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)):
                raise ArgumentError(
                    f"{where}: expected {named} to hold each entry by itself, got an expanded tensor, whose entries share memory; pass "
                    "tensor.clone()"
                )
            if tensor.numel() and tensor.is_contiguous() and not tensor.is_meta:
                start = tensor.data_ptr()
                ranges.append((start, start + tensor.numel() * tensor.element_size(), named))
    ranges.sort()
    for (_, end, first), (start, _, second) in pairwise(ranges):
        if start < end:
            raise ArgumentError(
                f"{where}: expected variables that share no memory, and {first} and {second} do; pass tensor.clone() of one of them"
            )


class _Pair(nn.Module):
    """Both levels under one roof, so that one functional call replaces the parameters of both."""

    def __init__(self, inner: Variables, outer: Variables) -> None:
        super().__init__()
        self.inner = inner.given if inner.is_module else None
        self.outer = outer.given if outer.is_module else None

    def forward(self, objective: Callable[..., torch.Tensor], inner: Any, outer: Any, data: Any) -> torch.Tensor:
        return objective(inner if self.inner is None else self.inner, outer if self.outer is None else self.outer, data)


def call_at(
    objective: Callable[..., torch.Tensor], inner: Variables, outer: Variables, data: Any, at: Point | None
) -> torch.Tensor:
    """Return the objective at the variables' own values, or at ``at``.

    A module is handed to the objective as itself. Elsewhere than at its own values its parameters are replaced for the length
    of the call, and its buffers by copies: an evaluation at an old point does not count twice in running statistics.
    """
    if at is None:
        return objective(inner.given, outer.given, data)
    replaced: dict[str, torch.Tensor] = {}
    copies: dict[int, torch.Tensor] = {}
    for variables, tensors in ((inner, at.inner), (outer, at.outer)):
        if variables.is_module:
            replaced |= {f"{variables.what}.{name}": t for name, t in zip(variables.names, tensors, strict=True)}
            for name, buffer in variables.buffers().items():  # both levels may hold one
                replaced[f"{variables.what}.{name}"] = copies.setdefault(id(buffer), buffer.clone())
    z = None if inner.is_module else inner.tree_of(at.inner)
    x = None if outer.is_module else outer.tree_of(at.outer)
    if not replaced:
        return objective(z, x, data)
    return torch.func.functional_call(_Pair(inner, outer), replaced, (objective, z, x, data))
