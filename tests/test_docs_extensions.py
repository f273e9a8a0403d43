"""The extensions of the documentation: subscripts and spaces in text, formulas, attributes, bases, the tree in the sidebar."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sphinx")
pytest.importorskip("latex2mathml")

from docutils import nodes

ROOT = Path(__file__).parents[1]
FORMULA = re.compile(r"^( *)\.\. math::(.*\n(?:\1 +.*\n|\s*\n)*)|:math:`([^`]+)`", re.MULTILINE)


@pytest.fixture(autouse=True)
def extensions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "_ext"))
    for name in ("typography", "mathml", "docstrings", "sidebar"):
        sys.modules.pop(name, None)


def page(text: str) -> nodes.document:
    from docutils.utils import new_document

    document = new_document("page")
    document += nodes.paragraph("", "", nodes.Text(text), nodes.literal("", text))
    return document


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("L_H = 0 and L_θF", "L[H] = 0 and L[θF]"),
        ("∂_φ∇_θ F, x_{k+1}", "∂[φ]∇[θ] F, x[k+1]"),
        ("argmin_x G, λ_min(H), ‖q‖_H", "argmin[x] G, λ[min](H), ‖q‖[H]"),
        ("on_failure, n_features, a_loss", "on_failure, n_features, a_loss"),
        ("35 % of 2 ± 1, 1e-10", "35\u00a0% of 2\u00a0±\u00a01, 1e-\u206010"),
    ],
)
def test_subscripts_and_spaces_of_text_are_set_and_code_is_kept(text: str, shown: str) -> None:
    from typography import set_text

    document = page(text)
    set_text(None, document)
    paragraph, code = document[0], document[0][-1]
    seen = "".join(
        f"[{part.astext()}]" if isinstance(part, nodes.subscript) else part.astext() for part in paragraph[:-1]
    )
    assert (seen, code.astext()) == (shown, text)


def test_the_tables_of_the_reference_have_subscripts() -> None:
    from sphinx.ext.autosummary import autosummary_table
    from typography import set_text

    document = page("L_H")
    table = autosummary_table("")
    table += document.pop(0)
    document += table
    set_text(None, document)
    assert [low.astext() for low in document.findall(nodes.subscript)] == ["H"]


def formulas() -> Iterator[str]:
    for path in sorted([*ROOT.glob("docs/*/*.rst"), *ROOT.glob("bilevel/**/*.py")]):
        for found in FORMULA.finditer(path.read_text(encoding="utf-8")):
            yield (found[2] or found[3]).strip()


def test_every_formula_has_mathml() -> None:
    from mathml import _UNKNOWN, convert

    found = list(formulas())
    assert len(found) > 20
    assert not [formula for formula in found if _UNKNOWN.search(convert(formula))]
    assert _UNKNOWN.search(convert(r"\arg\min_x f"))


def test_the_first_line_of_an_attribute_is_no_type() -> None:
    from docstrings import Attributes
    from sphinx.ext.napoleon import Config, _process_docstring

    class App:
        config = Config()

    def shown(*handlers: Any) -> list[str]:
        lines = ["The next class, and the first class for the last: a mistake."]
        for handler in handlers:
            handler(App(), "attribute", "Noise.NEXT", None, None, lines)
        return lines

    attributes = Attributes()
    assert any(":type:" in line for line in shown(_process_docstring))
    whole = shown(attributes.set_aside, _process_docstring, attributes.put_back)
    assert whole[0] == "The next class, and the first class for the last: a mistake."
    assert not any(":type:" in line for line in whole)


def test_private_bases_are_replaced_by_theirs() -> None:
    from docstrings import public_bases

    private = type("_Private", (int,), {})
    bases: list[Any] = [private, str]
    public_bases(None, "", None, None, bases)
    assert bases == [int, str]


def test_the_tree_of_the_sidebar_marks_what_sphinx_marks(tmp_path: Path) -> None:
    from sidebar import Trees
    from sphinx.application import Sphinx
    from sphinx.environment.adapters.toctree import global_toctree_for_doc

    files = {"index": ["part/index", "last"], "part/index": ["one", "two"], "part/one": [], "part/two": [], "last": []}
    for name, below in files.items():
        path = tmp_path / f"{name}.rst"
        path.parent.mkdir(exist_ok=True)
        tree = "\n.. toctree::\n\n" + "".join(f"   {child}\n" for child in below) if below else ""
        path.write_text(f"Page {name}\n{'=' * 20}\n{tree}", encoding="utf-8")
    (tmp_path / "conf.py").write_text("", encoding="utf-8")
    app = Sphinx(tmp_path, tmp_path, tmp_path / "out", tmp_path / "out" / "tree", "html", status=None, warning=None)
    app.build()
    trees = Trees()
    options = {"collapse": False, "titles_only": True, "maxdepth": -1, "includehidden": True}
    for name in (*files, "genindex"):
        expected = global_toctree_for_doc(app.env, name, app.builder, tags=app.tags, **options)
        shown = app.builder.render_partial(expected)["fragment"].replace('<ul class="current">', "<ul>")
        assert trees.marked(app, name, options) == shown
    assert len(trees.known) == 2  # a tree for each folder
