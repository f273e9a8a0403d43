"""Resolve the tree of pages in the sidebar once for each folder, and not for each page.

The theme shows the whole tree beside every page. Sphinx resolves all of its entries anew for each page, which took nine tenths
of the time of writing. The trees of two pages in one folder differ only in what is marked as current: the page and those above it.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

from sphinx.application import Sphinx
from sphinx.environment.adapters.toctree import global_toctree_for_doc

_ENTRY = r'<li class="(toctree-l\d+)"><a class="reference internal" href="{}">'
# The name of a page that is in no tree, so that nothing is marked.
_NOWHERE = "-"


class Trees:
    """The trees of one build, without marks, by folder and options."""

    def __init__(self) -> None:
        self.known: dict[tuple[Any, ...], str] = {}

    def replace(self, app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
        """Give the theme a ``toctree`` that marks the page in a tree that is already resolved."""
        if "toctree" in context:
            context["toctree"] = lambda **options: self.marked(app, pagename, options)

    def marked(self, app: Sphinx, pagename: str, options: dict[str, Any]) -> str:
        """Return the tree beside a page, as HTML."""
        folder = posixpath.dirname(pagename)
        key = folder, *sorted(options.items())
        if key not in self.known:
            beside = posixpath.join(folder, _NOWHERE)
            tree = global_toctree_for_doc(app.env, beside, app.builder, tags=app.tags, **options)
            self.known[key] = app.builder.render_partial(tree)["fragment"]
        html = self.known[key]
        for name in self._above(app, pagename):
            address = app.builder.get_relative_uri(posixpath.join(folder, _NOWHERE), name)
            if name == pagename:
                mark = r'<li class="\1 current"><a class="current reference internal" href="#">'
            else:
                mark = rf'<li class="\1 current"><a class="reference internal" href="{address}">'
            html = re.sub(_ENTRY.format(re.escape(address)), mark, html)
        return html

    @staticmethod
    def _above(app: Sphinx, pagename: str) -> set[str]:
        """Return the page and all pages whose trees lead to it."""
        found, waiting = set(), [pagename]
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                waiting += [parent for parent, children in app.env.toctree_includes.items() if name in children]
        return found


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension. It comes before the theme, which asks for the tree in the same event."""
    app.connect("html-page-context", Trees().replace, priority=100)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
