"""The scripts of the gallery: each compiles and begins as a page does, and the fastest run. `make gallery` runs all of them."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
WIDEST = 88
FASTEST = ("portfolio", "svm_dual", "cournot_tax")

pytestmark = pytest.mark.skipif(not EXAMPLES.exists(), reason="examples are part of a clone, not of a wheel")


def test_the_gallery_has_at_least_twenty_scripts() -> None:
    assert len(SCRIPTS) >= 20


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_has_the_form_of_a_page(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    tree = ast.parse(text)
    compile(tree, script.name, "exec")
    header = (ast.get_docstring(tree) or "").splitlines()
    assert len(header) >= 4 and header[1] == "=" * len(header[0]), "begin with a title underlined by ="
    assert header[3].startswith("**What to see:** "), "say what to see in the first paragraph"
    assert "\n# %%\n" in text and "print(" in text and "plt.show()" in text
    assert all(len(line) <= WIDEST for line in text.splitlines())
    # Whatever is drawn has labelled axes.
    assert ("set_xlabel" in text and "set_ylabel" in text) or "set_axis_off" in text


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # matplotlib asks torch for an array
@pytest.mark.parametrize("name", FASTEST)
def test_an_example_runs(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown: list[int] = []
    monkeypatch.setattr(pyplot, "show", lambda: shown.extend(pyplot.get_fignums()) or pyplot.close("all"))
    with matplotlib.rc_context():
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert shown and any(character.isdigit() for character in capsys.readouterr().out)
