"""Files that the commands of ``bilevel`` leave behind: JSON and pictures, or one sentence why not."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import sys
import warnings
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bilevel

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

__all__ = [
    "OutputError",
    "console",
    "finite",
    "prepare_output",
    "printing",
    "save_figure",
    "save_figures",
    "versions",
    "write_document",
    "write_text",
]


class OutputError(bilevel.BilevelError, OSError):
    """The output directory cannot be written to."""


_WIDTH = 140
"""Columns where the output is not a terminal, whose width would be unknown."""


def console(*, stderr: bool) -> Console:
    """Return a console on standard output or standard error, of a fixed width where that is not a terminal."""
    from rich.console import Console

    made = Console(stderr=stderr, highlight=False)
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, width=_WIDTH)


@contextlib.contextmanager
def printing() -> Iterator[None]:
    """Turn failures to write to standard output in the ``with`` block into errors.

    Raises
    ------
    OutputError
        If the output cannot be written, for example on a full disk.
    SystemExit
        With status 1 and no message if the reader has closed the pipe, as in ``bilevel tune wine | head -1``.
    """
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        _discard()
        if isinstance(error, BrokenPipeError):
            raise SystemExit(1) from None
        raise OutputError(f"standard output cannot be written to ({error.strerror}); send it elsewhere") from None


def _discard() -> None:
    """Let go of what is left in the buffer of standard output, which Python would try again to write, and complain."""
    with contextlib.suppress(OSError):  # of a stream that is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def prepare_output(directory: Path) -> None:
    """Make the directory and try it, so that a run does not end in a file that cannot be written.

    Raises
    ------
    OutputError
        If it cannot be made or written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".bilevel-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(
            f"the output directory {directory} cannot be written to ({error.strerror}); pass another with --output"
        ) from None


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python, of this package and of ``packages``."""
    return {
        "python": platform.python_version(),
        "bilevel": bilevel.__version__,
        **{name: version(name) for name in packages},
    }


def finite(value: Any) -> Any:
    """Return ``value`` with None for the numbers in it that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_document(document: dict[str, Any], path: Path) -> None:
    """Write ``document`` as JSON.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    write_text(json.dumps(finite(document), indent=1, allow_nan=False) + "\n", path)


def write_text(text: str, path: Path) -> None:
    """Write ``text`` in UTF-8.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise _unwritable(path, error) from None


def save_figures(figures: Mapping[str, Figure], directory: Path) -> list[Path]:
    """Draw each figure to a file of its name in ``directory``, and return their paths.

    Raises
    ------
    OutputError
        If a file cannot be written.
    """
    paths = []
    for name, figure in figures.items():
        paths.append(path := directory / name)
        save_figure(figure, path)
    return paths


def save_figure(figure: Figure, path: Path) -> None:
    """Draw ``figure`` to ``path``.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    # A canvas of its own: pyplot would keep global state and choose a backend that may need a display.
    FigureCanvasAgg(figure)
    try:
        with warnings.catch_warnings():
            # A name in a script that the font lacks is drawn as boxes; that is no reason to interrupt a run.
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            figure.savefig(path, dpi=150)
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(f"{path} cannot be written ({error.strerror}); pass another directory with --output")
