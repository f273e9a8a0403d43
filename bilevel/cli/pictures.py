"""Bring pictures of any depth to eight bits, as viewers show them.

Pillow's own conversion of grey pictures of 16 bits makes all of them white, and of floating-point ones black. That of transparent ones
shows the colours that are not to be seen, and that of photographs leaves them lying on their side.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from bilevel.cli.table import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["eight_bits", "read_picture"]


def read_picture(source: Path | IO[bytes], where: str, size: int, *, grey: bool = False) -> Image | None:
    """Return the picture in ``source``, of eight bits a channel and ``size`` pixels on a side; None if it cannot be read.

    Parameters
    ----------
    source
        The file.
    where
        The file's name, for the message.
    size
        The width and height in pixels.
    grey
        Whether colours become grey.

    Raises
    ------
    DataError
        As :func:`eight_bits`.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of damaged metadata and of large images
            with Image.open(source) as picture:
                shown = eight_bits(picture, where)
                return (shown.convert("L") if grey else shown).resize((size, size), Image.Resampling.LANCZOS)
    except DataError:
        raise
    except Exception:  # Damaged bytes raise whatever Pillow's readers meet, struct.error and TypeError too.
        return None


def eight_bits(picture: Image, where: str) -> Image:
    """Return ``picture`` upright and on white, with eight bits a channel: in mode "L" if it is grey, else in "RGB".

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

    picture, form = _upright(picture), picture.format
    if picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or (
        "transparency" in picture.info and picture.mode[0] != "I"
    ):
        picture = _on_white(picture)
    if picture.mode not in ("1", "L", "LA", "I", "F") and not picture.mode.startswith("I;16"):
        return picture.convert("RGB")
    sixteen = picture.mode.startswith("I;16") or (picture.mode == "I" and form == "PNG")
    if sixteen:  # older versions of Pillow read a PNG of 16 bits as one of 32
        levels = np.asarray(picture).astype(np.float32) / 257
        return Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise DataError(
            f"{where} has pixels of 32 bits, whose range is not known; save it with 8 or 16 bits for each pixel"
        )
    return picture.convert("L")


def _upright(picture: Image) -> Image:
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # Damaged metadata raise whatever Pillow's readers meet, and say nothing of the orientation.
        return picture


def _on_white(picture: Image) -> Image:
    from PIL import Image

    coloured = picture.convert("RGBA")
    shown = Image.alpha_composite(Image.new("RGBA", coloured.size, "white"), coloured)
    return shown.convert("L" if picture.mode in ("1", "L", "LA", "La") else "RGB")
