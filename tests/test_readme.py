"""What the README shows runs as it stands there, and prints what it says."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
from pathlib import Path

import torch

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_python_blocks_run_in_order_and_print_what_is_said() -> None:
    namespace: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 4
    for code, said in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(README), "exec"), namespace)
        assert printed.getvalue() == said
    layer = namespace["layer"]
    a = torch.tensor([0.5, 1.0], dtype=torch.float64, requires_grad=True)
    layer(torch.zeros(2, dtype=torch.float64), a).sum().backward()
    assert bool(torch.isfinite(a.grad).all())


def test_a_users_solver_takes_fewer_than_twenty_lines() -> None:
    block = re.search(r"```python\n.*?(def by_scipy.*?)\n\n\n", README.read_text(), flags=re.DOTALL)
    assert block is not None
    assert len(block.group(1).splitlines()) < 20


def test_it_is_short() -> None:
    assert len(README.read_text().splitlines()) < 150


def test_a_release_has_absolute_links_and_addresses() -> None:
    tools = runpy.run_path(str(README.parent / ".ci" / "addresses.py"))
    text = tools["absolute"](README.read_text(), "https://example.org/o/bilevel", "v1")
    assert "](https://example.org/o/bilevel/raw/v1/docs/figures/wrong_labels.png)" in text
    assert "[`CONTRIBUTING.md`](https://example.org/o/bilevel/blob/v1/CONTRIBUTING.md)" in text
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) >= 4 and all(link.startswith("https://") for link in links)
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
    project = tools["with_urls"]((README.parent / "pyproject.toml").read_text(), "https://example.org/o/bilevel", "v1")
    assert 'Issues = "https://example.org/o/bilevel/issues"\n\n[project.scripts]' in project
