"""Omniglot from its official zip files or folders, resized once and kept."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

import bilevel
from bilevel.cli.pictures import read_picture
from bilevel.meta.images import LabelledImages

__all__ = ["download_omniglot", "load_omniglot"]

_ADDRESS = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/"
_MD5 = {
    "images_background": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation": "6b91aef0f799c5bb55b94e3f2daec811",
}


def load_omniglot(path: str | Path, *, size: int = 28, cache: str | Path | None = None) -> LabelledImages:
    """Read the characters in a folder or zip file: the images ``alphabet/character/*.png``.

    Parameters
    ----------
    path
        ``images_background`` or ``images_evaluation``, as the official zip file or unpacked; a zip file in the folder
        is read too.
    size
        Pixels on a side that the 105 × 105 images are resized to.
    cache
        Folder that the resized images are kept in; by default the user's cache folder. A cache that cannot be written
        is done without.

    Returns
    -------
    LabelledImages
        uint8 (N, size, size) with ink 255; a class is a character, its group the alphabet.

    Raises
    ------
    bilevel.ArgumentError
        If there is no such path, no image in it, or an image cannot be read.

    References
    ----------
    Lake, Salakhutdinov, Tenenbaum, "Human-level concept learning through probabilistic program induction", Science 2015.
    """
    source = Path(path)
    if not source.exists():
        raise bilevel.ArgumentError(
            f"load_omniglot: expected a folder or zip file of alphabet/character/*.png, and {source} does not exist; "
            "check the path, or fetch the data with download_omniglot()"
        )
    kept = _cache_file(source, size, cache)
    if kept is not None and kept.is_file():
        try:
            return _unpack(kept)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            pass  # a cache cut off while it was written: read the source again
    data = _read(source, size)
    if kept is not None:
        _keep(data, kept)
    return data


def download_omniglot(part: str = "images_background", *, folder: str | Path | None = None) -> Path:
    """Download an official zip file, verify its checksum and return its path.

    A file that is there already is not downloaded again.

    Parameters
    ----------
    part
        ``"images_background"`` (964 characters) or ``"images_evaluation"`` (659).
    folder
        Where to keep it; by default the user's cache folder.

    Returns
    -------
    pathlib.Path
        The zip file.

    Raises
    ------
    bilevel.ArgumentError
        If there is no such part, or the file cannot be fetched.
    """
    import pooch

    if part not in _MD5:
        raise bilevel.ArgumentError(
            f"download_omniglot: expected part to be one of {', '.join(_MD5)}, got {part!r}; pass one of these names"
        )
    try:
        found = pooch.retrieve(
            f"{_ADDRESS}{part}.zip",
            known_hash=f"md5:{_MD5[part]}",
            fname=f"{part}.zip",
            path=folder or pooch.os_cache("bilevel"),
        )
    except (OSError, ValueError) as error:
        raise bilevel.ArgumentError(
            f"download_omniglot: {part}.zip could not be fetched ({type(error).__name__}: {error}); download it by hand and "
            "pass its path"
        ) from error
    return Path(found)


def _read(source: Path, size: int) -> LabelledImages:
    images: list[np.ndarray[Any, Any]] = []
    labels: list[int] = []
    names: list[str] = []
    numbers: dict[tuple[str, str], int] = {}
    for (alphabet, character), name, content in _files(source):
        number = numbers.setdefault((alphabet, character), len(numbers))
        if number == len(names):
            names.append(f"{alphabet}/{character}")
        grey = read_picture(io.BytesIO(content), f"load_omniglot: {source}: {name}", size, grey=True)
        if grey is None:
            raise bilevel.ArgumentError(
                f"load_omniglot: {source}: {name} is not an image that can be read; replace the file, or delete it"
            )
        images.append(255 - np.asarray(grey))
        labels.append(number)
    if not images:
        raise bilevel.ArgumentError(
            f"load_omniglot: expected alphabet/character/*.png in {source}, and there is no such file; pass "
            "images_background or images_evaluation, as zip file or unpacked"
        )
    return LabelledImages(
        torch.from_numpy(np.stack(images)),
        torch.tensor(labels),
        tuple(names),
        tuple(alphabet for alphabet, _ in numbers),
    )


def _files(source: Path) -> Iterator[tuple[tuple[str, str], str, bytes]]:
    """Yield (alphabet, character), name and content of each image, in the order of their names."""
    if source.is_dir():
        zips = sorted(source.glob("*.zip"))
        if zips and not any(item.is_dir() for item in source.iterdir()):
            for each in zips:
                yield from _files(each)
            return
        for file in sorted(source.rglob("*.png")):
            parts = file.relative_to(source.parent).parts
            if len(parts) >= 3:
                yield (parts[-3], parts[-2]), str(file), file.read_bytes()
        return
    try:
        with zipfile.ZipFile(source) as archive:
            for name in sorted(archive.namelist()):
                parts = PurePosixPath(name).parts
                if name.endswith(".png") and len(parts) >= 3 and parts[0] != "__MACOSX":
                    yield (parts[-3], parts[-2]), name, archive.read(name)
    except zipfile.BadZipFile as error:
        raise bilevel.ArgumentError(
            f"load_omniglot: {source} is neither a folder nor a zip file; pass the folder that holds the alphabets"
        ) from error


def _cache_file(source: Path, size: int, cache: str | Path | None) -> Path | None:
    """Return where the resized images of ``source``, as it is now, are kept."""
    if cache is None:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        cache = Path(base) / "bilevel"
    newest = source.stat()
    marks = [str(source.resolve()), str(size), str(newest.st_mtime_ns), str(newest.st_size)]
    if source.is_dir():  # a folder's own time does not tell of changes deeper down
        files = sorted(source.rglob("*.png")) + sorted(source.glob("*.zip"))
        marks += [f"{file.name} {file.stat().st_mtime_ns} {file.stat().st_size}" for file in files]
    digest = hashlib.sha256("\n".join(marks).encode()).hexdigest()[:16]
    return Path(cache) / f"omniglot-{size}-{digest}.npz"


def _keep(data: LabelledImages, file: Path) -> None:
    partial = file.with_name(f"{file.name}.{os.getpid()}.npz")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(
            partial, images=data.images.numpy(), labels=data.labels.numpy(), names=data.names, groups=data.groups
        )
        os.replace(partial, file)  # whole or not at all
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()


def _unpack(file: Path) -> LabelledImages:
    with np.load(file) as kept:
        return LabelledImages(
            torch.from_numpy(kept["images"]),
            torch.from_numpy(kept["labels"]),
            tuple(str(name) for name in kept["names"]),
            tuple(str(group) for group in kept["groups"]),
        )
