"""Packages that only a part of the library needs: they are imported when that part is used."""

from __future__ import annotations

import importlib
from typing import Any

from bilevel.errors import ArgumentError

__all__ = ["import_optional"]


def import_optional(module: str, where: str, remedy: str) -> Any:
    """Return the imported ``module``.

    Parameters
    ----------
    module
        Its full name, such as ``"rich.progress"``.
    where
        What needs it, for the message.
    remedy
        What to do without it.

    Raises
    ------
    ArgumentError
        If it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ArgumentError(
            f"{where}: expected {module} to be installed, and it cannot be imported ({error}); {remedy}"
        ) from error
