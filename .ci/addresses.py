"""Before a release, write the repository's address into the package: links of the README, and ``project.urls``.

An index shows the README without the repository beside it, so that links have to be absolute. The address is known where the release
is made: ``python .ci/addresses.py https://HOST/OWNER/NAME v0.2.0``.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def absolute(readme: str, address: str, tag: str) -> str:
    """Return the README with absolute links: images as files, the others as pages of the repository."""

    def link(found: re.Match[str]) -> str:
        kind = "raw" if found["image"] else "blob"
        return f"{found['image']}[{found['text']}]({address}/{kind}/{tag}/{found['target']})"

    return re.sub(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?!https?:|#)(?P<target>[^)]+)\)", link, readme)


def with_urls(project: str, address: str, tag: str) -> str:
    """Return ``pyproject.toml`` with ``project.urls``."""
    urls = f"""[project.urls]
Source = "{address}"
Documentation = "{address}/tree/{tag}/docs"
Changelog = "{address}/blob/{tag}/CHANGELOG.md"
Issues = "{address}/issues"

"""
    before, scripts, after = project.partition("[project.scripts]")
    assert scripts and "[project.urls]" not in project
    return before + urls + scripts + after


def main() -> None:
    """Change the two files in place."""
    address, tag = sys.argv[1].rstrip("/"), sys.argv[2]
    for name, change in (("README.md", absolute), ("pyproject.toml", with_urls)):
        path = ROOT / name
        path.write_text(change(path.read_text(encoding="utf-8"), address, tag), encoding="utf-8")


if __name__ == "__main__":
    main()
