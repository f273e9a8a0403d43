"""The arguments of a quadratic program, checked, completed and brought to one batch shape and dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bilevel.errors import ArgumentError, DtypeError, ShapeError
from bilevel.quadratic_programs._kkt import Sizes
from bilevel.quadratic_programs._matrices import Dense, Entries, Pattern

__all__ = ["Arguments", "arguments_of", "batch_of", "entries_of", "symmetric_entries", "tensors_of", "vector_of"]

_FLOATS = (torch.float32, torch.float64)
_MATRICES = {"Q": ("n", "n"), "A": ("p", "n"), "G": ("m", "n")}


@dataclass(frozen=True, eq=False)
class Arguments:
    """The tensors Q, q, A, b, G, h, lower, upper, all with the batch axes ``batch``, and what they stand for."""

    tensors: tuple[torch.Tensor, ...]
    patterns: tuple[Pattern, Pattern, Pattern]
    sizes: Sizes
    batch: tuple[int, ...]

    @property
    def sparse(self) -> bool:
        """Whether a matrix was given as a sparse tensor."""
        return isinstance(self.patterns[0], Entries)


def arguments_of(where: str, given: dict[str, Any]) -> Arguments:
    """Return the arguments of a program, or raise what says which of them cannot be used."""
    tensors = tensors_of(where, given, ("Q", "q", "A", "G"))
    q = tensors["q"]
    if q.ndim < 1 or q.shape[-1] < 1:
        raise ShapeError(
            f"{where}: expected q of shape (..., n) with n of at least 1, got {tuple(q.shape)}; pass one entry per unknown"
        )
    n = q.shape[-1]
    _check_pairs(where, tensors)
    rows = {"A": 0, "G": 0}
    for name in rows:
        if name in tensors:
            rows[name] = tensors[name].shape[-2] if tensors[name].ndim >= 2 else -1
        else:
            tensors[name] = q.new_zeros(0, n)
    sizes = Sizes(n, rows["A"], rows["G"])
    for name, side in (("Q", n), ("A", sizes.p), ("G", sizes.m)):
        matrix = tensors[name]
        if matrix.ndim < 2 or tuple(matrix.shape[-2:]) != (side, n):
            wanted = f"(..., {_MATRICES[name][0]}, n)"
            raise ShapeError(
                f"{where}: expected {name} of shape {wanted} with n = {n} as in q, got {tuple(matrix.shape)}; give each row {n} entries"
            )
    infinite = {"b": 0.0, "h": float("inf"), "lower": -float("inf"), "upper": float("inf")}
    for name, length in (("b", sizes.p), ("h", sizes.m), ("lower", n), ("upper", n)):
        value = tensors[name] if name in tensors else q.new_full((), infinite[name])
        tensors[name] = vector_of(where, name, value, length)
    if any(tensors[name].layout is not torch.strided for name in _MATRICES):
        return _sparse_arguments(where, tensors, sizes)
    tensors["Q"] = (tensors["Q"] + tensors["Q"].mT) / 2  # only the symmetric part counts
    return _broadcast(where, tensors, (Dense(), Dense(), Dense()), sizes)


def tensors_of(where: str, given: dict[str, Any], arrays: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Return what was given as tensors of one dtype, on q's device; those named in ``arrays`` may not be numbers."""
    found = {name: torch.as_tensor(v) if isinstance(v, np.ndarray) else v for name, v in given.items() if v is not None}
    for name in ("Q", "q"):
        if name in arrays and name not in found:
            remedy = "torch.zeros(n, n) for a linear program" if name == "Q" else "torch.zeros(n) for no linear term"
            raise ArgumentError(f"{where}: expected {name} to be a tensor, got None; pass {remedy}")
    main = found["q"]
    for name in arrays:
        if name in found and not isinstance(found[name], torch.Tensor):
            raise ArgumentError(
                f"{where}: expected {name} to be a tensor, got {found[name]!r}; make it one with torch.tensor"
            )
    floats = [t.dtype for t in found.values() if isinstance(t, torch.Tensor)]
    for name, value in found.items():
        if not isinstance(value, torch.Tensor):
            try:
                found[name] = torch.as_tensor(value, dtype=main.dtype, device=main.device)
            except (TypeError, ValueError, RuntimeError) as problem:
                raise ArgumentError(
                    f"{where}: expected {name} to be a tensor or a number, got {value!r}; convert it with torch.as_tensor(...)"
                ) from problem
        elif value.dtype not in _FLOATS:
            raise DtypeError(
                f"{where}: expected {name} of dtype float32 or float64, got {value.dtype}; convert it with .double() or .float()"
            )
        elif value.device != main.device:
            raise DtypeError(
                f"{where}: expected {name} on q's device, {main.device}, got {value.device}; move it with .to(q.device)"
            )
    widest = torch.float64 if torch.float64 in floats else torch.float32
    return {name: value if value.dtype == widest else value.to(widest) for name, value in found.items()}


def _check_pairs(where: str, tensors: dict[str, torch.Tensor]) -> None:
    for matrix, side, relation in (("A", "b", "A x = b"), ("G", "h", "G x <= h")):
        if (matrix in tensors) != (side in tensors):
            there, missing = (matrix, side) if matrix in tensors else (side, matrix)
            raise ArgumentError(
                f"{where}: expected both of {matrix} and {side} for {relation}, got {there} alone; pass {missing} too"
            )


def vector_of(where: str, name: str, value: torch.Tensor, length: int) -> torch.Tensor:
    if value.ndim == 0:
        return value.expand(length)
    if value.shape[-1] != length:
        raise ShapeError(
            f"{where}: expected {name} of shape (..., {length}) or a number, got {tuple(value.shape)}; give it one entry per "
            + ("unknown" if name in ("lower", "upper") else "row")
        )
    return value


_ORDER = ("Q", "q", "A", "b", "G", "h", "lower", "upper")


def _broadcast(
    where: str, tensors: dict[str, torch.Tensor], patterns: tuple[Pattern, Pattern, Pattern], sizes: Sizes
) -> Arguments:
    """Return the tensors expanded to one batch shape."""
    axes = dict(zip(_MATRICES, (pattern.axes for pattern in patterns), strict=True))
    own = {name: axes.get(name, 1) for name in _ORDER}
    leading = {name: tensors[name].shape[: tensors[name].ndim - own[name]] for name in _ORDER}
    batch = batch_of(where, leading)
    made = []
    for name in _ORDER:
        tensor, rest = tensors[name], tensors[name].shape[tensors[name].ndim - own[name] :]
        made.append(tensor if leading[name] == batch else tensor.expand(*batch, *rest))
    return Arguments(tuple(made), patterns, sizes, tuple(batch))


def batch_of(where: str, leading: dict[str, torch.Size]) -> torch.Size:
    """Return the batch shape that the ``leading`` axes of the arguments broadcast to."""
    try:
        return torch.broadcast_shapes(*leading.values())
    except RuntimeError as problem:
        shapes = ", ".join(f"{name}: {tuple(shape)}" for name, shape in leading.items() if shape)
        raise ShapeError(
            f"{where}: expected batch axes that broadcast, got {shapes}; give all the same, or none"
        ) from problem


def entries_of(where: str, name: str, matrix: torch.Tensor) -> tuple[torch.Tensor, Entries]:
    """Return the values (entries,) of a matrix, differentiable as the matrix is, and where they are."""
    if matrix.ndim != 2:
        raise ShapeError(
            f"{where}: expected a sparse program without batch axes, got {name} of shape {tuple(matrix.shape)}; "
            "give matrices without them, or dense ones"
        )
    shape = (int(matrix.shape[0]), int(matrix.shape[1]))
    if matrix.layout is torch.strided:
        rows = torch.arange(shape[0], device=matrix.device).repeat_interleave(shape[1])
        return matrix.reshape(-1), Entries(rows, torch.arange(shape[1], device=matrix.device).repeat(shape[0]), shape)
    if matrix.layout is torch.sparse_csr:
        starts = matrix.crow_indices()
        rows = torch.repeat_interleave(torch.arange(shape[0], device=matrix.device), starts.diff())
        return matrix.values(), Entries(rows, matrix.col_indices().to(torch.int64), shape)
    if matrix.layout is not torch.sparse_coo:
        raise DtypeError(
            f"{where}: expected {name} dense, in coordinates or in rows, got {str(matrix.layout).removeprefix('torch.')}; "
            "convert it with .to_sparse_coo()"
        )
    together = matrix.coalesce()
    rows, columns = together.indices()
    return together.values(), Entries(rows, columns, shape)


def symmetric_entries(values: torch.Tensor, pattern: Entries) -> tuple[torch.Tensor, Entries]:
    """Return the symmetric part of a matrix, which alone counts in xᵀQx."""
    rows, columns = pattern.rows, pattern.columns
    both = Entries(torch.cat([rows, columns]), torch.cat([columns, rows]), pattern.shape)
    return torch.cat([values, values]) / 2, both


def _sparse_arguments(where: str, tensors: dict[str, torch.Tensor], sizes: Sizes) -> Arguments:
    patterns: list[Entries] = []
    for name in _MATRICES:
        values, pattern = entries_of(where, name, tensors[name])
        if name == "Q":
            values, pattern = symmetric_entries(values, pattern)
        tensors[name] = values
        patterns.append(pattern)
    of_Q, of_A, of_G = patterns
    return _broadcast(where, tensors, (of_Q, of_A, of_G), sizes)
