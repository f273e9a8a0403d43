"""Applications stand on the public API alone, like any user's code."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import bilevel

ROOT = Path(bilevel.__file__).parent
# What an application may import beside public names: itself, what commands share (files, tables, pictures, progress bars), the checksum
# of a saved state, and the import of optional packages.
OWN = {
    **dict.fromkeys(
        (ROOT / "hyperopt").rglob("*.py"),
        ("bilevel.hyperopt", "bilevel.cli.output", "bilevel.cli.table", "bilevel.cli.encoding", "bilevel.cli.progress"),
    ),
    **dict.fromkeys(
        (ROOT / "meta").rglob("*.py"),
        ("bilevel.meta", "bilevel.cli.output", "bilevel.cli.pictures", "bilevel.checksum"),
    ),
    **dict.fromkeys((ROOT / "testing").rglob("*.py"), ("bilevel.testing",)),
    **dict.fromkeys((ROOT / "learnable").rglob("*.py"), ("bilevel.learnable", "bilevel.stochastic")),
    ROOT / "cli/main.py": (
        "bilevel.hyperopt",
        "bilevel.meta",
        "bilevel.cleaning",
        "bilevel.cli.output",
        "bilevel.cli.allocator",
    ),
    ROOT / "cli/output.py": (),
    ROOT / "cli/allocator.py": (),
    ROOT / "display.py": ("bilevel.stochastic", "bilevel.optional_packages"),
    ROOT / "loggers.py": ("bilevel.stochastic", "bilevel.optional_packages"),
}


@pytest.mark.parametrize("path", OWN, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_only_the_public_api_and_the_application_itself_are_imported(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules = [node.module or ""]
            if node.module == "bilevel":
                hidden = [
                    alias.name for alias in node.names if alias.name.startswith("_") and alias.name != "__version__"
                ]
                modules += [f"bilevel.{name}" for name in hidden]
        for module in modules:
            if module.split(".")[0] == "bilevel":
                allowed = module == "bilevel" or module.startswith(OWN[path])
                assert allowed, f"{path.name}: {module}"
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "bilevel":
            private = node.attr.startswith("_") and not node.attr.startswith("__")
            assert not private, f"{path.name}: bilevel.{node.attr}"


def test_importing_the_library_imports_no_package_of_the_command_line() -> None:
    code = (
        "import sys, bilevel.hyperopt, bilevel.meta, bilevel.learnable, bilevel.cli, bilevel.display, bilevel.loggers\n"
        "names = ('typer', 'rich', 'sklearn', 'matplotlib', 'PIL', 'pooch', 'hypothesis', 'tensorboard', 'wandb', 'mlflow')\n"
        "print([name for name in names if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
