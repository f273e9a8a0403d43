"""The documentation names everything: each public name on a reference page, each status and error on the page "debug".

Nothing is built here: the pages are read as text, so that this is quick. ``make docs`` builds them.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import socket
import subprocess
import sys
import textwrap
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
    "learnable",
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
            elif inside and re.fullmatch(r"   ~?[A-Za-z_][\w.]*", line):
                found.add(f"{module}.{line.strip().removeprefix('~')}")
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


@pytest.mark.parametrize("status", bilevel.OuterStatus, ids=lambda status: status.name)
def test_the_page_debug_lists_every_end_of_an_outer_loop(status: bilevel.OuterStatus) -> None:
    page = (DOCS / "how_to" / "debug.rst").read_text().partition("\nHow an outer loop can end\n")[2]
    entry = re.search(rf"^``{status.name}``\n((?:   .*\n|\n)+)", page, re.MULTILINE)
    assert entry is not None and "*Remedy:*" in entry.group(1)
    assert entry.group(1).lstrip().startswith("A success.") == status.success


@pytest.mark.parametrize("name", bilevel.errors.__all__)
def test_the_page_debug_lists_every_error_and_warning(name: str) -> None:
    page = (DOCS / "how_to" / "debug.rst").read_text()
    entry = re.search(rf"^``{name}``\n((?:   .*\n|\n)+)", page, re.MULTILINE)
    assert entry is not None, f"{name} has no entry"
    assert "*Remedy:*" in entry.group(1) or "Base" in entry.group(1)


def test_each_release_has_each_heading_of_the_changelog_once() -> None:
    releases = re.split(r"^## ", (DOCS.parent / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1:]
    for release in releases:
        headings = re.findall(r"^### (.*)$", release, re.MULTILINE)
        order = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
        assert headings == [name for name in order if name in headings], release.splitlines()[0]


# Pages that people write; the others are made from the package and from examples/.
WRITTEN = [page for page in sorted(DOCS.rglob("*.rst")) if not {"generated", "gallery", "_build"} & {*page.parts}]
WIDEST = 88
BLOCK = re.compile(
    r"^(?P<indent> *)\.\. (?P<kind>code-block|code|testcode|doctest|testoutput|literalinclude)::(?P<language>.*)\n"
    r"(?P<body>(?:(?P=indent) +.*\n|\s*\n)*)",
    re.MULTILINE,
)


def blocks(page: Path) -> list[tuple[str, str, str, str]]:
    """Return kind, language and dedented text of each block of code, and the comment that stands above it."""
    text = page.read_text() + "\n"
    found = []
    for block in BLOCK.finditer(text):
        above = [line.strip() for line in text[: block.start()].splitlines() if line.strip()]
        comment = (
            above[-1].removeprefix(".. ") if above and re.match(r"\.\. [^:]*$|\.\. (not run|run by)", above[-1]) else ""
        )
        found.append((block["kind"], block["language"].strip(), textwrap.dedent(block["body"]).strip("\n"), comment))
    return found


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(DOCS)))
def test_python_on_a_page_is_run_or_says_why_not(page: Path) -> None:
    """``make docs`` runs ``testcode`` and ``doctest``. Anything else in Python has a comment above it: not run, and why, or where."""
    assert "::\n\n   >>>" not in page.read_text().replace(".. doctest::\n\n", ""), (
        "a prompt outside of a doctest is not run"
    )
    for kind, language, text, comment in blocks(page):
        if kind in ("testcode", "doctest", "testoutput"):
            continue
        assert (kind, language) in {("code-block", name) for name in ("python", "console", "text")}, (kind, language)
        if language == "python":
            runner = re.match(r"run by (tests/\S+\.py)$", comment)
            assert runner or re.match(r"not run: \S+", comment), text
            assert runner is None or page.name in (DOCS.parent / runner.group(1)).read_text(), text


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(DOCS)))
def test_code_on_a_page_is_narrow(page: Path) -> None:
    """What is printed may be wider: it is what the library prints, and its box scrolls."""
    code = {"testcode": "", "doctest": r">>> |\.\.\. ", "code-block python": "", "code-block console": ""}
    wide = [
        line
        for kind, language, text, _ in blocks(page)
        if (begin := code.get(f"{kind} {language}".strip())) is not None
        for line in text.splitlines()
        if len(line) > WIDEST and re.match(begin, line)
    ]
    assert wide == []


def commands() -> list[str]:
    """Return every command that a page or the README shows, on one line each."""
    shown = [text for page in WRITTEN for _, language, text, _ in blocks(page) if language == "console"]
    lines = "\n".join(shown).replace("\\\n", " ").splitlines()
    readme = re.findall(r"```sh\n(.*?)```", (DOCS.parent / "README.md").read_text(), re.DOTALL)
    return sorted({line.removeprefix("$ ").split("  #")[0].strip() for line in [*lines, *"".join(readme).splitlines()]})


@pytest.mark.parametrize("line", commands())
def test_a_command_on_a_page_exists(line: str) -> None:
    """Of our program all options are read, of make the targets, of pip the extras. Nothing is executed."""
    words = shlex.split(line)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (DOCS.parent / "Makefile").read_text(), re.MULTILINE)
    elif "bilevel.cli" in words or words[0] == "bilevel":
        import typer

        from bilevel.cli.main import _app

        command, rest = (
            typer.main.get_command(_app()),
            words[words.index("bilevel.cli") + 1 if "bilevel.cli" in words else 1 :],
        )
        while rest and rest[0] in getattr(command, "commands", {}):
            command, rest = command.commands[rest[0]], rest[1:]
        command.make_context("bilevel", rest)
    else:
        known = r"(pip install|python -m pip install|python|torchrun|git clone|cd|source|\.venv/bin/python|python3) .*"
        assert re.fullmatch(known, line), line
        for extras in re.findall(r"\.\[([\w,]+)\]", line):
            declared = (DOCS.parent / "pyproject.toml").read_text()
            assert all(re.search(rf"^{extra} = \[", declared, re.MULTILINE) for extra in extras.split(","))


def test_the_script_of_the_page_machines_prints_the_same_in_one_process_and_in_two(tmp_path: Path) -> None:
    page = DOCS / "how_to" / "machines.rst"
    (script,) = [text for _, language, text, _ in blocks(page) if language == "python"]
    (said,) = [text for _, language, text, _ in blocks(page) if language == "text"]
    (tmp_path / "share.py").write_text(script)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-addr",
        "127.0.0.1",
        "--master-port",
        port,
    ]
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(DOCS.parent)}
    for launcher in ([], torchrun):
        ended = subprocess.run(
            [sys.executable, *launcher, "share.py"], cwd=tmp_path, env=os.environ | environment,
            capture_output=True, text=True, timeout=280,
        )  # fmt: skip
        assert ended.stdout.strip() == said, ended.stderr


PAGES = [*DOCS.rglob("*.rst"), *DOCS.rglob("*.md"), *DOCS.parent.glob("*.md")]
MODULES = (DOCS.parent / "bilevel").rglob("*.py")


@pytest.mark.parametrize("path", [*PAGES, *MODULES], ids=lambda path: str(path.relative_to(DOCS.parent)))
def test_nothing_is_installed_from_an_index_by_our_name(path: Path) -> None:
    # The name may be a stranger's there: install lines are those of a clone, `pip install .`.
    assert not re.search(r"pip install (-\S+ )*['\"]?bilevel", path.read_text())
