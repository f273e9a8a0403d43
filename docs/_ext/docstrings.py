"""Let autodoc show the docstrings of attributes as they are, and no bases that are private."""

from __future__ import annotations

from typing import Any

from sphinx.application import Sphinx


def whole_sentences(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Keep napoleon from reading what precedes a colon in an attribute's first line as its type."""
    if what in ("attribute", "property", "data") and lines:
        lines.insert(0, "")


def public_bases(app: Sphinx, name: str, obj: Any, options: Any, bases: list[Any]) -> None:
    """Leave private classes out of the bases, and name theirs instead."""
    for base in list(bases):
        if getattr(base, "__name__", "").startswith("_"):
            place = bases.index(base)
            bases[place : place + 1] = [of for of in base.__bases__ if of is not object]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension. It comes before napoleon."""
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-docstring", whole_sentences, priority=400)
    app.connect("autodoc-process-bases", public_bases)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
