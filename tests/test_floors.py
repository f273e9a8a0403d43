"""The floors of the house, as a test: imports go down only.

====  ==================  ==========================================================================
 5    applications, cli   ``hyperopt/``, ``meta/``, ``testing/``, ``cli``, ``_output``: use the public API alone, like any user
 4    problems            ``problem``, ``certificates/``, ``outer/``, goals, guards
 3    layers              ``layers``: argmin, root, fixed_point, linear_solve; ``_layer``, ``_linear_layer``, ``_run``: a call of one; ``_wording``
 2    differentiation     ``_implicit``: the two autograd Functions; imports no solver
 1    solvers             ``solvers/`` (inner), ``linear/`` (linear); of the inner, only Newton's and the estimate of the error use the linear
 0    ground              operators, tolerances, reports, errors, trees, systems, transforms
====  ==================  ==========================================================================
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "bilevel"
GROUND = (
    "operators",
    "tolerance",
    "schedules",
    "reports",
    "errors",
    "_tree",
    "_system",
    "_problem",
    "_inspection",
    "_randomness",
    "_reverse",
    "_pullbacks",
    "_transforms",
    "_norms",
    "_batch_norm",
    "_products",
    "_once",
    "_repeatable",
    "_seen",
    "_sparse",
    "_straight",
    "_straight_modules",
    "_straight_names",
    "_straight_steps",
    "_tapes",
    "_replay",
    "_replaying",
    "_checks",
    "_checksum",
    "_factorisations",
    "_least_squares",
    "_equilibrium",
    "robust",
    "_version",
)
FLOORS = {
    **{f"bilevel.{name}": 0 for name in GROUND},
    "bilevel.solvers": 1,
    "bilevel.linear": 1,
    "bilevel.implicit": 2,
    "bilevel._choice": 3,
    "bilevel.layers.call": 3,
    "bilevel.layers.messages": 3,
    "bilevel.layers.first_call": 3,
    "bilevel.layers.layer": 3,
    "bilevel.layers.least_squares": 3,
    "bilevel.layers.equilibrium": 3,
    "bilevel.layers.rectangular": 3,
    "bilevel.equations.rectangular": 1,
    "bilevel.layers.linear_layer": 3,
    "bilevel.layers": 3,
    "bilevel.certificates": 4,
    "bilevel.problems.checks": 4,
    "bilevel.problems.adaptive.quasi_newton": 4,
    "bilevel.problems.adaptive.search": 4,
    "bilevel.problems.adaptive.error_model": 4,
    "bilevel.problems.adaptive.state": 4,
    "bilevel.problems.outer_loss": 4,
    "bilevel.problems.adaptive.driver": 4,
    "bilevel.problems.warm_start": 4,
    "bilevel.problems.problem": 4,
    "bilevel.problems.hypergradient": 4,
    "bilevel.problems.batching": 4,
    "bilevel.outer": 4,
    "bilevel.hyperopt": 5,
    "bilevel.meta": 5,
    "bilevel.testing": 5,
    "bilevel.cli": 5,
    "bilevel.display": 5,
    "bilevel.cli.output": 5,
    "bilevel.cli.allocator": 5,
}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def name_of(path: Path) -> str:
    parts = ("bilevel", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor_of(module: str) -> int:
    for place, floor in FLOORS.items():
        if module == place or module.startswith(place + "."):
            return floor
    raise AssertionError(f"{module} stands on no floor: give it one in tests/test_floors.py")


def imports_of(path: Path) -> set[str]:
    """Return the modules of ours that a file imports, with ``from bilevel import _x`` seen as the module it may be."""
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
    floor = floor_of(module)
    for imported in imports_of(path):
        if imported == "bilevel":
            assert floor == 5, f"{module} imports the package itself, which only applications may"
            continue
        assert floor_of(imported) <= floor, f"{module} (floor {floor}) imports {imported} (floor {floor_of(imported)})"
        if module == "bilevel.implicit":
            assert not imported.startswith(("bilevel.solvers", "bilevel.linear")), (
                f"{module} imports {imported}: the rule knows no solver"
            )
        if module.startswith("bilevel.linear"):
            assert not imported.startswith("bilevel.solvers"), f"{module}: a linear solver knows no inner solver"
        if module.startswith("bilevel.solvers") and imported.startswith("bilevel.linear"):
            assert module in (
                "bilevel.solvers.newton",
                "bilevel.solvers.levenberg_marquardt",
                "bilevel.solvers._truncated_cg",
                "bilevel.solvers._error",
            ), f"{module} imports {imported}"


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


@pytest.mark.parametrize("path", [path for path in MODULES if floor_of(name_of(path)) < 5], ids=name_of)
def test_no_factorisation_can_raise_for_a_batch(path: Path) -> None:
    if name_of(path) == "bilevel._torch.factorisations":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in _UNSAFE, (
                f"{name_of(path)} calls {ast.unparse(node)}: take bilevel/_torch/factorisations.py"
            )
