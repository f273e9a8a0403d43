"""Random dtypes, shapes, tensors and pytrees: the inputs of a problem, without the problem."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st

__all__ = ["batch_sizes", "dtypes", "generators", "shapes", "tensors", "trees"]

_F64 = torch.float64


def dtypes() -> st.SearchStrategy[torch.dtype]:
    """Draw float64 or float32.

    Returns
    -------
    hypothesis.strategies.SearchStrategy
        Of ``torch.dtype``.

    Examples
    --------
    >>> from hypothesis import find
    >>> drawn = find(dtypes(), lambda drawn: drawn.itemsize == 4)
    >>> drawn
    torch.float32
    """
    return st.sampled_from([torch.float64, torch.float32])


def batch_sizes(most: int = 4) -> st.SearchStrategy[int]:
    """Draw how many problems: 1 to ``most``.

    Parameters
    ----------
    most
        The largest number.

    Returns
    -------
    hypothesis.strategies.SearchStrategy
        Of int.

    Examples
    --------
    >>> from hypothesis import find
    >>> drawn = find(batch_sizes(), lambda drawn: drawn > 1)
    >>> drawn
    2
    """
    return st.integers(1, most)


def shapes(*, most_axes: int = 3, longest: int = 3, empty: bool = True) -> st.SearchStrategy[tuple[int, ...]]:
    """Draw shapes: (), empty ones, axes of length one, and others.

    Parameters
    ----------
    most_axes, longest
        Bounds.
    empty
        Whether an axis may have length 0.

    Returns
    -------
    hypothesis.strategies.SearchStrategy
        Of tuples of int.

    Examples
    --------
    >>> from hypothesis import find
    >>> drawn = find(shapes(), lambda drawn: len(drawn) == 2)
    >>> drawn
    (0, 0)
    """
    return st.lists(st.integers(0 if empty else 1, longest), max_size=most_axes).map(tuple)


@st.composite
def tensors(
    draw: st.DrawFn,
    shape: Sequence[int] | st.SearchStrategy[tuple[int, ...]],
    *,
    dtype: torch.dtype = _F64,
    scale: float = 1.0,
) -> torch.Tensor:
    """Draw a tensor of normal numbers times ``scale``.

    Parameters
    ----------
    shape
        Of the tensor, or a strategy that draws one.
    dtype
        Of the tensor.
    scale
        The standard deviation.

    Returns
    -------
    hypothesis.strategies.SearchStrategy
        Of ``torch.Tensor``.

    Examples
    --------
    >>> from hypothesis import find
    >>> drawn = find(tensors((2, 3)), lambda drawn: True)
    >>> tuple(drawn.shape), drawn.dtype
    ((2, 3), torch.float64)
    """
    drawn = draw(shape) if isinstance(shape, st.SearchStrategy) else tuple(shape)
    return scale * torch.randn(drawn, generator=draw(generators()), dtype=_F64).to(dtype)


@st.composite
def trees(draw: st.DrawFn, *, size: int | None = None, most_leaves: int = 4, dtype: torch.dtype = _F64) -> Any:
    """Draw a pytree of tensors: dicts, lists and tuples, nested, whose leaves may be 0-d, empty, or have axes of length one.

    Parameters
    ----------
    size
        How many numbers in all; any if None.
    most_leaves
        How many tensors.
    dtype
        Of all.

    Returns
    -------
    hypothesis.strategies.SearchStrategy
        Of pytrees.

    Examples
    --------
    >>> from hypothesis import find
    >>> drawn = find(trees(size=3), lambda drawn: isinstance(drawn, torch.Tensor))
    >>> tuple(drawn.shape)
    (3,)
    """
    if size is None:
        shaped = draw(st.lists(shapes(), min_size=1, max_size=most_leaves))
    else:
        cuts = sorted(draw(st.lists(st.integers(0, size), max_size=most_leaves - 1)))
        lengths = [b - a for a, b in zip([0, *cuts], [*cuts, size], strict=True)]
        shaped = [draw(_shape_of(length)) for length in lengths]
    generator = draw(generators())
    leaves = [torch.randn(shape, generator=generator, dtype=_F64).to(dtype) for shape in shaped]
    return draw(_nested(leaves))


def _shape_of(length: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Draw a shape of ``length`` entries."""
    flat: list[tuple[int, ...]] = [(length,), (1, length), (length, 1)]
    flat += [()] if length == 1 else [(2, length // 2)] if length and length % 2 == 0 else []
    flat += [(0, 3)] if length == 0 else []
    return st.sampled_from(flat)


@st.composite
def _nested(draw: st.DrawFn, leaves: list[torch.Tensor]) -> Any:
    if len(leaves) == 1 and draw(st.booleans()):
        return leaves[0]
    parts: list[Any] = list(leaves)
    if len(leaves) > 1 and draw(st.booleans()):
        cut = draw(st.integers(1, len(leaves) - 1))
        parts = [draw(_nested(leaves[:cut])), draw(_nested(leaves[cut:]))]
    kind = draw(st.sampled_from([list, tuple, dict]))
    if kind is dict:
        return {f"part{number}": part for number, part in enumerate(parts)}
    return kind(parts)


def generators() -> st.SearchStrategy[torch.Generator]:
    return st.integers(0, 2**31 - 1).map(lambda seed: torch.Generator().manual_seed(seed))
