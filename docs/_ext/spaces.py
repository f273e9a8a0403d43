"""Keep a number and its per cent sign on one line, in text and in the cells of tables."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

_BREAKABLE = re.compile(r"(?<=\d) (?=%)| (?=± )|(?<=±) ")


def join(app: Sphinx, doctree: nodes.document) -> None:
    """Replace the spaces of all text but code by spaces at which no line ends."""
    for text in list(doctree.findall(nodes.Text)):
        literal = isinstance(text.parent, (nodes.literal, nodes.math, nodes.raw, nodes.FixedTextElement))
        if not literal and (kept := _BREAKABLE.sub("\u00a0", text)) != text:
            text.parent.replace(text, nodes.Text(kept))


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    app.connect("doctree-read", join)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
