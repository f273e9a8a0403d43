"""Labelled images of many classes, and splits that keep classes, or whole groups of them, apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import bilevel
from bilevel.meta.seeds import seeded

__all__ = ["LabelledImages", "split_classes"]


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Images with class labels.

    Parameters
    ----------
    images
        (N, ...): uint8 with 255 for ink, or floating-point.
    labels
        int64 (N,), classes numbered from 0.
    names
        A name for each class.
    groups
        The group of each class, such as its alphabet.

    Raises
    ------
    bilevel.ShapeError
        If there are not as many labels as images, or a label has no name.

    Examples
    --------
    >>> import torch
    >>> from bilevel.meta import LabelledImages
    >>> data = LabelledImages(torch.zeros(3, 28, 28), torch.tensor([0, 0, 1]), ("alpha", "beta"), ("Greek", "Greek"))
    >>> data.classes
    2
    """

    images: torch.Tensor
    labels: torch.Tensor
    names: tuple[str, ...]
    groups: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.labels.ndim != 1 or len(self.labels) != len(self.images):
            raise bilevel.ShapeError(
                f"LabelledImages: expected one label for each of {len(self.images)} images, got {tuple(self.labels.shape)}; "
                "pass integers of shape (images,)"
            )
        if len(self.names) != len(self.groups) or (len(self.labels) and int(self.labels.max()) >= len(self.names)):
            raise bilevel.ShapeError(
                f"LabelledImages: expected a name and a group for each class, got {len(self.names)} names and "
                f"{len(self.groups)} groups for labels up to {int(self.labels.max())}; number the classes from 0"
            )

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.names)

    def select(self, classes: Sequence[int]) -> LabelledImages:
        """Return the images of ``classes`` alone, numbered anew in that order."""
        number = torch.full((self.classes,), -1, dtype=torch.int64)
        number[torch.as_tensor(list(classes), dtype=torch.int64)] = torch.arange(len(classes))
        labels = number[self.labels]
        kept = labels >= 0
        return LabelledImages(
            self.images[kept],
            labels[kept],
            tuple(self.names[c] for c in classes),
            tuple(self.groups[c] for c in classes),
        )

    @staticmethod
    def of(data: Any, labels: Any = None) -> LabelledImages:
        """Return an array (N, ...) with its labels (N,), or a ``Dataset`` of (image, label), as labelled images.

        Labels may be any integers; each becomes a class, and its own group.

        Raises
        ------
        bilevel.ArgumentError
            If labels are missing.
        """
        if isinstance(data, LabelledImages):
            return data
        if labels is None:
            try:
                items = [data[number] for number in range(len(data))]
                images = torch.stack([torch.as_tensor(np.asarray(item[0])) for item in items])
                labels = [int(item[1]) for item in items]
            except (TypeError, IndexError, ValueError) as error:
                raise bilevel.ArgumentError(
                    f"expected a Dataset of (image, label) with images of one shape, or an array and labels=..., got "
                    f"{type(data).__name__}; pass the labels beside the array"
                ) from error
        else:
            images = torch.as_tensor(np.asarray(data) if not isinstance(data, torch.Tensor) else data)
        values, numbered = torch.unique(torch.as_tensor(labels), return_inverse=True)
        names = tuple(str(int(value)) for value in values)
        return LabelledImages(images, numbered, names, names)


def split_classes(
    data: LabelledImages, held_out: int, *, seed: int = 0, by_group: bool = False
) -> tuple[LabelledImages, LabelledImages]:
    """Return ``data`` in two parts that share no class: all but the held-out classes, and those.

    Parameters
    ----------
    data
        What to split.
    held_out
        How many classes to hold out, or with ``by_group`` how many groups.
    seed
        Of the choice.
    by_group
        Hold out whole groups: alphabets, for Omniglot.

    Returns
    -------
    tuple
        The data without the held-out classes, and the data of the held-out classes.

    Raises
    ------
    bilevel.ArgumentError
        If there are not more classes, or groups, than are held out.

    Examples
    --------
    >>> import torch
    >>> data = LabelledImages.of(torch.zeros(6, 2, 2), labels=[3, 3, 5, 5, 7, 7])
    >>> rest, held = split_classes(data, 1)
    >>> rest.classes, held.classes, set(rest.names) & set(held.names)
    (2, 1, set())
    """
    units = sorted(set(data.groups)) if by_group else list(range(data.classes))
    if not 0 < held_out < len(units):
        raise bilevel.ArgumentError(
            f"split_classes: expected to hold out between 1 and {len(units) - 1} of {len(units)} "
            f"{'groups' if by_group else 'classes'}, got {held_out}; hold out fewer"
        )
    generator = seeded("split_classes: ", seed)
    order = torch.randperm(len(units), generator=generator).tolist()
    chosen = {units[place] for place in order[:held_out]}
    inside = [c for c in range(data.classes) if (data.groups[c] if by_group else c) in chosen]
    outside = [c for c in range(data.classes) if (data.groups[c] if by_group else c) not in chosen]
    return data.select(outside), data.select(inside)
