"""Minibatches: what ``step`` is given, and a source of minibatches that can be resumed bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bilevel.errors import ArgumentError, ShapeError

__all__ = ["Batch", "BatchSource", "Microbatches", "Minibatches", "batch_key", "batch_parts"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """A minibatch with its number, for methods that remember something about each minibatch.

    Parameters
    ----------
    data
        The pytree that the objectives receive.
    index
        The number of the minibatch in a fixed partition of the data set: an int, or an int64 tensor with the rows of its samples.

    Examples
    --------
    >>> import torch
    >>> from bilevel.stochastic import Batch
    >>> Batch(index=3, data=torch.zeros(2)).index
    3
    """

    data: Any
    index: int | torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Microbatches:
    """Parts of one minibatch, evaluated one after the other to save memory; losses and derivatives are their means.

    Parameters
    ----------
    parts
        The batches that the objectives receive, one after the other.
    weights
        The share of each part in the mean; None: equal shares. Objectives are means over examples, so parts of different sizes
        need their shares.
    index
        The number of the whole minibatch, as in :class:`Batch`: an int, or an int64 tensor.

    Raises
    ------
    ArgumentError
        If there is no part, or not one weight for each part.

    Examples
    --------
    >>> import torch
    >>> from bilevel.stochastic import Microbatches
    >>> batch = Microbatches([torch.zeros(3, 2), torch.zeros(1, 2)], weights=[0.75, 0.25])
    >>> len(batch.parts)
    2
    """

    parts: Sequence[Any]
    weights: Sequence[float] | None = None
    index: int | torch.Tensor | None = None

    def __post_init__(self) -> None:
        if not len(self.parts):
            raise ArgumentError("Microbatches: expected at least one part, got none; pass a sequence of batches")
        if self.weights is not None and len(self.weights) != len(self.parts):
            raise ArgumentError(
                f"Microbatches: expected one weight for each of the {len(self.parts)} parts, got {len(self.weights)}; "
                "pass as many, or None for equal shares"
            )

    @staticmethod
    def split(data: Any, parts: int, index: int | torch.Tensor | None = None) -> Microbatches:
        """Split every tensor of ``data`` along its first axis into ``parts`` parts, weighted by their sizes.

        Examples
        --------
        >>> import torch
        >>> from bilevel.stochastic import Microbatches
        >>> Microbatches.split(torch.arange(5), 2).weights
        [0.6, 0.4]
        """
        leaves, structure = pytree.tree_flatten(data)
        sizes = {leaf.shape[0] if leaf.ndim else 0 for leaf in leaves if isinstance(leaf, torch.Tensor)}
        if len(sizes) != 1 or min(sizes) < parts:
            raise ShapeError(
                f"accumulate={parts}: expected every tensor of the batch to have the same first axis, of at least {parts} "
                f"examples, got first axes {sorted(sizes)}; pass Microbatches([...]) split by yourself"
            )
        size = sizes.pop()
        chunks = [leaf.tensor_split(parts) if isinstance(leaf, torch.Tensor) else [leaf] * parts for leaf in leaves]
        made = [pytree.tree_unflatten([chunk[place] for chunk in chunks], structure) for place in range(parts)]
        lengths = [len(part) for part in torch.arange(size).tensor_split(parts)]
        return Microbatches(made, [length / size for length in lengths], index)


class Minibatches(Iterator[Batch]):
    """An endless stream of minibatches of a fixed partition, in a new random order in each epoch.

    The data set is cut into ⌈n / size⌉ minibatches once, at random. Their numbers are the ``index`` of each :class:`Batch`.
    ``state_dict`` holds the place in the stream and the generator, so that a resumed run sees the same minibatches.

    Parameters
    ----------
    data
        A pytree of tensors (n, ...), one row for each example.
    size
        Examples in a minibatch; the last minibatch may have fewer.
    seed
        Of the partition and of the orders.

    Raises
    ------
    ShapeError, ArgumentError
        If the tensors have different numbers of rows, or ``size`` is not a positive integer.

    Examples
    --------
    >>> import torch
    >>> from bilevel.stochastic import Minibatches
    >>> stream = Minibatches(torch.arange(4), size=2, seed=0)
    >>> sorted(torch.cat([next(stream).data, next(stream).data]).tolist())
    [0, 1, 2, 3]
    """

    def __init__(self, data: Any, size: int, *, seed: int = 0) -> None:
        rows = {
            leaf.shape[0] if leaf.ndim else 0 for leaf in pytree.tree_leaves(data) if isinstance(leaf, torch.Tensor)
        }
        if len(rows) != 1 or 0 in rows:
            raise ShapeError(
                f"Minibatches: expected tensors with the same positive number of rows, got {sorted(rows)}; pass tensors (n, ...)"
            )
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ArgumentError(
                f"Minibatches: expected size to be a positive integer, got {size!r}; write for example size=32"
            )
        self.rows, self.size = rows.pop(), size
        self._generator = torch.Generator().manual_seed(seed)
        self._partition = torch.randperm(self.rows, generator=self._generator).split(size)
        self._data = data
        self._order: list[int] = []

    @property
    def count(self) -> int:
        """How many minibatches the partition has."""
        return len(self._partition)

    @property
    def full(self) -> Any:
        """The whole data set."""
        return self._data

    def __next__(self) -> Batch:
        if not self._order:
            self._order = torch.randperm(self.count, generator=self._generator).tolist()
        return self[self._order.pop()]

    def __getitem__(self, index: int) -> Batch:
        """Return minibatch number ``index``."""
        rows = self._partition[index]

        def taken(leaf: Any) -> Any:
            return leaf[rows.to(leaf.device)] if isinstance(leaf, torch.Tensor) else leaf

        return Batch(data=pytree.tree_map(taken, self._data), index=index)

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the stream; data are not part of it."""
        return {
            "partition": torch.cat(self._partition),
            "order": list(self._order),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict` of a stream of the same data and size."""
        if len(state["partition"]) != self.rows:
            raise ArgumentError(
                f"Minibatches: expected the state of a stream of {self.rows} rows, got one of {len(state['partition'])}; load it "
                "into a stream of the same data"
            )
        self._partition = state["partition"].split(self.size)
        self._order = list(state["order"])
        self._generator.set_state(state["generator"])


class BatchSource:
    """The data of ``step`` for one level: one batch, used for every draw, or an iterator, of which every draw is the next."""

    def __init__(self, given: Any, where: str, accumulate: int = 1) -> None:
        if isinstance(given, torch.utils.data.DataLoader):
            raise ArgumentError(
                f"{where}: expected a batch or an iterator of batches, got a DataLoader; pass a batch of it, or iter(loader)"
            )
        self._given, self._where, self._accumulate = given, where, accumulate

    @property
    def is_stream(self) -> bool:
        """Whether draws differ."""
        return isinstance(self._given, Iterator)

    def draw(self) -> Any:
        """Return a batch."""
        drawn = self._given
        if isinstance(drawn, Iterator):
            try:
                drawn = next(drawn)
            except StopIteration:
                raise ArgumentError(
                    f"{self._where}: expected an iterator that does not end, and it ended; pass itertools.cycle(...) of a list, or "
                    "bilevel.stochastic.Minibatches(...)"
                ) from None
        if self._accumulate > 1 and not isinstance(drawn, Microbatches):
            index = drawn.index if isinstance(drawn, Batch) else None
            return Microbatches.split(drawn.data if isinstance(drawn, Batch) else drawn, self._accumulate, index)
        return drawn


def batch_parts(batch: Any) -> list[tuple[float, Any]]:
    """Return the parts of a batch with their shares."""
    if isinstance(batch, Microbatches):
        count = len(batch.parts)
        weights = [1 / count] * count if batch.weights is None else batch.weights
        return list(zip(weights, batch.parts, strict=True))
    return [(1.0, batch.data if isinstance(batch, Batch) else batch)]


def batch_key(batch: Any) -> str:
    """Return what identifies a minibatch: its index, or the checksum of its content where it has none."""
    index = batch.index if isinstance(batch, (Batch, Microbatches)) else None
    if isinstance(index, torch.Tensor):
        return "samples " + hashlib.blake2b(index.cpu().long().numpy().tobytes(), digest_size=16).hexdigest()
    if index is not None:
        return f"batch {int(index)}"
    digest = hashlib.blake2b(digest_size=16)
    for _, data in batch_parts(batch):
        for leaf in pytree.tree_leaves(data):
            if isinstance(leaf, torch.Tensor):
                digest.update(f"{tuple(leaf.shape)} {leaf.dtype}".encode())
                digest.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            else:
                digest.update(repr(leaf).encode())
    return "content " + digest.hexdigest()
