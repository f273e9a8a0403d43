"""Mend the links from a page of source code back to the documentation.

``sphinx.ext.viewcode`` keeps one module name for each source file. If objects of one file are documented under two names,
as ``bilevel.HOAG`` and ``bilevel.outer.methods.Evaluation`` are, then some of its anchors do not exist. Here each anchor
is looked up among the objects of the page that the link leads to.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

from sphinx.application import Sphinx

LINK = re.compile(r'(?P<before>href="(?P<page>[^"#]+)\.html#)(?P<anchor>bilevel\.[^"]+)"')


def mend(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """Replace the anchors of a source page that lead nowhere."""
    if not pagename.startswith("_modules/"):
        return
    anchors: dict[str, list[str]] = {}
    for entry in app.env.domaindata["py"]["objects"].values():
        anchors.setdefault(entry.docname, []).append(entry.node_id)

    def mended(link: re.Match[str]) -> str:
        page = posixpath.normpath(posixpath.join(posixpath.dirname(pagename), link["page"]))
        known = anchors.get(page, [])
        tail = link["anchor"].removeprefix("bilevel")
        ends = {anchor for anchor in known if anchor.endswith(tail)}
        anchor = link["anchor"] if link["anchor"] in known or len(ends) != 1 else ends.pop()
        return f'{link["before"]}{anchor}"'

    context["body"] = LINK.sub(mended, context["body"])


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    app.connect("html-page-context", mend)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
