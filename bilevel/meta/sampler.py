"""N-way K-shot tasks drawn at random, seeded, resumable, and sharable between processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

import bilevel
from bilevel.meta.distortion import Distortion
from bilevel.meta.images import LabelledImages
from bilevel.meta.seeds import seeded
from bilevel.meta.tasks import Tasks

__all__ = ["FewShotSampler", "Sampler"]


class Sampler(Protocol):
    """A source of random tasks, of image classification or sinusoids."""

    generator: torch.Generator

    def sample(self, tasks: int, *, rank: int = 0, world: int = 1) -> Tasks:
        """Return every ``world``-th of ``tasks`` tasks, beginning with number ``rank``."""


@dataclass(frozen=True, eq=False)
class _Draw:
    classes: torch.Tensor  # (tasks, ways), with turned and mirrored ones counted as classes
    examples: torch.Tensor  # (tasks, ways, shots + queries): which of its class's images
    maps: torch.Tensor | None  # (tasks, ways, shots + queries, 2, 3): from where in its source each pixel comes


class FewShotSampler:
    """Draw N-way K-shot tasks from labelled images: N classes, K support and Q query images of each, labelled 0 … N − 1.

    Parameters
    ----------
    data
        :class:`LabelledImages`, a ``Dataset`` of (image, label), or an array (N, ...) with ``labels``.
    labels
        (N,) integers, for an array.
    ways, shots, queries
        Classes in a task; support and query images of each class.
    rotations
        Take each class turned by 90, 180 and 270 degrees as a class of its own.
    mirrors
        Take each class mirrored, and mirrored and turned, as a class of its own.
    groups
        The number of random groups of classes, such as alphabets, that the classes of a task are drawn from. If they have fewer classes than
        ``ways``, further groups are added. All classes of a task are turned and mirrored alike. Such classes are harder to tell apart. None: from
        all groups, each class turned by itself.
    distortion
        Random affine maps of the images, which then have to be uint8, or floating-point in [0, 1].
    seed
        The seed of the draws.
    device, dtype
        Those of the images returned. uint8 images are scaled to [0, 1].

    Attributes
    ----------
    generator
        Where the draws come from; its ``get_state()`` resumes them.

    Raises
    ------
    bilevel.ArgumentError
        If there are fewer classes than ways, a class has fewer images than shots + queries, or images cannot be distorted.
    bilevel.ShapeError
        If images that are to be distorted are no images.

    Examples
    --------
    >>> import torch
    >>> sampler = FewShotSampler(torch.rand(60, 8, 8), labels=[n // 10 for n in range(60)], ways=5, shots=1, queries=3)
    >>> tasks = sampler.sample(4)
    >>> tasks.support_x.shape, tasks.support_y[0].tolist(), tasks.query_x.shape
    (torch.Size([4, 5, 1, 8, 8]), [0, 1, 2, 3, 4], torch.Size([4, 15, 1, 8, 8]))
    """

    def __init__(
        self,
        data: Any,
        labels: Any = None,
        *,
        ways: int,
        shots: int,
        queries: int,
        rotations: bool = False,
        mirrors: bool = False,
        groups: int | None = None,
        distortion: Distortion | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        _check_sizes(ways, shots, queries, groups)
        self.data = LabelledImages.of(data, labels)
        if distortion:
            _check_images(self.data.images)
        self.ways, self.shots, self.queries = ways, shots, queries
        self.turns, self.variants = 4 if rotations else 1, (4 if rotations else 1) * (2 if mirrors else 1)
        self.groups, self.distortion = groups, distortion
        self.dtype = dtype
        counts = torch.bincount(self.data.labels, minlength=self.data.classes)
        classes = self.data.classes * (self.variants if groups is None else 1)
        if classes < ways:
            raise bilevel.ArgumentError(
                f"FewShotSampler: expected at least {ways} classes for {ways} ways, got {classes}; take fewer ways or more data"
            )
        if int(counts.min()) < shots + queries:
            poorest = self.data.names[int(counts.argmin())]
            raise bilevel.ArgumentError(
                f"FewShotSampler: expected every class to have {shots} + {queries} images for shots and queries, and class "
                f"{poorest} has {int(counts.min())}; take fewer queries"
            )
        self._counts = counts
        # Which classes are in which group, (groups, classes).
        self._members = (
            None
            if groups is None
            else torch.tensor([[g == name for g in self.data.groups] for name in sorted(set(self.data.groups))])
        )
        # Images in the order of their classes, so that an image is its class's first plus a number.
        order = torch.argsort(self.data.labels, stable=True)
        self._images = self.data.images[order].to(device)
        self._first = torch.cumsum(counts, 0) - counts
        self.generator = seeded("FewShotSampler: ", seed)

    def sample(self, tasks: int, *, rank: int = 0, world: int = 1) -> Tasks:
        """Return tasks: support_x (T, ways · shots, C, H, W) and so on; ``world`` processes with one seed share ``tasks``.

        Parameters
        ----------
        tasks
            The number of tasks that are drawn.
        rank, world
            Of the tasks drawn, those with number rank, rank + world, … are returned.
        """
        drawn = self._draw(tasks)
        maps = None if drawn.maps is None else drawn.maps[rank::world]
        return self._gather(_Draw(drawn.classes[rank::world], drawn.examples[rank::world], maps))

    def _draw(self, tasks: int) -> _Draw:
        chosen = self._draw_classes(tasks)
        counts = self._counts[chosen % self.data.classes]
        most = int(self._counts.max())
        scores = torch.rand(tasks, self.ways, most, generator=self.generator)
        scores = scores.masked_fill(torch.arange(most) >= counts.unsqueeze(-1), -1.0)
        examples = scores.topk(self.shots + self.queries, dim=-1).indices
        shape = (tasks, self.ways, self.shots + self.queries)
        maps = self.distortion.draw(shape, self.generator) if self.distortion else None
        return _Draw(chosen, examples, maps)

    def _draw_classes(self, tasks: int) -> torch.Tensor:
        """Return the classes (tasks, ways): the number of the class, plus ``data.classes`` for each variant before its own."""
        if self.groups is None or self._members is None:
            scores = torch.rand(tasks, self.data.classes * self.variants, generator=self.generator)
            return scores.topk(self.ways, dim=-1).indices
        order = torch.rand(tasks, len(self._members), generator=self.generator).argsort(dim=-1)
        sizes = self._members.sum(dim=-1)[order]  # (tasks, groups)
        taken = (torch.arange(len(self._members)) < self.groups) | (sizes.cumsum(-1) - sizes < self.ways)
        inside = (self._members[order] & taken.unsqueeze(-1)).any(dim=1)  # (tasks, classes)
        scores = torch.rand(tasks, self.data.classes, generator=self.generator).masked_fill(~inside, -1.0)
        variant = torch.randint(self.variants, (tasks, 1), generator=self.generator)
        return scores.topk(self.ways, dim=-1).indices + self.data.classes * variant

    def _gather(self, drawn: _Draw) -> Tasks:
        bases = drawn.classes % self.data.classes
        where = (self._first[bases].unsqueeze(-1) + drawn.examples).to(self._images.device)
        images = self._images[where]  # (T, ways, shots + queries, ...)
        images = images.to(self.dtype) / 255 if images.dtype == torch.uint8 else images.to(self.dtype)
        if self._images.ndim == 3:
            images = images.unsqueeze(3)  # (T, ways, examples, 1, H, W)
        variant = (drawn.classes // self.data.classes).to(images.device)
        for number in range(1, self.variants):
            these = variant == number
            side = images[these].flip(-1) if number >= self.turns else images[these]
            images[these] = torch.rot90(side, number % self.turns, (-2, -1))
        if drawn.maps is not None:
            images = Distortion.apply(drawn.maps.to(images.device), images)
        support, query = images[:, :, : self.shots], images[:, :, self.shots :]
        return Tasks(support.flatten(1, 2), self._labels(support), query.flatten(1, 2), self._labels(query))

    def _labels(self, images: torch.Tensor) -> torch.Tensor:
        tasks, ways, examples = images.shape[:3]
        return torch.arange(ways, device=images.device).repeat_interleave(examples).expand(tasks, -1)


def _check_sizes(ways: int, shots: int, queries: int, groups: int | None) -> None:
    for name, number, least in (("ways", ways, 2), ("shots", shots, 1), ("queries", queries, 1)):
        if not isinstance(number, int) or number < least:
            raise bilevel.ArgumentError(
                f"FewShotSampler: expected {name} to be a whole number >= {least}, got {number!r}; write for example {name}=5"
            )
    if groups is not None and (not isinstance(groups, int) or groups < 1):
        raise bilevel.ArgumentError(
            f"FewShotSampler: expected groups to be a whole number >= 1, got {groups!r}; leave it out to draw from all groups"
        )


def _check_images(images: torch.Tensor) -> None:
    """Raise unless ``images`` can be distorted."""
    if images.ndim not in (3, 4):
        raise bilevel.ShapeError(
            f"FewShotSampler: expected images (N, H, W) or (N, C, H, W) for a distortion, got {tuple(images.shape)}; leave distortion out"
        )
    if images.dtype != torch.uint8 and len(images) and not (float(images.min()) >= 0 and float(images.max()) <= 1):
        raise bilevel.ArgumentError(
            f"FewShotSampler: expected images in [0, 1] for a distortion, got {images.dtype} from {float(images.min()):.4g} to "
            f"{float(images.max()):.4g}; scale them, or leave distortion out"
        )
