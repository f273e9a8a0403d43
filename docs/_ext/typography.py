"""Set numbers and formulas that are written in plain text: no line ends within 35 % or 1e-10, and L_H has a subscript.

Docstrings are read in terminals too. So they write ∇_φ G and x_{k+1}, which become subscripts here.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

_BREAKABLE = re.compile(r"(?<=\d) (?=%)| (?=± )|(?<=±) ")
# After the minus of 1e-10, where a browser would end a line: an invisible sign forbids it.
_HYPHEN = re.compile(r"(?<=\de-)(?=\d)")
# A letter that stands alone, or a sign, with a subscript in braces or of one to three letters; λ_min and the like.
_SUBSCRIPT = re.compile(
    r"(?:\bargmin|(?<![\w.])[^\W\d_]\u0302?|[∇∂ΣΠ]|[‖)])_(?:\{([^{}]+)\}|((?:min|max|best)\b|[^\W_]{1,3}(?![A-Za-z_])))"
)
_VERBATIM = (
    nodes.literal,
    nodes.literal_block,
    nodes.doctest_block,
    nodes.math,
    nodes.math_block,
    nodes.raw,
    nodes.title,
    addnodes.desc_signature,
    addnodes.literal_strong,
    addnodes.pending_xref,
)


def set_text(app: Sphinx, doctree: nodes.document) -> None:
    """Change all text of a page but code, titles and links."""
    for text in list(doctree.findall(nodes.Text)):
        if not _inside(text, _VERBATIM):
            parts = _parts(_HYPHEN.sub("\u2060", _BREAKABLE.sub("\u00a0", text)))
            if [text] != parts:
                text.parent.replace(text, parts)


def _inside(node: nodes.Node, kinds: tuple[type, ...]) -> bool:
    while node.parent is not None:
        node = node.parent
        if isinstance(node, kinds):
            return True
    return False


def _parts(text: str) -> list[nodes.Node]:
    """Return the text with its subscripts as nodes."""
    parts: list[nodes.Node] = []
    end = 0
    for found in _SUBSCRIPT.finditer(text):
        number = 1 if found[1] is not None else 2
        low = found.start(number) - (2 if number == 1 else 1)  # where the underscore is
        parts += [nodes.Text(text[end:low]), nodes.subscript("", found[number])]
        end = found.end()
    return [*parts, nodes.Text(text[end:])] if end < len(text) else parts


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    app.connect("doctree-read", set_text)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
