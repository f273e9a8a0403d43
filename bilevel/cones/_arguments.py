"""The arguments of a cone program, checked, and the levels of the batch that their leading axes make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from bilevel.equations.system import Level
from bilevel.errors import ArgumentError, DtypeError, ShapeError
from bilevel.quadratic_programs._arguments import batch_of, entries_of, symmetric_entries, tensors_of, vector_of
from bilevel.quadratic_programs._matrices import Dense, Pattern

__all__ = ["Arguments", "arguments_of"]

_NAMES = ("P", "q", "A", "b")


@dataclass(frozen=True, eq=False)
class Arguments:
    """The tensors P, q, A, b in float64, what the values of P and A stand for, and the batch.

    ``dtype`` is that of what was given. A tensor carries those of the batch axes that its level says.
    """

    tensors: tuple[torch.Tensor, ...]
    patterns: tuple[Pattern, Pattern]
    unknowns: int
    rows: int
    dtype: torch.dtype
    levels: tuple[Level, ...]
    sparse: tuple[torch.Tensor, ...]

    @property
    def batch(self) -> tuple[int, ...]:
        """The batch axes, outermost first."""
        return tuple(level.size for level in reversed(self.levels))


def arguments_of(where: str, given: dict[str, Any]) -> Arguments:
    """Return the arguments of a program, or raise what says which of them cannot be used."""
    for name in ("q", "A", "b"):
        if given[name] is None:
            raise ArgumentError(
                f"{where}: expected {name} to be a tensor, got None; only P may be None, for a linear objective"
            )
    tensors = tensors_of(where, given, ("P", "q", "A"))
    q, A = tensors["q"], tensors["A"]
    if q.ndim < 1 or q.shape[-1] < 1:
        raise ShapeError(
            f"{where}: expected q of shape (..., n) with n of at least 1, got {tuple(q.shape)}; pass one entry per unknown"
        )
    if q.device.type != "cpu":
        raise DtypeError(f"{where}: expected tensors on the CPU for Clarabel, got {q.device}; move them with .cpu()")
    n, m = q.shape[-1], A.shape[-2] if A.ndim >= 2 else -1
    tensors.setdefault("P", q.new_zeros(n, n))
    for name, side in (("P", n), ("A", m)):
        matrix = tensors[name]
        if matrix.ndim < 2 or tuple(matrix.shape[-2:]) != (side, n):
            raise ShapeError(
                f"{where}: expected {name} of shape (..., {'n' if name == 'P' else 'm'}, n) with n = {n} as in q, got {tuple(matrix.shape)}; "
                f"give each row {n} entries"
            )
    tensors["b"] = vector_of(where, "b", tensors["b"], m)
    dtype = q.dtype
    tensors = {name: tensor.to(torch.float64) for name, tensor in tensors.items()}
    sparse = tuple(t for t in tensors.values() if t.layout is not torch.strided)
    patterns: tuple[Pattern, Pattern] = (Dense(), Dense())
    if sparse:
        (tensors["P"], of_P), (tensors["A"], of_A) = (entries_of(where, name, tensors[name]) for name in ("P", "A"))
        tensors["P"], of_P = symmetric_entries(tensors["P"], of_P)
        patterns = of_P, of_A
    else:
        tensors["P"] = (tensors["P"] + tensors["P"].mT) / 2  # only the symmetric part counts
    own = {"P": patterns[0].axes, "q": 1, "A": patterns[1].axes, "b": 1}
    made, levels = _batched(where, tensors, own)
    return Arguments(made, patterns, n, m, dtype, levels, sparse)


def _batched(
    where: str, tensors: dict[str, torch.Tensor], own: dict[str, int]
) -> tuple[tuple[torch.Tensor, ...], tuple[Level, ...]]:
    """Return the tensors without batch axes of size one that others repeat, and the levels: which axes each carries."""
    leading = {name: tensors[name].shape[: tensors[name].ndim - own[name]] for name in _NAMES}
    batch = batch_of(where, leading)
    carried = {name: [1] * (len(batch) - len(leading[name])) + list(leading[name]) for name in _NAMES}
    made = []
    for name in _NAMES:
        kept = [size for size, whole in zip(carried[name], batch, strict=True) if size == whole != 1]
        made.append(tensors[name].reshape(*kept, *tensors[name].shape[tensors[name].ndim - own[name] :]))
    levels = tuple(
        Level(size, tuple(carried[name][axis] == size != 1 for name in _NAMES))
        for axis, size in reversed(list(enumerate(batch)))
    )
    return tuple(made), levels
