"""Applications stand on the public API alone, like any user's code."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import bilevel.hyperopt

FOLDER = Path(bilevel.hyperopt.__file__).parent
FILES = [*FOLDER.glob("*.py"), FOLDER.parent / "cli.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_only_the_public_api_and_the_application_itself_are_imported(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules = [node.module or ""]
        for module in modules:
            if module.split(".")[0] == "bilevel":
                assert module == "bilevel" or module.startswith("bilevel.hyperopt"), f"{path.name}: {module}"


def test_importing_the_library_imports_no_package_of_the_command_line() -> None:
    code = (
        "import sys, bilevel.hyperopt, bilevel.cli\n"
        "print([name for name in ('typer', 'rich', 'sklearn', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
