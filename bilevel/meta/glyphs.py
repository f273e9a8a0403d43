"""Synthetic characters drawn here: any number of classes, each a few curved strokes, each image by a shakier hand."""

from __future__ import annotations

import math

import torch

import bilevel
from bilevel.meta.images import LabelledImages
from bilevel.meta.seeds import seeded

__all__ = ["draw_glyphs"]

_MOST_STROKES = 4
_POINTS = 40  # along each stroke
_ALPHABET = 20  # classes that share a group
_WIDEST = 0.03  # by which pens differ


def draw_glyphs(classes: int, examples: int = 20, *, size: int = 28, seed: int = 0) -> LabelledImages:
    """Draw ``classes`` characters, ``examples`` times each.

    A character is two to four strokes, quadratic Bézier curves, two of which may join. An example of it has its points
    moved a little, is turned, scaled, sheared and shifted a little, and is drawn by a pen of some width.

    Parameters
    ----------
    classes, examples
        How many characters, and images of each.
    size
        Pixels on a side.
    seed
        The same seed draws the same images; a class looks the same whatever the number of classes.

    Returns
    -------
    LabelledImages
        uint8 (classes · examples, size, size), ink 255; groups of 20 classes.

    Raises
    ------
    bilevel.ArgumentError
        If a number is not positive.

    Examples
    --------
    >>> glyphs = draw_glyphs(3, 2)
    >>> glyphs.images.shape, glyphs.labels.tolist()
    (torch.Size([6, 28, 28]), [0, 0, 1, 1, 2, 2])
    """
    for name, number in (("classes", classes), ("examples", examples), ("size", size)):
        if not isinstance(number, int) or number < 1:
            raise bilevel.ArgumentError(
                f"draw_glyphs: expected {name} to be a whole number > 0, got {number!r}; write for example {name}=20"
            )
    images = []
    for number in range(classes):
        # A generator for each class: more classes do not change the first ones.
        generator = seeded("draw_glyphs: ", seed * 1_000_003 + number)
        images.append(_draw(_character(generator), examples, size, generator))
    labels = torch.arange(classes).repeat_interleave(examples)
    names = tuple(f"glyph {number}" for number in range(classes))
    groups = tuple(f"alphabet {number // _ALPHABET}" for number in range(classes))
    return LabelledImages(torch.cat(images), labels, names, groups)


def _character(generator: torch.Generator) -> torch.Tensor:
    """Return the control points (strokes, 3, 2) in the square [−1, 1]²."""
    strokes = int(torch.randint(2, _MOST_STROKES + 1, (), generator=generator))
    points = 1.6 * torch.rand(strokes, 3, 2, generator=generator) - 0.8
    # A bend of moderate size between two ends that lie apart.
    ends = points[:, 2] - points[:, 0]
    short = ends.norm(dim=-1, keepdim=True) < 0.6
    points[:, 2] = torch.where(short, -points[:, 0], points[:, 2])
    joined = torch.rand(strokes, generator=generator) < 0.5
    for stroke in range(1, strokes):
        if joined[stroke]:
            points[stroke, 0] = points[stroke - 1, 2]
    return points


def _draw(character: torch.Tensor, examples: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Return uint8 images (examples, size, size)."""
    shaken = character + 0.06 * torch.randn(examples, *character.shape, generator=generator)
    angle = math.radians(8) * torch.randn(examples, generator=generator)
    scale = 1 + 0.08 * torch.randn(examples, 2, generator=generator)
    shear = 0.1 * torch.randn(examples, generator=generator)
    shift = 0.06 * torch.randn(examples, 1, 1, 2, generator=generator)
    cos, sin = angle.cos(), angle.sin()
    turn = torch.stack([torch.stack([cos, shear - sin], -1), torch.stack([sin, cos], -1)], -2) * scale.unsqueeze(-2)
    placed = torch.einsum("eij,eskj->eski", turn, shaken) + shift
    t = torch.linspace(0, 1, _POINTS).reshape(1, 1, -1, 1)
    a, b, c = (placed[:, :, k : k + 1] for k in range(3))
    curve = ((1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c).flatten(1, 2)  # (examples, strokes · points, 2)
    pixel = 2.4 / size  # the square [−1.2, 1.2]² fills the image
    width = 0.06 + _WIDEST * torch.rand(examples, 1, generator=generator)
    distance = _distances(curve, size, pixel)
    ink = ((width + pixel / 2 - distance) / pixel).clamp(0, 1)
    return (255 * ink).round().to(torch.uint8).reshape(examples, size, size)


def _distances(curve: torch.Tensor, size: int, pixel: float) -> torch.Tensor:
    """Return how far each pixel is from the nearest point of ``curve`` (examples, points, 2), as far as a pen reaches."""
    reach = int((0.06 + _WIDEST) / pixel) + 2
    around = torch.arange(-reach, reach + 1)
    offsets = torch.stack(torch.meshgrid(around, around, indexing="xy"), -1).reshape(-1, 2)
    nearest = ((curve + 1.2) / pixel).floor().long().unsqueeze(-2) + offsets  # (examples, points, pixels near it, 2)
    centres = (nearest + 0.5) * pixel - 1.2
    apart = (centres - curve.unsqueeze(-2)).norm(dim=-1)
    inside = ((nearest >= 0) & (nearest < size)).all(dim=-1)
    flat = (nearest[..., 1] * size + nearest[..., 0]).clamp(0, size * size - 1)
    far = torch.full((len(curve), size * size), 10.0)
    apart = torch.where(inside, apart, torch.full_like(apart, 10.0))
    return far.scatter_reduce(1, flat.flatten(1), apart.flatten(1), "amin")
