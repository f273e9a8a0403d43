"""Let autodoc show the docstrings of attributes as they are, and no bases that are private."""

from __future__ import annotations

from typing import Any

from sphinx.application import Sphinx


class Attributes:
    """The docstrings of attributes, kept from napoleon. It would read what precedes a colon in the first line as a type."""

    def __init__(self) -> None:
        self.kept: list[str] = []

    def set_aside(self, app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
        """Leave napoleon an empty docstring."""
        self.kept = []
        if what in ("attribute", "property", "data"):
            self.kept, lines[:] = list(lines), []

    def put_back(self, app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
        """Show the docstring as it is."""
        lines[:0] = self.kept
        self.kept = []


def public_bases(app: Sphinx, name: str, obj: Any, options: Any, bases: list[Any]) -> None:
    """Leave private classes out of the bases, and name theirs instead."""
    for base in list(bases):
        if getattr(base, "__name__", "").startswith("_"):
            place = bases.index(base)
            bases[place : place + 1] = [of for of in base.__bases__ if of is not object]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension, before napoleon, whose priority is 500, and after it."""
    app.setup_extension("sphinx.ext.autodoc")
    attributes = Attributes()
    app.connect("autodoc-process-docstring", attributes.set_aside, priority=400)
    app.connect("autodoc-process-docstring", attributes.put_back, priority=600)
    app.connect("autodoc-process-bases", public_bases)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
