"""Write ``sitemap.xml``, where the site's address is known: ``html_baseurl``, which the documentation workflow sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from sphinx.application import Sphinx


def write(app: Sphinx, failure: Exception | None) -> None:
    """Write the addresses of all pages but those of source code."""
    base = app.config.html_baseurl
    if failure is not None or app.builder.format != "html" or not base:
        return
    pages = sorted(app.env.found_docs)
    lines = [
        f"<url><loc>{escape(base.rstrip('/') + '/' + app.builder.get_target_uri(page))}</loc></url>" for page in pages
    ]
    header = '<?xml version="1.0" encoding="utf-8"?>\n<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">'
    Path(app.outdir, "sitemap.xml").write_text("\n".join([header, *lines, "</urlset>\n"]), encoding="utf-8")


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    app.connect("build-finished", write)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
