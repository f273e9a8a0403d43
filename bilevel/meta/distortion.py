"""Random affine distortions of images: small turns, scales, shears and shifts, drawn from a generator that can be resumed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

import bilevel

__all__ = ["Distortion"]

# Standard deviations at strength 1. Shifts are in half widths of the image.
_ANGLE, _SCALE, _SHEAR, _SHIFT = math.radians(10), 0.1, 0.1, 0.07


@dataclass(frozen=True, kw_only=True)
class Distortion:
    """Random affine maps of images: one for a class of a task, which all its images share, and one for each image.

    The first kind makes classes that the data do not have. The second kind makes the images of a class differ more. At strength 1 the
    angle has a standard deviation of 10 degrees, each scale and the shear 0.1, and a shift 0.07 of half the image's width.

    Parameters
    ----------
    of_class, of_image
        The strengths: a factor of all standard deviations. 0 distorts nothing.

    Raises
    ------
    bilevel.ArgumentError
        If a strength is negative or not finite.

    Examples
    --------
    >>> import torch
    >>> distortion = Distortion(of_class=1.0)
    >>> maps = distortion.draw((2, 5, 3), torch.Generator().manual_seed(0))
    >>> maps.shape, torch.equal(maps[:, :, 0], maps[:, :, 1])
    (torch.Size([2, 5, 3, 2, 3]), True)
    """

    of_class: float = 0.0
    of_image: float = 0.0

    def __post_init__(self) -> None:
        for name in ("of_class", "of_image"):
            strength = getattr(self, name)
            number = isinstance(strength, (int, float)) and not isinstance(strength, bool)
            if not number or not 0 <= strength < math.inf:
                raise bilevel.ArgumentError(
                    f"Distortion: expected {name} to be a number >= 0, got {strength!r}; write for example {name}=1.0, or 0 for none"
                )

    def __bool__(self) -> bool:
        return bool(self.of_class or self.of_image)

    def draw(self, shape: tuple[int, int, int], generator: torch.Generator) -> torch.Tensor:
        """Return maps (tasks, ways, examples, 2, 3) of ``shape`` (tasks, ways, examples), as :func:`torch.nn.functional.affine_grid` takes them."""
        tasks, ways, examples = shape
        of_class = _draw((tasks, ways, 1), self.of_class, generator)
        of_image = _draw((tasks, ways, examples), self.of_image, generator)
        return (of_class @ of_image)[..., :2, :]

    @staticmethod
    def apply(maps: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Return floating-point ``images`` (..., C, H, W), in [0, 1], under ``maps`` (..., 2, 3); 0 comes in from outside."""
        flat = images.flatten(0, -4).to(torch.promote_types(images.dtype, maps.dtype))
        grid = nn.functional.affine_grid(maps.to(flat.dtype).reshape(-1, 2, 3), list(flat.shape), align_corners=False)
        # Linear interpolation would blur the training images alone.
        found = nn.functional.grid_sample(flat, grid, mode="bicubic", padding_mode="zeros", align_corners=False)
        return found.clamp(0, 1).to(images.dtype).reshape(images.shape)


def _draw(shape: tuple[int, ...], strength: float, generator: torch.Generator) -> torch.Tensor:
    """Return maps (*shape, 3, 3) in homogeneous coordinates."""
    angle, wide, high, shear, right, down = (strength * torch.randn(*shape, 6, generator=generator)).unbind(-1)
    angle, shear = _ANGLE * angle, _SHEAR * shear
    wide, high = (_SCALE * wide).exp(), (_SCALE * high).exp()
    cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    rows = (
        (wide * cos, high * (shear * cos - sin), _SHIFT * right),
        (wide * sin, high * (shear * sin + cos), _SHIFT * down),
        (zero, zero, one),
    )
    return torch.stack([torch.stack(row, -1) for row in rows], -2)
