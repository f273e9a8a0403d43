"""The floors of the house, as a test: imports go strictly down, from one folder to those below it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "bilevel"

# From the top down. A module imports from the lines below its own, or from its own folder. Members of one line do not know each other.
FLOORS = (
    # Applications, and what belongs to programs. They import the package itself, as users do.
    ("hyperopt", "meta", "cleaning", "learnable", "testing", "cli", "display", "loggers"),
    ("stochastic",),  # bilevel methods on minibatches, on the public API as well
    ("outer",),  # loops in θ
    ("problems",),  # bilevel problems and their hypergradients
    ("cones",),  # cones, and cone programs as differentiable functions
    ("quadratic_programs",),  # quadratic programs as differentiable functions
    ("layers", "certificates"),  # differentiable solves; error bounds
    ("implicit",),  # the two autograd Functions: the rule
    ("solvers",),  # inner solvers
    ("linear",),  # linear solvers
    ("equations",),  # the system R(x, θ) = 0 and its linearisation
    ("replay",),  # replayed evaluations
    ("operators", "schedules", "robust", "prox"),  # linear maps known by their products; robust losses; proximal terms
    # Failure policies, accuracies, flat vectors, and what torch gets wrong.
    ("policy", "tolerance", "pytree", "checksum", "_torch"),
    ("setting_checks", "recording", "optional_packages"),
    ("errors",),
    ("reports",),
    ("status", "_version"),
)
HEIGHT = {name: len(FLOORS) - number for number, line in enumerate(FLOORS) for name in line}
APPLICATIONS = FLOORS[0] + FLOORS[1]
# Inner solvers that use linear solvers; the others know none.
USE_LINEAR_SOLVERS = (
    "newton",
    "levenberg_marquardt",
    "parts.truncated_cg",
    "judging.error",
    "composite.reduced",
    "defaults",
)

MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def name_of(path: Path) -> str:
    parts = ("bilevel", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def folder_of(module: str) -> str:
    """Return the folder, or the module at the top, that ``module`` belongs to."""
    folder = module.split(".")[1]
    assert folder in HEIGHT, f"{module} stands on no floor: give {folder} one in tests/test_floors.py"
    return folder


def imports_of(path: Path) -> set[str]:
    """Return the modules of ours that a file imports, ``TYPE_CHECKING`` blocks included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "bilevel"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write `{ast.unparse(node)}` as an absolute import"
            if node.module is None or node.module.split(".")[0] != "bilevel":
                continue
            found |= {module_named(node.module, alias.name) for alias in node.names}
    return found


def module_named(package: str, name: str) -> str:
    """Return ``package.name`` if that is a module, else ``package``: the module that ``from package import name`` reaches."""
    place = PACKAGE.parent.joinpath(*package.split("."), name)
    return f"{package}.{name}" if place.is_dir() or place.with_suffix(".py").is_file() else package


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_down_only(path: Path) -> None:
    module = name_of(path)
    folder = folder_of(module)
    for imported in imports_of(path):
        if imported == "bilevel":
            assert folder in APPLICATIONS, f"{module} imports the package itself, which only applications may"
            continue
        below = folder_of(imported)
        # The commands are put together of the applications, which write their files with ``cli.output``.
        same = below == folder or module == "bilevel.cli.main" or (below == "cli" and folder in APPLICATIONS)
        assert same or HEIGHT[below] < HEIGHT[folder], f"{module} imports {imported}, which is not below it"
        if folder == "implicit":
            assert below not in ("solvers", "linear"), f"{module} imports {imported}: the rule knows no solver"
        if folder == "solvers" and below == "linear":
            assert module.removeprefix("bilevel.solvers.") in USE_LINEAR_SOLVERS, f"{module} imports {imported}"


def test_no_two_files_import_each_other() -> None:
    imports = {name_of(path): imports_of(path) - {"bilevel"} for path in MODULES}
    finished: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"files import each other: {' -> '.join((*way[way.index(module) :], module))}"
        if module in finished:
            return
        for imported in sorted(imports.get(module, ())):
            # A folder's list of names imports its files, and they may import a file beside them.
            if not module.startswith(imported + "."):
                visit(imported, (*way, module))
        finished.add(module)

    for module in imports:
        visit(module, ())


def test_the_package_is_a_list_of_names_and_nothing_else() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    assert ast.get_docstring(tree), "bilevel/__init__.py has lost its docstring"
    for node in tree.body[1:]:
        if isinstance(node, ast.If):
            assert ast.unparse(node.test) == "TYPE_CHECKING" and all(
                isinstance(line, ast.ImportFrom) for line in node.body
            )
        elif isinstance(node, ast.FunctionDef):
            assert node.name in ("__getattr__", "__dir__"), ast.unparse(node)
        else:
            assert isinstance(node, (ast.Import, ast.ImportFrom, ast.Assign)), ast.unparse(node)
        if isinstance(node, ast.Assign):
            assert [ast.unparse(target) for target in node.targets] in (["__all__"], ["_IMPORTED_WHEN_USED"])


_UNSAFE = {
    f"torch.linalg.{name}"
    for name in ("eig", "eigh", "eigvals", "eigvalsh", "svd", "svdvals", "pinv", "solve", "inv", "lstsq")
}


@pytest.mark.parametrize(
    "path", [path for path in MODULES if folder_of(name_of(path)) not in APPLICATIONS], ids=name_of
)
def test_no_factorisation_can_raise_for_a_batch(path: Path) -> None:
    if name_of(path) == "bilevel._torch.factorisations":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in _UNSAFE, (
                f"{name_of(path)} calls {ast.unparse(node)}: take bilevel/_torch/factorisations.py"
            )
