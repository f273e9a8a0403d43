"""The directive ``statuses``: every status of a solve with its meaning and remedy, read from ``bilevel.Status``."""

from __future__ import annotations

import re

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from sphinx.application import Sphinx

from bilevel import Status

# Code inside a sentence, which is set as such: calls, keyword arguments, names with dots or underscores.
_CODE = re.compile(
    r"1e-3 \* \(\(x - x0\) \*\* 2\)\.sum\(\)|\(x\*\*2 \+ eps\*\*2\)\.sqrt\(\)"
    r"|(?:\w+=)?[\w.]*\w\((?:[^()]|\([^()]*\))*\)|\w+='\w+'|\w+(?:\.\w+)+|[a-z]+_[a-z_]+|prox="
)


def status_entries() -> list[str]:
    """Return the lines of a definition list in reStructuredText, with a label for each status."""
    lines: list[str] = []
    for status in Status:
        if status is Status.RUNNING:
            continue  # no report shows it
        kind = "A success. " if status.success else ""
        meaning = f"{kind}The solve {_marked(status.meaning)}."
        lines += [f".. _status-{status.name}:", "", f"``{status.name}``", f"   {meaning}", ""]
        lines += [f"   *Remedy:* {_marked(status.remedy)}.", ""]
    return lines


def _marked(text: str) -> str:
    return _CODE.sub(lambda code: f"``{code.group()}``", text)


class Statuses(Directive):
    """``.. statuses::`` without arguments."""

    def run(self) -> list[nodes.Node]:
        """Parse the entries as if they stood on the page."""
        node = nodes.section()
        node.document = self.state.document
        self.state.nested_parse(StringList(status_entries(), source="bilevel.Status"), self.content_offset, node)
        return list(node.children)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("statuses", Statuses)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
