"""Pytrees to flat vectors and back, and a call's tensors apart from everything else in its arguments."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bilevel.errors import DtypeError, ShapeError
from bilevel.setting_checks import refuse_nested

__all__ = [
    "Arguments", "Raveler", "as_real", "copied", "detached", "differentiated", "flatten_arguments", "is_numpy", "joined",
    "leaf_names", "moves", "moving", "of_real", "parted", "ravel", "ravel_like", "real_dtype", "requiring_grad", "unravelled", "usable",
]  # fmt: skip


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return ``dtype``, or that of the real and imaginary parts of a complex one."""
    return dtype.to_real() if dtype.is_complex else dtype


def as_real(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor``, or a complex one (...) as its real and imaginary parts (..., 2).

    torch's gradient of a real loss by a complex tensor z is ∂L/∂Re z + i ∂L/∂Im z: so viewed, it is the gradient by the pairs.
    """
    if not tensor.is_complex() or tensor.layout is not torch.strided:
        return tensor
    return torch.view_as_real(tensor.resolve_conj())


def of_real(flat: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return the numbers ``flat`` of :func:`as_real` in the shape and dtype of the dense tensor ``like``."""
    return _complete(flat.reshape(as_real(like).shape), like.dtype)


def _complete(parts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return ``parts`` in ``dtype``: of a complex one they are the real and imaginary parts (..., 2)."""
    if not dtype.is_complex:
        return parts.to(dtype)
    # Not torch.view_as_complex, which wants an even place in memory.
    pairs = parts.to(real_dtype(dtype))
    return torch.complex(pairs[..., 0], pairs[..., 1])


@dataclass(frozen=True, eq=False)
class Raveler:
    """The structure of the unknown: turns one flat vector into the user's pytree and back.

    A complex number counts as two unknowns, its real and its imaginary part.

    Parameters
    ----------
    structure
        The pytree's structure.
    shapes, dtypes
        Of each leaf.
    dtype, device
        Of the flat vector: the widest real dtype of the leaves.
    """

    structure: pytree.TreeSpec
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(tree: Any, where: str, what: str = "init") -> Raveler:
        """Read the structure of ``tree``, called ``what`` in messages, or say what cannot be an unknown about it."""
        if isinstance(tree, torch.Tensor) and moves(tree) and tree.layout is torch.strided and not tree.is_nested:
            return _of_tensor(tree.shape, tree.dtype, tree.device)
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
                    f"{where}: expected {name} to be a floating-point or complex tensor, got {type(leaf).__name__}; {_made_a_tensor(leaf)}"
                )
            if not moves(leaf):
                raise DtypeError(
                    f"{where}: expected {name} to be a floating-point or complex tensor, got {str(leaf.dtype).removeprefix('torch.')}; "
                    "convert it with .to(torch.float64) or .float()"
                )
            refuse_nested(leaf, where, name)
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
        dtype = real_dtype(leaves[0].dtype)
        for leaf in leaves[1:]:
            dtype = torch.promote_types(dtype, real_dtype(leaf.dtype))
        return Raveler(
            structure, tuple(leaf.shape for leaf in leaves), tuple(leaf.dtype for leaf in leaves), dtype, device
        )

    @cached_property
    def real_shapes(self) -> tuple[torch.Size, ...]:
        """The shape of each leaf's part of the flat vector: a complex leaf has its real and imaginary parts along a last axis."""
        return tuple(
            torch.Size((*shape, 2)) if dtype.is_complex else shape
            for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
        )

    @cached_property
    def size(self) -> int:
        """The length n of the flat vector."""
        return sum(shape.numel() for shape in self.real_shapes)

    @cached_property
    def coarsest(self) -> torch.dtype:
        """The real dtype of the leaf that holds the fewest digits: no solution is more accurate than what it is handed out in."""
        return max(map(real_dtype, self.dtypes), key=lambda dtype: torch.finfo(dtype).eps)

    @cached_property
    def is_tensor(self) -> bool:
        """Whether the unknown is one tensor and no container, which needs no tree to be walked."""
        return bool(self.structure.is_leaf())

    def in_dtype(self, dtype: torch.dtype) -> Raveler:
        """Return the same structure with each leaf in the real ``dtype``, or in the complex one of its precision."""
        dtypes = tuple(dtype.to_complex() if one.is_complex else dtype for one in self.dtypes)
        return replace(self, dtype=dtype, dtypes=dtypes)

    def ravel(self, tree: Any) -> torch.Tensor:
        """Return ``tree``, of this structure, as one vector (n,)."""
        leaves = [tree] if self.is_tensor else pytree.tree_leaves(tree)
        if len(leaves) == 1 and leaves[0].dtype == self.dtype == self.dtypes[0]:
            return leaves[0].reshape(self.size)
        # A real value of a complex unknown's equation has the imaginary part zero.
        whole = [leaf.to(dtype) if dtype.is_complex else leaf for leaf, dtype in zip(leaves, self.dtypes, strict=True)]
        return torch.cat([real.reshape(real.numel()).to(self.dtype) for real in map(as_real, whole)])

    def unravel(self, flat: torch.Tensor) -> Any:
        """Return the vector ``flat`` (n,) as the user's pytree."""
        if self.is_tensor:
            return self._leaf(flat, 0)
        if len(self.shapes) == 1:
            return pytree.tree_unflatten([self._leaf(flat, 0)], self.structure)
        parts = torch.split(flat, [shape.numel() for shape in self.real_shapes])
        return pytree.tree_unflatten([self._leaf(part, place) for place, part in enumerate(parts)], self.structure)

    def _leaf(self, part: torch.Tensor, place: int) -> torch.Tensor:
        """Return the leaf at ``place``, of its ``part`` of the flat vector."""
        return _complete(part.reshape(self.real_shapes[place]), self.dtypes[place])


@lru_cache(maxsize=64)
def _of_tensor(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Raveler:
    return Raveler(_LEAF, (shape,), (dtype,), real_dtype(dtype), device)


_LEAF = pytree.tree_structure(0)


def _made_a_tensor(leaf: Any) -> str:
    """Return what to do about ``leaf``, given for a tensor."""
    if isinstance(leaf, torch.nn.Module):
        return (
            "pass {name: p.detach() for name, p in module.named_parameters()}, and call the module in the function by "
            "torch.func.functional_call(module, x, inputs)"
        )
    if is_numpy(leaf):
        return "pass torch.as_tensor(...) of it"
    return "wrap it in torch.tensor(..., dtype=torch.float64), or pass it as an argument instead of an unknown"


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

    Inside an objective, residual or mapping, the unknown is stored as one vector, and its tensors are views of it. Then no copy is
    made, and derivatives pass through in one piece. A penalty on all parameters of a network costs a tenth, so written.

    Parameters
    ----------
    tree
        A pytree of floating-point or complex tensors on one device. A complex number counts as two, as in ``torch.view_as_real``.

    Returns
    -------
    torch.Tensor
        (n,), of the widest real dtype among them.

    Raises
    ------
    ShapeError, DtypeError
        If there is no tensor in ``tree``, or one of whole numbers, or on another device.

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
    if (
        raveler.is_tensor
        and isinstance(tree, torch.Tensor)
        and tree.shape == raveler.shapes[0]
        and not tree.is_complex()
    ):
        return raveler.ravel(tree)
    paths, structure = pytree.tree_flatten_with_path(tree)
    if structure != raveler.structure:
        raise ShapeError(
            f"{where}: expected {what} to return the structure of init, {raveler.structure}, got {structure}; "
            "return one value for each unknown, in the same pytree"
        )
    for (path, leaf), shape, dtype in zip(paths, raveler.shapes, raveler.dtypes, strict=True):
        if not isinstance(leaf, torch.Tensor) or leaf.shape != shape:
            got = tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else type(leaf).__name__
            raise ShapeError(
                f"{where}: expected {what} to return shape {tuple(shape)} at init{pytree.keystr(path)}, got {got}; "
                "there must be as many equations as unknowns, in the same shapes"
            )
        if leaf.is_complex() and not dtype.is_complex:
            raise DtypeError(
                f"{where}: expected {what} to return a real tensor at init{pytree.keystr(path)}, as the unknown there is real, got "
                f"{str(leaf.dtype).removeprefix('torch.')}; return its .real or .abs(), or make init complex with .to({dtype.to_complex()})"
            )
    return raveler.ravel(tree)


@dataclass(frozen=True, eq=False)
class Arguments:
    """A call's (args, kwargs) with the tensors taken out; :meth:`rebuild` puts tensors in.

    A dense complex tensor (...) is taken out as its real and imaginary parts (..., 2), so that all that is differentiated is real.
    """

    structure: pytree.TreeSpec
    others: tuple[Any, ...]
    is_tensor: tuple[bool, ...]
    names: tuple[str, ...]
    is_complex: tuple[bool, ...]  # of each tensor: whether it is rebuilt as a complex one
    positional: bool = False  # whether there is nothing but real tensors, each an argument by itself

    def rebuild(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return (args, kwargs) with ``tensors`` in their places."""
        if self.positional:
            return tuple(tensors), {}
        feed, rest = iter(self.given(tensors)), iter(self.others)
        leaves = [next(feed) if flag else next(rest) for flag in self.is_tensor]
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        return args, kwargs

    def given(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return ``tensors`` as the caller gave them: the complex ones complex."""
        return [torch.view_as_complex(t) if flag else t for t, flag in zip(tensors, self.is_complex, strict=True)]


def flatten_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[torch.Tensor], Arguments]:
    """Split a call's arguments into a list of its tensors, complex ones as pairs of real numbers, and all the rest."""
    if not kwargs and all(isinstance(arg, torch.Tensor) and not arg.is_complex() for arg in args):
        return _for_graphs(args), _positional(len(args))
    paths, structure = pytree.tree_flatten_with_path((args, kwargs))
    flags = tuple(isinstance(leaf, torch.Tensor) for _, leaf in paths)
    given = [leaf for (_, leaf), flag in zip(paths, flags, strict=True) if flag]
    others = tuple(leaf for (_, leaf), flag in zip(paths, flags, strict=True) if not flag)
    names = tuple(leaf_names([item for item, flag in zip(paths, flags, strict=True) if flag]))
    tensors = [as_real(leaf) for leaf in given]
    is_complex = tuple(real is not leaf for real, leaf in zip(tensors, given, strict=True))
    return _for_graphs(tensors), Arguments(structure, others, flags, names, is_complex)


def _for_graphs(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [usable(tensor) for tensor in tensors] if torch.is_grad_enabled() else list(tensors)


@lru_cache(maxsize=64)
def _positional(count: int) -> Arguments:
    structure = pytree.tree_structure(((0,) * count, {}))
    names = tuple(f"args[{place}]" for place in range(count))
    return Arguments(structure, (), (True,) * count, names, (False,) * count, positional=True)


def is_numpy(item: Any) -> bool:
    """Return whether ``item`` is an array or a number of numpy's."""
    return type(item).__module__ == "numpy"


def moves(leaf: Any) -> bool:
    """Return whether ``leaf`` is a tensor that derivatives can be taken with respect to."""
    return isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def moving(tree: Any) -> list[bool]:
    """Return :func:`moves` of each leaf of ``tree``."""
    return [moves(leaf) for leaf in pytree.tree_leaves(tree)]


def usable(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor``, or a copy of a tensor that was made in inference mode, which no graph can use."""
    return tensor.clone() if tensor.is_inference() else tensor


def detached(tree: Any) -> Any:
    """Return ``tree`` with tensors cut from their graphs."""
    return pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf, tree)


def copied(tree: Any) -> Any:
    """Return ``tree`` with copies of its tensors, without graphs."""
    return pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf, tree)


def requiring_grad(tree: Any) -> tuple[Any, list[torch.Tensor]]:
    """Return a copy of ``tree`` whose tensors require grad if they can, and these tensors."""
    made = copied(tree)
    chosen = [leaf.requires_grad_(True) for leaf in pytree.tree_leaves(made) if moves(leaf)]
    return made, chosen


def differentiated(tree: Any, count: int) -> tuple[bool, ...]:
    """Return which of ``count`` tensors, those of ``tree`` first, are differentiable ones of ``tree``."""
    flags = [moves(leaf) for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return (*flags, *[False] * (count - len(flags)))


def joined(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the real numbers of ``tensors`` as one vector (p,)."""
    return torch.cat([as_real(tensor).reshape(-1) for tensor in tensors])


def parted(flat: torch.Tensor, like: Any) -> Any:
    """Return ``flat`` (p,) as the pytree ``like``, whose differentiable tensors hold p real numbers; None in place of its other leaves."""
    leaves, structure = pytree.tree_flatten(like)
    parts = iter(torch.split(flat, [as_real(leaf).numel() for leaf in leaves if moves(leaf)]))
    return pytree.tree_unflatten([of_real(next(parts), leaf) if moves(leaf) else None for leaf in leaves], structure)


def leaf_names(paths: Sequence[tuple[Any, Any]]) -> list[str]:
    """Return how a reader would write each leaf of (args, kwargs): ``args[0]['lr']``, ``kwargs['x']``."""
    return [("args" if path[0].idx == 0 else "kwargs") + pytree.keystr(path[1:]) for path, _ in paths]
