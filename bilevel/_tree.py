"""Pytrees to flat vectors and back, and a call's tensors apart from everything else in its arguments."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bilevel.errors import DtypeError, ShapeError

__all__ = ["Arguments", "Raveler", "flatten_arguments", "leaf_names", "moves", "ravel", "ravel_like", "unravelled"]


@dataclass(frozen=True, eq=False)
class Raveler:
    """The structure of the unknown: turns one flat vector into the user's pytree and back.

    Parameters
    ----------
    structure
        The pytree's structure.
    shapes, dtypes
        Of each leaf.
    dtype, device
        Of the flat vector: the widest floating-point dtype of the leaves.
    """

    structure: pytree.TreeSpec
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(tree: Any, where: str, what: str = "init") -> Raveler:
        """Read the structure of ``tree``, called ``what`` in messages, or say what cannot be an unknown about it."""
        paths, structure = pytree.tree_flatten_with_path(tree)
        if not paths:
            raise ShapeError(
                f"{where}: expected {what} to hold at least one tensor, got {tree!r}; pass a tensor or a pytree of them"
            )
        if isinstance(tree, (list, tuple)) and all(isinstance(leaf, (int, float)) for _, leaf in paths):
            raise DtypeError(
                f"{where}: expected {what} to be a floating-point tensor, got a {type(tree).__name__} of numbers; write "
                f"torch.tensor({what}, dtype=torch.float64)"
            )
        for path, leaf in paths:
            name = what + pytree.keystr(path)
            if not isinstance(leaf, torch.Tensor):
                raise DtypeError(
                    f"{where}: expected {name} to be a floating-point tensor, got {type(leaf).__name__}; wrap it in "
                    "torch.tensor(..., dtype=torch.float64), or pass it as an argument instead of an unknown"
                )
            if not leaf.dtype.is_floating_point:
                raise DtypeError(
                    f"{where}: expected {name} to be a floating-point tensor, got {str(leaf.dtype).removeprefix('torch.')}; "
                    "convert it with .to(torch.float64) or .float()"
                )
            if leaf.layout is not torch.strided:
                raise DtypeError(
                    f"{where}: expected {name} to be a dense tensor, got {str(leaf.layout).removeprefix('torch.')}; make it one with "
                    ".to_dense()"
                )
        leaves = [leaf for _, leaf in paths]
        device = leaves[0].device
        for path, leaf in paths:
            if leaf.device != device:
                raise ShapeError(
                    f"{where}: expected all of {what} on one device, got {device} and {leaf.device} at "
                    f"{what}{pytree.keystr(path)}; move them together with .to(device)"
                )
        dtype = leaves[0].dtype
        for leaf in leaves[1:]:
            dtype = torch.promote_types(dtype, leaf.dtype)
        return Raveler(
            structure, tuple(leaf.shape for leaf in leaves), tuple(leaf.dtype for leaf in leaves), dtype, device
        )

    @property
    def size(self) -> int:
        """The length n of the flat vector."""
        return sum(shape.numel() for shape in self.shapes)

    @cached_property
    def coarsest(self) -> torch.dtype:
        """The dtype of the leaf that holds the fewest digits: no solution is more accurate than what it is handed out in."""
        return max(self.dtypes, key=lambda dtype: torch.finfo(dtype).eps)

    @cached_property
    def is_tensor(self) -> bool:
        """Whether the unknown is one tensor and no container, which needs no tree to be walked."""
        return bool(self.structure.is_leaf())

    def ravel(self, tree: Any) -> torch.Tensor:
        """Return ``tree``, of this structure, as one vector (n,)."""
        leaves = pytree.tree_leaves(tree)
        if len(leaves) == 1 and leaves[0].dtype == self.dtype:
            return leaves[0].reshape(self.size)
        return torch.cat([leaf.reshape(leaf.numel()).to(self.dtype) for leaf in leaves])

    def unravel(self, flat: torch.Tensor) -> Any:
        """Return the vector ``flat`` (n,) as the user's pytree."""
        if self.is_tensor:
            return flat.reshape(self.shapes[0]).to(self.dtypes[0])
        if len(self.shapes) == 1:
            return pytree.tree_unflatten([flat.reshape(self.shapes[0]).to(self.dtypes[0])], self.structure)
        parts = torch.split(flat, [shape.numel() for shape in self.shapes])
        return pytree.tree_unflatten(
            [part.reshape(shape).to(dtype) for part, shape, dtype in zip(parts, self.shapes, self.dtypes, strict=True)],
            self.structure,
        )


class _Unknown(threading.local):
    """The flat vector that the pytree in a user's hands was made of, while the user's function runs."""

    flat: torch.Tensor | None = None
    leaves: tuple[Any, ...] = ()


_unknown = _Unknown()


@contextmanager
def unravelled(raveler: Raveler, flat: torch.Tensor) -> Iterator[Any]:
    """Give the pytree of ``flat`` (n,), which :func:`ravel` turns back into ``flat`` itself meanwhile."""
    tree = raveler.unravel(flat)
    before = _unknown.flat, _unknown.leaves
    _unknown.flat, _unknown.leaves = flat, (tree,) if raveler.is_tensor else tuple(pytree.tree_leaves(tree))
    try:
        yield tree
    finally:
        _unknown.flat, _unknown.leaves = before


def ravel(tree: Any) -> torch.Tensor:
    """Return the tensors of ``tree`` as one vector (n,), in the order of ``torch.utils._pytree``.

    Inside an objective, residual or mapping, the unknown itself is one vector already, of which its tensors are views: of it this makes no
    copy, and derivatives pass through in one piece. A penalty on all of a network's parameters costs a tenth, so written.

    Parameters
    ----------
    tree
        A pytree of floating-point tensors on one device.

    Returns
    -------
    torch.Tensor
        (n,), of the widest dtype among them.

    Raises
    ------
    ShapeError, DtypeError
        If there is no tensor in ``tree``, or one that is not floating-point, or on another device.

    Examples
    --------
    >>> import torch, bilevel
    >>> bilevel.ravel({"a": torch.ones(2), "b": torch.zeros(1, 1)})
    tensor([1., 1., 0.])
    >>> layer = bilevel.argmin(lambda w, a: ((bilevel.ravel(w) - a) ** 2).sum())
    >>> layer({"a": torch.zeros(2), "b": torch.zeros(1, 1)}, torch.tensor([1.0, 2.0, 3.0]))["b"].round(decimals=3)
    tensor([[3.]])
    """
    leaves = tuple(pytree.tree_leaves(tree))
    if (
        leaves
        and len(leaves) == len(_unknown.leaves)
        and all(a is b for a, b in zip(leaves, _unknown.leaves, strict=True))
    ):
        assert _unknown.flat is not None
        return _unknown.flat
    if leaves and all(isinstance(leaf, torch.Tensor) for leaf in leaves):
        like = leaves[0]
        if like.dtype.is_floating_point and all(t.dtype == like.dtype and t.device == like.device for t in leaves):
            return torch.cat([leaf.reshape(-1) for leaf in leaves])
    return Raveler.of(tree, "bilevel.ravel", "tree").ravel(tree)


def ravel_like(tree: Any, raveler: Raveler, where: str, what: str) -> torch.Tensor:
    """Return what the user's function gave as one vector (n,), or say how its structure or shapes differ."""
    if raveler.is_tensor and isinstance(tree, torch.Tensor) and tree.shape == raveler.shapes[0]:
        return tree.reshape(raveler.size).to(raveler.dtype)
    paths, structure = pytree.tree_flatten_with_path(tree)
    if structure != raveler.structure:
        raise ShapeError(
            f"{where}: expected {what} to return the structure of init, {raveler.structure}, got {structure}; "
            "return one value for each unknown, in the same pytree"
        )
    for (path, leaf), shape in zip(paths, raveler.shapes, strict=True):
        if not isinstance(leaf, torch.Tensor) or leaf.shape != shape:
            got = tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else type(leaf).__name__
            raise ShapeError(
                f"{where}: expected {what} to return shape {tuple(shape)} at init{pytree.keystr(path)}, got {got}; "
                "there must be as many equations as unknowns, in the same shapes"
            )
    return raveler.ravel(tree)


@dataclass(frozen=True, eq=False)
class Arguments:
    """A call's (args, kwargs) with the tensors taken out; :meth:`rebuild` puts tensors in."""

    structure: pytree.TreeSpec
    others: tuple[Any, ...]
    is_tensor: tuple[bool, ...]
    names: tuple[str, ...]
    positional: bool = False  # whether there is nothing but tensors, each an argument by itself

    def rebuild(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return (args, kwargs) with ``tensors`` in their places."""
        if self.positional:
            return tuple(tensors), {}
        feed, rest = iter(tensors), iter(self.others)
        leaves = [next(feed) if flag else next(rest) for flag in self.is_tensor]
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        return args, kwargs


def flatten_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[torch.Tensor], Arguments]:
    """Split a call's arguments into its tensors, of any dtype, and the rest."""
    if not kwargs and all(isinstance(arg, torch.Tensor) for arg in args):
        return list(args), _positional(len(args))
    paths, structure = pytree.tree_flatten_with_path((args, kwargs))
    flags = tuple(isinstance(leaf, torch.Tensor) for _, leaf in paths)
    tensors = [leaf for (_, leaf), flag in zip(paths, flags, strict=True) if flag]
    others = tuple(leaf for (_, leaf), flag in zip(paths, flags, strict=True) if not flag)
    names = tuple(leaf_names([item for item, flag in zip(paths, flags, strict=True) if flag]))
    return tensors, Arguments(structure, others, flags, names)


@lru_cache(maxsize=64)
def _positional(count: int) -> Arguments:
    structure = pytree.tree_structure(((0,) * count, {}))
    return Arguments(structure, (), (True,) * count, tuple(f"args[{place}]" for place in range(count)), positional=True)


def moves(leaf: Any) -> bool:
    """Return whether ``leaf`` is a tensor that derivatives can be taken with respect to."""
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def leaf_names(paths: Sequence[tuple[Any, Any]]) -> list[str]:
    """Return how a reader would write each leaf of (args, kwargs): ``args[0]['lr']``, ``kwargs['x']``."""
    return [("args" if path[0].idx == 0 else "kwargs") + pytree.keystr(path[1:]) for path, _ in paths]
