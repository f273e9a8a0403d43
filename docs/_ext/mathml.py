"""Render mathematics as MathML when the pages are built, so that a reader needs neither a network nor a script."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util.logging import getLogger
from sphinx.util.math import get_node_equation_number
from sphinx.writers.html5 import HTML5Translator

# A command that the converter does not know comes out as text.
_UNKNOWN = re.compile(r">(\\[A-Za-z]+)")


def mathml(node: nodes.math | nodes.math_block, display: str) -> str:
    """Return the formula as MathML, and warn of a command that is unknown."""
    formula = convert(node.astext(), display=display)
    if unknown := _UNKNOWN.search(formula):
        getLogger(__name__).warning("no MathML for %s; write the formula in another way", unknown[1], location=node)
    return formula


def inline(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(mathml(node, "inline"))
    raise nodes.SkipNode


def block(translator: HTML5Translator, node: nodes.math_block) -> None:
    translator.body.append(translator.starttag(node, "div", CLASS="math"))
    if node["number"]:
        translator.body.append(f'<span class="eqno">({get_node_equation_number(translator, node)})</span>')
    translator.body.append(mathml(node, "block"))
    translator.body.append("</div>\n")
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
