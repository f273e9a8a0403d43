"""Read data to clean: scikit-learn's digits, a CSV file with a target column, or a folder of images by class.

Input that cannot be used raises :class:`DataError` in one sentence.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bilevel.cli.encoding import Encoding, encoder
from bilevel.cli.pictures import read_picture
from bilevel.cli.table import DataError, parse, plain, read_table, split_target

__all__ = ["DIGITS", "IMAGE_SIZE", "DataError", "LabelledData", "load", "numbered_like"]

DIGITS = "digits"
"""The name of the bundled data set."""

IMAGE_SIZE = 28
"""Images of a folder are resized to so many pixels on a side."""

_LARGEST = 1e150
"""The squares of larger numbers, of which deviations are made, overflow."""

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


@dataclass(frozen=True, eq=False)
class LabelledData:
    """Examples with the labels that are to be examined.

    Parameters
    ----------
    name
        For tables and files.
    inputs
        float64 (n, features), or float32 (n, channels, size, size) with values in [0, 1] for images.
    labels
        int64 (n,): class numbers.
    classes
        Class names in the order of their numbers.
    rows
        What to call each example: its line in the file, its number, or its image file.
    header, cells
        The table in which cleaned data are written: column names, and the text of each row.
    target
        The column of the label in that table.
    encoding
        How columns of words and missing numbers became inputs; None if they were not encoded.
    """

    name: str
    inputs: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]
    rows: tuple[str, ...]
    header: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    target: int
    encoding: Encoding | None = None

    @property
    def images(self) -> bool:
        """Whether the inputs are images."""
        return self.inputs.ndim == 4


def load(
    source: str,
    *,
    target: str | None = None,
    ignore: Sequence[str] = (),
    image_size: int = IMAGE_SIZE,
    encode: bool | Encoding = False,
) -> LabelledData:
    """Load ``digits``, a CSV file or a folder of images.

    Parameters
    ----------
    source
        ``"digits"``, or the path of a CSV file (plain or packed by gzip) or of a folder ``class/image.png``.
    target
        The column of the labels in a CSV file.
    ignore
        Columns of a CSV file that are no features, such as names of the rows. Cleaned data hold them all the same.
    image_size
        Pixels on a side that the images of a folder are resized to.
    encode
        Whether a CSV file may have columns of words, and cells without a value; the encoding of another file is used for this one.

    Raises
    ------
    DataError
        If there is no such data set, or it cannot be used.
    """
    if source != DIGITS and os.path.isfile(source):
        return _read_csv(Path(source), target, ignore, encode)
    if target is not None or ignore or encode:
        if source != DIGITS and not os.path.isdir(source):
            return _read_csv(Path(source), target, ignore, encode)  # which says that there is no such file
        option = "--target" if target is not None else "--ignore" if ignore else "--encode"
        why = "its labels already" if target is not None else "no columns"
        raise DataError(f"{source} has {why}; leave {option} out, or pass a CSV file")
    if source == DIGITS:
        return _digits()
    if os.path.isdir(source):
        return _read_folder(Path(source), image_size)
    if Path(source).suffix:
        return _read_csv(Path(source), target, ignore, encode)
    raise DataError(
        f"there is no data set, file or folder called {source!r}; pass {DIGITS}, a CSV file or a folder of images by class"
    )


def numbered_like(trusted: LabelledData, data: LabelledData) -> LabelledData:
    """Return ``trusted`` with the class numbers of ``data``.

    Raises
    ------
    DataError
        If its inputs have another form, or it has a class that ``data`` has not.
    """
    if trusted.inputs.shape[1:] != data.inputs.shape[1:] or (not data.images and trusted.header != data.header):
        raise DataError(
            f"the trusted set {trusted.name} has other columns or images than {data.name}; give both the same form"
        )
    unknown = [name for name in trusted.classes if name not in data.classes]
    if unknown:
        raise DataError(
            f"the trusted set {trusted.name} has the class {unknown[0]!r}, which {data.name} has not; correct the label"
        )
    number = torch.tensor([data.classes.index(name) for name in trusted.classes])
    return LabelledData(
        trusted.name, trusted.inputs, number[trusted.labels], data.classes, trusted.rows, trusted.header, trusted.cells,
        trusted.target,
    )  # fmt: skip


def _digits() -> LabelledData:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    pixels = np.asarray(bunch.data)
    cells = tuple(
        (*(f"{pixel:g}" for pixel in row), str(label)) for row, label in zip(pixels, bunch.target, strict=True)
    )
    return LabelledData(
        DIGITS,
        torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8),
        labels,
        tuple(map(str, range(10))),
        tuple(map(str, range(len(labels)))),
        (*(f"pixel_{i}_{j}" for i in range(8) for j in range(8)), "label"),
        cells,
        64,
    )


def _read_csv(path: Path, target: str | None, ignore: Sequence[str], encode: bool | Encoding) -> LabelledData:
    table = read_table(path)
    read = encoder(encode)
    _, inputs, cells = split_target(table, target, ignore, read or plain)
    assert target is not None  # or split_target had raised
    _check_spelling(cells, f"{path}: target {target!r}")
    numbers, classes = _numbered(cells, f"{path}: target {target!r}")
    if (np.abs(inputs) > _LARGEST).any():
        i, j = np.argwhere(np.abs(inputs) > _LARGEST)[0]
        raise DataError(
            f"{path}: line {table.rows[i].line} holds {inputs[i, j]:g}, beyond {_LARGEST:g}; rescale the column"
        )
    return LabelledData(
        Path(path.name.removesuffix(".gz")).stem,
        torch.from_numpy(inputs),
        numbers,
        classes,
        tuple(f"line {row.line}" for row in table.rows),
        tuple(table.header),
        tuple(tuple(row.cells) for row in table.rows),
        table.header.index(target),
        None if read is None else read.encoding,
    )


def _read_folder(folder: Path, size: int) -> LabelledData:
    if size < 2:
        raise DataError(f"expected an image size of at least 2, got {size}; pass for example --image-size {IMAGE_SIZE}")
    try:
        files = sorted(
            file
            for kind in folder.iterdir()
            if kind.is_dir() and not kind.name.startswith(".")
            for file in _images_in(kind)
        )
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}); pass a folder that can") from None
    if not files:
        raise DataError(f"{folder} holds no images in folders by class; arrange them as {folder}/CLASS/IMAGE.png")
    numbers, classes = _numbered([file.parent.name for file in files], str(folder))
    names = tuple(str(file.relative_to(folder)) for file in files)
    return LabelledData(
        folder.resolve().name,
        _images(files, size),
        numbers,
        classes,
        names,
        ("file", "label"),
        tuple((name, file.parent.name) for name, file in zip(names, files, strict=True)),
        1,
    )


def _images_in(kind: Path) -> list[Path]:
    """Return the images of one class; raise :class:`DataError` if there are others in folders within it, which would be left out."""
    found = [file for file in kind.iterdir() if _is_image(file.name)]
    for inner, _, names in os.walk(kind):
        place = Path(inner)
        hidden = any(part.startswith(".") for part in place.relative_to(kind).parts)
        deeper = [] if place == kind or hidden else sorted(filter(_is_image, names))
        if deeper:
            raise DataError(
                f"{place / deeper[0]} lies deeper than {kind.parent}/CLASS/IMAGE.png; move images into the folder of their class, or pass "
                f"the folder {kind}"
            )
    return found


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in _SUFFIXES and not name.startswith(".")


def _images(files: Sequence[Path], size: int) -> torch.Tensor:
    """Return the images (n, channels, size, size) in [0, 1]: one channel if all are grey, else three."""
    _check_memory(len(files), size)
    pictures, unreadable = [], []
    for file in files:
        resized = read_picture(file, str(file), size)
        if resized is None:
            unreadable.append(file)
            continue
        pictures.append(np.asarray(resized, dtype=np.float32) / 255)
    if unreadable:
        others = f", and neither are {len(unreadable) - 1} others" if len(unreadable) > 1 else ""
        raise DataError(
            f"{unreadable[0]} is not an image that can be read{others}; repair or remove {'them' if others else 'it'}"
        )
    colour = any(picture.ndim == 3 for picture in pictures)
    stacked = [
        np.repeat(picture[None], 3 if colour else 1, axis=0) if picture.ndim == 2 else picture.transpose(2, 0, 1)
        for picture in pictures
    ]
    return torch.from_numpy(np.ascontiguousarray(np.stack(stacked)))


def _check_memory(files: int, size: int) -> None:
    """Raise :class:`DataError` if the images need more than the memory of the machine; the process would be killed."""
    names = getattr(os, "sysconf_names", {})
    if not {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= set(names):
        return
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = files * 3 * size**2 * 4 * 2  # three channels in float32, and a copy
    if needed > available:
        raise DataError(
            f"{files} images of {size} x {size} pixels need {needed / 1e9:.0f} GB, more than this machine's {available / 1e9:.0f} GB; lower "
            "--image-size"
        )


def _check_spelling(labels: Sequence[str], where: str) -> None:
    """Raise :class:`DataError` if one number is written in two ways, such as 1 and 1.0, which would be two classes."""
    spelling: dict[float, str] = {}
    for label in labels:
        number = parse(label)
        if number is not None and spelling.setdefault(number, label) != label:
            raise DataError(
                f"{where} holds {spelling[number]!r} and {label!r}, which are one number; write it in one way"
            )


def _numbered(labels: Sequence[str], where: str) -> tuple[torch.Tensor, tuple[str, ...]]:
    """Return the class numbers of ``labels``, and the names of the classes."""
    names, numbers = np.unique(np.array(labels, dtype=np.str_), return_inverse=True)
    if len(names) < 2:
        raise DataError(f"{where} has one value only, {names[0]}; there is nothing to predict")
    if len(names) > max(len(labels) / 3, 2):
        raise DataError(
            f"{where} has {len(names)} different values in {len(labels)} rows, too many for classes; pass data with a few classes"
        )
    return torch.from_numpy(numbers.astype(np.int64)), tuple(str(name) for name in names)
