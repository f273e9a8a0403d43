"""Bring pictures of any depth to eight bits, without cutting off what is brighter than 255.

Pillow's own conversion of grey pictures of 16 bits makes all of them white, and of floating-point ones black.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bilevel.cli.table import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["eight_bits"]


def eight_bits(picture: Image, where: str) -> Image:
    """Return ``picture`` with eight bits a channel: in mode "L" if it is grey, else in "RGB".

    Parameters
    ----------
    picture
        As opened.
    where
        Its name, for the message.

    Raises
    ------
    DataError
        If its numbers have no range that the format says: 32 bits, or floating point.
    """
    from PIL import Image

    if picture.mode not in ("1", "L", "LA", "I", "F") and not picture.mode.startswith("I;16"):
        return picture.convert("RGB")
    sixteen = picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PNG")
    if sixteen:  # older versions of Pillow read a PNG of 16 bits as one of 32
        levels = np.asarray(picture).astype(np.float32) / 257
        return Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise DataError(
            f"{where} has pixels of 32 bits, whose range is not known; save it with 8 or 16 bits for each pixel"
        )
    return picture.convert("L")
