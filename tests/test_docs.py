"""The documentation names everything: each public name on a reference page, each status and error on the page "debug".

Nothing is built here: the pages are read as text, so that this is quick. ``make docs`` builds them.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

import bilevel
import bilevel.errors

DOCS = Path(__file__).resolve().parents[1] / "docs"
SUBMODULES = (
    "prox",
    "cones",
    "robust",
    "stochastic",
    "cleaning",
    "testing",
    "display",
    "loggers",
    "meta",
    "operators",
    "certificates",
)
# These are explained by the pages of what they belong to: the version, and the submodules themselves.
WITHOUT_A_PAGE = {"__version__", *SUBMODULES}


def listed() -> set[str]:
    """Return the full names in all autosummary lists of the reference."""
    found: set[str] = set()
    for page in (DOCS / "reference").glob("*.rst"):
        module, inside = "bilevel", False
        for line in page.read_text().splitlines():
            moved = re.match(r"\.\. currentmodule:: (\S+)", line)
            if moved:
                module = moved.group(1)
            if line and not line.startswith(" "):
                inside = line.startswith(".. autosummary::")
            elif inside and re.fullmatch(r"   [A-Za-z_][\w.]*", line):
                found.add(f"{module}.{line.strip()}")
    return found


LISTED = listed()


@pytest.mark.parametrize("name", sorted(set(bilevel.__all__) - WITHOUT_A_PAGE))
def test_every_public_name_has_a_reference_page(name: str) -> None:
    instance = name in ("quadratic_program", "cone_program")  # of a class that nothing else is of, which has the page
    kind = type(getattr(bilevel, name))
    wanted = f"{kind.__module__}.{kind.__name__}" if instance else f"bilevel.{name}"
    homes = {wanted, f"bilevel.operators.{name}"}  # LinearOperator is described with the other operators
    assert homes & LISTED, f"{wanted} stands on no page of docs/reference"


@pytest.mark.parametrize("submodule", SUBMODULES)
def test_every_name_of_a_submodule_has_a_reference_page(submodule: str) -> None:
    names = importlib.import_module(f"bilevel.{submodule}").__all__
    homes = {"IMAML": "bilevel.IMAML"}
    missing = [name for name in names if homes.get(name, f"bilevel.{submodule}.{name}") not in LISTED]
    assert missing == []


def test_every_page_of_the_reference_is_in_its_index() -> None:
    index = (DOCS / "reference" / "index.rst").read_text()
    for page in (DOCS / "reference").glob("*.rst"):
        assert page.stem == "index" or re.search(rf"^   {re.escape(page.stem)}$", index, re.MULTILINE), page.name


@pytest.mark.parametrize("part", ["tutorials", "how_to", "explanation"])
def test_every_page_of_a_part_is_in_its_index_once(part: str) -> None:
    index = (DOCS / part / "index.rst").read_text()
    for page in (DOCS / part).glob("*.*"):
        if page.suffix in (".rst", ".md") and page.stem != "index":
            entries = re.findall(rf"^   {re.escape(page.stem)}$", index, re.MULTILINE)
            assert len(entries) == 1, page.name


def test_the_page_debug_lists_every_status() -> None:
    sys.path.insert(0, str(DOCS / "_ext"))
    try:
        entries = "\n".join(importlib.import_module("statuses").status_entries())
    finally:
        sys.path.pop(0)
    assert "\n.. statuses::\n" in (DOCS / "how_to" / "debug.rst").read_text()
    for status in bilevel.Status:
        if status is bilevel.Status.RUNNING:  # no report shows it
            continue
        assert f"``{status.name}``" in entries
        assert status.remedy in entries.replace("``", "")


@pytest.mark.parametrize("name", bilevel.errors.__all__)
def test_the_page_debug_lists_every_error_and_warning(name: str) -> None:
    page = (DOCS / "how_to" / "debug.rst").read_text()
    entry = re.search(rf"^``{name}``\n((?:   .*\n|\n)+)", page, re.MULTILINE)
    assert entry is not None, f"{name} has no entry"
    assert "*Remedy:*" in entry.group(1) or "Base" in entry.group(1)


PAGES = [*DOCS.rglob("*.rst"), *DOCS.rglob("*.md"), DOCS.parent / "README.md"]
MODULES = (DOCS.parent / "bilevel").rglob("*.py")


@pytest.mark.parametrize("path", [*PAGES, *MODULES], ids=lambda path: str(path.relative_to(DOCS.parent)))
def test_nothing_is_installed_from_an_index_by_our_name(path: Path) -> None:
    # The name may be a stranger's there: install lines are those of a clone, `pip install .`.
    assert not re.search(r"pip install (-\S+ )*['\"]?bilevel", path.read_text())
